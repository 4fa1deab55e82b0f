"""Evaluate a policy on validation sets.

`python evaluate.py --config config.yaml model.path=runs/toy/model` evaluates any model directory or
hub name on the validation data of a config. It prints a table, and saves metrics.json and
responses.jsonl in a new directory under `<run_dir>/evaluate/`.

With k = `val.n` responses to each prompt, avg@k is the mean accuracy, pass@k the share of prompts
with a correct response, maj@k the share whose most frequent answer is correct; pass@j with j = 2,
4, 8, ... below k is estimated from the k without bias (arXiv 2107.03374, equation 1). If the reward
function states no accuracy: score@k is the mean score, best@k the mean of each prompt's best score.
"""

import json
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, replace
from datetime import datetime
from math import comb
from pathlib import Path
from statistics import fmean

from data_types import Evaluation, Prompt, Response, SamplingParams, Score, TrainState
from infra.config import (flatten, one_line_errors, read_command_line, split_list, stop_strings,
                          value_of_set)
from infra.data import find_column
from infra.distributed import raise_on_all_ranks
from infra.memory import out_of_memory
from infra.metrics import format_tables
from infra.rollout_files import response_record
from infra.setup import setup, sync_weights
from reward import mean_extra
from rollout import generate, transformers_engine
from sampling import score_responses


def validate(state: TrainState, val: dict[str, list[Prompt]],
             step: int) -> dict[str, dict[str, Evaluation]]:
    """The evaluations of the current policy on the validation sets, {"after": by name} (of step 0
    "before"); {} if none is due after this step. The random numbers are the same each time."""
    last, every = state.config.total_training_steps, state.config.val.every
    if not val or not (step in (0, last) or (every and step % every == 0)):
        return {}
    evaluations = {}
    for i, (name, prompts) in enumerate(val.items()):
        start = time.perf_counter()
        responses, scores = sample_and_score(state, prompts, i)
        evaluations[name] = replace(
            evaluate(prompts, responses, scores, state.config.val.level_key),
            seconds=time.perf_counter() - start)
    return {"after" if step else "before": evaluations}


def sample_and_score(state: TrainState, prompts: Sequence[Prompt],
                     i: int = 0) -> tuple[list[list[Response]], list[list[Score]]]:
    """`val.n` responses to each prompt of validation set `i`, and their scores."""
    val = state.config.val
    n, max_tokens, temperature, top_p = (value_of_set(value, i) for value in (
        val.n, val.max_response_length, val.temperature, val.top_p))
    params = SamplingParams(n, max_tokens or state.config.data.max_response_length, temperature,
                            top_p, logprobs=0, stop=stop_strings(state.config.rollout.stop))
    prompts = [replace(prompt, position=at) for at, prompt in enumerate(prompts)]
    responses = generate(state, prompts, params, "validation", "validation")
    return responses, score_responses(state, prompts, responses, "validation")


def evaluate(prompts: Sequence[Prompt], responses: Sequence[Sequence[Response]],
             scores: Sequence[Sequence[Score]], level_key: str = "") -> Evaluation:
    """The evaluation of these responses, by level if the data have the column `level_key`."""
    all_scores = [score for group in scores for score in group]
    # Whether the reward function states an accuracy does not show where it failed.
    has_accuracy = all(score.acc is not None for score in all_scores if score.status == "ok")
    has_answers = any(score.pred for score in all_scores)

    def summarise(rows: Sequence[int]) -> dict[str, float]:
        per_prompt = [prompt_metrics(scores[i], has_accuracy, has_answers) for i in rows]
        lengths = [len(response.token_ids) for i in rows for response in responses[i]]
        return {**{name: fmean(metrics[name] for metrics in per_prompt) for name in per_prompt[0]},
                "response_length": fmean(lengths),  # in tokens
                **mean_extra([score for i in rows for score in scores[i]])}

    levels: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        if (level := find_column(prompt.row, level_key)) is not None:
            levels.setdefault(str(level), []).append(i)
    ordered = sorted(levels, key=lambda level: (len(level), level))  # 9 before 10
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
    metrics = {f"avg@{k}": fmean(accs)}
    if set(accs) <= {0.0, 1.0}:
        wrong = accs.count(0.0)
        metrics |= {f"pass@{2**i}": 1 - comb(wrong, 2**i) / comb(k, 2**i)
                    for i in range(1, (k - 1).bit_length())}
    metrics[f"pass@{k}"] = max(accs)
    if has_answers:  # the first of equally frequent ones wins; no answer is no vote
        votes = Counter(score.pred for score in scores if score.pred)
        winner = max(votes, key=votes.get, default=None)
        metrics[f"maj@{k}"] = next((s.acc for s in scores if s.pred == winner), 0.0)
    return metrics


def main() -> None:
    """Evaluate the model that the command line names, print the table, save what it is made of."""
    config = read_command_line("Evaluate a model on validation sets.", training=False)
    if not split_list(config.val.file):
        raise SystemExit("error: val.file names no data to evaluate on: set val.file=FILE")
    settings, model = flatten(config), config.model.path
    config.run_dir += "/evaluate"  # servers load weights from there: never over a training run's
    out = Path(config.run_dir, f"{Path(model).name}_{datetime.now():%Y-%m-%d_%H-%M-%S}")
    state, data = setup(config, transformers_engine, training=False)
    evaluations, records, is_main = {}, [], state.accelerator.is_main_process
    with closing(state.engine), one_line_errors(), out_of_memory("sync"):
        with raise_on_all_ranks("cannot save results"):
            if is_main:
                out.mkdir(parents=True)  # fails if it exists: nothing is overwritten
        sync_weights(state)
        for i, (name, prompts) in enumerate(data.val.items()):
            responses, scores = sample_and_score(state, prompts, i)
            evaluations[name] = evaluate(prompts, responses, scores, config.val.level_key)
            for prompt, *group in zip(prompts, responses, scores, strict=True):
                records += [{"set": name, "id": prompt.id, **response_record(prompt, *pair)}
                            for pair in zip(*group, strict=True)]
        if is_main:
            print(format_tables({model: evaluations}))
            sets = {name: asdict(evaluation) for name, evaluation in evaluations.items()}
            text = json.dumps({"sets": sets, "config": settings}, indent=2)
            (out / "metrics.json").write_text(text + "\n")
            lines = [json.dumps(record) + "\n" for record in records]
            (out / "responses.jsonl").write_text("".join(lines))
            print(f"\nwrote {out}/metrics.json and responses.jsonl")


if __name__ == "__main__":
    main()
