"""Dynamic sampling: which prompts are drawn, how they are scored, which groups are trained.

DAPO (section 3.2, equation 11) drops a group if all of its responses are correct, or all wrong:
equal rewards give every response the advantage 0. Departures from the paper:
  1. `filter_groups.metric` may be another value than accuracy, which equation 11 compares.
  2. Kept groups beyond `train_batch_size` are discarded.
  3. If `filter_groups.max_num_gen_batches` is reached before the buffer is full, the step trains on
     the groups there are, is skipped, or ends the run (`filter_groups.at_limit`).

The order of prompts is endless: epoch after epoch, each shuffled. A position in it is one integer,
and identifies a group even if the data repeat a prompt.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from types import SimpleNamespace

import numpy as np

from data_types import Group, Prompt, Response, Sample, Score, Task, TrainState
from infra.config import escape_control
from infra.distributed import map_over_ranks, warn
from infra.metrics import StepRecord
from infra.rng import make_rng
from reward import overlong_penalty

# ---- prompts -------------------------------------------------------------------------------------

def draw_prompts(prompts: list[Prompt], config: SimpleNamespace, counters: dict[str, float],
                 generated: Sequence[Group], kept: int) -> list[Prompt]:
    """The prompts of the next generation batch of a step that has kept `kept` of the groups
    `generated` so far: those that come next."""
    start = generated[-1].prompt.position + 1 if generated else counters["prompts_drawn"]
    count = generation_batch_size(config, counters, kept, len(generated))
    return [prompt_at(prompts, position, config.seed) for position in range(start, start + count)]


def prompt_at(prompts: list[Prompt], position: int, seed: int) -> Prompt:
    """The prompt at this position of the endless order; each epoch has its own."""
    epoch, index = divmod(position, len(prompts))
    order = _epoch_order(len(prompts), seed, epoch)
    return replace(prompts[order[index]], position=position)


@lru_cache(maxsize=64)
def _epoch_order(num_prompts: int, seed: int, epoch: int) -> np.ndarray:
    return make_rng(seed, "prompt order", epoch).permutation(num_prompts)


def generation_batch_size(config: SimpleNamespace, counters: dict[str, float], kept: int,
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

def score_responses(state: TrainState, prompts: Sequence[Prompt],
                    responses: Sequence[Sequence[Response]], description: str) -> list[list[Score]]:
    """The score of every response, in the order of the prompts, on every rank; the ranks share the
    work. `description` is for warnings and errors.

    A response on which the reward function fails or takes too long counts as wrong, with a warning,
    and gets the lowest score of the others, at most 0: whatever the scale of the scores is, it is
    no better and no worse than the other wrong ones. Raises ValueError if all fail.
    """
    tasks = [Task([response.text for response in group],
                  [len(response.token_ids) for response in group], prompt.answer, prompt.row)
             for prompt, group in zip(prompts, responses, strict=True)]
    scores = map_over_ranks(state.accelerator, state.scorer, tasks, description)
    failed, late = [], 0
    for prompt, task, group in zip(prompts, tasks, scores, strict=True):
        late += sum(score.status == "timeout" for score in group)
        failed += [(prompt, text, score.message)
                   for text, score in zip(task.responses, group, strict=True)
                   if score.status == "error"]
    if failed:
        prompt, text, message = failed[0]
        problem = escape_control(f"prompt {prompt.id} ({prompt.text[-60:]!r}), response "
                                 f"({text[-60:]!r}): {message}")
        if len(failed) == sum(map(len, scores)):
            raise ValueError(f"{description}, {problem} (and so on all {len(failed)} responses)")
        warn(state.accelerator, f"{description}, {len(failed)} responses count as wrong: {problem}")
    if late:
        warn(state.accelerator, f"{description}, {late} responses count as wrong: the reward "
             f"function took longer than reward.timeout={state.config.reward.timeout} s")
    lowest = min([0.0, *(s.score for group in scores for s in group if s.status == "ok")])
    return [[s if s.status == "ok" else replace(s, score=lowest) for s in group]
            for group in scores]


# ---- groups --------------------------------------------------------------------------------------

def make_groups(config: SimpleNamespace, prompts: Sequence[Prompt],
                responses: Sequence[list[Response]], scores: Sequence[list[Score]]) -> list[Group]:
    """A group per prompt; a response's reward is its score and, if on, the soft overlong
    punishment (equation 13)."""
    overlong, groups = config.overlong_buffer, []
    for prompt, group_responses, group_scores in zip(prompts, responses, scores, strict=True):
        rewards = [score.score for score in group_scores]
        if overlong.enable:
            rewards = [reward + overlong_penalty(len(response.token_ids),
                                                 config.data.max_response_length, overlong.len,
                                                 overlong.penalty_factor)
                       for reward, response in zip(rewards, group_responses, strict=True)]
        groups.append(Group(prompt, group_responses, group_scores, rewards,
                            final_rewards=rewards))
    return groups


def is_informative(values: Sequence[float]) -> bool:
    """Whether the values differ by more than rounding noise."""
    return max(values) - min(values) > 1e-9


# Equation 11: the rules by which a group is dropped, each behind its words, which a run's start,
# warnings and pages quote. A rule of your own is another line here, or instead.
DROP_RULES = {
    "all of its responses have the same {metric}":
        lambda group, metric: not is_informative(group.metric(metric)),
}
METRIC_WORDS = {"acc": "accuracy (score, if the reward function returns no accuracy)",
                "score": "score", "seq_reward": "score with the overlong penalty",
                "seq_final_reward": "score with the overlong and KL penalties"}


def drop_reason(group: Group, metric: str) -> str:
    """The words of the first rule that drops the group, "" if none does."""
    is_score = metric == "acc" and any(score.acc is None for score in group.scores)
    shown = "score" if is_score else {"acc": "accuracy"}.get(metric, metric)
    return next((words.format(metric=shown) for words, rule in DROP_RULES.items()
                 if rule(group, metric)), "")


def keep_group(group: Group, filter_groups: SimpleNamespace) -> bool:
    """Whether a group enters the buffer, by `DROP_RULES` and the config's `filter_groups`.

    By default they look at the accuracy, not at the reward that is trained on: with the overlong
    penalty the rewards of an all-wrong group differ, and such groups would teach length alone.
    """
    return not filter_groups.enable or not drop_reason(group, filter_groups.metric)


def describe_filter(filter_groups: SimpleNamespace) -> str:
    """Which groups are dropped, for the start of a run."""
    if not filter_groups.enable:
        return "filter_groups: off, every group is trained"
    rules = [words.format(metric=METRIC_WORDS[filter_groups.metric]) for words in DROP_RULES]
    return f"filter_groups: a group is dropped if {', or if '.join(rules)}"


def select_groups(buffer: list[Group], config: SimpleNamespace) -> list[Group]:
    """The groups that are trained: the first `train_batch_size` kept, in the order of the prompts.

    If there are fewer, `filter_groups.at_limit` decides. `train`: those; `skip` and `error`: none.
    """
    size = config.data.train_batch_size
    return buffer[:size] if len(buffer) >= size or config.filter_groups.at_limit == "train" else []


# ---- after a step --------------------------------------------------------------------------------

def update_counters(counters: dict[str, float], record: StepRecord, kept: int,
                    trained: int) -> dict[str, float]:
    """A run's counters after a step that kept and trained so many groups. The moving averages of
    groups kept and generated have the decay 0.5."""
    return counters | {
        "step": record.step,
        "optimizer_steps": counters["optimizer_steps"] + len(record.grad_norms),
        "prompts_drawn": record.generated[-1].prompt.position + 1,
        "consecutive_skips": 0 if trained else counters["consecutive_skips"] + 1,
        "ema_groups_kept": (counters["ema_groups_kept"] + kept) / 2,
        "ema_groups_generated": (counters["ema_groups_generated"] + len(record.generated)) / 2}


def check_underfilled(state: TrainState, record: StepRecord, buffer: list[Group],
                      consecutive_skips: int) -> None:
    """Warn of a step that had too few groups. Raises ValueError if `filter_groups` ends the run."""
    if len(buffer) >= state.config.data.train_batch_size:
        return
    filter_groups = state.config.filter_groups
    message = underfilled_message(record, buffer, filter_groups.metric)
    if filter_groups.at_limit == "error":
        raise ValueError(message)
    trained = len(select_groups(buffer, state.config))
    warn(state.accelerator, f"{message}. This step "
         + (f"trained on {trained} groups" if trained else "was skipped"))
    if consecutive_skips > filter_groups.max_skipped_steps:
        raise ValueError(f"{consecutive_skips} steps in a row were skipped, the last because: "
                         f"{message}")


def underfilled_message(record: StepRecord, buffer: list[Group], metric: str) -> str:
    """Why a step had too few groups, and what to do about it."""
    generated = record.generated
    scores = [score for group in generated for score in group.scores]
    responses = [response for group in generated for response in group.responses]
    with_acc = all(score.acc is not None for score in scores)
    right, wrong = (sum(set(group.metric("acc")) == {value} for group in generated) / len(generated)
                    if with_acc else 0.0 for value in (1.0, 0.0))
    truncated = sum(response.finish_reason == "length" for response in responses) / len(responses)
    unparsed = sum(not score.pred for score in scores) / len(scores)
    hidden = sum(is_informative(group.metric("score")) and not is_informative(group.metric("acc"))
                 for group in generated)
    own = Counter(reason for group in generated if is_informative(group.metric(metric))
                  and (reason := drop_reason(group, metric)))  # of rules besides equation 11's
    found = f"{right:.0%} all-correct, {wrong:.0%} all-wrong, "
    advice = "use harder prompts" if right > wrong else "use easier prompts"
    advice += ", or raise filter_groups.max_num_gen_batches"
    if 2 * own.total() > len(generated) - len(buffer):
        ((reason, count),) = own.most_common(1)
        advice = f"in {count} groups {reason}: use other prompts, or change sampling.DROP_RULES"
    elif not with_acc:
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
    return (f"step {record.step} kept {len(buffer)} of {len(generated)} groups after "
            f"{record.gen_batches} generation batches; {found}{unparsed:.0%} of responses without "
            f"a parsed answer, {truncated:.0%} truncated: {advice}")


# ---- mini-batches --------------------------------------------------------------------------------

def mini_batches(samples: Sequence[Sample], config: SimpleNamespace,
                 step: int) -> list[list[Sample]]:
    """The mini-batches of a step: each of `ppo_epochs` epochs shuffles the groups and splits them.

    Groups stay whole, since their responses share the computation of the prompt; if
    `ppo_mini_batch_size` is no multiple of `rollout.n`, they are cut into equal parts that it is a
    multiple of. An epoch has as few mini-batches as hold at most that many samples; their sizes
    differ by at most one group or part. `samples` come group by group.
    """
    size = config.actor.ppo_mini_batch_size
    part, count, batches = math.gcd(size, config.rollout.n), -(-len(samples) // size), []
    parts = [samples[i:i + part] for i in range(0, len(samples), part)]
    for epoch in range(config.actor.ppo_epochs):
        order = make_rng(config.seed, "mini-batches", step, epoch).permutation(len(parts))
        for indices in np.array_split(order, count):
            batches.append([sample for i in indices for sample in parts[i]])
    return batches
