"""losses.py against numbers worked out by hand, and against what implementations got wrong."""

import math

import pytest
import torch

from losses import (LOG_RATIO_LIMIT, Stat, aggregate, group_advantages, importance_weights,
                    kl_penalty, policy_loss)

pytestmark = pytest.mark.dapo
MODES = ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"]


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def tokens_of(stat: Stat) -> list[float]:
    """A statistic's value for each token of the only response."""
    (row,) = stat.values.tolist()
    return row


# ---- advantages ----

def test_the_advantage_of_the_only_success_of_four_is_one_and_a_half():
    # mean 0.25; squared deviations 0.5625 + 3 * 0.0625 = 0.75; over n - 1 = 3: std 0.5; 0.75 / 0.5
    advantages = group_advantages(tensor([1, 0, 0, 0]), eps=0)
    assert advantages.tolist() == [[1.5, -0.5, -0.5, -0.5]]


def test_advantages_are_relative_to_their_own_group():
    # group 2: mean 3, std sqrt(2): -1 / 1.414..., 1 / 1.414...
    advantages = group_advantages(tensor([-1, 1], [2, 4]), eps=0)
    half = 0.7071067811865475
    assert advantages == pytest.approx(tensor([-half, half], [-half, half]))


def test_without_std_the_advantage_is_the_difference_to_the_mean():
    advantages = group_advantages(tensor([1, 0, 0, 0]), norm_by_std=False)
    assert advantages.tolist() == [[0.75, -0.25, -0.25, -0.25]]


def test_equal_rewards_give_zero_not_nan():
    assert group_advantages(tensor([0.5, 0.5, 0.5])).tolist() == [[0, 0, 0]]


def test_eps_is_added_to_the_std():
    advantages = group_advantages(tensor([1, 0, 0, 0]), eps=1.0)
    assert advantages[0, 0].item() == pytest.approx(0.75 / 1.5)


# ---- the clipped ratio ----

@pytest.mark.parametrize("ratio, advantage, expected", [
    (1.0, 2.0, -2.0),     # on-policy: -A
    (1.2, 1.0, -1.2),     # inside the range
    (1.5, 1.0, -1.28),    # clipped at 1 + high
    (0.5, 1.0, -0.5),     # a good token that became rare is pulled back: no clip
    (1.5, -1.0, 1.5),     # a bad token that became frequent is pushed down: no clip
    (0.5, -1.0, 0.8),     # clipped at 1 - low
])
def test_the_loss_of_a_token_by_hand(ratio, advantage, expected):
    loss, _ = policy_loss(tensor([math.log(ratio)]), tensor([0.0]), tensor([advantage]),
                          tensor([1]), 0.2, 0.28)
    assert loss.item() == pytest.approx(expected)


def test_clip_higher_leaves_more_room_up_than_down():
    logprobs = tensor([math.log(1.25), math.log(0.75)])
    loss, stats = policy_loss(logprobs, tensor([0, 0]), tensor([1, -1]), tensor([1, 1]), 0.2, 0.28)
    assert loss[0].tolist() == pytest.approx([-1.25, 0.8])
    assert tokens_of(stats["clip_frac_high"]) == [False, False]
    assert tokens_of(stats["clip_frac_low"]) == [False, True]


@pytest.mark.parametrize("high", [0.28, torch.tensor([[0.28], [0.28]], dtype=torch.float64),
                                  torch.full((2, 3), 0.28, dtype=torch.float64)])
@pytest.mark.parametrize("low", [0.2, torch.full((2, 1), 0.2, dtype=torch.float64)])
def test_bounds_of_the_clip_are_numbers_or_one_per_response_or_token(low, high):
    old, new = (torch.randn(2, 3, generator=torch.Generator().manual_seed(seed),
                            dtype=torch.float64) for seed in (0, 1))
    new.requires_grad_()
    advantages, mask = torch.tensor([[1.0], [-1.0]], dtype=torch.float64), torch.ones(2, 3)
    losses = [policy_loss(new, old, advantages, mask, *bounds)[0] for bounds in
              ((0.2, 0.28), (low, high))]
    gradients = [torch.autograd.grad(loss.sum(), new)[0] for loss in losses]
    assert torch.equal(*losses) and torch.equal(*gradients)


def test_each_token_has_its_own_bound():
    ratio = torch.tensor([[1.5, 1.5, 0.5]], dtype=torch.float64)
    high = torch.tensor([[0.1, 0.3, 0.9]], dtype=torch.float64)
    loss, stats = policy_loss(ratio.log(), torch.zeros(1, 3), torch.ones(1, 1), torch.ones(1, 3),
                              0.2, high)
    assert loss.tolist() == [pytest.approx([-1.1, -1.3, -0.5])]
    assert stats["clip_frac_high"].values.tolist() == [[True, True, False]]


def test_dual_clip_acts_only_if_the_advantage_is_negative():
    logprobs = tensor([math.log(5.0), math.log(5.0)])
    arguments = logprobs, tensor([0, 0]), tensor([1, -1]), tensor([1, 1]), 0.2, 0.28
    loss, stats = policy_loss(*arguments, clip_ratio_c=3.0)
    assert loss[0].tolist() == pytest.approx([-1.28, 3.0])
    assert tokens_of(stats["clip_frac_dual"]) == [False, True]
    for off in (None, 0.0):
        loss, stats = policy_loss(*arguments, clip_ratio_c=off)
        assert loss[0].tolist() == pytest.approx([-1.28, 5.0]) and "clip_frac_dual" not in stats


def test_statistics_by_hand():
    ratios = [1.5, 1.5, 0.5, 1.0]  # clipped high, free, clipped low, on-policy
    old = tensor([math.log(0.2)] * 4)
    logprobs = old + tensor([math.log(ratio) for ratio in ratios])
    _, stats = policy_loss(logprobs, old, tensor([1, -1, -1, 1]), tensor([1, 1, 1, 1]), 0.2, 0.28)
    assert tokens_of(stats["ratio"]) == pytest.approx(ratios)
    assert tokens_of(stats["clip_frac_high"]) == [True, False, False, False]
    assert tokens_of(stats["clip_frac_low"]) == [False, False, True, False]
    assert tokens_of(stats["token_prob"]) == pytest.approx([0.3, 0.3, 0.1, 0.2])
    assert tokens_of(stats["approx_kl"]) == pytest.approx(
        [-math.log(1.5), -math.log(1.5), math.log(2), 0])
    chosen = stats["clip_high_prob"]
    assert chosen.values[chosen.mask].tolist() == pytest.approx([0.3])
    assert all(stat.reduce == "mean" for stat in stats.values())


def test_on_policy_the_ratio_is_exactly_one_and_nothing_is_clipped():
    logprobs = -torch.rand(4, 7) * 10
    _, stats = policy_loss(logprobs, logprobs, torch.randn(4, 1), torch.ones(4, 7), 0.2, 0.28, 3.0)
    assert (stats["ratio"].values == 1).all() and not stats["approx_kl"].values.any()
    clipped = [name for name in stats if name.startswith("clip_frac")]
    assert len(clipped) == 3 and not any(stats[name].values.any() for name in clipped)


def test_policy_loss_agrees_with_finite_differences():
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(3, 5, generator=generator, dtype=torch.float64)
    noise = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    logprobs = (old + 0.5 * noise).requires_grad_()
    advantages = torch.randn(3, 1, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])

    def scalar(x, mode):
        loss, _ = policy_loss(x, old, advantages, mask, 0.2, 0.28, 1.5)
        return aggregate(loss, mask, mode)
    for mode in MODES:
        assert torch.autograd.gradcheck(lambda x, mode=mode: scalar(x, mode), logprobs)


def test_a_ratio_that_would_overflow_is_finite_and_has_no_gradient():
    logprobs = torch.tensor([[0.0, 0.0]]).requires_grad_()
    loss, stats = policy_loss(logprobs, torch.tensor([[-500.0, 500.0]]), torch.tensor([[-1.0]]),
                              torch.tensor([[1, 1]]), 0.2, 0.28)
    loss.sum().backward()
    assert loss.isfinite().all() and logprobs.grad.tolist() == [[0, 0]]
    assert tokens_of(stats["ratio"])[0] == pytest.approx(math.exp(LOG_RATIO_LIMIT))


def test_no_gradient_flows_into_the_old_logprobs():
    old, new = tensor([0.0]).requires_grad_(), tensor([0.1]).requires_grad_()
    policy_loss(new, old, tensor([1.0]), tensor([1]), 0.2, 0.28)[0].sum().backward()
    assert old.grad is None and new.grad is not None


def test_arguments_stay_as_they_were():
    arguments = [torch.randn(2, 3), torch.randn(2, 3), torch.randn(2, 1),
                 torch.tensor([[1, 1, 0], [1, 0, 0]])]
    copies = [argument.clone() for argument in arguments]
    aggregate(policy_loss(*arguments, 0.2, 0.28, 3.0)[0], arguments[3], "token-mean")
    assert all(torch.equal(a, b) for a, b in zip(arguments, copies, strict=True))


def test_no_gradient_flows_through_the_bounds_of_the_clip():
    """A range that follows the entropy would otherwise be an entropy bonus on clipped tokens."""
    logprobs = tensor([0.5, 0.0]).requires_grad_()
    entropy = tensor([1.0, 1.0]).requires_grad_()
    loss, _ = policy_loss(logprobs, tensor([0.0, 0.0]), tensor([1.0]), tensor([1, 1]),
                          0.1 * entropy, 0.28 * entropy)
    assert loss.tolist() == [[-1.28, -1.0]]
    loss.sum().backward()
    assert entropy.grad is None and logprobs.grad.tolist() == [[0.0, -1.0]]


def test_an_advantage_per_token_is_that_tokens():
    logprobs, old, mask = torch.randn(2, 3), torch.randn(2, 3), torch.ones(2, 3)
    advantages = torch.randn(2, 3)
    loss, _ = policy_loss(logprobs, old, advantages, mask, 0.2, 0.28)
    for t in range(3):
        column, _ = policy_loss(logprobs, old, advantages[:, t:t + 1], mask, 0.2, 0.28)
        assert torch.equal(loss[:, t], column[:, t])


# ---- aggregation ----

LOSS, MASK = tensor([1, 2, 3, 4], [5, 6, 7, 8]), torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])


@pytest.mark.parametrize("mode, expected", [
    ("token-mean", (10 + 5) / 5), ("seq-mean-token-sum", (10 + 5) / 2),
    ("seq-mean-token-mean", (10 / 4 + 5) / 2)])
def test_aggregation_by_hand(mode, expected):
    assert aggregate(LOSS, MASK, mode).item() == pytest.approx(expected)


@pytest.mark.parametrize("mode", MODES)
def test_parts_add_up_to_the_whole_when_its_counts_are_handed_in(mode):
    parts = [aggregate(LOSS[i:i + 1], MASK[i:i + 1], mode, num_tokens=5, num_seqs=2)
             for i in range(2)]
    assert sum(parts).item() == pytest.approx(aggregate(LOSS, MASK, mode).item())


@pytest.mark.parametrize("mode", MODES)
def test_fully_masked_is_zero_with_zero_gradient_not_nan(mode):
    logprobs, mask = tensor([1.0, torch.inf]).requires_grad_(), tensor([0, 0])
    loss, stats = policy_loss(logprobs, tensor([0.0, torch.nan]), tensor([1.0]), mask, 0.2, 0.28)
    total = aggregate(loss, mask, mode)
    total.backward()
    assert total == 0 and logprobs.grad.tolist() == [[0, 0]]
    assert all(stat.values.isfinite().all() for stat in stats.values())


@pytest.mark.parametrize("mode", MODES)
def test_what_stands_in_the_padding_has_no_effect(mode):
    padded = torch.where(MASK.bool(), LOSS, torch.inf)
    assert aggregate(LOSS, MASK, mode) == aggregate(padded, MASK, mode)


def test_a_response_without_trained_tokens_is_no_response():
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])
    assert aggregate(LOSS, mask, "seq-mean-token-mean").item() == pytest.approx(2.5)


def test_an_unknown_mode_is_named_with_the_legal_ones():
    with pytest.raises(ValueError, match="token_mean.*none of token-mean, seq-mean-token-sum, "
                                         "seq-mean-token-mean"):
        aggregate(LOSS, MASK, "token_mean")


# ---- KL ----

@pytest.mark.parametrize("kind, expected", [
    ("k1", 0.5), ("k2", 0.125), ("k3", math.exp(-0.5) - 1 + 0.5)])
def test_kl_estimates_by_hand(kind, expected):
    assert kl_penalty(tensor([-1.0]), tensor([-1.5]), kind).item() == pytest.approx(expected)


def test_kl_estimates_meet_the_true_kl_on_average():
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)
    true = (p * (p / q).log()).sum()
    for kind in ("k1", "k3"):  # unbiased: the expectation over the policy's own tokens is the KL
        mean = (p * kl_penalty(p.log(), q.log(), kind)).sum()
        assert mean.item() == pytest.approx(true.item())


def test_an_unknown_kl_is_an_error():
    with pytest.raises(ValueError, match="k1, k2, k3"):
        kl_penalty(tensor([0.0]), tensor([0.0]), "k4")


# ---- importance weights ----

def test_importance_weights_by_hand():
    old = torch.tensor([[0.5, 0.2, 0.9], [0.3, 0.3, 0.3]]).log()
    sampled = torch.tensor([[0.25, 0.4, 0.1], [0.1, 0.3, 0.6]]).log()
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    tokens = importance_weights(old, sampled, mask, "token", cap=1.5)
    # ratios 2, 1/2, masked; 3, 1, 1/2
    assert torch.allclose(tokens, torch.tensor([[1.5, 0.5, 1.0], [1.5, 1.0, 0.5]]))
    sequences = importance_weights(old, sampled, mask, "sequence", cap=1.2)
    assert torch.allclose(sequences, torch.tensor([[1.0], [1.2]]))  # products 1 and 3/2
    assert not importance_weights(old.requires_grad_(), sampled, mask).requires_grad
    with pytest.raises(ValueError, match="none of token, sequence"):
        importance_weights(old, sampled, mask, "word")


def test_importance_weights_multiply_the_loss():
    logprobs, old = torch.randn(2, 3), torch.randn(2, 3)
    advantages, mask, weights = torch.randn(2, 1), torch.ones(2, 3), torch.rand(2, 1)
    plain, _ = policy_loss(logprobs, old, advantages, mask, 0.2, 0.28)
    weighted, _ = policy_loss(logprobs, old, advantages, mask, 0.2, 0.28, weights=weights)
    assert torch.allclose(weighted, plain * weights)
