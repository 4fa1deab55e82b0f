"""sampling.py: the prompt stream, the group filter, mini- and micro-batches, tensors."""

import numpy as np
import pytest
import torch

from infra.data import Prompt
from reward import Score
from rollout import Response
from sampling import (
    Group,
    Sample,
    auto_batch_size,
    collate,
    draw_prompts,
    is_informative,
    make_rng,
    micro_batches,
    mini_batches,
)

PROMPTS = [Prompt(i, f"p{i}", [i], str(i), {}) for i in range(10)]


# ---- the stream ----

def test_each_epoch_has_every_prompt_once_and_an_order_of_its_own():
    drawn = [prompt.id for _, prompt in draw_prompts([(1, PROMPTS)], 0, 30, seed=1)]
    epochs = drawn[:10], drawn[10:20], drawn[20:]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_batch_across_the_end_of_an_epoch_neither_loses_nor_repeats_a_prompt():
    whole = draw_prompts([(1, PROMPTS)], 0, 24, seed=1)
    assert whole == [pair for at in range(0, 24, 8) for pair in draw_prompts([(1, PROMPTS)], at, 8, seed=1)]


def test_the_seed_determines_the_order():
    assert draw_prompts([(1, PROMPTS)], 5, 10, 1) == draw_prompts([(1, PROMPTS)], 5, 10, 1) != draw_prompts([(1, PROMPTS)], 5, 10, 2)


def test_a_mixture_gives_each_part_its_share_in_every_round_and_goes_through_each_evenly():
    other = [Prompt(100 + i, f"q{i}", [i], str(i), {}) for i in range(7)]
    ids = [prompt.id for _, prompt in draw_prompts([(3, PROMPTS), (2, other)], 0, 175, seed=1)]
    rounds = [sorted(id >= 100 for id in ids[at:at + 5]) for at in range(0, 175, 5)]
    assert rounds == [[False] * 3 + [True] * 2] * 35
    assert len({tuple(id >= 100 for id in ids[at:at + 5]) for at in range(0, 175, 5)}) > 3  # in shuffled order
    first, second = [id for id in ids if id < 100], [id for id in ids if id >= 100]
    assert all(sorted(first[at:at + 10]) == list(range(10)) for at in range(0, 100, 10))
    assert all(sorted(second[at:at + 7]) == list(range(100, 107)) for at in range(0, 70, 7))
    assert ids[50:60] == [prompt.id for _, prompt in draw_prompts([(3, PROMPTS), (2, other)], 50, 10, seed=1)]


def test_repeated_prompts_are_told_apart_by_their_position():
    same = [Prompt(i, "same", [1], "1", {}) for i in range(3)]
    assert len({position for position, _ in draw_prompts([(1, same)], 0, 9, 0)}) == 9


def test_a_random_stream_for_each_purpose():
    streams = [make_rng(0, "a", 1), make_rng(0, "a", 1), make_rng(0, "b", 1), make_rng(0, "a", 2), make_rng(1, "a", 1)]
    first = [rng.integers(2**62) for rng in streams]
    assert first[0] == first[1] and len(set(first)) == 4


# ---- the filter ----

@pytest.mark.parametrize("values, informative", [
    ([1, 0, 0, 0], True), ([0, 0, 0, 0], False), ([1, 1, 1, 1], False), ([0.1] * 6, False), ([0.1 + 0.2, 0.3], False),
    ([1, 1 + 1e-6], True), ([-1.0, -1.0 - 0.25], True)])
def test_a_group_is_informative_where_its_values_differ_by_more_than_rounding(values, informative):
    assert is_informative(values) is informative


def test_the_filter_looks_at_the_metric_that_is_named():
    response = Response(np.array([0], np.int32), np.array([0.0], np.float32), "", "stop")
    group = Group(0, PROMPTS[0], [response] * 2, [Score(0.0, -1.0), Score(0.0, -1.0)],
                  rewards=[-1.0, -1.5], final_rewards=[-1.25, -1.25])
    assert [is_informative(group.metric(name)) for name in ("acc", "score", "seq_reward", "seq_final_reward")] == [
        False, False, True, False]


def test_auto_batch_size_by_hand():
    assert auto_batch_size(32, 0, 0) == 32  # nothing is known yet
    assert auto_batch_size(10, 4, 9) == 25  # (10 + sqrt(10 / 2)) * 2 = 24.5
    assert auto_batch_size(1, 0, 3) == 8  # (1 + sqrt(3 / 4)) * 4 = 7.5


# ---- mini-batches and micro-batches ----

def sample(prompt, response, **fields):
    return Sample(list(range(1, prompt + 1)), np.arange(1, response + 1, dtype=np.int32), 1.0, **fields)


def test_mini_batches_hold_every_response_once_shuffled():
    batches = mini_batches(512, 128, make_rng(0, "x"))
    assert [len(b) for b in batches] == [128] * 4
    assert sorted(np.concatenate(batches)) == list(range(512))
    assert list(np.concatenate(batches)) != list(range(512))


def test_a_remainder_is_spread_and_never_dropped():
    assert [len(b) for b in mini_batches(320, 128, make_rng(0, "x"))] == [107, 107, 106]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_micro_batches_share_out_every_response_once_within_the_budget(world):
    rng = np.random.default_rng(0)
    samples = [sample(int(rng.integers(1, 9)), int(rng.integers(1, 90))) for _ in range(50)]
    parts = [micro_batches(samples, 300, rank, world) for rank in range(world)]
    assert sorted(i for part in parts for batch in part for i in batch) == list(range(50))
    assert len({len(part) for part in parts}) == 1  # every rank takes part in every collective
    for batch in (batch for part in parts for batch in part if len(batch) > 1):
        assert len(batch) * max(len(samples[i]) for i in batch) <= 300


def test_a_rank_without_responses_gets_empty_batches():
    assert micro_batches([sample(1, 1)], 100, rank=1, world=2) == [[]]


def test_a_response_beyond_the_budget_has_a_batch_of_its_own():
    assert micro_batches([sample(1, 500), sample(1, 5)], 100) == [[0], [1]]


def test_collate_by_hand():
    rows = [sample(2, 1), sample(1, 3, trains=False)]
    batch = collate(rows, pad_id=9)
    assert batch["input_ids"].tolist() == [[1, 2, 1, 9], [1, 1, 2, 3]]
    assert batch["tokens"].tolist() == [1, 1, 2, 3]
    assert batch["before"].tolist() == [1, 4, 5, 6]
    assert batch["places"].tolist() == [0, 3, 4, 5]
    assert batch["mask"].tolist() == [[True, False, False], [False, False, False]]
    assert batch["advantages"].shape == (2, 1) and "old_logprobs" not in batch and batch["packed"] == {}


def test_collate_packed_by_hand():
    batch = collate([sample(2, 1), sample(1, 3)], pad_id=9, packing="flash")
    assert batch["input_ids"].tolist() == [[1, 2, 1, 1, 1, 2, 3]]
    assert batch["packed"]["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3]] and len(batch["packed"]) == 1
    assert batch["tokens"].tolist() == [1, 1, 2, 3]
    assert batch["before"].tolist() == [1, 3, 4, 5]
    assert batch["places"].tolist() == [0, 3, 4, 5]


def test_packed_micro_batches_are_few_and_alike():
    samples = [sample(1, length - 1) for length in (60, 55, 5, 4)]
    assert micro_batches(samples, 120) == [[0, 1], [2, 3]]
    assert micro_batches(samples, 124, packed=True) == [[0, 1, 2, 3]]
    assert micro_batches(samples, 123, packed=True) == [[0, 3], [1, 2]]
    assert micro_batches(samples, 61, packed=True) == [[0], [1], [2, 3]]
    assert micro_batches(samples, 50, packed=True) == [[0], [1], [2, 3]]  # two are beyond the budget by themselves


@pytest.mark.parametrize("world", [1, 2, 3])
def test_packed_micro_batches_share_out_every_response_once_within_the_budget(world):
    rng = np.random.default_rng(0)
    samples = [sample(int(rng.integers(1, 9)), int(rng.integers(1, 90))) for _ in range(50)]
    parts = [micro_batches(samples, 300, rank, world, packed=True) for rank in range(world)]
    assert sorted(i for part in parts for batch in part for i in batch) == list(range(50))
    assert len({len(part) for part in parts}) == 1
    sizes = [sum(len(samples[i]) for i in batch) for part in parts for batch in part]
    assert max(sizes) <= 300 and len(sizes) <= -(-sum(map(len, samples)) // 300) + 2 * world


def test_the_eos_that_ended_a_response_trains_even_where_padding_is_the_same_token():
    batch = collate([Sample([5], np.array([3, 0], np.int32), 1.0), Sample([5], np.array([3, 4, 0], np.int32), 1.0)], pad_id=0)
    assert batch["mask"].tolist() == [[True, True, False], [True, True, True]]


def test_old_logprobs_are_there_only_where_all_have_them():
    old = torch.zeros(2)
    assert "old_logprobs" in collate([sample(1, 2, old_logprobs=old)] * 2, 0)
    assert "old_logprobs" not in collate([sample(1, 2, old_logprobs=old), sample(1, 2)], 0)


def test_ranks_have_alike_work_and_the_same_number_of_micro_batches():
    rng = np.random.default_rng(0)
    samples = [Sample([1] * 5, np.zeros(int(length), np.int32), 0.0) for length in rng.exponential(300, 500)]
    shares = [micro_batches(samples, 4000, rank, 8) for rank in range(8)]
    tokens = [sum(len(samples[i]) for batch in share for i in batch) for share in shares]
    assert max(tokens) < 1.01 * min(tokens)
    assert len({len(share) for share in shares}) == 1
    assert sorted(i for share in shares for batch in share for i in batch) == list(range(500))
