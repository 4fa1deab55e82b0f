"""How many responses are generated for each that is trained, against as many as are needed.

    python bench/waste.py [--steps 200] [--real-steps 30]

`sampling.generation_batch_size` with `data.gen_batch_size=auto`, in the loop of `train_dapo.train`
without a model: groups are kept with a known probability, the same in all steps or falling from 0.9
to 0.2. Then the embedded task for real, with the share that each step kept. The goal is about all
steps, the first ones included.
"""

import argparse
import sys
import tempfile
from contextlib import redirect_stdout
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

from harness import make_state, train

import train_dapo
from data_types import Data, Prompt, Response, Score
from infra.config import load_config
from infra.rng import make_rng

GOAL, N = 1.2, 2


def simulate(size: int, shares: list[float], seed: int = 0) -> tuple[float, float]:
    """The excess of a run whose steps keep these shares, and its generation batches per step."""
    config = load_config("config.yaml", [
        f"data.train_batch_size={size}", f"rollout.n={N}", "actor.ppo_mini_batch_size=2",
        f"total_training_steps={len(shares)}", "data.gen_batch_size=auto"])
    response = Response(np.zeros(1, np.int32), np.zeros(1, np.float32), "", "stop")

    def generate(state, prompts, params, stream, description):
        return [[response] * N for _ in prompts]

    def score_responses(state, prompts, responses, description):
        share, scores = shares[int(description.removeprefix("step ")) - 1], []
        for _ in prompts:
            kept = make_rng(seed, "kept", next(counter)).random() < share
            scores.append([Score(1.0, 1.0), Score(0.0, -1.0) if kept else Score(1.0, 1.0)])
        return scores

    counter = iter(range(10**9))
    accelerator = SimpleNamespace(is_main_process=False, scaler=None, device=torch.device("cpu"),
                                  check_trigger=lambda: False)
    state = SimpleNamespace(config=config, accelerator=accelerator, engine=mock.MagicMock(),
                            optimizer=mock.MagicMock())
    with mock.patch.multiple(train_dapo, generate=generate, score_responses=score_responses,
                             add_logprobs=lambda state, batches: batches,
                             update_policy=lambda *_: None, sync_weights=lambda _: None):
        rows = train(state, Data([Prompt(0, "", [1], "", {})] * 1000, {}))
    return excess(rows, shares), float(np.mean([row["gen_batches"] for row in rows]))


def excess(rows: list[dict], shares: list[float]) -> float:
    """Responses generated, against those trained divided by the share that was kept."""
    generated = sum(row["responses/generated"] for row in rows)
    needed = 0
    for row, share in zip(rows, shares, strict=True):
        needed += (row["responses/generated"] - row["responses/wasted"]) / share
    return generated / needed


def embedded(steps: int) -> tuple[float, float, float]:
    """The same of a real run, and the mean share that it kept."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        rows = train(*make_state(f"run_dir={folder}/run", "val.file=",
                                 f"total_training_steps={steps}"))
    shares = [row["groups/kept"] for row in rows]
    batches = float(np.mean([row["gen_batches"] for row in rows]))
    return excess(rows, shares), batches, float(np.mean(shares))


def main() -> None:
    """Simulate, run, print the table and whether the goal is met."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--real-steps", type=int, default=30)
    args = parser.parse_args()
    cases = {f"{share}": [share] * args.steps for share in (0.2, 0.3, 0.5, 0.7, 0.9)}
    cases["0.9 to 0.2"] = np.linspace(0.9, 0.2, args.steps).tolist()
    print("| share kept | train_batch_size | generated per trained, times the share | generation "
          "batches per step |\n|---|---|---|---|")
    worst = 0.0
    for size in (32, 512):
        for name, shares in cases.items():
            ratio, batches = simulate(size, shares)
            worst = max(worst, ratio)
            print(f"| {name} | {size} | {ratio:.3f} | {batches:.2f} |", flush=True)
    if args.real_steps:
        ratio, batches, share = embedded(args.real_steps)
        worst = max(worst, ratio)
        print(f"| the embedded task, {share:.2f} on average | 32 | {ratio:.3f} | {batches:.2f} |")
    print("\nresponses generated per response trained, times the share kept: at most "
          f"{worst:.3f} (goal {GOAL})")
    sys.exit(worst > GOAL)


if __name__ == "__main__":
    main()
