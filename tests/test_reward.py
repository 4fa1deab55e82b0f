"""reward.py against numbers worked out by hand, and against text that means harm."""

import json
import time
from pathlib import Path

import pytest

from reward import Score, judge, load_verifier, overlong_penalty, score_math

DATA = Path(__file__).parent.parent.parent / "shared/data"


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
])
def test_right_answers_however_they_are_written(response, truth):
    assert score_math(response, truth).acc == 1.0
    assert score_math(response, truth).score == 1.0


@pytest.mark.parametrize("response, truth", [
    ("Answer: 7", "6"), ("6", "6"), ("", "6"), ("Answer:", "6"), ("Answer: 6\nAnswer: 7", "6"), ("Answer: 66", "6"),
    ("Answer: -6", "6"), ("Answer: 6 or 7", "6"), ("Answer: 1,23", "123"), ("Answer: ", ""),
    ("Answer: 6" + "." * 400, "6"),  # out of the window of 300 characters
])
def test_wrong_answers_however_near(response, truth):
    assert score_math(response, truth) == Score(0.0, -1.0, score_math(response, truth).pred)


@pytest.mark.skipif(not DATA.is_dir(), reason="needs GSM8K and AIME 2024 in ../shared/data")
@pytest.mark.parametrize("name, answer", [("gsm8k_test", lambda r: r["answer"].split("#### ")[1]),
                                          ("aime24", lambda r: r["answer"])])
def test_real_answers_verify_against_themselves_and_not_against_their_neighbours(name, answer):
    answers = [answer(json.loads(line)) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    for truth, other in zip(answers, answers[1:] + answers[:1], strict=True):
        assert score_math(f"I think.\nAnswer: {truth}", truth).acc == 1
        assert score_math(f"Answer: ${truth}.00$", truth).acc == 1
        if float(truth.replace(",", "")) != float(other.replace(",", "")):
            assert score_math(f"Answer: {other}", truth).acc == 0


@pytest.mark.parametrize("text", [
    "Answer: " * 10**5, "Answer:" + " " * 10**6, "{" * 10**6, "Answer: 10**10**10", "Answer: " + "9" * 10**5,
    "Answer: \ud800", "Answer: \x00\x1b[2J", "Answer: ‮6", "\\frac{" * 10**4, "Answer: __import__('os')"])
def test_hostile_text_is_wrong_and_quick(text):
    start = time.perf_counter()
    assert score_math(text, "6").acc == 0
    assert time.perf_counter() - start < 0.05


# ---- verifiers of one's own ----

def write_verifier(tmp_path, body):
    path = tmp_path / "mine.py"
    path.write_text(f"def score(response, ground_truth, **row):\n    {body}\n")
    return load_verifier(f"{path}:score")


def test_a_number_becomes_a_score_and_the_row_is_there(tmp_path):
    verifier = write_verifier(tmp_path, "return row['bonus'] if response == ground_truth else 0")
    assert judge(verifier, "x", "x", {"bonus": 2}) == Score(acc=1.0, score=2.0)
    assert judge(verifier, "y", "x", {"bonus": 2}) == Score(acc=0.0, score=0.0)


def test_a_score_passes_as_it_is(tmp_path):
    verifier = write_verifier(tmp_path, "from reward import Score; return Score(0.5, 3.0, 'p')")
    assert judge(verifier, "", "", {}) == Score(0.5, 3.0, "p")


def test_numpy_numbers_become_plain_ones(tmp_path):
    verdict = judge(write_verifier(tmp_path, "import numpy; return numpy.float32(2)"), "", "", {})
    assert verdict == Score(1.0, 2.0) and type(verdict.score) is float


@pytest.mark.parametrize("body, message", [
    ("return float('nan')", "returned nan"), ("return float('inf')", "returned inf"), ("return None", "returned None: a number or a Score is expected"),
    ("from reward import Score; return Score(None, 1.0)", "returned Score.*a number or a Score"),
    ("raise KeyError('q')", "raised KeyError: 'q' at mine.py:2"), ("return 'high'", "returned 'high'")])
def test_a_verifier_that_fails_is_a_clear_error(tmp_path, body, message):
    with pytest.raises(ValueError, match=message):
        judge(write_verifier(tmp_path, body), "", "", {})


def test_a_verifier_that_does_not_take_the_row_is_told_to(tmp_path):
    (tmp_path / "mine.py").write_text("def score(response, ground_truth):\n    return 1\n")
    with pytest.raises(ValueError, match=r"unexpected keyword argument 'level' \(.*end its arguments with \*\*row\)"):
        judge(load_verifier(f"{tmp_path / 'mine.py'}:score"), "", "", {"level": 2})


@pytest.mark.parametrize("name", ["maths", "missing.py:score", "reward.py", "reward.py:nothing"])
def test_an_unknown_verifier_is_named(name):
    with pytest.raises(ValueError, match=r"reward\.name"):
        load_verifier(name)
