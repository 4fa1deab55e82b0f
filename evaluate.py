"""How good is a policy? avg@k, pass@k and maj@k over a validation set.

As a script, judge any model directory or hub name on the data that a config names:
`python evaluate.py --config config.yaml model.path=runs/toy/model`
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from infra.config import escape_control
from infra.data import Prompt, find_column
from reward import Score, mean_columns
from rollout import Response


@dataclass(frozen=True)
class Evaluation:
    """The figures of a validation set, whole (`metrics`) and for each level of difficulty (`by_level`)."""
    metrics: dict[str, float]
    by_level: dict[str, dict[str, float]]
    prompt: str  # the first of them, its answer, and what the policy wrote
    answer: str
    examples: list[str]


Evaluations = dict[str, dict[str, Evaluation]]  # of each set: before, after

def majority_correct(scores: Sequence[Score]) -> float:
    """Whether the most frequent answer (the first of equals) is right; responses without an answer do not vote."""
    votes = Counter(score.pred for score in scores if score.pred)
    if not votes:
        return 0.0
    winner = votes.most_common(1)[0][0]
    return next(score.acc for score in scores if score.pred == winner)


def summarise(responses: Sequence[Sequence[Response]], scores: Sequence[Sequence[Score]]) -> dict[str, float]:
    """avg@k (mean accuracy), pass@k (any of k right), maj@k (the most frequent answer right), mean length in tokens,
    and the means of a verifier's own columns."""
    k, prompts = len(scores[0]), len(scores)
    figures = {f"avg@{k}": sum(score.acc for row in scores for score in row) / (k * prompts),
               f"pass@{k}": sum(max(score.acc for score in row) for row in scores) / prompts}
    if any(score.pred for row in scores for score in row):  # not every verifier reads an answer
        figures[f"maj@{k}"] = sum(majority_correct(row) for row in scores) / prompts
    length = sum(len(r.token_ids) for row in responses for r in row) / (k * prompts)
    return figures | {"response_length": length} | mean_columns([score for row in scores for score in row])


def evaluate(prompts: Sequence[Prompt], responses: Sequence[Sequence[Response]],
             scores: Sequence[Sequence[Score]], level_key: str = "") -> Evaluation:
    """Sum up what was written and how it was judged, for each level of `level_key` where the data have that column."""
    levels: dict = {}
    for i, prompt in enumerate(prompts):
        if (level := find_column(prompt.row, level_key)) is not None:
            levels.setdefault(level if isinstance(level, (int, float)) else str(level), []).append(i)
    by_level = {f"{level_key} {level}": summarise([responses[i] for i in rows], [scores[i] for i in rows])
                for level, rows in sorted(levels.items(), key=lambda item: (str(type(item[0])), item[0]))}
    return Evaluation(summarise(responses, scores), by_level, prompts[0].text, prompts[0].answer,
                      [response.text for response in responses[0]])


def format_tables(evaluations: Evaluations) -> str:
    """A table for each set, under its name where there are several."""
    return "\n\n".join(f"{escape_control(name)}\n" * (len(evaluations) > 1) + format_table(of_set)
                       for name, of_set in evaluations.items())


def format_table(evaluations: dict[str, Evaluation]) -> str:
    """A table with a row for each level and a block of columns for each evaluation, under its name."""
    first = next(iter(evaluations.values()))
    names = [name for name in first.metrics if "/" not in name]
    heads = "".join(f"{name.replace('response_length', 'length'):>8}" for name in names)
    lines = [" " * 12 + "".join(f"    {title:<{len(heads)}}" for title in evaluations).rstrip(),
             " " * 12 + "".join(f"    {heads}" for _ in evaluations)]
    for level in [*first.by_level, "all"]:
        lines.append(f"{escape_control(level):<12}")
        for evaluation in evaluations.values():
            figures = evaluation.by_level.get(level, evaluation.metrics)
            lines[-1] += "    " + "".join(f"{figures.get(name, 0.0):>8.{1 if name == 'response_length' else 3}f}"
                                          for name in names)
    return "\n".join(lines)


def main() -> None:
    """Generate, judge and print the table."""
    from infra.config import split_list, one_line_errors, read_command_line
    from infra.setup import setup, sync_weights
    from train_dapo import validate  # which imports this module
    config = read_command_line("Judge a model on the validation data of a config.")
    if not split_list(config.val.file):
        raise SystemExit("error: val.file names no data to evaluate on")
    config.run_dir += "/evaluate"  # where servers find the weights: not those of a run that goes on
    run, data = setup(config, training=False)
    try:
        with one_line_errors():
            sync_weights(run)
        print(format_tables({name: {config.model.path: validate(run, prompts)} for name, prompts in data.val.items()}))
    finally:
        run.engine.close()


if __name__ == "__main__":
    main()
