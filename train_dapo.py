"""What happens in which order? DAPO's Algorithm 1 (arXiv 2503.14476), and the run around it.

    accelerate launch train_dapo.py --config config.yaml [key.sub=value ...]

`train` is the algorithm; its lines carry the numbers of the paper's. Every process holds all of a step's
responses and takes its share of each mini-batch, so that all of them decide alike and count the same tokens.

Departure from the paper: where `filter_groups.max_num_gen_batches` is reached before the batch is full,
a step trains on fewer groups (the paper samples on without a limit).
"""

import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from infra.packing import packing, disable_packing
from infra.checkpoint import (check_run_dir, lock_run_dir, find_checkpoint, is_sharded, load_checkpoint, list_checkpoints,
                        read_metadata, replace_dir, save_checkpoint, raise_on_all_ranks, truncate_run, write_atomic)
from infra.config import flatten, split_list, one_line_errors, escape_control, read_command_line
from infra.data import Data, Mixture, Prompt
from evaluate import Evaluation, Evaluations, evaluate, format_tables
from infra.reward_pool import Judge
from losses import aggregate, group_advantages, kl_penalty, policy_loss, response_logprobs, importance_weights
from plot import plot_runs
from reward import FAILED, TIMED_OUT, Score, mean_columns, no_verdict, overlong_penalty
from rollout import Response, pack, unpack
from infra.setup import Run, setup, sync_weights, iter_full_weights
from sampling import (Group, Sample, auto_batch_size, collate, draw_prompts, is_informative, make_rng,
                      micro_batches, mini_batches)

COUNTERS = ("step", "prompts_drawn", "optimizer_steps", "skipped_in_a_row",  # metrics that say how far a run has come
            "groups/kept_lately", "groups/drawn_lately")

# ---- Algorithm 1 ----------------------------------------------------------------------------------------

def train(run: Run, prompts: Mixture, done: Counter) -> Iterator[tuple[dict, list[Group], Tensor]]:
    """DAPO. Yields, after each step, its metrics, the groups it trained on, and their advantages (G, n).

    `done` are the counters among the metrics of the last step before: an empty one to begin with.
    """
    config, size = run.config, run.config.data.train_batch_size
    filtering, limit = config.filter_groups.enable, config.filter_groups.max_num_gen_batches
    position, optimizer_steps, skipped, kept, drawn = (done[name] for name in COUNTERS[1:])
    for step in range(done["step"] + 1, config.total_training_steps + 1):  # 1: for step = 1, ..., M
        timer, generated, buffer, gen_batches = Timer(), [], [], 0
        while len(buffer) < size and not (limit and gen_batches == limit):   # 7, 8: too few in the buffer: go on
            count = generation_batch_size(config, size - len(buffer), kept + len(buffer), drawn + len(generated))
            batch = draw_prompts(prompts, position, count, config.seed)   # 2: sample a batch of prompts
            groups = rollout_groups(run, batch, step, timer)                # 3-5: old policy, G outputs each, rewards
            buffer += [group for group in groups                          # 6: filter, and add to the buffer
                       if not filtering or is_informative(group.metric(config.filter_groups.metric))]
            generated += groups
            position, gen_batches = position + count, gen_batches + 1
        kept, drawn = (kept + len(buffer)) / 2, (drawn + len(generated)) / 2
        trained = select_groups(run, step, buffer, generated, gen_batches)
        skipped = 0 if trained else skipped + 1
        if skipped > config.filter_groups.max_skipped_steps:
            raise SystemExit(f"error: {skipped} steps in a row were skipped, the last because: "
                             + describe(step, buffer, generated, gen_batches))
        stats, advantages = {}, torch.empty(0, config.rollout.n)
        if trained:
            rewards = torch.tensor([group.final_rewards for group in trained], dtype=torch.float64)  # (G, n)
            advantages = group_advantages(rewards, config.algorithm.norm_adv_by_std_in_grpo)  # 9: advantages
            samples = make_samples(config, trained, advantages)
            stats = update(run, samples, step, timer)                     # 10, 11: maximise the objective
            optimizer_steps += stats.pop("updates")
        yield {"step": step, "optimizer_steps": optimizer_steps, "prompts_drawn": position, "gen_batches": gen_batches,
               "skipped_in_a_row": skipped, "groups/kept_lately": kept, "groups/drawn_lately": drawn,
               **rollout_metrics(config, generated, buffer, trained), **stats, **timer.metrics()}, trained, advantages


def generation_batch_size(config: SimpleNamespace, missing: int, kept: float, drawn: float) -> int:
    """How many prompts are drawn next, when `missing` groups are, and of those `drawn` lately so many were `kept`."""
    size, chosen = config.data.train_batch_size, config.data.gen_batch_size
    if not config.filter_groups.enable:
        return size
    return min(4 * size, auto_batch_size(missing, kept, drawn)) if chosen == "auto" else chosen


def select_groups(run: Run, step: int, buffer: list[Group], generated: list[Group],
                    gen_batches: int) -> list[Group]:
    """The first `train_batch_size` groups of the buffer, in the order of the prompt stream.

    Where there are fewer, `filter_groups.at_limit` decides: those (or none), none, or the end of the run.
    """
    size, at_limit = run.config.data.train_batch_size, run.config.filter_groups.at_limit
    if len(buffer) >= size:
        return buffer[:size]
    message = describe(step, buffer, generated, gen_batches)
    if at_limit == "error":
        raise SystemExit(f"error: {message}")
    trained = buffer if at_limit == "train" else []
    if run.accelerator.is_main_process:
        tqdm.write(f"{message}. This step {f'trains on {len(trained)} groups' if trained else 'is skipped'}.")
    return trained


def describe(step: int, buffer: list[Group], generated: list[Group], gen_batches: int) -> str:
    """How a buffer that did not fill came about, and what to do."""
    right, wrong = (mean(all(acc == value for acc in group.metric("acc")) for group in generated) for value in (1, 0))
    cut = mean(response.finish_reason == "length" for group in generated for response in group.responses)
    advice = f"use {'harder' if right > wrong else 'easier'} prompts, or raise filter_groups.max_num_gen_batches"
    if cut > 0.5:
        advice = "raise data.max_response_length; or, if they used to end, the policy collapsed: lower actor.lr"
    return (f"step {step} kept {len(buffer)} of {len(generated)} groups after {gen_batches} generation batches; "
            f"{right:.0%} all-correct, {wrong:.0%} all-wrong, {cut:.0%} of responses truncated: {advice}")


def rollout_groups(run: Run, batch: list[tuple[int, Prompt]], step: int, timer: "Timer") -> list[Group]:
    """Lines 3 to 5: the policy as it now stands writes `rollout.n` responses to each prompt; they are judged."""
    config = run.config
    positions, prompts = zip(*batch, strict=True)
    responses, scores = write_and_judge(run, prompts, positions, f"step {step}", config.rollout.n,
                                        config.rollout.temperature, config.rollout.top_p, timer)
    groups = []
    for position, prompt, written, judged in zip(positions, prompts, responses, scores, strict=True):
        rewards = [score.score + overlong_shaping(config, response)
                   for response, score in zip(written, judged, strict=True)]
        groups.append(Group(position, prompt, written, judged, rewards, final_rewards=rewards))
    if config.algorithm.use_kl_in_reward:
        with timer("logprobs"):
            groups = apply_kl_penalty(run, groups)
    return groups


def overlong_shaping(config: SimpleNamespace, response: Response) -> float:
    """Soft overlong punishment (equation 13), where it is on."""
    buffer = config.overlong_buffer
    return overlong_penalty(len(response.token_ids), config.data.max_response_length, buffer.len,
                            buffer.penalty_factor) if buffer.enable else 0.0


def apply_kl_penalty(run: Run, groups: list[Group]) -> list[Group]:
    """KL in the reward: kl_coef times the KL to the reference, summed over a response, comes off its reward."""
    algorithm, n = run.config.algorithm, run.config.rollout.n
    samples = [Sample(group.prompt.token_ids, r.token_ids, 0.0) for group in groups for r in group.responses]
    old, ref = compute_logprobs(run, run.policy, samples), compute_logprobs(run, run.reference, samples)
    kl = [kl_penalty(o.double(), r.double(), algorithm.kl_penalty).sum().item() for o, r in zip(old, ref, strict=True)]
    return [replace(group, final_rewards=[reward - algorithm.kl_coef * k for reward, k in
                                          zip(group.rewards, kl[i * n:(i + 1) * n], strict=True)])
            for i, group in enumerate(groups)]


def make_samples(config: SimpleNamespace, groups: list[Group], advantages: Tensor) -> list[Sample]:
    """The groups' responses in one flat list, each with its advantage: what mini-batches are drawn from."""
    masked = {"length"} if config.algorithm.overlong_filtering else set()
    return [Sample(group.prompt.token_ids, response.token_ids, advantage, response.finish_reason not in masked,
                   torch.from_numpy(response.logprobs))
            for group, row in zip(groups, advantages.tolist(), strict=True)
            for response, advantage in zip(group.responses, row, strict=True)]


def update(run: Run, samples: list[Sample], step: int, timer: "Timer") -> dict[str, float]:
    """Lines 10 and 11: `ppo_epochs` passes over shuffled mini-batches, an optimizer step each. Returns metrics."""
    config = run.config
    lr = config.actor.lr * min(1.0, step / max(1, config.actor.lr_warmup_steps))
    for parameters in run.optimizer.param_groups:
        parameters["lr"] = lr
    batches = [indices for epoch in range(config.actor.ppo_epochs) for indices in mini_batches(
        len(samples), config.actor.ppo_mini_batch_size, make_rng(config.seed, "mini-batches", step, epoch))]
    with timer("sync"):
        run.engine.rest()
    with timer("logprobs"):
        samples = add_logprobs(run, samples, batches)
    sums, losses, norms, largest_ratio = defaultdict(float), [], [], 0.0
    with timer("update"):
        for number, indices in enumerate(batches):
            mini = [samples[i] for i in indices]
            if not any(sample.trains for sample in mini):  # all truncated, and filtered out
                continue
            on_policy = number == 0 and config.actor.old_logprobs == "recompute"
            stats = accumulate_gradients(run, mini, on_policy)
            largest_ratio = max(largest_ratio, stats.pop("rollout_max"))
            losses.append(stats.pop("loss"))
            norm = run.accelerator.clip_grad_norm_(run.policy.parameters(), config.actor.grad_clip)
            norms.append(float(norm.full_tensor() if isinstance(norm, DTensor) else norm))
            if not (math.isfinite(norms[-1]) and math.isfinite(losses[-1])):
                raise SystemExit(f"error: step {step}, update {len(losses)}: loss {losses[-1]}, gradient norm "
                                 f"{norms[-1]}; not applied. A lower actor.lr, or model.dtype float32, may help")
            run.optimizer.step()
            run.optimizer.zero_grad()
            for name, value in stats.items():
                sums[name] += value
    with timer("sync"):
        sync_weights(run)
    timer.tokens["update"] += sum(len(samples[i]) for indices in batches for i in indices)
    metrics = actor_metrics(config, sums, losses, norms) if losses else {}
    if losses:
        metrics["actor/importance_ratio_max"] = largest_ratio
        check_logprob_mismatch(run, step, metrics["actor/mismatch_abs"])
    return {"updates": len(losses), "actor/lr": lr, **metrics}


def add_logprobs(run: Run, samples: list[Sample], batches: list) -> list[Sample]:
    """The samples with old and reference log-probs, as far as a forward pass is needed for them.

    The first mini-batch meets the very policy that wrote it: its old log-probs are its log-probs, and need
    no pass of their own until it comes round again.
    """
    first = set(batches[0].tolist()) if run.config.actor.ppo_epochs == 1 else set()
    later = [i for i in range(len(samples)) if i not in first]
    samples = list(samples)
    if run.config.actor.old_logprobs == "rollout":
        samples = [replace(sample, old_logprobs=sample.rollout_logprobs) for sample in samples]
    elif later:
        for i, old in zip(later, compute_logprobs(run, run.policy, [samples[i] for i in later]), strict=True):
            samples[i] = replace(samples[i], old_logprobs=old)
    if run.config.actor.use_kl_loss:
        samples = [replace(sample, ref_logprobs=ref) for sample, ref in
                   zip(samples, compute_logprobs(run, run.reference, samples), strict=True)]
    return samples


def accumulate_gradients(run: Run, mini: list[Sample], on_policy: bool) -> dict[str, float]:
    """The gradient of a mini-batch, the same however it is split; its loss, sums of its statistics, one maximum."""
    config, accelerator = run.config, run.accelerator
    num_tokens = sum(len(sample.response_ids) for sample in mini if sample.trains)
    num_seqs = sum(sample.trains for sample in mini)
    sums, largest = defaultdict(float), torch.zeros((), device=accelerator.device)
    micros = micro_batches(mini, config.actor.max_tokens_per_micro_batch, accelerator.process_index,
                           accelerator.num_processes, bool(packing(run.policy)))
    for indices in micros:
        batch = make_batch(run, mini, indices)
        # Gradients are summed over the processes with the last one only; but where they are sharded, each time:
        # what is not yet summed takes a whole model's memory.
        accelerator.sync_gradients = last = indices is micros[-1]  # DeepSpeed takes its step in the last backward pass
        with nullcontext() if last or is_sharded(accelerator) else accelerator.no_sync(run.policy):
            with accelerator.autocast():
                loss, stats = micro_batch_loss(config, run.policy, batch, on_policy, num_tokens, num_seqs)
            accelerator.backward(loss * accelerator.num_processes)  # since gradients are averaged over them
        largest = torch.maximum(largest, stats.pop("rollout_max"))
        for name, value in stats.items():
            sums[name] = sums[name] + value
    totals = accelerator.reduce(torch.stack(list(sums.values())), "sum").tolist()
    return {**dict(zip(sums, totals, strict=True)), "tokens": num_tokens,
            "rollout_max": accelerator.gather(largest).max().item()}


def micro_batch_loss(config: SimpleNamespace, model: torch.nn.Module, batch: dict, on_policy: bool,
                     num_tokens: int, num_seqs: int) -> tuple[Tensor, dict[str, Tensor]]:
    """A micro-batch's part of the loss: equation 8, negated, and what ablations add. And sums of statistics.

    `on_policy`: the model is still the one that wrote the responses, so its log-probs are the old ones.
    """
    actor, mask = config.actor, batch["mask"]
    logprobs, entropy = response_logprobs(model, batch, config.rollout.temperature)  # (B, T) each
    old = logprobs.detach() if on_policy else batch["old_logprobs"]
    sampled, rollout = batch["rollout_logprobs"], config.rollout
    weights = None if rollout.correction == "off" else importance_weights(old, sampled, mask, rollout.correction,
                                                                       rollout.correction_cap)
    loss, stats = policy_loss(logprobs, old, batch["advantages"], mask, actor.clip_ratio_low, actor.clip_ratio_high,
                              actor.clip_ratio_c, weights)
    ratio = importance_weights(old, sampled, mask, cap=torch.inf)
    of_tokens = {"entropy": entropy, "mismatch_abs": (old - sampled).abs(),
                 "mismatch_kl": kl_penalty(sampled, old, "k3"), "importance_ratio_clip_frac": ratio > rollout.correction_cap}
    if actor.entropy_coeff:
        loss = loss - actor.entropy_coeff * entropy
    if actor.use_kl_loss:
        of_tokens["ref_kl"] = kl_penalty(logprobs, batch["ref_logprobs"], actor.kl_loss_type)
        loss = loss + actor.kl_loss_coef * of_tokens["ref_kl"]
    stats |= {name: torch.where(mask, value.detach(), 0).sum(dtype=torch.float64) for name, value in of_tokens.items()}
    stats["rollout_max"] = (ratio * mask).max()
    total = aggregate(loss, mask, actor.loss_agg_mode, num_tokens, num_seqs)
    return total, {"loss": total.detach().double(), **stats}


def logprob_tolerance(config: SimpleNamespace) -> float:
    """By how much log-probs of the same tokens may differ, in the mean, between two ways to compute them."""
    return 1e-3 if (config.mixed_precision, config.model.dtype) == ("no", "float32") else 0.1


def check_logprob_mismatch(run: Run, step: int, difference: float) -> None:
    """Raise SystemExit where sampler and trainer differ by more than rounding: the weights did not get there."""
    limit = logprob_tolerance(run.config)
    if run.engine.apart and run.config.rollout.top_p == 1 and difference > limit:
        raise SystemExit(f"error: step {step}: the log-probs of sampler and trainer differ by {difference:.4f} in the "
                         f"mean, where rounding explains {limit}: the engine does not have the policy's weights")


def check_weight_sync(run: Run, mixture: Mixture) -> None:
    """Before anything is trained: do sampler and trainer agree? If not by packed rows, then by padded ones; if not by
    those either, raises SystemExit."""
    config, some = run.config, [prompt.token_ids for prompt in mixture[0][1][:4]]
    with raise_on_all_ranks(run.accelerator, "rollout"):
        groups = run.engine.write(some, [(i,) for i in range(len(some))], 2, min(
            16, config.data.max_response_length), config.rollout.temperature, 1.0, "")
    everyones = [unpack(packed, 2) for packed in gather_object([pack(groups)])]
    samples = [Sample(ids, response.token_ids, 0.0, rollout_logprobs=torch.from_numpy(response.logprobs))
               for groups in everyones for ids, group in zip(some, groups, strict=True) for response in group]

    def difference() -> float:
        return torch.cat([(mine - sample.rollout_logprobs).abs() for mine, sample in
                          zip(compute_logprobs(run, run.policy, samples), samples, strict=True)]).mean().item()
    found, gave_up = difference(), False
    if packing(run.policy) == "blocks" and found > logprob_tolerance(config):
        for model in filter(None, (run.policy, run.reference)):
            disable_packing(run.accelerator.unwrap_model(model))
        found, gave_up = difference(), True
    check_logprob_mismatch(run, 0, found)
    if gave_up:
        run.accelerator.print("packed rows are not for this model: it trains on padded ones")


# ---- what the processes share ---------------------------------------------------------------------------

def write_and_judge(run: Run, prompts, positions, purpose: str, n: int, temperature: float, top_p: float,
                    timer: "Timer") -> tuple[list[list[Response]], list[list[Score]]]:
    """`n` responses to each prompt, and their scores, in the prompts' order.

    Each process takes its share of the prompts, and gets the others' results. `purpose` and a prompt's
    position in the stream determine what is sampled for it.
    """
    size = run.config.rollout.tensor_parallel_size  # so many processes write the same together
    engine, engines = run.accelerator.process_index // size, run.accelerator.num_processes // size
    prompts, positions = prompts[engine::engines], positions[engine::engines]
    seeds = [tuple(make_rng(run.config.seed, purpose, at).integers(2**32, size=4).tolist()) for at in positions]
    responses, scores, failure = [], [], ""
    with timer("generate"):
        try:
            responses = run.engine.write([prompt.token_ids for prompt in prompts], seeds, n,
                                         run.config.data.max_response_length, temperature, top_p,
                                         purpose if run.accelerator.is_main_process else "")
        except (OSError, ValueError) as error:  # a server's; all processes are to end
            failure = str(error)
    with timer("reward"):
        if not failure and run.accelerator.process_index % size == 0:
            scores, failure = judge_all(run.judge, prompts, responses)
        results = gather_object([(positions, pack(responses), scores, failure)])[::size]
    if failures := [failure for *_, failure in results if failure]:
        raise SystemExit(f"error: {purpose}, {escape_control(failures[0])}")
    rows = sorted((row for positions, packed, scores, _ in results
                   for row in zip(positions, unpack(packed, n), scores, strict=True)), key=lambda row: row[0])
    timer.tokens["generate"] += sum(len(response.token_ids) for _, group, _ in rows for response in group)
    return [responses for _, responses, _ in rows], replace_failed_scores(run, purpose, [scores for *_, scores in rows])


def replace_failed_scores(run: Run, purpose: str, verdicts: list[list[Score | str]]) -> list[list[Score]]:
    """Where the verifier failed on some responses, it has met texts that it did not expect: those are wrong. Where on
    all, raises SystemExit."""
    weights = [float(weight) for weight in split_list(run.config.reward.weights)]
    failures = [verdict for judged in verdicts for verdict in judged if isinstance(verdict, str)]
    late = sum(lacks_verdict(verdict, TIMED_OUT) for judged in verdicts for verdict in judged)
    if failures and len(failures) == sum(map(len, verdicts)):
        raise SystemExit(f"error: {purpose}, {escape_control(failures[0])} (and so on all {len(failures)} responses)")
    if failures and run.accelerator.is_main_process:
        tqdm.write(f"warning: {purpose}, {len(failures)} responses count as wrong, as {escape_control(failures[0])}")
    if late and run.accelerator.is_main_process:
        tqdm.write(f"warning: {purpose}, {late} responses count as wrong: no verdict within reward.timeout="
                   f"{run.config.reward.timeout} s, or the verifier died")
    return [[no_verdict(FAILED, weights) if isinstance(verdict, str) else verdict for verdict in judged]
            for judged in verdicts]


def lacks_verdict(score: Score | str, kind: Score) -> bool:
    """Whether a score is a `TIMED_OUT` or `FAILED`, whatever that is worth."""
    return isinstance(score, Score) and score.columns == kind.columns


def judge_all(judge: Judge, prompts, responses: list[list[Response]]) -> tuple[list[list[Score | str]], str]:
    """For every response a score, or how the verifier failed on it; and what else failed, and how."""
    for prompt, group in zip(prompts, responses, strict=True):
        if not all(np.isfinite(response.logprobs).all() for response in group):
            return [], f"prompt {prompt.id}: log-probs are not finite; the policy has diverged, or its numbers overflow"
    try:
        verdicts = judge([([response.text for response in group], prompt.answer, prompt.row)
                          for prompt, group in zip(prompts, responses, strict=True)])
    except Exception as error:  # no worker, or a row that cannot travel; the other processes are to hear of it
        return [], str(error) if isinstance(error, (ValueError, OSError)) else repr(error)
    return [[f"prompt {prompt.id} ({prompt.text[-60:]!r}), response ({response.text[-60:]!r}): {verdict}"
             if isinstance(verdict, str) else verdict for response, verdict in zip(group, judged, strict=True)]
            for prompt, group, judged in zip(prompts, responses, verdicts, strict=True)], ""


@torch.no_grad()
def compute_logprobs(run: Run, model: torch.nn.Module, samples: list[Sample]) -> list[Tensor]:
    """Each response's log-probs (T,) under `model`, on the CPU; the processes share the work."""
    rank, world = run.accelerator.process_index, run.accelerator.num_processes
    mine = {}
    for indices in micro_batches(samples, run.config.actor.max_tokens_per_micro_batch, rank, world,
                                 bool(packing(run.policy))):
        with run.accelerator.autocast():
            logprobs, _ = response_logprobs(model, make_batch(run, samples, indices), run.config.rollout.temperature)
        mine |= {i: row[:len(samples[i].response_ids)].clone() for i, row in zip(indices, logprobs.cpu(), strict=False)}
    everyones = {i: row for part in gather_object([mine]) for i, row in part.items()}
    return [everyones[i] for i in range(len(samples))]


def make_batch(run: Run, samples: list[Sample], indices: list[int]) -> dict:
    """A micro-batch on the device. An empty one is a response that does not train: every rank must take part."""
    rows = [samples[i] for i in indices] or [replace(min(samples, key=len), trains=False)]
    return collate(rows, run.tokenizer.pad_token_id or 0, run.accelerator.device, packing(run.policy))


# ---- the directory of a run --------------------------------------------------------------------------------

def resume_or_start(run: Run, prompts: Mixture) -> tuple[dict, Counter, Evaluations]:
    """Go back to the run's newest checkpoint where there is one, and start the tracker.

    Returns what identifies the run, the counters of the last step done, and the evaluations so far. Raises OSError.
    """
    config, run_dir, progress = run.config, Path(run.config.run_dir), {"counters": {}, "evaluations": {}}
    identity = {"config": flatten(config), "data": hash_prompts(prompts)}
    if any(other != identity for other in gather_object([identity])):
        raise OSError("the processes were given different configs, or read different data.train_file")
    if path := find_checkpoint(run.accelerator, config.run_dir, config.resume):
        progress = read_metadata(path)
        if progress["data"] != identity["data"]:
            raise OSError(f"{path} is of a run on other prompts: data.train_file has changed; name another run_dir")
        load_checkpoint(run.accelerator, run.policy, run.optimizer.optimizer, path)
        run.accelerator.print(f"going on from {path}")
        if any(progress["config"].get(key) != value for key, value in identity["config"].items()
               if key.startswith("val.") and key != "val.every"):
            progress["evaluations"] = {}  # not to be compared with those to come
    sync_weights(run)
    check_weight_sync(run, prompts)
    truncate_run(run.accelerator, run_dir, path.parent.parent if path else run_dir, progress["counters"].get("step", -1))
    with raise_on_all_ranks(run.accelerator, "run_dir"):
        if run.accelerator.is_main_process:
            (run_dir / "rollouts").mkdir(exist_ok=True)
            resolved = json.loads(json.dumps(config, default=vars))
            write_atomic(run_dir / "config.yaml", yaml.safe_dump(resolved, sort_keys=False))
    run.accelerator.init_trackers("dapo", flatten(config))
    return identity, Counter(progress["counters"]), {
        name: {title: Evaluation(**kept) for title, kept in of_set.items()}
        for name, of_set in progress["evaluations"].items()}


def hash_prompts(mixture: Mixture) -> str:
    """What tells two mixtures of prompts apart."""
    digest = hashlib.sha256()
    for weight, prompts in mixture:
        digest.update(f"{weight} * {len(prompts)}".encode())
        for prompt in prompts:
            digest.update(f"{prompt.text}\0{prompt.answer}\0".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def save_model(run: Run, name: str) -> None:
    """Write policy and tokenizer as a transformers directory; aside first, so that a half-written one has no name."""
    run_dir, policy = Path(run.config.run_dir), run.accelerator.unwrap_model(run.policy)
    weights = {}
    for key, weight in iter_full_weights(policy):
        if run.accelerator.is_main_process:
            weights[key] = weight.to("cpu", policy.dtype)
    with raise_on_all_ranks(run.accelerator, f"cannot save {run_dir / name}"):
        if run.accelerator.is_main_process:
            aside = run_dir / f".{name}.partial"
            shutil.rmtree(aside, ignore_errors=True)
            policy.save_pretrained(aside, state_dict=weights)
            run.tokenizer.save_pretrained(aside)
            for file in aside.iterdir():
                file.chmod(0o644)  # safetensors leaves weights to their owner
            replace_dir(aside, run_dir / name)


@contextmanager
def stop_on_signal(accelerator: Accelerator) -> Iterator[None]:
    """Ctrl-C and SIGTERM ask for the end of the run after the current step; a second Ctrl-C ends it at once."""
    def ask(number: int, _) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        accelerator.set_trigger()
        if accelerator.is_main_process:
            os.write(2, b"\nfinishing this step; Ctrl-C once more stops at once\n")  # print is not safe in a handler
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- what a run shows -----------------------------------------------------------------------------------

class Timer:
    """Seconds and tokens of a step's phases: `with timer("generate"): ...`."""

    def __init__(self) -> None:
        self.seconds, self.tokens, self.start = Counter(), Counter(), time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        """`time/<phase>` in seconds, `time/step` for all of it, `tokens_per_s/<phase>`."""
        step = time.perf_counter() - self.start
        seconds = {phase: self.seconds[phase] for phase in
                   ("generate", "reward", "logprobs", "update", "sync")}
        seconds["other"] = step - sum(seconds.values())
        return {**{f"time/{phase}": value for phase, value in seconds.items()}, "time/step": step,
                **{f"tokens_per_s/{phase}": tokens / seconds[phase] for phase, tokens in self.tokens.items()}}


def mean(values) -> float:
    """The mean of some numbers, 0 of none."""
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def rollout_metrics(config: SimpleNamespace, generated: list[Group], kept: list[Group], trained: list[Group]) -> dict:
    """What was written in a step, before the filter and after."""
    responses = [response for group in generated for response in group.responses]
    lengths = [len(response.token_ids) for response in responses]
    trained_lengths = [len(response.token_ids) for group in trained for response in group.responses]
    return {
        "reward/mean": mean(reward for group in generated for reward in group.final_rewards),
        "reward/score": mean(score.score for group in generated for score in group.scores),
        "reward/timeouts": sum(lacks_verdict(score, TIMED_OUT) for group in generated for score in group.scores),
        "reward/errors": sum(lacks_verdict(score, FAILED) for group in generated for score in group.scores),
        **mean_columns([score for group in generated for score in group.scores]),
        "acc/before_filter": mean(score.acc for group in generated for score in group.scores),
        **({"acc/after_filter": mean(score.acc for group in trained for score in group.scores)} if trained else {}),
        "groups/kept": len(kept) / len(generated),
        "groups/trained": len(trained),
        "groups/all_correct": mean(all(acc == 1 for acc in group.metric("acc")) for group in generated),
        "groups/all_wrong": mean(all(acc == 0 for acc in group.metric("acc")) for group in generated),
        "responses/generated": len(responses),
        "responses/wasted": len(responses) - len(trained_lengths),
        **({"responses/generated_per_trained": len(responses) / len(trained_lengths)} if trained else {}),
        "responses/wasted_tokens": sum(lengths) - sum(trained_lengths),
        "response_length/mean": mean(lengths),
        "response_length/max": max(lengths),
        "response_length/truncated": mean(response.finish_reason == "length" for response in responses),
        "response_length/penalised": mean(overlong_shaping(config, response) < 0 for response in responses),
    }


def actor_metrics(config: SimpleNamespace, sums: dict[str, float], losses: list[float], norms: list[float]) -> dict:
    """What an update did: means over its optimizer steps (loss, gradient norm) or its trained tokens (all else)."""
    tokens = sums["tokens"]
    names = ["entropy", "token_prob", "ratio", "kl", "mismatch_abs", "clip_frac_high", "clip_frac_low"]
    names += ["mismatch_kl", "importance_ratio_clip_frac"]
    names += ["clip_frac_dual"] * bool(config.actor.clip_ratio_c) + ["ref_kl"] * config.actor.use_kl_loss
    return {"actor/loss": mean(losses), "actor/grad_norm": mean(norms), "actor/max_grad_norm": max(norms),
            **{f"actor/{name}": sums[name] / tokens for name in names},
            "actor/clip_up_prob": sums["clip_up_prob"] / max(1, sums["clip_frac_high"])}


def rollout_records(step: int, groups: list[Group], advantages: Tensor) -> Iterator[str]:
    """The lines of a rollout file: a response each, with all that was made of it. JSON in ASCII: whatever the policy
    writes, it does not reach a terminal."""
    for group, row in zip(groups, advantages.tolist(), strict=True):
        for response, score, reward, final, advantage in zip(group.responses, group.scores, group.rewards,
                                                             group.final_rewards, row, strict=True):
            yield json.dumps({
                "step": step, "position": group.position, "prompt": group.prompt.text, "answer": group.prompt.answer,
                "response": response.text, "tokens": len(response.token_ids), "finish_reason": response.finish_reason,
                "pred": score.pred, "acc": score.acc, "score": score.score, "reward": reward, "final_reward": final,
                "advantage": advantage, **{f"verdict/{name}": value for name, value in score.columns.items()}}) + "\n"


def validate(run: Run, prompts: list[Prompt]) -> Evaluation:
    """Judge the policy as it stands on the validation prompts, with the same random numbers each time."""
    val = run.config.val
    responses, scores = write_and_judge(run, prompts, list(range(len(prompts))), "validation", val.n, val.temperature,
                                        val.top_p, Timer())
    return evaluate(prompts, responses, scores, val.level_key)


def record(run: Run, metrics: dict, groups: list[Group], advantages: Tensor) -> None:
    """Add a row to metrics.jsonl and the tracker, and a file to rollouts/."""
    run_dir, step, some = Path(run.config.run_dir), metrics["step"], slice(run.config.save_rollouts)
    with raise_on_all_ranks(run.accelerator, f"cannot record step {step} in {run_dir}"):
        run.accelerator.log(metrics, step=step)
        if run.accelerator.is_main_process:
            with open(run_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(metrics) + "\n")
            if groups[some]:
                rows = rollout_records(step, groups[some], advantages[some])
                (run_dir / "rollouts" / f"step_{step:05d}.jsonl").write_text("".join(rows), encoding="utf-8")


def run_training(run: Run, data: Data, identity: dict, done: Counter, evaluations: Evaluations) -> bool:
    """Train, with validation, recording, checkpoints and a progress bar around the algorithm; save the policy.

    Fills in `evaluations`, each set's before and after. Returns whether the run came to its end: a signal may stop it.
    """
    config, last = run.config, run.config.total_training_steps

    def validation(step: int) -> dict[str, float]:
        if not data.val or not (step in (0, last) or (config.val.every and step % config.val.every == 0)):
            return {}
        start, metrics = time.perf_counter(), {}
        for name, prompts in data.val.items():
            evaluation = evaluations.setdefault(name, {})["after" if step else "before"] = validate(run, prompts)
            metrics |= {f"val/{name}/{key}": value for key, value in evaluation.metrics.items()}
        return metrics | {"time/validate": time.perf_counter() - start}

    if not done["step"] and (before := validation(0)):
        record(run, {"step": 0, **before}, [], torch.empty(0))
        run.accelerator.print("\n" + format_tables(evaluations) + "\n")
    with tqdm(train(run, data.train, done), "DAPO", last, initial=done["step"],
              disable=not run.accelerator.is_main_process) as bar:
        for metrics, groups, advantages in bar:
            step = metrics["step"]
            record(run, metrics | validation(step), groups, advantages)
            bar.set_postfix_str(summary(metrics, evaluations), refresh=False)
            if config.save_model_every and step % config.save_model_every == 0:
                save_model(run, f"model_step_{step:05d}")
            if step == last:
                save_results(run)  # before the last checkpoint, which says that the run is finished
            stop = run.accelerator.check_trigger()  # whichever process was told
            if stop or (config.save_every and (step == last or step % config.save_every == 0)):
                save_checkpoint(run.accelerator, run.policy, run.optimizer.optimizer, config.run_dir, identity | {
                    "counters": {name: metrics[name] for name in COUNTERS},
                    "evaluations": {name: {title: asdict(figures) for title, figures in of_set.items()}
                                    for name, of_set in evaluations.items()}}, config.keep_checkpoints)
            if stop:
                break
    return step == last


def save_results(run: Run) -> None:
    """What a finished run leaves: the policy, and the picture of its metrics."""
    save_model(run, "model")
    with raise_on_all_ranks(run.accelerator, "curves.png"):
        if run.accelerator.is_main_process:
            plot_runs([run.config.run_dir], Path(run.config.run_dir) / "curves.png")


def summary(metrics: dict, evaluations: Evaluations) -> str:
    """What the progress bar says of a step."""
    latest = {name: of_set.get("after", of_set.get("before")) for name, of_set in evaluations.items()}
    accuracy = [f", {name} {value:.3f}" for name, figures in latest.items() for key, value in figures.metrics.items()
                if "avg@" in key]
    return (f"reward {metrics['reward/mean']:.2f}, acc {metrics['acc/before_filter']:.2f}" + "".join(accuracy)
            + f", length {metrics['response_length/mean']:.0f}, kept {metrics['groups/kept']:.0%}")


def report(run: Run, evaluations: Evaluations, seconds: float) -> None:
    """Validation before and after, one problem's responses before and after, and where the results are."""
    if evaluations:
        of_set = next(iter(evaluations.values()))
        first = next(iter(of_set.values()))
        print("\n" + format_tables(evaluations) + f"\n\n{first.prompt!r}, whose answer is {first.answer!r}:")
        for title, evaluation in of_set.items():
            print("\n".join(f"  {title:<8}{text!r}" for text in evaluation.examples[:4]))
    print(f"\n{run.config.total_training_steps} steps; {seconds:.0f} s since the start. "
          f"{run.config.run_dir} has curves.png, metrics.jsonl, rollouts/, checkpoints/ and model/")


def main() -> None:
    """Set up, train, save. A failure in between leaves the last good policy behind, a signal a checkpoint."""
    config = read_command_line("Train a policy with DAPO.")
    with one_line_errors():
        check_run_dir(config)
    run, data = setup(config)
    start = time.perf_counter()
    with one_line_errors():
        lock = lock_run_dir(run.accelerator, config)
        identity, done, evaluations = resume_or_start(run, data.train)
    try:
        with stop_on_signal(run.accelerator), one_line_errors():
            finished = run_training(run, data, identity, done, evaluations)
    except SystemExit as error:
        message = f"{error}{save_after_failure(run)}"
        run.engine.close()
        raise SystemExit(message) from None
    except KeyboardInterrupt:
        saved = [f"goes on from {path}" for path in list_checkpoints(config.run_dir)] or ["begins anew"]
        raise SystemExit(f"interrupted; the same command {saved[0]}") from None
    if run.accelerator.is_main_process and finished:
        report(run, evaluations, time.perf_counter() - start)
    elif run.accelerator.is_main_process:
        command = [argument for argument in sys.argv if not argument.startswith("resume=")]
        print("stopped, and saved. To go on, with the launcher's options as before:\n"
              f"accelerate launch {shlex.join(command)} resume=auto")
    run.accelerator.wait_for_everyone()  # gloo can deadlock in a process that ends long after the others
    run.engine.close()  # before the process groups that it has joined are gone
    run.accelerator.end_training()
    lock.release()
    if run.accelerator.num_processes > 1:  # all is done; gloo, when it is taken down, now and then waits for ever
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def save_after_failure(run: Run) -> str:
    """After a failure: save the policy, where something was learned, and say where it is."""
    if not run.optimizer.state:
        return ""
    try:
        save_model(run, "last_good_model")
    except OSError as error:
        return f". The policy is lost: {error}"
    return f". The policy as it was is in {run.config.run_dir}/last_good_model"


if __name__ == "__main__":
    main()
