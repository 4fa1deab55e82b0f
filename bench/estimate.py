"""A run's estimate of its memory (infra/memory.py) beside what generation and an update take.

    python bench/estimate.py [--shape tiny | 0.5B 1.5B] [--cases bf16 "bf16, LoRA"]

Random models of Qwen2's shape and responses of full length, on a GPU by its allocator, on a CPU by
following each storage (which takes most of the seconds there). Compares full fine-tuning with LoRA
too. Exits with 1 if a ratio is beyond 30%."""

import argparse
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState
from harness import make_state
from memory import ON_GPU, Storages
from vllm_gpu import make_model, seconds

import infra.memory
from data_types import Sample, SamplingParams
from infra import logprobs
from infra.memory import estimate_memory
from train_dapo import update_policy

GIB = 2**30
SIZES = {  # tokens of prompt and response, of a micro-batch; responses of a group and of an update
    "tiny": (16, 112, 512, 8, 32),
    "0.5B": (128, 384, 4096, 16, 32), "1.5B": (128, 384, 4096, 16, 32)}
CASES = {"float32": [], "float32, checkpointed": ["model.gradient_checkpointing=true"],
         "bf16": ["mixed_precision=bf16"],
         "fp16, checkpointed": ["mixed_precision=fp16", "model.gradient_checkpointing=true"],
         "bf16, one micro-batch": ["mixed_precision=bf16", "actor.ppo_mini_batch_size=4"],
         "bf16, LoRA": ["mixed_precision=bf16", "model.lora_rank=16"]}


def measure(shape: str, folder: str, overrides: list[str]) -> dict[str, tuple[float, ...]]:
    """Estimated bytes, measured bytes and seconds of generation and of an update."""
    P, T, M, n, size = SIZES[shape]
    with redirect_stdout(sys.stderr):  # what a run says at its start
        state, _ = make_state(
            f"model.path={folder}", "val.file=", f"data.max_prompt_length={P}", "actor.lr=1e-9",
            f"data.max_response_length={T}", "overlong_buffer.enable=false", f"rollout.n={n}",
            "rollout.backend=transformers", f"rollout.max_num_seqs={2 * n}",
            f"actor.max_tokens_per_micro_batch={M}", f"actor.ppo_mini_batch_size={size}",
            *overrides)
    memory = torch.cuda.get_device_properties(0).total_memory if ON_GPU else 0
    policy, rng = state.accelerator.unwrap_model(state.policy), np.random.default_rng(0)
    estimate = estimate_memory(state.config, policy, gpu_memory=memory)
    samples = [Sample(rng.integers(1, 28, P).tolist(), rng.integers(1, 28, T).astype(np.int32),
                      float(rng.normal()), rollout_logprobs=torch.zeros(T))
               for _ in range(state.config.actor.ppo_mini_batch_size)]
    update_policy(state, samples, step=1)  # makes the moments

    def peak(function) -> tuple[float, float]:
        held = [*policy.parameters(), *(value for of_p in state.optimizer.optimizer.state.values()
                                        for value in of_p.values())]
        with Storages() as storages:
            taken = seconds(function)
            return sum(tensor.nbytes for tensor in held) + storages.read()[1], taken

    policy.generation_config.eos_token_id = None  # all responses have full length
    state.tokenizer.eos_token = None
    prompts = [sample.prompt_ids for sample in samples[:2]]
    measured = {"generate": peak(lambda: state.engine.generate(prompts, [(0,), (1,)],
                                                               SamplingParams(n, T))),
                "update": peak(lambda: update_policy(state, samples, step=1))}
    return {phase: (sum(estimate[phase].values()), *measured[phase]) for phase in measured}


def main() -> None:
    """Measure each shape in each case."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", nargs="+", default=["0.5B", "1.5B"] if ON_GPU else ["tiny"],
                        choices=list(SIZES))
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    args, ratios = parser.parse_args(), []
    print("| shape | case | phase | estimated GiB | measured GiB | measured / estimated | s |\n"
          "|---|---|---|---|---|---|---|")
    for shape in args.shape:
        if shape == "tiny":  # chunks as small beside the whole logits as in a large run
            logprobs.CHUNK_ELEMENTS = infra.memory.CHUNK_ELEMENTS = 2**15
        with tempfile.TemporaryDirectory() as folder:
            make_model(shape, Path(folder))
            for case in args.cases:
                results = measure(shape, folder, CASES[case])
                for phase, (estimated, measured, taken) in results.items():
                    ratios.append(measured / estimated)
                    print(f"| {shape} | {case} | {phase} | {estimated / GIB:.4f} | "
                          f"{measured / GIB:.4f} | {ratios[-1]:.3f} | {taken:.2f} |", flush=True)
                reset()
    good = all(0.7 <= ratio <= 1.3 for ratio in ratios)
    print(f"\nratios {min(ratios):.2f} to {max(ratios):.2f} (goal 0.7 to 1.3)")
    sys.exit(not good)


def reset() -> None:
    """Accelerate keeps its state, the precision among it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    if ON_GPU:
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
