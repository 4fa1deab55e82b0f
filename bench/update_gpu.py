"""`update_vs_bare.py` at the size of work that a GPU is for.

    python bench/update_gpu.py [--shape 0.5B 1.5B] [--rounds 5]

Random models of the shapes of Qwen2.5-0.5B and -1.5B, computing in bf16 (the larger one's weights are bf16 too, for its
optimizer's sake); 64 to 1,024 response tokens behind prompts of 128; half of the responses an optimizer step.
"""

import argparse
import os
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from update_vs_bare import ROOT, bare, make_run, ours, packed
from vllm_gpu import make_model

TOKENS, PROMPT_TOKENS, MICRO = 1024, 128, 8192
CASES = {"0.5B": (128, "float32"), "1.5B": (64, "bfloat16")}  # responses, weights


def make_case(shape: str):
    """A run, and responses of unlike lengths, ready to train on."""
    from sampling import Sample
    from train_dapo import compute_logprobs
    count, dtype = CASES[shape]
    with tempfile.TemporaryDirectory() as folder:
        make_model(shape, Path(folder))
        run, _ = make_run(folder, [
            "mixed_precision=bf16", f"model.dtype={dtype}", "val.file=", f"data.max_prompt_length={PROMPT_TOKENS}",
            f"data.max_response_length={TOKENS}", "overlong_buffer.enable=false", "rollout.backend=transformers",
            f"actor.max_tokens_per_micro_batch={MICRO}", "data.train_batch_size=8", f"rollout.n={count // 8}",
            f"actor.ppo_mini_batch_size={count // 2}", "actor.old_logprobs=rollout"])
    rng = np.random.default_rng(0)
    samples = [Sample(rng.integers(1, 28, PROMPT_TOKENS).tolist(), rng.integers(1, 28, length).astype(np.int32),
                      float(rng.normal())) for length in rng.integers(TOKENS // 16, TOKENS, count)]
    logprobs = compute_logprobs(run, run.policy, samples)
    return run, [replace(sample, rollout_logprobs=row, old_logprobs=row)
                 for sample, row in zip(samples, logprobs, strict=True)]


def main() -> None:
    """Measure each shape in turn with and without RL; print medians, spread and memory."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    os.chdir(ROOT)
    ways = {"ours": ours, "bare": bare, "bare, rows as they are": packed}
    print("| shape | way | tokens/s, median | least and most | ours / it | peak GB |\n|---|---|---|---|---|---|")
    for shape in args.shape:
        run, samples = make_case(shape)
        rates, peak = {name: [] for name in ways}, {}
        for number in range(args.rounds + 1):
            for name, way in ways.items():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                rates[name] += [way(run, samples)][:number]  # the first is to warm up
                peak[name] = torch.cuda.max_memory_allocated() / 1e9
        for name, found in rates.items():
            ratio = statistics.median(a / b for a, b in zip(rates["ours"], found, strict=True))
            print(f"| {shape} | {name} | {statistics.median(found):,.0f} | {min(found):,.0f} to {max(found):,.0f} | "
                  f"{ratio:.2f} | {peak[name]:.1f} |", flush=True)
        del run


if __name__ == "__main__":
    main()
