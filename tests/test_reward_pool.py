"""judges.py: a verifier of one's own runs beside the trainer, and cannot hold it up."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import infra.reward_pool as judges
from infra.reward_pool import make_judge
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
    """The last of them near the end; most responses to a prompt agree, as a policy's do."""
    tasks = []
    for n in range(2, 34):
        answers = [rf"{n}\pi"] * 6 + [rf"\pi \cdot {n}"] * 2 + [rf"{n + 1}\pi"] * 3 + [str(n)] * 2 + [rf"\frac{{{n}\pi}}{{2}}"] * 2 + [r"\pi"]
        tasks.append(([f"so it is.\nAnswer: ${answer}$" for answer in answers], rf"{n}\pi", {}))
    for at in (5, 100, 211, 340, 507):
        tasks[at // 16][0][at % 16] = HANGS
    judge = make_judge(["math_verify"], [1.0], 2, 5.0)
    start = time.perf_counter()
    verdicts = [verdict for group in judge(tasks) for verdict in group]
    seconds = time.perf_counter() - start
    print(f"{seconds:.2f} s")
    assert seconds < 5.0 + 2
    assert [at for at, verdict in enumerate(verdicts) if verdict == TIMED_OUT] == [5, 100, 211, 340, 507]
    assert sum(verdict.acc for verdict in verdicts) == 32 * 8 - 4  # four of the five were right before
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
    assert hung == Score(0.0, -1.5, columns=TIMED_OUT.columns) and failed.startswith("the reward function raised KeyError")
    with pytest.raises(ValueError, match="reward.name: math, math has one of them twice"):
        make_judge(["math", "math"], [1.0, 1.0], 1, 5.0)


def test_two_of_one_name_are_told_apart_by_their_files(tmp_path):
    names = [f"{tmp_path}/{letter}.py:score" for letter in "ab"]
    for letter, name in zip("ab", names, strict=True):
        Path(name.partition(":")[0]).write_text(f"def score(response, ground_truth):\n    return {ord(letter)}\n")
    ((verdict,),) = make_judge(names, [1.0, 1.0], 1, 5.0)([([""], "", {})])
    assert verdict.columns == {names[0]: 97.0, names[1]: 98.0} and verdict.score == 195.0


@pytest.mark.parametrize("how", ["exit", "killed"])
def test_what_a_verifier_leaves_running_ends_with_the_trainer(tmp_path, how):
    (tmp_path / "mine.py").write_text("import subprocess\ndef score(response, ground_truth):\n"
                                      "    return subprocess.Popen(['sleep', '97']).pid\n")
    code = (f"import judges\njudge = judges.make_judge(['{tmp_path}/mine.py:score'], [1.0], 1, 10.0)\n"
            "print(judge([(['x'], '', {})])[0][0].score, flush=True)\n" + "import time; time.sleep(99)\n" * (how == "killed"))
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(float(trainer.stdout.readline()))
    if how == "killed":
        assert alive(pid)
        trainer.kill()
    trainer.wait()
    for _ in range(50):
        if not alive(pid):
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("it is still there")


@pytest.mark.parametrize("body, verdicts", [
    ("if os.fork() == 0: response = 'child'\n    return float(len(response))", [1.0, 2.0, 3.0]),
    ("sys.exit('\\x1b[31mred')", "the reward function ended in SystemExit"),
    ("return 10 ** 400", "the reward function returned 1000"), ("raise KeyError('x' * 9999)", "the reward function raised KeyError")])
def test_odd_verifiers_get_or_cost_no_other_verdict(tmp_path, body, verdicts):
    """One that forks, and so would answer twice; one that ends its process; a number that is none."""
    (tmp_path / "mine.py").write_text(f"import os, sys\ndef score(response, ground_truth):\n    {body}\n")
    found = make(f"{tmp_path}/mine.py:score", 1, 10.0)([("a" * count, "", {}) for count in (1, 2, 3)])
    if isinstance(verdicts, list):
        assert [verdict.score for verdict in found] == verdicts
    else:
        assert all(verdict.startswith(verdicts) and len(verdict) < 500 for verdict in found)


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
