"""reward.py against numbers worked out by hand, and against text that means harm."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward import (
    TIMED_OUT,
    Score,
    judge,
    load_verifier,
    mean_columns,
    overlong_penalty,
    score_math,
    score_math_strict_box,
    score_math_verify,
    weighted_sum,
)

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared/data"


# ---- overlong shaping (equation 13) ----

@pytest.mark.parametrize("length, expected", [
    (0, 0.0), (16383, 0.0), (16384, 0.0), (17408, -0.25), (18432, -0.5), (20480, -1.0), (40000, -1.0)])
def test_penalty_at_the_papers_lengths(length, expected):
    assert overlong_penalty(length, 20480, 4096) == pytest.approx(expected)


def test_penalty_factor_scales_and_caps():
    assert overlong_penalty(18432, 20480, 4096, 3.0) == pytest.approx(-1.5)
    assert overlong_penalty(99999, 20480, 4096, 3.0) == pytest.approx(-3.0)


def test_a_buffer_of_the_whole_length_penalises_from_the_first_token():
    assert overlong_penalty(5, 10, 10) == pytest.approx(-0.5)


# ---- the verifier ----

@pytest.mark.parametrize("response, truth", [
    ("so it is six.\nAnswer: 6", "6"), ("ANSWER: 6", "6"), ("answer : 6", "6"), ("Answer:6", "6"),
    ("Answer: 5\nno, wait\nAnswer: 6", "6"), ("Answer: $6$", "6"), ("Answer: \\boxed{6}", "6"), ("**Answer: 6**", "6"),
    ("Answer: 1,234", "1234"), ("Answer: 1234.", "1234"), ("Answer: 1234.50", "1234.5"), ("Answer: $1,234", "1,234"),
    ("Answer: -0", "0"), ("Answer: 007", "7"), ("Answer: .5", "0.5"), ("Answer: +3", "3"), ("Answer: Yes", "yes"),
    ("**Answer:** 6", "6"), ("**Answer**: 6", "6"), ("Answer: x = 6", "6"), ("Answer: m + n = 6.", "6"), ("Answer: x = 6", "x=6"), ("Answer: \\(6\\)", "6"),
    ("Answer: 18 dollars", "18"), ("Answer: 18 eggs per day.", "18"), ("Answer: 12 cm^2", "12"), ("Answer: 12\\text{ cm}^2", "12"),
    ("Answer: 60 km/h", "60"), ("Answer: 90^\\circ", "90"), ("Answer: 90°", "90"), ("Answer: \\$18", "18"), ("Answer: €18", "18"),
    ("Answer: 1{,}234", "1234"), ("Answer: 1\\,234", "1234"), ("Answer: \N{MINUS SIGN}6", "-6"), ("Answer: - 6", "-6"),
    ("Answer: 20%", "20%"), ("Answer: 20 \\%", "20%"), ("Answer: 20 percent", "20%"), ("Answer: 20", "20%"), ("Answer: 20%", "20"),
    ("Answer: 3/4", "\\frac{3}{4}"), ("Answer: \\frac34", "3/4"), ("Answer: 6/8", "3/4"), ("Answer: 0.75", "3/4"), ("Answer: -\\dfrac{3}{4}", "-3/4"),
    ("Answer: \\boxed{\\frac{3}{4}}", "3/4"), ("Answer: 5\\frac{1}{2}", "5 1/2"), ("Answer: 5 1/2", "11/2"),
    ("Answer: (A)", "A"), ("Answer: A)", "(A)"), ("Answer: $\\textbf{(B)}$", "B"), ("Answer: (6)", "6"), ("Answer: \\dfrac{\\pi}{2}", "\\frac{\\pi}{2}"),
    ("Answer: x \\le 3", "x \\leq 3"), ("Answer:\n$$\n6\n$$", "6"), ("Answer:\n\\[\n6\n\\]", "6"), ("\\textbf{Answer:} 6", "6"),
    ("Answer\N{FULLWIDTH COLON} 6", "6"), ("Answer: 5 cm", "5 cm"), ("Answer: 5", "5 cm"), ("Answer: 3m", "3m"), ("Answer: 5cm.", "5 cm"), ("Answer: (1, 2)", "(1,2)"), ("Answer: x^2 + 1", "x^2+1"),
])
def test_right_answers_however_they_are_written(response, truth):
    assert score_math(response, truth).acc == 1.0
    assert score_math(response, truth).score == 1.0


@pytest.mark.parametrize("response, truth", [
    ("Answer: 7", "6"), ("6", "6"), ("", "6"), ("Answer:", "6"), ("Answer: 6\nAnswer: 7", "6"), ("Answer: 66", "6"),
    ("Answer: -6", "6"), ("Answer: 6 or 7", "6"), ("Answer: 1,23", "123"), ("Answer: ", ""),
    ("Answer: 6" + "." * 400, "6"),  # out of the window of 300 characters
    ("Answer: 48/2", "24"), ("Answer: 12/2", "6"),  # the last division is the policy's
    ("Answer: 6x", "6"), ("Answer: 6 x", "6"), ("Answer: 6!", "6"), ("Answer: 6^2", "6"), ("Answer: 6 million", "6"), ("Answer: 6th", "6"),
    ("Answer: 6 0", "60"), ("Answer: 5 1/2", "51/2"), ("Answer: 5\\frac12", "51/2"), ("Answer: 6-7", "6"), ("Answer: 6.5.1", "6.5"),
    ("Answer: x >= 6", "6"), ("Answer: 6e1", "60"), ("Answer: 9**9**9", "6"), ("Answer: 3/0", "3"), ("Answer: 3/0", "3/4"), ("Answer: 5 1/x", "3/4"), ("Answer: 3 /", "3/4"),
    ("Answer: 0", "2x - y = 0"), ("Answer: 1", "x^2+y^2=1"), ("Answer: 3", "x=2, y=3"), ("Answer: x=6 or x=5", "5"), ("Answer: 1=2=5", "5"),
    ("Answer: 1=5", "5"), ("Answer: 6 thousands", "6"), ("Answer: 6 seven", "6"), ("Answer: 11 in base two", "11"), ("Answer: 6M", "6"),
    ("Answer: 5 cm", "5 m"), ("Answer: 5 m^2", "5 m^3"), ("Answer: 5 minutes", "5 hours"), ("Answer: 20°F", "20°C"), ("Answer: 3", "3m"),
    ("Answer: 3", "3 xy"), ("Answer: 2", "2h"), ("Answer: 2**5", "25"), ("Answer: $2$$5$", "25"), ("Answer: 5\\(2", "52"),
    ("Answer: 1\\left0", "10"), ("Answer: 6:30", "6"), ("Answer: B", "A"), ("Answer: (1,2)", "(2,1)"), ("Answer: 6 and a half", "6"), ("Answer: 6 \\pi", "6"), ("\\boxed{6}", "6"), ("Answer: 66" * 100, "6" * 301),
])
def test_wrong_answers_however_near(response, truth):
    assert score_math(response, truth) == Score(0.0, -1.0, score_math(response, truth).pred)


@pytest.mark.parametrize("response, truth, right", [
    ("\\boxed{5} so \\boxed{6}", "6", True), ("\\boxed{\\frac{3}{4}} indeed", "3/4", True), ("\\boxed{6", "6", False), ("\\boxed{6} \\boxed{", "6", True), ("Answer: 6", "6", False),
    ("\\boxed{6}" + "." * 300, "6", False), ("\\boxed{6}\nAnswer: 7", "6", True), ("\\boxed{}", "", False)])
def test_the_strict_variant_looks_at_the_last_box_alone(response, truth, right):
    assert score_math_strict_box(response, truth).acc == right


@pytest.mark.parametrize("response, truth, right", [
    ("Answer: $\\frac{3}{4}$", "0.75", True), ("so \\boxed{x^2+1}", "1+x^2", True), ("Answer: $\\sqrt{8}$", "2\\sqrt{2}", True),
    ("Answer: \\(\\{1,2,3\\}\\)", "\\{3,2,1\\}", True), ("Answer: \\frac{1}{\\sqrt 2}", "\\frac{\\sqrt{2}}{2}", True), ("Answer: 1,234", "1234", True),
    ("Answer: $3+2\\sqrt{2}$", "2\\sqrt 2+3", True), ("Answer: $\\sqrt{8}$", "3", False), ("7", "7", False),
    ("Answer: $\\sum_{k=1}^{100} k^2$", "338350", False), ("Answer: $\\int_0^1 x^2 dx$", "1/3", False), ("Answer: $10!$", "3628800", False),
    ("Answer: $2+3$", "5", False), ("Answer: $2 \\cdot 3$", "6", False), ("Answer: $\\sqrt{9}$", "3", False), ("Answer: 12:60", "6:30", False),
    ("Answer: 1:5", "0.2", False), ("Answer: 1,2", "2,1", False), ("Answer: \ud800", "6", False), ("Answer: " + "(" * 200, "6", False), ("", "6", False)])
def test_math_verify_knows_what_is_the_same_in_other_words(response, truth, right):
    assert score_math_verify(response, truth).acc == right


def answers_of(name):
    """The reference answers of a data set; of a copy that was cut, without the last row."""
    lines = (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return [row["answer"].split("#### ")[1] if "####" in row["answer"] else row["answer"] for row in rows]


WAYS = ["Answer: {}", "I think.\nAnswer: ${}$", "**Answer:** {}.", "Answer: \\boxed{{{}}}", "Answer: ${}.00$", "answer: {} dollars",
        "Answer: {}%", "Answer: \\({}\\)", "Answer: x = {}", "Answer: **{}**", "Answer: 0\nAnswer: {} apples in all."]


@pytest.mark.skipif(not DATA.is_dir(), reason="needs GSM8K and AIME 2024 in ../shared/data")
@pytest.mark.parametrize("name, least", [("gsm8k_test", 1319), ("gsm8k_train", 7472), ("aime24", 30)])
def test_real_answers_verify_against_themselves_and_not_against_their_neighbours(name, least):
    answers = answers_of(name)
    assert len(answers) >= least
    plain = [answer.replace(",", "") for answer in answers]
    for truth, other, mine, others in zip(answers, answers[1:] + answers[:1], plain, plain[1:] + plain[:1], strict=True):
        for way in WAYS:
            assert score_math(way.format(truth), truth).acc == score_math(way.format(mine), truth).acc == 1, (way, truth)
            if float(mine) != float(others):
                assert score_math(way.format(other), truth).acc == 0, (way, other, truth)
        assert score_math_strict_box(f"so \\boxed{{{truth}}}", truth).acc == 1


# ---- text that means harm ----

NASTY = ["Answer: " * 10**5, "Answer:" + " " * 10**6, "{" * 10**6, "Answer: 10**10**10", "Answer: " + "9" * 10**5, "Answer: \ud800",
         "Answer: \x00\x1b[2J", "Answer: \N{RIGHT-TO-LEFT OVERRIDE}6", "\\frac{" * 10**4, "Answer: __import__('os')", "Answer: 9**9**9",
         "Answer: " + "\\frac{1}{" * 30, "Answer: " + "\\boxed{" * 40, "Answer: " + "\\text{" * 50 + "}" * 50, "\\boxed{" + "{" * 10**5,
         "Answer: " + "1," * 140, "Answer: " + "1,111" * 50, "Answer: 1/" + "0" * 290, "Answer: " + "=" * 290, "Answer: " + " a" * 140,
         "answer" + "*" * 290, "answer" + "\t" * 280 + ":", "Answer: " + "6 " * 140, "Answer: \u0666", "Answer: " + "." * 290,
         "Answer: " + "\\dfrac" * 40, "Answer: 6" + " of" * 90 + " 7", "Answer: 6\u2028Answer: 7", "Answer: {6}" + "%" * 200]
PIECES = ["Answer:", "answer :", "\n", "\\boxed{", "}", "{", "$", "\\$", "\\frac", "\\text{", "6", "7", "1,234", ".", "-", "/", "=", "%", " ", "^", "\\circ",
          "dollars", "and", "\x1b[31m", "\x00", "\ud800", "\N{RIGHT-TO-LEFT MARK}", "**", "\\", "9**9**9", "\r", "٦", "⁶", "∞", "nan", "1e999", "0x6", "5 1/", "\\frac12"]
SEEDS = ["so it is six.\nAnswer: 6", "**Answer:** $\\boxed{\\frac{3}{4}}$", "Answer: 1,234.50 dollars", "Answer: -0.75\\%", "\\boxed{12\\text{ cm}^2}"]
TRUTHS = ["6", "-1,234.5", "3/4", "20%", "\\frac{\\sqrt{3}}{2}", "yes", "\ud800", "9" * 301]


def assert_bounded(text, truths=TRUTHS):
    for truth in truths:
        for score in (score_math, score_math_strict_box):
            start = time.thread_time()
            verdict = score(text, truth)
            assert time.thread_time() - start < 0.05
            assert verdict == score(text, truth) and verdict.acc in (0.0, 1.0) and len(verdict.pred) < 1000


@pytest.mark.parametrize("text", NASTY)
def test_hostile_text_is_wrong_and_quick(text):
    assert_bounded(text)
    assert score_math(text, "6").acc == 0


@settings(max_examples=10_000, derandomize=True, deadline=None, database=None)
@given(st.sampled_from(["", *SEEDS]), st.lists(st.tuples(st.integers(0, 40), st.integers(0, 3), st.sampled_from(PIECES) | st.text(max_size=5)),
                                               max_size=12))
def test_10000_mutated_responses_raise_nothing_take_no_time_and_keep_their_verdicts(text, edits):
    for at, length, piece in edits:
        text = text[:at] + piece + text[at + length:]
    assert_bounded(text, ["6", "3/4"])


def test_verdicts_do_not_depend_on_the_process():
    code = ("import sys, json; sys.path[:0] = ['.', 'tests']; import test_reward as t\n"
            "print(json.dumps([str(t.score_math(text, truth)) for text in t.NASTY + t.SEEDS + t.PIECES for truth in t.TRUTHS]))")
    printed = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT,
                              env={"PYTHONHASHSEED": seed}).stdout for seed in "12"}
    assert len(printed) == 1 and len(json.loads(printed.pop())) > 500


# ---- verifiers of one's own ----

def write_verifier(tmp_path, body, arguments="response, ground_truth, **row"):
    path = tmp_path / "mine.py"
    path.write_text(f"def score({arguments}):\n    {body}\n")
    return load_verifier(f"{path}:score")


def test_a_number_becomes_a_score_and_the_row_is_there(tmp_path):
    verifier = write_verifier(tmp_path, "return row['bonus'] if response == ground_truth else 0")
    assert judge(verifier, ["x", "y"], "x", {"bonus": 2}) == [Score(acc=1.0, score=2.0), Score(acc=0.0, score=0.0)]


def test_a_score_passes_as_it_is(tmp_path):
    verifier = write_verifier(tmp_path, "from reward import Score; return Score(0.5, 3.0, 'p', {'c': 1.0})")
    assert judge(verifier, [""], "", {}) == [Score(0.5, 3.0, "p", {"c": 1.0})]


@pytest.mark.parametrize("verdict, score", [
    ("{'score': 2}", Score(1.0, 2.0)), ("{'score': 2, 'acc': False}", Score(0.0, 2.0)),
    ("{'score': -1, 'acc': 0, 'pred': 7, 'format': True, 'why': 'none'}", Score(0.0, -1.0, "7", {"format": 1.0, "why": "none"}))])
def test_a_dict_becomes_a_score_with_columns(tmp_path, verdict, score):
    assert judge(write_verifier(tmp_path, f"return {verdict}"), [""], "", {}) == [score]


def test_numpy_numbers_become_plain_ones(tmp_path):
    (verdict,) = judge(write_verifier(tmp_path, "import numpy; return numpy.float32(2)"), [""], "", {})
    assert verdict == Score(1.0, 2.0) and type(verdict.score) is float


def test_a_batched_verifier_gets_all_responses_to_a_prompt(tmp_path):
    verifier = write_verifier(tmp_path, "return [len(r) - max(map(len, responses)) + bonus for r in responses]",
                              "responses, ground_truth, bonus, **row")
    assert [s.score for s in judge(verifier, ["a", "bbb", ""], "", {"bonus": 10})] == [8.0, 10.0, 7.0]


def test_a_verifier_gets_the_columns_that_it_asks_for(tmp_path):
    verifier = write_verifier(tmp_path, "return level", "response, ground_truth, level=1")
    assert judge(verifier, [""], "", {"level": 3, "other": 4, "response": 5}) == [Score(1.0, 3.0)]
    assert judge(verifier, [""], "", {"ground_truth": 4}) == [Score(1.0, 1.0)]


@pytest.mark.parametrize("body, message", [
    ("return float('nan')", "returned score=nan"), ("return float('inf')", "returned score=inf"),
    ("return {'score': 1, 'c': float('nan')}", "returned c=nan"), ("return {'acc': 1}", "returned .'acc': 1.: a number, a dict with `score`"),
    ("return None", "returned None: a number, a dict with `score`, or a Score is expected"), ("return [1]", "returned .1.: a number"),
    ("from reward import Score; return Score(None, 1.0)", "returned Score.*a number"),
    ("raise KeyError('q')", "raised KeyError: 'q' at mine.py:2"), ("return 'high'", "returned 'high'")])
def test_a_verifier_that_fails_is_a_clear_error(tmp_path, body, message):
    with pytest.raises(ValueError, match=message):
        judge(write_verifier(tmp_path, body), [""], "", {})


@pytest.mark.parametrize("body", ["return 1", "return [1]", "return {'score': 1}", "return None"])
def test_a_batched_verifier_that_returns_something_else_is_told(tmp_path, body):
    with pytest.raises(ValueError, match="a list of 2 verdicts is expected of one whose first argument is `responses`"):
        judge(write_verifier(tmp_path, body, "responses, ground_truth"), ["", ""], "", {})


def test_a_verifier_may_call_its_arguments_what_it_likes(tmp_path):
    verifier = write_verifier(tmp_path, "return float(text == answer)", "text, answer, **row")
    assert judge(verifier, ["6"], "6", {"text": "5", "answer": "so 6"}) == [Score(1.0, 1.0)]


def test_a_verifiers_file_is_a_module_like_any_other(tmp_path):
    (tmp_path / "helper_of_mine.py").write_text("RIGHT = 3.0\n")
    (tmp_path / "mine.py").write_text("from __future__ import annotations\nfrom dataclasses import dataclass\nimport helper_of_mine\n"
                                      "@dataclass\nclass A:\n    x: int\ndef score(response, ground_truth):\n    return helper_of_mine.RIGHT\n")
    assert judge(load_verifier(f"{tmp_path / 'mine.py'}:score"), [""], "", {}) == [Score(1.0, 3.0)]


def test_a_column_that_the_data_lack_is_named(tmp_path):
    with pytest.raises(ValueError, match="wants a column 'level', which the data lack .they have: a, b.: give"):
        judge(write_verifier(tmp_path, "return 1", "response, ground_truth, level, *rest, c=2, **row"), [""], "", {"a": 1, "b": 2})


def test_several_are_weighed_and_each_is_a_column():
    scores = {"math": Score(1.0, 1.0, "6"), "style": Score(0.0, -3.0, "x", {"words": 4.0, "why": "long"})}
    assert weighted_sum(scores, [1.0, 0.5]) == Score(1.0, -0.5, "6", {"math": 1.0, "style": -3.0, "style/words": 4.0, "style/why": "long"})
    assert weighted_sum(scores | {"style": TIMED_OUT}, [1.0, 0.5]) == Score(0.0, -1.5, columns=TIMED_OUT.columns)


def test_columns_are_averaged_over_those_that_have_them():
    scores = [Score(1, 1, "", {"a": 1.0, "b": "x"}), Score(1, 1, "", {"a": 2.0, "c": 5.0}), Score(1, 1)]
    assert mean_columns(scores) == {"verdict/a": 1.5, "verdict/c": 5.0}


def test_the_toys_verifier_says_how_much_work_was_shown():
    (verdict,) = judge(load_verifier("toy"), [" b7*3=1\nAnswer: 6"], "6", {"prompt": "a7 b*3 c+5?", "level": 3})
    assert verdict == Score(1.0, 1.0, "6", {"work_shown": 0.5})


@pytest.mark.parametrize("name", ["maths", "missing.py:score", "reward.py", "reward.py:nothing"])
def test_an_unknown_verifier_is_named(name):
    with pytest.raises(ValueError, match=r"reward\.name"):
        load_verifier(name)
