"""Who calls the verifier? One of your own runs in processes beside the trainer: several at a time, each with a limit
to its time and memory, so that no text can hang or end a run.

A nursery is this file, run as a script: it loads the verifier, judges nothing itself, and forks a worker whenever it
is asked for one, in milliseconds. A worker gets its tasks and gives its verdicts through a socket that came with the
order. Nothing of this imports torch or the trainer.
"""

import ctypes
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Lock, Semaphore

from reward import TIMED_OUT, Score, extract_answer, is_batched, judge, load_verifier, weighted_sum

QUICK = ("math", "math_strict_box", "toy")  # bounded work, of microseconds: they need no process of their own
MEMORY = 8 * 2**30  # bytes of address space, a worker
START = 60.0  # seconds that a verifier's imports may take
PATIENCE = 0.15  # seconds after which a call gives way: it no longer counts as one that runs, so the next may start
GIVE_WAY = 15  # and its process gets this niceness, a small part of the share that the others have
CROWD = 4  # times as many may be under way in all: each then has a quarter of the time that it would have alone
NOTHING, GONE = object(), object()  # a process says nothing yet; or never will
NO_VERDICT = "memory"  # a worker's last word: there was not enough

Task = tuple[list[str], str, dict]  # responses to a prompt, its ground truth, its row
Verdicts = list[Score] | str  # or why the verifier failed
Judge = Callable[[Sequence[Task]], list[list[Score | str]]]


def make_judge(names: Sequence[str], weights: Sequence[float], workers: int, timeout: float) -> Judge:
    """What judges with all of these verifiers, as `reward.weigh` has it. The rest is as in `make_single_judge`."""
    labels = [name.rpartition(":")[2] for name in names]
    if len(set(labels)) < len(names):
        labels = names  # their files tell them apart
    if len(set(labels)) < len(names):
        raise ValueError(f"reward.name: {', '.join(names)} has one of them twice: give it the sum of its weights")
    judges = {label: make_single_judge(name, workers, timeout) for label, name in zip(labels, names, strict=True)}
    if list(weights) == [1.0]:
        return judges.popitem()[1]

    def weigh_one(verdicts: tuple[Score | str, ...]) -> Score | str:
        failures = [verdict for verdict in verdicts if isinstance(verdict, str)]
        return failures[0] if failures else weighted_sum(dict(zip(judges, verdicts, strict=True)), weights)

    def judge_all(tasks: Sequence[Task]) -> list[list[Score | str]]:
        by_judge = [single(tasks) for single in judges.values()]
        return [[weigh_one(verdicts) for verdicts in zip(*group, strict=True)] for group in zip(*by_judge, strict=True)]
    return judge_all


def make_single_judge(name: str, workers: int, timeout: float) -> Judge:
    """What judges with the verifier `name`, in `workers` processes at a time with `timeout` seconds for each call (of
    one response, or all to a prompt, as the verifier takes them); what takes longer, or more than `MEMORY`, scores
    `TIMED_OUT`. Raises ValueError where the verifier does not load.
    """
    if name in QUICK:
        verifier = load_verifier(name)
        return lambda tasks: [judge(verifier, *task) for task in tasks]
    nursery, slots, idle = start_nursery(name), Semaphore(workers), []

    def judge_one(task: Task, fresh: bool = False) -> Verdicts:
        with slots:
            try:
                worker = start_worker(nursery) if fresh else idle.pop()
            except IndexError:  # all are at work
                worker, fresh = start_worker(nursery), True
            say(worker.socket, task)
            answer = hear(worker.socket, min(PATIENCE, timeout))
        if answer not in (NOTHING, GONE, NO_VERDICT):
            idle.append(worker)
            return answer
        if answer is NOTHING:
            with suppress(ProcessLookupError):
                os.setpriority(os.PRIO_PGRP, worker.pid, GIVE_WAY)
            answer = hear(worker.socket, timeout - PATIENCE)
        stop(nursery, worker)  # also where it was but slow: niceness is for good
        if answer in (NOTHING, NO_VERDICT) or (answer is GONE and fresh):
            return [TIMED_OUT] * len(task[0])
        return judge_one(task, fresh=True) if answer is GONE else answer  # an old one died: of this?
    threads = ThreadPoolExecutor(CROWD * workers)

    def judge_all(tasks: Sequence[Task]) -> list[list[Score | str]]:
        calls = tasks if nursery.batched else [
            ([response], *rest) for responses, *rest in tasks for response in responses]
        verdicts = (verdict for call, answer in zip(calls, threads.map(judge_one, calls), strict=True)
                    for verdict in ([answer] * len(call[0]) if isinstance(answer, str) else answer))
        return [list(islice(verdicts, len(responses))) for responses, *_ in tasks]
    return partial(judge_answers, judge_all) if name == "math_verify" else judge_all


def judge_answers(judge_all: Judge, tasks: Sequence[Task]) -> list[list[Score | str]]:
    """The same for a verifier that looks at answers alone: of a prompt's responses, which have few of them, each answer
    is judged once."""
    answers = [[extract_answer(response) for response in responses] for responses, *_ in tasks]
    verdicts = judge_all([(list(dict.fromkeys(found)), truth, {}) for found, (_, truth, _) in
                          zip(answers, tasks, strict=True)])
    by_answer = [dict(zip(dict.fromkeys(found), judged, strict=True)) for found, judged in
                 zip(answers, verdicts, strict=True)]
    return [[judged[answer] for answer in found] for found, judged in zip(answers, by_answer, strict=True)]


# ---- the trainer's side -----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Nursery:
    """A process that has loaded a verifier; whether that is batched; one thread at a time may give it orders."""
    process: subprocess.Popen
    socket: socket.socket
    batched: bool
    lock: Lock


@dataclass(frozen=True)
class Worker:
    """A process that judges; it leads a process group, with all that it starts."""
    pid: int
    socket: socket.socket


def start_nursery(name: str) -> Nursery:
    """A nursery for this verifier. Raises ValueError where that does not load."""
    ours, theirs = socket.socketpair()
    process = subprocess.Popen([sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()],
                               stdin=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)},
                               start_new_session=True)  # Ctrl-C is not for it
    theirs.close()
    say(ours, name)
    batched = hear(ours, START)
    if not isinstance(batched, bool):
        process.kill()
        process.wait()
        raise ValueError(batched if isinstance(batched, str) else
                         f"reward.name: {name} did not load within {START:.0f} s, or died (see above); it has "
                         f"{MEMORY // 2**30} GiB of address space")
    return Nursery(process, ours, batched, Lock())


def start_worker(nursery: Nursery) -> Worker:
    """A process that waits for tasks."""
    ours, theirs = socket.socketpair()
    with theirs:
        return Worker(order(nursery, 0, [theirs.fileno()]), ours)


def stop(nursery: Nursery, worker: Worker) -> None:
    """Whatever it is doing, and whatever it has started."""
    worker.socket.close()
    order(nursery, worker.pid, [])


def order(nursery: Nursery, pid: int, connection: list[int]) -> int:
    """Let the nursery fork a worker (0) or end one; returns its process id. Raises ValueError where it is dead."""
    with nursery.lock, suppress(BrokenPipeError, ConnectionResetError):
        socket.send_fds(nursery.socket, [pid.to_bytes(8)], connection)
        if answer := nursery.socket.recv(8, socket.MSG_WAITALL):
            return int.from_bytes(answer)
    raise ValueError("reward.name: the process that had loaded the verifier was killed")


def say(to: socket.socket, what) -> None:
    """Send an object; whether it arrives, the answer will tell."""
    message = pickle.dumps(what)
    with suppress(BrokenPipeError, ConnectionResetError):
        to.sendall(len(message).to_bytes(8) + message)


def hear(whom: socket.socket, seconds: float | None = None):
    """The object that is sent within so many seconds, or `NOTHING`, or `GONE`."""
    poll = select.poll()
    poll.register(whom, select.POLLIN)
    if seconds is not None and (seconds <= 0 or not poll.poll(1000 * seconds)):
        return NOTHING
    try:
        size = whom.recv(8, socket.MSG_WAITALL)
        message = whom.recv(int.from_bytes(size), socket.MSG_WAITALL)
        return pickle.loads(message) if size else GONE
    except (ConnectionResetError, EOFError, pickle.UnpicklingError):
        return GONE


# ---- the other side ---------------------------------------------------------------------------------------------

def nurse(orders: socket.socket) -> None:
    """The life of a nursery: load a verifier, then fork and end workers until there is nobody to order any."""
    import resource
    pids = set()

    def close(*_) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for pid in pids:
            kill(pid)
        os._exit(0)
    signal.signal(signal.SIGTERM, close)
    die_with_parent(signal.SIGTERM)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard)
    with suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    os.dup2(2, 1)  # what a verifier prints
    try:
        verifier = load_verifier(hear(orders))
    except ValueError as error:
        return say(orders, str(error))
    say(orders, is_batched(verifier))
    while True:
        message, connections, *_ = socket.recv_fds(orders, 8, 1)
        if not message:
            return close()
        pid = int.from_bytes(message)
        if pid:
            pids.discard(pid)
            kill(pid)
        elif pid := os.fork():
            pids.add(pid)
            os.close(connections[0])
            with suppress(PermissionError, ProcessLookupError):  # it has done so itself, or is gone
                os.setpgid(pid, pid)
        else:
            orders.close()
            work(verifier, socket.socket(fileno=connections[0]))
        orders.sendall(pid.to_bytes(8))


def kill(pid: int) -> None:
    """End a worker and what it has started, but for what went into sessions of its own."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    with suppress(ChildProcessError):  # a signal came while it was waited for
        os.waitpid(pid, 0)


def work(verifier: Callable, tasks: socket.socket) -> None:
    """The life of a worker: judge until there are no more tasks, or no more memory. Does not return."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with_parent(signal.SIGKILL)
    os.setpgid(0, 0)
    os.set_inheritable(tasks.fileno(), False)
    me = os.getpid()
    while (task := hear(tasks)) is not GONE:
        try:
            answer = judge(verifier, *task)
        except BaseException as error:  # sys.exit, too
            if isinstance(error.__cause__, MemoryError):
                say(tasks, NO_VERDICT)
                break
            answer = str(error) if isinstance(error, ValueError) else f"the reward function ended in {error!r:.300}"
        if os.getpid() != me:  # a copy that the verifier has made of it
            break
        say(tasks, answer)
    os._exit(0)


def die_with_parent(sign: signal.Signals) -> None:
    """Not to outlive a trainer that was killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(sign))  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    nurse(socket.socket(fileno=int(sys.argv[1])))
