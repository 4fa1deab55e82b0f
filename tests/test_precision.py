"""mixed_precision: fp16 with a scaled loss, on a CPU: overflows are skipped and counted, a resumed
run has the same scale, and half precision computes what float32 does."""

import functools
import math
import subprocess
from dataclasses import replace

import pytest
import torch
from conftest import logprobs_of, read_rows, reset_accelerate
from torch.distributed.fsdp import FSDPModule
from test_distributed import LAUNCH, ROOT, WORKER
from test_train import make_mini_batch, same_weights, weights_of

from infra.checkpoint import list_checkpoints, read_metadata
from infra.config import compute_dtype, load_config
from infra.logprobs import fused_linear_logprobs
from infra.metrics import StepRecord, actor_metrics
from infra.precision import is_plain_linear
from train_dapo import update_policy

FP16 = "mixed_precision=fp16"


def planted(monkeypatch, **settings):
    """Scalers as torch makes them, with these settings."""
    monkeypatch.setattr(torch.amp, "GradScaler",
                        functools.partial(torch.amp.GradScaler, **settings))


def test_a_step_whose_gradient_overflows_is_skipped_and_counted_and_the_run_continues(
        make_state, monkeypatch, capsys):
    planted(monkeypatch, init_scale=2.0**40)  # gradients in float16 end at 65504
    state, prompts = make_state(FP16)
    mini_batch, record = make_mini_batch(state, prompts), StepRecord(1, state.config)
    before, scaler = weights_of(state), state.accelerator.scaler
    record.add_update(update_policy(state, mini_batch, step=1))
    moments = [value for entry in state.optimizer.state.values() for value in entry.values()]
    assert same_weights(state, before) and not any(value.any() for value in moments)
    assert (record.skipped_updates, record.grad_norms, scaler.get_scale()) == (1, [], 2.0**39)
    metrics = actor_metrics(state.accelerator, record, 0.0)
    assert metrics["actor/skipped_updates"] == 1 and metrics["actor/loss_scale"] == 2.0**39
    assert math.isfinite(metrics["actor/loss"]) and "actor/grad_norm" not in metrics
    assert "1 process on cpu, passes in float16\n" in (printed := capsys.readouterr().out)
    assert "none was applied; scale of the loss: 5.49756e+11" in printed
    while not record.grad_norms:
        record.add_update(update_policy(state, mini_batch, step=1))
    assert not same_weights(state, before)
    assert record.skipped_updates == 40 - math.log2(scaler.get_scale()) < 40
    loss = metrics["actor/loss"]  # the mean of equal losses
    assert actor_metrics(state.accelerator, record, 0.0)["actor/loss"] == pytest.approx(loss)
    assert "none was applied" not in capsys.readouterr().out


def test_gradients_that_no_scale_makes_finite_end_the_run_in_one_line(make_state):
    state, prompts = make_state(FP16)
    mini_batch, record = make_mini_batch(state, prompts), StepRecord(1, state.config)
    next(state.policy.parameters()).register_hook(lambda gradient: gradient * torch.inf)
    before = weights_of(state)
    with pytest.raises(ValueError, match="gradient norm (inf|nan) and was not applied"):
        for _ in range(100):
            record.add_update(update_policy(state, mini_batch, step=1))
    assert record.skipped_updates == 16 and not record.grad_norms  # 65536 is halved down to 1
    assert same_weights(state, before)


@pytest.mark.dapo
def test_a_resumed_run_has_the_scale_and_is_the_same_to_the_bit(start, tmp_path, monkeypatch):
    planted(monkeypatch, init_scale=2.0**22, growth_interval=3)  # overflows, and grows again
    common = [FP16, "val.file=", "save_every=1"]

    def rows(run_dir):
        return [{name: value for name, value in row.items()
                 if not name.startswith(("time/", "memory/", "tokens_per_s/"))}
                for row in read_rows(run_dir)]

    whole = start(*common).rename(tmp_path / "whole")
    start(*common, "total_training_steps=1")
    resumed = start(*common)
    first, second = rows(whole)
    assert rows(resumed) == [first, second]
    assert first["actor/skipped_updates"] > 0  # they are not among the optimizer steps
    skipped = sum(row["actor/skipped_updates"] for row in (first, second))
    assert second["optimizer_steps"] + skipped == 4 and second["optimizer_steps"] > 0
    weights = [(path / "model/model.safetensors").read_bytes() for path in (whole, resumed)]
    assert weights[0] == weights[1]
    scaler = read_metadata(list_checkpoints(resumed)[0])["scaler"]
    assert scaler["scale"] == second["actor/loss_scale"] != first["actor/loss_scale"]


def test_a_run_in_float32_branches_off_into_fp16(start, tmp_path):
    """Its checkpoint has no scale."""
    run_dir = start("val.file=", "save_every=1", "total_training_steps=1").rename(tmp_path / "old")
    reset_accelerate()
    branch = start("val.file=", FP16, f"resume={run_dir}/checkpoints/step_00001")
    assert read_rows(branch)[-1]["actor/loss_scale"] == 2.0**16


def test_log_probs_and_gradients_in_half_precision_are_those_of_float32_up_to_rounding(make_state):
    results = {}
    for precision in ("no", "bf16", "fp16"):
        reset_accelerate()
        state, prompts = make_state(f"mixed_precision={precision}", "actor.grad_clip=1000000")
        if precision == "no":
            mini_batch = [replace(sample, old_logprobs=None)  # on-policy: no ratio near a bound
                          for sample in make_mini_batch(state, prompts)]
        logprobs = torch.cat(logprobs_of(state, state.policy, mini_batch))
        state.optimizer.zero_grad = lambda: None
        update_policy(state, mini_batch, step=1)
        results[precision] = logprobs, torch.cat([p.grad.flatten()
                                                  for p in state.policy.parameters()])
    expected = results.pop("no")
    for precision, limits in (("bf16", (5e-3, 3e-2)), ("fp16", (1e-3, 1e-2))):
        for value, other, limit in zip(results[precision], expected, limits, strict=True):
            assert 0 < (value - other).norm() < limit * other.norm(), precision


def test_the_fused_head_in_float16_is_float32s_also_at_the_scale_of_a_step():
    """Gradients of a large vocabulary, a million tokens to a step, under the scale of a new run."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 32), torch.randn(4096, 32) / 4
    tokens, results = torch.randint(4096, (64,)), []
    for dtype in (torch.float16, torch.float64):
        x, w = (value.half().to(dtype).requires_grad_() for value in (hidden, weight))
        logprobs, _ = fused_linear_logprobs(x, w, tokens)
        (logprobs.sum() * (2.0**16 / 1e6)).backward()
        results.append((logprobs.double(), x.grad.double(), w.grad.double()))
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() < 1e-3 * b.norm()


def test_a_head_that_fsdp2_has_made_a_class_of_its_own_is_a_plain_one():
    """FSDP2 does so in real processes in test_distributed.py; a class with another forward is not."""
    sharded = type("FSDPLinear", (FSDPModule, torch.nn.Linear), {})
    other = type("Other", (torch.nn.Linear,), {"forward": lambda self, x: x})
    assert is_plain_linear(torch.nn.Linear(2, 3))
    assert is_plain_linear(object.__new__(sharded))
    assert not is_plain_linear(other(2, 3)) and not is_plain_linear(torch.nn.Embedding(2, 3))


def test_the_sampler_computes_in_the_type_of_the_trainers_passes():
    for override, dtype in (("seed=0", "float32"), (FP16, "float16"),
                            ("mixed_precision=bf16", "bfloat16"),
                            ("model.dtype=bfloat16", "bfloat16")):
        assert compute_dtype(load_config("config.yaml", [override])) == dtype


@pytest.mark.slow
@pytest.mark.parametrize("launch", [["--config_file", "configs/accelerate_ddp.yaml"],
                                    ["--multi_gpu"]], ids=["ddp", "fsdp2"])
def test_an_overflow_on_one_rank_is_skipped_on_all(launch, tmp_path):
    """FSDP2: a gradient overflows in the shard of one rank only."""
    sharded = ["sharded"] if launch == ["--multi_gpu"] else []
    result = subprocess.run([*LAUNCH, *launch, "--num_processes", "2", WORKER, str(tmp_path / "o"),
                             "overflow", *sharded], cwd=ROOT, capture_output=True, text=True,
                            check=False, timeout=200)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("skipped [1, 0, 0] scales [65536.0, 32768.0, 32768.0]") == 2
