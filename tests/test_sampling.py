"""sampling.py: the prompt stream, the group filter, mini- and micro-batches, tensors."""

import json

import numpy as np
import pytest
import torch

from reward import Score
from rollout import Response
from sampling import (
    Group,
    Prompt,
    Sample,
    auto_batch_size,
    collate,
    draw_prompts,
    is_informative,
    load_prompts,
    make_rng,
    micro_batches,
    mini_batches,
)

HOW = {"prompt_key": "prompt", "answer_key": "answer", "answer_regex": "", "prompt_template": "{prompt}",
       "apply_chat_template": True}
PROMPTS = [Prompt(i, f"p{i}", [i], str(i), {}) for i in range(10)]


def write(tmp_path, *lines):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


# ---- prompts ----

def test_template_and_answer_regex(tmp_path, tokenizer):
    path = write(tmp_path, {"q": "a1 b+2", "a": "so #### 3"})
    how = HOW | {"prompt_key": "q", "answer_key": "a", "answer_regex": "#### (.+)", "prompt_template": "{prompt}?"}
    (prompt,), overlong = load_prompts(path, tokenizer, 64, **how)
    assert (prompt.text, prompt.answer, prompt.row, overlong) == ("a1 b+2?", "3", {"q": "a1 b+2", "a": "so #### 3"}, 0)
    assert tokenizer.decode(prompt.token_ids) == "a1 b+2?"


def test_braces_in_the_task_are_left_alone(tmp_path, tokenizer):
    path = write(tmp_path, {"prompt": "{x} {prompt} {{", "answer": "1"})
    (prompt,), _ = load_prompts(path, tokenizer, 64, **HOW | {"prompt_template": "Q: {prompt}"})
    assert prompt.text.startswith("Q: {x} ") and prompt.text.endswith(" {{")


def test_the_chat_template_is_used_where_there_is_one(tmp_path, tokenizer):
    tokenizer.chat_template = "{% for m in messages %}a{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}?{% endif %}"
    try:
        path = write(tmp_path, {"prompt": "1", "answer": "1"})
        (with_template,), _ = load_prompts(path, tokenizer, 64, **HOW)
        (without,), _ = load_prompts(path, tokenizer, 64, **HOW | {"apply_chat_template": False})
    finally:
        tokenizer.chat_template = None
    assert (with_template.text, without.text) == ("a1?", "1")


def test_a_long_prompt_is_dropped_cut_or_an_error(tmp_path, tokenizer):
    path = write(tmp_path, {"prompt": "a1", "answer": "1"}, {"prompt": "a1 b+2 c+3", "answer": "6"})
    kept, overlong = load_prompts(path, tokenizer, 3, "drop", **HOW)
    assert ([p.text for p in kept], overlong) == (["a1"], 1)
    kept, _ = load_prompts(path, tokenizer, 3, "truncate_left", **HOW)
    assert tokenizer.decode(kept[1].token_ids) == " c+3"
    with pytest.raises(ValueError, match="data.jsonl:2: 8 tokens.*max_prompt_length=3"):
        load_prompts(path, tokenizer, 3, "error", **HOW)


def test_parquet_is_read_like_jsonl(tmp_path, tokenizer):
    from datasets import Dataset
    rows = [{"prompt": "a1", "answer": "1"}, {"prompt": "a2", "answer": "2"}]
    Dataset.from_list(rows).to_parquet(tmp_path / "data.parquet")
    prompts, _ = load_prompts(str(tmp_path / "data.parquet"), tokenizer, 64, **HOW)
    assert [p.row for p in prompts] == rows


@pytest.mark.parametrize("lines, message", [
    (['{"prompt": "a1", "answer": "1"}', '{"prompt": '], "data.jsonl:2: not valid JSON"),
    (["[1, 2]"], "data.jsonl:1: a JSON object is expected, found list"),
    ([{"prompt": "a1", "answer": "1"}, {"question": "a1"}], "data.jsonl:2: no 'prompt' .it has: question.*prompt_key"),
    ([{"prompt": "a1"}], "data.jsonl:1: no 'answer'.*answer_key"),
    ([{"prompt": "a1", "answer": None}], "data.jsonl:1: no 'answer'.*mend the row"),
    ([{"prompt": "", "answer": "1"}], "data.jsonl:1: no 'prompt'.*mend the row"),
    ([], "data.jsonl: no rows"),
    ([{"prompt": "a" + "1" * 99, "answer": "1"}], "all 1 prompts are longer than data.max_prompt_length=64"),
])
def test_a_bad_file_is_named_with_line_and_repair(tmp_path, tokenizer, lines, message):
    with pytest.raises(ValueError, match=message):
        load_prompts(write(tmp_path, *lines), tokenizer, 64, **HOW)


def test_an_answer_without_the_regex_is_named(tmp_path, tokenizer):
    path = write(tmp_path, {"prompt": "a1", "answer": "#### 1"}, {"prompt": "a1", "answer": "one"})
    with pytest.raises(ValueError, match="data.jsonl:2.*does not match"):
        load_prompts(path, tokenizer, 64, **HOW | {"answer_regex": "#### (.+)"})


def test_bytes_that_are_not_utf8_are_named(tmp_path, tokenizer):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "a1", "answer": "1"}\n{"prompt": "\xff", "answer": "1"}\n')
    with pytest.raises(ValueError, match="data.jsonl:2: not valid JSON"):
        load_prompts(str(path), tokenizer, 64, **HOW)


# ---- the stream ----

def test_each_epoch_has_every_prompt_once_and_an_order_of_its_own():
    drawn = [prompt.id for _, prompt in draw_prompts(PROMPTS, 0, 30, seed=1)]
    epochs = drawn[:10], drawn[10:20], drawn[20:]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_batch_across_the_end_of_an_epoch_neither_loses_nor_repeats_a_prompt():
    whole = draw_prompts(PROMPTS, 0, 24, seed=1)
    assert whole == [pair for at in range(0, 24, 8) for pair in draw_prompts(PROMPTS, at, 8, seed=1)]


def test_the_seed_determines_the_order():
    assert draw_prompts(PROMPTS, 5, 10, 1) == draw_prompts(PROMPTS, 5, 10, 1) != draw_prompts(PROMPTS, 5, 10, 2)


def test_repeated_prompts_are_told_apart_by_their_position():
    same = [Prompt(i, "same", [1], "1", {}) for i in range(3)]
    assert len({position for position, _ in draw_prompts(same, 0, 9, 0)}) == 9


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
