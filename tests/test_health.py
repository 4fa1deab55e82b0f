"""Rules that watch a run: what they find in ruined ones, and that they are quiet in others."""

import json
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from conftest import ROOT

from data_types import Progress
from infra.health import RULES, History, check_health
from infra.metrics import best_validation

HEALTHY = {"groups/kept": 0.8, "groups/all_correct": 0.1, "groups/all_wrong": 0.1,
           "acc/before_filter": 0.5, "reward/mean": 0.0, "reward/errors": 0, "reward/timeouts": 0,
           "responses/generated": 512, "response_length/mean": 20.0,
           "response_length/truncated": 0.02, "actor/approx_kl": 0.003, "actor/entropy": 0.2,
           "actor/clip_frac_low": 0.001, "actor/clip_frac_high": 0.005, "actor/max_grad_norm": 0.5,
           "actor/mismatch_kl": 1e-5}


def warnings_of(capsys, stop: bool = False, **columns: list) -> list[tuple[int, str]]:
    """Steps and problems that are warned of, in a run whose metrics differ so from `HEALTHY`."""
    state = SimpleNamespace(accelerator=Accelerator(cpu=True),
                            config=SimpleNamespace(stop_when_ruined=stop))
    progress, steps = Progress(), max(map(len, columns.values()))
    for i in range(steps):
        changes = {name.replace("__", "/"): values[i] for name, values in columns.items()}
        check_health(state, progress, {"step": i + 1, **HEALTHY, **changes})
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    return [(int(line.split("step ")[1].split(":")[0]), line.split(": ")[2].partition(" (")[0])
            for line in lines]


@pytest.mark.parametrize("columns, expected", [
    # figures of runs: lr 1e-2, 3e-3 and 1e-3; a reward for length
    ({"actor__approx_kl": [5.1, 0.1], "actor__clip_frac_low": [0.45, 0.1]},
     [(1, "the updates are too large")]),
    ({"actor__approx_kl": [0.01, 0.02, 0.1, 1.3], "actor__clip_frac_low": [0.0, 0.0, 0.1, 0.23]},
     [(4, "the updates are too large")]),
    ({"actor__max_grad_norm": [0.5, 0.9, 1.2, 4.8, 3.0, 564]},
     [(6, "a gradient is far larger than those before")]),
    ({"acc__before_filter": [0.3, 0.5, 0.8, 0.9, 0.9, 0.5, 0.21, 0.1, 0.1]},
     [(8, "accuracy has collapsed")]),
    ({"acc__before_filter": [0.25, 0.3, 0.36, 0.4, 0.38, 0.34, 0.3, 0.25],
      "reward__mean": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]},
     [(8, "the reward rises while accuracy falls")]),
    ({"response_length__truncated": [0.02, 0.02, 0.1, 0.4, 0.8, 0.9, 0.95]},
     [(5, "responses run into the limit")]),
    ({"response_length__mean": [20, 22, 18, 9, 2, 1, 1, 1]},
     [(7, "responses have nearly vanished")]),
    ({"actor__entropy": [0.2, 0.2, 0.2, 0.1, 0.02, 0.01, 0.01, 0.01]},
     [(7, "entropy has collapsed before the task is solved")]),
    ({"groups__all_correct": [0.9, 0.96, 0.97, 0.99], "groups__kept": [0.1, 0.04, 0.03, 0.01]},
     [(4, "nearly every prompt is solved")]),
    ({"groups__all_wrong": [0.97, 0.97, 0.98], "groups__kept": [0.03, 0.03, 0.02]},
     [(3, "nearly no prompt is ever solved")]),
    ({"actor__mismatch_kl": [0.01, 0.1, 0.2, 0.4]}, [(3, "sampler and trainer drift apart")]),
    ({"reward__errors": [0, 30, 90, 200]}, [(4, "the reward function fails often")])])
def test_a_run_that_suffers_is_warned_of_once_and_by_its_name(capsys, columns, expected):
    assert warnings_of(capsys, **columns) == expected


def test_every_rule_has_a_run_that_suffers_it_and_a_row_of_the_documentation():
    source = (ROOT / "tests/test_health.py").read_text()
    page = (ROOT / "docs/TROUBLESHOOTING.md").read_text()
    for rule in RULES:
        assert f'"{rule.problem}")]' in source
        assert f"\n| {rule.problem}{' †' * rule.ruined} |" in page
    assert len(RULES) == page.count("\n| ") - 1


def test_a_run_that_solves_its_task_is_not_warned_of(capsys):
    """The default run: entropy falls to a thirtieth, few groups are kept, lengths double."""
    steps = [i / 39 for i in range(40)]
    assert warnings_of(
        capsys, acc__before_filter=[0.25 + 0.74 * min(1, 2 * x) for x in steps],
        reward__mean=[-0.5 + 1.48 * min(1, 2 * x) for x in steps],
        actor__entropy=[0.243 * (1 - 0.98 * min(1, 1.5 * x)) for x in steps],
        groups__kept=[1 - 0.94 * x for x in steps], groups__all_correct=[0.93 * x for x in steps],
        response_length__mean=[15 + 20 * x for x in steps],
        actor__max_grad_norm=[0.5, *[4.8] * 39]) == []


def test_a_rule_that_still_holds_is_quiet_for_ten_steps_and_then_speaks_again(capsys):
    found = warnings_of(capsys, actor__approx_kl=[0.5] * 8 + [0.0] * 12 + [0.5])
    assert [step for step, _ in found] == [1, 21]


def test_of_a_long_run_the_start_and_the_newest_steps_are_looked_at():
    """So that a step of a run of a million takes no longer than others."""
    rows = [{"step": i, "groups/kept": 1.0, "acc/before_filter": float(i)} for i in range(1000)]
    history = History(rows, 999)
    assert (len(history.rows), history.start("acc/before_filter")) == (203, 1.0)
    assert (history.recent("acc/before_filter"), history.now("step")) == (997.0, 998)


def test_the_key_ends_a_run_whose_policy_is_ruined_and_no_other(capsys):
    with pytest.raises(ValueError, match=r"step 2: the updates are too large \(actor/approx_kl 0.5,"
                                         r".*\): lower actor.lr.*model_best/ has the best policy"):
        warnings_of(capsys, stop=True, actor__approx_kl=[0.0, 0.5])
    assert warnings_of(capsys, stop=True, actor__max_grad_norm=[0.5] * 5 + [99.0])


@pytest.mark.slow
@pytest.mark.parametrize("lr, latest", [("1e-2", 2), ("3e-3", 4)])
def test_a_learning_rate_that_ruins_a_run_is_told_in_its_first_steps(start, capsys, lr, latest):
    start("data.train_batch_size=32", "rollout.n=16", "actor.ppo_mini_batch_size=32", "val.file=",
          f"actor.lr={lr}", f"total_training_steps={latest}", "rollout.max_num_seqs=1024",
          "data.gen_batch_size=auto")
    assert "the updates are too large (actor/approx_kl " in capsys.readouterr().out


# ---- the best policy -----------------------------------------------------------------------------

def test_the_best_validation_is_the_first_of_the_highest_and_not_the_base_models():
    rows = [{"step": 0, "val/a/avg@4": 0.9}, {"step": 1}, {"step": 2, "val/a/avg@4": 0.5},
            {"step": 4, "val/a/avg@4": 0.7, "val/b/avg@4": 1.0}, {"step": 6, "val/a/avg@4": 0.7}]
    assert best_validation(rows) == (4, "val/a/avg@4", 0.7)
    assert best_validation(rows[:2]) is None
    assert best_validation([*rows, {"step": 8, "val/a/avg@8": 0.1}]) == (8, "val/a/avg@8", 0.1)


def test_the_best_policy_is_kept_and_a_resumed_run_keeps_the_same(start, tmp_path, monkeypatch):
    saved = []
    save_model = __import__("infra.checkpoint").checkpoint.save_model
    monkeypatch.setattr("infra.checkpoint.save_model",
                        lambda state, name: saved.append(name) or save_model(state, name))
    common = ["val.every=1", "save_every=1"]
    run_dir = start(*common, "total_training_steps=3")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    (name, *_) = [name for name in rows[1] if name.startswith("val/")]
    values = [row[name] for row in rows[1:]]
    expected = [i for i in range(3) if values[i] > max(values[:i], default=-1)]
    assert saved.count("model_best") == len(expected)
    start(*common, "total_training_steps=4")
    (*_, last) = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    better = last[name] > max(values)
    assert saved.count("model_best") == len(expected) + better
    run_dir = start(*common, "total_training_steps=5", "save_best_model=false")
    assert saved.count("model_best") == len(expected) + better
