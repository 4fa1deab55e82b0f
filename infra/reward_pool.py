"""Scores from several reward functions; those that need limits run in processes of their own.

`math` and `math_strict_box` do bounded work and run in the trainer. For any other reward function
the trainer starts *workers*. A worker is a process that loads the function, calls it on an example,
and then scores one task after the other, or up to 64 at a time if the function is `async`: one that
takes too long is then cancelled. If a call blocks too long or lacks memory, the worker is killed
with all that it started, and another one takes its place with the next call. Workers end with the
trainer, import neither torch nor the trainer's script, and see no Ctrl-C.
"""

import asyncio
import inspect
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import astuple
from itertools import chain
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

from data_types import Prompt, Score, Task
from infra.math_verify import answer_or_box
from infra.reward_function import (
    await_scores, finish, is_group_reward, load_reward_function, score_task)
from reward import failed_score, weighted_sum

IN_TRAINER = ("math", "math_strict_box")
MEMORY = 8 * 2**30  # bytes of address space for each worker
AT_A_TIME = 64  # calls of an `async` function in each worker
LOAD_TIMEOUT = 300.0  # seconds to load, and call the example: 8 GiB from a disk of 30 MB/s

Scorer = Callable[[Sequence[Task]], list[list[Score]]]


def make_scorer(names: Sequence[str], weights: Sequence[float], workers: int, timeout: float,
                examples: Sequence[Prompt]) -> Scorer:
    """A function that scores tasks with all reward functions `names`, see `reward.weighted_sum`.

    Each reward function gets `workers` processes, and `timeout` seconds for a call (of one
    response; for a group reward, of all responses of a prompt). A failure is a score with its
    status. Raises ValueError if a function cannot be loaded, or called with the columns of one of
    `examples`; the scorer raises it if a function cannot be loaded again.
    """
    if len(set(names)) < len(names):
        raise ValueError(f"reward.name: {', '.join(names)} has one of them twice: give it the sum "
                         "of its weights")
    labels = [name.rpartition(":")[2] for name in names]
    if len(set(labels)) < len(names):
        labels = names  # two files have a function of the same name
    scorers = [make_single_scorer(name, workers, timeout, examples) for name in names]
    if list(weights) == [1.0]:
        return scorers[0]

    def score_all(tasks: Sequence[Task]) -> list[list[Score]]:
        results = []
        for groups in zip(*[scorer(tasks) for scorer in scorers], strict=True):
            results.append([weighted_sum(dict(zip(labels, scores, strict=True)), weights)
                            for scores in zip(*groups, strict=True)])  # of one response
        return results
    return score_all


def make_single_scorer(name: str, workers: int, timeout: float,
                       examples: Sequence[Prompt]) -> Scorer:
    """A scorer with one reward function; arguments and errors as in `make_scorer`."""
    if name in IN_TRAINER:
        function = load_reward_function(name)
        return lambda tasks: [score_task(function, task) for task in tasks]
    idle, threads = SimpleQueue(), ThreadPoolExecutor(workers)
    for worker in [start_worker(name, examples, timeout) for _ in range(workers)]:  # in parallel
        is_group, is_async = wait_until_loaded(worker, name)
        idle.put(worker)

    def call(tasks: Sequence[Task]) -> list[list[Score]]:
        worker = idle.get()
        try:
            if worker.process.poll() is not None:  # killed after a failure, or died since
                kill(worker)
                worker = start_worker(name, examples, timeout)
                wait_until_loaded(worker, name)
            return score_in(worker, tasks, timeout, 1.5 * timeout + 1 if is_async else timeout)
        finally:
            idle.put(worker)

    def call_all(tasks: Sequence[Task]) -> list[list[Score]]:
        size = min(AT_A_TIME, -(-len(tasks) // workers)) if is_async else 1
        parts = [tasks[at:at + size] for at in range(0, len(tasks), size or 1)]
        return list(chain.from_iterable(threads.map(call, parts)))

    def score_all(tasks: Sequence[Task]) -> list[list[Score]]:
        if is_group:
            return call_all(tasks)
        calls, keys = {}, []  # a call for each key: for each response, or for each distinct answer
        for i, task in enumerate(tasks):
            for j, (text, length) in enumerate(zip(task.responses, task.lengths, strict=True)):
                keys.append((i, answer_or_box(text) if name == "math_verify" else j))
                calls[keys[-1]] = task._replace(responses=[text], lengths=[length])
        scores = dict(zip(calls, call_all([*calls.values()]), strict=True))
        in_order = iter(keys)
        return [[scores[next(in_order)][0] for _ in task.responses] for task in tasks]
    return score_all


class Worker(NamedTuple):
    """A worker, as the trainer sees it."""
    process: subprocess.Popen
    pipe: Connection
    guard: subprocess.Popen  # kills the process group of `process` when its own input ends
    guard_input: Connection  # ends with the trainer, or with the last reference to this worker


def start_worker(name: str, examples: Sequence[Prompt], timeout: float) -> Worker:
    """A worker that begins to load the reward function."""
    pipe, remote = Pipe()
    code = (f"import sys; sys.path[0] = {str(Path(__file__).parent.parent)!r}\n"
            "from infra.reward_pool import run_worker\n"
            f"sys.path.append(sys.path.pop(0)); run_worker({remote.fileno()})")
    process = subprocess.Popen(
        [sys.executable, "-c", code], pass_fds=[remote.fileno()], stdin=subprocess.DEVNULL,
        stdout=2, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        start_new_session=True)  # and so a process group
    remote.close()
    # A thread of the worker could not kill it while the function holds the interpreter's lock.
    read_end, guard_input = Pipe(duplex=False)
    guard = subprocess.Popen(["sh", "-c", f"read _; kill -9 -{process.pid}"], stdin=read_end,
                             stderr=subprocess.DEVNULL, start_new_session=True)
    pipe.send((name, examples, timeout))
    return Worker(process, pipe, guard, guard_input)


def wait_until_loaded(worker: Worker, name: str) -> tuple[bool, bool]:
    """Whether it is a group reward, and `async`. Raises ValueError if it cannot be loaded."""
    reply = (f"reward.name: {name} did not load and score an example within {LOAD_TIMEOUT:.0f} s, "
             f"or died (see above); it has {MEMORY // 2**30} GiB of address space")
    with suppress(EOFError, OSError):
        if worker.pipe.poll(LOAD_TIMEOUT):
            reply = worker.pipe.recv()
    if isinstance(reply, str):
        kill(worker)
        raise ValueError(reply)
    return reply


def score_in(worker: Worker, tasks: Sequence[Task], timeout: float,
             limit: float) -> list[list[Score]]:
    """A score for each response. Kills a worker that takes longer than `limit` seconds, dies or
    lacks memory."""
    status, reply = "timeout", f"the reward function took more than {timeout:g} s"
    try:
        worker.pipe.send([*map(tuple, tasks)])  # no classes: the user may have a data_types.py
        if worker.pipe.poll(limit):
            status, reply = "error", worker.pipe.recv()
    except (EOFError, OSError):
        status, reply = "error", f"the reward function's process died ({kill(worker)})"
    if isinstance(reply, str):
        kill(worker)
        return [[failed_score(status, reply)] * len(task.responses) for task in tasks]
    return [[Score(*values) for values in scores] for scores in reply]


def kill(worker: Worker) -> int:
    """End a worker and all that it started in its process group. Returns its exit code."""
    worker.guard_input.close()
    worker.guard.wait()
    worker.process.kill()  # if the guard was killed
    return worker.process.wait()


# ---- in the workers -----------------------------------------------------------------------------

def run_worker(fd: int) -> None:
    """Load the reward function, then score tasks, until the trainer closes its end of the pipe
    `fd`. Replies whether it is a group reward and `async`, then the scores; or a message if it can
    do no more."""
    with suppress(ValueError, OSError):  # macOS has no such limit; a lower one stays as it is
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    os.set_inheritable(fd, False)  # not for programs that the reward function starts
    trainer, pid = Connection(fd), os.getpid()
    name, examples, timeout = trainer.recv()
    try:
        function = load_reward_function(name, [prompt.row for prompt in examples])
    except Exception as error:
        return trainer.send(str(error) if isinstance(error, ValueError) else repr(error))
    is_async = inspect.iscoroutinefunction(function)
    run = asyncio.new_event_loop().run_until_complete if is_async else finish
    timeout = timeout if is_async else 0.0
    for prompt in examples[:1]:  # the first call may load more; whether it fails does not matter
        responses = [f"Answer: {prompt.answer}", r"Answer: $\frac{5\pi}{2}$"]  # right and wrong
        run(try_to_score(function, [(responses, [9, 9], prompt.answer, prompt.row)], 0.0))
    reply = is_group_reward(function), is_async
    with suppress(EOFError, OSError):  # the trainer is gone
        while os.getpid() == pid:  # a fork that the reward function made must not answer too
            trainer.send(reply)
            reply = run(try_to_score(function, trainer.recv(), timeout))
    os._exit(0)


async def try_to_score(function: Callable, tasks: Sequence[tuple],
                       timeout: float) -> list[list[tuple]] | str:
    """The scores of tasks, failed ones if the function fails or takes more than `timeout` seconds
    (0: no limit); a message if it lacks memory. Several tasks are scored at a time."""
    if len(tasks) > 1:
        replies = await asyncio.gather(*(try_to_score(function, [task], timeout) for task in tasks))
        failures = [reply for reply in replies if isinstance(reply, str)]
        return failures[0] if failures else [reply[0] for reply in replies]
    task, status = Task(*tasks[0]), "error"
    try:
        async with asyncio.timeout(timeout) if timeout else nullcontext():
            return [[*map(astuple, await await_scores(function, task))]]
    except TimeoutError:
        status, message = "timeout", f"the reward function took more than {timeout:g} s"
    except BaseException as error:  # SystemExit, too
        message = str(error) if isinstance(error, ValueError) else (
            f"the reward function ended with {error!r:.300}")
        if isinstance(error.__cause__, MemoryError):
            return f"{message} (it has {MEMORY // 2**30} GiB of address space)"
    return [[astuple(failed_score(status, message))] * len(task.responses)]
