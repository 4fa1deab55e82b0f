"""The types that flow through a step, in order, and those of a run. None is changed once it is
made, except `Progress` and what a `TrainState` refers to.

    Prompt -> Response -> Score -> Group -> Sample -> mini-batch -> micro-batch -> loss and Stat

T tokens of a response (EOS included), n responses to a prompt. Nothing is imported at run time:
processes of reward functions load this file, and start without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from types import SimpleNamespace

    from accelerate import Accelerator
    from numpy import ndarray
    from torch import Tensor, dtype
    from torch.nn import Module
    from torch.optim import Optimizer
    from transformers import PreTrainedTokenizerBase


# ---- what flows ----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Prompt:
    """A prompt; `token_ids` is the complete input of the model."""
    id: int         # its row in the data, from 0
    text: str       # after the templates
    token_ids: list[int]
    answer: str     # the ground truth
    row: dict       # all columns of the data
    position: int = 0  # in the endless order of prompts, or in its validation set: unique among the
                       # groups of a step, even if the data repeat a prompt


class SamplingParams(NamedTuple):
    """How responses are sampled."""
    n: int                    # responses to each prompt
    max_tokens: int           # of each response
    temperature: float = 1.0  # 0 takes the likeliest token
    top_p: float = 1.0
    logprobs: float = 1.0     # the share of the prompts whose log-probs vLLM is asked for
    stop: Sequence[str] = ()  # strings that end a response, as an EOS does


@dataclass(frozen=True, eq=False)  # arrays have no single ==
class Response:
    """A response of the policy."""
    token_ids: ndarray  # (T,) int32, with the EOS if there was one
    logprobs: ndarray   # (T,) float32, of the sampler; NaN if they were not asked for
    text: str           # without special tokens
    finish_reason: str  # stop: an EOS or a stop string ended it; length: it was cut


class Task(NamedTuple):
    """What a reward function judges: the responses to one prompt."""
    responses: list[str]
    lengths: list[int]  # in tokens
    ground_truth: str   # the prompt's answer
    row: dict           # the prompt's


@dataclass(frozen=True, slots=True)
class Score:
    """The result of a reward function for one response."""
    acc: float | None  # correct (1) or not (0); None: the reward function returns no accuracy
    score: float       # what advantages are made of, before the overlong penalty
    pred: str = ""     # the answer as it was read; "" if there is none
    extra: dict[str, float | str] = field(default_factory=dict)  # numbers become metrics
    status: str = "ok"  # ok | timeout | error
    message: str = ""  # what went wrong, if status is not ok


@dataclass(frozen=True)
class Group:
    """A prompt with its n responses; each list has one entry per response."""
    prompt: Prompt
    responses: list[Response]
    scores: list[Score]
    rewards: list[float]        # score minus the overlong penalty, if it is on
    final_rewards: list[float]  # rewards minus the KL penalty, if it is on

    def metric(self, name: str) -> list[float]:
        """The values that `filter_groups.metric` names, one per response. `acc` is the score if the
        reward function returns no accuracy."""
        if name == "seq_reward":
            return self.rewards
        if name == "seq_final_reward":
            return self.final_rewards
        if name == "acc" and all(score.acc is not None for score in self.scores):
            return [score.acc for score in self.scores]
        return [score.score for score in self.scores]


@dataclass(frozen=True, eq=False)
class Sample:
    """One response to train on. Log-probs are on the CPU, None if they are not needed."""
    prompt_ids: list[int]
    response_ids: ndarray       # (T,)
    advantage: float | Tensor   # of the response, or (T,) of its tokens
    in_loss: bool = True        # False: masked out of the loss
    rollout_logprobs: Tensor | None = None  # (T,) of the sampler; NaN if they were not asked for
    old_logprobs: Tensor | None = None      # (T,) of the policy before the step's first update
    ref_logprobs: Tensor | None = None      # (T,) of the initial policy
    key: tuple[int, int] = (0, 0)           # its prompt's position, its number in the group

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


class Stat(NamedTuple):
    """A statistic that a loss returns; it is logged as `actor/<name>` without further code."""
    values: Tensor        # (B, T), or a shape that broadcasts to it
    reduce: str = "mean"  # mean, sum or max over the tokens in the loss of the whole step; a scalar
                          # with `sum` is a micro-batch's part of the sum over all of its updates
    mask: Tensor | None = None  # (B, T): only these of the tokens in the loss


class Update(NamedTuple):
    """What an optimizer step did."""
    grad_norm: float | None  # before clipping; None: fp16 skipped the step, since it overflowed
    total_tokens: int        # of prompts and responses, in the whole mini-batch
    micro_batches: list[tuple[list[Sample], Tensor, dict[str, Stat]]]  # of this rank: samples, mask
    # (B, T) of the tokens in the loss, statistics by name


@dataclass(frozen=True)
class Evaluation:
    """The result of a validation set."""
    metrics: dict[str, float]              # over all prompts: avg@k, response_length, ...
    by_level: dict[str, dict[str, float]]  # the same for each level of difficulty
    prompt: str                            # the first prompt, its answer, the responses to it
    answer: str
    examples: list[str]
    seconds: float = 0.0                   # of sampling and scoring


# ---- what a run is made of -----------------------------------------------------------------------

@dataclass(frozen=True)
class Data:
    """All prompts of a run."""
    train: list[Prompt]
    val: dict[str, list[Prompt]]  # by the name of the validation set


@dataclass(frozen=True)
class Engine:
    """What generates responses: transformers, vLLM in this process, or vLLM servers."""
    # generate(prompts, seeds, params, progress=""): `params.n` responses to each prompt (token
    # ids). Each prompt's seeds, integers, determine what is sampled; `progress` names a bar.
    generate: Callable[..., list[list[Response]]]
    sync: Callable[[Iterable[tuple[str, Tensor]]], None]  # take these weights, by name
    sleep: Callable[[], None]  # free memory; the next sync or generate wakes it
    close: Callable[[], None]  # the run is over
    has_own_weights: bool      # a copy of the policy's


@dataclass(frozen=True)
class TrainState:
    """What the parts of a run share."""
    config: SimpleNamespace  # as in config.yaml
    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerBase
    policy: Module
    engine: Engine
    reference: Module | None  # the initial policy; None if no KL term is on
    optimizer: Optimizer
    scorer: Callable[[list[Task]], list[list[Score]]]
    save_dtype: dtype         # of the exported weights


COUNTERS = ("step", "optimizer_steps", "prompts_drawn", "consecutive_skips", "ema_groups_kept",
            "ema_groups_generated")


@dataclass
class Progress:
    """How far a run is: what a checkpoint holds besides weights and optimizer."""
    counters: dict[str, float] = field(default_factory=lambda: dict.fromkeys(COUNTERS, 0))
    evaluations: dict[str, dict[str, Evaluation]] = field(default_factory=dict)  # `before` and
    # `after`, then by validation set
    identity: dict = field(default_factory=dict)  # the config, and a hash of the prompts
    history: list[dict] = field(default_factory=list)  # the rows of metrics.jsonl, not saved again
