"""Who calls the verifier? One of your own runs in processes beside the trainer: several at a time, each with a limit
to its time and memory, so that no text can hang or end a run.

Such a worker is this file, run as a script: pickled tasks come in at its stdin, verdicts go out at its stdout. It
imports neither torch nor the trainer, and starts in a fraction of a second. `math` needs none of this: its work is
bounded and takes microseconds.
"""

import ctypes
import os
import pickle
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Semaphore

from reward import TIMED_OUT, Score, judge, load_verifier

MEMORY = 8 * 2**30  # bytes of address space, a worker
START = 60.0  # seconds that a verifier's imports may take
PATIENCE = 0.5  # seconds after which a task no longer counts as one of those that run: the next may start
CROWD = 4  # times as many may be under way in all: each then has a quarter of the time that it would have alone
NOTHING, GONE = object(), object()  # a worker says nothing yet; or never will

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

    def judge_one(task: Task, fresh: bool = False) -> Score | str:
        with slots:
            try:
                worker = start_worker(name) if fresh else idle.pop()
            except IndexError:  # all are at work
                worker, fresh = start_worker(name), True
            answer = ask(worker, task, min(PATIENCE, timeout))
        if answer is NOTHING:
            answer = receive(worker, timeout - PATIENCE)
        if answer not in (NOTHING, GONE):
            idle.append(worker)
            return answer
        stop(worker)
        return TIMED_OUT if answer is NOTHING or fresh else judge_one(task, fresh=True)  # an old one died: of this?
    threads = ThreadPoolExecutor(CROWD * workers)  # for good, since Linux ends a worker with the thread that started it
    return lambda tasks: list(threads.map(judge_one, tasks))


def start_worker(name: str) -> subprocess.Popen:
    """A process that has loaded the verifier. Raises ValueError where it cannot."""
    worker = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)  # Ctrl-C is not for it
    failure = ask(worker, name, START)
    if failure != "":
        stop(worker)
        raise ValueError(failure if isinstance(failure, str) else
                         f"reward.name: {name} did not load within {START:.0f} s, or died (see above); it has "
                         f"{MEMORY // 2**30} GiB of address space")
    return worker


def ask(worker: subprocess.Popen, question, seconds: float):
    """Its answer, or `NOTHING`, or `GONE`."""
    try:
        pickle.dump(question, worker.stdin)
        worker.stdin.flush()
    except BrokenPipeError:
        return GONE
    return receive(worker, seconds)


def receive(worker: subprocess.Popen, seconds: float):
    """What it says within so many seconds, or `NOTHING`, or `GONE`."""
    poll = select.poll()
    poll.register(worker.stdout, select.POLLIN)
    if seconds <= 0 or not poll.poll(1000 * seconds):
        return NOTHING
    try:
        return pickle.load(worker.stdout)
    except (EOFError, pickle.UnpicklingError):
        return GONE


def stop(worker: subprocess.Popen) -> None:
    """Whatever it is doing, and whatever it has started."""
    with suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    with suppress(BrokenPipeError):  # of what it was still to read
        worker.stdin.close()
    worker.stdout.close()
    worker.wait()


def work() -> None:
    """The life of a worker: load a verifier, then judge until stdin ends, or memory does."""
    import resource
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: not to outlive a trainer that was killed
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard)
    with suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    questions, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # what a verifier reads is no question
    os.dup2(2, 1)  # and what it prints no verdict

    def say(answer) -> None:
        pickle.dump(answer, answers)
        answers.flush()
    try:
        verifier = load_verifier(pickle.load(questions))
        say("")
        while True:
            task = pickle.load(questions)
            try:
                say(judge(verifier, *task))
            except ValueError as error:
                if isinstance(error.__cause__, MemoryError):
                    return
                say(str(error))
    except ValueError as error:
        say(str(error))
    except EOFError:
        return


if __name__ == "__main__":
    work()
