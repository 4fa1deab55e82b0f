"""How many responses are generated for each that trains? Against as many as there must be.

    python bench/waste.py [--steps 200] [--real-steps 30]

`train_dapo.train` itself, with `data.gen_batch_size=auto`, over groups that are kept with a known probability: the
same throughout, or falling from 0.9 to 0.2 in the course of the run; nothing is written or updated. Then the embedded
task for real, with the share that it kept in each step. The goal is judged over all steps, the first ones included.
"""

import argparse
import os
import sys
import tempfile
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
GOAL = 1.2


def simulate(size: int, shares: list[float], seed: int = 0) -> tuple[float, float]:
    """Responses generated for each trained, times the share that is kept; and generation batches a step."""
    import train_dapo
    from infra.config import load_config
    from reward import Score
    from rollout import Response
    from sampling import Group, Prompt, make_rng
    config = load_config("config.yaml", [f"data.train_batch_size={size}", "rollout.n=2", "actor.ppo_mini_batch_size=2",
                                         f"total_training_steps={len(shares)}", "data.gen_batch_size=auto"])
    response, prompt = Response(np.zeros(1, np.int32), np.zeros(1, np.float32), "", "stop"), Prompt(0, "", [1], "", {})

    def rollout_groups(run, batch, step, timer):
        kept = [make_rng(seed, "kept", position).random() < shares[step - 1] for position, _ in batch]
        return [Group(position, prompt, [response] * 2, [Score(1.0, 1.0), Score(float(not mixed), 1.0)], [1.0, 1.0],
                      [1.0, 1.0]) for (position, _), mixed in zip(batch, kept, strict=True)]
    train_dapo.rollout_groups, before = rollout_groups, train_dapo.rollout_groups
    train_dapo.update, update = lambda *_: {"updates": 1}, train_dapo.update
    try:
        run = SimpleNamespace(config=config, accelerator=SimpleNamespace(is_main_process=False))
        rows = [metrics for metrics, _, _ in train_dapo.train(run, [prompt] * 1000, Counter())]
    finally:
        train_dapo.rollout_groups, train_dapo.update = before, update
    return excess(rows, shares), float(np.mean([row["gen_batches"] for row in rows]))


def excess(rows: list[dict], shares: list[float]) -> float:
    """Responses generated, against those trained divided by the share that was kept."""
    generated = sum(row["responses/generated"] for row in rows)
    needed = sum((row["responses/generated"] - row["responses/wasted"]) / share
                 for row, share in zip(rows, shares, strict=True))
    return generated / needed


def embedded(steps: int) -> tuple[float, float, float]:
    """The same of a real run, and the share that it kept."""
    from infra.config import load_config
    from infra.setup import setup, sync_weights
    from train_dapo import train
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        config = load_config("config.yaml", [f"run_dir={folder}/run", f"total_training_steps={steps}"])
        run, data = setup(config)
        sync_weights(run)
        rows = [metrics for metrics, _, _ in train(run, data.train, Counter())]
    shares = [row["groups/kept"] for row in rows]
    return excess(rows, shares), float(np.mean([row["gen_batches"] for row in rows])), float(np.mean(shares))


def main() -> None:
    """Simulate, run, print the table, judge."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--real-steps", type=int, default=30)
    args = parser.parse_args()
    os.chdir(ROOT)
    cases = {f"{share}": [share] * args.steps for share in (0.2, 0.3, 0.5, 0.7, 0.9)}
    cases["0.9 to 0.2"] = np.linspace(0.9, 0.2, args.steps).tolist()
    print("| share kept | train_batch_size | generated per trained, times the share | generation batches a step |\n"
          "|---|---|---|---|")
    worst = 0.0
    for size in (32, 512):
        for name, shares in cases.items():
            ratio, batches = simulate(size, shares)
            worst = max(worst, ratio)
            print(f"| {name} | {size} | {ratio:.3f} | {batches:.2f} |", flush=True)
    if args.real_steps:
        ratio, batches, share = embedded(args.real_steps)
        worst = max(worst, ratio)
        print(f"| the embedded task, {share:.2f} in the mean | 32 | {ratio:.3f} | {batches:.2f} |")
    print(f"\nresponses generated per response trained, times the share kept: at most {worst:.3f} (goal {GOAL})")
    sys.exit(worst > GOAL)


if __name__ == "__main__":
    main()
