"""The files of a run that tell its story: metrics.jsonl, and responses in rollouts/."""

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

from torch import Tensor

from data_types import Group, Prompt, Response, Score, TrainState
from infra.distributed import raise_on_all_ranks
from infra.metrics import StepRecord
from infra.tokens import token_texts
from infra.trackers import log_to_tracker


def write_step(state: TrainState, record: StepRecord, buffer: Sequence[Group],
               metrics: dict[str, float]) -> None:
    """Write the metrics to metrics.jsonl and the tracker; and some groups to rollouts/, of those
    that the step trained and of those that it did not."""
    run_dir, step, token_stats = Path(state.config.run_dir), record.step, {}
    if state.config.save_rollouts and record.generated:
        token_stats = record.gather_token_stats()
    log_to_tracker(state.accelerator, metrics, step)
    with raise_on_all_ranks(f"cannot log step {step} in {run_dir}"):
        if state.accelerator.is_main_process:
            with open(run_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(metrics) + "\n")
            if state.config.save_rollouts and record.generated:
                write_rollouts(state, record, buffer, token_stats)


def write_rollouts(state: TrainState, record: StepRecord, buffer: Sequence[Group],
                   token_stats: dict[tuple[int, int], dict]) -> None:
    """Write two files: step_N, groups that were trained; dropped_N, groups that were not. Of a
    skipped step those are step_N. `token_stats` are those of `StepRecord.gather_token_stats`."""
    config, groups, reasons, by_reason = state.config, record.groups, {}, {}
    trained = {group.prompt.position for group in groups}
    kept = {group.prompt.position for group in buffer}
    for group in record.generated:
        if (position := group.prompt.position) not in trained:
            if position in kept:
                reason = "beyond train_batch_size" if groups else "step skipped"
            else:
                accs = {score.acc for score in group.scores}
                reason = "all correct" if accs == {1} else "all wrong" if accs == {0} else (
                    record.drop_reason(group, config.filter_groups.metric) or "by the filter")
            reasons[position] = reason
            by_reason.setdefault(reason, []).append(group)
    turns = zip_longest(*by_reason.values())  # the first of each reason, the second of each, ...
    dropped = [group for turn in turns for group in turn if group][:config.save_rollouts]
    groups = groups[:config.save_rollouts]
    for group in groups:
        for i, response in enumerate(group.responses):
            if stats := token_stats.get((group.prompt.position, i)):
                stats["texts"] = token_texts(state.tokenizer, response.token_ids)
    rollouts = Path(config.run_dir) / "rollouts"
    lines = rollout_records(record.step, groups or dropped, record.advantages, reasons, token_stats)
    (rollouts / f"step_{record.step:05d}.jsonl").write_text("".join(lines), "utf-8")
    if groups and dropped:
        lines = rollout_records(record.step, dropped, None, reasons, token_stats)
        (rollouts / f"dropped_{record.step:05d}.jsonl").write_text("".join(lines), "utf-8")


def rollout_records(step: int, groups: list[Group], advantages: list | None,
                    reasons: dict[int, str], token_stats: dict) -> Iterator[str]:
    """Lines of a rollout file: a response each, with all that belongs to it, as JSON in ASCII, so
    that nothing the policy wrote reaches a terminal. `advantages` is None if the groups were not
    trained, for the `reasons` by position.
    """
    for g, group in enumerate(groups):
        for i, (response, score) in enumerate(zip(group.responses, group.scores, strict=True)):
            advantage = advantages[g][i] if advantages is not None else None
            if isinstance(advantage, Tensor):  # one per token
                advantage = advantage.tolist()
            yield json.dumps({
                "step": step, "position": group.prompt.position,
                **response_record(group.prompt, response, score), "reward": group.rewards[i],
                "final_reward": group.final_rewards[i], "advantage": advantage,
                "dropped": reasons.get(group.prompt.position),
                "token_stats": token_stats.get((group.prompt.position, i))}) + "\n"


def response_record(prompt: Prompt, response: Response, score: Score) -> dict:
    """What a file of responses says of one response."""
    return {"prompt": prompt.text, "answer": prompt.answer, "response": response.text,
            "tokens": len(response.token_ids), "finish_reason": response.finish_reason,
            "pred": score.pred, "acc": score.acc, "score": score.score, "status": score.status,
            **{f"reward/{name}": value for name, value in score.extra.items()}}


def read_metrics(run_dir: str | Path, log: Callable[[str], None] = lambda line: None) -> list[dict]:
    """The rows of a run's metrics.jsonl. `log` gets a warning of what cannot be read, but for the
    last row, which may be half written."""
    path, rows, unread = Path(run_dir) / "metrics.jsonl", [], []
    if not path.exists():
        raise ValueError(f"{path}: no such file: name the directory of a run")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        rest = line.strip()
        while rest:  # several, if a line break is lost
            try:
                row, end = json.JSONDecoder().raw_decode(rest)
                rows += [row] if isinstance(row, dict) and isinstance(row.get("step"), int) else []
                rest = rest[end:].lstrip()
            except (ValueError, RecursionError):
                unread += [number] * (number < len(lines))
                break
    if unread:
        log(f"warning: {path}: left out what cannot be read in line {', '.join(map(str, unread))}")
    return rows
