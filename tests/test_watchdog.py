"""A rank that gives no sign of life ends the run, and is named."""

import os
import re
import signal
import subprocess
import time
from threading import Event
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from conftest import ROOT, TINY
from test_distributed import LAUNCH

import infra.watchdog
from infra.watchdog import start_watchdog


@pytest.fixture
def store(monkeypatch):
    store = dist.HashStore()
    monkeypatch.setattr(infra.watchdog, "_get_default_store", lambda: store)
    return store


def rank_of(rank: int, world: int = 2):
    return SimpleNamespace(process_index=rank, num_processes=world)


@pytest.mark.parametrize("watching, silent", [(0, 2), (1, 0)])
def test_a_rank_that_is_silent_is_named_and_the_process_ends(store, capsys, watching, silent):
    ended = Event()
    start_watchdog(rank_of(watching, 3), 2, end=lambda code: ended.set())
    alive = dist.PrefixStore("watchdog", store)
    for beat in range(200):  # on a busy machine it may take longer
        for rank in {0, 1, 2} - {watching, silent}:
            alive.set(str(rank), f"{beat} update")
        if ended.wait(0.3):
            break
    assert ended.is_set() and beat >= 5
    line = capsys.readouterr().err.strip()
    assert re.fullmatch(f"error: rank {silent} has not moved for 2 s, in phase start "
                        rf"\(watchdog_seconds\); rank {watching} waited for it in phase .*\. The "
                        "same command resumes from the last checkpoint", line)


def test_ranks_that_are_alive_watch_each_other_for_ever(store):
    ended = Event()
    for rank in range(3):
        start_watchdog(rank_of(rank, 3), 10, end=lambda code: ended.set())
    assert not ended.wait(13)


@pytest.mark.slow
@pytest.mark.parametrize("moment, message", [
    ("training", r"error: rank \d has not moved for 4 s, in phase"),
    ("start", "error: (the processes of the run did not meet within 8 s|rank .* has not moved)")])
def test_a_rank_that_is_stopped_for_good_ends_the_run(tmp_path, moment, message):
    """The launcher ends what is stopped, half a minute later."""
    run_dir = tmp_path / "run"
    process = subprocess.Popen(
        [*LAUNCH, "--multi_gpu", "--num_processes", "2", "train_dapo.py", "--config",
         "config.yaml", *TINY, f"run_dir={run_dir}", "total_training_steps=5000", "save_every=1",
         "val.file=", "watchdog_seconds=4"], cwd=ROOT, stderr=subprocess.PIPE, text=True,
        stdout=subprocess.DEVNULL)

    def ranks() -> list[str]:
        return subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True,
                              check=False).stdout.split()

    while len(ranks()) < 2 or (moment == "training" and not list(
            run_dir.glob("checkpoints/step_*"))):
        assert process.poll() is None
        time.sleep(0.1)
    os.kill(int(ranks()[-1]), signal.SIGSTOP)
    _, err = process.communicate(timeout=120)
    assert process.returncode and re.search(message, err)
