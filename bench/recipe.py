"""Minutes from the command of a recipe to a held-out accuracy, for several seeds.

    python bench/recipe.py [--seeds 0 1 2] [--config configs/smollm2_135m_sums.yaml]
        [--accuracy 0.8] [--minutes 3] [key.sub=value ...]

The data and, if the package is installed, the model of the default recipe are made first (see
examples/sums/prepare.py). Prints a table in Markdown, and exits with 1 if a goal is missed."""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
SUMS = "configs/smollm2_135m_sums.yaml"


def accuracies(run_dir: Path) -> dict[int, float]:
    """The accuracy of each validation so far, by step."""
    file, found = run_dir / "metrics.jsonl", {}
    lines = file.read_text().splitlines() if file.exists() else []
    for row in map(json.loads, lines):
        for name, value in row.items():
            if name.startswith("val/") and "/avg@" in name:
                found[row["step"]] = value
    return found


def run(config: str, seed: int, overrides: list[str], wanted: float, folder: Path) -> list[float]:
    """Accuracy before and after; the step, and the seconds since the command, at which a validation
    first reached the wanted one (nan: none did); seconds in all."""
    run_dir, start, reached = folder / "run", time.perf_counter(), (math.nan, math.nan)
    command = ["accelerate", "launch", "train_dapo.py", "--config", config, f"run_dir={run_dir}",
               f"seed={seed}", *overrides]
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        while process.poll() is None:
            time.sleep(0.2)
            above = [step for step, value in accuracies(run_dir).items() if value > wanted]
            if above and math.isnan(reached[0]):
                reached = min(above), time.perf_counter() - start
    if process.returncode:
        raise SystemExit((folder / "log.txt").read_text()[-2000:])
    found = accuracies(run_dir)
    return [found[0], found[max(found)], *reached, time.perf_counter() - start]


def main() -> None:
    """Run, print the table and whether the goal is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=SUMS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--accuracy", type=float, default=0.8)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    args, slowest = parser.parse_intermixed_args(), 0.0
    if args.config == SUMS and not (ROOT / "examples/sums/base").exists():
        subprocess.run([sys.executable, "examples/sums/prepare.py", "--model"], cwd=ROOT,
                       check=True)
    overrides = ["model.path=examples/sums/base"] * (args.config == SUMS) + args.overrides
    print(f"| seed | accuracy before | after | step above {args.accuracy} | minutes to it | "
          "minutes in all |\n|---|---|---|---|---|---|", flush=True)
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            before, after, step, seconds, total = run(args.config, seed, overrides, args.accuracy,
                                                      Path(folder))
        slowest = math.inf if math.isnan(seconds) else max(slowest, seconds / 60)
        print(f"| {seed} | {before:.3f} | {after:.3f} | {step:.0f} | {seconds / 60:.1f} | "
              f"{total / 60:.1f} |", flush=True)
    print(f"\nminutes to an accuracy above {args.accuracy}, slowest seed: {slowest:.1f} (goal "
          f"{args.minutes:g})")
    sys.exit(slowest > args.minutes)


if __name__ == "__main__":
    main()
