"""The README's first command from a fresh clone, and naive GRPO beside it, for several seeds.

    python bench/embedded.py [--keep] [--seeds 0 1 2] [--here] [key.sub=value ...]

`--keep` puts the pictures of seed 0 into docs/. Each seed gets a clone and a virtual environment of
its own, with nothing cached by pip; with `--here`, this checkout and this environment.

Prints a table in Markdown, and exits with 1 if a goal is missed.
"""

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
NAIVE_GRPO = ("filter_groups.enable=false overlong_buffer.enable=false actor.clip_ratio_high=0.2 "
              "actor.loss_agg_mode=seq-mean-token-mean")
GOALS = {"before": 0.40, "after": 0.97, "length": 2.0, "seconds": 60}


def shell(command: str, clone: Path, folder: Path) -> float:
    """Run a command line in `clone`, its output to `folder/log.txt`; the seconds that it took."""
    environment = {key: value for key, value in os.environ.items()
                   if key not in ("VIRTUAL_ENV", "PYTHONPATH")}
    start = time.perf_counter()
    with open(folder / "log.txt", "a") as log:
        subprocess.run(["bash", "-c", command], cwd=clone, check=True, stdout=log, stderr=log,
                       env=environment | {"PIP_NO_CACHE_DIR": "1"})
    return time.perf_counter() - start


def read_run(run_dir: Path) -> dict[str, float]:
    """First and last validation of a run, and what it generated."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    first, last = rows[0], rows[-1]
    at_8 = [row["val/val/avg@4"] for row in rows if row["step"] == 8 and "val/val/avg@4" in row]
    return {"before": first["val/val/avg@4"], "after": last["val/val/avg@4"],
            "step 8": at_8[0] if at_8 else math.nan,
            "length before": first["val/val/response_length"],
            "length after": last["val/val/response_length"],
            "responses": sum(row.get("responses/generated", 0) for row in rows),
            "training s": sum(row.get("time/step", 0) for row in rows)}


def run_seed(seed: int, folder: Path, args: argparse.Namespace) -> tuple[dict, dict, float]:
    """DAPO's run and naive GRPO's, and the seconds that the first took, with the installation."""
    overrides = f"seed={seed} {shlex.join(args.overrides)}"
    launch = f"accelerate launch train_dapo.py --config config.yaml {overrides}"
    clone, prepare, activate, install = ROOT, "", "", ""
    if not args.here:
        clone = folder / "clone"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        prepare = f"{sys.executable} -m venv {folder}/venv"
        activate = f". {folder}/venv/bin/activate; "
        install = "pip install -r requirements.txt && "
    shell(prepare, clone, folder)
    seconds = shell(f"{activate}{install}{launch} run_dir={folder}/dapo", clone, folder)
    shell(f"{activate}{launch} run_dir={folder}/grpo {NAIVE_GRPO}", clone, folder)
    if args.keep and seed == 0:
        shell(f"{activate}cd {folder} && python {ROOT}/plot.py dapo grpo --out "
              f"{ROOT}/docs/dapo_grpo.png && cp dapo/curves.png {ROOT}/docs", clone, folder)
    return read_run(folder / "dapo"), read_run(folder / "grpo"), seconds


def main() -> None:
    """Run, print the table and whether the goals are met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--here", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    args, missed = parser.parse_intermixed_args(), []
    print("| | seed | avg@4 before | at step 8 | after | length before | after | responses "
          "generated | seconds in steps | minutes, installation included |\n"
          + "|---" * 10 + "|", flush=True)
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            dapo, grpo, seconds = run_seed(seed, Path(folder), args)
        for name, run in (("DAPO", dapo), ("naive GRPO", grpo)):
            minutes = f"{seconds / 60:.1f}" if run is dapo else ""
            print(f"| {name} | {seed} | {run['before']:.3f} | {run['step 8']:.3f} | "
                  f"{run['after']:.3f} | {run['length before']:.1f} | {run['length after']:.1f} | "
                  f"{run['responses']:.0f} | {run['training s']:.0f} | {minutes} |", flush=True)
        reached = {"before": dapo["before"] <= GOALS["before"],
                   "after": dapo["after"] >= GOALS["after"],
                   "length": dapo["length after"] >= GOALS["length"] * dapo["length before"],
                   "seconds": dapo["training s"] <= GOALS["seconds"]}
        missed += [f"seed {seed}: {name}" for name, ok in reached.items() if not ok]
    print(f"\ngoals: before at most {GOALS['before']}, after at least {GOALS['after']}, length "
          f"times {GOALS['length']}, {GOALS['seconds']} seconds in steps"
          + "".join(f"; missed: {name}" for name in missed))
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
