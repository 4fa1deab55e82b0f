"""The update of a step against a bare forward and backward pass over as many tokens.

    python bench/update_vs_bare.py [--rounds 7] [key.sub=value ...]

Real tokens a second, in turn. Ours: `train_dapo.update`'s update phase, on a step's real responses, with clipping,
statistics, and optimizer steps. Bare: the same tokens cut into rows of the mean length, so that nothing is padded, in
batches of as many; cross-entropy, no optimizer. And, to see how much of the difference is what: bare passes over
the rows as they are, whose attention takes longer. Two models: the embedded task's, and one forty times as large.
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
    """Tokens a second of forward and backward passes without padding and without RL, all rows of the mean length."""
    stream = torch.cat([torch.tensor([*s.prompt_ids, *s.response_ids.tolist()]) for s in samples])
    length = round(len(stream) / len(samples))
    rows = stream[:len(stream) // length * length].view(-1, length).to(run.accelerator.device)
    actor = run.config.actor
    size = min(actor.max_tokens_per_micro_batch // length, actor.ppo_mini_batch_size)
    return passes(run, [(ids, {}) for ids in rows.split(size)])


def packed(run, samples) -> float:
    """The same of the rows as they are."""
    from sampling import micro_batches
    from train_dapo import make_batch
    actor = run.config.actor
    minis = [samples[i:i + actor.ppo_mini_batch_size] for i in range(0, len(samples), actor.ppo_mini_batch_size)]
    batches = [make_batch(run, mini, indices) for mini in minis
               for indices in micro_batches(mini, actor.max_tokens_per_micro_batch, packed=True)]
    return passes(run, [(batch["input_ids"], batch["packed"]) for batch in batches])


def passes(run, batches: list[tuple[torch.Tensor, dict]]) -> float:
    """Tokens a second, of cross-entropy and its gradients."""
    run.policy.zero_grad()
    finish()
    start = time.perf_counter()
    for ids, arguments in batches:
        with run.accelerator.autocast():
            logits = run.policy(input_ids=ids, use_cache=False, **arguments).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        run.accelerator.backward(loss)
    finish()
    seconds = time.perf_counter() - start
    run.policy.zero_grad()
    return sum(ids.numel() for ids, _ in batches) / seconds


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


def make_wide(folder: str) -> str:
    """A directory with an untrained model of the base model's kind, vocabulary and tokenizer, forty times as large."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    config = AutoConfig.from_pretrained("toy/base", hidden_size=320, intermediate_size=1280, num_hidden_layers=5,
                                        num_attention_heads=5, num_key_value_heads=5, head_dim=64)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained("toy/base").save_pretrained(folder)
    return folder


def make_run(path: str, overrides: list[str]):
    """A run with the model in `path`, and the prompts."""
    from infra.config import load_config
    from infra.setup import setup, sync_weights
    with tempfile.TemporaryDirectory() as folder:
        config = load_config("config.yaml", [f"run_dir={folder}/run", "actor.lr=1e-9", f"model.path={path}",
                                             *overrides])
        run, data = setup(config)
    sync_weights(run)
    return run, data.train


def main() -> None:
    """Measure both models, each in turn with and without RL; print medians, spread and whether the goal is met."""
    from losses import group_advantages
    from sampling import draw_prompts
    from train_dapo import Timer, make_samples, rollout_groups
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args()
    os.chdir(ROOT)
    run, prompts = make_run("toy/base", args.overrides)
    groups = rollout_groups(run, draw_prompts(prompts, 0, run.config.data.train_batch_size, 0), 1, Timer())
    rewards = torch.tensor([group.final_rewards for group in groups], dtype=torch.float64)
    samples = make_samples(run.config, groups, group_advantages(rewards))
    with tempfile.TemporaryDirectory() as folder:
        runs = {"toy/base": run, "wide": make_run(make_wide(folder), args.overrides)[0]}
    print("| model | parameters | way | tokens/s, median | least and most | ours / bare |\n|---|---|---|---|---|---|")
    ratios = {}
    for model, run in runs.items():
        ways = {"ours": ours, "bare": bare, "bare, rows as they are": packed}
        rates = {name: [] for name in ways}
        for number in range(args.rounds + 1):
            for name, way in ways.items():
                rates[name] += [way(run, samples)] if number else []  # the first is to warm up
        for name, found in rates.items():
            ratio = statistics.median(a / b for a, b in zip(rates["ours"], found, strict=True))
            if name == "bare":
                ratios[model] = ratio
            print(f"| {model} | {run.policy.num_parameters() / 1e6:.1f}M | {name} | {statistics.median(found):,.0f} | "
                  f"{min(found):,.0f} to {max(found):,.0f} | {ratio:.2f} |", flush=True)
    print("\nupdate, of bare: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
          + f" (goal {GOAL})")
    raise SystemExit(min(ratios.values()) < GOAL)


if __name__ == "__main__":
    main()
