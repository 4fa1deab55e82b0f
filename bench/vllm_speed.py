"""vLLM in the training process: what log-probs and seeds cost, the same work by vLLM's own
benchmark, and how much of a training step sleep, wake-up and weight sync take.

    python bench/vllm_speed.py asked --model toy/base
    python bench/vllm_speed.py throughput --model 0.5B model.dtype=bfloat16 mixed_precision=bf16
    python bench/vllm_speed.py step --model 1.5B

`--model` is a folder, or a shape of vllm_gpu.py with random weights, whose responses nearly all
have `--tokens` tokens. Prompts are random tokens.

asked: tokens per second of each way in turn, as ratios to the first of the same round. On a CPU
    seconds are those of the process's own computing: whatever else runs there does not count.
throughput: ours as in training (log-probs of one prompt in 16, seeds, text, logits in float32)
    beside `vllm bench throughput`, which ignores the end of a response: it wants a shape. Both on a
    prompt for each response, all of them computed, and after a round to warm up.
step: steps of the GSM8K recipe with toy prompts and without the filter, since random weights
    solve nothing. Its responses are shorter than 1024 tokens, as are those of a trained model
    (`--tokens 256`), which makes the share of the sync larger, not smaller.

Prints a Markdown table; the last line has the goal, if there is one. Exits 1 if it is missed.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from harness import load_config, make_state, train
from vllm_gpu import PROMPT_TOKENS, make_model, seconds

from data_types import Data, SamplingParams
from infra import vllm_engine
from infra.config import compute_dtype

GOALS = {"throughput": 0.9, "step": 0.03}
WAYS = {"log-probs of all": (1.0, True), "of one prompt in 16": (1 / 16, True),
        "of none": (0.0, True), "of none, without seeds": (0.0, False)}


def make_generate(args: argparse.Namespace, folder: str):
    """A function from a way's share and seeding, and n, to tokens per second."""
    state, _ = make_state(
        f"model.path={folder}", "rollout.backend=vllm", "val.file=", "rollout.max_num_seqs=512",
        f"data.max_prompt_length={PROMPT_TOKENS}", f"data.max_response_length={args.tokens}",
        "overlong_buffer.enable=false", *args.overrides)
    torch.manual_seed(1)
    request_params = vllm_engine.request_params
    on_cpu = state.accelerator.device.type == "cpu"
    clock = time.process_time if on_cpu and args.part == "asked" else time.perf_counter

    def without_seeds(*arguments) -> list[dict]:
        return [request | {"seed": None} for request in request_params(*arguments)]

    def generate(share: float, seeded: bool, n: int) -> float:
        count = args.prompts * args.n // n  # new prompts each time: none is in the prefix cache
        prompts = torch.randint(1, state.policy.config.vocab_size, (count, PROMPT_TOKENS)).tolist()
        seeds = [(i, 7) for i in range(count)]
        params = SamplingParams(n, args.tokens, logprobs=share)
        params_of = request_params if seeded else without_seeds
        with mock.patch.object(vllm_engine, "request_params", params_of):
            start = clock()
            groups = state.engine.generate(prompts, seeds, params)
            seconds = clock() - start
        return sum(len(response.token_ids) for group in groups for response in group) / seconds
    return generate


def asked(args: argparse.Namespace, folder: str) -> None:
    """Print the tokens per second of each of WAYS."""
    generate, rates = make_generate(args, folder), {way: [] for way in WAYS}
    for number in range(args.rounds + 1):
        for way, (share, seeded) in WAYS.items():
            rates[way] += [generate(share, seeded, args.n)][:number]  # the first is to warm up
    print(f"| {args.model}, {args.prompts} x {args.n} | tokens/s, median (least to most) | by that "
          "of the first |\n|---|---|---|")
    for way, found in rates.items():
        ratio = statistics.median(a / b for a, b in zip(found, rates["log-probs of all"],
                                                        strict=True))
        print(f"| {way} | {statistics.median(found):,.0f} ({min(found):,.0f} to "
              f"{max(found):,.0f}) | {ratio:.2f} |")


def throughput(args: argparse.Namespace, folder: str) -> float:
    """Print ours and vLLM's own tokens per second; returns their ratio."""
    config, count = load_config("config.yaml", args.overrides), args.prompts * args.n
    code = ("from vllm.benchmarks import throughput\n"  # its command line wants the package `vllm`
            "from vllm.utils.argparse_utils import FlexibleArgumentParser as Parser\n"
            "parser = Parser()\nthroughput.add_cli_args(parser)\n"
            "throughput.main(parser.parse_args())")
    # Its prompts are made of the tokenizer's few tokens: many would be in a prefix cache.
    command = [sys.executable, "-c", code, "--model", folder, "--dtype", compute_dtype(config),
               "--dataset-name", "random", "--random-input-len", str(PROMPT_TOKENS),
               "--random-output-len", str(args.tokens), "--num-prompts", str(count),
               "--max-num-seqs", "512", "--max-model-len", str(PROMPT_TOKENS + args.tokens),
               "--no-enable-prefix-caching", "--num-warmups", str(count), "--disable-detokenize"]
    if torch.cuda.is_available():
        command += ["--gpu-memory-utilization", str(config.rollout.gpu_memory_utilization)]
    else:  # as infra/vllm_engine.py sets it on a CPU
        command += ["--enforce-eager", "--no-enable-chunked-prefill", "--kv-cache-memory-bytes",
                    str(2**29), "--max-num-batched-tokens", "8192"]
    environment = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{(run.stdout + run.stderr)[-3000:]}")
    theirs = float(re.search(r"([\d.]+) output tokens/s", run.stdout)[1])
    generate = make_generate(args, folder)
    ours = [generate(1 / 16, True, 1) for _ in range(args.rounds + 1)][1:]
    ratio = statistics.median(ours) / theirs
    print(f"| {args.model}, {count} responses | output tokens/s |\n|---|---|\n"
          f"| ours, median | {statistics.median(ours):,.0f} |\n"
          f"| vllm bench throughput | {theirs:,.0f} |\n\nours / vLLM's {ratio:.2f}", end=" ")
    return ratio


def step(args: argparse.Namespace, folder: str) -> float:
    """Print the parts of a step; returns the share of sleep, wake-up and sync."""
    state, data = make_state(
        f"model.path={folder}", "data.train_file=toy/train.jsonl", "data.answer_regex=",
        "data.prompt_template={prompt}", "val.file=", "filter_groups.enable=false",
        f"data.max_response_length={args.tokens}", "overlong_buffer.enable=false",
        f"run_dir={folder}/run", f"total_training_steps={args.rounds + 1}", *args.overrides,
        config="configs/gsm8k_qwen2.5_1.5b.yaml")
    asleep = []  # seconds that it took to fall asleep in each step, which time/logprobs has

    def sleep() -> None:
        asleep.append(seconds(state.engine.sleep))

    timed = replace(state, engine=replace(state.engine, sleep=sleep))
    rows = train(timed, Data(data.train, {}))[1:]
    names = ("generate", "logprobs", "update", "sync", "step")
    total = {name: statistics.mean(row[f"time/{name}"] for row in rows) for name in names}
    per_step = len(asleep) // (len(rows) + 1)  # calls; only the first of them takes time
    falling_asleep = sum(asleep[per_step:]) / len(rows)
    total["logprobs"] -= falling_asleep
    total["sync"] += falling_asleep
    print(f"| {args.model} | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    print("| seconds, mean | " + " | ".join(f"{total[name]:.2f}" for name in names) + " |\n")
    print(f"sync / step {total['sync'] / total['step']:.3f}", end=" ")
    return total["sync"] / total["step"]


def main() -> None:
    """Measure one part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["asked", "throughput", "step"])
    parser.add_argument("--model", default="0.5B")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--n", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    args = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        if not Path(args.model).is_dir():
            make_model(args.model, Path(folder))
        model = args.model if Path(args.model).is_dir() else folder
        value = {"asked": asked, "throughput": throughput, "step": step}[args.part](args, model)
    if value is not None:
        goal = GOALS[args.part]
        print(f"(goal {goal})", flush=True)
        sys.exit(value < goal if args.part == "throughput" else value > goal)


if __name__ == "__main__":
    main()
