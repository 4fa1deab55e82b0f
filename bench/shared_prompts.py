"""What computing each prompt once saves at GSM8K's lengths: tokens, memory, and time of an update.

    python bench/shared_prompts.py [--groups 1] [--rounds 3]

The same mini-batch of whole groups, with its prompts shared and repeated: SmolLM2-135M's shape with
random weights; the lengths of GSM8K's questions, in the prompt of configs/gsm8k_qwen2.5_1.5b.yaml,
and of its solutions; 16 responses to a prompt, as there. Memory is the peak of what a forward and
backward pass makes (bench/memory.py), without gradient checkpointing: activations and gradients.
Prints a table, exits with 1 if a goal is missed."""

import argparse
import statistics
import sys
import time

import numpy as np
import torch
from memory import Storages
from transformers import AutoModelForCausalLM, LlamaConfig

from data_types import Sample
from infra import logprobs
from infra.batching import collate, micro_batches
from infra.packing import enable_packing, packing_kind

# By SmolLM2's tokenizer and chat template: the mean of GSM8K's training prompts, and the solutions
# of its first sixteen rows, 8 tokens longer than the mean of all.
PROMPT = 110
RESPONSES = (62, 67, 104, 131, 78, 169, 91, 118, 141, 369, 149, 154, 93, 91, 80, 219)
GOALS = {"tokens": 0.75, "memory": 0.8}


def make_samples(groups: int, vocabulary: int, shared: bool) -> list[Sample]:
    """Groups of random tokens; a group's samples have one list of prompt ids, or one each."""
    rng, samples = np.random.default_rng(0), []
    for _ in range(groups):
        prompt_ids = rng.integers(vocabulary, size=PROMPT).tolist()
        for length in RESPONSES:
            response_ids = rng.integers(vocabulary, size=length).astype(np.int32)
            samples.append(Sample(prompt_ids if shared else [*prompt_ids], response_ids, 1.0))
    return samples


def update(model, samples: list[Sample], max_tokens: int) -> int:
    """Forward and backward passes over a mini-batch; the number of tokens that they compute."""
    tokens = 0
    for micro in micro_batches(samples, max_tokens, packing=packing_kind(model)):
        batch = collate(micro, 0, packing=packing_kind(model))
        tokens += batch["input_ids"].numel()
        logprobs.response_logprobs(model, batch)[0].sum().backward()
    model.zero_grad()
    return tokens


def main() -> None:
    """Measure both ways in turn; print the table and whether the goals are met."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--groups", type=int, default=1, help="of a mini-batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=30)
    args = parser.parse_args()
    config = LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536,
                         num_hidden_layers=args.layers, num_attention_heads=9,
                         num_key_value_heads=3, head_dim=64, tie_word_embeddings=True)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    enable_packing(model)
    logprobs.kept_elements = lambda gpu_memory: 0  # chunks that stay take what memory there is
    ways = {name: make_samples(args.groups, config.vocab_size, name == "shared")
            for name in ("repeated", "shared")}
    most = sum(map(len, ways["repeated"]))  # one micro-batch
    tokens, memory, seconds = {}, {}, {name: [] for name in ways}
    for name, samples in ways.items():
        with Storages() as storages:
            tokens[name] = update(model, samples, most)
        memory[name] = storages.read()[1]
    for _ in range(args.rounds):
        for name, samples in ways.items():
            start = time.perf_counter()
            update(model, samples, most)
            seconds[name].append(time.perf_counter() - start)
    print("| prompts | tokens computed | peak memory, MB | seconds |\n|---|---|---|---|")
    for name in ways:
        print(f"| {name} | {tokens[name]:,} | {memory[name] / 2**20:,.0f} | "
              f"{statistics.median(seconds[name]):.2f} |")
    ratios = {"tokens": tokens["shared"] / tokens["repeated"],
              "memory": memory["shared"] / memory["repeated"]}
    print("\nshared, of repeated: " + ", ".join(
        f"{name} {ratio:.2f} (goal {GOALS[name]})" for name, ratio in ratios.items()))
    sys.exit(any(ratio > GOALS[name] for name, ratio in ratios.items()))


if __name__ == "__main__":
    main()
