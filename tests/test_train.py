"""train_dapo.py: the algorithm as a whole, on the embedded task."""

import json
import math
import re
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import (logprobs_of, make_group, make_response, make_score, read_rollouts, read_rows,
                      reset_accelerate)
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import evaluate
import train_dapo
from data_types import Sample, SamplingParams, Score, Stat, Update
from evaluate import validate
from infra.batching import collate, make_batch, micro_batches
from infra.config import load_config, longest_response
from infra.logprobs import response_logprobs
from infra.metrics import StepRecord, actor_metrics
from infra.packing import packing_kind
from infra.setup import load_model
from losses import aggregate, group_advantages, policy_loss
from rollout import generate, transformers_engine
from sampling import make_groups, prompt_at
from train_dapo import (apply_kl_penalty, compute_advantages, compute_loss, make_samples,
                        update_policy)

MODES = ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"]
UNFILTERED = ["filter_groups.enable=false", "total_training_steps=1"]


def make_mini_batch(state, prompts) -> list[Sample]:
    """Responses of very different lengths, off-policy, one of them masked."""
    rng, samples = np.random.default_rng(0), []
    for i, length in enumerate((3, 50, 7, 90, 1, 22, 64, 5, 30, 11)):
        ids = rng.integers(1, 28, length).astype(np.int32)
        samples.append(Sample(prompts[i].token_ids, ids, float(rng.normal()), in_loss=i != 3,
                              key=(i, 0)))

    def near(logprobs):
        return logprobs + torch.from_numpy(rng.normal(0, 0.3, len(logprobs)))
    logprobs = logprobs_of(state, state.policy, samples)
    return [replace(sample, rollout_logprobs=row, old_logprobs=near(row), ref_logprobs=near(row))
            for sample, row in zip(samples, logprobs, strict=True)]


class SavedGradients:
    """In place of an optimizer: keeps the gradient that it is to apply."""

    def __init__(self, policy) -> None:
        self.policy, self.param_groups = policy, []

    def step(self) -> None:
        self.gradient = torch.cat([p.grad.flatten() for p in self.policy.parameters()])

    def zero_grad(self) -> None:
        self.policy.zero_grad()


def gradient(state, mini_batch) -> tuple[torch.Tensor, dict[str, float]]:
    """The gradient of `update_policy`, and its metrics; `actor.grad_clip` does not reach it."""
    state.config.actor.grad_clip, record = math.inf, StepRecord(1, state.config)
    state = replace(state, optimizer=SavedGradients(state.policy))
    record.add_update(update_policy(state, mini_batch, step=1))
    return state.optimizer.gradient, actor_metrics(state.accelerator, record, 0.0)


@pytest.fixture
def train_on(train_steps, fake_rollouts, monkeypatch):
    """`train_on(state, prompts, samples)`: the training loop with these samples in every step;
    returns the metrics of each."""
    def train_on(state, prompts, samples) -> list[dict]:
        fake_rollouts(only_correct_at(lambda position: True))
        monkeypatch.setattr(train_dapo, "make_samples", lambda *_: samples)
        return [step.metrics for step in train_steps(state, prompts)]
    return train_on


def only_correct_at(condition):
    """Scores of a group of four: one is right if the group's position meets the condition."""
    return lambda position: [1.0, 0.0, 0.0, 0.0] if condition(position) else [0.0] * 4


def positions(step) -> list[int]:
    return [group.prompt.position for group in step.groups]


def weights_of(state) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in state.policy.parameters()]


def same_weights(state, before: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, weights_of(state), before))


# ---- one mini-batch, any split ----

@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("extras", [[], ["actor.use_kl_loss=true", "actor.kl_loss_coef=0.1",
                                         "actor.entropy_coeff=0.01"]],
                         ids=["plain", "kl and entropy"])
def test_the_gradient_is_the_same_for_one_micro_batch_and_for_five(make_state, mode, extras):
    state, prompts = make_state(f"actor.loss_agg_mode={mode}", "actor.clip_ratio_c=3", *extras,
                                double=True)
    mini_batch, results = make_mini_batch(state, prompts), []
    for budget in (10**6, 120):
        state.config.actor.max_tokens_per_micro_batch = budget
        results.append(gradient(state, mini_batch))
    assert len(micro_batches(mini_batch, 120)) >= 5
    (one, metrics), (five, metrics_of_five) = results
    assert one.abs().max() > 1e-3
    assert (one - five).abs().max() < 1e-6
    # The logged loss is the whole step's.
    assert metrics == pytest.approx(metrics_of_five, rel=1e-9, abs=1e-9)


@pytest.mark.dapo
@pytest.mark.parametrize("mode", MODES)
def test_the_logged_loss_is_that_of_the_equations(make_state, mode):
    """Of the whole mini-batch in one piece, with counts of its own."""
    state, prompts = make_state(f"actor.loss_agg_mode={mode}", "actor.clip_ratio_c=3",
                                "actor.max_tokens_per_micro_batch=120", double=True)
    mini_batch, actor = make_mini_batch(state, prompts), state.config.actor
    batch = collate(mini_batch, pad_id=0)
    logprobs, _ = response_logprobs(state.policy, batch)
    loss, _ = policy_loss(logprobs, batch["old_logprobs"], batch["advantages"], batch["mask"],
                          actor.clip_ratio_low, actor.clip_ratio_high, 3.0)
    _, metrics = gradient(state, mini_batch)
    assert metrics["actor/clip_frac_high"] > 0 and metrics["actor/clip_frac_low"] > 0
    assert aggregate(loss, batch["mask"], mode).item() == pytest.approx(metrics["actor/loss"],
                                                                        abs=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_shares_add_up_to_the_whole(make_state, mode):
    """What DDP averages, emulated: each rank's loss counts `num_processes` times, and the counts
    are those of all ranks."""
    state, prompts = make_state(f"actor.loss_agg_mode={mode}",
                                "actor.max_tokens_per_micro_batch=180", double=True)
    mini_batch = make_mini_batch(state, prompts)
    whole, _ = gradient(state, mini_batch)

    class Rank:
        num_processes = 2

        def __init__(self, rank):
            self.process_index = rank

        def __getattr__(self, name):
            return getattr(state.accelerator, name)
    parts = [gradient(replace(state, accelerator=Rank(rank)), mini_batch)[0] for rank in range(2)]
    assert (sum(parts) / 2 - whole).abs().max() < 1e-6


def test_gradient_checkpointing_changes_nothing(make_state):
    results = []
    for flag in ("false", "true"):
        state, prompts = make_state(f"model.gradient_checkpointing={flag}", double=True)
        results.append(gradient(state, make_mini_batch(state, prompts))[0])
    assert (results[0] - results[1]).abs().max() < 1e-9


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_neither_packing_nor_padding_changes_a_logprob(make_state, attention):
    state, prompts = make_state(f"model.attn_implementation={attention}", double=True)
    assert bool(packing_kind(state.policy)) == (attention == "sdpa")
    mini_batch = make_mini_batch(state, prompts)
    together = logprobs_of(state, state.policy, mini_batch)
    for sample, row in zip(mini_batch, together, strict=True):
        (alone,) = logprobs_of(state, state.policy, [sample])
        assert len(row) == len(sample.response_ids) and torch.allclose(row, alone, atol=1e-9)


# ---- statistics of the loss ----

@pytest.mark.dapo
def test_a_statistic_that_the_loss_returns_is_logged_by_itself(make_state, train_on, monkeypatch):
    """With its reduction, over the tokens in the loss of all micro-batches of all mini-batches; a
    removed one is absent."""
    def edited_loss(logprobs, old, advantages, mask, *args):
        loss, stats = policy_loss(logprobs, old, advantages, mask, *args)
        index = torch.arange(logprobs.shape[1]).expand_as(logprobs)
        stats |= {"place": Stat(index), "last": Stat(index, "max"), "places": Stat(index, "sum"),
                  "advantage": Stat(advantages), "sign": Stat(advantages.sign(), "sum"),
                  "late": Stat(advantages, mask=index >= 10)}
        del stats["ratio"]
        return loss, stats
    monkeypatch.setattr(train_dapo, "policy_loss", edited_loss)
    state, prompts = make_state("total_training_steps=1", "actor.ppo_mini_batch_size=4",
                                "actor.max_tokens_per_micro_batch=100")
    samples = make_mini_batch(state, prompts)
    (metrics,) = train_on(state, prompts, samples)
    assert metrics["optimizer_steps"] == 3
    trained = [(len(sample.response_ids), sample.advantage) for sample in samples if sample.in_loss]
    tokens, late = sum(n for n, _ in trained), sum(max(0, n - 10) for n, _ in trained)
    places = sum(n * (n - 1) // 2 for n, _ in trained)
    assert metrics["actor/places"] == places and metrics["actor/last"] == 63
    assert metrics["actor/place"] == pytest.approx(places / tokens)
    assert metrics["actor/advantage"] == pytest.approx(sum(n * a for n, a in trained) / tokens)
    assert metrics["actor/sign"] == sum(n * math.copysign(1, a) for n, a in trained)
    late_mean = sum(max(0, n - 10) * a for n, a in trained) / late
    assert metrics["actor/late"] == pytest.approx(late_mean)
    assert "actor/ratio" not in metrics and "actor/clip_frac_high" in metrics


def test_no_statistic_of_an_update_keeps_its_graph_in_memory(make_state):
    state, prompts = make_state("actor.use_kl_loss=true", "actor.entropy_coeff=0.01", double=True)
    update = update_policy(state, make_mini_batch(state, prompts), step=1)
    stats = [stat for _, _, stats in update.micro_batches for stat in stats.values()]
    assert stats and not any(stat.values.requires_grad for stat in stats)


# ---- advantages ----

def test_advantages_per_token_that_are_equal_give_the_gradient_of_one_per_response(make_state):
    state, prompts = make_state("actor.max_tokens_per_micro_batch=150", double=True)
    mini_batch = make_mini_batch(state, prompts)
    per_token = []
    for sample in mini_batch:
        advantage = torch.full((len(sample.response_ids),), sample.advantage)
        per_token.append(replace(sample, advantage=advantage))
    expected, metrics = gradient(state, mini_batch)
    for some in (per_token, per_token[:5] + mini_batch[5:]):
        found, found_metrics = gradient(state, some)
        assert (found - expected).abs().max() < 1e-9
        assert found_metrics == pytest.approx(metrics)
    per_token[1].advantage[7] += 1.0
    assert (gradient(state, per_token)[0] - expected).abs().max() > 1e-3


def test_an_edit_of_the_advantages_may_return_a_value_per_token(start, monkeypatch):
    """Here twice the value for the first token. What the rollout files say is what is trained."""
    def per_token(config, groups):
        edited = []
        for group, of_group in zip(groups, compute_advantages(config, groups), strict=True):
            edited.append([])
            for response, advantage in zip(group.responses, of_group, strict=True):
                tensor = torch.full((len(response.token_ids),), advantage)
                tensor[0] *= 2
                edited[-1].append(tensor)
        return edited
    monkeypatch.setattr(train_dapo, "compute_advantages", per_token)
    run_dir = start("total_training_steps=1", "val.file=", "save_rollouts=4")
    for record in read_rollouts(run_dir, 1):
        first, *rest = record["advantage"]
        assert len(rest) == record["tokens"] - 1
        assert first != 0 and rest == pytest.approx([first / 2] * len(rest))
    assert read_rows(run_dir)[-1]["actor/grad_norm"] > 0


@pytest.mark.dapo
def test_the_advantages_in_the_rollout_files_are_those_that_were_trained_on(start, monkeypatch):
    original = train_dapo.compute_advantages
    monkeypatch.setattr(train_dapo, "compute_advantages", lambda *args: [
        [7 * advantage for advantage in of_group] for of_group in original(*args)])
    run_dir = start("total_training_steps=1", "save_rollouts=1", "val.file=")
    records = read_rollouts(run_dir, 1)
    rewards = torch.tensor([[record["final_reward"] for record in records]], dtype=torch.float64)
    expected = 7 * group_advantages(rewards)[0]
    assert [record["advantage"] for record in records] == pytest.approx(expected.tolist())


@pytest.mark.dapo
def test_overlong_filtering_masks_truncated_responses_but_counts_them_in_the_group(make_state):
    state, prompts = make_state("algorithm.overlong_filtering=true")
    group = make_group(0, prompts[0], [0, 1])
    group = replace(group, responses=[make_response(2, "length"), make_response(2, "stop")])
    advantages = compute_advantages(state.config, [group])
    assert advantages[0] == pytest.approx([-1 / math.sqrt(2), 1 / math.sqrt(2)], rel=1e-5)
    samples = make_samples(state.config, [group], advantages)
    assert [sample.in_loss for sample in samples] == [False, True]
    assert [sample.advantage for sample in samples] == advantages[0]
    state.config.algorithm.overlong_filtering = False
    assert all(sample.in_loss for sample in make_samples(state.config, [group], advantages))


def test_kl_in_the_reward_takes_the_summed_kl_off_the_final_reward_only(make_state):
    state, prompts = make_state("algorithm.use_kl_in_reward=true", "algorithm.kl_coef=0.5")
    with torch.no_grad():
        for parameter in state.policy.parameters():
            parameter.mul_(1.02)  # away from the reference
    drawn = [prompt_at(prompts, position, seed=0) for position in range(2)]
    responses = generate(state, drawn, SamplingParams(4, 96), "step 1", "step 1")
    scores = [[make_score(0.0)] * 4] * 2
    groups = make_groups(state.config, drawn, responses, scores)
    penalised = apply_kl_penalty(state, groups)
    samples = [Sample(group.prompt.token_ids, response.token_ids, 0.0)
               for group in groups for response in group.responses]
    policy, reference = (logprobs_of(state, model, samples)
                         for model in (state.policy, state.reference))
    expected = [0.5 * (p - r).sum().item() for p, r in zip(policy, reference, strict=True)]
    taken_off = []
    for before, after in zip(groups, penalised, strict=True):
        assert after.rewards == before.rewards
        taken_off += np.subtract(after.rewards, after.final_rewards).tolist()
    assert taken_off == pytest.approx(expected, abs=1e-4) and max(map(abs, expected)) > 0.01


# ---- the update ----

def training_passes(state) -> list[bool]:
    """Whether each pass of the trainer from now on is one with gradients."""
    passes = []

    def note(model, _, kwargs):
        if not kwargs["use_cache"]:  # generation has a cache
            passes.append(torch.is_grad_enabled())
    state.policy.register_forward_pre_hook(note, with_kwargs=True)
    return passes


def test_an_update_makes_good_responses_likelier_and_bad_ones_less_likely(make_state, train_on):
    state, prompts = make_state(*UNFILTERED, "actor.ppo_mini_batch_size=16", "actor.lr=1e-3")
    samples = [replace(sample, in_loss=True, advantage=1.0 if i < 5 else -1.0)
               for i, sample in enumerate(make_mini_batch(state, prompts))]

    def total_logprobs() -> list[float]:
        logprobs = [row.sum().item() for row in logprobs_of(state, state.policy, samples)]
        return [sum(logprobs[:5]), sum(logprobs[5:])]
    before = total_logprobs()
    train_on(state, prompts, samples)
    good, bad = np.subtract(total_logprobs(), before)
    assert good > 1 and bad < -1


@pytest.mark.dapo
def test_the_first_update_after_a_rollout_is_exactly_on_policy(make_state, train_on):
    """One mini-batch, however it is split: ratio 1 and nothing clipped, exactly, and no forward
    pass for old log-probs."""
    state, prompts = make_state(*UNFILTERED, "actor.ppo_mini_batch_size=16",
                                "actor.old_logprobs=recompute",
                                "actor.max_tokens_per_micro_batch=300")
    samples = [replace(sample, old_logprobs=None) for sample in make_mini_batch(state, prompts)]
    passes = training_passes(state)
    (metrics,) = train_on(state, prompts, samples)
    assert metrics["actor/ratio"] == 1 and metrics["actor/approx_kl"] == 0
    assert metrics["actor/clip_frac_high"] == metrics["actor/clip_frac_low"] == 0
    assert metrics["optimizer_steps"] == 1
    assert passes == [True] * len(micro_batches(samples, 300, packing="varlen"))


def test_old_logprobs_are_of_the_policy_before_the_step_for_every_later_mini_batch(
        make_state, train_on, monkeypatch):
    state, prompts = make_state(*UNFILTERED, "actor.ppo_mini_batch_size=4", "actor.lr=1e-2",
                                "actor.ppo_epochs=2", "actor.old_logprobs=recompute")
    samples = [replace(sample, old_logprobs=None, rollout_logprobs=-torch.ones_like(
        sample.rollout_logprobs)) for sample in make_mini_batch(state, prompts)]
    before = logprobs_of(state, state.policy, samples)
    by_length = {len(logprobs): logprobs for logprobs in before}
    seen = []

    def spy(state, mini_batch, step):
        seen.append(mini_batch)
        return update_policy(state, mini_batch, step)
    monkeypatch.setattr(train_dapo, "update_policy", spy)
    train_on(state, prompts, samples)
    assert sorted(len(mini_batch) for mini_batch in seen) == [2, 2, 4, 4, 4, 4]
    for mini_batch in seen:
        for sample in mini_batch:
            old = by_length[len(sample.response_ids)]
            assert torch.allclose(sample.old_logprobs, old, atol=1e-5)


def test_with_the_samplers_logprobs_as_the_old_ones_there_is_no_pass_for_them(make_state, train_on):
    state, prompts = make_state(*UNFILTERED, "actor.old_logprobs=rollout")
    samples = make_mini_batch(state, prompts)
    passes = training_passes(state)
    (metrics,) = train_on(state, prompts, samples)
    assert passes == [True, True]  # two mini-batches
    assert metrics["actor/mismatch_abs"] == metrics["actor/mismatch_kl"] == 0
    assert metrics["actor/ratio"] != 1


@pytest.mark.parametrize("override, own_weights, recomputed", [
    ("val.n=1", False, False), ("val.n=1", True, True), ("mixed_precision=bf16", False, True),
    ("rollout.top_p=0.9", False, True), ("rollout.correction=token", False, True)])
def test_by_default_old_logprobs_are_recomputed_unless_the_sampler_is_the_trainers_own_model(
        make_state, train_on, override, own_weights, recomputed):
    state, prompts = make_state(*UNFILTERED, override)
    engine = replace(state.engine, sync=lambda weights: None, has_own_weights=own_weights)
    state, samples = replace(state, engine=engine), make_mini_batch(state, prompts)
    passes = training_passes(state)
    train_on(state, prompts, [replace(sample, old_logprobs=None) for sample in samples])
    assert passes == [False] * recomputed + [True, True]


@pytest.mark.dapo
def test_the_samplers_logprobs_train_the_same_policy_as_recomputed_ones(start):
    rows, weights = [], []
    for chosen in ("auto", "recompute"):
        reset_accelerate()
        run_dir = start(f"actor.old_logprobs={chosen}", "val.file=", "total_training_steps=2",
                        "actor.lr=0.002", "actor.lr_warmup_steps=0")
        rows.append(read_rows(run_dir)[-1])
        weights.append(load_file(run_dir / "model/model.safetensors"))
        run_dir.rename(run_dir.with_name(chosen))
    for name in ("ratio", "approx_kl", "clip_frac_high", "loss", "grad_norm"):
        values = [row[f"actor/{name}"] for row in rows]
        assert values[0] == pytest.approx(values[1], abs=1e-4) and values[0] not in (0, 1), name
    for name, weight in weights[0].items():
        assert (weight - weights[1][name]).abs().max() < 1e-4, name


@pytest.mark.parametrize("correction, cap, factor", [
    ("token", 2.0, 1.5), ("token", 1.2, 1.2), ("off", 2.0, 1.0)])
def test_rollout_correction_weighs_the_gradient(make_state, correction, cap, factor):
    """The sampler gave every token two thirds of the probability that the trainer gives it."""
    state, prompts = make_state("rollout.correction=off", double=True)
    mini_batch = [replace(sample, rollout_logprobs=sample.old_logprobs - math.log(1.5))
                  for sample in make_mini_batch(state, prompts)]
    plain, _ = gradient(state, mini_batch)
    state.config.rollout.correction, state.config.rollout.correction_cap = correction, cap
    weighted, metrics = gradient(state, mini_batch)
    assert (weighted - factor * plain).abs().max() < 1e-6
    assert metrics["actor/importance_ratio_max"] == pytest.approx(1.5)
    assert metrics["actor/importance_ratio_clip_frac"] == (1 if cap < 1.5 else 0)
    assert metrics["actor/mismatch_abs"] == pytest.approx(math.log(1.5))
    assert metrics["actor/mismatch_kl"] == pytest.approx(1.5 - 1 - math.log(1.5))


def test_mismatch_metrics_are_those_of_the_responses_whose_logprobs_were_asked_for(make_state):
    """They change nothing else, and with none of them the metrics are left out."""
    state, prompts = make_state("rollout.correction_cap=1.2", double=True)
    mini_batch = make_mini_batch(state, prompts)
    some, rest = mini_batch[1::2], mini_batch[::2]
    unknown = [replace(sample, rollout_logprobs=torch.full_like(sample.rollout_logprobs, torch.nan))
               for sample in rest]
    names = ["actor/mismatch_abs", "actor/mismatch_kl", "actor/importance_ratio_max",
             "actor/importance_ratio_clip_frac"]
    _, expected = gradient(state, some)
    whole, of_all = gradient(state, [*some, *rest])
    found, metrics = gradient(state, [*some, *unknown])
    assert torch.equal(found, whole)
    for name in names:
        assert metrics.pop(name) == pytest.approx(expected[name]) and expected[name] > 0
        assert of_all.pop(name) != pytest.approx(expected[name])
    assert metrics == of_all
    _, metrics = gradient(state, unknown)
    assert not set(names) & set(metrics) and np.isfinite(list(metrics.values())).all()


@pytest.mark.parametrize("override, share", [
    ("actor.old_logprobs=recompute", 1 / 16), ("actor.old_logprobs=auto", 1),
    ("rollout.correction=token", 1),
    ("rollout.correction=sequence", 1), ("actor.old_logprobs=rollout", 1)])
def test_all_logprobs_are_asked_for_only_if_the_loss_uses_them(make_state, train_steps, override,
                                                               share):
    state, prompts = make_state(override, "total_training_steps=1")
    asked, generate = [], state.engine.generate

    def spy(prompts, seeds, params, progress=""):
        asked.append(params.logprobs)
        return generate(prompts, seeds, params)
    state = replace(state, engine=replace(state.engine, generate=spy))
    train_steps(state, prompts)
    assert asked and set(asked) == {share}
    asked.clear()
    validate(state, {"val": prompts[:2]}, 0)
    assert asked == [0]


def test_reference_logprobs_only_if_a_kl_is_on(make_state, train_on):
    assert make_state()[0].reference is None
    state, prompts = make_state(*UNFILTERED, "actor.use_kl_loss=true")
    assert not any(parameter.requires_grad for parameter in state.reference.parameters())
    samples = [replace(sample, ref_logprobs=None) for sample in make_mini_batch(state, prompts)]
    (metrics,) = train_on(state, prompts, samples)
    assert math.isfinite(metrics["actor/ref_kl"])


def test_warm_up_counts_rollout_steps_not_optimizer_steps(make_state, train_on):
    state, prompts = make_state("filter_groups.enable=false", "actor.ppo_mini_batch_size=4",
                                "actor.lr=1e-3", "actor.lr_warmup_steps=3",
                                "total_training_steps=4")
    rows = train_on(state, prompts, make_mini_batch(state, prompts)[:6])
    assert [row["optimizer_steps"] for row in rows] == [2, 4, 6, 8]
    assert [row["actor/lr"] for row in rows] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3])


def test_a_gradient_that_is_not_finite_is_not_applied(make_state, train_on):
    state, prompts = make_state(*UNFILTERED, "actor.ppo_mini_batch_size=16")
    before = weights_of(state)
    samples = [replace(sample, advantage=math.nan) for sample in make_mini_batch(state, prompts)]
    with pytest.raises(ValueError, match="step 1: an update has the gradient norm nan and was not "
                                         "applied. A lower actor.lr"):
        train_on(state, prompts, samples)
    assert same_weights(state, before)


def test_a_mini_batch_of_masked_responses_moves_nothing(make_state, train_on):
    state, prompts = make_state(*UNFILTERED, "actor.ppo_mini_batch_size=16")
    before = weights_of(state)
    samples = [replace(sample, in_loss=False) for sample in make_mini_batch(state, prompts)]
    (metrics,) = train_on(state, prompts, samples)
    assert metrics["optimizer_steps"] == 0 and "actor/loss" not in metrics
    assert same_weights(state, before)


def test_nothing_in_a_micro_batch_waits_for_the_device(make_state):
    """No number is read back from a tensor, and no shape depends on one: on a GPU either would stop
    the queue."""
    state, prompts = make_state("actor.use_kl_loss=true", "actor.entropy_coeff=0.01",
                                "actor.clip_ratio_c=3", "rollout.correction=token")
    batch, seen = make_batch(state, make_mini_batch(state, prompts)[:4]), []
    record = StepRecord(1, state.config)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = str(function)
            if "index.Tensor" in name and any(index is not None and index.dtype == torch.bool
                                              for index in args[1]):
                name = "masked_select"
            seen.append(name)
            return function(*args, **(kwargs or {}))
    with Watch():
        loss, stats = compute_loss(state.config, state.policy, batch, 100, 4)
        loss.backward()
        record.add_update(Update(1.0, 100, [([], batch["mask"], stats)] * 2))
    assert len(seen) > 100
    waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique")
    assert not [name for name in seen if any(word in name for word in waits)]


def test_a_model_with_dropout_trains_without_it(tmp_path):
    gpt2 = GPT2Config(vocab_size=28, n_embd=16, n_layer=1, n_head=2, n_positions=64,
                      bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(gpt2).save_pretrained(tmp_path / "m")
    config = load_config("config.yaml", [f"model.path={tmp_path / 'm'}", "data.max_prompt_length=8",
                                         "data.max_response_length=24"])
    model, ids = load_model(config).train(), torch.arange(20)[None]
    assert torch.equal(model(ids).logits, model(ids).logits)


# ---- dynamic sampling ----

def test_sampling_continues_until_the_batch_is_full_then_clips_to_the_first(
        make_state, train_steps, fake_rollouts):
    state, prompts = make_state("total_training_steps=1")
    batches = fake_rollouts(only_correct_at(lambda position: position % 3 == 0))
    (step,) = train_steps(state, prompts)
    assert batches == [list(range(6)), list(range(6, 12))] and positions(step) == [0, 3, 6, 9]
    metrics = step.metrics
    assert (metrics["gen_batches"], metrics["prompts_drawn"]) == (2, 12)
    assert metrics["groups/trained"] == 4
    assert metrics["groups/kept"] == pytest.approx(4 / 12)
    assert metrics["groups/all_wrong"] == pytest.approx(8 / 12)
    assert (metrics["responses/generated"], metrics["responses/wasted"]) == (48, 32)
    # Accuracy before and after the filter have names of their own.
    assert metrics["acc/before_filter"] == pytest.approx(4 / 48)
    assert metrics["acc/after_filter"] == pytest.approx(1 / 4)


def test_a_full_batch_is_clipped_to_the_first_groups(make_state, train_steps, fake_rollouts):
    state, prompts = make_state("total_training_steps=1")
    batches = fake_rollouts(only_correct_at(lambda position: position > 0))
    (step,) = train_steps(state, prompts)
    assert batches == [list(range(6))] and positions(step) == [1, 2, 3, 4]
    assert step.metrics["groups/kept"] == pytest.approx(5 / 6)


SHORT = ["data.max_response_length=8", "overlong_buffer.len=5"]  # a penalty beyond 3 tokens


@pytest.mark.dapo
def test_the_filter_is_on_accuracy_while_the_shaped_reward_is_trained(
        make_state, train_steps, fake_rollouts):
    """Shaped rewards differ even if all answers are wrong: a filter on them would keep all."""
    state, prompts = make_state("total_training_steps=1", "filter_groups.max_num_gen_batches=3",
                                *SHORT)
    fake_rollouts(only_correct_at(lambda position: position == 2))
    (step,) = train_steps(state, prompts)
    assert positions(step) == [2]
    shaped = np.array([1.0, -1.2, -1.4, -1.6])  # of 3, 4, 5 and 6 tokens
    assert step.groups[0].final_rewards == pytest.approx(shaped.tolist())
    expected = (shaped - shaped.mean()) / (shaped.std(ddof=1) + 1e-6)
    assert step.advantages[0] == pytest.approx(expected.tolist())


@pytest.mark.parametrize("metric, trained", [
    ("acc", 0), ("score", 0), ("seq_reward", 4), ("seq_final_reward", 4)])
@pytest.mark.dapo
def test_each_filter_metric_is_used(make_state, train_steps, fake_rollouts, metric, trained):
    state, prompts = make_state("total_training_steps=1", f"filter_groups.metric={metric}",
                                "filter_groups.max_num_gen_batches=1", *SHORT)
    fake_rollouts(only_correct_at(lambda position: False))
    (step,) = train_steps(state, prompts)
    assert step.metrics["groups/trained"] == trained


@pytest.mark.dapo
def test_a_reward_without_an_accuracy_trains_with_the_default_filter(
        make_state, train_steps, fake_rollouts):
    state, prompts = make_state("total_training_steps=1")
    assert state.config.filter_groups.metric == "acc"
    before = weights_of(state)

    def scores(position):
        return [Score(None, 0.5 + (i if position % 2 else 0)) for i in range(4)]
    fake_rollouts(scores)
    (step,) = train_steps(state, prompts)
    assert positions(step) == [1, 3, 5, 7] and step.metrics["groups/trained"] == 4
    assert not same_weights(state, before)
    assert not [name for name in step.metrics if name.startswith("acc/")]


def test_a_filter_of_ones_own_sees_the_whole_group(make_state, train_steps, fake_rollouts,
                                                   monkeypatch):
    """Here it keeps a group only if the longest response has the best score."""
    def keep_group(group, filter_groups):
        lengths = [len(response.token_ids) for response in group.responses]
        longest = lengths.index(max(lengths))
        best = max(score.score for score in group.scores)
        return filter_groups.enable and group.scores[longest].score == best
    monkeypatch.setattr(train_dapo, "keep_group", keep_group)
    state, prompts = make_state("total_training_steps=1")
    fake_rollouts(lambda at: [0.0, 0.0, 0.0, 1.0] if at % 2 else [1.0, 0.0, 0.0, 0.0])
    (step,) = train_steps(state, prompts)
    assert positions(step) == [1, 3, 5, 7]
    assert step.metrics["groups/kept"] == pytest.approx(1 / 2)


def test_without_the_filter_every_group_is_trained_and_none_is_drawn_in_vain(
        make_state, train_steps, fake_rollouts):
    state, prompts = make_state(*UNFILTERED)
    batches = fake_rollouts(only_correct_at(lambda position: False))
    (step,) = train_steps(state, prompts)
    assert batches == [[0, 1, 2, 3]] == [positions(step)]
    assert step.metrics["responses/wasted"] == 0


def test_an_automatic_generation_batch_follows_the_share_that_is_kept(
        make_state, train_steps, fake_rollouts):
    state, prompts = make_state("total_training_steps=3", "data.gen_batch_size=auto")
    batches = fake_rollouts(only_correct_at(lambda position: position % 4 == 0))
    rows = [step.metrics for step in train_steps(state, prompts)]
    # Nothing known: 4. Then 1 of 4 is kept: (3 + sqrt(3 * 3/5)) / (2/5) = 10.9.
    assert [len(batch) for batch in batches[:2]] == [4, 11]
    drawn = [position for batch in batches for position in batch]
    assert drawn == list(range(len(drawn)))
    kept, generated = 0.0, 0.0
    for row in rows:
        size = row["responses/generated"] / 4
        kept = (kept + row["groups/kept"] * size) / 2
        generated = (generated + size) / 2
        assert row["ema_groups_kept"] == pytest.approx(kept)
        assert row["ema_groups_generated"] == pytest.approx(generated)
        assert row["responses/generated_per_trained"] == size / 4
        assert row["responses/wasted_tokens"] == (size - 4) * (3 + 4 + 5 + 6)
    # A run that continues from step 2 draws the same.
    names = ["step", "optimizer_steps", "prompts_drawn", "consecutive_skips", "ema_groups_kept",
             "ema_groups_generated"]
    (resumed,) = train_steps(state, prompts, {name: rows[1][name] for name in names})
    for name in [*names, "responses/generated"]:
        assert resumed.metrics[name] == rows[2][name]


def test_an_automatic_generation_batch_has_a_bound_if_nothing_is_kept(
        make_state, train_steps, fake_rollouts):
    state, prompts = make_state("total_training_steps=1", "data.gen_batch_size=auto",
                                "filter_groups.max_num_gen_batches=3")
    batches = fake_rollouts(only_correct_at(lambda position: position == 1))
    train_steps(state, prompts)
    assert [len(batch) for batch in batches] == [4, 11, 16]


def test_an_epochs_end_in_the_middle_of_a_fill_loses_no_group(make_state, train_steps,
                                                              fake_rollouts):
    """The epoch of 5 prompts ends within the first generation batch; a prompt that comes again is
    another group, by its position."""
    state, prompts = make_state("total_training_steps=1")
    batches = fake_rollouts(only_correct_at(lambda position: position % 3 == 0))
    (step,) = train_steps(state, prompts[:5])
    assert positions(step) == [0, 3, 6, 9] and batches == [list(range(6)), list(range(6, 12))]


# ---- at the limit ----

def test_at_the_limit_it_trains_on_what_there_is_and_says_so(make_state, train_steps,
                                                             fake_rollouts, capsys):
    state, prompts = make_state("total_training_steps=1", "filter_groups.max_num_gen_batches=3")
    batches = fake_rollouts(only_correct_at(lambda position: position in (1, 7)))
    (step,) = train_steps(state, prompts)
    assert len(batches) == 3  # exactly
    assert positions(step) == [1, 7] and step.metrics["optimizer_steps"] == 1
    assert ("warning: step 1 kept 2 of 18 groups after 3 generation batches; 0% all-correct, 89% "
            "all-wrong, 0% of responses without a parsed answer, 0% truncated: use easier prompts, "
            "or raise filter_groups.max_num_gen_batches. This step trained on 2 groups"
            ) in capsys.readouterr().out


def test_at_the_limit_it_can_skip_the_step(make_state, train_steps, fake_rollouts, capsys):
    state, prompts = make_state("total_training_steps=2", "filter_groups.max_num_gen_batches=1",
                                "filter_groups.at_limit=skip")
    fake_rollouts(only_correct_at(lambda position: position == 1 or position >= 6))
    first, second = train_steps(state, prompts)
    assert first.metrics["optimizer_steps"] == 0 and "actor/loss" not in first.metrics
    assert first.metrics["groups/trained"] == 0 and first.metrics["consecutive_skips"] == 1
    assert second.metrics["groups/trained"] == 4 and second.metrics["optimizer_steps"] == 2
    assert second.metrics["consecutive_skips"] == 0
    assert "This step was skipped" in capsys.readouterr().out


def test_at_the_limit_it_can_stop_the_run(make_state, train_steps, fake_rollouts):
    state, prompts = make_state("filter_groups.max_num_gen_batches=1",
                                "filter_groups.at_limit=error")
    fake_rollouts(lambda position: [1.0] * 4)
    with pytest.raises(ValueError, match="100% all-correct, 0% all-wrong, .* use harder prompts"):
        train_steps(state, prompts)


@pytest.mark.parametrize("override, right, message, steps", [
    ("filter_groups.at_limit=error", 0, "step 1 kept 0 of 6 groups", [1]),
    ("filter_groups.max_skipped_steps=1", 0, "2 steps in a row were skipped", [1, 2]),
    ("val.n=1", 1, "step 1: the log-probs of sampler and trainer differ by", [1])])
def test_a_step_that_ends_the_run_is_logged_first(
        start, fake_rollouts, tmp_path, monkeypatch, override, right, message, steps):
    """The engine is said to have weights of its own, and its log-probs of 0 are none of the
    policy's."""
    def engine(*args, **options):
        return replace(transformers_engine(*args, **options), has_own_weights=True)
    monkeypatch.setattr(train_dapo, "transformers_engine", engine)
    fake_rollouts(only_correct_at(lambda position: right))
    with pytest.raises(SystemExit, match=f"error: {message}"):
        start("filter_groups.max_num_gen_batches=1", "val.file=", "total_training_steps=3", override)
    assert [row["step"] for row in read_rows(tmp_path / "run")] == steps
    assert all(read_rollouts(tmp_path / "run", step) for step in steps)


def test_nothing_kept_skips_the_step_a_bounded_number_of_times(make_state, train_steps,
                                                               fake_rollouts, monkeypatch):
    state, prompts = make_state("total_training_steps=9", "filter_groups.max_num_gen_batches=1",
                                "filter_groups.max_skipped_steps=2")
    batches = fake_rollouts(only_correct_at(lambda position: position < 6))  # only the first step
    with pytest.raises(ValueError, match="3 steps in a row were skipped, the last because: step 4 "
                                         "kept 0 of 6 groups"):
        train_steps(state, prompts)
    assert len(batches) == 4


def test_a_skipped_step_leaves_its_rollouts_to_be_read(start, fake_rollouts):
    fake_rollouts(only_correct_at(lambda position: position >= 6))
    run_dir = start("filter_groups.max_num_gen_batches=1", "val.file=", "save_rollouts=2")
    skipped, trained = read_rollouts(run_dir, 1), read_rollouts(run_dir, 2)
    assert len(skipped) == len(trained) == 2 * 4
    assert {record["advantage"] for record in skipped} == {None}
    assert all(record["advantage"] for record in trained)
    assert {record["acc"] for record in skipped} == {0.0}


def test_responses_without_a_score_are_counted(make_state, train_steps):
    state, prompts = make_state(*UNFILTERED)

    def scorer(tasks):
        timeout = Score(0.0, -1.0, status="timeout")
        scores = state.scorer(tasks)
        return [[timeout, *group[1:3], timeout] for group in scores]
    (step,) = train_steps(replace(state, scorer=scorer), prompts)
    assert step.metrics["reward/timeouts"] == 4 * 2 and step.metrics["reward/errors"] == 0
    assert step.metrics["groups/trained"] == 4


# ---- time ----

@pytest.mark.slow
def test_the_phases_add_up_to_the_time_of_a_step(make_state, monkeypatch, train_steps):
    """To within 2%, by another clock; what is in no phase is `other`, and next to nothing."""
    state, prompts = make_state("total_training_steps=4", "data.train_batch_size=16",
                                "actor.ppo_mini_batch_size=32")
    ends, original = [], train_dapo.step_metrics

    def step_metrics(*args):  # called when a step's time is taken
        ends.append(time.perf_counter())
        return original(*args)
    monkeypatch.setattr(train_dapo, "step_metrics", step_metrics)
    rows = [step.metrics for step in train_steps(state, prompts)]
    seconds = np.diff(ends)
    for row, wall in zip(rows[1:], seconds, strict=True):
        assert row["time/step"] == pytest.approx(wall, rel=0.02)
    assert sum(row["time/other"] for row in rows[1:]) < 0.02 * sum(seconds)


# ---- a whole run ----

def test_a_run_leaves_everything_that_it_promises(start, capsys):
    run_dir = start("save_rollouts=1", "val.every=1", curves=True)
    out = capsys.readouterr().out
    for expected in ("before", "after", "avg@2", "level 9",
                     f"{run_dir} has checkpoints/, code/, config.yaml, curves.png"):
        assert expected in out
    assert "runs/" not in out
    rows = read_rows(run_dir)
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert {"val/val/avg@2", "val/val/pass@2", "val/val/maj@2"} <= row.keys()
    assert {"reward/mean", "response_length/mean", "actor/entropy", "actor/token_prob",
            "acc/before_filter", "acc/after_filter", "groups/all_correct", "groups/all_wrong",
            "actor/clip_frac_high", "actor/clip_frac_low", "actor/approx_kl", "actor/grad_norm",
            "actor/mismatch_kl", "gen_batches", "responses/wasted", "time/generate",
            "time/update", "tokens_per_s/generate"} <= rows[1].keys()
    assert rows[2]["optimizer_steps"] == 4  # two mini-batches of 8 of 16 responses, twice
    for row in rows[1:]:
        phases = sum(row[f"time/{name}"] for name in
                     ("generate", "reward", "logprobs", "update", "sync", "other"))
        assert phases == pytest.approx(row["time/step"])
    records = read_rollouts(run_dir, 2)
    assert len(records) == 4 and all(isinstance(r["advantage"], float) for r in records)
    assert (run_dir / "curves.png").stat().st_size > 10_000 and (run_dir / "config.yaml").exists()
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict()
                     for path in ("toy/base", run_dir / "model"))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert AutoTokenizer.from_pretrained(run_dir / "model").decode([0]) == "<eos>"


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_sampler_and_trainer_agree_on_every_logprob(make_state, train_steps, checkpointing):
    state, prompts = make_state(f"model.gradient_checkpointing={checkpointing}",
                                "rollout.temperature=0.8", "actor.lr=1e-2")
    for step in train_steps(state, prompts):
        assert step.metrics["actor/mismatch_abs"] < 1e-5


def test_the_same_seed_gives_the_same_run(make_state, train_steps):
    def logged(seed: int) -> list[dict]:
        steps = train_steps(*make_state(f"seed={seed}"))
        return [{name: value for name, value in step.metrics.items()
                 if not name.startswith(("time/", "memory/", "tokens_per_s/"))} for step in steps]
    assert logged(0) == logged(0) != logged(1)


@pytest.mark.dapo
def test_every_option_at_once_runs(start):
    run_dir = start("actor.ppo_epochs=2", "actor.use_kl_loss=true",
                    "algorithm.use_kl_in_reward=true", "actor.entropy_coeff=0.01",
                    "actor.clip_ratio_c=3", "algorithm.overlong_filtering=true",
                    "algorithm.norm_adv_by_std_in_grpo=false",
                    "filter_groups.metric=seq_final_reward",
                    "actor.loss_agg_mode=seq-mean-token-sum", "rollout.top_p=0.9",
                    "model.gradient_checkpointing=true", "mixed_precision=bf16", "val.file=")
    last = read_rows(run_dir)[-1]
    assert all(math.isfinite(value) for value in last.values())
    assert last["optimizer_steps"] == 8
    assert {"actor/ref_kl", "actor/clip_frac_dual"} <= last.keys()


def test_a_tracker_gets_the_metrics(start):
    pytest.importorskip("tensorboard", reason="needs tensorboard, which is optional")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run_dir = start("log_with=tensorboard", "total_training_steps=1", "val.file=")
    logged = {}
    for folder in {path.parent for path in run_dir.rglob("events.out.tfevents*")}:
        events = EventAccumulator(str(folder)).Reload()
        for tag in events.Tags()["scalars"]:
            logged[tag] = events.Scalars(tag)[-1].value
    expected = read_rows(run_dir)[-1]["reward/mean"]
    assert logged["reward/mean"] == pytest.approx(expected, abs=1e-6)


def test_an_earlier_run_is_never_written_into(start):
    run_dir = start("val.file=", "total_training_steps=1")

    def files() -> dict:
        return {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    before = files()
    for override in ("resume=auto", "seed=1", "resume=never"):
        with pytest.raises(SystemExit, match=f"{run_dir}.*run_dir={run_dir}-2"):
            start("val.file=", "total_training_steps=1", override)
        assert files() == before


@pytest.mark.slow
def test_a_few_steps_improve_the_policy(start):
    """The whole pipeline in 8 steps: far beyond noise, or something is broken."""
    run_dir = start("total_training_steps=8", "actor.lr=0.0002", "data.train_batch_size=16",
                    "data.gen_batch_size=16",
                    "rollout.n=16", "actor.ppo_mini_batch_size=64", "val.max_prompts=100",
                    "val.n=4")
    first, *_, last = read_rows(run_dir)
    assert first["val/val/avg@4"] < 0.4 and last["val/val/avg@4"] > 0.55
    assert last["val/val/response_length"] > 1.3 * first["val/val/response_length"]


OWN_REWARD = '''
def score(response, ground_truth):
    right = response.strip().endswith(ground_truth)
    return {"score": 2.0 * right - 1, "acc": float(right), "words": float(len(response.split()))}
'''


def test_further_values_of_reward_functions_become_metrics(start, tmp_path):
    (tmp_path / "mine.py").write_text(OWN_REWARD)
    run_dir = start(f"reward.name={tmp_path / 'mine.py'}:score,math", "reward.weights=1,0.5",
                    "total_training_steps=1")
    before, first = read_rows(run_dir)
    assert first["reward/score/words"] > 0 and before["val/val/reward/score/words"] > 0
    expected = first["reward/score/score"] + 0.5 * first["reward/math/score"]
    assert first["reward/score"] == pytest.approx(expected)
    record = read_rollouts(run_dir, 1)[0]
    assert record["score"] == record["reward/score/score"] + 0.5 * record["reward/math/score"]
    assert record["reward/score/words"] > 0


def test_each_validation_set_has_metrics_and_a_table_of_its_own(start, tmp_path, capsys):
    """And is kept over a restart."""
    (tmp_path / "easy.jsonl").write_text('{"problem": "a1 b+2?", "answer": 3}\n')
    options = [f"val.file=toy/val.jsonl, {tmp_path / 'easy.jsonl'}", "save_every=1"]
    run_dir = start(*options, "total_training_steps=1")
    for row in read_rows(run_dir):
        assert {"val/val/avg@2", "val/easy/avg@2", "val/easy/maj@2"} <= row.keys()
    assert re.search("^val\n.*before.*^easy\n.*before", capsys.readouterr().out, re.M | re.DOTALL)
    start(*options, "total_training_steps=2")
    assert re.search("easy\n +before +after", capsys.readouterr().out)


def test_each_validation_set_may_be_sampled_in_its_own_way(start, tmp_path, monkeypatch):
    """And the run's own config.yaml, in which these values stand, is a config again."""
    (tmp_path / "easy.jsonl").write_text('{"problem": "a1 b+2?", "answer": 3}\n')
    asked, generate = [], evaluate.generate
    monkeypatch.setattr(evaluate, "generate", lambda state, prompts, params, *rest: (
        asked.append((len(prompts), *params[:4])) or generate(state, prompts, params, *rest)))
    options = [f"val.file=toy/val.jsonl,{tmp_path / 'easy.jsonl'}", "val.n=2, 3",
               "val.temperature=0.5,0", "val.max_response_length=0,30"]
    run_dir = start(*options, "total_training_steps=1")
    assert asked[:2] == [(6, 2, 96, 0.5, 1.0), (1, 3, 30, 0.0, 1.0)]
    assert {"val/val/avg@2", "val/easy/avg@3", "val/easy/pass@2"} <= read_rows(run_dir)[0].keys()
    again = load_config(run_dir / "config.yaml")
    assert (again.val.n, again.val.top_p, longest_response(again)) == ("2,3", 1.0, 96)
    for wrong, problem in (("val.n=2,3,4", "val.n=2,3,4: one value, or one for each of the 2"),
                           ("val.n=2,x", "'x' is not int >= 1")):
        with pytest.raises(ValueError, match=problem):
            load_config("config.yaml", [*options, wrong])
    longer = load_config("config.yaml", ["val.max_response_length=300"])
    with pytest.raises(ValueError, match="the longest response = 364 tokens, but .* has 256 pos"):
        load_model(longer)


def test_several_training_files_are_one_and_a_resumed_run_draws_on(start, tmp_path):
    """Each prompt once an epoch, from files of very different sizes."""
    for name, count in (("few", 2), ("more", 6)):
        lines = [json.dumps({"prompt": f"a{i} b+{count}?", "answer": str((i + count) % 10)}) + "\n"
                 for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    files = f"data.train_file={tmp_path / 'few.jsonl'},{tmp_path / 'more.jsonl'}"
    options = [files, "val.file=", "save_every=1", "save_rollouts=9", "filter_groups.enable=false"]
    start(*options, "total_training_steps=1")
    run_dir = start(*options, "total_training_steps=2")
    records = read_rollouts(run_dir, 1) + read_rollouts(run_dir, 2)
    assert [record["position"] for record in records[::4]] == list(range(8))
    drawn = [record["prompt"] for record in records[::4]]
    few, more = [f"a{i} b+2?" for i in range(2)], [f"a{i} b+6?" for i in range(6)]
    assert sorted(drawn) == sorted(few + more)
