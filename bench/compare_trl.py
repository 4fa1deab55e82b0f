"""This trainer beside TRL's GRPOTrainer: seconds per trained response, and to a given accuracy.

    python bench/compare_trl.py --trl-python /tmp/trl_venv/bin/python [--repeats 3]
        [--parts speed accuracy] [--task sums]

TRL wants an environment of its own, and in it what this repository imports:

    python -m venv /tmp/trl_venv
    /tmp/trl_venv/bin/pip install torch==2.13.0     # the build of `python` above: CPU or GPU
    /tmp/trl_venv/bin/pip install trl==1.16.0 transformers==5.19.0 accelerate==1.15.0 \
        datasets pyyaml filelock matplotlib httpx2 numpy==2.3.5

Two parts, each side in turn and in a process of its own, a seed a repeat; start-up, validation and
saving not counted:

speed: wall seconds of a rollout step (generation, scoring, update) by the responses it trains on,
median of the steps after the first; without dynamic sampling, which TRL does not have, so that both
do the same work.

accuracy: wall seconds of training until avg@n on the validation set is 0.85, evaluated after each
rollout step by this repository's evaluate.py, for both; ours with dynamic sampling, as configured.
A run of TRL's that does not get there counts with the seconds until it was stopped; one of ours
makes the goal missed.

Two tasks: the embedded one (32 prompts x 16 responses of up to 96 tokens, four updates of 128), and
with `--task sums` SmolLM2-135M in configs/smollm2_135m_sums.yaml (8 x 8 of up to 12 tokens, two
updates of 32, to 0.7), whose line break is then TRL's EOS too.

The same on both sides: model, float32, threads, prompts and their token ids, rewards (`reward.py`),
temperature 1, DAPO's loss with its two clips, the AdamW object itself, its warm-up, weight decay on
all weights, gradient clipping. TRL's defaults that would cost it time are off: gradient
checkpointing, logging, progress bars, saving. Its micro-batch is a whole mini-batch, unless
`--micro-batch` says otherwise: on the embedded task its fastest of 128, 64 and 32.

Not the same, and TRL's own ways: it pads each micro-batch to the longest response of the whole step
(here nearly always the limit), where ours are sorted by length; it computes a prompt once for each
response; `model.generate` goes on with all rows until the last has ended; it computes old log-probs
with a pass of their own, ours are the sampler's, which is the same model; its process has malloc's
defaults, ours keeps freed memory, as `setup` tells it to; the loss divides by the step's tokens
over its updates rather than by the mini-batch's; advantages add 1e-4 to the standard deviation
rather than 1e-6; other random numbers, so other prompts and responses. With
`--continuous-batching` TRL writes with transformers' continuous batching instead, which on a CPU is
slower.

On a GPU, `--shape 0.5B` (or 1.5B; shapes of vllm_gpu.py) does the first part with vLLM in both
training processes instead, asleep during the update: random weights, whose responses nearly all
have 1024 tokens, bf16 passes over float32 weights, bf16 in vLLM, which writes all 512 at a time,
with a prefix cache, in half of the GPU's memory. Give `--micro-batch 8` (the activations of 128
such rows are 180 GB); ours take as many tokens in a pass. TRL's correction of the sampler's
log-probs is off, as ours is. TRL's own ways: it asks vLLM for the log-probs of all responses, ours
for one prompt's in 16, and for their text; at most 4096 tokens in a pass of vLLM, ours vLLM's
default; logits in bf16, ours in float32; old log-probs of all four mini-batches, ours of three.

`pip install vllm==0.32.0` in both environments; TRL 1.16 warns that it knows vLLM up to 0.31. Not
tried on a GPU yet. On a CPU (`--shape tiny`, shorter responses, no sleep) it runs to the end, once
vLLM is patched not to pack its weights: TRL cannot load new ones into those ("'Parameter' object
has no attribute 'weight_loader'").

Prints Markdown tables; the last line has the ratios and goals. Exits 1 where one is missed.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

from vllm_gpu import SHAPES, make_model

# of each task: config, overrides, accuracy to reach, responses of a mini-batch, goals
TASKS = {"embedded": ("config.yaml", ["actor.ppo_mini_batch_size=128", "actor.lr=0.0002"], 0.85,
                      128, {"speed": 0.18, "accuracy": 0.20}),
         "sums": ("configs/smollm2_135m_sums.yaml", ["model.path=examples/sums/base"], 0.7, 32,
                  {"speed": 0.25, "accuracy": 0.25})}
ROOT = Path(__file__).parent.parent
PARTS = ("speed", "accuracy")
SIDES, WARM_UP = ("ours", "trl"), 1


class Stopwatch:
    """What one process measures: a row for each rollout step, and the accuracies in between, off
    the clock."""

    def __init__(self, args: argparse.Namespace, evaluate: Callable[[], float]) -> None:
        self.rows, self.accuracies, self.evaluate, self.target = [], {}, evaluate, args.target
        self.evaluating = args.part == "accuracy"
        self.limit = args.max_steps if self.evaluating else WARM_UP + args.steps
        self.start = time.perf_counter()

    def after_step(self, **row) -> bool:
        """Take the time; returns whether this was the last step."""
        self.rows.append({"seconds": time.perf_counter() - self.start, **row})
        done = len(self.rows) == self.limit
        if self.evaluating:
            accuracy = self.accuracies[len(self.rows)] = self.evaluate()
            done = done or accuracy >= self.target
        self.start = time.perf_counter()
        return done


def run_ours(args: argparse.Namespace, state, prompts: list,
             evaluate: Callable[[], float]) -> Stopwatch:
    """Train with `train_dapo.train`."""
    from data_types import Data
    from harness import sync_weights, train
    sync_weights(state)
    stopwatch = Stopwatch(args, evaluate)
    train(state, Data(prompts, {}), after_step=lambda metrics: stopwatch.after_step(
        responses=metrics["groups/trained"] * state.config.rollout.n,
        acc=metrics["acc/before_filter"], length=metrics["response_length/mean"]))
    return stopwatch


def run_trl(args: argparse.Namespace, state, prompts: list,
            evaluate: Callable[[], float]) -> Stopwatch:
    """Train the same policy, with the same optimizer, with TRL's GRPOTrainer."""
    from datasets import Dataset
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import TrainerCallback
    from trl import GRPOTrainer
    config, seen = state.config, []
    state.policy.set_attn_implementation("sdpa")  # not packed_attention
    if config.rollout.stop_tokens:  # TRL knows one token that ends a response
        state.tokenizer.eos_token = config.rollout.stop_tokens
    token_ids = state.tokenizer(text=[prompt.text for prompt in prompts])["input_ids"]
    if token_ids != [prompt.token_ids for prompt in prompts]:
        raise SystemExit("TRL would read other prompts than ours")  # it tokenises them in this way
    updates = config.data.train_batch_size * config.rollout.n // config.actor.ppo_mini_batch_size
    optimizer = state.optimizer.optimizer
    warmup = config.actor.lr_warmup_steps
    schedule = LambdaLR(optimizer, lambda update: min(1.0, (update // updates + 1) / warmup))
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=state.policy, reward_funcs=make_reward(state, seen),
            args=trl_config(args, config, updates, folder),
            train_dataset=Dataset.from_list([{"prompt": prompt.text, "answer": prompt.answer}
                                             for prompt in prompts]),
            processing_class=state.tokenizer, optimizers=(optimizer, schedule))
        if trainer.accelerator.unwrap_model(trainer.model) is not state.policy:
            raise SystemExit("TRL trains another model than the one that is evaluated")

        class Watch(TrainerCallback):
            """After each rollout step's last update: take the time."""

            def on_step_end(self, arguments, trainer_state, control, **_):
                if trainer_state.global_step % updates == 0:
                    accs, lengths = zip(*seen, strict=True)
                    control.should_training_stop = stopwatch.after_step(
                        responses=len(seen), acc=statistics.mean(accs),
                        length=statistics.mean(lengths))
                    seen.clear()
        trainer.add_callback(Watch())
        stopwatch = Stopwatch(args, evaluate)
        trainer.train()
    return stopwatch


def make_reward(state, seen: list[tuple[float, int]]) -> Callable:
    """Our reward as TRL calls it; accuracy and length of each response are left in `seen`."""
    from data_types import Task
    from reward import overlong_penalty
    config = state.config

    def reward(completions, completion_ids, answer, **_):
        tasks = [Task([text], [len(ids)], right, {}) for text, ids, right
                 in zip(completions, completion_ids, answer, strict=True)]
        rewards = []
        for (score,), ids in zip(state.scorer(tasks), completion_ids, strict=True):
            seen.append((score.acc, len(ids)))
            rewards.append(score.score + overlong_penalty(
                len(ids), config.data.max_response_length, config.overlong_buffer.len,
                config.overlong_buffer.penalty_factor))
        return rewards
    return reward


def trl_config(args: argparse.Namespace, config, updates: int, folder: str):
    """TRL's settings for what `config` says."""
    import torch
    from trl import GRPOConfig
    responses, actor = config.data.train_batch_size * config.rollout.n, config.actor
    vllm = {"use_vllm": True, "vllm_mode": "colocate",
            "vllm_enable_sleep_mode": torch.cuda.is_available(),  # vLLM has none on CPUs
            "vllm_gpu_memory_utilization": config.rollout.gpu_memory_utilization,
            "vllm_max_model_length": (config.data.max_prompt_length
                                      + config.data.max_response_length),
            "vllm_importance_sampling_correction": False} if args.shape else {}
    return GRPOConfig(
        **vllm,
        output_dir=folder, seed=config.seed, use_cpu=not torch.cuda.is_available(),
        bf16=config.mixed_precision == "bf16",
        gradient_checkpointing=False, save_strategy="no", logging_strategy="no", report_to="none",
        disable_tqdm=True,
        max_steps=updates * (args.max_steps if args.part == "accuracy" else WARM_UP + args.steps),
        per_device_train_batch_size=args.micro_batch,
        steps_per_generation=responses // args.micro_batch,
        gradient_accumulation_steps=actor.ppo_mini_batch_size // args.micro_batch,
        num_generations=config.rollout.n,
        max_completion_length=config.data.max_response_length,
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p, top_k=0, learning_rate=actor.lr, max_grad_norm=actor.grad_clip,
        loss_type="dapo", epsilon=actor.clip_ratio_low, epsilon_high=actor.clip_ratio_high,
        beta=0.0, num_iterations=actor.ppo_epochs, scale_rewards="group",
        mask_truncated_completions=False,
        use_transformers_continuous_batching=args.continuous_batching)


def measure(args: argparse.Namespace) -> dict:
    """One side, in this process. Both start from the same `setup`."""
    sys.path.insert(0, str(ROOT))
    from evaluate import evaluate, sample_and_score
    from infra.config import load_config
    from infra.setup import setup
    from rollout import transformers_engine
    steps = args.max_steps if args.part == "accuracy" else WARM_UP + args.steps
    backend = "vllm" if args.shape and args.one == "ours" else "transformers"
    with tempfile.TemporaryDirectory() as folder:
        file, setting, *_ = TASKS[args.task]
        config = load_config(file, [
            f"seed={args.seed}", f"run_dir={folder}/run", f"rollout.backend={backend}",
            f"filter_groups.enable={'true' if args.part == 'accuracy' else 'false'}",
            f"total_training_steps={steps}", *setting, *args.overrides])
        with mock.patch("infra.setup.keep_freed_memory") if args.one == "trl" else nullcontext():
            state, data = setup(config, transformers_engine)
        prompts, (val_prompts,) = data.train, data.val.values()

        def accuracy() -> float:
            evaluation = evaluate(val_prompts, *sample_and_score(state, val_prompts))
            return evaluation.metrics[f"avg@{config.val.n}"]
        stopwatch = {"ours": run_ours, "trl": run_trl}[args.one](args, state, prompts, accuracy)
    return {"rows": stopwatch.rows, "accuracies": stopwatch.accuracies}


def measure_apart(args: argparse.Namespace, part: str, side: str, seed: int) -> dict:
    """One side in a process of its own, and what it printed last."""
    command = [args.trl_python if side == "trl" else sys.executable, __file__, "--one", side,
               "--part", part, "--task", args.task, "--seed", str(seed), "--steps", str(args.steps),
               "--max-steps", str(args.max_steps), "--target", str(args.target),
               "--micro-batch", str(args.micro_batch)]
    command += ["--continuous-batching"] * args.continuous_batching + args.overrides
    command += ["--shape", args.shape] if args.shape else []
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def spread(values: list[float], digits: int) -> str:
    """The median, and the least and the most."""
    return (f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to "
            f"{max(values):.{digits}f})")


def speed_table(results: dict[str, list[dict]]) -> dict[str, list[float]]:
    """Print the table of the first part; returns each side's seconds per trained response."""
    print("| | ms per trained response, median (least to most) | seconds a step | responses a step "
          "| acc at step 1 | mean length at step 1 | in the timed steps |\n"
          "|---|---|---|---|---|---|---|")
    figures = {}
    for side, runs in results.items():
        timed = [result["rows"][WARM_UP:] for result in runs]
        firsts = [result["rows"][0] for result in runs]
        figures[side] = [statistics.median(row["seconds"] / row["responses"] for row in rows)
                         for rows in timed]
        print(f"| {side} | {spread([1000 * seconds for seconds in figures[side]], 2)} | "
              f"{spread([statistics.median(row['seconds'] for row in rows) for rows in timed], 2)}"
              f" | {statistics.mean(row['responses'] for rows in timed for row in rows):.0f} | "
              f"{statistics.mean(row['acc'] for row in firsts):.3f} | "
              f"{statistics.mean(row['length'] for row in firsts):.1f} | "
              f"{statistics.mean(row['length'] for rows in timed for row in rows):.1f} |")
    return figures


def accuracy_table(results: dict[str, list[dict]], target: float) -> dict[str, list[float]]:
    """Print the table of the second part; returns each side's seconds of training, infinite where
    ours fell short."""
    print(f"| | seconds of training to {target}, median (least to most) | rollout steps | seconds "
          "a step | accuracies after each |\n|---|---|---|---|---|")
    figures = {}
    for side, runs in results.items():
        figures[side], steps = [], []
        for result in runs:
            steps.append(len(result["rows"]))
            reached = max(result["accuracies"].values(), default=0.0) >= target
            seconds = sum(row["seconds"] for row in result["rows"])
            figures[side].append(seconds if reached or side == "trl" else math.inf)
        curves = "; ".join(", ".join(f"{acc:.3f}" for acc in result["accuracies"].values())
                           for result in runs)
        per_step = [sum(row["seconds"] for row in result["rows"]) / len(result["rows"])
                    for result in runs]
        print(f"| {side} | {spread(figures[side], 1)} | {', '.join(map(str, steps))} | "
              f"{spread(per_step, 2)} | {curves} |")
    return figures


def main() -> None:
    """Measure both sides in turn, print the tables and whether the goals are met."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trl-python", help="a Python interpreter that has TRL")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6,
                        help="speed: timed rollout steps of a process")
    parser.add_argument("--max-steps", type=int, default=60, help="accuracy: rollout steps at most")
    parser.add_argument("--task", choices=TASKS, default="embedded")
    parser.add_argument("--target", type=float, help="accuracy")
    parser.add_argument("--micro-batch", type=int, help="TRL's per_device_train_batch_size")
    parser.add_argument("--shape", choices=SHAPES, help="with vLLM, and random weights: on a GPU")
    parser.add_argument("--continuous-batching", action="store_true", help="TRL writes with it")
    parser.add_argument("--one", choices=SIDES, help="measure this side, and print JSON")
    parser.add_argument("--part", choices=PARTS, default="speed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    args = parser.parse_intermixed_args()
    os.chdir(ROOT)
    _, _, target, mini_batch, args.goals = TASKS[args.task]
    args.target, args.micro_batch = args.target or target, args.micro_batch or mini_batch
    if args.one:
        print(json.dumps(measure(args)))
        return
    if not args.trl_python:
        parser.error("--trl-python is needed; the docstring says how to make one")
    with tempfile.TemporaryDirectory() as folder:
        if args.shape:
            make_model(args.shape, Path(folder))
            args.parts, args.goals = ["speed"], {"speed": 0.5}
            args.overrides[:0] = [
                f"model.path={folder}", "mixed_precision=bf16", "data.max_response_length=1024",
                "overlong_buffer.len=256", "rollout.max_num_seqs=512",
                f"actor.max_tokens_per_micro_batch={args.micro_batch * 1088}"]  # TRL's rows
        compare(args)


def compare(args: argparse.Namespace) -> None:
    """Measure each part, and exit."""
    results_text, missed = [], False
    for part in args.parts:
        results = {side: [] for side in SIDES}
        for seed in range(args.repeats):
            for side in SIDES:
                results[side].append(measure_apart(args, part, side, seed))
        figures = speed_table(results) if part == "speed" else accuracy_table(results, args.target)
        pairs = [ours / trl for ours, trl in zip(figures["ours"], figures["trl"], strict=True)]
        ratio = statistics.median(figures["ours"]) / statistics.median(figures["trl"])
        print(f"\n{part}: ours / TRL of each pair {', '.join(f'{pair:.2f}' for pair in pairs)}\n",
              flush=True)
        results_text.append(f"per response {ratio:.2f} of TRL's (goal {args.goals[part]})"
                            if part == "speed" else
                            f"to {args.target} accuracy {ratio:.2f} (goal {args.goals[part]})")
        missed = missed or not ratio <= args.goals[part]
    print(", ".join(results_text))
    sys.exit(missed)


if __name__ == "__main__":
    main()
