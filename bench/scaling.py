"""Does a step of sixteen times as many responses take more than sixteen times as long?

    python bench/scaling.py [--rounds 3] [key.sub=value ...]

Whole steps of the embedded task without the filter: 256 responses, and 4,096, in turn; mini-batches of the same size,
so that there are sixteen times as many updates too. The policy hardly learns (lr 1e-9), so that each step is alike.
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
GOAL, SIZES = 1.05, (256, 1024, 4096)


def main() -> None:
    """Time each size in turn, print the table, judge."""
    from infra.config import load_config
    from infra.setup import setup, sync_weights
    from train_dapo import train
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args()
    os.chdir(ROOT)
    streams = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in SIZES:
            config = load_config("config.yaml", [
                f"run_dir={folder}/run", "actor.lr=1e-9", "filter_groups.enable=false", "total_training_steps=1000",
                f"data.train_batch_size={size // 16}", *args.overrides])
            run, data = setup(config)
            sync_weights(run)
            streams[size] = train(run, data.train, Counter())
            next(streams[size])  # to warm up
    repeats = {size: max(1, 1024 // size) for size in SIZES}  # a short step is timed more often
    rows = {size: [] for size in SIZES}
    for _ in range(args.rounds):
        for size, stream in streams.items():
            rows[size] += [next(stream)[0] for _ in range(repeats[size])]
    print("| responses | seconds a step, median (least to most) | generate | logprobs | update | ms a response |\n"
          "|---|---|---|---|---|---|")
    per_response = {}
    for size, found in rows.items():
        median = {name: statistics.median(row[f"time/{name}"] for row in found)
                  for name in ("step", "generate", "logprobs", "update")}
        per_response[size] = median["step"] / size
        times = [row["time/step"] for row in found]
        print(f"| {size:,} | {median['step']:.2f} ({min(times):.2f} to {max(times):.2f}) | {median['generate']:.2f} | "
              f"{median['logprobs']:.2f} | {median['update']:.2f} | {1e3 * per_response[size]:.2f} |")
    ratio = per_response[SIZES[-1]] / per_response[SIZES[0]]
    print(f"\na step of {SIZES[-1]:,} responses: {ratio:.2f} of {SIZES[-1] // SIZES[0]} steps of {SIZES[0]} "
          f"(goal {GOAL})")
    sys.exit(ratio > GOAL)


if __name__ == "__main__":
    main()
