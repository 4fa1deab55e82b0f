"""Evaluate a policy on validation sets.

`python evaluate.py --config config.yaml model.path=runs/toy/model` evaluates any model directory or
hub name on the validation data of a config. It prints a table, and saves metrics.json and
responses.jsonl in a new directory under `<run_dir>/evaluate/`.

With k = `val.n` responses to each prompt, avg@k is the mean accuracy, pass@k the share of prompts
with a correct response, maj@k the share whose most frequent answer is correct. If the reward
function states no accuracy: score@k is the mean score, best@k the mean of each prompt's best score.
"""

import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import chain
from pathlib import Path
from statistics import fmean

from infra.config import escape_control, flatten, one_line_errors, read_command_line, split_list
from infra.data import Prompt, find_column
from infra.distributed import raise_on_all_ranks
from infra.setup import TrainState, setup, sync_weights
from reward import Score, mean_extra
from rollout import Response, SamplingParams, generate
from sampling import score_responses


@dataclass(frozen=True)
class Evaluation:
    """The metrics of a validation set, over all of its prompts and for each level of difficulty."""
    metrics: dict[str, float]
    by_level: dict[str, dict[str, float]]
    prompt: str  # the first prompt of the set, its answer, and the responses to it
    answer: str
    examples: list[str]


Evaluations = dict[str, dict[str, Evaluation]]  # by set, then by title: before, after; or a model


def validate(state: TrainState, prompts: list[Prompt]) -> Evaluation:
    """The evaluation of the current policy. The random numbers are the same each time."""
    return evaluate(prompts, *sample_and_score(state, prompts), state.config.val.level_key)


def validation_metrics(state: TrainState, val: dict[str, list[Prompt]], step: int,
                       evaluations: Evaluations) -> dict[str, float]:
    """`val/<set>/<metric>` of every validation set if validation is due after this step, else {}.

    The evaluations become those `before` (step 0) or `after` in `evaluations`.
    """
    last, every = state.config.total_training_steps, state.config.val.every
    if not val or not (step in (0, last) or (every and step % every == 0)):
        return {}
    start, metrics = time.perf_counter(), {}
    for name, prompts in val.items():
        evaluation = validate(state, prompts)
        evaluations.setdefault(name, {})["after" if step else "before"] = evaluation
        metrics |= {f"val/{name}/{key}": value for key, value in evaluation.metrics.items()}
    return metrics | {"time/validate": time.perf_counter() - start}


def sample_and_score(state: TrainState,
                     prompts: list[Prompt]) -> tuple[list[list[Response]], list[list[Score]]]:
    """`val.n` responses to each prompt and their scores, on all ranks."""
    val, max_tokens = state.config.val, state.config.data.max_response_length
    params = SamplingParams(val.n, max_tokens, val.temperature, val.top_p)
    responses = generate(state, prompts, range(len(prompts)), "validation", params)
    return responses, score_responses(state, prompts, responses)


def evaluate(prompts: Sequence[Prompt], responses: Sequence[Sequence[Response]],
             scores: Sequence[Sequence[Score]], level_key: str = "") -> Evaluation:
    """The evaluation of these responses, by level if the data have the column `level_key`."""
    all_scores = list(chain.from_iterable(scores))
    # Whether the reward function states an accuracy does not show where it failed.
    has_accuracy = all(score.acc is not None for score in all_scores if score.status == "ok")
    has_answers = any(score.pred for score in all_scores)

    def summarise(rows: Sequence[int]) -> dict[str, float]:
        per_prompt = [prompt_metrics(scores[i], has_accuracy, has_answers) for i in rows]
        lengths = [len(response.token_ids) for i in rows for response in responses[i]]
        return {**{name: fmean(metrics[name] for metrics in per_prompt) for name in per_prompt[0]},
                "response_length": fmean(lengths),  # in tokens
                **mean_extra([score for i in rows for score in scores[i]])}

    levels: dict[int | float | str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        if (level := find_column(prompt.row, level_key)) is not None:
            level = level if isinstance(level, (int, float)) else str(level)
            levels.setdefault(level, []).append(i)
    ordered = sorted(levels, key=lambda level: (isinstance(level, str), level))  # numbers first
    by_level = {f"{level_key} {level}": summarise(levels[level]) for level in ordered}
    return Evaluation(summarise(range(len(prompts))), by_level, prompts[0].text, prompts[0].answer,
                      [response.text for response in responses[0]])


def prompt_metrics(scores: Sequence[Score], has_accuracy: bool,
                   has_answers: bool) -> dict[str, float]:
    """The metrics of one prompt, from the scores of its k responses."""
    k = len(scores)
    if not has_accuracy:
        values = [score.score for score in scores]
        return {f"score@{k}": fmean(values), f"best@{k}": max(values)}
    accs = [score.acc or 0.0 for score in scores]
    majority = {f"maj@{k}": majority_correct(scores)} if has_answers else {}
    return {f"avg@{k}": fmean(accs), f"pass@{k}": max(accs), **majority}


def majority_correct(scores: Sequence[Score]) -> float:
    """The accuracy of the most frequent answer (the first of equals). No answer is no vote."""
    votes = Counter(score.pred for score in scores if score.pred)
    if not votes:
        return 0.0
    winner = votes.most_common(1)[0][0]
    return next(score.acc for score in scores if score.pred == winner)


def format_tables(evaluations: Evaluations) -> str:
    """A table for each set, under its name if there are several."""
    if len(evaluations) == 1:
        return format_table(*evaluations.values())
    return "\n\n".join(f"{escape_control(name)}\n{format_table(by_title)}"
                       for name, by_title in evaluations.items())


def format_table(by_title: dict[str, Evaluation]) -> str:
    """A row for each level and one for all prompts; a block of columns for each evaluation."""
    first = next(iter(by_title.values()))
    names = [name for name in first.metrics if "/" not in name]
    head = "".join(f" {name.replace('response_length', 'length'):>8}" for name in names)
    titles = [f"{escape_control(title):<{len(head)}}" for title in by_title]
    rows = [[" " * 12, *titles], [" " * 12, *[head] * len(titles)]]
    for level in [*first.by_level, "all"]:
        rows.append([f"{escape_control(level):<12}"])
        for evaluation in by_title.values():
            metrics = evaluation.by_level.get(level, evaluation.metrics)
            rows[-1].append("".join(format_cell(name, metrics) for name in names))
    return "\n".join("   ".join(row).rstrip() for row in rows)


def format_cell(name: str, metrics: dict[str, float]) -> str:
    digits = 1 if name == "response_length" else 3
    return f" {metrics.get(name, math.nan):>8.{digits}f}"


def response_records(set_name: str, prompts: Sequence[Prompt],
                     responses: Sequence[Sequence[Response]],
                     scores: Sequence[Sequence[Score]]) -> Iterator[dict]:
    """What responses.jsonl says of each response."""
    for prompt, group, group_scores in zip(prompts, responses, scores, strict=True):
        for response, score in zip(group, group_scores, strict=True):
            yield {"set": set_name, "id": prompt.id, "prompt": prompt.text, "answer": prompt.answer,
                   "response": response.text, "pred": score.pred, "acc": score.acc,
                   "score": score.score, "status": score.status, "tokens": len(response.token_ids),
                   "finish_reason": response.finish_reason,
                   **{f"reward/{name}": value for name, value in score.extra.items()}}


def main() -> None:
    """Evaluate the model that the command line names, print the table, save what it is made of."""
    config = read_command_line("Evaluate a model on the validation sets of a config.")
    if not split_list(config.val.file):
        raise SystemExit("error: val.file names no data to evaluate on: set val.file=FILE")
    settings, model = flatten(config), config.model.path
    config.run_dir += "/evaluate"  # servers load weights from there: never over a training run's
    out = Path(config.run_dir, f"{Path(model).name}_{datetime.now():%Y-%m-%d_%H-%M-%S}")
    state, data = setup(config, training=False)
    evaluations, records, is_main = {}, [], state.accelerator.is_main_process
    try:
        with one_line_errors():
            with raise_on_all_ranks(state.accelerator, "cannot save results"):
                if is_main:
                    out.mkdir(parents=True)  # fails if it exists: nothing is overwritten
            sync_weights(state)
            for name, prompts in data.val.items():
                results = sample_and_score(state, prompts)
                evaluations[name] = {model: evaluate(prompts, *results, config.val.level_key)}
                records += response_records(name, prompts, *results)
            if is_main:
                print(format_tables(evaluations))
                sets = {name: asdict(by_title[model]) for name, by_title in evaluations.items()}
                text = json.dumps({"sets": sets, "config": settings}, indent=2)
                (out / "metrics.json").write_text(text + "\n")
                lines = [json.dumps(record) + "\n" for record in records]
                (out / "responses.jsonl").write_text("".join(lines))
                print(f"\nwrote {out}/metrics.json and responses.jsonl")
    finally:
        state.engine.close()


if __name__ == "__main__":
    main()
