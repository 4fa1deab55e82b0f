"""Dynamic sampling: which prompts are drawn, how they are scored, which groups are trained.

DAPO (section 3.2, equation 11) drops a group if all of its responses are correct, or all wrong:
equal rewards give every response the advantage 0. Departures from the paper:
  1. The filter compares the values of any metric, of which accuracy is the default. Groups of equal
     accuracy are dropped even if the overlong penalty makes their rewards differ.
  2. If `filter_groups.max_num_gen_batches` is reached before the batch is full, the step trains on
     the groups there are, is skipped, or ends the run (`filter_groups.at_limit`).

The prompt stream is endless: epoch after epoch, each in its own order. A position in the stream is
one integer, and identifies a group even if the data repeat a prompt.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
from torch import Tensor
from tqdm import tqdm

from infra.config import escape_control
from infra.data import Prompt
from infra.distributed import Remote, map_over_ranks, owner_of
from infra.rng import make_rng
from data_types import Task
from reward import Score, overlong_penalty
from rollout import Response


@dataclass(frozen=True)
class Group:
    """The n responses to one prompt with their scores. All lists have length n.

    `scores` are the reward function's; `rewards` add the overlong penalty; `final_rewards` subtract
    the KL penalty from those, if it is on. `position` in the prompt stream identifies the group.
    """
    position: int
    prompt: Prompt
    responses: list[Response]
    scores: list[Score]
    rewards: list[float]
    final_rewards: list[float]

    def metric(self, name: str) -> list[float]:
        """The values that `filter_groups.metric` names, one per response. `acc` is the score if the
        reward function states no accuracy."""
        if name == "seq_reward":
            return self.rewards
        if name == "seq_final_reward":
            return self.final_rewards
        if name == "acc" and all(score.acc is not None for score in self.scores):
            return [score.acc for score in self.scores]
        return [score.score for score in self.scores]


# ---- prompts -------------------------------------------------------------------------------------

@lru_cache(maxsize=64)
def _epoch_order(num_prompts: int, seed: int, epoch: int) -> np.ndarray:
    return make_rng(seed, "prompt order", epoch).permutation(num_prompts)


def draw_prompts(prompts: list[Prompt], position: int, count: int, seed: int) -> list[Prompt]:
    """The `count` prompts from `position` of the endless stream; each epoch has its own order."""
    drawn = []
    for at in range(position, position + count):
        epoch, index = divmod(at, len(prompts))
        drawn.append(prompts[_epoch_order(len(prompts), seed, epoch)[index]])
    return drawn


def generation_batch_size(config: SimpleNamespace, counters: dict, kept: int,
                          generated: int) -> int:
    """Number of prompts of the next generation batch, after `kept` of `generated` groups.

    `data.gen_batch_size=auto`: as many as probably give the missing groups, if the share that is
    kept stays as it was recently (this step's groups and the moving averages in `counters`), and at
    most four times train_batch_size. Draws until m successes of probability p have the mean m / p
    and the standard deviation sqrt(m (1 - p)) / p; one standard deviation is added: more would
    waste responses, less would cost generation batches.
    """
    size, chosen = config.data.train_batch_size, config.data.gen_batch_size
    if not config.filter_groups.enable:
        return size
    if chosen != "auto":
        return chosen
    missing = size - kept
    share = (counters["ema_groups_kept"] + kept + 1) / (
        counters["ema_groups_generated"] + generated + 1)
    return min(4 * size, math.ceil((missing + math.sqrt(missing * (1 - share))) / share))


# ---- scores --------------------------------------------------------------------------------------

def score_responses(state, prompts: Sequence[Prompt], responses: Sequence[Sequence[Response]],
                    purpose: str = "validation") -> list[list[Score]]:
    """The score of every response, in the order of the prompts, from the rank that has it.

    A response on which the reward function fails or takes too long counts as wrong, with a warning.
    Raises ValueError if the reward function fails on all of them. `state` is a TrainState.
    """
    def score_own(own: list[tuple[Prompt, list[Response]]]) -> list[list[Score]]:
        scores = state.scorer([Task([response.text for response in group],
                                    [len(response.token_ids) for response in group],
                                    prompt.answer, prompt.row) for prompt, group in own])
        for (prompt, group), of_group in zip(own, scores, strict=True):
            for i, score in enumerate(of_group):
                if score.status == "error":
                    of_group[i] = replace(score, message=(
                        f"prompt {prompt.id} ({prompt.text[-60:]!r}), response "
                        f"({group[i].text[-60:]!r}): {score.message}"))
        return scores

    owners = [owner_of(state.accelerator, group[0].token_ids) for group in responses]
    scores = map_over_ranks(state.accelerator, score_own,
                            list(zip(prompts, responses, strict=True)), owners, purpose)
    failed = [score for of_group in scores for score in of_group if score.status == "error"]
    late = sum(score.status == "timeout" for of_group in scores for score in of_group)
    if failed:
        problem = escape_control(failed[0].message)
        if len(failed) == sum(map(len, scores)):
            raise ValueError(f"{purpose}, {problem} (and so on all {len(failed)} responses)")
        warn(state, f"{purpose}, {len(failed)} responses count as wrong: {problem}")
    if late:
        warn(state, f"{purpose}, {late} responses count as wrong: the reward function took longer "
                    f"than reward.timeout={state.config.reward.timeout} s")
    return scores


def warn(state, message: str) -> None:
    """Print a warning above the progress bar, on the main process only."""
    if state.accelerator.is_main_process:
        tqdm.write(f"warning: {message}")


# ---- groups --------------------------------------------------------------------------------------

def make_groups(config: SimpleNamespace, positions: range, prompts: list[Prompt],
                responses: list[list[Response]], scores: list[list[Score]]) -> list[Group]:
    """A group per prompt; a response's reward is its score and, if on, the soft overlong
    punishment (equation 13)."""
    overlong, groups = config.overlong_buffer, []
    for position, prompt, of_prompt, scored in zip(positions, prompts, responses, scores,
                                                   strict=True):
        rewards = [score.score for score in scored]
        if overlong.enable:
            rewards = [reward + overlong_penalty(len(response.token_ids),
                                                 config.data.max_response_length, overlong.len,
                                                 overlong.penalty_factor)
                       for reward, response in zip(rewards, of_prompt, strict=True)]
        groups.append(Group(position, prompt, of_prompt, scored, rewards, final_rewards=rewards))
    return groups


def is_informative(values: Sequence[float]) -> bool:
    """Whether the values differ by more than rounding noise."""
    return max(values) - min(values) > 1e-9


def keep_group(group: Group, filter_groups: SimpleNamespace) -> bool:
    """The filter (equation 11): whether a group is trained, by the config's `filter_groups`."""
    return not filter_groups.enable or is_informative(group.metric(filter_groups.metric))


def describe_filter(filter_groups: SimpleNamespace) -> str:
    """What the filter compares, for the start of a run."""
    compared = {"acc": "accuracy (score, if the reward function states no accuracy)",
                "score": "score", "seq_reward": "score with the overlong penalty",
                "seq_final_reward": "score with the overlong and KL penalties"}
    if not filter_groups.enable:
        return "filter_groups: off, every group is trained"
    return ("filter_groups: a group is dropped if all of its responses have the same "
            f"{compared[filter_groups.metric]}")


def select_groups(kept: list[Group], config: SimpleNamespace) -> list[Group]:
    """The groups that are trained: the first `train_batch_size` kept, in the stream's order.

    If there are fewer, `filter_groups.at_limit` decides: those, or none (the step is skipped).
    """
    size = config.data.train_batch_size
    return kept[:size] if len(kept) >= size or config.filter_groups.at_limit == "train" else []


def count_groups(counters: dict, kept: int, generated: int, trained: int) -> None:
    """Update a run's counters with a step's numbers of groups: moving averages in which each step
    counts half as much as the next one, and the skipped steps in a row."""
    counters["ema_groups_kept"] = (counters["ema_groups_kept"] + kept) / 2
    counters["ema_groups_generated"] = (counters["ema_groups_generated"] + generated) / 2
    counters["consecutive_skips"] = 0 if trained else counters["consecutive_skips"] + 1


def check_underfilled(state, counters: dict, step: int, kept: list[Group], generated: list[Group],
                      gen_batches: int) -> str:
    """Warn of a step that has too few groups. Returns why the run must stop, "" if it need not."""
    if len(kept) >= state.config.data.train_batch_size:
        return ""
    filter_groups = state.config.filter_groups
    message = underfilled_message(step, kept, generated, gen_batches, filter_groups.metric)
    if filter_groups.at_limit == "error":
        return message
    trained = len(select_groups(kept, state.config))
    warn(state, f"{message}. This step "
                + (f"trains on {trained} groups" if trained else "is skipped"))
    if counters["consecutive_skips"] > filter_groups.max_skipped_steps:
        return (f"{counters['consecutive_skips']} steps in a row were skipped, the last because: "
                f"{message}")
    return ""


def underfilled_message(step: int, kept: list[Group], generated: list[Group], gen_batches: int,
                        metric: str) -> str:
    """Why a step has too few groups, and what to do about it."""
    scores = [score for group in generated for score in group.scores]
    responses = [response for group in generated for response in group.responses]
    with_acc = all(score.acc is not None for score in scores)
    right, wrong = (sum(set(group.metric("acc")) == {value} for group in generated) / len(generated)
                    if with_acc else 0.0 for value in (1.0, 0.0))
    truncated = sum(response.finish_reason == "length" for response in responses) / len(responses)
    unparsed = sum(not score.pred for score in scores) / len(scores)
    hidden = sum(is_informative(group.metric("score")) and not is_informative(group.metric("acc"))
                 for group in generated)
    found = f"{right:.0%} all-correct, {wrong:.0%} all-wrong, "
    advice = "use harder prompts" if right > wrong else "use easier prompts"
    advice += ", or raise filter_groups.max_num_gen_batches"
    if not with_acc:
        found, advice = "the reward function states no accuracy, so scores are compared, ", (
            "let it return scores that differ between responses")
    elif hidden >= len(generated) / 2 and metric == "acc":
        advice = (f"scores differ in {hidden} groups in which accuracy does not: filter on "
                  "filter_groups.metric=score, or check the `acc` that the reward function returns")
    elif truncated > 0.5:
        advice = ("raise data.max_response_length; if responses used to end, the policy has "
                  "collapsed: lower actor.lr")
    elif wrong == 1 and unparsed > 0.5:
        advice = ("ask in data.prompt_template for the form that the reward function parses (see "
                  "reward.name), and read rollouts/")
    return (f"step {step} kept {len(kept)} of {len(generated)} groups after {gen_batches} "
            f"generation batches; {found}{unparsed:.0%} of responses without a parsed answer, "
            f"{truncated:.0%} truncated: {advice}")


# ---- samples ------------------------------------------------------------------------------------

@dataclass(frozen=True, eq=False)  # arrays have no single ==
class Sample:
    """One response to train on. `in_loss` is False if it is masked out of the loss.

    `response_ids` (T,); `advantage` is one number, or a tensor (T,). Log-probs are tensors (T,) on
    the CPU: the sampler's or NaN (`rollout_logprobs`), the trainer's before the step's first update
    (`old_logprobs`), the initial policy's (`ref_logprobs`); None on ranks that do not train it.
    `key`: the position of its group, and its number there.
    """
    prompt_ids: list[int]
    response_ids: np.ndarray | Remote
    advantage: float | Tensor
    in_loss: bool = True
    rollout_logprobs: Tensor | None = None
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    key: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


def mini_batches(num_samples: int, size: int, epochs: int, seed: int,
                 step: int) -> list[np.ndarray]:
    """Indices of each mini-batch of a step: every epoch shuffles all samples and splits them.

    An epoch has as few mini-batches as hold at most `size` samples; they differ by at most one.
    """
    batches = []
    for epoch in range(epochs):
        order = make_rng(seed, "mini-batches", step, epoch).permutation(num_samples)
        batches += np.array_split(order, -(-num_samples // size))
    return batches
