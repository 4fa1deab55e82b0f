"""How many bytes do ranks exchange for a step's responses, beside the responses' own?

    python bench/exchange.py [key.sub=value ...] [--processes 2 4 8] [--lengths 500 25] [--groups N]

Steps of `train_dapo.train` in several processes over gloo, with random responses of a mean length
in the place of an engine's, and without a model's work: all else runs as it does in a run, the
saving of rollouts too. What each process receives from others is counted where tensors are handed
to torch.distributed. A token's own bytes are 8, an id and a log-prob; each response is trained on
one rank, which needs one copy.
"""

import argparse
import json
import multiprocessing
import os
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from harness import make_state, train_dapo
from torch import distributed

import infra.logprobs
from infra.checkpoint import Progress
from rollout import Response

GOAL, STEPS = 1.3, 2


def received(name: str, world: int, rank: int, arguments: tuple, options: dict) -> int:
    """Bytes that a rank receives from others in a collective of torch.distributed."""
    first, second = (*arguments, None)[:2]
    if name == "all_gather":
        return (world - 1) * second.nbytes
    if name == "all_gather_into_tensor":
        return first.nbytes - second.nbytes
    if name == "all_reduce":  # as a ring: reduced in parts, which are then gathered
        return 2 * (world - 1) * first.nbytes // world
    if name == "broadcast":
        return first.nbytes * (options.get("src", second) != rank)
    counts = arguments[2] if len(arguments) > 2 else [len(first) // world] * world
    return first.nbytes - counts[rank] * first.element_size()  # all_to_all_single


@contextmanager
def count_bytes(accelerator) -> Iterator[Counter]:
    """Bytes that this process receives from others inside the context, by the collective."""
    counts, inner = Counter(), []

    def counting(name: str, function):
        def call(*arguments, **options):
            if not inner:  # one collective may be made of another
                counts[name] += received(name, accelerator.num_processes,
                                         accelerator.process_index, arguments, options)
            inner.append(name)
            try:
                return function(*arguments, **options)
            finally:
                inner.pop()
        return call

    with ExitStack() as stack:
        for name in ("all_gather", "all_gather_into_tensor", "all_reduce", "broadcast",
                     "all_to_all_single"):
            function = counting(name, getattr(distributed, name))
            for module in (distributed, distributed.distributed_c10d):
                stack.enter_context(mock.patch.object(module, name, function))
        yield counts


def start_processes(processes: int, function: Callable, *arguments) -> None:
    """Call a function in so many copies of this process, which Accelerate takes for its ranks.
    Raises SystemExit if one of them fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        torch.set_num_threads(1)
        function(*arguments)
        done.wait()  # gloo can hang in a process that ends after others
        os._exit(0)  # and in its own shutdown

    context = multiprocessing.get_context("fork")
    done = context.Barrier(processes)
    ranks = [context.Process(target=run, args=[rank]) for rank in range(processes)]
    for process in ranks:
        process.start()
    alive = ranks
    while alive:
        wait([process.sentinel for process in alive])
        alive = [process for process in alive if process.is_alive()]
        if any(process.exitcode for process in ranks):  # the others would wait for it
            for process in ranks:
                process.kill()
            raise SystemExit("error: one of the processes failed, see above")


def measure(length: int, groups: int, overrides: list[str], out: str) -> None:
    """In each process: take steps; the main process writes to `out` what all received together, and
    the responses' own bytes."""
    with redirect_stdout(sys.stderr):
        state, data = make_state(f"run_dir={out}.run", f"data.train_batch_size={groups}",
                                 "actor.max_tokens_per_micro_batch=32768", "val.file=",
                                 "filter_groups.enable=false", *overrides)
    accelerator, own, make_samples = state.accelerator, [], train_dapo.make_samples
    if accelerator.is_main_process:
        Path(f"{out}.run/rollouts").mkdir(parents=True)

    def generate(prompts, seeds, params, progress=""):
        made = []
        for seed in seeds:
            rng, group = np.random.default_rng(seed), []
            for size in np.clip(rng.exponential(length, params.n), 4, 8 * length).astype(int):
                text = "abc " * (size - 3) + f"Answer:{rng.integers(10)}"
                group.append(Response(rng.integers(0, 20, size, np.int32),
                                      rng.normal(size=size).astype(np.float32), text,
                                      "stop" if size < 8 * length else "length"))
            made.append(group)
        return made

    def count_own(config, trained, advantages):
        samples = make_samples(config, trained, advantages)
        own.extend(8 * len(sample.response_ids) for sample in samples)
        return samples

    def no_logprobs(model, batch, temperature):
        return torch.zeros(batch["mask"].shape), None

    state = replace(state, engine=replace(state.engine, generate=generate))
    state.config.total_training_steps, state.config.data.max_response_length = STEPS, 8 * length
    nothing = {"update_policy": lambda *_: None, "sync_weights": lambda _: None,
               "save_results": lambda *_: False}
    with (mock.patch.multiple(train_dapo, make_samples=count_own, **nothing),
          mock.patch.object(infra.logprobs, "response_logprobs", no_logprobs),
          count_bytes(accelerator) as counts):
        train_dapo.train(state, data, Progress())
    total = int(accelerator.reduce(torch.tensor(sum(counts.values()))))
    if accelerator.is_main_process:
        Path(out).write_text(json.dumps([sum(own) // STEPS, total // STEPS]))


def main() -> None:
    """Measure each length in each number of processes, print the table and whether the goal is met.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--lengths", nargs="+", type=int, default=[500, 25], help="mean, in tokens")
    parser.add_argument("--groups", type=int, default=32, help="prompts a step")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args()
    print("| processes | mean length | the responses' own bytes a step | exchanged | ratio |\n"
          "|---|---|---|---|---|")
    ratios = []
    for length in args.lengths:
        for processes in args.processes:
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder, "bytes.json")
                start_processes(processes, measure, length, args.groups, args.overrides, str(out))
                own, exchanged = json.loads(out.read_text())
            print(f"| {processes} | {length} | {own:,} | {exchanged:,} | {exchanged / own:.2f} |",
                  flush=True)
            if length == max(args.lengths):
                ratios.append(exchanged / own)
    print(f"\nat {max(args.lengths)} tokens at most {max(ratios):.2f} times the responses' own "
          f"bytes (goal {GOAL})")
    sys.exit(max(ratios) > GOAL)


if __name__ == "__main__":
    main()
