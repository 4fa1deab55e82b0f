"""`update_vs_bare.py` at the size of work that a GPU is for.

    python bench/update_gpu.py [--shape 0.5B 1.5B] [--rounds 5] [--tokens 1024]

Random models of the shapes of Qwen2.5-0.5B and -1.5B, computing in bf16 (the larger one's weights
are bf16 too, for its optimizer's sake); 64 to 1,024 response tokens behind prompts of 128; half of
the responses an optimizer step. Once with torch's kernel for packed rows, if it works there, and
once with blocks of sdpa. Model FLOPs utilisation (MFU): 6 for each parameter and token, of prompts
too, and 12 H for each layer and each pair of tokens that causal attention compares, of the peak
that the vendor states for dense bf16."""

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from harness import logprobs_of, make_state
from update_vs_bare import bare, ours, packed
from vllm_gpu import make_model

from data_types import Sample
from infra import packing

PROMPT_TOKENS, MICRO = 128, 8192
CASES = {"tiny": (16, "float32"), "0.5B": (128, "float32"), "1.5B": (64, "bfloat16")}
ON_GPU = torch.cuda.is_available()
GOAL, MFU_GOALS = 0.95, {"1.5B": 0.40}
PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}  # by names of GPUs


def make_case(shape: str, tokens: int):
    """A run, and responses of different lengths, ready to train on. CASES: how many, and the type
    of the weights."""
    count, dtype = CASES[shape]
    with tempfile.TemporaryDirectory() as folder:
        make_model(shape, Path(folder))
        state, _ = make_state(
            f"model.path={folder}", "actor.lr=1e-9", "mixed_precision=bf16", f"model.dtype={dtype}",
            "val.file=", f"data.max_prompt_length={PROMPT_TOKENS}",
            f"data.max_response_length={tokens}", "overlong_buffer.enable=false",
            "rollout.backend=transformers", f"actor.max_tokens_per_micro_batch={MICRO}",
            "data.train_batch_size=8", f"rollout.n={count // 8}",
            f"actor.ppo_mini_batch_size={count // 2}", "actor.old_logprobs=rollout")
    rng = np.random.default_rng(0)
    samples = [Sample(rng.integers(1, 28, PROMPT_TOKENS).tolist(),
                      rng.integers(1, 28, length).astype(np.int32),
                      float(rng.normal())) for length in rng.integers(tokens // 16, tokens, count)]
    return state, [replace(sample, rollout_logprobs=row, old_logprobs=row)
                   for sample, row in zip(samples, logprobs_of(state, samples), strict=True)]


def ours_in_blocks(state, samples) -> float:
    """`ours` without torch's kernel for packed rows."""
    with mock.patch.object(packing, "varlen_works", lambda *_: False):
        return ours(state, samples)


def kernel(state) -> str:
    """What packed rows attend with in `ours`."""
    config = state.policy.config
    size = config.hidden_size // config.num_attention_heads
    query, key = (config.num_attention_heads, size), (config.num_key_value_heads, size)
    works = packing.varlen_works(state.accelerator.device, torch.bfloat16, (query, key, key))
    kind = packing.packing_kind(state.policy)
    return kind if kind != "varlen" or works else "blocks"


def utilisation(state, samples, rate: float) -> float | None:
    """MFU at so many tokens a second; None if the peak is not known."""
    name = torch.cuda.get_device_name() if ON_GPU else ""
    peak = next((peak for part, peak in PEAKS.items() if part in name), None)
    lengths, config = [len(sample) for sample in samples], state.policy.config
    pairs = sum(length**2 for length in lengths) / sum(lengths)  # for each token, before halving
    flops = 6 * state.policy.num_parameters() + (
        6 * config.num_hidden_layers * config.hidden_size * pairs)
    return peak and rate * flops / peak


def main() -> None:
    """Measure each shape in turn with and without RL; print medians, spread and memory, and whether
    the goals are met."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", nargs="+", default=["0.5B", "1.5B"], choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=1024, help="of the longest response")
    args = parser.parse_args()
    ways = {"ours": ours, "ours, in blocks": ours_in_blocks, "bare": bare,
            "bare, rows as they are": packed}
    missed = False
    for shape in args.shape:  # what is known is printed before the next one starts
        print("| shape | way | tokens/s, median | least and most | ours / it | peak GB |\n"
              "|---|---|---|---|---|---|")
        state, samples = make_case(shape, args.tokens)
        rates, peak = {name: [] for name in ways}, {}
        for number in range(args.rounds + 1):
            for name, way in ways.items():
                if ON_GPU:
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                rates[name] += [way(state, samples)][:number]  # the first is to warm up
                peak[name] = torch.cuda.max_memory_allocated() / 1e9 if ON_GPU else 0.0
        for name, found in rates.items():
            ratio = statistics.median(a / b for a, b in zip(rates["ours"], found, strict=True))
            print(f"| {shape} | {name} | {statistics.median(found):,.0f} | {min(found):,.0f} to "
                  f"{max(found):,.0f} | {ratio:.2f} | {peak[name]:.1f} |", flush=True)
        ratios = [statistics.median(a / b for a, b in zip(rates[name], rates["bare"], strict=True))
                  for name in ("ours", "ours, in blocks")]
        mfus = [utilisation(state, samples, statistics.median(rates[name]))
                for name in ("ours", "ours, in blocks")]
        texts = ["unknown" if mfu is None else f"{mfu:.2f}" for mfu in mfus]
        goal = MFU_GOALS.get(shape, 0)
        missed |= ratios[0] < GOAL or (mfus[0] or goal) < goal
        print(f"\nupdate of {shape} by {kernel(state)}: {ratios[0]:.2f} of bare passes (goal "
              f"{GOAL}), MFU {texts[0]}{f' (goal {goal})' * bool(goal)}; in blocks: "
              f"{ratios[1]:.2f} and {texts[1]}\n", flush=True)
        del state
    raise SystemExit(missed)


if __name__ == "__main__":
    main()
