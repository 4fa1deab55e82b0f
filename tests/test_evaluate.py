"""What a validation set's metrics are, how tables show them, and what evaluate.py leaves behind."""

import itertools
import json
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

import evaluate
from data_types import Data, Evaluation, Prompt, Response, SamplingParams, Score
from evaluate import prompt_metrics
from infra.metrics import format_tables, validation_metrics

RIGHT, WRONG = Score(1.0, 1.0, "8"), Score(0.0, -1.0, "3")


def response(tokens: int = 1, text: str = "text") -> Response:
    return Response(np.zeros(tokens, np.int32), np.zeros(tokens, np.float32), text, "stop")


def prompts(*rows: dict) -> list[Prompt]:
    return [Prompt(i, f"prompt {i}", [1], "8", row) for i, row in enumerate(rows)]


def evaluation_of(*scores: list[Score], rows: tuple = (), level_key: str = "") -> Evaluation:
    rows = rows or ({},) * len(scores)
    responses = [[response()] * len(group) for group in scores]
    return evaluate.evaluate(prompts(*rows), responses, scores, level_key)


# ---- metrics ----


def test_metrics_are_those_worked_out_by_hand():
    scores = [
        [RIGHT, RIGHT, WRONG, WRONG, WRONG],
        [WRONG] * 5,
    ]  # 2 of 10; one prompt of two; neither
    responses = [[response(tokens) for tokens in (1, 2, 3, 4, 5)], [response(10)] * 5]
    metrics = evaluate.evaluate(prompts({}, {}), responses, scores).metrics
    assert metrics == {
        "avg@5": pytest.approx(0.2),
        "pass@2": pytest.approx(0.35),  # of the first prompt 1 - C(3, 2) / C(5, 2) = 0.7
        "pass@4": 0.5,  # 4 of its 5 responses contain a right one
        "pass@5": 0.5,
        "maj@5": 0.0,
        "response_length": 6.5,
    }
    assert evaluation_of([RIGHT, WRONG, RIGHT], [WRONG] * 3).metrics["maj@3"] == 0.5


def test_pass_at_j_is_the_mean_over_all_choices_of_j_responses():
    accs = [1, 0, 0, 1, 0, 0, 0, 0, 0, 1]
    found = prompt_metrics([Score(float(acc), acc) for acc in accs], True, has_answers=False)
    for j in (2, 4, 8):
        chosen = [max(some) for some in itertools.combinations(accs, j)]
        assert found[f"pass@{j}"] == pytest.approx(sum(chosen) / len(chosen))
    assert [name for name in found if name.startswith("pass@")] == [
        "pass@2", "pass@4", "pass@8", "pass@10"]
    half = prompt_metrics([Score(0.5, 0.5)] * 4, True, has_answers=False)  # no right or wrong
    assert half == {"avg@4": 0.5, "pass@4": 0.5}


def test_the_first_of_equally_frequent_answers_wins_and_no_answer_is_no_vote():
    silent = Score(0.0, -1.0)
    for scores, majority in [
        ([RIGHT, WRONG, WRONG, RIGHT], 1),
        ([WRONG, RIGHT], 0),
        ([silent, silent, silent, RIGHT], 1),
        ([silent, silent], 0),
    ]:
        assert prompt_metrics(scores, True, has_answers=True)[f"maj@{len(scores)}"] == majority


def test_a_reward_function_that_parses_no_answer_has_no_majority():
    assert "maj@2" not in evaluation_of([Score(1.0, 1.0), Score(0.0, -1.0)]).metrics


def test_a_reward_without_an_accuracy_has_mean_and_best_score_instead():
    scores = [
        [Score(None, 0.5, "a"), Score(None, 1.5, "b")],
        [Score(None, -1.0), Score(None, -3.0)],
    ]
    evaluation = evaluation_of(*scores)
    assert evaluation.metrics == {"score@2": -0.5, "best@2": 0.25, "response_length": 1}
    table = format_tables({"before": {"val": evaluation}})
    assert "score@2   best@2   length" in table and "-0.500    0.250    1.000" in table


def test_a_failed_score_decides_nothing_about_accuracy():
    """It counts as wrong if there is an accuracy, by its score if there is none."""
    failed = [Score(acc, -1.0, status="timeout", message="too slow") for acc in (None, 0.0)]
    for score in failed:
        assert evaluation_of([RIGHT, score]).metrics["avg@2"] == 0.5
        assert evaluation_of([Score(None, 2.0), score]).metrics["score@2"] == 0.5


def test_values_that_a_reward_function_adds_become_metrics_but_no_columns_of_the_table():
    evaluation = evaluation_of([Score(1.0, 1.0, "8", {"style": value}) for value in (1.0, 0.0)])
    assert evaluation.metrics["reward/style"] == 0.5
    assert "style" not in format_tables({"before": {"val": evaluation}})


def test_levels_have_metrics_of_their_own_in_order():
    rows = ({"level": 10}, {"level": 9}, {"level": 9}, {}, {"level": "hard"})
    evaluation = evaluation_of(
        [RIGHT], [RIGHT], [WRONG], [WRONG], [WRONG], rows=rows, level_key="level"
    )
    assert list(evaluation.by_level) == ["level 9", "level 10", "level hard"]
    assert [metrics["avg@1"] for metrics in evaluation.by_level.values()] == [0.5, 1, 0]
    assert evaluation.metrics["avg@1"] == 0.4  # a prompt without a level counts in the whole


# ---- tables ----


def test_a_table_has_a_row_for_each_level_and_a_block_for_each_evaluation():
    before = Evaluation(
        {"avg@32": 0.25, "response_length": 15.24, "reward/x": 1},
        {"level 2": {"avg@32": 0.5, "response_length": 9}},
        "1+1?",
        "2",
        [],
    )
    after = Evaluation({"avg@32": 0.75, "response_length": 30}, {}, "1+1?", "2", [])
    lines = format_tables({"before": {"val": before}, "after": {"val": after}}).splitlines()
    assert [line.split() for line in lines] == [
        ["val"],
        ["before", "after"],
        ["avg@32", "length", "avg@32", "length"],
        ["level", "2", "0.500", "9.000", "0.750", "30.000"],
        ["all", "0.250", "15.240", "0.750", "30.000"],
    ]


def test_each_set_has_a_table_under_its_name_without_control_characters():
    evaluation = evaluation_of([RIGHT])
    table = format_tables({"\x1b[1m": {"a": evaluation, "\x1b[2J": evaluation}})
    assert table.startswith("a\n") and "\n\n\\x1b[2J\n" in table and "\x1b" not in table


# ---- sampling ----


def test_validation_samples_with_its_own_settings_and_the_same_random_numbers_each_time(
    monkeypatch,
):
    calls = []

    def generate(state, prompts, params, stream, description):
        calls.append(([prompt.position for prompt in prompts], stream, params))
        return [[response()] for _ in prompts]

    monkeypatch.setattr(evaluate, "generate", generate)
    monkeypatch.setattr(
        evaluate, "score_responses", lambda state, prompts, *_: [[RIGHT]] * len(prompts)
    )
    config = SimpleNamespace(
        val=SimpleNamespace(n=1, temperature=0.5, top_p=0.7, max_response_length=0, level_key="",
                            every=2),
        data=SimpleNamespace(max_response_length=96), rollout=SimpleNamespace(stop="Q:"),
        total_training_steps=5,
    )
    state = SimpleNamespace(config=config)
    found = [evaluate.validate(state, {"v": prompts({}, {}, {})}, step) for step in range(6)]
    assert [list(evaluations) for evaluations in found] == [
        ["before"], [], ["after"], [], ["after"], ["after"]]  # every second step, and the last
    assert calls == [([0, 1, 2], "validation", SamplingParams(1, 96, 0.5, 0.7, 0, ("Q:",)))] * 4
    first, second = found[0]["before"]["v"], found[5]["after"]["v"]
    assert first.metrics == second.metrics and first.metrics["avg@1"] == 1
    metrics = validation_metrics(found[0])
    assert metrics.pop("time/validate") == first.seconds > 0
    assert metrics == {"val/v/avg@1": 1, "val/v/pass@1": 1, "val/v/maj@1": 1,
                       "val/v/response_length": 1}
    assert validation_metrics({}) == {}


# ---- the script ----


@pytest.fixture
def run_script(tmp_path, monkeypatch):
    """`run_script(*overrides, is_main=True)`: the script with a policy that always says `Answer: 8`."""

    def run_script(*overrides: str, is_main: bool = True) -> SimpleNamespace:
        def setup(config, transformers_engine, training):
            assert not training
            accelerator = SimpleNamespace(is_main_process=is_main, process_index=0,
                                          num_processes=1)
            engine = SimpleNamespace(close=lambda: closed.append(True))
            seen.run_dir = config.run_dir
            return (
                SimpleNamespace(config=config, accelerator=accelerator, engine=engine),
                Data([], {"easy": prompts({}, {}), "hard": prompts({})}),
            )

        closed, seen = [], SimpleNamespace()
        monkeypatch.setattr(evaluate, "setup", setup)
        monkeypatch.setattr(evaluate, "sync_weights", lambda state: None)
        monkeypatch.setattr(evaluate, "raise_on_all_ranks", lambda *_: nullcontext())
        monkeypatch.setattr(
            evaluate,
            "generate",
            lambda state, prompts, *_: [
                [response(3, "\x1b[2J\ud800\x9b é\nAnswer: 8"), response(4, "Answer: 3")]
                for _ in prompts
            ],
        )
        monkeypatch.setattr(
            evaluate,
            "score_responses",
            lambda state, prompts, *_: [[RIGHT, WRONG]] * len(prompts),
        )
        monkeypatch.setattr(
            sys,
            "argv",
            ["evaluate.py", "--config", "config.yaml", f"run_dir={tmp_path / 'run'}", *overrides],
        )
        try:
            evaluate.main()
        finally:
            assert closed
        return seen

    return run_script


def saved(tmp_path):
    return sorted(path for path in (tmp_path / "run").rglob("*") if path.is_file())


def test_the_script_saves_metrics_settings_and_every_response(run_script, tmp_path, capsys):
    run_script("model.path=owner/model", "val.temperature=0.25")
    metrics_file, responses_file = saved(tmp_path)
    directory = metrics_file.parent
    assert directory.parent == tmp_path / "run/evaluate" and directory.name.startswith("model_")
    out = capsys.readouterr().out
    assert f"wrote {directory}/metrics.json and responses.jsonl" in out and "owner/model" in out
    result = json.loads(metrics_file.read_text())
    assert (
        result["sets"]["hard"]["metrics"]["avg@2"] == 0.5 and "by_level" in result["sets"]["easy"]
    )
    settings = {
        "model.path": "owner/model",
        "val.temperature": 0.25,
        "val.file": "toy/val.jsonl",
        "reward.name": "math",
        "run_dir": str(tmp_path / "run"),
    }
    assert settings.items() <= result["config"].items()
    records = [json.loads(line) for line in responses_file.read_text().splitlines()]
    assert [record["set"] for record in records] == ["easy"] * 4 + ["hard"] * 2
    assert (
        records[1].items()
        >= {
            "id": 0,
            "prompt": "prompt 0",
            "answer": "8",
            "response": "Answer: 3",
            "pred": "3",
            "acc": 0.0,
            "score": -1.0,
            "status": "ok",
            "tokens": 4,
            "finish_reason": "stop",
        }.items()
    )
    assert records[0]["response"] == "\x1b[2J\ud800\x9b é\nAnswer: 8"


def test_what_a_policy_wrote_cannot_steer_a_terminal_that_shows_the_file(run_script, tmp_path):
    run_script()
    for path in saved(tmp_path):
        content = path.read_bytes()
        assert content.isascii() and b"\x1b" not in content


def test_an_earlier_evaluation_is_never_overwritten(run_script, tmp_path, monkeypatch):
    run_script()
    before = {path: path.read_bytes() for path in saved(tmp_path)}
    name = next(iter(before)).parent.name
    stamp = evaluate.datetime.strptime(name.partition("_")[2], "%Y-%m-%d_%H-%M-%S")
    monkeypatch.setattr(evaluate, "datetime", SimpleNamespace(now=lambda: stamp))  # the same second
    with pytest.raises(SystemExit, match="error: .*File exists"):
        run_script()
    assert before == {path: path.read_bytes() for path in saved(tmp_path)}


def test_only_the_main_process_writes(run_script, tmp_path, capsys):
    run_script(is_main=False)
    assert not (tmp_path / "run").exists() and not capsys.readouterr().out


def test_servers_are_given_weights_in_another_directory_than_a_training_run(run_script, tmp_path):
    assert run_script().run_dir == f"{tmp_path / 'run'}/evaluate"


def test_without_validation_data_the_script_says_what_to_set(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--config", "config.yaml", "val.file="])
    with pytest.raises(SystemExit, match="error: val.file names no data.*set val.file=FILE"):
        evaluate.main()


def test_evaluate_evaluates_a_model_by_itself(tmp_path, capsys, monkeypatch):
    """The embedded model on embedded prompts, with nothing replaced."""
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "evaluate.py",
            "--config",
            "config.yaml",
            f"run_dir={tmp_path / 'run'}",
            "val.max_prompts=5",
            "val.n=2",
        ],
    )
    evaluate.main()
    assert "avg@2" in capsys.readouterr().out
    metrics_file, responses_file = saved(tmp_path)
    records = [json.loads(line) for line in responses_file.read_text().splitlines()]
    accuracy = sum(record["acc"] for record in records) / len(records)
    assert len(records) == 10
    assert json.loads(metrics_file.read_text())["sets"]["val"]["metrics"]["avg@2"] == pytest.approx(
        accuracy
    )
