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
    if response == "work":
        sum(i * i for i in range(500_000))
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


@pytest.fixture
def workers(monkeypatch):
    """All workers that are started, in their order."""
    started, start_worker = [], judges.start_worker
    monkeypatch.setattr(judges, "start_worker", lambda nursery: started.append(start_worker(nursery)) or started[-1])
    return started


def make(name, workers, timeout):
    """A judge that takes single responses, for short."""
    judge = make_judge([name], [1.0], workers, timeout)
    return lambda tasks: [verdict for verdict, in judge([([response], *rest) for response, *rest in tasks])]


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().split(") ")[1][0] != "Z"
    except FileNotFoundError:
        return False


def test_verdicts_come_in_the_tasks_order(name):
    judge = make_judge([name], [1.0], 2, 10.0)
    tasks = [([str(i % 3), "1"], "1", {"bonus": i}) for i in range(30)]
    assert judge(tasks) == [[Score(float(i + (i % 3 == 1) > 0), float(i + (i % 3 == 1))), Score(1.0, i + 1.0)] for i in range(30)]


def test_scoring_is_parallel(name):
    judge = make(name, 4, 10.0)
    start = time.perf_counter()
    judge([("sleep", "", {})] * 8)
    assert time.perf_counter() - start < 2.5  # of 4 s, one after the other


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_two_workers_judge_more_than_one_does(name):
    seconds = {}
    for count in (1, 2):
        judge = make(name, count, 10.0)
        start = time.perf_counter()
        judge([("work", "", {})] * 60)
        seconds[count] = time.perf_counter() - start
    assert seconds[2] < 0.75 * seconds[1]


def test_slow_verdicts_are_waited_for(name):
    """Though all of them together take longer than the limit, and those under way slow each other."""
    cores = len(os.sched_getaffinity(0))
    assert make(name, cores, 5.0)([("burn", "", {})] * 8 * cores) == [Score(0.0, 0.0)] * 8 * cores


def test_what_a_verifier_reads_or_leaves_running_is_its_own_affair(name):
    judge = make(name, 1, 1.5)
    start = time.perf_counter()
    assert judge([(what, "1", {}) for what in ("cat", "1", "fork", "1")]) == [Score(0.0, 0.0), Score(1.0, 1.0), TIMED_OUT, Score(1.0, 1.0)]
    assert time.perf_counter() - start < 8


def test_a_worker_that_died_meanwhile_costs_no_response_its_verdict(name, workers):
    judge = make(name, 1, 10.0)
    assert judge([("1", "1", {})]) == [Score(1.0, 1.0)]
    os.kill(workers[0].pid, signal.SIGKILL)
    assert judge([("1", "1", {})]) == [Score(1.0, 1.0)] and len(workers) == 2


@pytest.mark.parametrize("what", ["hang", "die", "eat"])
def test_what_hangs_dies_or_eats_memory_is_wrong_and_the_rest_is_judged(name, what, workers):
    judge = make(name, 2, 2.0)
    start = time.perf_counter()
    verdicts = judge([(what if i % 50 == 0 else "1", "1", {}) for i in range(256)])
    assert time.perf_counter() - start < 2.0 + 2 + (what == "eat") * 10
    assert verdicts == [TIMED_OUT if i % 50 == 0 else Score(1.0, 1.0) for i in range(256)]
    assert judge([("1", "1", {})]) == [Score(1.0, 1.0)]
    assert 1 <= sum(alive(worker.pid) for worker in workers) <= 2 and len(workers) >= 6  # those that failed are gone


HANGS = "Answer: $9^{9^{9^{9}}}$"


def test_with_math_verify_and_one_hanging_response_in_a_hundred_a_batch_of_512_takes_the_limit_and_two_seconds(workers):
    answers = [["$3$", "$\\frac{6}{14}$", "\\boxed{\\frac 37}", "$\\sqrt{2}$"][i % 4] for i in range(16)]
    tasks = [([f"so it is.\nAnswer: {answer}" for answer in answers], "\\frac{3}{7}", {}) for _ in range(32)]
    for at in (5, 100, 211, 340, 507):
        tasks[at // 16][0][at % 16] = HANGS
    judge = make_judge(["math_verify"], [1.0], 2, 5.0)
    start = time.perf_counter()
    verdicts = [verdict for group in judge(tasks) for verdict in group]
    seconds = time.perf_counter() - start
    print(f"{seconds:.2f} s")
    assert seconds < 5.0 + 2
    assert [at for at, verdict in enumerate(verdicts) if verdict == TIMED_OUT] == [5, 100, 211, 340, 507]
    assert sum(verdict.acc for verdict in verdicts) == sum(i % 4 in (1, 2) for i in range(512) if i not in (5, 100, 211, 340, 507))
    assert sum(alive(worker.pid) for worker in workers) <= 2  # the idle ones


def test_batched_verifiers_judge_a_prompts_responses_in_one_call_with_one_limit(tmp_path):
    (tmp_path / "mine.py").write_text("import os, time\ndef score(responses, ground_truth):\n    time.sleep(100 * ('hang' in responses))\n"
                                      "    return [len(responses) for _ in responses]\n")
    judge = make_judge([f"{tmp_path}/mine.py:score"], [1.0], 2, 1.0)
    assert judge([(["a", "b"], "", {}), (["c", "hang", "d"], "", {}), (["e"], "", {})]) == [
        [Score(1.0, 2.0)] * 2, [TIMED_OUT] * 3, [Score(1.0, 1.0)]]


def test_several_verifiers_are_weighed(name):
    judge = make_judge(["math", name], [1.0, 0.5], 1, 5.0)
    ((right, wrong, hung, failed),) = judge([(["Answer: 6", "Answer: 7", "hang", "fail"], "6", {"bonus": 4})])
    assert right == Score(1.0, 3.0, "6", {"math": 1.0, "score": 4.0}) and wrong == Score(0.0, 1.0, "7", {"math": -1.0, "score": 4.0})
    assert hung == TIMED_OUT and failed.startswith("the reward function raised KeyError")
    with pytest.raises(ValueError, match="reward.name: two of math, .* have the same name"):
        make_judge(["math", "math"], [1.0, 1.0], 1, 5.0)


def test_a_failure_is_told(name):
    (verdict,) = make(name, 1, 10.0)([("fail", "", {})])
    assert verdict.startswith("the reward function raised KeyError: 'x' at mine.py:")


def test_one_that_does_not_load_is_an_error_at_once(tmp_path):
    (tmp_path / "mine.py").write_text("import no_such_module")
    with pytest.raises(ValueError, match="cannot import .*mine.py: ModuleNotFoundError"):
        make_judge([f"{tmp_path}/mine.py:score"], [1.0], 1, 10.0)
    (tmp_path / "mine.py").write_text("import os; os._exit(3)")
    with pytest.raises(ValueError, match="did not load within 60 s, or died"):
        make_judge([f"{tmp_path}/mine.py:score"], [1.0], 1, 10.0)


def test_a_nursery_that_was_killed_is_an_error_and_no_hang(name, monkeypatch):
    nurseries, start_nursery = [], judges.start_nursery
    monkeypatch.setattr(judges, "start_nursery", lambda name: nurseries.append(start_nursery(name)) or nurseries[-1])
    judge = make(name, 1, 10.0)
    nurseries[0].process.kill()
    nurseries[0].process.wait()
    with pytest.raises(ValueError, match="the process that had loaded the verifier was killed"):
        judge([("1", "1", {})])


def test_nothing_outlives_a_trainer_that_was_killed(name):
    code = (f"import judges\nnursery = judges.start_nursery({name!r})\nfirst = judges.start_worker(nursery)\n"
            "print(nursery.process.pid, first.pid, flush=True)\njudges.say(first.socket, (['hang'], '', {}))\njudges.hear(first.socket, 100)")
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pids = list(map(int, trainer.stdout.readline().split()))
    time.sleep(0.5)
    assert all(map(alive, pids)) and len(pids) == 2
    os.kill(trainer.pid, signal.SIGKILL)
    trainer.wait()
    for _ in range(50):
        if not any(map(alive, pids)):
            return
        time.sleep(0.1)
    for pid in filter(alive, pids):
        os.kill(pid, signal.SIGKILL)
    pytest.fail("a process is still there")
