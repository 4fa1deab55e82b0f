"""train_dapo.py: the algorithm as a whole, on the embedded task, through the code that users run."""

import json
import math
import re
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_dapo
from infra.packing import packing
from losses import aggregate, policy_loss, response_logprobs
from reward import TIMED_OUT, Score
from rollout import Response
from infra.setup import load_model
from sampling import Group, Prompt, Sample, collate
from train_dapo import Timer, accumulate_gradients, select_groups, compute_logprobs, make_samples, train, update

MODES = ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"]


def rows(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def make_mini(run, prompts, lengths=(3, 50, 7, 90, 1, 22, 64, 5, 30, 11)):
    """Responses of very unlike lengths, off-policy, one of them masked: what a bad logsumexp trips over."""
    rng = np.random.default_rng(0)
    samples = [Sample(prompts[0][1][i].token_ids, rng.integers(1, 28, length).astype(np.int32), float(rng.normal()), trains=i != 3)
               for i, length in enumerate(lengths)]

    def near(logprobs):
        return logprobs + torch.from_numpy(rng.normal(0, 0.3, len(logprobs)))
    return [replace(sample, rollout_logprobs=logprobs, old_logprobs=near(logprobs), ref_logprobs=near(logprobs))
            for sample, logprobs in zip(samples, compute_logprobs(run, run.policy, samples), strict=True)]


def gradient(run, mini):
    run.policy.zero_grad()
    stats = accumulate_gradients(run, mini, on_policy=False)
    return torch.cat([p.grad.flatten() for p in run.policy.parameters()]), stats


# ---- one mini-batch, any split ----

@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("extras", [[], ["actor.use_kl_loss=true", "actor.kl_loss_coef=0.1", "actor.entropy_coeff=0.01"]],
                         ids=["plain", "kl and entropy"])
def test_the_gradient_is_the_same_for_one_micro_batch_and_for_five(make_run, mode, extras):
    run, prompts = make_run(f"actor.loss_agg_mode={mode}", "actor.clip_ratio_c=3", *extras, double=True)
    mini, results = make_mini(run, prompts), []
    for budget in (10**6, 120):
        run.config.actor.max_tokens_per_micro_batch = budget
        results.append(gradient(run, mini))
    assert len(train_dapo.micro_batches(mini, 120)) >= 5
    (one, one_stats), (five, five_stats) = results
    assert one.abs().max() > 1e-3 and one_stats["clip_frac_high"] > 0 and one_stats["clip_frac_low"] > 0
    assert (one - five).abs().max() < 1e-6
    assert one_stats == pytest.approx(five_stats, rel=1e-9, abs=1e-9)  # the logged loss is the whole step's
    if not extras:  # and is what the whole mini-batch gives in one piece, with counts of its own
        batch = collate(mini, pad_id=0)
        logprobs, _ = response_logprobs(run.policy, batch)
        loss, _ = policy_loss(logprobs, batch["old_logprobs"], batch["advantages"], batch["mask"], 0.2, 0.28, 3.0)
        assert aggregate(loss, batch["mask"], mode).item() == pytest.approx(one_stats["loss"], abs=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_shares_add_up_to_the_whole(make_run, mode):
    """What DDP averages, emulated: each rank's loss counts `num_processes` times, over the same global counts."""
    run, prompts = make_run(f"actor.loss_agg_mode={mode}", "actor.max_tokens_per_micro_batch=180", double=True)
    mini = make_mini(run, prompts)
    whole, _ = gradient(run, mini)

    class Rank:
        num_processes, device, distributed_type = 2, torch.device("cpu"), run.accelerator.distributed_type
        autocast, no_sync, backward, reduce, gather = (getattr(run.accelerator, name) for name in
                                                       ("autocast", "no_sync", "backward", "reduce", "gather"))

        def __init__(self, rank):
            self.process_index = rank
    parts = [gradient(replace(run, accelerator=Rank(rank)), mini)[0] for rank in range(2)]
    assert (sum(parts) / 2 - whole).abs().max() < 1e-6


def test_gradient_checkpointing_changes_nothing(make_run):
    results = []
    for flag in ("false", "true"):
        run, prompts = make_run(f"model.gradient_checkpointing={flag}", double=True)
        results.append(gradient(run, make_mini(run, prompts))[0])
    assert (results[0] - results[1]).abs().max() < 1e-9


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_neither_packing_nor_padding_changes_a_logprob(make_run, attention):
    run, prompts = make_run(f"model.attn_implementation={attention}", double=True)
    assert bool(packing(run.policy)) == (attention == "sdpa")
    mini = make_mini(run, prompts)
    together = compute_logprobs(run, run.policy, mini)
    for sample, row in zip(mini, together, strict=True):
        (alone,) = compute_logprobs(run, run.policy, [sample])
        assert torch.allclose(row, alone, atol=1e-9) and len(row) == len(sample.response_ids)


def test_responses_without_a_verdict_are_counted(make_run):
    run, prompts = make_run("total_training_steps=1")
    hang = replace(run, judge=lambda tasks: [[TIMED_OUT if i % 3 == 0 else score for i, score in enumerate(group)] for group in run.judge(tasks)])
    ((metrics, _, _),) = train(hang, prompts, Counter())
    assert metrics["reward/timeouts"] == metrics["gen_batches"] * 6 * 2  # of four responses to six prompts, the first and the last
    assert metrics["groups/trained"] == 4


# ---- time ----

def test_the_phases_add_up_to_the_time_of_a_step(make_run):
    """To within 2%, by another clock; what is in no phase is `other`, and next to nothing."""
    run, prompts = make_run("total_training_steps=4", "data.train_batch_size=16", "actor.ppo_mini_batch_size=32")
    steps, seconds = train(run, prompts, Counter()), []
    rows = []
    for _ in range(4):
        start = time.perf_counter()
        rows.append(next(steps)[0])
        seconds.append(time.perf_counter() - start)
    phases = {name for name in rows[0] if name.startswith("time/")} - {"time/step"}
    assert phases == {f"time/{name}" for name in ("generate", "reward", "logprobs", "update", "sync", "other")}
    for row, wall in zip(rows[1:], seconds[1:], strict=True):
        assert sum(row[name] for name in phases) == pytest.approx(row["time/step"]) and row["time/step"] == pytest.approx(wall, rel=0.02)
    assert abs(sum(row["time/other"] for row in rows[1:])) < 0.02 * sum(seconds[1:])


# ---- the update ----

def test_the_first_update_after_a_rollout_is_exactly_on_policy(make_run):
    """One mini-batch, however padded: ratio 1 and nothing clipped, exactly, and no forward pass for old log-probs."""
    run, prompts = make_run("actor.ppo_mini_batch_size=16", "actor.max_tokens_per_micro_batch=300")
    samples = [replace(sample, old_logprobs=None) for sample in make_mini(run, prompts)]
    calls = count_calls(run)
    stats = update(run, samples, 5, Timer())
    assert stats["actor/ratio"] == 1 and stats["actor/clip_frac_high"] == stats["actor/clip_frac_low"] == stats["actor/kl"] == 0
    assert stats["updates"] == 1
    assert calls == [True] * len(train_dapo.micro_batches(samples, 300, packed=True))  # gradient passes only


def test_nothing_in_a_micro_batch_waits_for_the_device(make_run):
    """No number is read back from a tensor, and no shape depends on one: on a GPU either would stop the queue."""
    from torch.utils._python_dispatch import TorchDispatchMode
    run, prompts = make_run("actor.use_kl_loss=true", "actor.entropy_coeff=0.01", "actor.clip_ratio_c=3", "rollout.correction=token")
    samples = make_mini(run, prompts)
    samples = [replace(sample, ref_logprobs=sample.old_logprobs) for sample in samples]
    batch, seen = train_dapo.make_batch(run, samples, [0, 1, 2, 3]), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            by_mask = "index.Tensor" in str(function) and any(index is not None and index.dtype == torch.bool for index in args[1])
            seen.append("masked_select" if by_mask else str(function))
            return function(*args, **(kwargs or {}))
    with Watch():
        loss, _ = train_dapo.micro_batch_loss(run.config, run.policy, batch, False, 100, 4)
        loss.backward()
    assert len(seen) > 100
    assert not [name for name in seen if any(bad in name for bad in ("_local_scalar_dense", "nonzero", "masked_select", "unique"))]


def count_calls(run):
    """Whether each forward pass of the policy from now on is one with gradients."""
    calls = []
    run.policy.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    return calls


def test_old_logprobs_are_of_the_policy_before_the_step_for_every_later_mini_batch(make_run, monkeypatch):
    run, prompts = make_run("actor.ppo_mini_batch_size=4", "actor.lr=1e-2", "actor.ppo_epochs=2")
    samples = [replace(sample, old_logprobs=None) for sample in make_mini(run, prompts)]
    before = compute_logprobs(run, run.policy, samples)
    seen = []
    original = train_dapo.accumulate_gradients
    monkeypatch.setattr(train_dapo, "accumulate_gradients", lambda run, mini, on_policy: seen.append((mini, on_policy)) or original(run, mini, on_policy))
    update(run, samples, 5, Timer())
    by_response = {len(sample.response_ids): old for sample, old in zip(samples, before, strict=True)}
    assert [len(mini) for mini, _ in seen] == [4, 3, 3] * 2
    assert [on_policy for _, on_policy in seen] == [True] + [False] * 5
    for sample in (sample for mini, _ in seen[1:] for sample in mini):
        assert torch.allclose(sample.old_logprobs, by_response[len(sample.response_ids)], atol=1e-5)


def test_reference_logprobs_only_where_a_kl_is_on(make_run):
    assert make_run()[0].reference is None
    run, prompts = make_run("actor.use_kl_loss=true")
    assert run.reference is not None and not any(p.requires_grad for p in run.reference.parameters())
    stats = update(run, make_mini(run, prompts), 5, Timer())
    assert math.isfinite(stats["actor/ref_kl"])


def test_with_the_samplers_logprobs_as_the_old_ones_there_is_no_pass_for_them(make_run, monkeypatch):
    run, prompts = make_run("actor.old_logprobs=rollout")
    samples = [replace(sample, rollout_logprobs=sample.rollout_logprobs.float()) for sample in make_mini(run, prompts)]
    monkeypatch.setattr(train_dapo, "compute_logprobs", None)
    on_policy, original = [], train_dapo.accumulate_gradients
    monkeypatch.setattr(train_dapo, "accumulate_gradients", lambda run, mini, first: on_policy.append(
        (first, all(s.old_logprobs is s.rollout_logprobs for s in mini))) or original(run, mini, first))
    update(run, samples, 1, Timer())
    assert on_policy == [(False, True), (False, True)]


@pytest.mark.parametrize(("correction", "cap", "factor"), [("token", 2.0, 1.5), ("token", 1.2, 1.2), ("off", 2.0, 1.0)])
def test_rollout_correction_weighs_the_gradient(make_run, correction, cap, factor):
    """The sampler gave every token two thirds of the probability that the trainer gives it."""
    run, prompts = make_run("rollout.correction=off", double=True)
    mini = [replace(sample, rollout_logprobs=sample.old_logprobs - math.log(1.5)) for sample in make_mini(run, prompts)]
    plain, _ = gradient(run, mini)
    run.config.rollout.correction, run.config.rollout.correction_cap = correction, cap
    weighted, stats = gradient(run, mini)
    assert (weighted - factor * plain).abs().max() < 1e-6
    assert stats["rollout_max"] == pytest.approx(1.5) and stats["importance_ratio_clip_frac"] == (stats["tokens"] if cap < 1.5 else 0)
    assert stats["mismatch_kl"] / stats["tokens"] == pytest.approx(1.5 - 1 - math.log(1.5))


def test_warm_up_counts_rollout_steps_not_optimizer_steps(make_run):
    run, prompts = make_run("actor.ppo_mini_batch_size=4", "actor.lr=1e-3", "actor.lr_warmup_steps=4")
    rates = [update(run, make_mini(run, prompts), step, Timer())["actor/lr"] for step in (1, 2, 4, 9)]
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 1e-3, 1e-3])


def test_a_loss_that_is_not_finite_is_not_applied(make_run):
    run, prompts = make_run("actor.ppo_mini_batch_size=16")
    before = [p.clone() for p in run.policy.parameters()]
    samples = [replace(sample, advantage=math.nan) for sample in make_mini(run, prompts)]
    with pytest.raises(SystemExit, match="step 7, update 1: loss nan, gradient norm nan; not applied"):
        update(run, samples, 7, Timer())
    assert all(torch.equal(a, b) for a, b in zip(before, run.policy.parameters(), strict=True))


def test_a_policy_that_has_diverged_is_an_error_not_a_wrong_answer(make_run):
    run, prompts = make_run()
    with torch.no_grad():
        next(run.policy.parameters()).fill_(math.nan)
    with pytest.raises(SystemExit, match="step 1, prompt 0: log-probs are not finite; the policy has diverged"):
        train_dapo.rollout_groups(run, [(0, prompts[0][1][0])], 1, Timer())


def test_a_mini_batch_of_masked_responses_moves_nothing(make_run):
    run, prompts = make_run("actor.ppo_mini_batch_size=16")
    before = [p.clone() for p in run.policy.parameters()]
    stats = update(run, [replace(sample, trains=False) for sample in make_mini(run, prompts)], 5, Timer())
    assert stats["updates"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, run.policy.parameters(), strict=True))


def test_a_model_with_dropout_trains_without_it(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel
    gpt2 = GPT2Config(vocab_size=28, n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(gpt2).save_pretrained(tmp_path / "m")
    from infra.config import load_config
    config = load_config("config.yaml", [f"model.path={tmp_path / 'm'}", "data.max_prompt_length=8", "data.max_response_length=24"])
    model = load_model(config).train()
    ids = torch.arange(20)[None]
    assert torch.equal(model(ids).logits, model(ids).logits)


# ---- dynamic sampling ----

def fake_policy(monkeypatch, accuracy):
    """Replace what costs time, the model's writing: prompt number i of the stream gets accuracies `accuracy(i)`."""
    asked = []

    def rollout_groups(run, batch, step, timer):
        asked.append([position for position, _ in batch])
        return [make_group(position, prompt, accuracy(position)) for position, prompt in batch]
    monkeypatch.setattr(train_dapo, "rollout_groups", rollout_groups)
    return asked


def make_group(position, prompt, accs, length=3):
    response = Response(np.full(length, 5, np.int32), np.zeros(length, np.float32), "", "stop")
    rewards = [2 * acc - 1 - 0.01 * i for i, acc in enumerate(accs)]  # shaped: never equal
    return Group(position, prompt, [response] * len(accs), [Score(a, 2 * a - 1) for a in accs], rewards, rewards)


def mixed_where(condition):
    return lambda position: [1.0, 0.0, 0.0, 0.0] if condition(position) else [0.0] * 4


def test_sampling_goes_on_until_the_batch_is_full_then_clips_to_the_first(make_run, monkeypatch):
    run, prompts = make_run("total_training_steps=1")
    asked = fake_policy(monkeypatch, mixed_where(lambda position: position % 3 == 0))
    ((metrics, trained, _),) = train(run, prompts, Counter())
    assert [len(batch) for batch in asked] == [6, 6] and asked[1][0] == 6
    assert [group.position for group in trained] == [0, 3, 6, 9]
    assert (metrics["gen_batches"], metrics["prompts_drawn"], metrics["groups/trained"]) == (2, 12, 4)
    assert metrics["groups/kept"] == pytest.approx(4 / 12) and metrics["groups/all_wrong"] == pytest.approx(8 / 12)
    assert (metrics["responses/generated"], metrics["responses/wasted"]) == (48, 32)


def test_the_filter_is_on_accuracy_while_the_shaped_reward_trains(make_run, monkeypatch):
    """Shaped rewards differ even where all answers are wrong: a filter on them would keep everything."""
    run, prompts = make_run("total_training_steps=1", "filter_groups.max_num_gen_batches=3")
    fake_policy(monkeypatch, mixed_where(lambda position: position == 2))
    seen = []
    monkeypatch.setattr(train_dapo, "update", lambda run, samples, *_: seen.extend(samples) or {"updates": 1})
    ((_, trained, _),) = train(run, prompts, Counter())
    assert [group.position for group in trained] == [2]
    shaped = np.array([1.0, -1.01, -1.02, -1.03])
    expected = (shaped - shaped.mean()) / (shaped.std(ddof=1) + 1e-6)
    assert [sample.advantage for sample in seen] == pytest.approx(expected.tolist())


def test_auto_draws_as_many_prompts_as_the_share_kept_lately_asks_for(make_run, monkeypatch):
    run, prompts = make_run("total_training_steps=3", "data.gen_batch_size=auto")
    asked = fake_policy(monkeypatch, mixed_where(lambda position: position % 4 == 0))
    rows = [metrics for metrics, _, _ in train(run, prompts, Counter())]
    # Nothing known: 4. 1 of 4 kept: (3 + sqrt(3 * 3/5)) / (2/5) = 10.9. 3 or 4 of 15: the rest is fewer
    assert [len(batch) for batch in asked[:2]] == [4, 11] and [position for batch in asked for position in batch] == list(range(sum(map(len, asked))))
    kept, drawn = 0.0, 0.0
    for row in rows:
        size = row["responses/generated"] / 4
        kept, drawn = (kept + row["groups/kept"] * size) / 2, (drawn + size) / 2
        assert (row["groups/kept_lately"], row["groups/drawn_lately"]) == pytest.approx((kept, drawn))
        assert row["responses/generated_per_trained"] == size / 4 and row["responses/wasted_tokens"] == (size - 4) * 4 * 3
    asked.clear()
    ((resumed, _, _),) = train(run, prompts, Counter({name: rows[1][name] for name in train_dapo.COUNTERS}))
    assert all(resumed[name] == value for name, value in rows[2].items() if name in train_dapo.COUNTERS or name.startswith("responses/"))


def test_auto_has_a_bound_where_nothing_is_kept(make_run, monkeypatch):
    run, prompts = make_run("total_training_steps=1", "data.gen_batch_size=auto", "filter_groups.max_num_gen_batches=3")
    asked = fake_policy(monkeypatch, mixed_where(lambda position: position == 1))
    list(train(run, prompts, Counter()))
    assert [len(batch) for batch in asked] == [4, 11, 16]


def test_accuracy_before_and_after_the_filter_have_names_of_their_own(make_run, monkeypatch):
    run, prompts = make_run("total_training_steps=1")
    fake_policy(monkeypatch, mixed_where(lambda position: position % 3 == 0))
    ((metrics, _, _),) = train(run, prompts, Counter())
    assert metrics["acc/before_filter"] == pytest.approx(4 / 48) and metrics["acc/after_filter"] == pytest.approx(1 / 4)


@pytest.mark.parametrize("metric, kept", [("acc", 0), ("score", 0), ("seq_reward", 4), ("seq_final_reward", 4)])
def test_each_filter_metric_is_used(make_run, monkeypatch, metric, kept):
    run, prompts = make_run("total_training_steps=1", f"filter_groups.metric={metric}", "filter_groups.max_num_gen_batches=1")
    fake_policy(monkeypatch, mixed_where(lambda position: False))
    ((metrics, _, _),) = train(run, prompts, Counter())
    assert metrics["groups/trained"] == kept


def test_without_the_filter_one_batch_of_train_batch_size_trains(make_run, monkeypatch):
    run, prompts = make_run("total_training_steps=1", "filter_groups.enable=false")
    asked = fake_policy(monkeypatch, mixed_where(lambda position: False))
    ((metrics, trained, _),) = train(run, prompts, Counter())
    assert [len(batch) for batch in asked] == [4] and len(trained) == 4 and metrics["responses/wasted"] == 0


def test_at_the_limit_it_trains_on_what_there_is_and_says_so(make_run, monkeypatch, capsys):
    run, prompts = make_run("total_training_steps=1", "filter_groups.max_num_gen_batches=3")
    asked = fake_policy(monkeypatch, mixed_where(lambda position: position in (1, 7)))
    ((metrics, trained, _),) = train(run, prompts, Counter())
    assert len(asked) == 3  # exactly
    assert [group.position for group in trained] == [1, 7] and metrics["optimizer_steps"] == 1
    assert ("step 1 kept 2 of 18 groups after 3 generation batches; 0% all-correct, 89% all-wrong, 0% of responses truncated: "
            "use easier prompts, or raise filter_groups.max_num_gen_batches. This step trains on 2 groups.") in capsys.readouterr().out


def test_at_the_limit_it_can_skip_the_step(make_run, monkeypatch, capsys):
    run, prompts = make_run("total_training_steps=2", "filter_groups.max_num_gen_batches=1", "filter_groups.at_limit=skip")
    fake_policy(monkeypatch, mixed_where(lambda position: position == 1 or position >= 6))
    (first, trained, _), (second, _, _) = train(run, prompts, Counter())
    assert trained == [] and first["optimizer_steps"] == 0 and "actor/loss" not in first
    assert second["groups/trained"] == 4 and second["optimizer_steps"] == 2
    assert "This step is skipped" in capsys.readouterr().out


def test_at_the_limit_it_can_stop_the_run(make_run, monkeypatch):
    run, prompts = make_run("filter_groups.max_num_gen_batches=1", "filter_groups.at_limit=error")
    fake_policy(monkeypatch, lambda position: [1.0] * 4)
    with pytest.raises(SystemExit, match="100% all-correct, 0% all-wrong, 0% of responses truncated: use harder prompts"):
        list(train(run, prompts, Counter()))


def test_nothing_kept_skips_the_step_a_bounded_number_of_times(make_run, monkeypatch):
    run, prompts = make_run("total_training_steps=9", "filter_groups.max_num_gen_batches=1", "filter_groups.max_skipped_steps=2")
    fake_policy(monkeypatch, mixed_where(lambda position: position < 6))  # the first step trains
    steps = train(run, prompts, Counter())
    assert [next(steps)[0]["groups/trained"] for _ in range(3)] == [4, 0, 0]
    with pytest.raises(SystemExit, match="3 steps in a row were skipped, the last because: step 4 kept 0 of 6 groups"):
        next(steps)


def test_a_collapsed_policy_is_not_taken_for_hard_prompts(make_run):
    group = make_group(0, make_run()[1][0], [0.0, 0.0])
    cut = replace(group, responses=[replace(response, finish_reason="length") for response in group.responses])
    assert "100% of responses truncated: raise data.max_response_length; or" in train_dapo.describe(3, [], [cut], 1)


def test_a_short_answer_is_not_preferred(make_run):
    """Groups train in the order of the prompt stream, whatever their length."""
    run, prompts = make_run()
    buffer = [make_group(i, prompts[0][1][0], [1.0, 0.0], length=90 - 10 * i) for i in range(6)]
    trained = select_groups(run, 1, buffer, buffer, 1)
    assert [group.position for group in trained] == [0, 1, 2, 3]


def test_an_epochs_end_in_the_middle_of_a_fill_loses_no_group(make_run, monkeypatch):
    run, prompts = make_run("total_training_steps=1")
    asked = fake_policy(monkeypatch, mixed_where(lambda position: position % 3 == 0))
    ((_, trained, _),) = train(run, [(1, prompts[0][1][:5])], Counter())  # the epoch ends within the first generation batch
    assert [group.position for group in trained] == [0, 3, 6, 9] and asked == [list(range(6)), list(range(6, 12))]


def test_overlong_filtering_masks_truncated_responses_but_counts_them_in_the_group(make_run):
    run, _ = make_run("algorithm.overlong_filtering=true")
    prompt = Prompt(0, "", [1], "", {})
    cut, whole = (Response(np.zeros(2, np.int32), np.zeros(2, np.float32), "", reason) for reason in ("length", "stop"))
    group = Group(0, prompt, [cut, whole], [Score(0, -1), Score(1, 1)], [-1.0, 1.0], [-1.0, 1.0])
    advantages = torch.tensor([[-0.7, 0.7]])
    assert [(s.trains, round(s.advantage, 3)) for s in make_samples(run.config, [group], advantages)] == [(False, -0.7), (True, 0.7)]
    run.config.algorithm.overlong_filtering = False
    assert all(s.trains for s in make_samples(run.config, [group], advantages))


def test_kl_in_the_reward_takes_the_summed_kl_off_the_final_reward_only(make_run):
    run, prompts = make_run("algorithm.use_kl_in_reward=true", "algorithm.kl_coef=0.5")
    with torch.no_grad():
        for parameter in run.policy.parameters():
            parameter.mul_(1.02)  # away from the reference
    groups = train_dapo.rollout_groups(run, [(0, prompts[0][1][0]), (1, prompts[0][1][1])], 1, Timer())
    samples = [Sample(g.prompt.token_ids, r.token_ids, 0.0) for g in groups for r in g.responses]
    old, ref = (compute_logprobs(run, model, samples) for model in (run.policy, run.reference))
    expected = [0.5 * (o - r).sum().item() for o, r in zip(old, ref, strict=True)]
    taken_off = [reward - final for g in groups for reward, final in zip(g.rewards, g.final_rewards, strict=True)]
    assert taken_off == pytest.approx(expected, abs=1e-4) and max(map(abs, expected)) > 0.01


# ---- a whole run ----

def test_a_run_leaves_everything_that_it_promises(start, capsys):
    run_dir = start("save_rollouts=1", "val.every=1")
    out = capsys.readouterr().out
    assert "before" in out and "after" in out and "avg@2" in out and "level 9" in out and "runs" not in str(run_dir)
    metrics = rows(run_dir)
    assert [row["step"] for row in metrics] == [0, 1, 2]
    assert all({"val/val/avg@2", "val/val/pass@2", "val/val/maj@2"} <= row.keys() for row in metrics)
    assert {"reward/mean", "response_length/mean", "actor/entropy", "actor/token_prob", "acc/before_filter", "acc/after_filter",
            "groups/all_correct", "groups/all_wrong", "actor/clip_frac_high", "actor/clip_frac_low", "actor/clip_up_prob", "actor/grad_norm",
            "gen_batches", "responses/wasted", "time/generate", "time/update", "tokens_per_s/generate"} <= metrics[1].keys()
    assert metrics[2]["optimizer_steps"] == 4  # two mini-batches of 8 of 16 responses, twice
    for row in metrics[1:]:
        phases = sum(row[f"time/{phase}"] for phase in ("generate", "reward", "logprobs", "update", "sync", "other"))
        assert phases == pytest.approx(row["time/step"]) and row["time/other"] < 0.2 * row["time/step"] + 0.05
    responses = [json.loads(line) for line in (run_dir / "rollouts/step_00002.jsonl").read_text().splitlines()]
    assert len(responses) == 4 and {"prompt", "response", "acc", "score", "reward", "advantage"} <= responses[0].keys()
    assert sum(r["advantage"] for r in responses) == pytest.approx(0, abs=1e-6)
    assert (run_dir / "curves.png").stat().st_size > 10_000 and (run_dir / "config.yaml").exists()
    model = AutoModelForCausalLM.from_pretrained(run_dir / "model")
    before = AutoModelForCausalLM.from_pretrained("toy/base")
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(run_dir / "model").decode([0]) == "<eos>"


def test_the_runs_seed_and_the_place_in_the_prompt_stream_reach_the_sampler(make_run):
    run, prompts = make_run()

    def written(seed, position):
        run.config.seed = seed
        (group,) = train_dapo.rollout_groups(run, [(position, prompts[0][1][0])], 1, Timer())
        return [response.token_ids.tolist() for response in group.responses]
    assert written(0, 0) == written(0, 0)
    assert len({str(written(*where)) for where in ((0, 0), (1, 0), (2, 0), (0, 1), (0, 2))}) == 5


def test_the_advantages_in_the_rollout_files_are_those_that_were_trained_on(start, monkeypatch):
    original = train_dapo.group_advantages
    monkeypatch.setattr(train_dapo, "group_advantages", lambda *arguments: 7 * original(*arguments))  # an ablation
    run_dir = start("total_training_steps=1", "save_rollouts=1", "val.file=")
    (path,) = (run_dir / "rollouts").iterdir()
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    expected = 7 * original(torch.tensor([[s["final_reward"] for s in samples]], dtype=torch.float64))[0]
    assert [s["advantage"] for s in samples] == pytest.approx(expected.tolist())


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_sampler_and_trainer_agree_on_every_logprob(start, checkpointing):
    run_dir = start(f"model.gradient_checkpointing={checkpointing}", "rollout.temperature=0.8", "val.file=")
    assert all(row["actor/mismatch_abs"] < 1e-5 for row in rows(run_dir))


def test_the_same_seed_gives_the_same_run(start, tmp_path):
    def without_times(run_dir):
        return [{k: v for k, v in row.items() if not k.startswith(("time/", "tokens_per_s/"))} for row in rows(run_dir)]
    first = without_times(start())
    (tmp_path / "run").rename(tmp_path / "first")
    assert without_times(start()) == first
    (tmp_path / "run").rename(tmp_path / "second")
    assert without_times(start("seed=1")) != first


def test_every_option_at_once_runs(start):
    run_dir = start("actor.ppo_epochs=2", "actor.use_kl_loss=true", "algorithm.use_kl_in_reward=true", "actor.entropy_coeff=0.01",
                    "actor.clip_ratio_c=3", "algorithm.overlong_filtering=true", "algorithm.norm_adv_by_std_in_grpo=false",
                    "filter_groups.metric=seq_final_reward", "actor.loss_agg_mode=seq-mean-token-sum", "rollout.top_p=0.9",
                    "model.gradient_checkpointing=true", "mixed_precision=bf16", "val.file=")
    last = rows(run_dir)[-1]
    assert all(math.isfinite(value) for value in last.values())
    assert last["optimizer_steps"] == 8 and {"actor/ref_kl", "actor/clip_frac_dual"} <= last.keys()


def test_a_tracker_gets_the_metrics(start):
    pytest.importorskip("tensorboard", reason="needs tensorboard, which is optional")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run_dir = start("log_with=tensorboard", "total_training_steps=1")
    folders = {path.parent for path in run_dir.rglob("events.out.tfevents*")}
    logged = {tag: events.Scalars(tag)[-1].value for events in map(EventAccumulator, map(str, folders))
              for tag in events.Reload().Tags()["scalars"]}
    assert logged["reward/mean"] == pytest.approx(rows(run_dir)[-1]["reward/mean"], abs=1e-6)


def test_an_earlier_run_is_never_written_into(start):
    run_dir = start()
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    for overrides in ([], ["seed=1"], ["resume=never"]):
        with pytest.raises(SystemExit, match=f"{run_dir}.*; .*name another, for instance run_dir={run_dir}-2"):
            start(*overrides)
        assert before == {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


def test_a_few_steps_improve_the_policy(start):
    """The whole pipeline in 8 steps: far beyond noise, or something is broken."""
    run_dir = start("total_training_steps=8", "data.train_batch_size=16", "data.gen_batch_size=16", "rollout.n=16",
                    "actor.ppo_mini_batch_size=64", "val.max_prompts=100", "val.n=4")
    metrics = rows(run_dir)
    assert metrics[0]["val/val/avg@4"] < 0.4 and metrics[-1]["val/val/avg@4"] > 0.55
    assert metrics[-1]["val/val/response_length"] > 1.3 * metrics[0]["val/val/response_length"]


def test_evaluate_judges_a_model_by_itself(capsys, monkeypatch):
    import evaluate
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--config", "config.yaml", "val.max_prompts=5", "val.n=2"])
    evaluate.main()
    assert "avg@2" in capsys.readouterr().out


def test_the_training_loop_fits_on_a_screen_and_is_tagged_with_the_algorithms_lines():
    import inspect
    source = inspect.getsource(train)
    assert len(source.splitlines()) <= 50
    assert all(f"# {tag}" in source for tag in ("1:", "2:", "3-5:", "6:", "7, 8:", "9:", "10, 11:"))


def test_no_function_is_longer_than_fifty_lines():
    import ast
    for path in Path(train_dapo.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 50, f"{path.name}:{node.name}"


# ---- verdicts and validation sets ----

def test_columns_of_verifiers_become_metrics(start):
    run_dir = start("reward.name=math,toy", "reward.weights=1,0.5", "total_training_steps=1")
    before, first = rows(run_dir)
    assert 0 < first["verdict/toy/work_shown"] < 1 and 0 < before["val/val/verdict/toy/work_shown"] < 1
    assert first["reward/score"] == pytest.approx(1.5 * first["verdict/math"]) and first["verdict/math"] == first["verdict/toy"]
    sample = json.loads((run_dir / "rollouts/step_00001.jsonl").read_text().splitlines()[0])
    assert sample["score"] == 1.5 * sample["verdict/math"] and "verdict/toy/work_shown" in sample


def test_each_validation_set_has_metrics_and_a_table_of_its_own(start, tmp_path, capsys):
    (tmp_path / "easy.jsonl").write_text('{"problem": "a1 b+2?", "answer": 3}\n')
    run_dir = start(f"val.file=toy/val.jsonl, {tmp_path / 'easy.jsonl'}", "total_training_steps=1", "save_every=1")
    assert all({"val/val/avg@2", "val/easy/avg@2", "val/easy/maj@2"} <= row.keys() for row in rows(run_dir))
    out = capsys.readouterr().out
    assert re.search("^val\\n.*before.*^easy\\n.*before", out, re.MULTILINE | re.DOTALL)
    start(f"val.file=toy/val.jsonl, {tmp_path / 'easy.jsonl'}", "total_training_steps=2", "save_every=1")
    assert re.search("easy\\n +before +after", capsys.readouterr().out)  # kept over a restart


def test_a_mixture_trains_and_goes_on(start, tmp_path):
    """Prompts come 1 to 1 from files of very unlike sizes; a run that is resumed draws on."""
    (tmp_path / "few.jsonl").write_text("".join(json.dumps({"prompt": f"a{i} b+2?", "answer": str((i + 2) % 10)}) + "\n" for i in range(3)))
    mixed = [f"data.train_file=toy/train.jsonl,{tmp_path / 'few.jsonl'}", "data.train_weights=1,1", "val.file=", "save_every=1",
             "save_rollouts=99", "filter_groups.enable=false"]
    start(*mixed, "total_training_steps=1")
    run_dir = start(*mixed, "total_training_steps=2")
    samples = [json.loads(line) for path in sorted((run_dir / "rollouts").iterdir()) for line in path.read_text().splitlines()]
    prompts = [samples[at]["prompt"] for at in range(0, len(samples), 4)]
    assert [samples[at]["position"] for at in range(0, len(samples), 4)] == list(range(8))
    assert sum(prompt in ("a0 b+2?", "a1 b+2?", "a2 b+2?") for prompt in prompts) == 4
    with pytest.raises(SystemExit, match="data.train_weights: 1,1 -> 2,1"):
        start(*mixed, "data.train_weights=2,1", "total_training_steps=3")
