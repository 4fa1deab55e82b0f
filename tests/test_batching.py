"""infra/batching.py: mini-batches, micro-batches of equal work, and tensors worked out by hand."""

from dataclasses import replace
from itertools import groupby
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data_types import Sample
from infra.batching import collate, count_tokens, micro_batches
from sampling import mini_batches


def sample(prompt: int, response: int, **fields) -> Sample:
    """Of so many tokens; token ids count from 1."""
    fields = {"advantage": 1.0, **fields}
    return Sample(list(range(1, prompt + 1)), np.arange(1, response + 1, dtype=np.int32), **fields)


def random_samples() -> list[Sample]:
    rng = np.random.default_rng(0)
    return [sample(int(rng.integers(1, 9)), int(rng.integers(1, 90))) for _ in range(50)]


def flatten(parts: list) -> list:
    return [element for part in parts for element in part]


# ---- mini-batches ----

def orders(count: int, size: int, epochs: int = 1, seed: int = 0, step: int = 1,
           n: int = 1) -> list[list[int]]:
    """The mini-batches of a step with so many samples, here numbers, in groups of `n`."""
    config = SimpleNamespace(actor=SimpleNamespace(ppo_mini_batch_size=size, ppo_epochs=epochs),
                             rollout=SimpleNamespace(n=n), seed=seed)
    return mini_batches(range(count), config, step)


def test_mini_batches_hold_every_response_once_shuffled():
    batches = orders(512, 128)
    assert [len(batch) for batch in batches] == [128] * 4
    order = flatten(batches)
    assert sorted(order) == list(range(512)) and order != list(range(512))


def test_each_epoch_and_step_and_seed_has_an_order_of_its_own():
    found = orders(64, 64, epochs=2) + orders(64, 64, step=2) + orders(64, 64, seed=1)
    assert all(sorted(order) == list(range(64)) for order in found)
    assert len(set(map(tuple, found))) == 4
    assert orders(64, 64) == found[:1]


def test_a_remainder_is_spread_and_never_dropped():
    batches = orders(320, 128)
    assert [len(batch) for batch in batches] == [107, 107, 106]


@pytest.mark.parametrize("size, part", [(32, 16), (16, 16), (24, 8), (8, 8), (1, 1), (48, 16)])
def test_groups_stay_whole_if_the_size_of_a_mini_batch_allows(size, part):
    batches = orders(96, size, n=16)
    assert sorted(flatten(batches)) == list(range(96)) and len(batches) == -(-96 // size)
    for batch in batches:
        assert len(batch) == size
        for i in range(0, size, part):
            assert batch[i:i + part] == list(range(batch[i], batch[i] + part))
            assert batch[i] % part == 0  # the part begins where one of its group does
    assert flatten(batches) != list(range(96)) or part == 96


# ---- micro-batches ----

def indices(samples: list[Sample], batches: list[list[Sample]]) -> list[list[int]]:
    """Which of the samples are in each batch."""
    places = {id(sample): i for i, sample in enumerate(samples)}
    return [[places[id(sample)] for sample in batch] for batch in batches]


@pytest.mark.parametrize("packing", ["", "flash", "varlen"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_micro_batches_share_out_every_response_once_within_the_budget(world, packing):
    samples = random_samples()
    parts = [micro_batches(samples, 300, rank, world, packing) for rank in range(world)]
    batches = flatten(parts)
    assert sorted(flatten(indices(samples, batches))) == list(range(50))
    assert len({len(part) for part in parts}) == 1  # every rank takes part in every collective
    for batch in batches:
        lengths = list(map(len, batch))
        size = sum(lengths) if packing else len(lengths) * max(lengths, default=0)
        assert size <= 300
    if packing:  # and are few
        assert len(batches) <= -(-sum(map(len, samples)) // 300) + 2 * world


def test_a_rank_without_responses_gets_empty_batches():
    assert micro_batches([sample(1, 1)], 100, rank=1, world=2) == [[]]


def test_a_response_beyond_the_budget_has_a_batch_of_its_own():
    samples = [sample(1, 500), sample(1, 5)]
    assert indices(samples, micro_batches(samples, 100)) == [[0], [1]]


def test_packed_micro_batches_are_few_and_alike():
    samples = [sample(1, length - 1) for length in (60, 55, 5, 4)]
    assert indices(samples, micro_batches(samples, 120)) == [[0, 1], [2, 3]]
    for max_tokens, expected in [(124, [[0, 1, 2, 3]]), (123, [[0, 3], [1, 2]]),
                                 (61, [[0], [1], [2, 3]]),
                                 (50, [[0], [1], [2, 3]])]:  # two are beyond 50
        batches = micro_batches(samples, max_tokens, packing="flash")
        assert indices(samples, batches) == expected


def test_ranks_have_about_equal_work_and_the_same_number_of_micro_batches():
    lengths = np.random.default_rng(0).exponential(300, 500)
    samples = [sample(5, int(length)) for length in lengths]
    shares = [micro_batches(samples, 4000, rank, 8) for rank in range(8)]
    tokens = [sum(map(len, flatten(share))) for share in shares]
    assert max(tokens) < 1.01 * min(tokens)
    assert len({len(share) for share in shares}) == 1
    assert sorted(flatten(indices(samples, flatten(shares)))) == list(range(500))


def same_prompt(prompt: int, *responses: int) -> list[Sample]:
    """Samples that share a prompt."""
    ids = list(range(1, prompt + 1))
    return [replace(sample(prompt, response), prompt_ids=ids) for response in responses]


def test_samples_of_a_prompt_stay_together_and_count_it_once():
    samples = [*same_prompt(50, 10, 20, 15), *same_prompt(40, 5), *same_prompt(50, 10)]
    for max_tokens, expected in [
            (300, [[1, 2, 0, 4, 3]]),                  # 95 + 60 + 45
            (199, [[1, 2, 0], [4, 3]]),
            (94, [[1, 2], [0], [4], [3]])]:            # 85: with the third it would be 95
        batches = micro_batches(samples, max_tokens, packing="varlen")
        assert indices(samples, batches) == expected
        by_order = [samples[i] for i in (3, 1, 0, 4, 2)]
        again = micro_batches(by_order, max_tokens, packing="varlen")
        assert sorted(map(len, again)) == sorted(map(len, batches))


@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_ranks_share_out_few_large_groups(world):
    """Each has 500 tokens; a rank with two of them would have twice the work of the others."""
    samples = flatten([same_prompt(20, *[30] * 16) for _ in range(world + 1)])
    shares = [micro_batches(samples, 10_000, rank, world, "varlen") for rank in range(world)]
    assert sorted(flatten(indices(samples, flatten(shares)))) == list(range(len(samples)))
    tokens = [sum(count_tokens(list(same)) for batch in share for _, same in
                  groupby(batch, lambda one: id(one.prompt_ids))) for share in shares]
    assert max(tokens) <= 1.25 * 500 * (world + 1) / world


# ---- tensors ----

def test_collate_by_hand():
    batch = collate([sample(2, 1), sample(1, 3, in_loss=False)], pad_id=9)
    assert batch["input_ids"].tolist() == [[1, 2, 1, 9], [1, 1, 2, 3]]
    assert batch["tokens"].tolist() == [1, 1, 2, 3]
    assert batch["logit_positions"].tolist() == [1, 4, 5, 6]
    assert batch["flat_positions"].tolist() == [0, 3, 4, 5]
    assert batch["mask"].tolist() == [[True, False, False], [False, False, False]]
    assert batch["advantages"].shape == (2, 1)
    assert "old_logprobs" not in batch and batch["packing_kwargs"] == {}


def test_collate_packed_by_hand():
    batch = collate([sample(2, 1), sample(1, 3)], pad_id=9, packing="flash")
    assert batch["input_ids"].tolist() == [[1, 2, 1, 1, 1, 2, 3]]
    assert list(batch["packing_kwargs"]) == ["position_ids"]
    assert batch["packing_kwargs"]["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    assert batch["tokens"].tolist() == [1, 1, 2, 3]
    assert batch["logit_positions"].tolist() == [1, 3, 4, 5]
    assert batch["flat_positions"].tolist() == [0, 3, 4, 5]


def test_collate_by_hand_if_a_prompt_is_shared():
    rows = [*same_prompt(2, 1, 3), sample(1, 2), *same_prompt(2, 2)]
    batch = collate(rows, pad_id=9, packing="varlen")
    assert batch["input_ids"].tolist() == [[1, 2, 1, 1, 2, 3, 1, 1, 2, 1, 2, 1, 2]]
    assert batch["packing_kwargs"]["packed_families"] == ((2, (1, 3)), (3, ()), (4, ()))
    assert batch["packing_kwargs"]["position_ids"].tolist() == [[0, 1, 2, 2, 3, 4, 0, 1, 2,
                                                                 0, 1, 2, 3]]
    assert batch["tokens"].tolist() == [1, 1, 2, 3, 1, 2, 1, 2]
    # the first token of a response is predicted at the end of its prompt
    assert batch["logit_positions"].tolist() == [1, 1, 3, 4, 6, 7, 10, 11]
    assert batch["flat_positions"].tolist() == [0, 3, 4, 5, 6, 7, 9, 10]


def test_advantages_may_be_one_per_token():
    """In one batch with a response that has one for all of its tokens."""
    rows = [sample(2, 1), sample(1, 3, advantage=torch.tensor([0.5, -1.0, 2.0]))]
    for packing in ("", "flash", "varlen"):
        advantages = collate(rows, pad_id=9, packing=packing)["advantages"]
        assert advantages.tolist() == [[1.0, 0.0, 0.0], [0.5, -1.0, 2.0]]
        assert advantages.dtype == torch.float32


def test_the_eos_that_ended_a_response_is_trained_even_if_padding_is_the_same_token():
    rows = [Sample([5], np.array(ids, np.int32), 1.0) for ids in ([3, 0], [3, 4, 0])]
    assert collate(rows, pad_id=0)["mask"].tolist() == [[True, True, False], [True, True, True]]


def test_old_logprobs_are_in_the_batch_only_if_all_samples_have_them():
    known, unknown = sample(1, 2, old_logprobs=torch.tensor([-1.0, -2.0])), sample(1, 2)
    assert collate([known, known], 0)["old_logprobs"].tolist() == [[-1.0, -2.0]] * 2
    assert "old_logprobs" not in collate([known, unknown], 0)
