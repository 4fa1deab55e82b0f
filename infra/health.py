"""Rules that watch the metrics of a run, and warn of what usually ruins one.

`RULES` is a table to read and to change. Its limits are set by runs that were ruined on purpose and
by those that went well: in the latter the policy solves its task, so that entropy falls to a
thirtieth and few groups are kept (docs/TROUBLESHOOTING.md).
"""

from collections.abc import Callable, Sequence
from statistics import fmean, median
from typing import NamedTuple

from data_types import Progress, TrainState
from infra.distributed import warn

QUIET = 10  # steps before a rule warns again


class History:
    """The metrics of the first `count` steps, the last of them now: of three and the newest 200."""
    def __init__(self, steps: Sequence[dict], count: int) -> None:
        self.rows = [*steps[:min(3, count)], *steps[max(3, count - 200):count]]

    def now(self, name: str, default: float = 0.0) -> float:
        """Of the last step."""
        return self.rows[-1].get(name, default)

    def values(self, name: str) -> list[float]:
        """Those of all steps that have it."""
        return [row[name] for row in self.rows if name in row]

    def recent(self, name: str) -> float:
        """The mean of the last three; nan if there are fewer, which no comparison is true of."""
        found = self.values(name)
        return fmean(found[-3:]) if len(found) >= 3 else float("nan")

    def start(self, name: str) -> float:
        """The mean of the first three."""
        return fmean(self.values(name)[:3] or [float("nan")])

    def best(self, name: str) -> float:
        """The largest mean of three steps in turn."""
        found = self.values(name)
        return max((fmean(found[i:i + 3]) for i in range(len(found) - 2)), default=float("nan"))


ACC, TRUNCATED, LENGTH = "acc/before_filter", "response_length/truncated", "response_length/mean"


class Rule(NamedTuple):
    """What is wrong in a few words, when, the metrics to print, and what usually helps."""
    problem: str
    holds: Callable[[History], bool]
    metrics: tuple[str, ...]
    advice: str
    ruined: bool = False  # the policy does not come back by itself


RULES = [
    Rule("the updates are too large",
         lambda h: abs(h.now("actor/approx_kl")) > 0.3 or h.now("actor/clip_frac_low") > 0.4
         or h.now("actor/clip_frac_high") > 0.4,
         ("actor/approx_kl", "actor/clip_frac_low", "actor/clip_frac_high"),
         "lower actor.lr, or raise actor.lr_warmup_steps", True),
    Rule("a gradient is far larger than those before",
         lambda h: len(h.rows) > 3 and h.now("actor/max_grad_norm")
         > 50 * median(h.values("actor/max_grad_norm") or [0.0]),
         ("actor/max_grad_norm",), "lower actor.lr, or actor.grad_clip"),
    Rule("accuracy has collapsed",
         lambda h: h.best(ACC) > 0.1 and h.recent(ACC) < 0.5 * h.best(ACC), (ACC, LENGTH),
         "go back to a checkpoint of before (resume=CHECKPOINT run_dir=NEW) with a lower actor.lr, "
         "and look at what else moved first", True),
    Rule("the reward rises while accuracy falls",
         lambda h: h.recent("reward/mean") >= h.best("reward/mean") > h.start("reward/mean")
         and h.recent(ACC) < 0.8 * h.best(ACC), ("reward/mean", ACC, LENGTH),
         "the reward pays for something else: read rollouts/, and change reward.name or "
         "reward.weights", True),
    Rule("entropy has collapsed before the task is solved",
         lambda h: h.recent("actor/entropy") < 0.1 * h.start("actor/entropy")
         and h.recent(ACC) < 0.9 and h.recent(ACC) < h.best(ACC) + 1e-9
         and len(h.rows) > 6 and h.recent(ACC) < fmean(h.values(ACC)[-6:-3]) + 0.01,
         ("actor/entropy", ACC), "raise actor.clip_ratio_high, or lower actor.lr"),
    Rule("responses run into the limit",
         lambda h: h.recent(TRUNCATED) > max(0.4, h.start(TRUNCATED) + 0.3), (TRUNCATED, LENGTH),
         "raise data.max_response_length, or set overlong_buffer.enable=true; if the reward grows "
         "with length, it pays for length"),
    Rule("responses have nearly vanished",
         lambda h: h.recent(LENGTH) < 0.1 * h.start(LENGTH), (LENGTH, ACC),
         "lower actor.lr; see what the reward function gives to empty responses"),
    Rule("nearly every prompt is solved",
         lambda h: h.recent("groups/all_correct") > 0.95 and h.now("groups/kept") < 0.05,
         ("groups/kept", "groups/all_correct"), "use harder prompts, or end the run"),
    Rule("nearly no prompt is ever solved",
         lambda h: h.recent("groups/all_wrong") > 0.95 and h.now("groups/kept") < 0.05,
         ("groups/kept", "groups/all_wrong"), "use easier prompts, or raise rollout.n"),
    Rule("sampler and trainer drift apart",
         lambda h: h.recent("actor/mismatch_kl") > 0.1, ("actor/mismatch_kl",),
         "set rollout.correction=token; see docs/PRECISION.md"),
    Rule("the reward function fails often",
         lambda h: h.recent("reward/errors") + h.recent("reward/timeouts")
         > 0.1 * h.recent("responses/generated"), ("reward/errors", "reward/timeouts"),
         "fix it: the warnings of the steps name a response each"),
]


def check_health(state: TrainState, progress: Progress, metrics: dict[str, float]) -> None:
    """Add a step's metrics to `progress`; warn of each rule that holds now and did not in the last
    `QUIET` steps. Raises ValueError if the policy is ruined and `stop_when_ruined` is on."""
    rows = progress.history = [*progress.history, metrics]
    steps = [row for row in rows if "groups/kept" in row]  # the others are validations
    *earlier, now = [History(steps, count)
                     for count in range(max(1, len(steps) - QUIET), len(steps) + 1)]
    for rule in RULES:
        if not rule.holds(now) or any(map(rule.holds, earlier)):
            continue
        found = ", ".join(f"{name} {metrics[name]:.3g}" for name in rule.metrics
                          if name in metrics)
        message = f"step {metrics['step']}: {rule.problem} ({found}): {rule.advice}"
        if rule.ruined and state.config.stop_when_ruined:
            raise ValueError(f"{message}. model_best/ has the best policy by validation")
        warn(state.accelerator, message)
