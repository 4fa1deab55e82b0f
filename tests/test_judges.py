"""judges.py: a verifier of one's own runs beside the trainer, and cannot hold it up."""

import os
import signal
import subprocess
import sys
import time

import pytest

import judges
from judges import make_judge
from reward import TIMED_OUT, Score

VERIFIER = '''
import os, re, subprocess, time
def score(response, ground_truth, **row):
    print("not a verdict")
    if response == "hang":
        re.match("(a+)+$", "a" * 60 + "b")  # holds the interpreter's lock for ever
    if response == "die":
        os._exit(1)
    if response == "eat":
        return len(bytearray(16 * 2**30))
    if response == "fork":
        if os.fork() == 0:
            time.sleep(100)
        time.sleep(100)
    if response == "cat":
        subprocess.run(["cat"])
    if response == "burn":
        start = time.process_time()
        while time.process_time() < start + 0.7:
            pass
    if response == "fail":
        raise KeyError("x")
    if response == "sleep":
        time.sleep(0.5)
    return float(response == ground_truth) + row.get("bonus", 0)
'''


@pytest.fixture
def name(tmp_path):
    (tmp_path / "mine.py").write_text(VERIFIER)
    return f"{tmp_path}/mine.py:score"


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().split(") ")[1][0] != "Z"
    except FileNotFoundError:
        return False


def test_verdicts_come_in_the_tasks_order(name):
    judge = make_judge(name, 2, 10.0)
    tasks = [(str(i % 3), "1", {"bonus": i}) for i in range(60)]
    assert judge(tasks) == [Score(float(i + (i % 3 == 1) > 0), float(i + (i % 3 == 1))) for i in range(60)]


def test_scoring_is_parallel(name):
    judge = make_judge(name, 4, 10.0)
    judge([("sleep", "", {})] * 4)  # four workers now
    start = time.perf_counter()
    judge([("sleep", "", {})] * 8)
    assert time.perf_counter() - start < 2.5  # of 4 s, one after the other


def test_slow_verdicts_are_waited_for(name):
    """Though all of them together take longer than the limit, and those under way slow each other."""
    cores = len(os.sched_getaffinity(0))
    assert make_judge(name, cores, 5.0)([("burn", "", {})] * 8 * cores) == [Score(0.0, 0.0)] * 8 * cores


def test_what_a_verifier_reads_or_leaves_running_is_its_own_affair(name):
    judge = make_judge(name, 1, 1.5)
    start = time.perf_counter()
    assert judge([(what, "1", {}) for what in ("cat", "1", "fork", "1")]) == [Score(0.0, 0.0), Score(1.0, 1.0), TIMED_OUT, Score(1.0, 1.0)]
    assert time.perf_counter() - start < 8


def test_a_worker_that_died_meanwhile_costs_no_response_its_verdict(name, monkeypatch):
    started, start_worker = [], judges.start_worker
    monkeypatch.setattr(judges, "start_worker", lambda name: started.append(start_worker(name)) or started[-1])
    judge = make_judge(name, 1, 10.0)
    started[0].kill()
    assert judge([("1", "1", {})]) == [Score(1.0, 1.0)] and len(started) == 2


@pytest.mark.parametrize("what", ["hang", "die", "eat"])
def test_what_hangs_dies_or_eats_memory_is_wrong_and_the_rest_is_judged(name, what, monkeypatch):
    started, start_worker = [], judges.start_worker
    monkeypatch.setattr(judges, "start_worker", lambda name: started.append(start_worker(name)) or started[-1])
    judge = make_judge(name, 2, 2.0)
    start = time.perf_counter()
    verdicts = judge([(what if i % 50 == 0 else "1", "1", {}) for i in range(256)])
    assert time.perf_counter() - start < 2.0 + 2 + (what == "eat") * 10
    assert verdicts == [TIMED_OUT if i % 50 == 0 else Score(1.0, 1.0) for i in range(256)]
    assert judge([("1", "1", {})]) == [Score(1.0, 1.0)]
    if what == "hang":
        assert sum(alive(worker.pid) for worker in started) == len(started) - 6  # those that hung are gone


def test_a_failure_is_told(name):
    (verdict,) = make_judge(name, 1, 10.0)([("fail", "", {})])
    assert verdict.startswith("the reward function raised KeyError: 'x' at mine.py:")


def test_one_that_does_not_load_is_an_error_at_once(tmp_path):
    (tmp_path / "mine.py").write_text("import no_such_module")
    with pytest.raises(ValueError, match="cannot import .*mine.py: ModuleNotFoundError"):
        make_judge(f"{tmp_path}/mine.py:score", 1, 10.0)


def test_no_worker_outlives_a_trainer_that_was_killed(name):
    code = (f"import judges\nfirst = judges.start_worker({name!r})\nprint(first.pid, flush=True)\n"
            "judges.ask(first, ('hang', '', {}), 100)")
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    worker = int(trainer.stdout.readline())
    time.sleep(0.5)
    assert alive(worker)
    os.kill(trainer.pid, signal.SIGKILL)
    trainer.wait()
    for _ in range(50):
        if not alive(worker):
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker is still there")
