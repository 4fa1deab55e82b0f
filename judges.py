"""Who calls the verifier? One of your own runs in processes beside the trainer: several at a time, each with a limit
to its time and memory, so that no text can hang or end a run.

Such a worker is this file, run as a script: pickled tasks come in at its stdin, verdicts go out at its stdout. It
imports neither torch nor the trainer, and starts in a fraction of a second. `math` needs none of this: its work is
bounded and takes microseconds.
"""

import ctypes
import os
import pickle
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Semaphore

from reward import TIMED_OUT, Score, judge, load_verifier

MEMORY = 4 * 2**30  # bytes of address space, a worker
START = 60.0  # seconds that a verifier's imports may take
PATIENCE = 0.5  # seconds after which a task no longer counts as one of those that run: the others go on
MOST = 64  # workers, those that hang included

Task = tuple[str, str, dict]  # response, ground truth, row
Judge = Callable[[Sequence[Task]], list[Score | str]]  # verdicts, or why the verifier failed


def make_judge(name: str, workers: int, timeout: float) -> Judge:
    """What judges with the verifier `name`, in `workers` processes at a time with `timeout` seconds for each response;
    one that takes longer, or more than `MEMORY`, scores `TIMED_OUT`. Raises ValueError where it does not load.
    """
    if name == "math":
        verifier = load_verifier(name)
        return lambda tasks: [judge(verifier, *task) for task in tasks]
    slots, idle = Semaphore(workers), [start_worker(name)]  # a first one, to see that it loads

    def one(task: Task) -> Score | str:
        with slots:
            try:
                worker = idle.pop()
            except IndexError:  # all are at work
                worker = start_worker(name)
            answer = ask(worker, task, min(PATIENCE, timeout))
        if answer is None:  # the next may have its place; and it the rest of its time
            answer = receive(worker, timeout - PATIENCE)
        if answer is None:
            stop(worker)
            return TIMED_OUT
        idle.append(worker)
        return answer
    threads = ThreadPoolExecutor(MOST)  # for good: a worker ends with the thread that started it
    return lambda tasks: list(threads.map(one, tasks))


def start_worker(name: str) -> subprocess.Popen:
    """A process that has loaded the verifier. Raises ValueError where it cannot."""
    worker = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              start_new_session=True)  # Ctrl-C is not for it
    failure = ask(worker, name, START)
    if failure != "":
        stop(worker)
        raise ValueError(failure or f"reward.name: {name} did not load within {START:.0f} s, or died")
    return worker


def ask(worker: subprocess.Popen, question, seconds: float):
    """Its answer; None where it has none yet, or is gone."""
    try:
        pickle.dump(question, worker.stdin)
        worker.stdin.flush()
    except BrokenPipeError:
        return None
    return receive(worker, seconds)


def receive(worker: subprocess.Popen, seconds: float):
    """What it says within so many seconds; None where it says nothing, or is gone."""
    if seconds <= 0 or not select.select([worker.stdout], [], [], seconds)[0]:
        return None
    try:
        return pickle.load(worker.stdout)
    except (EOFError, pickle.UnpicklingError):
        return None


def stop(worker: subprocess.Popen) -> None:
    """Whatever it is doing."""
    worker.kill()
    worker.communicate()


def work() -> None:
    """The life of a worker: load a verifier, then judge until stdin ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: not to outlive a trainer that was killed
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    questions, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a verifier prints is no verdict

    def say(answer) -> None:
        pickle.dump(answer, answers)
        answers.flush()
    try:
        verifier = load_verifier(pickle.load(questions))
        say("")
    except ValueError as error:
        say(str(error))
        return
    while True:
        try:
            task = pickle.load(questions)
        except EOFError:
            return
        try:
            say(judge(verifier, *task))
        except ValueError as error:
            say(TIMED_OUT if isinstance(error.__cause__, MemoryError) else str(error))


if __name__ == "__main__":
    work()
