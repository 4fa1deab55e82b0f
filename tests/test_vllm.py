"""Rollouts by the real vLLM engine in the training process."""

import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM: pip install -r requirements-vllm-cpu.txt, "
                    "or requirements-vllm.txt")

from vllm_fixtures import (
    ALL_LOGPROBS,
    COMMON,
    ROOT,
    VLLM,
    add_noise,
    assert_each_sync_arrives,
    assert_same,
    generate,
    make_state,
    read_metrics,
    read_rollouts,
    token_ids,
    train_here,
    train_in_two_processes,
    using,
)

from data_types import SamplingParams
from infra.setup import sync_weights
from infra.vllm_engine import generate_in_process
from rollout import sample_tokens, transformers_engine

pytest_plugins = ["vllm_fixtures"]


@pytest.fixture
def vllm_state(engine, tmp_path):
    """A state whose engine is vLLM, and token ids of some prompts."""
    with using(engine):
        yield make_state(tmp_path / "run", *VLLM)


def test_logprobs_agree_before_training_and_after_each_sync(vllm_state):
    assert_each_sync_arrives(*vllm_state)


def test_a_first_sync_that_does_nothing_is_an_error(vllm_state, engine, tmp_path):
    state, _ = vllm_state
    add_noise(state.policy, 0)
    sync_weights(state)  # the engine keeps these weights
    broken = replace(engine, sync=lambda weights: None)
    message = "step 0.* log-probs of sampler .* differ by .* the rollout engine does not have"
    with pytest.raises(SystemExit, match=message):
        train_here(broken, tmp_path / "broken", *COMMON)


def test_a_sync_that_is_left_out_in_training_is_an_error(engine, tmp_path):
    calls = []

    def sync_once(weights):
        calls.append(1)
        if len(calls) == 1:
            engine.sync(weights)
    message = "step [2345].* log-probs of sampler and trainer differ by"
    with pytest.raises(SystemExit, match=message):
        train_here(replace(engine, sync=sync_once), tmp_path / "run", *COMMON, ALL_LOGPROBS,
                   "actor.lr=1e-3", "total_training_steps=5")


def test_loras_adapters_reach_vllm_merged(engine, tmp_path):
    rows = train_here(engine, tmp_path / "run", *COMMON, ALL_LOGPROBS, "model.lora_rank=4",
                      "actor.lr=0.01", "total_training_steps=3")
    assert len(rows) == 3 and all(row["actor/mismatch_abs"] < 1e-4 for row in rows)


def test_the_same_seed_gives_the_same_responses_however_they_are_batched(vllm_state):
    state, prompts = vllm_state
    groups = generate(state, prompts)
    assert token_ids(groups) == token_ids(generate(state, prompts))
    for i, ids in reversed(list(enumerate(prompts))):
        alone = state.engine.generate([ids], [(7, i)], SamplingParams(n=4, max_tokens=96))
        assert token_ids(alone) == token_ids(groups[i:i + 1])
    assert len({tuple(response.token_ids) for response in groups[3]}) > 1  # each has its own seed


def state_engine(state, tokenizer):
    """The engine of transformers with the same policy."""
    return transformers_engine(state.policy, tokenizer, state.accelerator.autocast, 64, False)


@pytest.mark.parametrize(("stop_ids", "max_tokens"), [([0], 96), ([0, 5, 6], 96), ([0], 2)])
def test_greedy_responses_are_those_of_transformers(vllm_state, tokenizer, stop_ids, max_tokens):
    """Token for token, with their log-probs and finish reasons: one EOS id, several, truncated."""
    state, prompts = vllm_state
    (llm, *_), seeds = state.engine.generate.args, [(1,)] * len(prompts)
    params = SamplingParams(n=2, max_tokens=max_tokens, temperature=0.0)
    state.policy.generation_config.eos_token_id = stop_ids
    reference = state_engine(state, tokenizer)
    found = generate_in_process(llm, tokenizer, stop_ids, prompts, seeds, params)
    assert_same(reference.generate(prompts, seeds, params), found)
    reasons = {response.finish_reason for group in found for response in group}
    assert "stop" in reasons if max_tokens > 2 else reasons == {"length"}


@pytest.mark.parametrize("stop", [("r: ",), ("nswer", "nowhere"),
                                  tuple(f"r: {digit}" for digit in range(10))])
def test_stop_strings_end_the_same_responses_as_with_transformers(vllm_state, tokenizer, stop):
    state, prompts = vllm_state
    (llm, *_), seeds = state.engine.generate.args, [(1,)] * len(prompts)
    params = SamplingParams(n=2, max_tokens=96, temperature=0.0, stop=stop)
    found = generate_in_process(llm, tokenizer, [tokenizer.eos_token_id], prompts, seeds, params)
    assert_same(state_engine(state, tokenizer).generate(prompts, seeds, params), found)
    texts = [response.text for group in found for response in group]
    assert any(string in text for text in texts for string in stop)
    assert {response.finish_reason for group in found for response in group} == {"stop"}


def test_logprobs_are_those_after_temperature_and_top_p(vllm_state):
    """Of the first token: from the trainer's logits, through `rollout.sample_tokens`."""
    state, prompts = vllm_state
    groups = generate(state, prompts[:8], temperature=0.7, top_p=0.7)
    for ids, group in zip(prompts, groups, strict=False):
        tokens = torch.tensor([ids], device=state.policy.device)
        with torch.no_grad():
            logits = state.policy(tokens).logits[:, -1].cpu()
        expected = {}
        for uniform in torch.linspace(0, 0.999, 200):
            token, logprob = sample_tokens(logits, uniform[None], 0.7, 0.7)
            expected[token.item()] = logprob.item()
        for response in group:
            logprob = expected[response.token_ids[0]]
            assert response.logprobs[0] == pytest.approx(logprob, abs=1e-4)


def test_a_share_of_the_prompts_has_logprobs_and_the_responses_are_the_same(vllm_state):
    state, prompts = vllm_state
    full = generate(state, prompts)
    for share, count in ((0, 0), (1 / 16, 1), (0.5, 6), (1, 12)):
        groups, again = (generate(state, prompts, logprobs=share) for _ in range(2))
        assert token_ids(groups) == token_ids(full)
        chosen = [np.isfinite(group[0].logprobs).all() for group in groups]
        assert sum(chosen) == count
        for has, *same in zip(chosen, full, groups, again, strict=True):
            for expected, *found in zip(*same, strict=True):
                for response in found:
                    assert response.logprobs.shape == response.token_ids.shape
                    if has:
                        assert np.abs(response.logprobs - expected.logprobs).max() < 1e-4
                    else:
                        assert np.isnan(response.logprobs).all()


@pytest.mark.parametrize("override, share", [
    ("rollout.correction=off", 1 / 16), (ALL_LOGPROBS, 1), ("actor.old_logprobs=rollout", 1)])
def test_training_asks_for_logprobs_of_all_only_if_it_uses_them(engine, tmp_path, override, share):
    """And a run that was stopped asks for the same ones again."""
    seen = {}

    def spy(prompts, seeds, params, progress=""):
        groups = engine.generate(prompts, seeds, params)
        flags = [[bool(np.isfinite(r.logprobs).all()) for r in group] for group in groups]
        assert all(len(set(group)) == 1 for group in flags)
        seen.setdefault(progress, []).append([group[0] for group in flags])
        return groups

    def train(name, steps):
        seen.clear()
        rows = train_here(replace(engine, generate=spy), tmp_path / name, *COMMON, override,
                          "val.file=toy/val.jsonl", f"total_training_steps={steps}")
        return rows, dict(seen)
    rows, found = train("whole", 2)
    assert all(map(all, found.pop("weight sync"))) and np.sum(found.pop("validation")) == 0
    batches = [batch for batches in found.values() for batch in batches]
    assert len(batches) >= 2
    assert all(sum(batch) == math.ceil(share * len(batch)) for batch in batches)
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    train("parts", 1)
    assert train("parts", 2)[1]["step 2"] == found["step 2"]


def test_evaluate_generates_with_the_model_that_it_is_given(vllm_state, engine, capsys):
    import evaluate
    state, _ = vllm_state
    add_noise(state.policy, 0)
    sync_weights(state)  # so the engine has other weights
    arguments = ["--config", "config.yaml", *VLLM, "val.max_prompts=40", "val.n=4"]
    with using(engine, "evaluate.py", *arguments):
        evaluate.main()
    (accuracy,) = re.findall(r"^all +(0\.\d+)", capsys.readouterr().out, re.MULTILINE)
    assert 0.15 < float(accuracy) < 0.4  # the base model's, not noise's


@pytest.mark.parametrize("change, message", [
    (lambda weights: {f"other.{name}": weight for name, weight in weights.items()},
     "LlamaForCausalLM of vLLM cannot take the policy's weights: There is no module or parameter "
     "named 'other' in LlamaForCausalLM$"),
    (lambda weights: {name: weight for name, weight in weights.items() if "norm" not in name},
     r"LlamaForCausalLM of vLLM got no value for 5 of its \d+ weights, model.layers.0.input_layer"
     "norm.weight, model.layers.0.post_attention_layernorm.weight, .* among them")],
    ids=["unknown", "missing"])
def test_a_weight_that_the_sync_does_not_find_is_named(change, message, vllm_state):
    state, prompts = vllm_state
    weights = change({name: weight.detach() for name, weight in state.policy.state_dict().items()})
    with pytest.raises(ValueError, match=message):
        state.engine.sync(weights.items())
    sync_weights(state)
    assert_same(*[generate(state, prompts[:2])] * 2)


def without_times(row):
    """Nor what is of responses with log-probs only, of which each engine has others."""
    return {name: row[name] for name in row
            if not any(part in name for part in ("time", "memory/", "per_s", "mismatch",
                                                 "importance_ratio"))}


def test_processes_and_restarts_change_nothing(alone, tmp_path):
    common = [*COMMON, "rollout.backend=vllm"]
    train_in_two_processes(tmp_path / "two", *common, "total_training_steps=1")
    two = train_in_two_processes(tmp_path / "two", *common, "total_training_steps=2")  # resumes
    for step in (1, 2):
        assert read_rollouts(alone, step) == read_rollouts(tmp_path / "two", step)
    one = read_metrics(alone)[:2]
    for a, b in zip(one, two, strict=True):
        assert without_times(a) == pytest.approx(without_times(b), rel=1e-4, abs=1e-5)


def test_two_processes_can_share_an_engine(alone, tmp_path):
    """Tensor parallelism: half of each layer in each; the same responses up to rounding, once.

    A run that left its shared memory behind, as vLLM's CPU build does, is no obstacle."""
    for rank in range(2):
        Path(f"/dev/shm/-tp:0-[0-1]-cpushm_{rank}").touch()
    one = read_metrics(alone)[0]
    (two,) = train_in_two_processes(tmp_path / "two", *COMMON, ALL_LOGPROBS, "rollout.backend=vllm",
                                    "total_training_steps=1", "rollout.tensor_parallel_size=2")
    assert one["responses/generated"] == two["responses/generated"]
    assert two["actor/mismatch_abs"] < 1e-4
    assert two["actor/loss"] == pytest.approx(one["actor/loss"], abs=1e-4)


def test_the_embedded_default_trains_through_vllm(engine, tmp_path):
    metrics = train_here(engine, tmp_path / "run", "total_training_steps=8", "val.every=8",
                         "actor.ppo_mini_batch_size=32")
    assert metrics[0]["val/val/avg@4"] < 0.4 and metrics[-1]["val/val/avg@4"] >= 0.85
    found = [row["actor/mismatch_abs"] for row in metrics[1:] if "actor/mismatch_abs" in row]
    assert found and max(found) < 1e-4  # of two prompts in 32, if one of them is trained


@pytest.mark.slow
def test_the_benchmark_beside_vllms_own_runs_at_its_smallest_size():
    command = [sys.executable, "bench/vllm_speed.py", "throughput", "--model", "tiny", "--tokens",
               "8", "--prompts", "2", "--n", "2", "--rounds", "1"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300,
                            check=False)
    assert "| vllm bench throughput |" in result.stdout and "(goal 0.9)" in result.stdout, (
        result.stderr[-3000:])
