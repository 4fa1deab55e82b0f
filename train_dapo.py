"""DAPO (arXiv 2503.14476): Algorithm 1 as one loop, the update of the policy, and `main`.

    accelerate launch train_dapo.py --config config.yaml [key.sub=value ...]

Numbers in the comments of `train` are the lines of the paper's Algorithm 1. Every rank knows every
response of a step, so all take the same decisions and divide by the same counts; each generates,
scores and trains a share of them. Departures from the paper (those of the equations stand at the
heads of sampling.py, losses.py and reward.py):
  1. A step generates until its buffer is full, or `max_num_gen_batches` is reached; the paper's
     lines 7 and 8 begin a new step instead.
  2. Line 10's iterations are `ppo_epochs` passes over shuffled mini-batches, as in its code.
"""

import math
import time
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import infra  # noqa: F401  before torch: it limits how long threads spin
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from data_types import Data, Group, Progress, Sample, SamplingParams, Stat, TrainState, Update
from evaluate import validate
from infra.batching import make_batch, micro_batches
from infra.checkpoint import (check_run_dir, end_after_failure, list_checkpoints, lock_run_dir,
                              prepare_run_dir, resume, save_results)
from infra.config import one_line_errors, read_command_line, stop_strings
from infra.distributed import (end_processes, is_sharded, raise_on_all_ranks, show_progress,
                               step_bar, stop_on_signal)
from infra.health import check_health
from infra.logprobs import (check_logprob_mismatch, check_weight_sync, compute_logprobs,
                            mismatch_stats, response_logprobs, uses_rollout_logprobs)
from infra.memory import out_of_memory
from infra.metrics import (StepRecord, format_tables, print_report, progress_text, step_metrics,
                           validation_metrics)
from infra.packing import packing_kind
from infra.rollout_files import write_step
from infra.setup import set_learning_rate, setup, sync_weights
from infra.trackers import end_tracker
from losses import aggregate, group_advantages, importance_weights, kl_penalty, policy_loss
from plot import plot_runs
from rollout import generate, transformers_engine
from sampling import (check_underfilled, describe_filter, draw_prompts, drop_reason, keep_group,
                      make_groups, mini_batches, score_responses, select_groups, update_counters)


def train(state: TrainState, data: Data, progress: Progress) -> None:
    """DAPO's Algorithm 1, from the step after those of `progress`, which it updates, to the last,
    or to a signal. Raises ValueError or OSError if it cannot continue."""
    config, accelerator = state.config, state.accelerator
    size, limit = config.data.train_batch_size, config.filter_groups.max_num_gen_batches or math.inf
    steps = step_bar(accelerator, progress.counters["step"], config.total_training_steps)
    for step in steps:                                               # 1: for step = 1..M
        record, buffer, name = StepRecord(step, config, drop_reason), [], f"step {step}"
        while len(buffer) < size and record.gen_batches < limit:     # 7, 8: until it is full
            prompts = draw_prompts(data.train, config, progress.counters,
                                   record.generated, len(buffer))    # 2: a batch of prompts
            with record.timer("generate"):                           # 4: n responses to each
                responses = generate(state, prompts, sampling_params(state), name, description=name)
            with record.timer("reward"):                             # 5: their rewards
                scores = score_responses(state, prompts, responses, name)
            groups = make_groups(config, prompts, responses, scores)
            if config.algorithm.use_kl_in_reward:
                with record.timer("logprobs"):
                    groups = apply_kl_penalty(state, groups)
            record.add_generated(groups)
            buffer += [group for group in groups if keep_group(group, config.filter_groups)]  # 6
        groups = record.groups = select_groups(buffer, config)
        if groups:
            advantages = record.advantages = compute_advantages(config, groups)  # 9: equation 9
            batches = mini_batches(make_samples(config, groups, advantages), config, step)
            with record.timer("logprobs"):
                batches = add_logprobs(state, batches)
            with record.timer("update"):
                for mini_batch in show_progress(accelerator, batches, "update"):   # 10: for each
                    record.add_update(update_policy(state, mini_batch, step))  # 11: equation 8
            with record.timer("sync"):                               # 3: pi_old <- pi, for the next
                sync_weights(state)
        progress.counters = update_counters(progress.counters, record, len(buffer), len(groups))
        evaluations = validate(state, data.val, step)
        progress.evaluations |= evaluations
        metrics = step_metrics(state, record, buffer, progress.counters, evaluations)
        write_step(state, record, buffer, metrics)
        check_underfilled(state, record, buffer, metrics["consecutive_skips"])
        check_logprob_mismatch(state, step, metrics.get("actor/mismatch_abs", 0.0))
        check_health(state, progress, metrics)
        steps.set_postfix_str(progress_text(metrics, progress.evaluations), refresh=False)
        stop = accelerator.check_trigger()  # any rank has received a signal
        save_results(state, progress, checkpoint=stop)
        if stop:
            break


# ---- lines 4, 5 and 9: sampling, rewards, advantages ---------------------------------------------

def sampling_params(state: TrainState) -> SamplingParams:
    """The sampling parameters of training. vLLM is asked for log-probs if the loss uses them; else
    for those of some prompts, to measure how far sampler and trainer differ."""
    config, rollout = state.config, state.config.rollout
    in_loss = rollout.correction != "off" or uses_rollout_logprobs(state)
    return SamplingParams(rollout.n, config.data.max_response_length, rollout.temperature,
                          rollout.top_p, 1.0 if in_loss else 1 / 16, stop_strings(rollout.stop))


def apply_kl_penalty(state: TrainState, groups: list[Group]) -> list[Group]:
    """The groups with `final_rewards` of reward - kl_coef * KL(policy || reference), summed over a
    response."""
    algorithm, penalised = state.config.algorithm, []
    samples = [Sample(group.prompt.token_ids, response.token_ids, 0.0,
                      key=(group.prompt.position, i))
               for group in groups for i, response in enumerate(group.responses)]
    logprobs, ref_logprobs = (compute_logprobs(state, model, [samples])
                              for model in (state.policy, state.reference))
    for group in groups:
        rewards = []
        for i, reward in enumerate(group.rewards):
            key = (group.prompt.position, i)
            kl = kl_penalty(logprobs[key].double(), ref_logprobs[key].double(),
                            algorithm.kl_penalty)
            rewards.append(reward - algorithm.kl_coef * kl.sum().item())
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
    for group, values in zip(groups, advantages, strict=True):
        for i, (response, advantage) in enumerate(zip(group.responses, values, strict=True)):
            in_loss = not (filtering and response.finish_reason == "length")
            samples.append(Sample(group.prompt.token_ids, response.token_ids, advantage, in_loss,
                                  torch.from_numpy(response.logprobs),
                                  key=(group.prompt.position, i)))
    return samples


# ---- lines 10 and 11: the update -----------------------------------------------------------------

def add_logprobs(state: TrainState, batches: list[list[Sample]]) -> list[list[Sample]]:
    """The mini-batches with old log-probs, and those of the reference if the loss has a KL term."""
    config = state.config
    first_epoch = batches[:len(batches) // config.actor.ppo_epochs]  # it has every sample
    state.engine.sleep()  # frees its memory for the trainer; the next weight sync wakes it
    if uses_rollout_logprobs(state):
        old = {sample.key: sample.rollout_logprobs for batch in first_epoch for sample in batch}
    else:
        # When the first mini-batch is trained, the policy has not changed since it generated the
        # responses: its log-probs are the old ones, unless a later epoch trains them again.
        later = first_epoch if config.actor.ppo_epochs > 1 else first_epoch[1:]
        old = compute_logprobs(state, state.policy, later)
    ref = compute_logprobs(state, state.reference, first_epoch) if config.actor.use_kl_loss else {}
    return [[replace(sample, old_logprobs=old.get(sample.key), ref_logprobs=ref.get(sample.key))
             for sample in batch] for batch in batches]


def update_policy(state: TrainState, mini_batch: list[Sample], step: int) -> Update | None:
    """One optimizer step on a mini-batch; None if no sample is in the loss, and nothing is done.

    The gradient is that of the whole mini-batch, however it is split into micro-batches and over
    ranks. If it is not finite, fp16 skips the step and halves the scale of the loss. Raises
    ValueError if there is no such scale, or it is down to 1.
    """
    config, accelerator, stats = state.config, state.accelerator, []
    # What the loss is divided by counts the whole mini-batch, of all ranks: the mean of the means
    # of micro-batches would weigh the tokens of a small one more.
    num_tokens = sum(len(sample.response_ids) for sample in mini_batch if sample.in_loss)
    num_seqs = sum(sample.in_loss for sample in mini_batch)
    if not num_seqs:
        return None
    set_learning_rate(state.optimizer, config, step)
    micros = micro_batches(mini_batch, config.actor.max_tokens_per_micro_batch,
                           accelerator.process_index, accelerator.num_processes,
                           packing_kind(state.policy))
    for micro in micros:
        batch = make_batch(state, micro)
        # Ranks sum their gradients with the last micro-batch only; sharded ones after each, since
        # gradients that are not yet summed take the memory of a whole model.
        sync = micro is micros[-1] or is_sharded(accelerator)
        with nullcontext() if sync else accelerator.no_sync(state.policy):
            with accelerator.autocast():
                loss, micro_stats = compute_loss(config, state.policy, batch, num_tokens, num_seqs)
            # DDP and FSDP average the gradients of the ranks, whose losses are parts of a sum.
            accelerator.backward(loss * accelerator.num_processes)
        stats.append((micro, batch["mask"], {name: stat._replace(values=stat.values.detach())
                                             for name, stat in micro_stats.items()}))
    norm = accelerator.clip_grad_norm_(state.policy.parameters(), config.actor.grad_clip)
    norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    finite, scaler = math.isfinite(norm), accelerator.scaler
    if not finite and not (scaler and scaler.get_scale() > 1):
        raise ValueError(f"step {step}: an update has the gradient norm {norm} and was not applied."
                         " A lower actor.lr, or model.dtype float32, may help")
    state.optimizer.step()
    state.optimizer.zero_grad()
    return Update(norm if finite else None, sum(map(len, mini_batch)), stats)


def compute_loss(config: SimpleNamespace, policy: torch.nn.Module, batch: dict, num_tokens: int,
                 num_seqs: int) -> tuple[Tensor, dict[str, Stat]]:
    """A micro-batch's part of the loss (equation 8, negated, and optional terms) and statistics.

    If a batch has no old log-probs, the policy has not changed since it generated it: they are the
    current ones. `num_tokens`, `num_seqs`: those in the loss of the whole mini-batch, on all ranks.
    """
    actor, rollout, mask = config.actor, config.rollout, batch["mask"]
    logprobs, entropy = response_logprobs(policy, batch, rollout.temperature)  # (B, T) each
    old = batch.get("old_logprobs", logprobs.detach())
    weights = None
    if rollout.correction != "off":
        weights = importance_weights(old, batch["rollout_logprobs"], mask, rollout.correction,
                                     rollout.correction_cap)
    loss, stats = policy_loss(logprobs, old, batch["advantages"], mask, actor.clip_ratio_low,
                              actor.clip_ratio_high, actor.clip_ratio_c, weights)
    stats |= {"entropy": Stat(entropy)}
    stats |= mismatch_stats(old, batch["rollout_logprobs"], mask, rollout.correction_cap)
    if actor.entropy_coeff:
        loss = loss - actor.entropy_coeff * entropy
    if actor.use_kl_loss:
        ref_kl = kl_penalty(logprobs, batch["ref_logprobs"], actor.kl_loss_type)
        loss = loss + actor.kl_loss_coef * ref_kl
        stats["ref_kl"] = Stat(ref_kl)
    total = aggregate(loss, mask, actor.loss_agg_mode, num_tokens, num_seqs)
    return total, stats | {"loss": Stat(total, "sum")}


# ---- the run -------------------------------------------------------------------------------------

def main() -> None:
    """Set up, train, report. On an error the policy is saved, on a signal a checkpoint."""
    config = read_command_line("Train a policy with DAPO.")
    with one_line_errors():
        check_run_dir(config)
    start = time.perf_counter()
    state, data = setup(config, transformers_engine)
    accelerator = state.accelerator
    accelerator.print(describe_filter(config.filter_groups))
    with one_line_errors(), out_of_memory("start"):
        lock = lock_run_dir(accelerator, config)
        progress, checkpoint = resume(state, data.train)
        sync_weights(state)
        check_weight_sync(state, data.train, generate)
        prepare_run_dir(accelerator, config, progress, checkpoint)
    try:
        with stop_on_signal(accelerator) as signals, one_line_errors():
            if not progress.counters["step"] and (before := validate(state, data.val, 0)):
                progress.evaluations = before
                metrics = {"step": 0, **validation_metrics(before)}
                write_step(state, StepRecord(0, config), [], metrics)
                accelerator.print(f"\n{format_tables(before)}\n")
            train(state, data, progress)
            finished = progress.counters["step"] == config.total_training_steps
            with raise_on_all_ranks("curves.png"):
                if finished and accelerator.is_main_process:
                    plot_runs([config.run_dir], f"{config.run_dir}/curves.png")
        if accelerator.is_main_process:
            print_report(config, accelerator.device, progress, time.perf_counter() - start)
        end_tracker(accelerator)
        end_processes(accelerator, state.engine, signals)
    except (Exception, SystemExit) as error:  # of any kind: the policy is not lost with it
        end_after_failure(state, error)
    except KeyboardInterrupt:  # the second Ctrl-C; the first ends the run after its step
        saved = [f"resumes from {path}" for path in list_checkpoints(config.run_dir)]
        raise SystemExit("interrupted; the same command "
                         f"{saved[0] if saved else 'starts from the beginning'}") from None
    finally:
        lock.release()


if __name__ == "__main__":
    main()
