"""infra/metrics.py: statistics of losses reduced as declared, phases of a step, rollout files."""

import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import make_group
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from data_types import Prompt, Sample, Score, Stat, Update
from infra.distributed import show_progress, step_bar
from infra.memory import peak_memory
from infra.metrics import StepRecord, actor_metrics, mean, progress_text, rollout_metrics
from infra.rollout_files import rollout_records
from infra.setup import set_learning_rate
from infra.tokens import token_texts

MASK = torch.tensor([[True, True, False], [True, False, False]])
VALUES = torch.tensor([[1.0, 2.0, 99.0], [6.0, 99.0, 99.0]])
PROMPT = Prompt(0, "1+1?", [1], "2", {})


def make_record(*updates: list, saved: int = 0, grad_norm: float | None = 1.0) -> StepRecord:
    """The record of a step with these updates, of micro-batches (statistics, mask, samples)."""
    record = StepRecord(1, SimpleNamespace(save_rollouts=saved, save_token_stats=True))
    for micro_batches in updates:
        record.add_update(make_update(*micro_batches, grad_norm=grad_norm))
    return record


def make_update(*micro_batches: tuple, grad_norm: float | None = 1.0) -> Update:
    return Update(grad_norm, 7, [(samples[0] if samples else [], mask, stats)
                                 for stats, mask, *samples in micro_batches])


def reduced(*micro_batches: tuple[dict, torch.Tensor]) -> dict[str, float]:
    return make_record(micro_batches).reduce_stats(Accelerator(cpu=True))


# ---- statistics that losses return ----

@pytest.mark.parametrize("reduce, expected", [("mean", 3.0), ("sum", 9.0), ("max", 6.0)])
def test_a_statistic_is_reduced_over_the_tokens_in_the_loss_as_it_declares(reduce, expected):
    assert reduced(({"x": Stat(VALUES, reduce), "loss": Stat(VALUES)}, MASK))["x"] == expected


def test_a_mean_is_over_all_tokens_of_all_micro_batches():
    """Not the mean of their means: 3 tokens that sum to 9, then one of 1."""
    second = ({"x": Stat(torch.tensor([[1.0, 7.0]]))}, torch.tensor([[True, False]]))
    assert reduced(({"x": Stat(VALUES)}, MASK), second) == {"x": 10 / 4}


def test_a_maximum_is_that_of_all_micro_batches():
    first = {"x": Stat(VALUES, "max"), "loss": Stat(VALUES)}
    second = {"x": Stat(-VALUES, "max"), "loss": Stat(VALUES)}
    assert reduced((first, MASK), (second, MASK))["x"] == 6
    assert reduced((second, MASK), (first, MASK))["x"] == 6
    assert reduced((second, MASK))["x"] == -1


def test_a_mean_may_have_a_mask_of_its_own_within_that_of_the_loss():
    chosen = torch.tensor([[False, True, True], [True, False, True]])
    assert reduced(({"x": Stat(VALUES, mask=chosen)}, MASK)) == {"x": (2 + 6) / 2}


def test_a_value_per_response_counts_for_each_of_its_tokens():
    """As (B, 1): 10 for two tokens, 40 for one."""
    stats = {name: Stat(torch.tensor([[10.0], [40.0]]), name) for name in ("mean", "sum", "max")}
    assert reduced((stats, MASK)) == {"mean": 20, "sum": 60, "max": 40}


def test_a_truth_value_per_token_gives_the_share_of_tokens():
    assert reduced(({"x": Stat(VALUES > 1)}, MASK))["x"] == pytest.approx(2 / 3)


def test_a_scalar_is_a_part_of_a_sum_or_the_same_for_all_tokens_of_a_mean():
    part = {"sum": Stat(torch.tensor(0.25), "sum"), "mean": Stat(torch.tensor(4.0))}
    assert reduced((part, MASK), (part, MASK)) == {"sum": 0.5, "mean": 4}


def test_what_stands_in_the_padding_has_no_effect():
    values = torch.where(MASK, VALUES, torch.nan)
    assert reduced(({"x": Stat(values), "y": Stat(values, "max")}, MASK)) == {"x": 3, "y": 6}


def test_tokens_of_saved_responses_are_kept_as_they_were_trained_last():
    saved, other = make_group(0, PROMPT, [1, 0], length=2), make_group(1, PROMPT, [1], length=3)
    first, second = (Sample([1], response.token_ids, 0.0, key=(0, i))
                     for i, response in enumerate(saved.responses))
    unsaved = Sample([1], other.responses[0].token_ids, 0.0, key=(1, 0))
    record = make_record(saved=1)
    record.groups = [saved, other]
    stats = {"ratio": Stat(torch.tensor([[1.25, 0.123456, 9], [7, 7, 7]])), "own": Stat(VALUES),
             "approx_kl": Stat(VALUES), "loss": Stat(torch.tensor(1.0), "sum")}
    record.add_update(make_update((stats, torch.ones(2, 3, dtype=torch.bool), [first, unsaved])))
    assert record.gather_token_stats() == {
        (0, 0): {"update": 1, "flags": {}, "values": {"ratio": [1.25, 0.1235], "own": [1.0, 2.0]}}}
    stats = {"entropy": Stat(torch.tensor([[2.0], [3.0]])),  # one value for all tokens
             "clip_frac_low": Stat(torch.tensor([[False, True], [False, False]]))}
    record.add_update(make_update((stats, torch.tensor([[True, True], [False, False]]),
                                   [first, replace(second, in_loss=False)])))  # overlong filtering
    assert record.gather_token_stats() == {
        (0, 0): {"update": 2, "values": {"entropy": [2.0, 2.0]}, "flags": {"clip_frac_low": [1]}}}


def test_a_statistic_over_no_token_is_left_out():
    none = torch.zeros_like(MASK)
    stats = {"x": Stat(VALUES, mask=none), "y": Stat(VALUES, "max", none), "loss": Stat(VALUES)}
    assert reduced((stats, MASK)) == {"loss": 3}
    assert reduced((stats, none), (stats, MASK)) == {"loss": 3}


def test_an_unknown_reduction_is_named_with_the_legal_ones():
    with pytest.raises(ValueError, match="Stat x: reduce 'median' is none of mean, sum, max"):
        reduced(({"x": Stat(VALUES, "median")}, MASK))


def test_the_loss_is_a_mean_over_optimizer_steps():
    record = make_record()
    for loss in (1.0, 2.0):  # two mini-batches of two micro-batches each
        stats = {"loss": Stat(torch.tensor(loss / 2), "sum"), "x": Stat(VALUES)}
        record.add_update(make_update((stats, MASK), (stats, MASK), grad_norm=loss))
    record.add_update(None)  # a mini-batch without a sample in the loss
    assert record.trained_tokens == 2 * 7
    assert actor_metrics(Accelerator(cpu=True), record, lr=0.1) == {
        "actor/lr": 0.1, "actor/loss": 1.5, "actor/x": 3, "actor/grad_norm": 1.5,
        "actor/max_grad_norm": 2}


def test_without_an_update_there_are_no_statistics():
    assert actor_metrics(Accelerator(cpu=True), make_record(), lr=0.1) == {"actor/lr": 0.1}


# ---- rollouts ----

CONFIG = SimpleNamespace(overlong_buffer=SimpleNamespace(enable=True, len=4),
                         data=SimpleNamespace(max_response_length=10))


def test_rollout_metrics_by_hand():
    right, wrong = make_group(0, PROMPT, [1, 1], length=2), make_group(1, PROMPT, [0, 0], length=6)
    mixed = make_group(2, PROMPT, [1, 0], length=8, finish_reason="length")
    metrics = rollout_metrics(CONFIG, [right, wrong, mixed], [mixed], [mixed])
    assert metrics == pytest.approx({
        "reward/mean": 0, "reward/score": 0, "reward/timeouts": 0, "reward/errors": 0,
        "acc/before_filter": 1 / 2, "acc/after_filter": 1 / 2, "groups/all_correct": 1 / 3,
        "groups/all_wrong": 1 / 3, "groups/kept": 1 / 3, "groups/trained": 1,
        "responses/generated": 6, "responses/wasted": 4, "responses/wasted_tokens": 2 * 2 + 2 * 6,
        "responses/generated_per_trained": 3, "response_length/mean": 16 / 3,
        "response_length/max": 8, "response_length/truncated": 1 / 3,
        "response_length/penalised": 1 / 3})  # longer than 10 - 4


def test_a_reward_without_an_accuracy_has_no_metrics_of_one():
    group = make_group(0, PROMPT, [Score(None, 0.5), Score(None, 1.5)])
    metrics = rollout_metrics(CONFIG, [group], [group], [group])
    assert metrics["reward/score"] == 1
    assert not [name for name in metrics if name.startswith(("acc/", "groups/all_"))]
    assert "acc" not in progress_text(metrics, {})


def test_failures_of_reward_functions_are_counted_by_their_kind():
    scores = [Score(0.0, -1.0, status=status) for status in ("timeout", "error", "error", "ok")]
    metrics = rollout_metrics(CONFIG, [make_group(0, PROMPT, scores)], [], [])
    assert (metrics["reward/timeouts"], metrics["reward/errors"]) == (1, 2)


def test_a_rollout_file_has_all_that_belongs_to_a_response():
    score = Score(1.0, 2.0, "5", {"words": 3.0, "note": "\x1b[31mred"})
    group = make_group(7, Prompt(3, "2+3?", [1], "5", {}), [score, 0])
    first, second = map(json.loads, rollout_records(
        4, [group], [[0.5, torch.tensor([1.0, 2.0])]], {},
        {(7, 0): {"update": 1}}))
    assert first == {
        "step": 4, "position": 7, "prompt": "2+3?", "answer": "5", "response": "", "tokens": 3,
        "finish_reason": "stop", "pred": "5", "acc": 1.0, "score": 2.0, "reward": 2.0,
        "final_reward": 2.0, "advantage": 0.5, "status": "ok", "reward/words": 3.0,
        "reward/note": "\x1b[31mred", "dropped": None, "token_stats": {"update": 1}}
    assert second["advantage"] == [1.0, 2.0] and second["token_stats"] is None
    (dropped, _) = map(json.loads, rollout_records(4, [group], None, {7: "all correct"}, {}))
    assert dropped["advantage"] is None and dropped["dropped"] == "all correct"
    assert all(line.isascii() and line.count("\n") == 1 and "\x1b" not in line
               for line in rollout_records(4, [group], None, {}, {}))


def test_the_texts_of_tokens_join_to_the_text_whatever_the_policy_writes():
    """A character of several tokens comes with the last of them; bytes that are none do not stop
    the run."""
    backend = Tokenizer(models.BPE(byte_fallback=True, merges=[], unk_token="?", vocab={
        "?": 0, "a": 1, "▁b": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                         decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    smile = [3 + byte for byte in "☺".encode()]
    ids = np.array([1, 2, *smile, 2, 1])
    assert token_texts(tokenizer, ids) == ["a", " b", "", "", "☺", " b", "a"]
    for seed in range(20):
        ids = np.random.default_rng(seed).integers(0, 259, 50)
        assert len(token_texts(tokenizer, ids)) == 50


def test_the_mean_of_nothing_is_zero():
    assert mean([]) == 0 and mean([1, 2, 6]) == 3 and math.isclose(mean(iter([0.5])), 0.5)


# ---- the learning rate, progress, memory ---------------------------------------------------------

@pytest.mark.parametrize("schedule, expected", [
    ("constant", [0.5, 1, 1, 1, 1, 1]), ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
    ("cosine", [0.5, 1, 1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4])])
def test_the_learning_rate_rises_and_then_follows_its_schedule(schedule, expected):
    config = SimpleNamespace(total_training_steps=6, actor=SimpleNamespace(
        lr=3.0, lr_warmup_steps=2, lr_schedule=schedule))
    optimizer = torch.optim.AdamW([torch.zeros(1)])
    rates = []
    for step in range(1, 7):
        set_learning_rate(optimizer, config, step)
        rates.append(optimizer.param_groups[0]["lr"] / 3)
    assert rates == pytest.approx(expected)


def test_a_phase_shows_its_tokens_on_a_terminal_and_nothing_in_a_file(monkeypatch, capsys):
    batches = [[[0] * 3, [0] * 4], [], [[0] * 5]]
    for terminal in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal, raising=False)
        assert list(show_progress(Accelerator(cpu=True), batches, "update")) == batches
        shown = capsys.readouterr().err
        assert ("update" in shown and "/12.0 [" in shown) if terminal else not shown


def test_the_forecast_is_the_mean_of_all_steps():
    bar = step_bar(Accelerator(cpu=True), done=2, total=5)
    assert (list(bar), bar.initial, bar.total, bar.smoothing) == ([3, 4, 5], 2, 5, 0)


def test_the_peak_of_memory_counts_what_was_freed():
    before = peak_memory(torch.device("cpu"))
    torch.ones(2**27)  # 0.54 GB
    after = peak_memory(torch.device("cpu"))
    assert before < after and 0.5 < peak_memory(torch.device("cpu")) < 60
