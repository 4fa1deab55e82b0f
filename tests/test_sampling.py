"""sampling.py: the prompt stream, groups and their metrics, the filter, advice on what is missing.

How the training loop fills its buffer is in test_train.py.
"""

from types import SimpleNamespace

import pytest
from conftest import make_group, make_response, make_score

import sampling
from data_types import Group, Prompt, Score
from infra.metrics import mean
from infra.rng import make_rng
from reward import failed_score
from sampling import (describe_filter, draw_prompts, drop_reason, generation_batch_size,
                      is_informative, keep_group, make_groups, prompt_at, score_responses,
                      select_groups, underfilled_message, update_counters)

PROMPTS = [Prompt(i, f"p{i}", [i], str(i), {}) for i in range(10)]


# ---- the stream ----

def ids_at(positions: range, seed: int = 1) -> list[int]:
    return [prompt_at(PROMPTS, position, seed).id for position in positions]


def test_each_epoch_has_every_prompt_once_and_an_order_of_its_own():
    drawn = ids_at(range(30))
    epochs = drawn[:10], drawn[10:20], drawn[20:]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_batch_across_the_end_of_an_epoch_neither_loses_nor_repeats_a_prompt():
    config, drawn, generated = settings(gen_batch_size=8, seed=1), [], []
    for _ in range(3):
        prompts = draw_prompts(PROMPTS, config, {"prompts_drawn": 5}, generated, kept=0)
        drawn += prompts
        generated += [make_group(prompt.position, prompt, [1, 0]) for prompt in prompts]
    assert [prompt.position for prompt in drawn] == list(range(5, 29))
    assert [prompt.id for prompt in drawn] == ids_at(range(5, 29))


def test_the_seed_determines_the_order():
    assert ids_at(range(5, 15)) == ids_at(range(5, 15))
    assert ids_at(range(5, 15)) != ids_at(range(5, 15), seed=2)


def test_a_random_stream_for_each_purpose():
    streams = [make_rng(0, "a", 1), make_rng(0, "a", 1), make_rng(0, "b", 1), make_rng(0, "a", 2),
               make_rng(1, "a", 1)]
    first = [rng.integers(2**62) for rng in streams]
    assert first[0] == first[1] and len(set(first)) == 4


def settings(train_batch_size=32, gen_batch_size="auto", seed=0, **overlong) -> SimpleNamespace:
    overlong = {"enable": False, "len": 4, "penalty_factor": 1.0, **overlong}
    return SimpleNamespace(
        seed=seed, data=SimpleNamespace(train_batch_size=train_batch_size, gen_batch_size=gen_batch_size,
                             max_response_length=10),
        filter_groups=SimpleNamespace(enable=True, metric="acc", at_limit="train"),
        overlong_buffer=SimpleNamespace(**overlong))


def ema(kept=0, generated=0):
    return {"ema_groups_kept": kept, "ema_groups_generated": generated}


@pytest.mark.parametrize("counters, kept, generated, expected", [
    (ema(), 0, 0, 32),          # nothing is known yet: all groups are kept
    (ema(5, 11), 22, 44, 25),   # 10 missing, share 28/56: (10 + sqrt(10 / 2)) * 2 = 24.5
    (ema(8, 59), 31, 100, 8),   # 1 missing, share 40/160: (1 + sqrt(3 / 4)) * 4 = 7.5
    (ema(0, 99), 0, 0, 128)     # at most four times train_batch_size
])
def test_an_automatic_generation_batch_by_hand(counters, kept, generated, expected):
    assert generation_batch_size(settings(), counters, kept, generated) == expected


def test_a_generation_batch_is_of_the_size_that_is_set():
    assert generation_batch_size(settings(gen_batch_size=7), ema(), 31, 31) == 7
    unfiltered = settings(gen_batch_size=7)
    unfiltered.filter_groups.enable = False
    assert generation_batch_size(unfiltered, ema(), 0, 0) == 32  # as many as train


# ---- groups ----

@pytest.mark.parametrize("length, penalty", [(6, 0), (7, -0.5), (8, -1), (10, -2), (11, -2)])
def test_a_reward_is_the_score_with_the_overlong_penalty(length, penalty):
    """The buffer starts at 10 - 4 = 6 tokens; the penalty is 2 at 10 tokens and beyond."""
    responses = [[make_response(3), make_response(length)]]
    scores = [[make_score(1), make_score(0)]]
    config = settings(enable=True, penalty_factor=2.0)
    (group,) = make_groups(config, PROMPTS[:1], responses, scores)
    assert group.rewards == group.final_rewards == [1, -1 + penalty]
    assert group.scores == scores[0] and group.prompt == PROMPTS[0]
    (plain,) = make_groups(settings(), PROMPTS[:1], responses, scores)
    assert plain.rewards == [1, -1]


@pytest.mark.parametrize("values, informative", [
    ([1, 0, 0, 0], True), ([0, 0, 0, 0], False), ([1, 1, 1, 1], False), ([0.1] * 6, False),
    ([0.1 + 0.2, 0.3], False), ([1, 1 + 1e-6], True), ([-1.0, -1.0 - 0.25], True)])
def test_a_group_is_informative_if_its_values_differ_by_more_than_rounding(values, informative):
    assert is_informative(values) is informative


@pytest.mark.parametrize("scores, lowest", [
    ([1.0, 0.0, None, 0.0], 0.0), ([1.0, -1.0, None, 1.0], -1.0), ([0.7, 0.3, None], 0.0),
    ([-3.0, -8.0, None], -8.0)])
def test_a_response_on_which_the_reward_function_fails_is_as_bad_as_the_worst(monkeypatch, scores,
                                                                              lowest):
    """A fixed value, such as -1, would make an all-wrong group of a 0/1 reward informative."""
    judged = [failed_score("timeout", "late") if score is None else Score(None, score)
              for score in scores]
    monkeypatch.setattr(sampling, "map_over_ranks", lambda *_: [judged])
    monkeypatch.setattr(sampling, "warn", lambda *_: None)
    state = SimpleNamespace(accelerator=None, scorer=None,
                            config=SimpleNamespace(reward=SimpleNamespace(timeout=1.0)))
    (found,) = score_responses(state, [Prompt(0, "", [1], "", {})],
                               [[make_response() for _ in scores]], "step 1")
    assert [score.score for score in found] == [lowest if s is None else s for s in scores]
    assert found[2].status == "timeout"


def keeps(group: Group, metric: str, enable: bool = True) -> bool:
    return keep_group(group, SimpleNamespace(enable=enable, metric=metric))


@pytest.mark.dapo
def test_the_filter_looks_at_the_metric_that_is_named():
    scores = [Score(0.0, -1.0), Score(0.0, -1.0)]
    group = Group(PROMPTS[0], [make_response()] * 2, scores, rewards=[-1.0, -1.5],
                  final_rewards=[-1.25, -1.25])
    kept = [keeps(group, metric) for metric in ("acc", "score", "seq_reward", "seq_final_reward")]
    assert kept == [False, False, True, False]
    assert keeps(group, "acc", enable=False)


def test_a_rule_of_ones_own_is_quoted_wherever_the_filter_is_described(monkeypatch):
    """One line in `DROP_RULES`: which groups enter, the words at the start, the advice."""
    monkeypatch.setitem(sampling.DROP_RULES, "its mean {metric} is above 0.6",
                        lambda group, metric: mean(group.metric(metric)) > 0.6)
    groups = [make_group(i, PROMPTS[i], scores) for i, scores in
              enumerate([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 1]])]
    filtering = SimpleNamespace(enable=True, metric="acc")
    assert [keep_group(group, filtering) for group in groups] == [False, True, False, False]
    assert [drop_reason(group, "acc") for group in groups[:3]] == [
        "its mean accuracy is above 0.6", "", "all of its responses have the same accuracy"]
    unstated = make_group(0, PROMPTS[0], [Score(None, 0.2), Score(None, 0.2)])
    assert drop_reason(unstated, "acc") == "all of its responses have the same score"
    assert describe_filter(filtering).endswith(  # a fork may have rules before this one
        ", or if its mean accuracy (score, if the reward function returns no accuracy) is above 0.6")
    assert message([1, 1, 1, 0], [1, 1, 0, 1], [0, 0], kept=[[1, 0]]).endswith(
        ": in 2 groups its mean accuracy is above 0.6: use other prompts, or change sampling.DROP_RULES")


@pytest.mark.dapo
def test_without_an_accuracy_the_filter_compares_scores():
    differ = make_group(0, PROMPTS[0], [Score(None, 0.2), Score(None, 0.7)])
    same = make_group(0, PROMPTS[0], [Score(None, 0.2), Score(None, 0.2)])
    assert keeps(differ, "acc") and not keeps(same, "acc")
    one_failed = make_group(0, PROMPTS[0], [Score(None, 0.2), Score(0.0, -1.0, status="error")])
    assert keeps(one_failed, "acc")


def test_a_short_answer_is_not_preferred():
    """Groups are trained in the order of the prompt stream, whatever their length."""
    kept = [make_group(i, PROMPTS[i], [1, 0], length=90 - 10 * i) for i in range(6)]
    assert [group.prompt.position for group in select_groups(kept, settings(4))] == [0, 1, 2, 3]


@pytest.mark.parametrize("at_limit, count", [("train", 2), ("skip", 0), ("error", 0)])
def test_with_too_few_groups_the_config_says_whether_they_are_trained(at_limit, count):
    kept, config = [make_group(i, PROMPTS[i], [1, 0]) for i in range(4)], settings(4)
    config.filter_groups.at_limit = at_limit
    assert len(select_groups(kept[:2], config)) == count
    assert select_groups(kept, config) == kept


# ---- after a step ----

def test_counters_by_hand_and_those_before_stay_as_they_were():
    groups = [make_group(position, PROMPTS[0], [1, 0]) for position in range(20, 28)]
    record = SimpleNamespace(step=3, generated=groups, grad_norms=[0.5, 0.5])
    before = {"step": 2, "optimizer_steps": 5, "prompts_drawn": 20, "consecutive_skips": 1,
              "ema_groups_kept": 3.0, "ema_groups_generated": 16.0}
    after = {"step": 3, "optimizer_steps": 7, "prompts_drawn": 28, "consecutive_skips": 0,
             "ema_groups_kept": 4.0, "ema_groups_generated": 12.0}
    assert update_counters(before, record, kept=5, trained=4) == after
    skipped = update_counters(before, record, kept=5, trained=0)
    assert skipped == after | {"consecutive_skips": 2} and before["consecutive_skips"] == 1


# ---- why a step has too few groups ----

ALL_RIGHT, ALL_WRONG = [1.0, 1.0], [0.0, 0.0]
UNPARSED = [Score(0.0, -1.0), Score(0.0, -1.0)]


def message(*groups, kept=(), metric: str = "acc", finish_reason: str = "stop") -> str:
    """For a step that generated groups of these scores, and kept those."""
    made = [make_group(i, PROMPTS[i], scores, finish_reason=finish_reason)
            for i, scores in enumerate([*kept, *groups])]
    record = SimpleNamespace(step=3, generated=made, gen_batches=2)
    return underfilled_message(record, made[:len(kept)], metric)


def test_groups_that_are_all_correct_ask_for_harder_prompts():
    assert message(ALL_RIGHT, ALL_RIGHT, ALL_RIGHT, ALL_WRONG, kept=[[1.0, 0.0]]) == (
        "step 3 kept 1 of 5 groups after 2 generation batches; 60% all-correct, 20% all-wrong, "
        "0% of responses without a parsed answer, 0% truncated: use harder prompts, or raise "
        "filter_groups.max_num_gen_batches")


def test_groups_that_are_all_wrong_ask_for_easier_prompts():
    text = message(ALL_WRONG, ALL_WRONG)
    assert "0% all-correct, 100% all-wrong, 0% of responses without a parsed answer" in text
    assert "use easier prompts, or raise" in text


def test_if_no_answer_is_parsed_the_form_of_the_answers_is_the_advice():
    text = message(UNPARSED, UNPARSED, UNPARSED, ALL_WRONG)
    assert "100% all-wrong, 75% of responses without a parsed answer" in text
    assert "data.prompt_template" in text and "reward.name" in text and "rollouts/" in text
    few = message(UNPARSED, ALL_WRONG, ALL_WRONG)
    assert "33% of responses without a parsed answer" in few and "use easier prompts" in few


def test_if_scores_differ_and_accuracy_does_not_the_message_says_so():
    shaped = [Score(1.0, 0.2, "1"), Score(1.0, 0.9, "1")]  # positive numbers are no accuracy
    text = message(shaped, shaped, ALL_RIGHT, kept=[[1.0, 0.0]])
    assert "scores differ in 2 groups in which accuracy does not" in text
    assert "filter_groups.metric=score" in text and "`acc`" in text and "prompts," not in text
    assert "differ in" not in message(shaped, metric="score")
    assert "differ in" not in message([1.0, 0.0])  # dropped by a filter of one's own


def test_if_the_reward_states_no_accuracy_the_message_says_that_scores_are_compared():
    same = [Score(None, 0.5), Score(None, 0.5)]
    text = message(same, same)
    assert "the reward function states no accuracy, so scores are compared" in text
    assert "all-correct" not in text and "let it return scores that differ" in text


def test_a_collapsed_policy_is_not_taken_for_hard_prompts():
    text = message(ALL_WRONG, UNPARSED, finish_reason="length")
    assert "100% truncated: raise data.max_response_length; if responses used to end" in text
