"""infra/packing.py: packed rows attend as if alone. Their log-probs are in test_logprobs.py."""

import inspect
from functools import lru_cache, wraps

import numpy as np
import pytest
import torch
from conftest import read_rows
from torch.nn.attention.varlen import varlen_attn
from transformers import AutoModelForCausalLM, Gemma3Config, LlamaConfig, MistralConfig

from data_types import Sample, SamplingParams
from infra import packing
from infra.batching import collate
from infra.logprobs import response_logprobs
from infra.packing import (PACKED_ATTENTION, block_sdpa, enable_packing, make_blocks,
                           packed_attention, packing_kind, varlen_works)
from infra.setup import copy_without_weights
from rollout import transformers_generate

SIZES = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 0, "pad_token_id": 0}


def make_llama(attention: str = "sdpa"):
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def test_blocks_by_hand():
    # 3 is three quarters of 4; 2 is less; 1 is less than three quarters of 2
    shapes, gather, scatter = make_blocks((4, 3, 3, 2, 2, 1), torch.device("cpu"))
    assert shapes == [(3, 4), (2, 2), (1, 1)]
    # whatever a padding is, nothing looks at it
    assert gather.tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 7, 8, 9, 0, 10, 11, 12, 13, 14]
    assert scatter.tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 12, 13, 14, 15, 16]
    assert make_blocks((2, 2, 1), torch.device("cpu")) == ([(2, 2), (1, 1)], None, None)


def test_sequences_of_any_order_attend_as_if_alone():
    torch.manual_seed(0)
    lengths = [3, 9, 1, 9, 7, 5, 8]
    packed = [torch.randn(1, heads, sum(lengths), 8, dtype=torch.float64) for heads in (4, 2, 2)]
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    together = block_sdpa(module, *packed, tuple(lengths), scaling=0.3)
    alone = []
    for parts in zip(*(x.split(lengths, dim=2) for x in packed), strict=True):
        alone.append(packed_attention(module, *parts, None, scaling=0.3)[0])
    assert torch.allclose(together, torch.cat(alone, dim=1), atol=1e-12)


def test_a_model_packs_only_if_all_layers_are_plainly_causal():
    for attention, expected in {"sdpa": "varlen", "eager": ""}.items():
        model = make_llama(attention)
        enable_packing(model)
        assert packing_kind(model) == expected
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    nested = Gemma3Config(text_config={**SIZES, "head_dim": 8, "sliding_window": 6},
                          vision_config=vision)  # its windows are in a config within
    for config in (MistralConfig(**SIZES, sliding_window=6), nested):
        sliding = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        enable_packing(sliding)
        assert packing_kind(sliding) == ""


def test_a_packing_model_generates_the_same_and_its_saved_config_does_not_name_it(tmp_path,
                                                                                   tokenizer):
    model, prompts, seeds = make_llama(), [[5, 6, 7, 8, 9], [5], [7, 8]], [(0,), (1,), (2,)]

    def generated() -> list[list[int]]:
        groups = transformers_generate(model, tokenizer, prompts, seeds, SamplingParams(4, 12))
        return [response.token_ids.tolist() for group in groups for response in group]
    before = generated()
    enable_packing(model)
    assert packing_kind(model) == "varlen" and generated() == before
    model.save_pretrained(tmp_path)
    assert PACKED_ATTENTION not in (tmp_path / "config.json").read_text()


def test_a_model_whose_packed_rows_are_wrong_is_trained_on_padded_ones(start, monkeypatch, capsys):
    calls = []

    @lru_cache
    def one_block(lengths, device):  # all tokens see all before, those of other responses too
        calls.append(1)
        return make_blocks((sum(lengths),), device)
    monkeypatch.setattr(packing, "make_blocks", one_block)
    # The reference model is trained on packed rows no more than the policy.
    run_dir = start("actor.use_kl_loss=true", "val.file=")
    assert "packed rows change this model's log-probs: it is trained on padded rows" in (
        capsys.readouterr().out)
    assert len(calls) == 1
    assert all(row["actor/mismatch_abs"] < 1e-5 for row in read_rows(run_dir))


def test_a_copy_that_generates_leaves_the_policy_packing(make_state):
    state, _ = make_state()
    copy = copy_without_weights(state.policy, state.config, state.accelerator.device)
    assert (packing_kind(state.policy), packing_kind(copy)) == ("varlen", "")


# ---- torch's kernel for packed rows --------------------------------------------------------------

def reference_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None,
                     scale=None, window_size=(-1, -1), enable_gqa=False, seqused_k=None,
                     block_table=None, num_splits=None):
    """What torch.nn.attention.varlen.varlen_attn computes, by its documentation, on any device.

    Stands in for that kernel alone, which wants a GPU: all that calls it is the real code.
    """
    for x, cu_seqlens, longest in ((query, cu_seq_q, max_q), (key, cu_seq_k, max_k)):
        assert cu_seqlens.dtype == torch.int32 and cu_seqlens[0] == 0 and cu_seqlens[-1] == len(x)
        assert longest == cu_seqlens.diff().max() and x.stride(-1) == 1
    assert key.shape == value.shape and query.dtype == key.dtype == value.dtype
    groups = query.shape[1] // key.shape[1]
    assert (groups == 1 or enable_gqa) and window_size == (-1, 0)  # causal
    outputs, inputs = [], (query, key, value)
    if query.dtype != torch.float64:
        inputs = (x.float() for x in inputs)
    for q, k, v in zip(*(x.tensor_split(cu_seq_q[1:-1].long()) for x in inputs), strict=True):
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))  # (T, heads, d)
        scores = torch.einsum("ihd,jhd->hij", q, k) * (scale or q.shape[-1] ** -0.5)
        later = torch.ones(len(q), len(q)).triu(1).bool()
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hij,jhd->ihd", weights, v))
    return torch.cat(outputs).to(query.dtype)


def varlen_of_torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None,
                         scale=None, window_size=(-1, -1)):
    """The same with the parameters that it has in torch 2.11, the oldest that is supported."""
    return reference_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale,
                            window_size=window_size, enable_gqa=True)


@pytest.fixture
def kernel(monkeypatch):
    """`kernel(function)` puts a function where torch's kernel is; returns the list of its calls'
    query shapes."""
    def put(function) -> list:
        @wraps(function)  # it has that signature
        def spy(query, *args, **kwargs):
            calls.append(tuple(query.shape))
            return function(query, *args, **kwargs)
        calls = []
        monkeypatch.setattr(packing, "varlen_attn", spy)
        varlen_works.cache_clear()
        return calls
    yield put
    varlen_works.cache_clear()


def test_the_stand_in_has_the_signature_of_torchs_kernel():
    def described(function) -> list:
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.kind, p.default) for p in parameters]
    assert described(varlen_attn) in map(described, (reference_varlen, varlen_of_torch_2_11))


SHAPES = ((4, 16), (2, 16), (2, 16))


def test_the_kernel_is_left_alone_where_it_does_not_run_as_on_a_cpu():
    varlen_works.cache_clear()
    assert not varlen_works(torch.device("cpu"), torch.bfloat16, SHAPES)


@wraps(reference_varlen)
def wrong_scale(*args, **kwargs):
    return reference_varlen(*args, **kwargs | {"scale": 1.3 * kwargs["scale"]})


@wraps(reference_varlen)
def wrong_gradient(query, key, *args, **kwargs):
    return reference_varlen(query, key.detach(), *args, **kwargs)


class Doubled(torch.autograd.Function):
    """The identity, whose gradient is twice as large."""
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


@wraps(reference_varlen)
def doubled_gradient(query, key, value, *args, **kwargs):
    return reference_varlen(query, key, Doubled.apply(value), *args, **kwargs)


@pytest.mark.parametrize(("function", "dtype", "works"), [
    (reference_varlen, torch.bfloat16, True), (reference_varlen, torch.float16, True),
    (reference_varlen, torch.float64, True), (wrong_scale, torch.bfloat16, False),
    (wrong_gradient, torch.bfloat16, False), (varlen_of_torch_2_11, torch.bfloat16, True),
    (doubled_gradient, torch.bfloat16, False),
    (lambda q, *args, **kwargs: q.fill_(torch.nan), torch.bfloat16, False)])
def test_the_kernel_is_used_only_if_output_and_gradients_are_those_of_sdpa(kernel, function, dtype,
                                                                           works):
    kernel(function)
    assert varlen_works(torch.device("cpu"), dtype, SHAPES) == works


def gradients_and_logprobs(model, samples, packing: str):
    model.zero_grad()
    logprobs, entropy = response_logprobs(model, collate(samples, 0, packing=packing), 0.7)
    (logprobs.sin() + entropy).sum().backward()
    return [logprobs.detach(), entropy.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_log_probs_and_gradients_by_the_kernel_are_those_of_blocks_and_of_padded_rows(
        kernel, monkeypatch, checkpointing):
    model, rng = make_llama().double(), np.random.default_rng(0)
    samples = [Sample(rng.integers(1, 40, prompt).tolist(),
                      rng.integers(1, 40, response).astype(np.int32), 1.0)
               for prompt, response in rng.integers(1, 20, (7, 2)).tolist()]
    padded = gradients_and_logprobs(model, samples, "")
    enable_packing(model)
    blocks = gradients_and_logprobs(model, samples, packing_kind(model))
    if checkpointing:
        model.train().gradient_checkpointing_enable()
    calls = kernel(reference_varlen)
    monkeypatch.setattr(packing, "block_sdpa", only_the_check(block_sdpa))
    by_kernel = gradients_and_logprobs(model, samples, packing_kind(model))
    tokens = sum(map(len, samples))
    # the check, then each of two layers once, or twice if it is computed again
    assert calls == [(145, 4, 8)] + [(tokens, 4, 8)] * (4 if checkpointing else 2)
    for one, other, third in zip(by_kernel, blocks, padded, strict=True):
        assert torch.allclose(one, other, atol=1e-10) and torch.allclose(one, third, atol=1e-10)


def only_the_check(function):
    """The function, which may be called once."""
    calls = []

    def once(*args, **kwargs):
        calls.append(1)
        assert len(calls) == 1
        return function(*args, **kwargs)
    return once


def test_the_kernel_gets_half_precision_under_autocast_though_the_weights_are_float32(kernel):
    """Rotary embeddings leave queries and keys in float32; autocast knows sdpa, not the kernel."""
    model, dtypes = make_llama(), []
    enable_packing(model)

    @wraps(reference_varlen)
    def spy(query, *args, **kwargs):
        dtypes.append(query.dtype)
        return reference_varlen(query, *args, **kwargs)
    kernel(spy)
    kwargs = packing.packing_kwargs([5, 3], "varlen", "cpu")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(input_ids=torch.arange(1, 9)[None], **kwargs)
    assert dtypes == [torch.bfloat16] * 3
