"""Scores from several reward functions; those that need limits run in processes of their own.

`math` and `math_strict_box` do bounded work and run in the trainer. For any other reward function
the trainer starts a fork server, a process that loads the function once. It forks `workers` slots;
each slot has a pipe to the trainer and forks a worker, in milliseconds, whenever it has none. The
worker calls the function. Its slot kills it, with all processes that it started, when a call takes
too long or fails, and when the trainer is gone. None of these processes imports torch or the
trainer's script, and none sees a Ctrl-C.
"""

import ctypes
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue

from infra.reward_function import (
    is_group_reward,
    keyword_arguments,
    load_reward_function,
    score_task,
)
from reward import Score, Task, answer_or_box, failed_score, weighted_sum

IN_TRAINER = ("math", "math_strict_box")
MEMORY = 8 * 2**30  # bytes of address space for each worker
LOAD_TIMEOUT = 60.0  # seconds that the imports of a reward function may take
FORK = multiprocessing.get_context("fork")  # used in the fork server, never in the trainer

Scorer = Callable[[Sequence[Task]], list[list[Score]]]


def make_scorer(names: Sequence[str], weights: Sequence[float], workers: int, timeout: float,
                example_rows: Sequence[dict]) -> Scorer:
    """A function that scores tasks with all reward functions `names`, see `reward.weighted_sum`.

    Each reward function gets `workers` processes, and `timeout` seconds for a call (of one
    response; for a group reward, of all responses of a prompt). A failure is a score with its
    status. Raises ValueError if a function cannot be loaded, or called with one of `example_rows`.
    """
    labels = [name.rpartition(":")[2] for name in names]
    if len(set(labels)) < len(names):
        labels = names  # two files have a function of the same name
    if len(set(labels)) < len(names):
        raise ValueError(f"reward.name: {', '.join(names)} has one of them twice: give it the sum "
                         "of its weights")
    scorers = {label: make_single_scorer(name, workers, timeout, example_rows)
               for label, name in zip(labels, names, strict=True)}
    if list(weights) == [1.0]:
        return scorers[labels[0]]

    def score_all(tasks: Sequence[Task]) -> list[list[Score]]:
        results = [[] for _ in tasks]
        by_function = [scorer(tasks) for scorer in scorers.values()]
        for result, groups in zip(results, zip(*by_function, strict=True), strict=True):
            for scores in zip(*groups, strict=True):
                result.append(weighted_sum(dict(zip(labels, scores, strict=True)), weights))
        return results
    return score_all


def make_single_scorer(name: str, workers: int, timeout: float,
                       example_rows: Sequence[dict]) -> Scorer:
    """A scorer with one reward function; arguments and errors as in `make_scorer`."""
    if name in IN_TRAINER:
        function = load_reward_function(name)
        return lambda tasks: [score_task(function, task) for task in tasks]
    server, slots, group = start_fork_server(name, workers, timeout, example_rows)
    idle, threads = SimpleQueue(), ThreadPoolExecutor(workers)
    for slot in slots:
        idle.put(slot)

    def call(task: Task) -> list[Score]:
        slot = idle.get()
        try:
            slot.send(task)
            return slot.recv()
        except (EOFError, OSError):
            raise ValueError(f"reward.name: a process of the reward function {name} was killed "
                             f"(fork server {server.pid})") from None
        finally:
            idle.put(slot)

    def score_all(tasks: Sequence[Task]) -> list[list[Score]]:
        if group:
            return list(threads.map(call, tasks))
        calls = [task._replace(responses=[response], lengths=[length]) for task in tasks
                 for response, length in zip(task.responses, task.lengths, strict=True)]
        scores = threads.map(call, calls)
        return [[next(scores)[0] for _ in task.responses] for task in tasks]
    return partial(score_distinct, score_all) if name == "math_verify" else score_all


def score_distinct(score_all: Scorer, tasks: Sequence[Task]) -> list[list[Score]]:
    """The same scores, but each distinct answer of a prompt is compared only once."""
    distinct = []
    for task in tasks:
        responses = list({answer_or_box(text): text for text in task.responses}.values())
        distinct.append(task._replace(responses=responses, lengths=[0] * len(responses)))
    results = []
    for task, few, scores in zip(tasks, distinct, score_all(distinct), strict=True):
        by_answer = dict(zip(map(answer_or_box, few.responses), scores, strict=True))
        results.append([by_answer[answer_or_box(text)] for text in task.responses])
    return results


def start_fork_server(name: str, workers: int, timeout: float, example_rows: Sequence[dict]
                      ) -> tuple[subprocess.Popen, list[Connection], bool]:
    """The fork server of a reward function, a pipe to each slot, and whether it is a group reward.

    Raises ValueError if the function cannot be loaded, or called with one of the rows.
    """
    slots, remote = zip(*(multiprocessing.Pipe() for _ in range(workers)), strict=True)
    fds = [connection.fileno() for connection in remote]
    code = (f"import sys; sys.path[0] = {str(Path(__file__).parent.parent)!r}\n"
            f"from infra.reward_pool import serve; serve({fds})")
    server = subprocess.Popen(
        [sys.executable, "-c", code], pass_fds=fds, stdin=subprocess.DEVNULL, stdout=2,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}, start_new_session=True)
    for connection in remote:
        connection.close()
    loaded = None
    with suppress(EOFError, OSError):
        slots[0].send((name, timeout, list(example_rows)))
        loaded = slots[0].recv() if slots[0].poll(LOAD_TIMEOUT) else None
    if not isinstance(loaded, bool):
        server.kill()
        server.wait()
        raise ValueError(loaded or f"reward.name: {name} did not load within {LOAD_TIMEOUT:.0f} s, "
                         f"or died (see above); it has {MEMORY // 2**30} GiB of address space")
    return server, list(slots), loaded


# ---- in the processes ---------------------------------------------------------------------------

def serve(fds: list[int]) -> None:
    """Run a fork server: load the reward function, check it, and start a slot for each pipe."""
    die_with_parent(signal.SIGTERM)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    with suppress(ValueError, OSError):  # macOS has no such limit
        limit = MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    slots = [Connection(fd) for fd in fds]
    for fd in fds:
        os.set_inheritable(fd, False)  # not for programs that the reward function starts
    name, timeout, example_rows = slots[0].recv()
    try:
        function = load_reward_function(name)
        for row in example_rows:
            keyword_arguments(function, row)
    except Exception as error:
        return slots[0].send(str(error) if isinstance(error, ValueError) else repr(error))
    slots[0].send(is_group_reward(function))
    for slot in slots:
        FORK.Process(target=run_slot, args=(function, slot, slots, timeout)).start()
    for slot in slots:
        slot.close()


def run_slot(function: Callable, trainer: Connection, slots: list[Connection], timeout: float
             ) -> None:
    """Let a worker score the trainer's tasks, one at a time, until the trainer is gone."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    die_with_parent(signal.SIGTERM)
    for slot in slots:
        if slot is not trainer:  # or the trainer would not notice the end of that slot
            slot.close()
    worker = pipe = None
    try:
        while True:
            task = trainer.recv()
            if worker is None or not worker.is_alive():
                kill(worker)
                pipe, remote = FORK.Pipe()
                worker = FORK.Process(target=run_worker, args=(function, remote, [trainer, pipe]))
                worker.start()
                remote.close()
            scores = ask(worker, pipe, task, timeout)
            if any(score.status != "ok" for score in scores):  # it hangs, is dead, or lacks memory
                kill(worker)
                worker = None
            trainer.send(scores)
    except (EOFError, OSError):
        pass  # the trainer is gone
    finally:
        kill(worker)


def ask(worker: multiprocessing.Process, pipe: Connection, task: Task, timeout: float
        ) -> list[Score]:
    """The worker's scores, or failed ones if it takes more than `timeout` seconds or dies."""
    try:
        pipe.send(task)
        if pipe.poll(timeout):
            return pipe.recv()
        status, message = "timeout", f"the reward function took more than {timeout:g} s"
    except (EOFError, OSError):
        worker.join(1.0)
        status, message = "error", f"the reward function's process died ({worker.exitcode})"
    return [failed_score(status, [1.0], message)] * len(task.responses)


def run_worker(function: Callable, pipe: Connection, inherited: list[Connection]) -> None:
    """Call the reward function on one task after the other, until the slot is gone."""
    os.setpgid(0, 0)  # a process group, so that `kill` reaches what the reward function starts
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with_parent(signal.SIGKILL)
    for connection in inherited:
        connection.close()
    pid = os.getpid()
    with suppress(EOFError, OSError):
        while True:
            task = pipe.recv()
            try:
                scores = score_task(function, task)
            except BaseException as error:  # SystemExit, too
                message = str(error) if isinstance(error, ValueError) else (
                    f"the reward function ended with {error!r:.300}")
                if isinstance(error.__cause__, MemoryError):
                    message += f" (it has {MEMORY // 2**30} GiB of address space)"
                scores = [failed_score("error", [1.0], message)] * len(task.responses)
            if os.getpid() != pid:  # a fork that the reward function made: it must not answer too
                os._exit(0)
            pipe.send(scores)


def kill(worker: multiprocessing.Process | None) -> None:
    """End a worker and its process group: all that it started, except for sessions of their own."""
    if worker is not None and worker.pid:
        with suppress(ProcessLookupError, PermissionError):  # macOS: no permission for a zombie
            os.killpg(worker.pid, signal.SIGKILL)
        worker.kill()  # if it had no time to make its process group
        worker.join()


def die_with_parent(signum: signal.Signals) -> None:
    """On Linux, send this process a signal when its parent ends, even if the parent was killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signum))  # PR_SET_PDEATHSIG
