"""The update of a step against a bare forward and backward pass over as many tokens.

    python bench/update_vs_bare.py [--rounds 7] [key.sub=value ...]

Real tokens a second, in turn. Ours: `train_dapo.update`'s update phase, on a step's real responses, with padding,
clipping, statistics, and optimizer steps. Bare: the same tokens cut into rows of the mean length, so that nothing is
padded, in batches of as many tokens; cross-entropy, no optimizer.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
GOAL = 0.85


def bare(run, samples) -> float:
    """Tokens a second of forward and backward passes without padding and without RL."""
    stream = torch.cat([torch.tensor([*s.prompt_ids, *s.response_ids.tolist()]) for s in samples])
    length = round(len(stream) / len(samples))
    rows = stream[:len(stream) // length * length].view(-1, length).to(run.accelerator.device)
    batches = rows.split(max(1, run.config.actor.max_tokens_per_micro_batch // length))
    run.policy.zero_grad()
    finish()
    start = time.perf_counter()
    for ids in batches:
        with run.accelerator.autocast():
            logits = run.policy(input_ids=ids, use_cache=False).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        run.accelerator.backward(loss)
    finish()
    seconds = time.perf_counter() - start
    run.policy.zero_grad()
    return rows.numel() / seconds


def finish() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ours(run, samples) -> float:
    """Tokens a second of the update phase."""
    from train_dapo import Timer, update
    timer = Timer()
    update(run, samples, 1, timer)
    finish()
    return timer.metrics()["tokens_per_s/update"]


def main() -> None:
    """Measure both in turn; print medians, spread and whether the goal is met."""
    from config import load_config
    from losses import group_advantages
    from run import set_up, sync_weights
    from sampling import draw_prompts
    from train_dapo import Timer, make_samples, write_groups
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args()
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        config = load_config("config.yaml", [f"run_dir={folder}/run", "actor.lr=1e-9", *args.overrides])
        run, (prompts,) = set_up(config, (config.data.train_file, 0))
    sync_weights(run)
    groups = write_groups(run, draw_prompts(prompts, 0, config.data.train_batch_size, 0), 1, Timer())
    rewards = torch.tensor([group.final_rewards for group in groups], dtype=torch.float64)
    samples = make_samples(config, groups, group_advantages(rewards))
    for way in (ours, bare):  # to warm up
        way(run, samples)
    found = [(ours(run, samples), bare(run, samples)) for _ in range(args.rounds)]
    print("| way | tokens/s, median | least and most |\n|---|---|---|")
    for name, rates in zip(("ours", "bare"), zip(*found, strict=True), strict=True):
        print(f"| {name} | {statistics.median(rates):,.0f} | {min(rates):,.0f} to {max(rates):,.0f} |")
    ratio = statistics.median(a / b for a, b in found)
    print(f"update {ratio:.2f} of bare (goal {GOAL})")
    raise SystemExit(ratio < GOAL)


if __name__ == "__main__":
    main()
