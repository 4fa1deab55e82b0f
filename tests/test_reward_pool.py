"""infra/reward_pool.py: a reward function of one's own runs beside the trainer, within limits."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from data_types import Prompt, Score, Task
from infra import reward_pool
from infra.reward_pool import make_scorer

ROOT = Path(__file__).parent.parent
REWARD = """
import os, re, subprocess, sys, time
def score(response, ground_truth, **row):
    print("not a score")
    if response == "hang":
        re.match("(a+)+$", "a" * 60 + "b")  # holds the interpreter's lock for ever
    if response == "die":
        os._exit(3)
    if response == "eat":
        return len(bytearray(16 * 2**30))
    if response == "fork":
        if os.fork() == 0:
            time.sleep(100)
        time.sleep(100)
    if response == "cat":
        subprocess.run(["cat"])
    if response == "fail":
        raise KeyError("x")
    if response == "sleep":
        time.sleep(0.2)
    if response in ("sleep", "pid"):
        return os.getpid()
    if response == "session":
        return os.getsid(0)
    if response == "torch":
        return "torch" in sys.modules
    return float(response == ground_truth) + row.get("bonus", 0)
"""
FAILED = {
    "hang": Score(0.0, 0.0, status="timeout", message="the reward function took more than 0.5 s"),
    "die": Score(0.0, 0.0, status="error", message="the reward function's process died (3)"),
    "eat": Score(
        0.0,
        0.0,
        status="error",
        message="the reward function raised MemoryError:  at "
        "mine.py:10 (it has 8 GiB of address space)",
    ),
    "fail": Score(
        0.0, 0.0, status="error", message="the reward function raised KeyError: 'x' at mine.py:18"
    ),
}


@pytest.fixture
def name(tmp_path):
    (tmp_path / "mine.py").write_text(REWARD)
    return f"{tmp_path}/mine.py:score"


def make(name, workers=1, timeout=10.0, rows=({},)):
    """A scorer with one reward function."""
    return make_scorer([name], [1.0], workers, timeout, examples(*rows))


def task(*responses, ground_truth="1", **row):
    return Task(list(responses), [len(response) for response in responses], ground_truth, row)


def examples(*rows):
    return [Prompt(0, "", [], "1", row) for row in rows]


def right(*scores):
    """Scores of a function that states no accuracy."""
    return [Score(None, float(score)) for score in scores]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


def descendants(pid):
    """All living processes that a process has started, and those that they have started."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(") ")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if fields[0] != "Z":
            parents[int(stat.parent.name)] = int(fields[1])
    found = [pid]
    for parent in found:
        found += [child for child, its_parent in parents.items() if its_parent == parent]
    return found[1:]


def assert_end(pids):
    """All of them end within five seconds."""
    for _ in range(50):
        if not any(map(alive, pids)):
            return
        time.sleep(0.1)
    for pid in filter(alive, pids):
        os.kill(pid, signal.SIGKILL)
    pytest.fail("a process is still there")


# ---- scores ----


def test_scores_come_in_the_tasks_order(name):
    tasks = [task(str(i % 3), "1", bonus=i) for i in range(30)]
    expected = [right(i + (i % 3 == 1), i + 1) for i in range(30)]
    assert make(name, 2)(tasks) == expected


def test_a_group_reward_gets_a_whole_prompt_in_one_call(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import time\ndef score(responses, ground_truth, response_length):\n"
        "    time.sleep(100 * ('hang' in responses))\n"
        "    return [len(responses) + length / 10 for length in response_length]\n"
    )
    scorer = make(f"{tmp_path}/mine.py:score", 2, 0.5)
    assert scorer([task("a", "bb"), task("c", "hang", "d"), task("e")]) == [
        right(2.1, 2.2),
        [FAILED["hang"]] * 3,
        right(1.1),
    ]


def test_several_reward_functions_are_summed(name):
    scorer = make_scorer(["math", name], [1.0, 0.5], 1, 0.5, examples({"bonus": 4}))
    ((good, bad, hung, failed),) = scorer(
        [task("Answer: 6", "Answer: 7", "hang", "fail", ground_truth="6", bonus=4)]
    )
    assert good == Score(1.0, 3.0, "6", {"math/score": 1.0, "score/score": 4.0})
    assert bad == Score(0.0, 1.0, "7", {"math/score": -1.0, "score/score": 4.0})
    assert hung == Score(
        0.0, 0.0, status="timeout", message="score: the reward function took more than 0.5 s"
    )
    assert (failed.status, failed.score) == ("error", 0.0)
    with pytest.raises(ValueError, match="reward.name: math, math has one of them twice"):
        make_scorer(["math", "math"], [1.0, 1.0], 1, 5.0, examples({}))


def test_one_reward_function_may_have_a_weight(name):
    scorer = make_scorer(["math"], [2.0], 1, 1.0, examples({}))
    assert scorer([task("Answer: 1")]) == [[Score(1.0, 2.0, "1", {"math/score": 1.0})]]


def test_two_of_one_name_are_told_apart_by_their_files(tmp_path):
    names = [f"{tmp_path}/{letter}.py:score" for letter in "ab"]
    for letter, name in zip("ab", names, strict=True):
        Path(name.partition(":")[0]).write_text(
            f"def score(response, ground_truth):\n    return {ord(letter)}\n"
        )
    ((score,),) = make_scorer(names, [1.0, 1.0], 1, 5.0, examples({}))([task("")])
    assert score.extra == {f"{names[0]}/score": 97.0, f"{names[1]}/score": 98.0}
    assert score.score == 195.0


def test_math_verify_compares_each_distinct_answer_of_a_prompt_once():
    """One that hangs costs its limit once, however often a group gives it."""
    scorer = make("math_verify", 1, 1.0)
    hangs = "Answer: $9^{9^{9^{9}}} \\pi$"
    start = time.perf_counter()
    first, second = scorer(
        [
            task(
                "so\nAnswer: $5\\pi$",
                *[f"{n}\n{hangs}" for n in range(6)],
                "\\boxed{$5\\pi$}",
                ground_truth="5\\pi",
            ),
            task("Answer: $6\\pi$", ground_truth="\\pi \\cdot 6"),
        ]
    )
    assert time.perf_counter() - start < 3
    assert [score.status for score in first] == ["ok", *["timeout"] * 6, "ok"]
    assert (first[0].acc, first[7].acc, second[0].acc) == (1, 1, 1)


@pytest.mark.slow
def test_with_math_verify_two_hanging_responses_of_512_cost_their_limit_and_no_other_score():
    tasks = []
    for n in range(2, 34):
        answers = (
            [rf"{n}\pi"] * 6
            + [rf"\pi \cdot {n}"] * 2
            + [rf"{n + 1}\pi"] * 3
            + [str(n)] * 2
            + [rf"\frac{{{n}\pi}}{{2}}"] * 2
            + [r"\pi"]
        )
        tasks.append(
            task(*(f"so it is.\nAnswer: ${answer}$" for answer in answers), ground_truth=rf"{n}\pi")
        )
    for at in (5, 340):
        tasks[at // 16].responses[at % 16] = "Answer: $9^{9^{9^{9}}} \\pi$"
    scorer = make("math_verify", 2, 5.0)
    start = time.perf_counter()
    scores = [score for group in scorer(tasks) for score in group]
    assert time.perf_counter() - start < 5.0 + 10
    assert [at for at, score in enumerate(scores) if score.status == "timeout"] == [5, 340]
    assert sum(score.acc for score in scores) == 32 * 8 - 2  # both were right before


# ---- limits ----


def test_scoring_is_parallel_in_processes(name):
    scorer = make(name, 4)
    start = time.perf_counter()
    (scores,) = scorer([task(*["sleep"] * 12)])
    assert time.perf_counter() - start < 1.8  # of 2.4 s, one after the other
    assert len({score.score for score in scores}) == 4  # process ids


def test_slow_but_honest_calls_are_not_timed_out_because_others_are_slow(name):
    """All of them together take longer than the limit; each one's clock starts when it runs."""
    (scores,) = make(name, 2, 0.8)([task(*["sleep"] * 10)])
    assert {score.status for score in scores} == {"ok"}


@pytest.mark.parametrize("what", FAILED)
def test_what_hangs_dies_eats_memory_or_fails_is_wrong_and_the_rest_is_scored(name, what):
    before = set(descendants(os.getpid()))
    scorer = make(name, 2, 0.5)
    start = time.perf_counter()
    responses = [what if i % 50 == 10 else "1" for i in range(200)]
    assert scorer([task(*responses)]) == [
        [FAILED[what] if response == what else Score(None, 1.0) for response in responses]
    ]
    assert time.perf_counter() - start < 4 * 0.5 / 2 + 3
    assert scorer([task("1")]) == [right(1)]
    pool = set(descendants(os.getpid())) - before
    assert len(pool) <= 4  # two workers and their guards; those that failed are gone


def test_what_a_reward_reads_or_leaves_running_does_not_disturb_the_next(name):
    scorer = make(name, 1, 0.5)
    assert scorer([task("cat", "1", "fork", "1")]) == [[*right(0, 1), FAILED["hang"], *right(1)]]


def test_a_worker_that_lacks_memory_is_replaced(tmp_path):
    """What it has hoarded would make all later calls fail."""
    (tmp_path / "mine.py").write_text(
        "import mmap\nhoard = []\ndef score(response, ground_truth):\n    try:\n"
        "        hoard.append(mmap.mmap(-1, 3 * 2**30 if response == 'hoard' else 1))\n"
        "    except OSError:\n        raise MemoryError\n    return 1\n"
    )
    (scores,) = make(f"{tmp_path}/mine.py:score")([task(*["hoard"] * 5)])
    assert [score.status for score in scores] == ["ok", "ok", "error", "ok", "ok"]


def test_a_worker_that_died_meanwhile_costs_no_response_its_score(name):
    scorer = make(name)
    ((score,),) = scorer([task("pid")])
    os.kill(int(score.score), signal.SIGKILL)
    assert_end([int(score.score)])
    assert scorer([task("1")]) == [right(1)]


@pytest.mark.parametrize(
    "body, expected",
    [
        ("if os.fork() == 0: response = 'child'\n    return float(len(response))", [1.0, 2.0, 3.0]),
        ("sys.exit('\\x1b[31mred')", "the reward function ended with SystemExit"),
        ("return 10 ** 400", "the reward function returned 1000"),
        ("raise KeyError('x' * 9999)", "the reward function raised KeyError"),
    ],
)
def test_odd_rewards_get_or_cost_no_other_score(tmp_path, body, expected):
    """One that forks, and so would answer twice; one that ends its process; no finite number."""
    (tmp_path / "mine.py").write_text(
        f"import os, sys\ndef score(response, ground_truth):\n    {body}\n"
    )
    (scores,) = make(f"{tmp_path}/mine.py:score")([task("a", "aa", "aaa")])
    if isinstance(expected, list):
        assert scores == right(*expected)
    else:
        assert all(
            score.status == "error"
            and score.message.startswith(expected)
            and len(score.message) < 500
            for score in scores
        )


# ---- loading ----


def test_what_first_calls_load_does_not_count_nor_in_the_successor_of_a_killed_worker(tmp_path):
    """The first call on a right answer, and that on a wrong one; with the data's own answer and
    columns."""
    (tmp_path / "mine.py").write_text(
        "import json, time\nloaded = set()\n"
        "def score(response, ground_truth, level):\n"
        "    right = json.loads(ground_truth)[level] in response\n"
        "    if right not in loaded:\n"
        "        time.sleep(0.55)\n        loaded.add(right)\n"
        "    time.sleep(100 * (response == 'hang'))\n"
        "    return float(right)\n"
    )
    example = Prompt(0, "", [], '["9", "8"]', {"level": 1})
    scorer = make_scorer([f"{tmp_path}/mine.py:score"], [1.0], 1, 0.5, [example])
    (scores,) = scorer([task("8", "7", "hang", "8", "7", ground_truth='["8"]', level=0)])
    assert scores == [*right(1, 0), FAILED["hang"], *right(1, 0)]


@pytest.mark.parametrize("failure", ["1 / 0", "len(bytearray(16 * 2**30))", "exit()", "'text'"])
def test_a_failure_on_the_example_does_not_matter(tmp_path, failure):
    """The example is made up: its responses are not the policy's."""
    (tmp_path / "mine.py").write_text(
        "def score(response, ground_truth):\n"
        f"    return {failure} if response.startswith('Answer') else 1.0\n"
    )
    assert make(f"{tmp_path}/mine.py:score")([task("a", "b")]) == [right(1, 1)]


def test_a_successor_that_does_not_load_is_an_error(name):
    scorer = make(name)
    assert scorer([task("1", "die")])[0] == [*right(1), FAILED["die"]]
    path = Path(name.rpartition(":")[0])
    path.rename(path.with_suffix(".old"))
    with pytest.raises(ValueError, match="there is no file .*mine.py$"):
        scorer([task("1")])


# ---- what the processes are ----


def test_a_worker_imports_no_torch_and_sees_no_ctrl_c(name):
    import torch  # noqa: F401  (the trainer has)

    ((score, session),) = make(name)([task("torch", "session")])
    assert score.score == 0 and session.score != os.getsid(0)


def test_what_a_reward_prints_goes_to_stderr(name, capfd):
    make(name)([task("1")])
    out, err = capfd.readouterr()
    assert "not a score" in err and not out


def test_scoring_works_while_other_threads_hold_locks(name):
    """A copy of the trainer itself could find a lock taken by a thread that it does not have."""
    import logging

    with logging._lock:
        done = []
        thread = threading.Thread(target=lambda: done.append(make(name)([task("1")])))
        thread.start()
        thread.join(20)
    assert done == [[right(1)]]


def test_the_trainers_script_runs_once_even_without_a_main_guard(name, tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nprint('main', flush=True)\n"
        "from infra.reward_pool import make_scorer\nfrom data_types import Prompt, Task\n"
        f"scorer = make_scorer([{name!r}], [1.0], 2, 5.0, [Prompt(0, '', [], '', {{}})])\n"
        "print(scorer([Task(['1'], [1], '1', {})])[0][0].score)\n"
    )
    printed = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert printed.stdout.split() == ["main", "1.0"]


def test_a_scorer_that_is_no_longer_used_leaves_no_process(name):
    before = set(descendants(os.getpid()))
    scorer = make(name, 2)
    scorer([task("1", "1")])
    started = set(descendants(os.getpid())) - before
    assert len(started) >= 3
    del scorer
    assert_end(started)


# ---- the end of the trainer ----


@pytest.mark.parametrize("how", ["exit", "killed"])
def test_what_a_reward_leaves_running_ends_with_the_trainer(tmp_path, how):
    (tmp_path / "mine.py").write_text(
        "import subprocess\ndef score(response, ground_truth):\n"
        "    return subprocess.Popen(['sleep', '97']).pid\n"
    )
    code = (
        "from infra.reward_pool import make_scorer; from data_types import Prompt, Task; import time\n"
        f"scorer = make_scorer(['{tmp_path}/mine.py:score'], [1.0], 1, 10.0, [Prompt(0, '', [], '', {{}})])\n"
        "print(scorer([Task(['x'], [1], '', {})])[0][0].score, flush=True)\n"
        f"time.sleep({99 if how == 'killed' else 0})\n"
    )
    trainer = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    pid = int(float(trainer.stdout.readline()))
    if how == "killed":
        assert alive(pid)
        trainer.kill()
    trainer.wait()
    assert_end([pid])


def test_nothing_outlives_a_trainer_that_was_killed(name):
    """Not even a reward function that holds the interpreter's lock, nor what it has started."""
    code = (
        "from infra.reward_pool import make_scorer; from data_types import Prompt, Task\n"
        f"scorer = make_scorer([{name!r}], [1.0], 3, 100.0, [Prompt(0, '', [], '', {{}})])\nprint(flush=True)\n"
        "scorer([Task(['hang', 'fork', '1'], [1] * 3, '', {})])"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT)
    trainer.stdout.readline()
    for _ in range(50):
        if len(started := descendants(trainer.pid)) == 7:  # workers, guards, one fork
            break
        time.sleep(0.1)
    assert len(started) == 7
    trainer.kill()
    trainer.wait()
    assert_end(started)


# ---- what cannot start ----


def test_one_that_does_not_load_is_an_error_at_once(tmp_path):
    (tmp_path / "mine.py").write_text("import no_such_module")
    with pytest.raises(ValueError, match="import .*mine.py: ModuleNotFoundError.*mine.py:1$"):
        make(f"{tmp_path}/mine.py:score")
    (tmp_path / "mine.py").write_text("import os; os._exit(3)")
    with pytest.raises(ValueError, match="did not load and score an example within 300 s, or died"):
        make(f"{tmp_path}/mine.py:score")


@pytest.mark.parametrize(
    "text",
    ["time.sleep(60)", "def score(response, ground_truth):\n    time.sleep(60)"],
    ids=["import", "first call"],
)
def test_one_that_takes_too_long_to_load_is_an_error(tmp_path, monkeypatch, text):
    monkeypatch.setattr(reward_pool, "LOAD_TIMEOUT", 0.3)
    (tmp_path / "mine.py").write_text(f"import time\n{text}\n")
    before = set(descendants(os.getpid()))
    with pytest.raises(ValueError, match="did not load and score an example within 0 s, or died"):
        make(f"{tmp_path}/mine.py:score")
    assert_end(set(descendants(os.getpid())) - before)


def test_a_column_that_the_data_lack_is_named_before_the_first_generation(tmp_path):
    """Every example row counts: the files of a mixture may have different columns."""
    (tmp_path / "mine.py").write_text(
        "def score(response, ground_truth, level):\n    return level\n"
    )
    rows = [{"level": 1, "prompt": "x"}, {"prompt": "y", "answer": "z"}]
    assert make(f"{tmp_path}/mine.py:score", rows=rows[:1])([task("", level=2)]) == [right(2)]
    message = "the data have the columns prompt, answer: missing a required argument: 'level'"
    with pytest.raises(ValueError, match=message):
        make(f"{tmp_path}/mine.py:score", rows=rows)


# ---- whatever can be called ----


def scorer_of(tmp_path, text, name="score", workers=1, timeout=10.0):
    (tmp_path / "mine.py").write_text(text)
    return make(f"{tmp_path}/mine.py:{name}", workers, timeout)


@pytest.mark.parametrize("text, score", [
    ("from dataclasses import dataclass\n@dataclass\nclass Judge:\n    weight: float\n"
     "    def __call__(self, response, ground_truth):\n        return self.weight * len(response)\n"
     "score = Judge(2.0)", 4.0),  # not hashable
    ("class Judge:\n    async def __call__(self, response, ground_truth):\n"
     "        return len(response)\nscore = Judge()", 2.0),
    ("class Judge:\n    async def score(self, response, ground_truth):\n"
     "        return len(response)\nscore = Judge().score", 2.0),
    ("class Judge(dict):\n    def score(self, response, ground_truth):\n"
     "        return len(response)\nscore = Judge().score", 2.0),
    ("from functools import partial\ndef weigh(weight, response, ground_truth):\n"
     "    return weight * len(response)\nscore = partial(weigh, 3)", 6.0),
    ("from functools import partial\nasync def weigh(response, ground_truth, weight):\n"
     "    return weight * len(response)\nscore = partial(weigh, weight=3)", 6.0),
    ("from functools import lru_cache\n@lru_cache\ndef score(response, ground_truth):\n"
     "    return len(response)", 2.0),
    ("score = lambda response, ground_truth: len(response)", 2.0),
    ("async def score(responses, ground_truth):\n    return [len(responses)] * len(responses)",
     1.0),
])
def test_whatever_can_be_called_works(tmp_path, text, score, capfd):
    assert scorer_of(tmp_path, text)([task("ab")]) == [right(score)]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("text", [
    "class score:\n    def __init__(self, response, ground_truth):\n        pass",
    "def score(response, ground_truth):\n    yield 1.0",
    "async def score(response, ground_truth):\n    yield 1.0",
    "score = max",
    "score = dict",
])
def test_what_cannot_be_called_as_a_function_is_one_line_at_the_start(tmp_path, text):
    with pytest.raises(ValueError, match="mine.py:score is a class, has a `yield`, or does not"):
        scorer_of(tmp_path, text)


def test_an_error_of_a_partial_names_the_line(tmp_path):
    text = ("from functools import partial\ndef weigh(weight, response, ground_truth):\n"
            "    return 1 / 0\nscore = partial(weigh, 3)")
    ((score,),) = scorer_of(tmp_path, text)([task("a")])
    assert score.message.endswith("ZeroDivisionError: division by zero at mine.py:3")


# ---- async ----

JUDGE = """
import asyncio, os, time
running = most = 0
async def score(response, ground_truth):
    global running, most
    running += 1
    most = max(most, running)
    try:
        await asyncio.sleep({"late": 100}.get(response, 0.2))
        if response == "fail":
            raise KeyError("x")
        if response == "exit":
            raise SystemExit("x")
        if response == "block":
            time.sleep(100)
        return {"score": 1.0, "most": most, "pid": os.getpid()}
    finally:
        running -= 1
"""


def test_an_async_reward_judges_many_responses_at_a_time_in_each_worker(tmp_path):
    scorer = scorer_of(tmp_path, JUDGE, workers=2)
    start = time.perf_counter()
    (scores,) = scorer([task(*map(str, range(256)))])
    assert time.perf_counter() - start < 2  # 51 s one after the other
    assert {score.score for score in scores} == {1.0}
    assert max(score.extra["most"] for score in scores) == 64
    assert len({score.extra["pid"] for score in scores}) == 2


def test_one_async_call_that_is_late_or_fails_costs_no_other_its_score(tmp_path):
    scorer = scorer_of(tmp_path, JUDGE, timeout=1.0)
    responses = ["a", "late", "fail", "b", "exit", "late", *"cdef"]
    start = time.perf_counter()
    (scores,) = scorer([task(*responses)])
    assert time.perf_counter() - start < 2.4  # the worker was not killed
    messages = {response: score.message for response, score in zip(responses, scores, strict=True)}
    assert [score.status for score in scores] == [
        "ok", "timeout", "error", "ok", "error", "timeout", *["ok"] * 4]
    assert messages["late"] == "the reward function took more than 1 s"
    assert messages["fail"] == "the reward function raised KeyError: 'x' at mine.py:11"
    assert messages["exit"].startswith("the reward function ended with SystemExit")
    assert scorer([task("a")])[0][0].extra["pid"] == scores[0].extra["pid"]


def test_an_async_call_that_blocks_its_worker_is_killed(tmp_path):
    scorer = scorer_of(tmp_path, JUDGE, timeout=0.5)
    start = time.perf_counter()
    assert scorer([task("block")]) == [[FAILED["hang"]]]
    assert time.perf_counter() - start < 5
    assert scorer([task("a")])[0][0].score == 1.0


# ---- imports ----


def test_a_library_with_the_name_of_a_file_of_ours_is_found(tmp_path, monkeypatch):
    """`import evaluate` is the library, also in a reward function in this directory."""
    (tmp_path / "library").mkdir()
    (tmp_path / "library/evaluate.py").write_text("VALUE = 7")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "library"))
    text = ("import evaluate\nfrom reward import score_math\n"
            "def score(response, ground_truth):\n    return evaluate.VALUE\n")
    assert scorer_of(tmp_path, text)([task("")]) == [right(7)]
    from infra import reward_function
    beside_ours = reward_function.OURS / "reward_of_a_test.py"
    try:
        beside_ours.write_text(text)
        assert make("reward_of_a_test.py:score")([task("")]) == [right(7)]
    finally:
        beside_ours.unlink()


@pytest.mark.parametrize("name", [
    "sampling", "losses", "plot", "evaluate", "reward", "data_types", "infra"])
def test_a_file_of_ones_own_called_like_one_of_ours_is_found(tmp_path, name):
    (tmp_path / f"{name}.py").write_text("VALUE = 5")
    text = (f"import {name}\ndef score(response, ground_truth):\n"
            f"    import {name} as again\n    return {name}.VALUE + again.VALUE\n")
    assert scorer_of(tmp_path, text)([task("", "a")]) == [right(10, 10)]


def test_a_rewards_file_may_itself_be_called_reward(tmp_path):
    (tmp_path / "reward.py").write_text(
        "from reward import Score, score_math\nfrom data_types import Score as Same\n"
        "def score(response, ground_truth):\n    assert Score is Same\n"
        "    return score_math(response, ground_truth)\n")
    assert make(f"{tmp_path}/reward.py:score")([task("Answer: 1")]) == [[Score(1.0, 1.0, "1")]]


@pytest.mark.parametrize("has_init", [True, False])
@pytest.mark.parametrize("line", [
    "from mypkg.utils import VALUE", "from .utils import VALUE", "from utils import VALUE",
    "from . import utils; VALUE = utils.VALUE"])
def test_a_reward_in_a_package_finds_its_siblings(tmp_path, monkeypatch, has_init, line):
    (tmp_path / "mypkg").mkdir()
    if has_init:
        (tmp_path / "mypkg/__init__.py").write_text("")
    (tmp_path / "mypkg/utils.py").write_text("VALUE = 5")
    (tmp_path / "mypkg/rewards.py").write_text(
        f"{line}\ndef score(response, ground_truth):\n    return VALUE\n")
    monkeypatch.chdir(tmp_path)
    assert make("mypkg/rewards.py:score")([task("")]) == [right(5)]


def test_a_package_is_found_from_anywhere(tmp_path):
    (tmp_path / "mypkg/sub").mkdir(parents=True)
    for directory in ("mypkg", "mypkg/sub"):
        (tmp_path / directory / "__init__.py").write_text("")
    (tmp_path / "mypkg/utils.py").write_text("VALUE = 5")
    (tmp_path / "mypkg/sub/rewards.py").write_text(
        "from mypkg.utils import VALUE\nfrom ..utils import VALUE as SAME\n"
        "def score(response, ground_truth):\n    return VALUE + SAME\n")
    assert make(f"{tmp_path}/mypkg/sub/rewards.py:score")([task("")]) == [right(10)]


def test_files_and_helpers_of_one_name_in_two_directories_are_two(tmp_path):
    names = []
    for letter in "ab":
        (tmp_path / letter).mkdir()
        (tmp_path / letter / "helper.py").write_text(f"VALUE = {ord(letter)}")
        (tmp_path / letter / "score.py").write_text(
            "import helper\ndef score(response, ground_truth):\n    return helper.VALUE\n")
        names.append(f"{tmp_path}/{letter}/score.py:score")
    ((score,),) = make_scorer(names, [1.0, 1.0], 1, 5.0, examples({}))([task("")])
    assert score.extra == {f"{names[0]}/score": 97.0, f"{names[1]}/score": 98.0}
