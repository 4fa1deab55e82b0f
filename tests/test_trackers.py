"""infra/trackers.py: a tracker gets the metrics under names that it takes, and ends no run."""

import re
from types import SimpleNamespace

import pytest
from accelerate import tracking
from conftest import read_rows

ONE_STEP = ["val.max_prompts=2", "total_training_steps=1", "save_every=1"]


class StandIn(tracking.GeneralTracker):
    """With the rules of a tracker that is not installed here, and what it was told."""
    requires_logging_directory, fails_in, error, calls = False, (), RuntimeError("no key\n"), []

    def __init__(self, project, **options):
        super().__init__()
        self.options, self.logged, self.config, self.finished = options, {}, None, False
        self.calls.append(self)

    def note(self, name):
        if name in self.fails_in:
            raise self.error

    def start(self):
        self.note("start")
        number = self.options.get("id") or self.options.get("run_id") or f"id{len(self.calls)}"
        self.run = SimpleNamespace(id=number, info=SimpleNamespace(run_id=number))

    @property
    def tracker(self):
        return self.run

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step):
        self.note("log")
        if self.name == "mlflow" and (bad := [key for key in values
                                              if not re.fullmatch(r"[\w\-. :/]+", key)]):
            raise ValueError(f"invalid metric name {bad[0]}")
        self.logged[step] = values

    def finish(self):
        self.note("finish")
        self.finished = True


@pytest.fixture
def stand_in(monkeypatch):
    """`stand_in(name)`: log_with=name gets a stand-in; returns the list of those made."""
    def stand_in(name: str, fails_in=(), error=StandIn.error) -> list:
        kind = type("Tracker", (StandIn,), {"name": name, "fails_in": fails_in, "error": error,
                                            "calls": []})
        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, name, kind)
        monkeypatch.setattr(tracking, "_available_trackers", [tracking.LoggerType(name)])
        return kind.calls
    return stand_in


@pytest.mark.parametrize("error", [RuntimeError("no key\nhere"), KeyError("run")], ids=repr)
@pytest.mark.parametrize("where", ["start", "log", "finish"])
def test_a_tracker_that_fails_is_one_warning_and_the_run_goes_on(start, stand_in, capsys, where,
                                                                error):
    stand_in("wandb", [where], error)
    run_dir = start("log_with=wandb", *ONE_STEP)
    assert [row["step"] for row in read_rows(run_dir)] == [0, 1]
    assert (run_dir / "model").is_dir()
    out = capsys.readouterr().out
    (warning,) = re.findall("^warning: .*$", out, re.MULTILINE)
    assert warning.startswith(f"warning: log_with: the tracker failed ({type(error).__name__}: ")
    assert warning.endswith("metrics.jsonl has everything")


def test_mlflow_gets_every_metric_under_a_name_that_it_takes(start, stand_in):
    calls = stand_in("mlflow")
    run_dir = start("log_with=mlflow", *ONE_STEP)
    (tracker,), rows = calls, read_rows(run_dir)
    for row in rows:
        logged = tracker.logged[row["step"]]
        assert {name.replace("@", "_at_"): value for name, value in row.items()} == logged
    assert "val/val/avg_at_2" in tracker.logged[0] and tracker.finished


def test_other_trackers_get_the_names_of_metrics_jsonl(start, stand_in):
    calls = stand_in("wandb")
    run_dir = start("log_with=wandb", *ONE_STEP)
    assert list(calls[0].logged.values()) == read_rows(run_dir)


@pytest.mark.parametrize("name, key", [("wandb", "id"), ("mlflow", "run_id")])
def test_a_resumed_run_continues_its_record_and_a_branch_has_its_own(start, stand_in, tmp_path,
                                                                    name, key):
    calls = stand_in(name)
    run_dir = start(f"log_with={name}", *ONE_STEP)
    start(f"log_with={name}", *ONE_STEP, "total_training_steps=2")
    start(f"log_with={name}", *ONE_STEP, f"resume={run_dir / 'checkpoints/step_00002'}",
          f"run_dir={tmp_path / 'branch'}", "total_training_steps=3")
    assert [tracker.options[key] for tracker in calls] == [None, "id1", None]
    assert calls[0].config and calls[1].config is None and calls[2].config  # mlflow: never again
    assert (tmp_path / "branch/tracker_id").read_text() == "id3"


def test_the_files_of_wandb_lie_in_the_run_directory(start, stand_in):
    calls = stand_in("wandb")
    run_dir = start("log_with=wandb", *ONE_STEP)
    assert calls[0].options["dir"] == run_dir and calls[0].options["name"] == run_dir.name
