"""The README's first command from a fresh clone, and naive GRPO beside it, for seeds 0, 1 and 2.

    python bench/embedded.py [--keep]       about 20 minutes on 2 cores

`--keep` puts the pictures of seed 0 into docs/.

Each seed gets a clone and a virtual environment of its own, with nothing cached by pip. Prints a table in
Markdown, and exits with 1 where a goal is missed.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
NAIVE_GRPO = ("filter_groups.enable=false overlong_buffer.enable=false actor.clip_ratio_high=0.2 "
              "actor.loss_agg_mode=seq-mean-token-mean")
GOALS = {"before": 0.40, "after": 0.90, "length": 2.0, "minutes": 8.0}


def shell(command: str, folder: Path) -> float:
    """Run a command line in `folder`, its output to a log beside it; the seconds that it took."""
    environment = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "PYTHONPATH")}
    start = time.perf_counter()
    with open(folder.parent / "log.txt", "a") as log:
        subprocess.run(["bash", "-c", command], cwd=folder, check=True, stdout=log, stderr=log,
                       env=environment | {"PIP_NO_CACHE_DIR": "1"})
    return time.perf_counter() - start


def read_run(run_dir: Path) -> dict[str, float]:
    """First and last validation of a run, and what it generated."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    first, last = rows[0], rows[-1]
    return {"before": first["val/val/avg@4"], "after": last["val/val/avg@4"],
            "step 10": next(row["val/val/avg@4"] for row in rows if row["step"] == 10),
            "length before": first["val/val/response_length"], "length after": last["val/val/response_length"],
            "responses": sum(row.get("responses/generated", 0) for row in rows),
            "training s": sum(row.get("time/step", 0) for row in rows)}


def main() -> None:
    """Run, print, judge."""
    missed = []
    print("| | seed | avg@4 before | at step 10 | after | length before | after | responses generated | "
          "seconds in steps | minutes, install included |\n|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for seed in range(3):
        with tempfile.TemporaryDirectory() as folder:
            clone, activate = Path(folder) / "clone", "source ../venv/bin/activate && "
            subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
            shell(f"{sys.executable} -m venv ../venv", clone)
            launch = "accelerate launch train_dapo.py --config config.yaml"
            seconds = shell(f"{activate} pip install -r requirements.txt && {launch} seed={seed}", clone)
            dapo = read_run(clone / "runs/toy")
            shell(f"{activate} {launch} seed={seed} run_dir=runs/grpo {NAIVE_GRPO}", clone)
            grpo = read_run(clone / "runs/grpo")
            if "--keep" in sys.argv and seed == 0:
                shell(f"{activate} python plot.py runs/toy runs/grpo --out {ROOT / 'docs/dapo_grpo.png'}", clone)
                shell(f"cp runs/toy/curves.png {ROOT / 'docs/curves.png'}", clone)
        for name, run in (("DAPO", dapo), ("naive GRPO", grpo)):
            print(f"| {name} | {seed} | {run['before']:.3f} | {run['step 10']:.3f} | {run['after']:.3f} | "
                  f"{run['length before']:.1f} | {run['length after']:.1f} | {run['responses']:.0f} | "
                  f"{run['training s']:.0f} | {f'{seconds / 60:.1f}' if run is dapo else ''} |", flush=True)
        reached = {"before": dapo["before"] <= GOALS["before"], "after": dapo["after"] >= GOALS["after"],
                   "length": dapo["length after"] >= GOALS["length"] * dapo["length before"],
                   "minutes": seconds / 60 <= GOALS["minutes"]}
        missed += [f"seed {seed}: {name}" for name, ok in reached.items() if not ok]
    print(f"\ngoals: before at most {GOALS['before']}, after at least {GOALS['after']}, length times "
          f"{GOALS['length']}, {GOALS['minutes']} minutes" + "".join(f"; missed: {name}" for name in missed))
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
