"""Does a step of sixteen times as many responses take more than sixteen times as long?

    python bench/scaling.py [--rounds 3] [--sizes 256 1024 4096] [key.sub=value ...]

Whole steps of the embedded task without the filter: 256 responses, and 4,096, in turn; mini-batches
of the same size, so that there are sixteen times as many updates too. The policy hardly learns (lr
1e-9), so that all steps are alike.
"""

import argparse
import statistics
import sys
import tempfile

from harness import make_state, train

from data_types import Progress

GOAL, SIZES = 1.05, (256, 1024, 4096)


def main() -> None:
    """Time each size in turn, print the table and whether the goal is met."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="responses per step")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args()
    runs, rows = {}, {size: [] for size in args.sizes}
    with tempfile.TemporaryDirectory() as folder:
        for size in args.sizes:
            runs[size] = (*make_state(
                f"run_dir={folder}/run", "actor.lr=1e-9", "filter_groups.enable=false", "val.file=",
                f"data.train_batch_size={size // 16}", *args.overrides), Progress())

    def take_steps(size: int, count: int) -> list[dict]:
        state, data, progress = runs[size]
        state.config.total_training_steps = progress.counters["step"] + count
        return train(state, data, progress)

    for size in args.sizes:
        take_steps(size, 1)  # to warm up
    for _ in range(args.rounds):
        for size in args.sizes:  # short steps are timed more often
            rows[size] += take_steps(size, max(1, max(args.sizes) // (4 * size)))
    print("| responses | seconds a step, median (least to most) | generate | logprobs | update | "
          "ms a response |\n|---|---|---|---|---|---|")
    per_response = {}
    for size, found in rows.items():
        median = {name: statistics.median(row[f"time/{name}"] for row in found)
                  for name in ("step", "generate", "logprobs", "update")}
        per_response[size] = median["step"] / size
        times = [row["time/step"] for row in found]
        print(f"| {size:,} | {median['step']:.2f} ({min(times):.2f} to {max(times):.2f}) | "
              f"{median['generate']:.2f} | {median['logprobs']:.2f} | {median['update']:.2f} | "
              f"{1e3 * per_response[size]:.2f} |")
    least, most = min(args.sizes), max(args.sizes)
    ratio = per_response[most] / per_response[least]
    print(f"\na step of {most:,} responses: {ratio:.2f} of {most // least} steps of {least} "
          f"(goal {GOAL})")
    sys.exit(ratio > GOAL)


if __name__ == "__main__":
    main()
