"""What a run logs: timers, metrics of rollouts and losses, the log of a step, the final report."""

import json
import math
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from accelerate import Accelerator
from tokenizers.decoders import DecodeStream
from torch import Tensor
from tqdm import tqdm

from evaluate import Evaluations, format_tables, response_record
from infra.checkpoint import Progress
from infra.distributed import raise_on_all_ranks
from infra.exchange import gather_on_main, send_to_main
from infra.memory import out_of_memory
from infra.setup import TrainState
from losses import Stat
from reward import mean_extra
from sampling import Group, Sample, keep_group


class Timer:
    """Seconds and tokens of a step's phases: `with timer("generate"): ...`."""
    PHASES = ("generate", "reward", "logprobs", "update", "sync")

    def __init__(self) -> None:
        self.seconds, self.tokens, self.start = Counter(), Counter(), time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        with out_of_memory(phase):
            yield
        self.seconds[phase] += time.perf_counter() - start

    def metrics(self, generated: list[Group]) -> dict[str, float]:
        """`time/<phase>` and `time/step` in seconds, `tokens_per_s/<phase>`."""
        self.tokens["generate"] = sum(len(response.token_ids) for group in generated
                                      for response in group.responses)
        step = time.perf_counter() - self.start
        seconds = {phase: self.seconds[phase] for phase in self.PHASES}
        seconds["other"] = step - sum(seconds.values())
        metrics = {f"time/{phase}": value for phase, value in seconds.items()}
        for phase, tokens in self.tokens.items():
            metrics[f"tokens_per_s/{phase}"] = tokens / seconds[phase]
        return metrics | {"time/step": step}


class StatTotals:
    """The statistics that losses return, summed over the micro-batches and ranks of a step; for
    responses of the groups that are saved, those of each token too.

    Every rank must add the same names in the same order.
    """

    def __init__(self, config: SimpleNamespace | None = None, groups: Sequence[Group] = ()) -> None:
        self.sums, self.counts, self.maxima = {}, {}, {}
        self.grad_norms, self.skipped_updates, self.token_stats = [], 0, {}  # by a sample's key
        num_saved = config.save_rollouts if config and config.save_token_stats else 0
        self.saved = {group.position for group in groups[:num_saved]}

    def add(self, stats: dict[str, Stat], mask: Tensor, samples: Sequence[Sample] = ()) -> None:
        """Add those of a micro-batch, whose loss has the mask (B, T): a row for each sample."""
        for row, sample in enumerate(samples):
            if sample.in_loss and sample.key and sample.key[0] in self.saved:
                self._add_token_stats(stats, mask, row, sample)
        for name, (values, reduce, stat_mask) in stats.items():
            counted = mask if stat_mask is None else mask & stat_mask
            values = values.detach()
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
            if stat.values.dtype == torch.bool or name in ("ratio", "entropy", "token_prob"):
                of_tokens = stat.values.detach().expand(mask.shape)[row, :len(sample.response_ids)]
                if of_tokens.dtype == torch.bool:
                    flags[name] = of_tokens.nonzero().flatten().tolist()
                else:
                    values[name] = [float(f"{value:.4g}") for value in of_tokens.tolist()]
        update = len(self.grad_norms) + self.skipped_updates + 1  # of this step
        self.token_stats[sample.key] = {"update": update, "values": values, "flags": flags}

    def gather_token_stats(self, accelerator: Accelerator) -> dict[tuple[int, int], dict]:
        """On the main process, by its key: a sample's statistics when it was trained last, on any
        rank."""
        found = [item for of_rank in send_to_main(accelerator, self.token_stats)
                 for item in of_rank.items()]
        return dict(sorted(found, key=lambda item: item[1]["update"]))

    def reduce(self, accelerator: Accelerator) -> dict[str, float]:
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


def actor_metrics(accelerator: Accelerator, totals: StatTotals, lr: float) -> dict[str, float]:
    """Metrics of a step's update: means over its optimizer steps (loss, gradient norm) or over its
    tokens in the loss (`actor/<name>` of every statistic that the loss returns)."""
    metrics, norms = {"actor/lr": lr}, totals.grad_norms
    if accelerator.scaler:  # fp16
        metrics |= {"actor/skipped_updates": totals.skipped_updates,
                    "actor/loss_scale": accelerator.scaler.get_scale()}
        if totals.skipped_updates and not norms and accelerator.is_main_process:
            tqdm.write("warning: fp16: the gradients of all updates of this step overflow, so that "
                       f"none was applied; scale of the loss: {accelerator.scaler.get_scale():g}")
    if not totals.sums:  # every response was truncated and masked
        return metrics
    stats = totals.reduce(accelerator)
    stats["loss"] /= len(norms) + totals.skipped_updates
    if norms:
        metrics |= {"actor/grad_norm": mean(norms), "actor/max_grad_norm": max(norms)}
    return metrics | {f"actor/{name}": value for name, value in stats.items()}


def mean(values: Iterable[float]) -> float:
    """The mean, 0 of no values."""
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def rollout_metrics(config: SimpleNamespace, generated: list[Group], kept: list[Group],
                    trained: list[Group]) -> dict[str, float]:
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


def token_texts(tokenizer, token_ids: np.ndarray) -> list[str]:
    """The text of each token; a character that several tokens make comes with the last of them."""
    backend, texts = getattr(tokenizer, "backend_tokenizer", None), []
    if backend is None:
        return tokenizer.batch_decode([[token] for token in token_ids.tolist()])
    stream = DecodeStream(skip_special_tokens=False)
    for token in token_ids.tolist():
        try:
            texts.append(stream.step(backend, token) or "")
        except Exception:  # the tokens so far are bytes that are no text
            stream = DecodeStream(skip_special_tokens=False)
            texts.append(backend.decode([token], skip_special_tokens=False))
    return texts


def drop_reason(group: Group, filter_groups: SimpleNamespace, skipped: bool) -> str:
    """Why a group was not trained. `skipped`: the step was."""
    if keep_group(group, filter_groups):
        return "step skipped" if skipped else "beyond train_batch_size"
    accs = {score.acc for score in group.scores}
    if accs == {1}:
        return "all correct"
    return "all wrong" if accs == {0} else f"same {filter_groups.metric}"


def rollout_records(step: int, groups: list[Group], advantages: list | None,
                    reasons: dict[int, str], token_stats: dict) -> Iterator[str]:
    """Lines of a rollout file: a response each, with all that belongs to it, as JSON in ASCII, so
    that nothing the policy wrote reaches a terminal. `advantages` is None if the groups were not
    trained, for the `reasons` by position. `token_stats`: see `gather_token_stats`.
    """
    for g, group in enumerate(groups):
        for i, (response, score) in enumerate(zip(group.responses, group.scores, strict=True)):
            advantage = advantages[g][i] if advantages is not None else None
            if isinstance(advantage, Tensor):  # one per token
                advantage = advantage.tolist()
            yield json.dumps({
                "step": step, "position": group.position,
                **response_record(group.prompt, response, score), "reward": group.rewards[i],
                "final_reward": group.final_rewards[i], "advantage": advantage,
                "dropped": reasons.get(group.position),
                "token_stats": token_stats.get((group.position, i))}) + "\n"


def log_step(state: TrainState, metrics: dict, generated: Sequence[Group] = (),
             groups: Sequence[Group] = (), advantages: list | None = None,
             totals: StatTotals | None = None) -> None:
    """Write a row to metrics.jsonl and the tracker, and some of the groups that were generated, and
    of those that were trained, `groups`, to rollouts/."""
    run_dir, step = Path(state.config.run_dir), metrics["step"]
    saved = None
    if generated and state.config.save_rollouts:
        token_stats = totals.gather_token_stats(state.accelerator)
        saved = select_saved(state, generated, groups)
    with raise_on_all_ranks(f"cannot log step {step} in {run_dir}"):
        state.accelerator.log(metrics, step=step)
        if state.accelerator.is_main_process:
            with open(run_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(metrics) + "\n")
            if saved:
                write_rollouts(state, step, *saved, advantages, token_stats)


def select_saved(state: TrainState, generated: Sequence[Group], groups: Sequence[Group]
                 ) -> tuple[list[Group], list[Group], dict[int, str]]:
    """The groups to save, whole on the main process: the first that were trained; as many of those
    that were not, of all reasons in turn. And by position, why groups were not trained."""
    config, trained, reasons, by_reason = state.config, {g.position for g in groups}, {}, {}
    for group in generated:
        if group.position not in trained:
            reason = drop_reason(group, config.filter_groups, skipped=not groups)
            reasons[group.position] = reason
            by_reason.setdefault(reason, []).append(group)
    turns = zip_longest(*by_reason.values())  # the first of each reason, the second of each, ...
    dropped = [group for turn in turns for group in turn if group]
    saved = []
    for some in (groups[:config.save_rollouts], dropped[:config.save_rollouts]):
        whole = gather_on_main(state.accelerator, [group.responses for group in some])
        saved.append([replace(group, responses=responses)
                      for group, responses in zip(some, whole, strict=True)])
    return *saved, reasons


def write_rollouts(state: TrainState, step: int, groups: list[Group], dropped: list[Group],
                   reasons: dict[int, str], advantages: list | None, token_stats: dict) -> None:
    """Write two files: step_N, groups that were trained; dropped_N, groups that were not. Of a
    skipped step those are step_N."""
    for group in groups:
        for i, response in enumerate(group.responses):
            if stats := token_stats.get((group.position, i)):
                stats["texts"] = token_texts(state.tokenizer, response.token_ids)
    rollouts = Path(state.config.run_dir) / "rollouts"
    lines = rollout_records(step, groups or dropped, advantages, reasons, token_stats)
    (rollouts / f"step_{step:05d}.jsonl").write_text("".join(lines), "utf-8")
    if groups and dropped:
        lines = rollout_records(step, dropped, None, reasons, token_stats)
        (rollouts / f"dropped_{step:05d}.jsonl").write_text("".join(lines), "utf-8")


def progress_text(metrics: dict, evaluations: Evaluations) -> str:
    """What the progress bar shows of a step."""
    parts = [f"reward {metrics['reward/mean']:.2f}"]
    if "acc/before_filter" in metrics:
        parts.append(f"acc {metrics['acc/before_filter']:.2f}")
    for name, of_set in evaluations.items():
        latest = of_set.get("after", of_set.get("before"))
        parts += [f"{name} {value:.3f}" for key, value in latest.metrics.items()
                  if key.startswith(("avg@", "score@"))]
    return ", ".join([*parts, f"length {metrics['response_length/mean']:.0f}",
                      f"kept {metrics['groups/kept']:.0%}"])


def print_report(config: SimpleNamespace, progress: Progress, seconds: float,
                 finished: bool) -> None:
    """Print validation before and after, one problem's responses, and where the results are; or
    how to resume, if the run was stopped."""
    evaluations = progress.evaluations
    if not finished:
        launcher = "accelerate launch" if "ACCELERATE_DYNAMO_BACKEND" in os.environ else "python"
        command = shlex.join(word for word in sys.argv if not word.startswith("resume="))
        print(f"stopped and saved after step {progress.counters['step']}. To resume, with the same "
              f"options of the launcher:\n{launcher} {command} resume=auto")
        return
    if evaluations:
        of_set = next(iter(evaluations.values()))
        first = next(iter(of_set.values()))
        print(f"\n{format_tables(evaluations)}\n\n{first.prompt!r}, answer {first.answer!r}:")
        for title, evaluation in of_set.items():
            for text in evaluation.examples[:4]:
                print(f"  {title:<8}{text!r}")
    models = ", model/ (merged) and adapter/" if config.model.lora_rank else " and model/"
    print(f"\nfinished step {config.total_training_steps}, {seconds:.0f} s after the start. "
          f"{config.run_dir} has curves.png, metrics.jsonl, rollouts/, checkpoints/{models}")
