"""Whether two checkouts are the same algorithm to the bit, as after a refactoring.

    python bench/equality.py OLD NEW [--steps 5] [--processes 2] [key.sub=value ...]

OLD and NEW are directories of clones. Each runs its embedded task (`config.yaml` and the overrides)
with seed 0; then responses, rewards, advantages, metrics (losses among them; times aside) and final
weights are compared for equality. Metrics may have another name in NEW (`RENAMED`); names that only
one side has are listed, and are no difference. Exits with 1 on any difference.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

RENAMED = {  # a metric's name in OLD: its name in NEW
    "actor/clip_up": "actor/clip_frac_high",
    "actor/clip_down": "actor/clip_frac_low",
    "actor/clip_dual": "actor/clip_frac_dual",
    "actor/clip_up_prob": "actor/clip_high_prob",
    "actor/kl": "actor/approx_kl",
    "actor/rollout_diff": "actor/mismatch_abs",
    "actor/rollout_kl": "actor/mismatch_kl",
    "actor/rollout_max_ratio": "actor/importance_ratio_max",
    "actor/rollout_truncated": "actor/importance_ratio_clip_frac",
    "skipped_in_a_row": "consecutive_skips",
    "groups/kept_lately": "ema_groups_kept",
    "groups/drawn_lately": "ema_groups_generated"}
RESPONSE = ("position", "prompt", "answer", "response", "tokens", "finish_reason", "acc", "score",
            "reward", "final_reward", "advantage")


def run(checkout: str, run_dir: Path, processes: int, overrides: list[str]) -> None:
    """Train in a checkout. Raises SystemExit with the end of its output if that fails."""
    launcher = ["-m", "torch.distributed.run", "--master-port=29561",
                f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, "train_dapo.py", "--config", "config.yaml",
               f"run_dir={run_dir}", "seed=0", "save_rollouts=100000", *overrides]
    result = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"error: {checkout}: {result.stderr[-2000:]}")


def read_rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def compare(old: Path, new: Path) -> tuple[list[str], list[str]]:
    """What differs between two runs' directories, and the metrics that only one of them has."""
    differences, lacking, counts = [], set(), {"responses": 0, "values": 0}
    for file in sorted({path.name for path in [*old.glob("rollouts/step_*"),
                                           *new.glob("rollouts/step_*")]}):
        files = [run_dir / "rollouts" / file for run_dir in (old, new)]
        rows, others = (read_rows(path) if path.exists() else [] for path in files)
        if len(rows) != len(others):
            differences.append(f"rollouts/{file}: {len(rows)} and {len(others)} responses")
        for name in RESPONSE:
            pairs = [(a[name], b[name]) for a, b in zip(rows, others, strict=False)]
            unequal = sum(a != b for a, b in pairs)
            if unequal:
                differences.append(f"rollouts/{file}: {name} of {unequal} responses")
        counts["responses"] += len(rows)
    rows, others = read_rows(old / "metrics.jsonl"), read_rows(new / "metrics.jsonl")
    if [row["step"] for row in rows] != [row["step"] for row in others]:
        differences.append("metrics.jsonl: other steps")
    for row, other in zip(rows, others, strict=False):
        row = {name if name in other else RENAMED.get(name, name): value
               for name, value in row.items()}
        lacking |= row.keys() ^ other.keys()
        for name in sorted(row.keys() & other.keys()):
            if not name.startswith(("time/", "memory/", "tokens_per_s/")):
                counts["values"] += 1
                if row[name] != other[name]:
                    differences.append(f"step {row['step']}: {name} {row[name]} and {other[name]}")
    weights = [path / "model/model.safetensors" for path in (old, new)]
    if weights[0].read_bytes() != weights[1].read_bytes():
        differences.append("model/model.safetensors")
    if not all(counts.values()):
        differences.append(f"nothing to compare: {counts}")
    return differences, sorted(lacking)


def main() -> None:
    """Run both, compare, say which it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", help="directory of a clone")
    parser.add_argument("new", help="directory of a clone")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    args = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        run_dirs = [Path(folder, "old"), Path(folder, "new")]
        for checkout, run_dir in zip((args.old, args.new), run_dirs, strict=True):
            run(checkout, run_dir, args.processes,
                [f"total_training_steps={args.steps}", *args.overrides])
        differences, lacking = compare(*run_dirs)
    for difference in differences[:20]:
        print(f"differs: {difference}")
    if lacking:
        print(f"metrics of one side only: {', '.join(lacking)}")
    verdict = "different" if differences else "the same to the bit"
    print(f"{args.steps} steps, {args.processes} processes, {len(differences)} differences in "
          f"responses, advantages, metrics and weights (goal 0): {verdict}")
    sys.exit(bool(differences))


if __name__ == "__main__":
    main()
