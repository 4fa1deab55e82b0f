"""Scores from several reward functions; those that need limits run in processes of their own.

`math` and `math_strict_box` do bounded work and run in the trainer. For any other reward function
the trainer starts `workers` slots. A *slot* is a process that loads the function once, and forks a
*worker*, in milliseconds, whenever it has none. The worker calls the function. Its slot kills it,
with all processes that it started, when a call takes too long or fails, and when the trainer is
gone. None of these processes imports torch or the trainer's script, and none sees a Ctrl-C.
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
from multiprocessing.connection import Connection, wait
from pathlib import Path
from queue import SimpleQueue

from data_types import Score, Task
from infra.reward_function import is_group_reward, load_reward_function, score_task
from reward import answer_or_box, failed_score, weighted_sum

IN_TRAINER = ("math", "math_strict_box")
MEMORY = 8 * 2**30  # bytes of address space for each process
LOAD_TIMEOUT = 60.0  # seconds that the imports of a reward function may take
FORK = multiprocessing.get_context("fork")  # used in a slot, never in the trainer

Scorer = Callable[[Sequence[Task]], list[list[Score]]]


def make_scorer(names: Sequence[str], weights: Sequence[float], workers: int, timeout: float,
                example_rows: Sequence[dict]) -> Scorer:
    """A function that scores tasks with all reward functions `names`, see `reward.weighted_sum`.

    Each reward function gets `workers` processes, and `timeout` seconds for a call (of one
    response; for a group reward, of all responses of a prompt). A failure is a score with its
    status. Raises ValueError if a function cannot be loaded, or called with one of `example_rows`.
    """
    if len(set(names)) < len(names):
        raise ValueError(f"reward.name: {', '.join(names)} has one of them twice: give it the sum "
                         "of its weights")
    labels = [name.rpartition(":")[2] for name in names]
    if len(set(labels)) < len(names):
        labels = names  # two files have a function of the same name
    scorers = [make_single_scorer(name, workers, timeout, example_rows) for name in names]
    if list(weights) == [1.0]:
        return scorers[0]

    def score_all(tasks: Sequence[Task]) -> list[list[Score]]:
        by_function = [scorer(tasks) for scorer in scorers]
        results = []
        for groups in zip(*by_function, strict=True):  # one prompt's scores from each function
            results.append([weighted_sum(dict(zip(labels, scores, strict=True)), weights)
                            for scores in zip(*groups, strict=True)])
        return results
    return score_all


def make_single_scorer(name: str, workers: int, timeout: float,
                       example_rows: Sequence[dict]) -> Scorer:
    """A scorer with one reward function; arguments and errors as in `make_scorer`."""
    if name in IN_TRAINER:
        function = load_reward_function(name)
        return lambda tasks: [score_task(function, task) for task in tasks]
    slots, group = start_slots(name, workers, timeout, example_rows)
    idle, threads = SimpleQueue(), ThreadPoolExecutor(workers)
    for slot in slots:
        idle.put(slot)

    def call(task: Task) -> list[Score]:
        process, pipe = slot = idle.get()
        try:
            pipe.send(task)
            return pipe.recv()
        except (EOFError, OSError):
            raise ValueError(f"reward.name: a process of the reward function {name} was killed "
                             f"({process.pid})") from None
        finally:
            idle.put(slot)

    def score_all(tasks: Sequence[Task]) -> list[list[Score]]:
        if group:
            return list(threads.map(call, tasks))
        calls, keys = {}, []  # a call for each key: for each response, or for each distinct answer
        for i, task in enumerate(tasks):
            for j, (text, length) in enumerate(zip(task.responses, task.lengths, strict=True)):
                keys.append((i, answer_or_box(text) if name == "math_verify" else j))
                calls[keys[-1]] = task._replace(responses=[text], lengths=[length])
        scores = dict(zip(calls, threads.map(call, calls.values()), strict=True))
        in_order = iter(keys)
        return [[scores[next(in_order)][0] for _ in task.responses] for task in tasks]
    return score_all


def start_slots(name: str, workers: int, timeout: float, example_rows: Sequence[dict]
                ) -> tuple[list[tuple[subprocess.Popen, Connection]], bool]:
    """The slots of a reward function with a pipe to each, and whether it is a group reward.

    Raises ValueError if the function cannot be loaded, or called with one of the rows.
    """
    slots = []
    for _ in range(workers):
        pipe, remote = multiprocessing.Pipe()
        code = (f"import sys; sys.path[0] = {str(Path(__file__).parent.parent)!r}\n"
                f"from infra.reward_pool import run_slot; run_slot({remote.fileno()})")
        process = subprocess.Popen(
            [sys.executable, "-c", code], pass_fds=[remote.fileno()], stdin=subprocess.DEVNULL,
            stdout=2, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            start_new_session=True)
        remote.close()
        pipe.send((name, timeout, list(example_rows)))
        slots.append((process, pipe))
    for _, pipe in slots:
        loaded = None
        with suppress(EOFError, OSError):
            loaded = pipe.recv() if pipe.poll(LOAD_TIMEOUT) else None
        if not isinstance(loaded, bool):
            for process, _ in slots:
                process.kill()
                process.wait()
            raise ValueError(loaded or f"reward.name: {name} did not load within "
                             f"{LOAD_TIMEOUT:.0f} s, or died (see above); it has "
                             f"{MEMORY // 2**30} GiB of address space")
    return slots, loaded


# ---- in the processes ---------------------------------------------------------------------------

def run_slot(fd: int) -> None:
    """Load the reward function, then let a worker score one task after the other, until the
    trainer closes its end of the pipe `fd` or is gone."""
    with suppress(ValueError, OSError):  # macOS has no such limit; a lower one stays as it is
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    os.set_inheritable(fd, False)  # not for programs that the reward function starts
    trainer = Connection(fd)
    name, timeout, example_rows = trainer.recv()
    try:
        function = load_reward_function(name, example_rows)
    except Exception as error:
        return trainer.send(str(error) if isinstance(error, ValueError) else repr(error))
    worker = None
    with suppress(EOFError, OSError):  # the trainer is gone
        trainer.send(is_group_reward(function))
        while True:
            task = trainer.recv()
            if worker is None or not worker.is_alive():
                pipe, remote = FORK.Pipe()
                worker = FORK.Process(target=run_worker, args=(function, remote, [trainer, pipe]))
                worker.start()
                remote.close()
            scores = failed(task, "timeout", f"the reward function took more than {timeout:g} s")
            try:
                pipe.send(task)
                if pipe in wait([pipe, trainer], timeout):  # the trainer: if it is gone
                    scores = pipe.recv()
            except (EOFError, OSError):
                worker.join(1.0)
                code = worker.exitcode
                scores = failed(task, "error", f"the reward function's process died ({code})")
            if any(score.status != "ok" for score in scores):  # it hangs, or lacks memory
                kill(worker)
                worker = None
            trainer.send(scores)
    kill(worker)


def run_worker(function: Callable, pipe: Connection, inherited: list[Connection]) -> None:
    """Call the reward function on one task after the other."""
    os.setpgid(0, 0)  # a process group, so that `kill` reaches what the reward function starts
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG: if the slot is killed
    for connection in inherited:
        connection.close()
    pid = os.getpid()
    while True:
        task = pipe.recv()
        try:
            scores = score_task(function, task)
        except BaseException as error:  # SystemExit, too
            message = str(error) if isinstance(error, ValueError) else (
                f"the reward function ended with {error!r:.300}")
            if isinstance(error.__cause__, MemoryError):
                message += f" (it has {MEMORY // 2**30} GiB of address space)"
            scores = failed(task, "error", message)
        if os.getpid() != pid:  # a fork that the reward function made: it must not answer too
            os._exit(0)
        pipe.send(scores)


def failed(task: Task, status: str, message: str) -> list[Score]:
    """A failed score for each response."""
    return [failed_score(status, [1.0], message)] * len(task.responses)


def kill(worker: multiprocessing.Process | None) -> None:
    """End a worker and its process group: all that it started, except for sessions of their own."""
    if worker is not None:
        with suppress(ProcessLookupError, PermissionError):  # macOS: no permission for a zombie
            os.killpg(worker.pid, signal.SIGKILL)
        worker.kill()  # if it had no time to make its process group
        worker.join()
