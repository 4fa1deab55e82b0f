"""How many bytes do ranks exchange for a step's responses, beside those of the responses themselves?

    python bench/exchange.py [--processes 2 4 8] [--lengths 500 25] [--groups 32] [key.sub=value ...]

Steps of `train_dapo.train` in several processes over gloo, with random responses of a mean length
in the place of an engine's, and without a model's work: all else runs as it does in a run, the
saving of rollouts too. What each process receives from others is counted where tensors are handed
to torch.distributed. A token's own bytes are 8, an id and a log-prob; each response is trained on
one rank, which needs one copy.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import distributed

ROOT, GOAL, STEPS = Path(__file__).parent.parent, 1.3, 2


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


def measure(length: int, groups: int, overrides: list[str]) -> None:
    """In each process: take steps, and print what all received together, on the main process."""
    from harness import make_state

    import infra.logprobs
    import train_dapo
    from infra.checkpoint import Progress
    from rollout import Response

    with tempfile.TemporaryDirectory() as folder:
        state, data = make_state(f"run_dir={folder}", f"data.train_batch_size={groups}",
                                 f"data.max_response_length={8 * length}", "val.file=",
                                 "actor.max_tokens_per_micro_batch=32768",
                                 "filter_groups.enable=false", *overrides)
        (Path(folder) / "rollouts").mkdir()
        own, rows, accelerator = Counter(), [], state.accelerator

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

        def no_logprobs(model, batch, temperature):
            return torch.zeros(batch["mask"].shape), None

        def make_samples(config, groups, advantages):
            samples = train(config, groups, advantages)
            own["bytes"] += 8 * sum(len(sample.response_ids) for sample in samples)
            return samples

        engine = replace(state.engine, generate=generate, sync=lambda _: None)
        state, train = replace(state, engine=engine), train_dapo.make_samples
        state.config.total_training_steps = STEPS
        with mock.patch.multiple(train_dapo, update_policy=lambda *_: None,
                                 sync_weights=lambda _: None, make_samples=make_samples,
                                 save_results=lambda *_: False), \
                mock.patch.object(infra.logprobs, "response_logprobs", no_logprobs), \
                count_bytes(accelerator) as counts:
            train_dapo.train(state, data, Progress())
        total = int(accelerator.reduce(torch.tensor(counts.total())))
        rows = {"own": own["bytes"] // STEPS, "exchanged": total // STEPS}
        if accelerator.is_main_process:
            print(json.dumps(rows), flush=True)
        accelerator.wait_for_everyone()
    os._exit(0)  # gloo's own shutdown sometimes hangs


def launch(processes: int, length: int, groups: int, overrides: list[str]) -> dict:
    """What `measure` finds in so many processes. Raises SystemExit if it fails."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file",
               str(ROOT / "configs/accelerate_ddp.yaml"), "--num_processes", str(processes),
               "--main_process_port", str(20_000 + os.getpid() % 20_000), __file__, "--measure",
               "--lengths", str(length), "--groups", str(groups), *overrides]
    result = subprocess.run(command, capture_output=True, text=True, check=False,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})
    if result.returncode or "{" not in result.stdout:
        raise SystemExit(f"error: {processes} processes: {result.stderr[-3000:]}")
    return json.loads(result.stdout[result.stdout.index("{"):].splitlines()[0])


def main() -> None:
    """Measure each length in each number of processes, print the table and whether the goal is met.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--lengths", nargs="+", type=int, default=[500, 25], help="mean, in tokens")
    parser.add_argument("--groups", type=int, default=32, help="prompts a step")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args()
    if args.measure:
        measure(args.lengths[0], args.groups, args.overrides)
    print("| processes | mean length | the responses' own bytes a step | exchanged | ratio |\n"
          "|---|---|---|---|---|")
    ratios = []
    for length in args.lengths:
        for processes in args.processes:
            found = launch(processes, length, args.groups, args.overrides)
            ratio = found["exchanged"] / found["own"]
            print(f"| {processes} | {length} | {found['own']:,} | {found['exchanged']:,} | "
                  f"{ratio:.2f} |", flush=True)
            if length == max(args.lengths):
                ratios.append(ratio)
    print(f"\nat {max(args.lengths)} tokens at most {max(ratios):.2f} times the responses' own "
          f"bytes (goal {GOAL})")
    sys.exit(max(ratios) > GOAL)


if __name__ == "__main__":
    main()
