"""A long run in small: do memory, open files, threads, disk and time per step stay as they were?

    python bench/endurance.py [--steps 2000] [--window 200] [key.sub=value ...]

Trains the embedded task with the smallest batch and compares the last steps with the first ones,
those after a warm-up of 50 left out: the median of the process's memory, files and threads, and of
the seconds of a step; and what a step adds to the run's directory. Exits with 1 if one has grown by
more than 5%.
"""

import argparse
import json
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from statistics import median

import psutil
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
SMALLEST = ["data.train_batch_size=2", "rollout.n=2", "actor.ppo_mini_batch_size=4",
            "filter_groups.enable=false", "val.max_prompts=2", "val.n=1", "val.every=100",
            "data.max_response_length=32", "save_every=100", "actor.lr=1e-12"]
WARM_UP, GOAL = 50, 0.05


def sample(process: psutil.Process) -> dict[str, float]:
    """What a process holds now."""
    with process.oneshot():
        return {"memory, MB": process.memory_info().rss / 1e6, "open files": process.num_fds(),
                "threads": process.num_threads()}


def size_of(run_dir: Path) -> float:
    """The kB of a run's directory, checkpoints apart, of which the newest two stay."""
    files = [path for path in run_dir.rglob("*") if path.is_file()
             and not {"checkpoints", "model_best", "model"} & set(path.parts)]
    return sum(path.stat().st_size for path in files) / 1e3


def main() -> None:
    """Run, print the table and whether the goal is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--window", type=int, default=200)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    args, samples, sizes = parser.parse_intermixed_args(), [], []
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/log", "w+") as log:
        run_dir = Path(folder, "run")
        command = [sys.executable, "train_dapo.py", "--config", "config.yaml", f"run_dir={run_dir}",
                   f"total_training_steps={args.steps}", *SMALLEST, *args.overrides]
        process = psutil.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        file, bar = run_dir / "metrics.jsonl", tqdm(total=args.steps, desc="steps")
        while process.poll() is None:
            time.sleep(0.5)
            step = file.read_bytes().count(b"\n") - 1 if file.exists() else 0
            bar.update(step - bar.n)
            if step > 0:
                with suppress(psutil.Error, OSError):  # it has ended, or renames a checkpoint
                    samples.append((step, sample(process)))
                    if not sizes or step >= sizes[-1][0] + args.window / 4:  # it takes time
                        sizes.append((step, size_of(run_dir)))
        if process.returncode:
            log.seek(0)
            raise SystemExit(log.read()[-2000:])
        rows = [json.loads(line) for line in file.read_text().splitlines()][1:]
    first, last = (range(start, start + args.window) for start in
                   (WARM_UP, args.steps - args.window))
    values = {}
    for name in ("memory, MB", "open files", "threads"):
        values[name] = [median(found[name] for step, found in samples if step in steps)
                        for steps in (first, last)]
    values["seconds of a step"] = [median(row["time/step"] for row in rows if row["step"] in steps)
                                   for steps in (first, last)]
    values["kB that a step writes"] = []
    for steps in (first, last):
        inside = [(step, size) for step, size in sizes if step in steps]
        (start, before), (end, after) = inside[0], inside[-1]
        values["kB that a step writes"].append((after - before) / (end - start))
    print(f"| | steps {first[0]} to {first[-1]} | {last[0]} to {last[-1]} | change |\n"
          "|---|---|---|---|")
    changes = {name: late / early - 1 for name, (early, late) in values.items()}
    for name, (early, late) in values.items():
        print(f"| {name} | {early:.4g} | {late:.4g} | {changes[name]:+.1%} |")
    worst = max(changes.values())
    print(f"\n{args.steps} steps, the largest growth {worst:+.1%} (goal at most {GOAL:.0%})")
    sys.exit(worst > GOAL)


if __name__ == "__main__":
    main()
