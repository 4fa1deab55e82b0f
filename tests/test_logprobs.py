"""infra/logprobs.py: log-probs and entropies, the fused head, the check of the weight sync."""

import math
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import mean_mismatch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (AutoModelForCausalLM, Gemma2Config, GraniteConfig, LlamaConfig,
                          MistralConfig, PhiConfig, Qwen2Config)

from data_types import Sample, SamplingParams
from infra import logprobs as logprobs_module
from infra.batching import collate
from infra.logprobs import (check_logprob_mismatch, check_weight_sync, fused_linear_logprobs,
                            response_logprobs, token_logprobs)
from infra.packing import enable_packing, packing_kind
from infra.precision import fp32_head
from rollout import generate


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


@pytest.fixture
def chunks_of(monkeypatch):
    """`chunks_of(elements)`: at most so many logits at a time."""
    return lambda elements: monkeypatch.setattr(logprobs_module, "CHUNK_ELEMENTS", elements)


def all_close(results: list[tuple], atol: float = 1e-12) -> bool:
    return all(torch.allclose(a, b, atol=atol) for a, b in zip(*results, strict=True))


# ---- from logits ----

def test_logprobs_and_entropy_by_hand():
    logits = tensor([[math.log(1), math.log(3)], [0, 0]])  # probabilities 1/4, 3/4 and 1/2, 1/2
    logprobs, entropy = token_logprobs(logits, torch.tensor([[1, 0]]))
    assert logprobs[0].tolist() == pytest.approx([math.log(0.75), math.log(0.5)])
    assert entropy[0].tolist() == pytest.approx(
        [-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)), math.log(2)])


def test_temperature_divides_the_logits():
    logits, tokens = tensor([[0, 2 * math.log(3)]]), torch.tensor([[1]])
    assert token_logprobs(logits, tokens, 2.0)[0].item() == pytest.approx(math.log(0.75))


def test_chunks_change_neither_values_nor_gradients(chunks_of):
    logits, tokens = torch.randn(3, 5, 11, dtype=torch.float64), torch.randint(11, (3, 5))
    results = []
    for elements in (2**24, 22):  # all at once, and two tokens at a time
        chunks_of(elements)
        x = logits.clone().requires_grad_()
        logprobs, entropy = token_logprobs(x, tokens)
        (logprobs.sum() + entropy.square().sum()).backward()
        results.append((logprobs, entropy, x.grad))
    assert all_close(results)


def test_the_entropy_of_a_large_vocabulary_is_never_in_one_piece(chunks_of):
    """500 tokens x 20,000: what is kept for the backward pass are the logits themselves, in
    bfloat16, and no float32 copy of them."""
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor
    chunks_of(2**20)
    logits = torch.zeros(1, 500, 20_000, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logprobs, _ = token_logprobs(logits, torch.zeros(1, 500, dtype=torch.long))
    assert saved and logprobs.requires_grad
    assert sum(saved.values()) <= 1.1 * 2 * logits.numel()


# ---- from hidden states, without the logits ----

def head_case(dtype=torch.float64, n=13, h=6, v=11):
    torch.manual_seed(0)
    hidden, weight = torch.randn(n, h, dtype=dtype), torch.randn(v, h, dtype=dtype)
    return hidden, weight, torch.randint(v, (n,))


@pytest.mark.parametrize("elements", [2**25, 22])  # all at once, and two tokens at a time
@pytest.mark.parametrize("with_entropy", [False, True])
def test_the_fused_heads_logprobs_and_gradients_are_those_of_its_logits(chunks_of, elements,
                                                                        with_entropy):
    hidden, weight, tokens = head_case()
    grad_logprobs, grad_entropy = torch.randn(2, 13, dtype=torch.float64)
    results = []
    for fused in (True, False):
        chunks_of(elements if fused else 2**25)
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if fused:
            logprobs, entropy = fused_linear_logprobs(x, w, tokens, 0.7)
        else:
            made = token_logprobs((x @ w.T)[None], tokens[None], 0.7)
            logprobs, entropy = (value.squeeze(0) for value in made)
        loss = (logprobs * grad_logprobs).sum()
        if with_entropy:
            loss = loss + (entropy * grad_entropy).sum()
        loss.backward()
        results.append((logprobs, entropy, x.grad, w.grad))
    assert all_close(results)


@pytest.mark.parametrize("with_entropy", [False, True])
def test_log_probs_that_stay_for_the_backward_pass_change_no_bit_and_save_a_product(
        chunks_of, monkeypatch, with_entropy):
    """Seven chunks of two tokens: none, three, or all of them stay; none without gradients."""
    chunks_of(22)
    hidden, weight, tokens = head_case()
    results, products = [], []

    def spy(a, b):
        products.append(b.shape)
        return a @ b
    monkeypatch.setattr(logprobs_module, "matmul_fp32", spy)
    for budget, expected in ((0, 14), (3 * 22, 11), (13 * 11, 7)):
        monkeypatch.setattr(logprobs_module, "kept_elements", lambda device, kept=budget: kept)
        products.clear()
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logprobs, entropy = fused_linear_logprobs(x, w, tokens, 0.7)
        loss = logprobs.square().sum() + with_entropy * entropy.sum()
        for _ in range(2):  # twice over the same graph
            x.grad = w.grad = None
            loss.backward(retain_graph=True)
        assert products.count((6, 11)) == expected + expected - 7
        results.append((logprobs, entropy, x.grad, w.grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    kept = []
    monkeypatch.setattr(logprobs_module.FusedLinearLogprobs, "apply",
                        lambda *args: kept.append(args))
    with torch.no_grad():
        fused_linear_logprobs(hidden, weight.requires_grad_(), tokens)
    assert kept[0][-1] == 0


def test_the_fused_heads_gradients_are_finite_differences():
    hidden, weight, tokens = head_case(n=3, h=4, v=5)
    assert torch.autograd.gradcheck(lambda x, w: fused_linear_logprobs(x, w, tokens, 0.7),
                                    (hidden.requires_grad_(), weight.requires_grad_()))


def test_a_head_in_bfloat16_sums_in_float32(chunks_of):
    """Its gradients are as near to float64's as rounding once to bfloat16 allows, over the sum of
    400 chunks."""
    chunks_of(11)
    hidden, weight, tokens = head_case(n=400, h=32)
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        x, w = (value.bfloat16().to(dtype).requires_grad_() for value in (hidden, weight))
        logprobs, entropy = fused_linear_logprobs(x, w, tokens)
        (logprobs.sum() + entropy.sum()).backward()
        wide = torch.float32 if dtype == torch.bfloat16 else dtype
        assert logprobs.dtype == entropy.dtype == wide
        results.append((logprobs.double(), x.grad.double(), w.grad.double()))
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() < 0.01 * b.norm()


def test_the_fused_heads_logits_are_never_whole(chunks_of):
    """500 tokens x 20,000 are 40 MB: no tensor that is kept or made on the way has a fifth."""
    largest = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    largest[0] = max(largest[0], tensor.untyped_storage().nbytes())
            return result
    hidden, weight = (torch.randn(rows, 8, requires_grad=True) for rows in (500, 20_000))
    tokens = torch.zeros(500, dtype=torch.long)
    chunks_of(2**20)
    with Watch():
        logprobs, entropy = fused_linear_logprobs(hidden, weight, tokens)
        (logprobs.sum() + entropy.sum()).backward()
    assert 0 < largest[0] < 8e6 and weight.grad.abs().max() > 0


# ---- through models ----

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
         "pad_token_id": 0, "eos_token_id": 0, "bos_token_id": 1}
MODELS = {  # a config, and whether the model's own code makes the logits
    "untied": (LlamaConfig(**SIZES), False),
    "tied": (Qwen2Config(**SIZES, tie_word_embeddings=True), False),
    "soft-capped": (Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=5.0,
                                 sliding_window=8), True),
    "scaled": (GraniteConfig(**SIZES, logits_scaling=4.0), True),
    "with a bias": (PhiConfig(**SIZES), True),
    "sliding window": (MistralConfig(**SIZES, sliding_window=6), False)}


def logprobs_alone(model, sample: Sample, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies of one response, by the textbook."""
    prompt_length = len(sample.prompt_ids)
    ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids.tolist()]])
    logits = model(ids).logits[0, prompt_length - 1:-1] / temperature
    logprobs = torch.log_softmax(logits, -1)
    chosen = logprobs.gather(-1, ids[0, prompt_length:, None]).squeeze(-1)
    return chosen, -(logprobs.exp() * logprobs).sum(-1)


def total_loss(logprobs: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
    return logprobs.square().sum() + entropy.sum()


def flat_gradient(model) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("name", MODELS)
def test_whatever_a_model_does_to_its_logits_logprobs_are_those_of_each_response_alone(
        name, monkeypatch):
    """Padded and packed, and their gradients too."""
    torch.manual_seed(0)
    config, by_the_model = MODELS[name]
    attention = "eager" if name == "soft-capped" else "sdpa"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).double().eval()
    rng, head_shapes = np.random.default_rng(0), []
    samples = [Sample(rng.integers(1, 97, prompt).tolist(),
                      rng.integers(1, 97, response).astype(np.int32), 1.0)
               for prompt, response in rng.integers(1, 20, (7, 2)).tolist()]
    alone = [logprobs_alone(model, sample, 0.7) for sample in samples]
    sum(total_loss(*pair) for pair in alone).backward()
    expected = flat_gradient(model)

    def spy(logits, *rest):
        head_shapes.append(logits.shape)
        return token_logprobs(logits, *rest)
    monkeypatch.setattr(logprobs_module, "token_logprobs", spy)
    enable_packing(model)
    sliding = name in ("soft-capped", "sliding window")
    assert packing_kind(model) == ("" if sliding else "varlen")
    tolerance = 1e-5 if name == "soft-capped" else 1e-9  # Gemma's norms are in float32
    # "flash" without flash attention: transformers makes a mask.
    for packing in ("", "flash", packing_kind(model)):
        model.zero_grad()
        logprobs, entropy = response_logprobs(model, collate(samples, 0, packing=packing), 0.7)
        for row, row_entropy, pair in zip(logprobs, entropy, alone, strict=True):
            n = len(pair[0])
            assert all_close([(row[:n], row_entropy[:n]), pair], atol=1e-9)
            assert not row[n:].any() and not row_entropy[n:].any()
        total_loss(logprobs, entropy).backward()
        assert (flat_gradient(model) - expected).abs().max() < tolerance
    tokens = sum(len(sample.response_ids) for sample in samples)
    # No prompt and no padding reaches the head.
    assert head_shapes == ([(1, tokens, 97)] * 3 if by_the_model else [])


@pytest.mark.parametrize("name", ["untied", "tied", "soft-capped", "with a bias"])
def test_in_bfloat16_sampler_and_trainer_agree_better_with_a_float32_head(name):
    """The sampler without its cache, on the same rows: the trainer's log-probs to 1e-5, and without
    the float32 head off by the rounding of its logits. Gradients stay those of bfloat16."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name][0]).eval()
    model.get_output_embeddings().weight.data.mul_(20)  # logits of the size that trained ones have
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    ids = torch.randint(1, 97, (20,))
    sample = Sample(ids[:5].tolist(), ids[5:].int().numpy(), 1.0)
    with autocast():
        trained = response_logprobs(model, collate([sample], 0))[0].squeeze(0)
    differences = []
    for context in (fp32_head(model, autocast), autocast()):
        with torch.no_grad(), context:
            sampled = model(ids[None]).logits[0, 4:-1].float().log_softmax(-1)
        sampled = sampled.gather(1, ids[5:, None]).squeeze(1)
        differences.append((sampled - trained).abs().mean().item())
    assert differences[0] < 1e-5 and differences[1] > 1e-3
    trained.sum().backward()
    weight = model.get_output_embeddings().weight
    assert weight.grad.isfinite().all() and weight.grad.abs().max() > 0
    assert "forward" not in vars(model.get_output_embeddings())


@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_the_samplers_head_is_in_float32_by_its_key_and_only_with_half_precision(precision,
                                                                                 make_state):
    differences = []
    for key in ("true", "false"):
        state, prompts = make_state(f"mixed_precision={precision}", f"rollout.fp32_head={key}")
        groups = generate(state, prompts[:8], SamplingParams(4, 32), "test", "test")
        ids = [prompt.token_ids for prompt in prompts[:8]]
        differences.append(mean_mismatch(state, ids, groups))
    if precision == "no":
        assert differences[0] == differences[1] < 1e-6
    else:
        assert 0 < differences[0] < 0.3 * differences[1]


# ---- do sampler and trainer agree? ----

@contextmanager
def changed_weights(policy, factor: float):
    """The policy as an engine has it that never received its weights."""
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(factor)
        yield
        for parameter in policy.parameters():
            parameter.div_(factor)


def test_an_engine_that_lacks_the_policys_weights_is_found_before_the_first_step(make_state):
    state, prompts = make_state()
    check_weight_sync(state, prompts, generate)

    def stale_generate(*args, **kwargs):
        with changed_weights(state.policy, 1.1):
            return state.engine.generate(*args, **kwargs)
    engine = replace(state.engine, generate=stale_generate, has_own_weights=True)
    stale = replace(state, engine=engine)
    with pytest.raises(ValueError, match="step 0: the log-probs of sampler and trainer differ by "
                                         ".* the rollout engine does not have the policy's"):
        check_weight_sync(stale, prompts, generate)


def test_a_mismatch_beyond_rounding_ends_the_run_if_the_engine_has_its_own_weights(make_state):
    state, _ = make_state()
    own = replace(state, engine=replace(state.engine, has_own_weights=True))
    check_logprob_mismatch(own, 3, 0.9e-3)
    check_logprob_mismatch(state, 3, 0.5)  # the policy itself: there is nothing to sync
    with pytest.raises(ValueError, match=r"step 3: .* differ by 0.0011 on average, more than .*"
                                         r"\(0.001\)"):
        check_logprob_mismatch(own, 3, 1.1e-3)
    own.config.mixed_precision = "bf16"
    check_logprob_mismatch(own, 3, 0.09)  # rounding of bfloat16
    own.config.rollout.top_p, own.config.mixed_precision = 0.9, "no"
    check_logprob_mismatch(own, 3, 0.5)  # another distribution by intention
