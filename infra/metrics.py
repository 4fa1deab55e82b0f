"""What a run says of itself: the record and metrics of a step, tables, the final report."""

import math
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from data_types import Evaluation, Group, Progress, Sample, Stat, TrainState, Update
from infra.config import escape_control
from infra.distributed import warn
from infra.memory import out_of_memory, peak_memory
from infra.watchdog import PHASE
from reward import mean_extra

# statistics of tokens that the page of a step leaves out: others show them, or they are rounding
NOT_OF_TOKENS = ("approx_kl", "clip_high_prob", "mismatch_abs", "mismatch_kl",
                 "importance_ratio_max")
PHASES = ("generate", "reward", "logprobs", "update", "sync")


class StepRecord:
    """What one step has done so far: the groups that it generated and trains, the seconds of its
    phases, and the statistics of its updates, summed over its micro-batches. `drop_reason` says
    why the filter drops a group, by a metric.

    Every rank must add updates with the same statistics in the same order.
    """
    def __init__(self, step: int, config: SimpleNamespace,
                 drop_reason: Callable[[Group, str], str] = lambda group, metric: "") -> None:
        self.drop_reason = drop_reason
        self.step, self.start = step, time.perf_counter()
        self.num_saved = config.save_rollouts if config.save_token_stats else 0
        self.seconds, self.trained_tokens = Counter(), 0
        self.generated, self.groups, self.advantages = [], [], None  # in the prompts' order
        self.gen_batches, self.grad_norms, self.skipped_updates = 0, [], 0
        self.sums, self.counts, self.maxima = {}, {}, {}
        self.token_stats = {}  # by a sample's key

    @contextmanager
    def timer(self, phase: str) -> Iterator[None]:
        """Adds the block's seconds to a phase; ValueError with advice if it runs out of memory."""
        start, PHASE["now"] = time.perf_counter(), phase
        with out_of_memory(phase):
            yield
        PHASE["now"] = "between phases"
        self.seconds[phase] += time.perf_counter() - start

    def add_generated(self, groups: Sequence[Group]) -> None:
        """Add a generation batch."""
        self.generated += groups
        self.gen_batches += 1

    def add_update(self, update: Update | None) -> None:
        """Add an optimizer step; None changes nothing."""
        if update is None:
            return
        saved = {group.prompt.position for group in self.groups[:self.num_saved]}
        for samples, mask, stats in update.micro_batches:
            for row, sample in enumerate(samples):
                if sample.in_loss and sample.key[0] in saved:
                    self._add_token_stats(stats, mask, row, sample)
            self._add_stats(stats, mask)
        self.trained_tokens += update.total_tokens
        self.skipped_updates += update.grad_norm is None
        self.grad_norms += [update.grad_norm] * (update.grad_norm is not None)

    def _add_stats(self, stats: dict[str, Stat], mask: Tensor) -> None:
        """Add those of a micro-batch, whose loss has the mask (B, T)."""
        for name, (values, reduce, stat_mask) in stats.items():
            counted = mask if stat_mask is None else mask & stat_mask
            if reduce == "max":
                largest = torch.where(counted, values, -torch.inf).max()
                self.maxima[name] = torch.maximum(largest, self.maxima.get(name, largest))
                continue
            if values.dim() == 0 and reduce == "sum":  # the micro-batch's part of it
                total = values.double()
            else:
                total = torch.where(counted, values, 0).sum(dtype=torch.float64)
            self.sums[name] = self.sums.get(name, 0) + total
            if reduce == "mean":
                self.counts[name] = self.counts.get(name, 0) + counted.sum(dtype=torch.float64)
            elif reduce != "sum":
                raise ValueError(f"Stat {name}: reduce {reduce!r} is none of mean, sum, max")

    def _add_token_stats(self, stats: dict[str, Stat], mask: Tensor, row: int,
                         sample: Sample) -> None:
        """Keep the values at each token of a response, and which tokens a bool statistic flags."""
        values, flags = {}, {}
        for name, stat in stats.items():
            if stat.values.dim() == 2 and name not in NOT_OF_TOKENS:
                at_tokens = stat.values.expand(mask.shape)[row, :len(sample.response_ids)]
                if at_tokens.dtype == torch.bool:
                    flags[name] = at_tokens.nonzero().flatten().tolist()
                else:
                    values[name] = [float(f"{value:.4g}") for value in at_tokens.tolist()]
        update = len(self.grad_norms) + self.skipped_updates + 1  # of this step
        self.token_stats[sample.key] = {"update": update, "values": values, "flags": flags}

    def gather_token_stats(self) -> dict[tuple[int, int], dict]:
        """By its key, a sample's statistics when it was trained last, on any rank."""
        found = [item for stats in gather_object([self.token_stats]) for item in stats.items()]
        return dict(sorted(found, key=lambda item: item[1]["update"]))

    def reduce_stats(self, accelerator: Accelerator) -> dict[str, float]:
        """The statistics over all ranks; a mean or maximum over no token is left out."""
        names = [*self.sums, *(f"{name} count" for name in self.counts)]
        totals = accelerator.reduce(torch.stack([*self.sums.values(), *self.counts.values()]))
        totals = dict(zip(names, totals.tolist(), strict=True))
        results = {}
        for name in self.sums:
            if count := totals.get(f"{name} count", 1):
                results[name] = totals[name] / count
        for name, largest in self.maxima.items():
            largest = accelerator.gather(largest).max().item()
            if math.isfinite(largest):
                results[name] = largest
        return results


# ---- metrics -------------------------------------------------------------------------------------

def step_metrics(state: TrainState, record: StepRecord, buffer: Sequence[Group],
                 counters: dict[str, float],
                 evaluations: dict[str, dict[str, Evaluation]]) -> dict[str, float]:
    """The row of a step in metrics.jsonl (docs/METRICS.md); `evaluations` of this step, if any."""
    validation = validation_metrics(evaluations)
    step_seconds = time.perf_counter() - record.start - validation.get("time/validate", 0.0)
    metrics = {**counters, "gen_batches": record.gen_batches,
               **rollout_metrics(state.config, record.generated, buffer, record.groups)}
    if record.groups:
        lr = state.optimizer.param_groups[0]["lr"]
        metrics |= actor_metrics(state.accelerator, record, lr)
    metrics["memory/peak_gb"] = peak_memory(state.accelerator.device)
    return metrics | time_metrics(record, step_seconds) | validation


def validation_metrics(evaluations: dict[str, dict[str, Evaluation]]) -> dict[str, float]:
    """`val/<set>/<metric>` and `time/validate`; {} if there is no evaluation."""
    metrics, seconds = {}, 0.0
    for by_set in evaluations.values():
        for name, evaluation in by_set.items():
            metrics |= {f"val/{name}/{key}": value for key, value in evaluation.metrics.items()}
            seconds += evaluation.seconds
    return metrics | {"time/validate": seconds} if metrics else {}


def time_metrics(record: StepRecord, step_seconds: float) -> dict[str, float]:
    """`time/<phase>` and `time/step` in seconds, `tokens_per_s/<phase>`."""
    metrics = {f"time/{phase}": record.seconds[phase] for phase in PHASES}
    metrics["time/other"] = step_seconds - sum(metrics.values())
    generated = sum(len(response.token_ids) for group in record.generated
                    for response in group.responses)
    metrics["tokens_per_s/generate"] = generated / record.seconds["generate"]
    if record.trained_tokens:
        metrics["tokens_per_s/update"] = record.trained_tokens / record.seconds["update"]
    return metrics | {"time/step": step_seconds}


def actor_metrics(accelerator: Accelerator, record: StepRecord, lr: float) -> dict[str, float]:
    """Metrics of a step's update: means over its optimizer steps (loss, gradient norm) or over its
    tokens in the loss (`actor/<name>` of every statistic that the loss returns)."""
    metrics, norms = {"actor/lr": lr}, record.grad_norms
    if accelerator.scaler:  # fp16
        scale = accelerator.scaler.get_scale()
        metrics |= {"actor/skipped_updates": record.skipped_updates, "actor/loss_scale": scale}
        if record.skipped_updates and not norms:
            warn(accelerator, "fp16: the gradients of all updates of this step overflow, so that "
                              f"none was applied; scale of the loss: {scale:g}")
    if not record.sums:  # every response was truncated and masked
        return metrics
    stats = record.reduce_stats(accelerator)
    stats["loss"] /= len(norms) + record.skipped_updates
    if norms:
        metrics |= {"actor/grad_norm": mean(norms), "actor/max_grad_norm": max(norms)}
    return metrics | {f"actor/{name}": value for name, value in stats.items()}


def best_validation(rows: Sequence[dict]) -> tuple[int, str, float] | None:
    """Step, name and value of the best validation after the first step, by the first metric of the
    first set; the earlier of equal ones. None if there is none."""
    names = [name for row in rows[::-1] for name in row if name.startswith("val/")]
    found = [(row[names[0]], -row["step"]) for row in rows if names and row["step"]
             and names[0] in row]  # before a resume there may have been other sets, or another n
    value, step = max(found, default=(0.0, 0))
    return (-step, names[0], value) if found else None


def mean(values: Iterable[float]) -> float:
    """The mean, 0 of no values."""
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def rollout_metrics(config: SimpleNamespace, generated: Sequence[Group], kept: Sequence[Group],
                    trained: Sequence[Group]) -> dict[str, float]:
    """Metrics of a step's rollouts: all generated groups, those kept, those trained."""
    overlong_start = math.inf
    if config.overlong_buffer.enable:
        overlong_start = config.data.max_response_length - config.overlong_buffer.len
    responses = [response for group in generated for response in group.responses]
    scores = [score for group in generated for score in group.scores]
    lengths = [len(response.token_ids) for response in responses]
    trained_lengths = [len(response.token_ids) for group in trained for response in group.responses]
    metrics = {
        **mean_extra(scores),
        "reward/mean": mean(reward for group in generated for reward in group.final_rewards),
        "reward/score": mean(score.score for score in scores),
        "reward/timeouts": sum(score.status == "timeout" for score in scores),
        "reward/errors": sum(score.status == "error" for score in scores),
        "groups/kept": len(kept) / len(generated), "groups/trained": len(trained),
        "responses/generated": len(responses),
        "responses/wasted": len(responses) - len(trained_lengths),
        "responses/wasted_tokens": sum(lengths) - sum(trained_lengths),
        "response_length/mean": mean(lengths), "response_length/max": max(lengths),
        "response_length/truncated": mean(r.finish_reason == "length" for r in responses),
        "response_length/penalised": mean(length > overlong_start for length in lengths),
    }
    if all(score.acc is not None for score in scores):
        metrics["acc/before_filter"] = mean(score.acc for score in scores)
        for name, value in (("all_correct", 1), ("all_wrong", 0)):
            metrics[f"groups/{name}"] = mean(all(score.acc == value for score in group.scores)
                                             for group in generated)
        if trained:
            metrics["acc/after_filter"] = mean(score.acc for group in trained
                                               for score in group.scores)
    if trained:
        metrics["responses/generated_per_trained"] = len(responses) / len(trained_lengths)
    return metrics


# ---- text ----------------------------------------------------------------------------------------

def progress_text(metrics: dict[str, float],
                  evaluations: dict[str, dict[str, Evaluation]]) -> str:
    """What the progress bar shows of a step, and of the last validation."""
    parts = [f"reward {metrics['reward/mean']:.2f}"]
    if "acc/before_filter" in metrics:
        parts.append(f"acc {metrics['acc/before_filter']:.2f}")
    latest = evaluations.get("after") or evaluations.get("before", {})
    for name, evaluation in latest.items():
        parts += [f"{name} {value:.3f}" for key, value in evaluation.metrics.items()
                  if key.startswith(("avg@", "score@"))]
    return ", ".join([*parts, f"length {metrics['response_length/mean']:.0f}",
                      f"kept {metrics['groups/kept']:.0%}"])


def format_tables(evaluations: dict[str, dict[str, Evaluation]]) -> str:
    """A table for each validation set: a row for each level and one for all prompts, and a block of
    columns for each title (before, after; or the name of a model)."""
    lines = []
    for name, first in next(iter(evaluations.values()), {}).items():
        estimated = [column for column in first.metrics if column.startswith("pass@")][:-1]
        columns = [column for column in first.metrics
                   if "/" not in column and column not in estimated]
        head = "".join(f"{column.replace('response_length', 'length'):>9}" for column in columns)
        titles = [f"{title:<{len(head)}}" for title in evaluations]
        rows = [[" " * 12, *titles], [" " * 12, *[head] * len(titles)]]
        for level in [*first.by_level, "all"]:
            rows.append([f"{level:<12}"])
            for by_set in evaluations.values():
                metrics = by_set[name].by_level.get(level, by_set[name].metrics)
                cells = [f"{metrics.get(column, math.nan):>9.3f}" for column in columns]
                rows[-1].append("".join(cells))
        lines += [name, *("   ".join(row).rstrip() for row in rows), ""]
    return "\n".join(map(escape_control, lines[:-1]))


def print_report(config: SimpleNamespace, device: torch.device, progress: Progress,
                 seconds: float) -> None:
    """Print validation before and after, one problem's responses, and where the results are; or
    how to resume, if the run was stopped."""
    evaluations, step = progress.evaluations, progress.counters["step"]
    if step < config.total_training_steps:
        launcher = "accelerate launch" if "ACCELERATE_DYNAMO_BACKEND" in os.environ else "python"
        command = shlex.join(word for word in sys.argv if not word.startswith("resume="))
        print(f"stopped and saved after step {step}. To resume, with the same options of the "
              f"launcher:\n{launcher} {command} resume=auto")
        return
    if evaluations:
        first = {title: next(iter(by_set.values())) for title, by_set in evaluations.items()}
        prompt, answer = next((one.prompt, one.answer) for one in first.values())
        print(f"\n{format_tables(evaluations)}\n\n{prompt!r}, answer {answer!r}:")
        for title, evaluation in first.items():
            for text in evaluation.examples[:4]:
                print(f"  {title:<8}{text!r}")
    if (best := best_validation(progress.history)) and Path(config.run_dir, "model_best").exists():
        print(f"\nmodel_best/ is the policy after step {best[0]}: {best[1]} {best[2]:.3f}")
    found = sorted(path.name + "/" * path.is_dir() for path in Path(config.run_dir).iterdir()
                   if not path.name.startswith("."))
    print(f"\nfinished step {config.total_training_steps}, {seconds:.0f} s after the start, with "
          f"{peak_memory(device):.1f} GB of memory at most. {config.run_dir} has "
          f"{', '.join(found)}")
