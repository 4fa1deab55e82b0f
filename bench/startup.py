"""Seconds from the command to the first response of the embedded task, and where they go.

    python bench/startup.py [--rounds 5] [key.sub=value ...]

Each round is a fresh clone with two runs of the command: the first compiles the clone's files. The
first response is ready when the first batch of the validation before training is decoded; the run
is stopped there. `accelerate launch` starts this file instead of train_dapo.py, with `--run`.

Prints a table in Markdown, and exits with 1 if the goal is missed.
"""

import os
import sys
import time

STAGES = ("launcher", "imports", "setup", "first generation")
GOAL = 8.0  # seconds on 2 idle cores


def run_until_first_response(times_file: str) -> None:
    """`train_dapo.main` up to there; writes when each stage ended to a file."""
    times = [time.time()]  # its own imports are those of train_dapo
    sys.path.insert(0, os.getcwd())
    import train_dapo
    times.append(time.time())
    import evaluate
    import rollout
    generate, make_responses = evaluate.generate, rollout.make_responses

    def start_generation(*args):
        times.append(time.time())
        return generate(*args)

    def end_generation(*args):
        responses = make_responses(*args)
        if len(times) == len(STAGES) - 1:  # not those of the check that weights are in sync
            with open(times_file, "w") as file:
                file.write(" ".join(map(str, [*times, time.time()])))
            os._exit(0)
        return responses
    evaluate.generate, rollout.make_responses = start_generation, end_generation
    train_dapo.main()


def measure(clone: str, run_dir: str, overrides: list[str]) -> list[float]:
    """The seconds of each stage of one run."""
    import subprocess
    from itertools import pairwise
    start, times_file = time.time(), f"{run_dir}.txt"
    command = ["accelerate", "launch", os.path.abspath(__file__), "--run", times_file, "--config",
               "config.yaml", f"run_dir={run_dir}", *overrides]
    environment = os.environ | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    subprocess.run(command, cwd=clone, check=True, env=environment, stdout=subprocess.DEVNULL)
    with open(times_file) as file:
        return [end - begin for begin, end in pairwise([start, *map(float, file.read().split())])]


def main() -> None:
    """Measure, print the table and whether the goal is met."""
    import argparse
    import subprocess
    from pathlib import Path
    from statistics import median
    from tempfile import TemporaryDirectory
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    args, runs = parser.parse_intermixed_args(), {"first in a fresh clone": [], "again": []}
    for _ in range(args.rounds):
        with TemporaryDirectory() as folder:
            clone = f"{folder}/clone"
            subprocess.run(["git", "clone", "-q", Path(__file__).parent.parent, clone], check=True)
            for name, seconds in runs.items():
                run_dir = f"{folder}/run_{len(seconds)}_{name.split()[0]}"
                seconds.append(measure(clone, run_dir, args.overrides))
    print(f"| run | seconds, median (least to most) | {' | '.join(STAGES)} |\n|---|---|"
          + "---|" * len(STAGES))
    for name, seconds in runs.items():
        totals = [sum(stages) for stages in seconds]
        parts = " | ".join(f"{median(stage):.1f}" for stage in zip(*seconds, strict=True))
        spread = f"{median(totals):.1f} ({min(totals):.1f} to {max(totals):.1f})"
        print(f"| {name} | {spread} | {parts} |")
    worst = max(median(map(sum, seconds)) for seconds in runs.values())
    print(f"\nfrom the command to the first response: {worst:.1f} s (goal {GOAL:.0f})")
    sys.exit(worst > GOAL)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        file = sys.argv.pop(2)
        del sys.argv[1]
        run_until_first_response(file)
    else:
        main()
