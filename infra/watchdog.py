"""A rank that is stopped, or whose machine is gone, ends the run: the others would wait for it in a
collective, whose limit is hours."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread, Timer

from accelerate import Accelerator
from torch.distributed import PrefixStore
from torch.distributed.distributed_c10d import _get_default_store

from infra.config import tell_launcher

PHASE = {"now": "start"}  # what the main thread of this process does; "end": nobody watches


@contextmanager
def rendezvous_limit(seconds: int) -> Iterator[None]:
    """Limit the block, in which the ranks wait for each other, to so many seconds (0: no limit).
    After them another rank, or the launcher, is gone or stopped: the process ends, with a line."""
    timer = Timer(seconds, end_process, [f"the processes of the run did not meet within {seconds} "
                                         "s (twice watchdog_seconds)"])
    timer.daemon = True
    if seconds and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def end_process(problem: str, end: Callable[[int], None] = os._exit) -> None:
    """End this process, whose main thread waits for ever, with a line."""
    message = f"error: {problem}. The same command resumes from the last checkpoint"
    print(f"\n{message}", file=sys.stderr, flush=True)
    tell_launcher(message)
    end(1)


def start_watchdog(accelerator: Accelerator, seconds: int,
                   end: Callable[[int], None] = os._exit) -> None:
    """Watch from a thread, which runs on while the main one waits. Each rank writes into the store
    that all share once a second; rank 0 looks at the others, they at rank 0. If one has not written
    for so many seconds (0: no matter), a line names it and this process ends; the launcher ends the
    rest."""
    PHASE["now"], rank, ranks = "start", accelerator.process_index, range(accelerator.num_processes)
    if len(ranks) == 1 or not seconds:
        return
    store, others = PrefixStore("watchdog", _get_default_store()), ranks[1:] if rank == 0 else [0]

    def watch() -> None:
        silent, last, problem = dict.fromkeys(others, 0), dict.fromkeys(others, b""), ""
        while not problem and PHASE["now"] != "end":  # at the end they leave one after the other
            time.sleep(1)
            try:
                store.set(str(rank), f"{time.monotonic()} {PHASE['now']}")
                for other in others:
                    sign = store.get(str(other)) if store.check([str(other)]) else b""
                    # Turns, not time: this thread may itself have waited, for Python's lock.
                    silent[other] = silent[other] + 1 if sign == last[other] else 0
                    last[other] = sign
                    if silent[other] > seconds:
                        phase = sign.decode().rpartition(" ")[2] or "start"
                        problem = (f"rank {other} has not moved for {seconds} s, in phase {phase} "
                                   "(watchdog_seconds)")
            except RuntimeError:  # the process that has the store is gone
                time.sleep(2)  # it may have done all its work, and so has this one
                problem = "the process that all ranks meet at cannot be reached"
        if PHASE["now"] != "end":
            end_process(f"{problem}; rank {rank} waited for it in phase {PHASE['now']}", end)

    Thread(target=watch, daemon=True).start()
