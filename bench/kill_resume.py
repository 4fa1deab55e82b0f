"""Kill -9 a run of the embedded task at random moments, saving included; it must end as if nothing
had happened.

    python bench/kill_resume.py [--kills 20] [--seed 0] [key.sub=value ...]   8 minutes on 2 cores

Compares the finished run, resumed after each kill, with an uninterrupted one: metrics.jsonl (times
aside), rollout files and final weights must be identical. Exits with 1 on any difference."""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parent.parent
MOMENTS = ("anywhere", "in a step", "while saving")


def start(run_dir: Path, overrides: list[str], log) -> subprocess.Popen:
    """The trainer as a process of its own: the launcher would be killed in its place."""
    return subprocess.Popen([sys.executable, "train_dapo.py", "--config", "config.yaml",
                             f"run_dir={run_dir}", "save_every=1", *overrides], cwd=ROOT,
                            stdout=log, stderr=log)


def rows(run_dir: Path) -> list[dict]:
    """The whole rows of metrics.jsonl, without what depends on the clock."""
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [{name: value for name, value in json.loads(line).items()
             if not name.startswith(("time/", "memory/", "tokens_per_s/"))}
            for line in lines if line.endswith("\n")]


def wait_for(moment: str, process: subprocess.Popen, run_dir: Path, rng: random.Random) -> None:
    """Return when it is time to kill, or the process has ended."""
    target = len(rows(run_dir)) + rng.choice((1, 2))
    end = time.perf_counter() + rng.uniform(0, 9)
    while process.poll() is None:
        if moment == "anywhere" and time.perf_counter() > end:
            return
        if moment == "in a step" and len(rows(run_dir)) >= target:
            time.sleep(rng.uniform(0, 0.3))
            return
        if moment == "while saving" and half_written(run_dir):
            time.sleep(rng.uniform(0, 0.02))
            return
        time.sleep(0.002)


def half_written(run_dir: Path) -> bool:
    """Whether a checkpoint is being saved, or was when the process died."""
    return any((run_dir / "checkpoints").glob(".step_*.partial"))


def run_differences(straight: Path, broken: Path) -> list[str]:
    """What is not identical in two runs' directories."""
    found = [] if rows(straight) == rows(broken) else ["metrics.jsonl"]
    files = {path.relative_to(straight) for path in [*straight.glob("rollouts/*"),
                                                     *straight.glob("model/*")]}
    others = {path.relative_to(broken) for path in [*broken.glob("rollouts/*"),
                                                    *broken.glob("model/*")]}
    unequal = [file for file in files & others
               if (straight / file).read_bytes() != (broken / file).read_bytes()]
    return found + sorted(map(str, files ^ others)) + sorted(map(str, unequal))


def kill_and_resume(folder: Path, kills: int, seed: int,
                    overrides: list[str]) -> tuple[list[str], Counter]:
    """The differences between the two runs, and how many kills hit it while saving or not."""
    rng, hit = random.Random(seed), Counter()
    straight, broken = folder / "straight", folder / "broken"
    with open(folder / "log.txt", "w") as log:
        assert start(straight, overrides, log).wait() == 0, f"see {folder / 'log.txt'}"
        last = rows(straight)[-1]["step"]
        for i in tqdm(range(kills), "kills", disable=kills < 5):
            if (broken / f"checkpoints/step_{last:05d}").exists():
                break
            process, moment = start(broken, overrides, log), MOMENTS[i % len(MOMENTS)]
            wait_for(moment, process, broken, rng)
            alive = process.poll() is None
            process.kill()
            process.wait()
            hit["while saving" if half_written(broken) else "elsewhere"] += alive
        finished = (broken / f"checkpoints/step_{last:05d}").exists()
        if not finished and start(broken, overrides, log).wait() != 0:
            return ["the last start, which did not end well"], hit
    return run_differences(straight, broken), hit


def main() -> None:
    """Run, compare, say so."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found, hit = kill_and_resume(Path(folder), args.kills, args.seed, args.overrides)
        for name in found:
            print(f"differs: {name}\n{(Path(folder) / 'log.txt').read_text()[-2000:]}")
    count = sum(hit.values())
    print(", ".join(f"{number} {moment}" for moment, number in hit.items()))
    print(f"{count} kills, {len(found)} differences (goal: {args.kills} and 0)")
    sys.exit(bool(found) or count < args.kills)


if __name__ == "__main__":
    main()
