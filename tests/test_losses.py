"""losses.py against numbers worked out by hand, and the promises that implementations have broken before."""

import math

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    Qwen2Config,
)

import losses
from infra.packing import enable_packing, packing
from losses import (
    aggregate,
    group_advantages,
    fused_linear_logprobs,
    kl_penalty,
    policy_loss,
    response_logprobs,
    importance_weights,
    token_logprobs,
)
from sampling import Sample, collate

MODES = ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"]


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


# ---- advantages ----

def test_advantage_of_the_only_success_of_four_is_one_and_a_half():
    # mean 0.25; squared deviations 0.5625 + 3 * 0.0625 = 0.75; over n - 1 = 3: std 0.5; 0.75 / 0.5
    advantages = group_advantages(tensor([1, 0, 0, 0]), eps=0)
    assert advantages.tolist() == [[1.5, -0.5, -0.5, -0.5]]


def test_advantages_are_relative_to_their_own_group():
    # group 2: mean 3, std sqrt(2): -1 / 1.414..., 1 / 1.414...
    advantages = group_advantages(tensor([-1, 1], [2, 4]), eps=0)
    assert advantages == pytest.approx(tensor([-0.7071067811865475, 0.7071067811865475],
                                              [-0.7071067811865475, 0.7071067811865475]))


def test_without_std_the_advantage_is_the_difference_to_the_mean():
    assert group_advantages(tensor([1, 0, 0, 0]), norm_by_std=False).tolist() == [[0.75, -0.25, -0.25, -0.25]]


def test_equal_rewards_give_zero_not_nan():
    assert group_advantages(tensor([0.5, 0.5, 0.5])).tolist() == [[0, 0, 0]]


def test_eps_is_added_to_the_std():
    assert group_advantages(tensor([1, 0, 0, 0]), eps=1.0)[0, 0].item() == pytest.approx(0.75 / 1.5)


# ---- the clipped ratio ----

@pytest.mark.parametrize("ratio, advantage, expected", [
    (1.0, 2.0, -2.0),     # on-policy: -A
    (1.2, 1.0, -1.2),     # inside the range
    (1.5, 1.0, -1.28),    # clipped up at 1 + high
    (0.5, 1.0, -0.5),     # a good token that became rare is pulled back: no clip
    (1.5, -1.0, 1.5),     # a bad token that became frequent is pushed down: no clip
    (0.5, -1.0, 0.8),     # clipped down at 1 - low
])
def test_loss_of_a_token_by_hand(ratio, advantage, expected):
    loss, _ = policy_loss(tensor([math.log(ratio)]), tensor([0.0]), tensor([advantage]), tensor([1]), 0.2, 0.28)
    assert loss.item() == pytest.approx(expected)


def test_clip_higher_leaves_more_room_up_than_down():
    logprobs, mask = tensor([math.log(1.25), math.log(0.75)]), tensor([1, 1])
    loss, stats = policy_loss(logprobs, tensor([0, 0]), tensor([1, -1]), mask, 0.2, 0.28)
    assert loss[0].tolist() == pytest.approx([-1.25, 0.8])
    assert (stats["clip_frac_high"], stats["clip_frac_low"]) == (0, 1)


def test_dual_clip_acts_only_where_the_advantage_is_negative():
    logprobs = tensor([math.log(5.0), math.log(5.0)])
    loss, stats = policy_loss(logprobs, tensor([0, 0]), tensor([1, -1]), tensor([1, 1]), 0.2, 0.28, clip_ratio_c=3.0)
    assert loss[0].tolist() == pytest.approx([-1.28, 3.0])
    assert stats["clip_frac_dual"] == 1


def test_statistics_by_hand():
    ratios = [1.5, 1.5, 0.5, 1.0, 9.0]  # up-clipped, free, down-clipped, on-policy, masked
    old = tensor([math.log(0.2)] * 5)
    logprobs = old + tensor([math.log(r) for r in ratios])
    _, stats = policy_loss(logprobs, old, tensor([1, -1, -1, 1, 1]), tensor([1, 1, 1, 1, 0]), 0.2, 0.28)
    assert stats["ratio"] == pytest.approx(4.5)
    assert (stats["clip_frac_high"], stats["clip_frac_low"], stats["clip_frac_dual"]) == (1, 1, 0)
    assert stats["clip_up_prob"] == pytest.approx(0.3)
    assert stats["token_prob"] == pytest.approx(0.3 + 0.3 + 0.1 + 0.2)
    assert stats["kl"] == pytest.approx(-(2 * math.log(1.5) + math.log(0.5)))


def test_on_policy_the_ratio_is_exactly_one_and_nothing_is_clipped():
    logprobs = -torch.rand(4, 7) * 10
    _, stats = policy_loss(logprobs, logprobs, torch.randn(4, 1), torch.ones(4, 7), 0.2, 0.28, 3.0)
    assert stats["ratio"] == 28
    assert stats["clip_frac_high"] == stats["clip_frac_low"] == stats["clip_frac_dual"] == stats["kl"] == 0


def test_policy_loss_agrees_with_finite_differences():
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(3, 5, generator=generator, dtype=torch.float64)
    logprobs = (old + 0.5 * torch.randn(3, 5, generator=generator, dtype=torch.float64)).requires_grad_()
    advantages = torch.randn(3, 1, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])

    def scalar(x, mode):
        return aggregate(policy_loss(x, old, advantages, mask, 0.2, 0.28, 1.5)[0], mask, mode)
    for mode in MODES:
        assert torch.autograd.gradcheck(lambda x, mode=mode: scalar(x, mode), logprobs)


def test_no_gradient_flows_into_the_old_logprobs():
    old, new = tensor([0.0]).requires_grad_(), tensor([0.1]).requires_grad_()
    policy_loss(new, old, tensor([1.0]), tensor([1]), 0.2, 0.28)[0].sum().backward()
    assert old.grad is None and new.grad is not None


def test_arguments_stay_as_they_were():
    arguments = [torch.randn(2, 3), torch.randn(2, 3), torch.randn(2, 1), torch.tensor([[1, 1, 0], [1, 0, 0]])]
    copies = [argument.clone() for argument in arguments]
    aggregate(policy_loss(*arguments, 0.2, 0.28, 3.0)[0], arguments[3], "token-mean")
    assert all(torch.equal(a, b) for a, b in zip(arguments, copies, strict=True))


# ---- aggregation ----

LOSS, MASK = tensor([1, 2, 3, 4], [5, 6, 7, 8]), torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])


@pytest.mark.parametrize("mode, expected", [
    ("token-mean", (10 + 5) / 5), ("seq-mean-token-sum", (10 + 5) / 2), ("seq-mean-token-mean", (10 / 4 + 5) / 2)])
def test_aggregation_by_hand(mode, expected):
    assert aggregate(LOSS, MASK, mode).item() == pytest.approx(expected)


@pytest.mark.parametrize("mode", MODES)
def test_parts_add_up_to_the_whole_when_its_counts_are_handed_in(mode):
    whole = aggregate(LOSS, MASK, mode)
    parts = sum(aggregate(LOSS[i:i + 1], MASK[i:i + 1], mode, num_tokens=5, num_seqs=2) for i in range(2))
    assert parts.item() == pytest.approx(whole.item())


@pytest.mark.parametrize("mode", MODES)
def test_fully_masked_is_zero_with_zero_gradient_not_nan(mode):
    logprobs = tensor([1.0, torch.inf]).requires_grad_()
    loss, stats = policy_loss(logprobs, tensor([0.0, torch.nan]), tensor([1.0]), tensor([0, 0]), 0.2, 0.28)
    total = aggregate(loss, tensor([0, 0]), mode)
    total.backward()
    assert total == 0 and logprobs.grad.tolist() == [[0, 0]]
    assert all(value == 0 for value in stats.values())


@pytest.mark.parametrize("mode", MODES)
def test_what_stands_in_the_padding_has_no_effect(mode):
    a, b = LOSS.clone(), torch.where(MASK.bool(), LOSS, torch.inf)
    assert aggregate(a, MASK, mode) == aggregate(b, MASK, mode)


def test_a_response_without_trained_tokens_is_no_response():
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])
    assert aggregate(LOSS, mask, "seq-mean-token-mean").item() == pytest.approx(2.5)


def test_an_unknown_mode_is_named_with_the_legal_ones():
    with pytest.raises(ValueError, match="token_mean.*none of token-mean, seq-mean-token-sum, seq-mean-token-mean"):
        aggregate(LOSS, MASK, "token_mean")


# ---- KL ----

@pytest.mark.parametrize("kind, expected", [("k1", 0.5), ("k2", 0.125), ("k3", math.exp(-0.5) - 1 + 0.5)])
def test_kl_estimates_by_hand(kind, expected):
    assert kl_penalty(tensor([-1.0]), tensor([-1.5]), kind).item() == pytest.approx(expected)


def test_kl_estimates_meet_the_true_kl_on_average():
    p, q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)
    true = (p * (p / q).log()).sum()
    for kind in ("k1", "k3"):  # unbiased: the expectation over the policy's own tokens is the KL
        assert (p * kl_penalty(p.log(), q.log(), kind)).sum().item() == pytest.approx(true.item())


def test_an_unknown_kl_is_an_error():
    with pytest.raises(ValueError, match="k1, k2, k3"):
        kl_penalty(tensor([0.0]), tensor([0.0]), "k4")


# ---- log-probs and entropy ----

def test_logprobs_and_entropy_by_hand():
    logits = tensor([[math.log(1), math.log(3)], [0, 0]])  # probabilities 1/4, 3/4 and 1/2, 1/2
    logprobs, entropy = token_logprobs(logits, torch.tensor([[1, 0]]))
    assert logprobs[0].tolist() == pytest.approx([math.log(0.75), math.log(0.5)])
    assert entropy[0].tolist() == pytest.approx(
        [-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)), math.log(2)])


def test_temperature_divides_the_logits():
    logprobs, _ = token_logprobs(tensor([[0, 2 * math.log(3)]]), torch.tensor([[1]]), temperature=2.0)
    assert logprobs.item() == pytest.approx(math.log(0.75))


def test_chunks_change_neither_values_nor_gradients(monkeypatch):
    logits, tokens = torch.randn(3, 5, 11, dtype=torch.float64), torch.randint(11, (3, 5))
    results = []
    for chunk in (2**24, 22):  # all at once, and two tokens at a time
        monkeypatch.setattr(losses, "CHUNK_ELEMENTS", chunk)
        x = logits.clone().requires_grad_()
        logprobs, entropy = token_logprobs(x, tokens)
        (logprobs.sum() + entropy.square().sum()).backward()
        results.append((logprobs, entropy, x.grad))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*results, strict=True))


def test_the_entropy_of_a_large_vocabulary_is_never_in_one_piece():
    """2,000 tokens x 50,000: 400 MB a copy in float32; what is kept for the backward pass stays far below."""
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor
    logits = torch.zeros(1, 2000, 50_000, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        results = token_logprobs(logits, torch.zeros(1, 2000, dtype=torch.long))
    assert len(saved) and results[0].requires_grad
    assert sum(saved.values()) <= 1.1 * 2 * logits.numel()  # the bfloat16 logits themselves, and no float32 copy of them


# ---- log-probs from hidden states, without the logits ----

def head_case(dtype=torch.float64, n=13, h=6, v=11):
    torch.manual_seed(0)
    return torch.randn(n, h, dtype=dtype), torch.randn(v, h, dtype=dtype), torch.randint(v, (n,))


@pytest.mark.parametrize("chunk", [2**25, 22])  # all at once, and two tokens at a time
@pytest.mark.parametrize("with_entropy", [False, True])
def test_the_heads_logprobs_and_gradients_are_those_of_its_logits(monkeypatch, chunk, with_entropy):
    hidden, weight, tokens = head_case()
    grad_logprobs, grad_entropy = torch.randn(2, 13, dtype=torch.float64)
    results = []
    for fused in (True, False):
        monkeypatch.setattr(losses, "CHUNK_ELEMENTS", chunk if fused else 2**25)
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logprobs, entropy = fused_linear_logprobs(x, w, tokens, 0.7) if fused else (
            value.squeeze(0) for value in token_logprobs((x @ w.T)[None], tokens[None], 0.7))
        loss = (logprobs * grad_logprobs).sum()
        (loss + (entropy * grad_entropy).sum() if with_entropy else loss).backward()
        results.append((logprobs, entropy, x.grad, w.grad))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*results, strict=True))


def test_the_heads_gradients_are_finite_differences():
    hidden, weight, tokens = head_case(n=3, h=4, v=5)
    assert torch.autograd.gradcheck(lambda x, w: fused_linear_logprobs(x, w, tokens, 0.7), (hidden.requires_grad_(), weight.requires_grad_()))


def test_a_head_in_bfloat16_adds_up_in_float32():
    """Its gradients are as near to float64's as rounding once to bfloat16 allows, over 400 chunks' sum."""
    hidden, weight, tokens = (x.bfloat16() if x.is_floating_point() else x for x in head_case(n=400, h=32))
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        x, w = (value.clone().to(dtype).requires_grad_() for value in (hidden, weight))
        losses.CHUNK_ELEMENTS, before = 11, losses.CHUNK_ELEMENTS
        try:
            logprobs, entropy = fused_linear_logprobs(x, w, tokens)
            (logprobs.sum() + entropy.sum()).backward()
        finally:
            losses.CHUNK_ELEMENTS = before
        assert logprobs.dtype == entropy.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
        results.append((logprobs.double(), x.grad.double(), w.grad.double()))
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() < 0.01 * b.norm()


def test_the_heads_logits_are_never_whole():
    """1,000 tokens x 50,000 are 200 MB; nothing that is kept, and no tensor that is made on the way, is a fifth of it."""
    from torch.utils._python_dispatch import TorchDispatchMode
    largest = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    largest[0] = max(largest[0], tensor.untyped_storage().nbytes())
            return result
    hidden, weight, tokens = torch.randn(1000, 8, requires_grad=True), torch.randn(50_000, 8, requires_grad=True), torch.zeros(1000, dtype=torch.long)
    losses.CHUNK_ELEMENTS, before = 2**23, losses.CHUNK_ELEMENTS
    try:
        with Watch():
            logprobs, entropy = fused_linear_logprobs(hidden, weight, tokens)
            (logprobs.sum() + entropy.sum()).backward()
    finally:
        losses.CHUNK_ELEMENTS = before
    assert 0 < largest[0] < 40e6 and weight.grad.abs().max() > 0


SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": 0, "bos_token_id": 1}


@pytest.mark.parametrize(("config", "plain"), [
    (LlamaConfig(**SIZES), False), (Qwen2Config(**SIZES, tie_word_embeddings=True), False),
    (Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=5.0, sliding_window=8), True), (GraniteConfig(**SIZES, logits_scaling=4.0), True),
    (PhiConfig(**SIZES), True), (MistralConfig(**SIZES, sliding_window=6), False)], ids=lambda value: getattr(value, "model_type", None))
def test_whatever_the_model_does_to_its_logits_the_logprobs_are_those_of_each_response_alone(config, plain, monkeypatch):
    """Tied, untied, soft-capped, scaled, with a bias; padded and packed; sliding windows. And their gradients."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager" if config.model_type == "gemma2" else "sdpa").double().eval()
    rng, heads = np.random.default_rng(0), []
    samples = [Sample(rng.integers(1, 97, prompt).tolist(), rng.integers(1, 97, response).astype(np.int32), 1.0)
               for prompt, response in rng.integers(1, 20, (7, 2)).tolist()]

    def total(logprobs, entropy):
        return logprobs.square().sum() + entropy.sum()
    alone, gradients = [], []
    for sample in samples:
        ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids.tolist()]])
        logits = model(ids).logits[:, len(sample.prompt_ids) - 1:-1] / 0.7
        logprobs = torch.log_softmax(logits, -1)
        alone.append((logprobs.gather(-1, ids[:, len(sample.prompt_ids):, None]).squeeze(), -(logprobs.exp() * logprobs).sum(-1).squeeze()))
    sum(total(*pair) for pair in alone).backward()
    gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    whole = token_logprobs
    monkeypatch.setattr(losses, "token_logprobs", lambda logits, *rest: heads.append(logits.shape) or whole(logits, *rest))
    enable_packing(model)
    assert packing(model) == ("" if config.model_type in ("gemma2", "mistral") else "blocks")  # which have sliding windows
    for way in ("", "flash", packing(model)):  # "flash" without flash attention: transformers makes a mask
        model.zero_grad()
        logprobs, entropy = response_logprobs(model, collate(samples, 0, packing=way), 0.7)
        for row, more, pair in zip(logprobs, entropy, alone, strict=True):
            n = pair[0].numel()
            assert torch.allclose(row[:n], pair[0], atol=1e-9) and torch.allclose(more[:n], pair[1], atol=1e-9)
            assert not row[n:].any() and not more[n:].any()
        total(logprobs, entropy).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert max((gradients[0] - other).abs().max() for other in gradients[1:]) < (1e-5 if config.model_type == "gemma2" else 1e-9)  # its norms are in float32
    tokens = sum(len(sample.response_ids) for sample in samples)
    assert heads == ([(1, tokens, 97)] * 3 if plain else [])  # no prompt and no padding reaches the head


# ---- rollout correction ----

def test_rollout_weights_by_hand():
    old, sampled = torch.tensor([[0.5, 0.2, 0.9], [0.3, 0.3, 0.3]]).log(), torch.tensor([[0.25, 0.4, 0.1], [0.1, 0.3, 0.6]]).log()
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    tokens = importance_weights(old, sampled, mask, "token", cap=1.5)
    assert torch.allclose(tokens, torch.tensor([[1.5, 0.5, 1.0], [1.5, 1.0, 0.5]]))  # ratios 2, 1/2, masked; 3, 1, 1/2
    sequences = importance_weights(old, sampled, mask, "sequence", cap=1.2)
    assert torch.allclose(sequences, torch.tensor([[1.0], [1.2]]))  # products 1 and 3/2
    assert not importance_weights(old.requires_grad_(), sampled, mask).requires_grad
    with pytest.raises(ValueError, match="none of token, sequence"):
        importance_weights(old, sampled, mask, "word")


def test_rollout_weights_multiply_the_loss():
    logprobs, old = torch.randn(2, 3), torch.randn(2, 3)
    advantages, mask, weights = torch.randn(2, 1), torch.ones(2, 3), torch.rand(2, 1)
    plain, _ = policy_loss(logprobs, old, advantages, mask, 0.2, 0.28)
    weighted, _ = policy_loss(logprobs, old, advantages, mask, 0.2, 0.28, importance_weights=weights)
    assert torch.allclose(weighted, plain * weights)
