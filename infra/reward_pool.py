"""Scores from several reward functions; those that need limits run in processes of their own.

`math` and `math_strict_box` do bounded work and run in the trainer. For any other reward function
the trainer starts *workers*. A worker is a process that loads the function, calls it on an example,
and then scores one task after the other; if the function is `async`, up to 64 at a time, and one
that takes too long is cancelled. If a call blocks too long or lacks memory, the worker is killed
with all that it started, and another one takes its place with the next call. Workers end with the
trainer, import neither torch nor the trainer's script, and see no Ctrl-C.
"""

import asyncio
import inspect
import os
import resource
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import astuple
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

from data_types import Prompt, Score, Task
from infra.math_verify import answer_or_box
from infra.reward_function import (
    await_scores,
    finish,
    is_group_reward,
    load_reward_function,
    score_task,
)
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

    def score_some(tasks: deque) -> dict:
        worker = idle.get()
        scores = {}
        try:
            while tasks:
                if worker.process.poll() is not None:  # killed after a failure, or died since
                    kill(worker)
                    worker = start_worker(name, examples, timeout)
                    wait_until_loaded(worker, name)
                scores |= score_in(worker, tasks, timeout, is_async)
        finally:
            idle.put(worker)
        return scores

    def score_calls(calls: dict) -> dict:
        todo, scores = deque(calls.items()), {}
        for some in threads.map(score_some, [todo] * workers):
            scores |= some
        return scores

    def score_all(tasks: Sequence[Task]) -> list[list[Score]]:
        if is_group:
            scores = score_calls(dict(enumerate(tasks)))
            return [scores[i] for i in range(len(tasks))]
        calls, keys = {}, []  # a call for each key: for each response, or for each distinct answer
        for i, task in enumerate(tasks):
            for j, (text, length) in enumerate(zip(task.responses, task.lengths, strict=True)):
                keys.append((i, answer_or_box(text) if name == "math_verify" else j))
                calls[keys[-1]] = task._replace(responses=[text], lengths=[length])
        scores, in_order = score_calls(calls), iter(keys)
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


def score_in(worker: Worker, todo: deque, timeout: float, is_async: bool) -> dict:
    """Takes tasks (key, task) from `todo` until there are none or the worker fails. Returns their
    scores, by key. Kills a worker that takes too long, dies or lacks memory."""
    sent, scores = {}, {}
    most, limit = (AT_A_TIME, 1.5 * timeout + 1) if is_async else (1, timeout)
    status, message = "timeout", f"the reward function took more than {timeout:g} s"
    try:
        while sent or (todo and worker.process.poll() is None):
            with suppress(IndexError):  # there are no more
                while len(sent) < most:
                    key, task = todo.popleft()
                    sent[key] = task
                    worker.pipe.send((key, tuple(task)))
            if not sent or not worker.pipe.poll(limit):
                break
            key, reply = worker.pipe.recv()
            if isinstance(reply, str):
                status, message = "error", reply
                break
            scores[key] = [Score(*values) for values in reply]
            del sent[key]
    except (EOFError, OSError):
        status, message = "error", f"the reward function's process died ({kill(worker)})"
    if sent:
        kill(worker)
    return scores | {key: [failed_score(status, [1.0], message)] * len(task.responses)
                     for key, task in sent.items()}


def kill(worker: Worker) -> int:
    """End a worker and all that it started in its process group. Returns its exit code."""
    worker.guard_input.close()
    worker.guard.wait()
    worker.process.kill()  # if the guard was killed
    return worker.process.wait()


# ---- in the workers -----------------------------------------------------------------------------

def run_worker(fd: int) -> None:
    """Load the reward function, then score tasks, until the trainer closes its end of the pipe
    `fd`. Replies whether it is a group reward and `async`, then the scores of each task, with its
    key; or a message if it can do no more."""
    with suppress(ValueError, OSError):  # macOS has no such limit; a lower one stays as it is
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    os.set_inheritable(fd, False)  # not for programs that the reward function starts
    trainer = Connection(fd)
    name, examples, timeout = trainer.recv()
    try:
        function = load_reward_function(name, [prompt.row for prompt in examples])
    except Exception as error:
        return trainer.send(str(error) if isinstance(error, ValueError) else repr(error))
    serving = serve(function, trainer, examples[:1], timeout)
    with suppress(EOFError, OSError):  # the trainer is gone
        if inspect.iscoroutinefunction(function):
            asyncio.run(serving)
        else:
            finish(serving)
    os._exit(0)


async def serve(function: Callable, trainer: Connection, examples: Sequence[Prompt],
                timeout: float) -> None:
    """Call the function on an example, then reply to the trainer for ever."""
    pid, running = os.getpid(), set()
    is_async = inspect.iscoroutinefunction(function)

    def send(reply: Any) -> None:
        if os.getpid() != pid:  # a fork that the reward function made must not answer too
            os._exit(0)
        trainer.send(reply)

    async def reply(key: Any, task: tuple, timeout: float | None) -> None:
        scores = await try_to_score(function, Task(*task), timeout)
        send((key, scores if isinstance(scores, str) else [*map(astuple, scores)]))

    for prompt in examples:  # the first call may load more; whether it fails does not matter
        responses = [f"Answer: {prompt.answer}", r"Answer: $\frac{5\pi}{2}$"]  # right and wrong
        await try_to_score(function, Task(responses, [9, 9], prompt.answer, prompt.row), None)
    send((is_group_reward(function), is_async))
    while not is_async:
        await reply(*trainer.recv(), None)
    while True:
        task = await asyncio.to_thread(trainer.recv)
        running.add(scoring := asyncio.create_task(reply(*task, timeout)))
        scoring.add_done_callback(running.discard)  # until then, so that it is not collected


async def try_to_score(function: Callable, task: Task,
                       timeout: float | None) -> list[Score] | str:
    """The scores of a task, failed ones if the function fails or is late; a message if it lacks
    memory."""
    status = "error"
    try:
        async with asyncio.timeout(timeout) if timeout else nullcontext():
            return await await_scores(function, task)
    except TimeoutError:
        status, message = "timeout", f"the reward function took more than {timeout:g} s"
    except BaseException as error:  # SystemExit, too
        message = str(error) if isinstance(error, ValueError) else (
            f"the reward function ended with {error!r:.300}")
        if isinstance(error.__cause__, MemoryError):
            return f"{message} (it has {MEMORY // 2**30} GiB of address space)"
    return [failed_score(status, [1.0], message)] * len(task.responses)
