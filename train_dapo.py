"""DAPO (arXiv 2503.14476): Algorithm 1 as one loop, the update of the policy, and `main`.

    accelerate launch train_dapo.py --config config.yaml [key.sub=value ...]

Comments in `train` give the line numbers of the paper's Algorithm 1. Every rank knows the lengths
and scores of all responses of a step, so that all take the same decisions and divide by the same
counts; it has the tokens of those that it generated, then of those that it trains. Departures from
the paper (those of the equations stand at the heads of sampling.py, losses.py and reward.py):
  1. A step ends with a full buffer; the paper's lines 7 and 8 begin a new step until it is full.
  2. Line 10's iterations are `ppo_epochs` passes over shuffled mini-batches, as in its code.
"""

import math
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import infra  # noqa: F401  before torch: it limits how long threads spin
import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from evaluate import format_tables, validation_metrics
from infra.batching import make_batch, micro_batches
from infra.checkpoint import (Progress, check_run_dir, list_checkpoints, lock_run_dir,
                              resume_or_start, save_after_failure, save_results)
from infra.config import one_line_errors, read_command_line
from infra.data import Data
from infra.distributed import in_order, is_sharded, owner_of, stop_on_signal
from infra.exchange import send_to_trainers
from infra.experts import record_routing, router_aux_loss
from infra.logprobs import (check_logprob_mismatch, compute_logprobs, old_logprobs_are_rollouts,
                            response_logprobs)
from infra.metrics import (StatTotals, Timer, actor_metrics, log_step, print_report, progress_text,
                           rollout_metrics)
from infra.packing import packing_kind
from infra.setup import TrainState, set_learning_rate, setup, sync_weights
from losses import Stat, aggregate, group_advantages, importance_weights, kl_penalty, policy_loss
from rollout import SamplingParams, generate
from sampling import (Group, Sample, check_underfilled, count_groups, describe_filter,
                      draw_prompts, generation_batch_size, keep_group, make_groups, mini_batches,
                      score_responses, select_groups)


def train(state: TrainState, data: Data, progress: Progress) -> bool:
    """DAPO's Algorithm 1, from the step that `progress` has reached.

    Returns whether the last step was reached: a signal may stop the run earlier. Raises ValueError
    or OSError if it cannot continue.
    """
    config, counters, rollout = state.config, progress.counters, state.config.rollout
    size = config.data.train_batch_size
    max_gen_batches = config.filter_groups.max_num_gen_batches or math.inf
    uses_logprobs = rollout.correction != "off" or old_logprobs_are_rollouts(state)
    params = SamplingParams(rollout.n, config.data.max_response_length, rollout.temperature,
                            rollout.top_p, 1.0 if uses_logprobs else 1 / 16)  # for metrics
    steps = tqdm(range(counters["step"] + 1, config.total_training_steps + 1), "DAPO",
                 config.total_training_steps, initial=counters["step"],
                 disable=not state.accelerator.is_main_process)
    for step in steps:                                              # 1: for step = 1..M
        timer, generated, kept, gen_batches = Timer(), [], [], 0    # 3: the policy is now pi_old
        while len(kept) < size and gen_batches < max_gen_batches:   # 7, 8: until the buffer is full
            position = counters["prompts_drawn"]
            count = generation_batch_size(config, counters, len(kept), len(generated))
            prompts = draw_prompts(data.train, position, count, config.seed)  # 2: batch of prompts
            positions = range(position, position + count)
            with timer("generate"):                                 # 4: n responses each
                responses = generate(state, prompts, positions, f"step {step}", params)
            with timer("reward"):                                   # 5: rewards
                scores = score_responses(state, prompts, responses, f"step {step}")
            groups = make_groups(config, positions, prompts, responses, scores)  # overlong penalty
            if config.algorithm.use_kl_in_reward:
                with timer("logprobs"):
                    groups = apply_kl_penalty(state, groups)
            # 6: filter, and add to the buffer
            kept += [group for group in groups if keep_group(group, config.filter_groups)]
            generated += groups
            counters["prompts_drawn"] += count
            gen_batches += 1
        groups = select_groups(kept, config)
        count_groups(counters, len(kept), len(generated), len(groups))
        stop_reason = check_underfilled(state, counters, step, kept, generated, gen_batches)

        advantages, metrics, totals = None, {}, StatTotals(config, groups)
        if groups:
            advantages = compute_advantages(config, groups)         # 9: advantages
            samples = make_samples(config, groups, advantages)
            batches = mini_batches(len(samples), config.actor.ppo_mini_batch_size,
                                   config.actor.ppo_epochs, config.seed, step)
            with timer("sync"):
                state.engine.sleep()
            with timer("logprobs"):
                samples = add_logprobs(state, samples, batches)
            with timer("update"):
                lr = set_learning_rate(state, step)
                for indices in batches:                             # 10: mini-batches
                    mini_batch = [samples[i] for i in indices]
                    update_policy(state, mini_batch, totals)        # 11: equation 8
                metrics = actor_metrics(state.accelerator, totals, lr)
            with timer("sync"):
                sync_weights(state)
            check_logprob_mismatch(state, step, metrics.get("actor/mismatch_abs", 0.0))
            timer.tokens["update"] = sum(len(samples[i]) for indices in batches for i in indices)
        counters["optimizer_steps"] += len(totals.grad_norms)
        counters["step"] = step

        metrics = {**counters, "gen_batches": gen_batches,
                   **rollout_metrics(config, generated, kept, groups), **metrics,
                   **timer.metrics(generated)}
        if not stop_reason:
            metrics |= validation_metrics(state, data.val, step, progress.evaluations)
        log_step(state, metrics, generated, groups, advantages, totals)
        if stop_reason:  # raised only now, so that the step is logged
            raise ValueError(stop_reason)
        steps.set_postfix_str(progress_text(metrics, progress.evaluations), refresh=False)
        if save_results(state, progress):  # a signal asked for the end
            break
    return counters["step"] == config.total_training_steps


# ---- lines 5 and 9: rewards and advantages -------------------------------------------------------

def apply_kl_penalty(state: TrainState, groups: list[Group]) -> list[Group]:
    """Subtract kl_coef * KL(policy || reference), summed over a response, from its reward."""
    algorithm = state.config.algorithm
    samples = [Sample(group.prompt.token_ids, response.token_ids, 0.0)
               for group in groups for response in group.responses]
    penalties, owners = [], [owner_of(state.accelerator, sample.response_ids) for sample in samples]
    for policy, reference in zip(compute_logprobs(state, state.policy, samples),
                                 compute_logprobs(state, state.reference, samples), strict=True):
        if policy is not None:  # the response is here
            kl = kl_penalty(policy.double(), reference.double(), algorithm.kl_penalty).sum().item()
            penalties.append(algorithm.kl_coef * kl)
    penalties, penalised = iter(in_order(gather_object([penalties]), owners)), []
    for group in groups:
        rewards = [reward - next(penalties) for reward in group.rewards]
        penalised.append(replace(group, final_rewards=rewards))
    return penalised


def compute_advantages(config: SimpleNamespace, groups: list[Group]) -> list:
    """The advantage of each response (equation 9): a list for each group with, for each response, a
    number, or a tensor (T,) of one per token."""
    rewards = torch.tensor([group.final_rewards for group in groups], dtype=torch.float64)  # (G, n)
    return group_advantages(rewards, config.algorithm.norm_adv_by_std_in_grpo).tolist()


def make_samples(config: SimpleNamespace, groups: list[Group], advantages: list) -> list[Sample]:
    """All responses of the groups as samples; overlong filtering masks truncated ones."""
    filtering, samples = config.algorithm.overlong_filtering, []
    for group, of_group in zip(groups, advantages, strict=True):
        for i, (response, advantage) in enumerate(zip(group.responses, of_group, strict=True)):
            in_loss = not (filtering and response.finish_reason == "length")
            logprobs = None if response.logprobs is None else torch.from_numpy(response.logprobs)
            samples.append(Sample(group.prompt.token_ids, response.token_ids, advantage, in_loss,
                                  logprobs, key=(group.position, i)))
    return samples


# ---- lines 10 and 11: the update -----------------------------------------------------------------

def add_logprobs(state: TrainState, samples: list[Sample], batches: list) -> list[Sample]:
    """Send each sample to the ranks that train it, with old and reference log-probs if needed.

    The first mini-batch is trained by the very policy that generated it: its old log-probs are its
    log-probs, and it gets none unless it is trained again in a later epoch. A sample's log-probs
    come from the rank that trains it in the first epoch.
    """
    config, epochs = state.config, state.config.actor.ppo_epochs
    samples = send_to_trainers(state, samples, batches[:len(batches) // epochs])
    if old_logprobs_are_rollouts(state):
        samples = [replace(sample, old_logprobs=sample.rollout_logprobs) for sample in samples]
    else:
        first = set(batches[0].tolist()) if epochs == 1 else set()
        needed = [i for i in range(len(samples)) if i not in first]
        old = compute_logprobs(state, state.policy, [samples[i] for i in needed]) if needed else []
        for i, logprobs in zip(needed, old, strict=True):
            samples[i] = replace(samples[i], old_logprobs=logprobs)
    if config.actor.use_kl_loss:
        ref = compute_logprobs(state, state.reference, samples)
        samples = [replace(sample, ref_logprobs=logprobs)
                   for sample, logprobs in zip(samples, ref, strict=True)]
    names = ["rollout_logprobs", "old_logprobs", "ref_logprobs"][:2 + config.actor.use_kl_loss]
    return send_to_trainers(state, samples, batches, names) if epochs > 1 else samples


def update_policy(state: TrainState, mini_batch: list[Sample], totals: StatTotals) -> None:
    """One optimizer step on a mini-batch; none if no sample is in the loss. Adds the loss's
    statistics and the gradient norm to `totals`.

    The gradient is that of the whole mini-batch, however it is split into micro-batches and over
    ranks. If it is not finite, fp16 skips the step and halves the scale of the loss. Raises
    ValueError if there is no such scale, or it is down to 1.
    """
    config, accelerator = state.config, state.accelerator
    num_tokens = sum(len(sample.response_ids) for sample in mini_batch if sample.in_loss)
    num_seqs = sum(sample.in_loss for sample in mini_batch)
    if not num_seqs:
        return
    micros = micro_batches(mini_batch, config.actor.max_tokens_per_micro_batch,
                           accelerator.process_index, accelerator.num_processes,
                           bool(packing_kind(state.policy)))
    for indices in micros:
        batch = make_batch(state, mini_batch, indices)
        # Ranks sum their gradients with the last micro-batch only; sharded ones after each, since
        # gradients that are not yet summed take the memory of a whole model.
        sync = indices is micros[-1] or is_sharded(accelerator)
        with nullcontext() if sync else accelerator.no_sync(state.policy):
            with accelerator.autocast():
                loss, stats = compute_loss(config, state.policy, batch, num_tokens, num_seqs)
            accelerator.backward(loss * accelerator.num_processes)  # DDP and FSDP average over them
        totals.add(stats, batch["mask"], [mini_batch[i] for i in indices])
    norm = accelerator.clip_grad_norm_(state.policy.parameters(), config.actor.grad_clip)
    norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    finite, scaler = math.isfinite(norm), accelerator.scaler
    if not finite and not (scaler and scaler.get_scale() > 1):
        raise ValueError(f"update {len(totals.grad_norms) + 1} of this step has the gradient norm "
                         f"{norm}; not applied. A lower actor.lr, or model.dtype float32, may help")
    state.optimizer.step()
    state.optimizer.zero_grad()
    totals.skipped_updates += not finite
    totals.grad_norms += [norm] * finite


def compute_loss(config: SimpleNamespace, policy: torch.nn.Module, batch: dict, num_tokens: int,
                 num_seqs: int) -> tuple[Tensor, dict[str, Stat]]:
    """A micro-batch's part of the loss (equation 8, negated, and optional terms) and statistics.

    A batch without old log-probs is trained by the policy that generated it: they are the current
    ones. `num_tokens`, `num_seqs`: those in the loss, in the whole mini-batch over all ranks.
    """
    actor, rollout, mask = config.actor, config.rollout, batch["mask"]
    with record_routing(policy, enabled=actor.router_aux_loss_coef > 0) as routing:
        logprobs, entropy = response_logprobs(policy, batch, rollout.temperature)  # (B, T) each
    old = batch.get("old_logprobs", logprobs.detach())
    rollout_logprobs, weights = batch["rollout_logprobs"], None
    if rollout.correction != "off":
        weights = importance_weights(old, rollout_logprobs, mask, rollout.correction,
                                     rollout.correction_cap)
    loss, stats = policy_loss(logprobs, old, batch["advantages"], mask, actor.clip_ratio_low,
                              actor.clip_ratio_high, actor.clip_ratio_c, weights)
    importance_ratio = importance_weights(old, rollout_logprobs, mask, cap=math.inf)
    known = ~rollout_logprobs.isnan()  # to compare sampler and trainer
    stats |= {"entropy": Stat(entropy),
              "mismatch_abs": Stat((old - rollout_logprobs).abs(), mask=known),
              "mismatch_kl": Stat(kl_penalty(rollout_logprobs, old, "k3"), mask=known),
              "importance_ratio_max": Stat(importance_ratio, "max", known),
              "importance_ratio_clip_frac": Stat(importance_ratio > rollout.correction_cap,
                                                 mask=known)}
    if actor.entropy_coeff:
        loss = loss - actor.entropy_coeff * entropy
    if actor.use_kl_loss:
        ref_kl = kl_penalty(logprobs, batch["ref_logprobs"], actor.kl_loss_type)
        loss = loss + actor.kl_loss_coef * ref_kl
        stats["ref_kl"] = Stat(ref_kl)
    total = aggregate(loss, mask, actor.loss_agg_mode, num_tokens, num_seqs)
    if routing:  # a mixture of experts: the mean over responses of a loss of their own
        aux_loss = router_aux_loss(routing, batch)  # (B, 1)
        stats["router_aux_loss"] = Stat(aux_loss)
        total = total + actor.router_aux_loss_coef * aggregate(
            aux_loss, mask, "seq-mean-token-mean", num_tokens, num_seqs)
    return total, stats | {"loss": Stat(total, "sum")}


# ---- the run -------------------------------------------------------------------------------------

def main() -> None:
    """Set up, train, report. On an error the policy is saved, on a signal a checkpoint."""
    config = read_command_line("Train a policy with DAPO.")
    with one_line_errors():
        check_run_dir(config)
    start = time.perf_counter()
    state, data = setup(config)
    accelerator = state.accelerator
    accelerator.print(describe_filter(config.filter_groups))
    with one_line_errors():
        lock = lock_run_dir(accelerator, config)
        progress = resume_or_start(state, data.train)
    try:
        with stop_on_signal(accelerator), one_line_errors():
            if not progress.counters["step"]:
                before = validation_metrics(state, data.val, 0, progress.evaluations)
                if before:
                    log_step(state, {"step": 0, **before})
                    accelerator.print("\n" + format_tables(progress.evaluations) + "\n")
            finished = train(state, data, progress)
        if accelerator.is_main_process:
            print_report(config, progress, time.perf_counter() - start, finished)
        accelerator.wait_for_everyone()  # gloo can deadlock in one that ends long after others
        state.engine.close()  # before the process groups that it has joined are gone
        accelerator.end_training()
    except SystemExit as error:
        message = f"{error}{save_after_failure(state, error)}"
        state.engine.close()
        raise SystemExit(message) from None
    except KeyboardInterrupt:
        saved = [f"resumes from {path}" for path in list_checkpoints(config.run_dir)]
        raise SystemExit("interrupted; the same command "
                         f"{saved[0] if saved else 'starts from the beginning'}") from None
    finally:
        lock.release()
    if accelerator.num_processes > 1:  # gloo's own shutdown sometimes hangs; all work is done
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
