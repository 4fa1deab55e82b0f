"""reward.py and infra/reward_function.py: scores worked out by hand, and hostile text."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_types import Score, Task
from infra.math_verify import score_math_verify
from infra.reward_function import load_reward_function, score_task
from reward import (
    failed_score,
    mean_extra,
    overlong_penalty,
    score_math,
    score_math_strict_box,
    weighted_sum,
)

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared/data"


# ---- overlong shaping (equation 13) ----


@pytest.mark.parametrize(
    "length, expected",
    [
        (0, 0.0),
        (16383, 0.0),
        (16384, 0.0),
        (17408, -0.25),
        (18432, -0.5),
        (20480, -1.0),
        (40000, -1.0),
    ],
)
def test_penalty_at_the_papers_lengths(length, expected):
    assert overlong_penalty(length, 20480, 4096) == pytest.approx(expected)


def test_penalty_factor_scales_and_caps():
    assert overlong_penalty(18432, 20480, 4096, 3.0) == pytest.approx(-1.5)
    assert overlong_penalty(99999, 20480, 4096, 3.0) == pytest.approx(-3.0)


def test_a_buffer_of_the_whole_length_penalises_from_the_first_token():
    assert overlong_penalty(5, 10, 10) == pytest.approx(-0.5)


# ---- the published rule ----


@pytest.mark.parametrize(
    "response, truth",
    [
        ("so it is six.\nAnswer: 6", "6"),
        ("ANSWER: 6", "6"),
        ("answer : 6", "6"),
        ("Answer:6", "6"),
        ("Answer:\n6", "6"),
        ("Answer: 5\nno, wait\nAnswer: 6", "6"),
        ("The answer: 6\nBye.", "6"),
        # what stands before the last equals sign goes; of dollar signs, the first pair counts
        ("Answer: x = 6", "6"),
        ("Answer: m + n = 6", "6"),
        ("Answer: 6", "x=6"),
        ("Answer: $6$", "6"),
        ("Answer: $6.$", "6"),
        ("Answer: $6$ apples", "6"),
        ("Answer: \\$18", "18"),
        ("Answer: $18", "18"),
        ("Answer: it is $6$ or $7$", "6"),
        # words and units of the table, articles, spaces
        ("Answer: 18 dollars", "18"),
        ("Answer: 12 cm", "12"),
        ("Answer: 12\\text{ cm}^2", "12"),
        ("Answer: 5\\text{ m}", "5"),
        ("Answer: 5 cm", "5 km"),
        ("Answer: 60 mph", "60"),
        ("Answer: 90^\\circ", "90"),
        ("Answer: 90^{\\circ}", "90"),
        ("Answer: 90 degrees", "90"),
        ("Answer: 6 square feet", "6"),
        ("Answer: 3\\mathrm{th}", "3"),
        ("Answer: an oak", "oak"),
        ("Answer: (1, 2)", "(1,2)"),
        ("Answer: x^2 + 1", "x^2+1"),
        ("Answer: 6 0", "60"),
        ("Answer: x, \\text{and} y", "x,y"),
        ('Answer: "yes"', "yes"),
        # LaTeX around an answer, and its shorthand
        ("Answer: \\boxed{6}", "6"),
        ("Answer: $\\boxed{\\frac{3}{4}}$", "\\frac{3}{4}"),
        ("Answer: \\text{Yes}", "Yes"),
        ("Answer: \\mbox{Yes}", "Yes"),
        ("Answer: \\textbf{B}", "B"),
        ("Answer: \\overline{AB}", "AB"),
        ("Answer: \\frac34", "\\frac{3}{4}"),
        ("Answer: \\sqrt2", "\\sqrt{2}"),
        ("Answer: \\frac12x", "\\frac{1}{2}x"),
        # thousands, in digits alone: 1,2 is 12
        ("Answer: 1,234", "1234"),
        ("Answer: 1{,}234", "1234"),
        ("Answer: 1,\\!234", "1234"),
        ("Answer: 1,23", "123"),
        ("Answer: 1,2", "12"),
        ("Answer: 1234", "1,234"),
    ],
)
def test_what_the_published_rule_calls_right(response, truth):
    pred = score_math("Answer: " + truth, truth).pred
    assert score_math(response, truth) == Score(1.0, 1.0, pred)


@pytest.mark.parametrize(
    "response, truth",
    [
        ("Answer: 7", "6"),
        ("6", "6"),
        ("", "6"),
        ("Answer: 6\nAnswer: 7", "6"),
        ("Answer: 66", "6"),
        ("Answer: -6", "6"),
        ("Answer: 6 or 7", "6"),
        ("Answer: 6x", "6"),
        ("Answer: 6!", "6"),
        ("Answer: 6^2", "6"),
        ("Answer: 48/2", "24"),
        ("Answer: 2+3", "5"),
        ("Answer: 9**9**9", "6"),
        ("Answer: 3", "x=2, y=4"),
        ("Answer: B", "A"),
        ("Answer: (1,2)", "(2,1)"),
        ("\\boxed{6}", "6"),
        ("Answer: 6" + "." * 300, "6"),  # outside the last 300 characters
        # one number, written in two ways
        ("Answer: 6.0", "6"),
        ("Answer: 06", "6"),
        ("Answer: +6", "6"),
        ("Answer: .5", "0.5"),
        ("Answer: \N{MINUS SIGN}6", "-6"),
        ("Answer: 3/4", "\\frac{3}{4}"),
        ("Answer: 0.75", "3/4"),
        ("Answer: \\dfrac{3}{4}", "\\frac{3}{4}"),
        ("Answer: -1,234", "-1234"),
        ("Answer: 20%", "20"),
        # marks and words that the tables lack; upper case; two full stops
        ("**Answer:** 6", "6"),
        ("**Answer: 6**", "6"),
        ("Answer: \\(6\\)", "6"),
        ("Answer: (A)", "A"),
        ("Answer: 18 eggs", "18"),
        ("Answer: 6 million", "6"),
        ("Answer: 90°", "90"),
        ("Answer: 5 m", "5 km"),
        ("Answer: yes", "Yes"),
        ("Answer: x \\le 3", "x \\leq 3"),
        ("Answer\N{FULLWIDTH COLON} 6", "6"),
        ("Answer:\nAnswer: 6", "6"),
        ("Answer: 6..", "6"),
        ("Answer: a pizza ", "pizza"),  # "a " goes wherever it stands: pizz
    ],
)
def test_what_the_published_rule_does_not_forgive(response, truth):
    assert score_math(response, truth) == Score(0.0, -1.0, score_math(response, truth).pred)


@pytest.mark.parametrize(
    "response, truth, score",
    [
        ("Answer: 6.", "6", Score(1.0, 1.0, "6")),
        ("Answer: x = 6. ", "6", Score(1.0, 1.0, "6")),
        ("Answer: 6", "6.", Score(1.0, 1.0, "6")),
        ("Answer: 18 dollars.", "18", Score(1.0, 1.0, "18")),
        ("Answer: \\boxed{6.}", "6", Score(1.0, 1.0, "6")),
        ("Answer: $\\boxed{6.}$", "6", Score(1.0, 1.0, "6")),
        ("Answer: \\boxed{6}.", "6.", Score(1.0, 1.0, "6")),
        ("Answer: $6.$", "\\boxed{6.}", Score(1.0, 1.0, "6")),
        ("Answer: \\text{yes.}", "yes", Score(1.0, 1.0, "yes")),
        ("Answer: yes", "\\text{yes.}", Score(1.0, 1.0, "yes")),
        ("Answer: \\textbf{6.}", "\\overline{6.}", Score(1.0, 1.0, "6")),
        ("Answer: 1,234.", "\\text{1,234.}", Score(1.0, 1.0, "1234")),
        ("Answer: 5\\text{ cm.}", "5", Score(1.0, 1.0, "5")),
        ("Answer: \\boxed{.5.}", ".5", Score(1.0, 1.0, ".5")),
        ("no answer", "6", Score(0.0, -1.0, "")),
        ("Answer:", "6", Score(0.0, -1.0, "")),
        ("no answer", "[INVALID]", Score(0.0, -1.0, "")),
        ("Answer: ", "", Score(0.0, -1.0, "")),
        ("Answer: $$", "$$", Score(0.0, -1.0, "")),
        ("Answer: x =", "y=", Score(0.0, -1.0, "")),
        ("Answer: 6" + " " * 100, "6" + " " * 300, Score(0.0, -1.0, "6")),
    ],
)
def test_the_declared_departures_from_the_published_rule(response, truth, score):
    assert score_math(response, truth) == score


@pytest.mark.parametrize(
    "response, pred, truth",
    [
        (" b7-5=2 c2-7=5\nAnswer: 2", "2", "2"),
        ("\nAnswer: 9", "9", "3"),
        (" b7-5=2 c2-7=5", "", "5"),
        ("........\nAnswer: 4", "4", "4"),
        (" b1-7=4\nAnswer: 4\nAnswer: 5", "5", "5"),
    ],
)
def test_the_embedded_tasks_responses(response, pred, truth):
    right = float(pred == truth)
    assert score_math(response, truth) == Score(right, 2 * right - 1, pred)


@pytest.mark.parametrize(
    "response, truth, right",
    [
        ("\\boxed{5} so \\boxed{6}", "6", True),
        ("\\boxed{6}\nAnswer: 7", "6", True),
        ("\\boxed{\\frac{3}{4}} indeed", "\\frac{3}{4}", True),
        ("\\boxed{3/4}", "\\frac{3}{4}", False),
        ("\\boxed{ 6}", "6", False),
        ("\\boxed{6.}", "6", False),
        ("Answer: 6", "6", False),
        ("\\boxed{6", "6", False),
        ("\\boxed{6} \\boxed{", "6", False),
        ("\\boxed{}", "", False),
        ("\\boxed{6}" + "." * 291, "6", True),  # published: the last 100 characters
        ("\\boxed{6}" + "." * 300, "6", False),
    ],
)
def test_the_strict_variant_compares_the_last_box_exactly(response, truth, right):
    assert score_math_strict_box(response, truth).acc == right
    assert score_math_strict_box(response, truth).score == 2 * right - 1


# ---- math_verify ----


@pytest.mark.parametrize(
    "response, truth, right",
    [
        ("Answer: $\\frac{3}{4}$", "0.75", True),
        ("so \\boxed{x^2+1}", "1+x^2", True),
        ("Answer: $\\sqrt{8}$", "2\\sqrt{2}", True),
        ("Answer: \\(\\{1,2,3\\}\\)", "\\{3,2,1\\}", True),
        ("Answer: \\frac{1}{\\sqrt 2}", "\\frac{\\sqrt{2}}{2}", True),
        ("Answer: 6.0", "6", True),
        ("Answer: 1,234", "1234", True),
        ("Answer: $3+2\\sqrt{2}$", "2\\sqrt 2+3", True),
        ("Answer: $(x+1)(x-1)$", "x^2-1", True),
        ("Answer: \\(6\\)", "6", True),
        ("Answer: $\\dfrac{3}{4}$", "\\frac{3}{4}", True),
        ("Answer: 18 dollars.", "18", True),
        ("Answer: $\\sqrt{8}$", "3", False),
        ("7", "7", False),
        ("", "6", False),
        ("Answer: \ud800", "6", False),
        ("Answer: " + "(" * 100, "6", False),
        ("Answer: 6", "6" + " " * 300, False),
        ("so \\boxed{6}\nAnswer: 7", "6", False),
    ],
)
def test_math_verify_compares_as_mathematics(response, truth, right):
    assert score_math_verify(response, truth).acc == right


@pytest.mark.parametrize(
    "response, truth",
    [
        ("Answer: $\\sum_{k=1}^{100} k^2$", "338350"),
        ("Answer: $\\int_0^1 x^2 dx$", "1/3"),
        ("Answer: $10!$", "3628800"),
        ("Answer: $2+3$", "5"),
        ("Answer: $2 \\cdot 3$", "6"),
        ("Answer: $\\sqrt{9}$", "3"),
        ("Answer: $2^{10}$", "1024"),
        ("Answer: $1+\\frac12$", "\\frac32"),
        ("Answer: $\\int_0^1 x dx + y$", "y + 1/2"),
        ("Answer: $5+5$", "10\\%"),
    ],
)
def test_math_verify_does_no_work_that_the_policy_left(response, truth):
    assert score_math_verify(response, truth).acc == 0


@pytest.mark.parametrize(
    "response, truth",
    [
        ("Answer: 12:60", "6:30"),
        ("Answer: 1:5", "0.2"),
        ("Answer: x,y", "y,x"),
        ("Answer: 1.5,2", "2,1.5"),
    ],
)
def test_math_verify_is_not_asked_about_ratios_and_bare_lists(response, truth):
    assert score_math_verify(response, truth).acc == 0


# ---- real answers ----


def answers_of(name):
    """The reference answers of a data set; of a copy that was cut, without the last row."""
    lines = (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return [
        row["answer"].split("#### ")[1] if "####" in row["answer"] else row["answer"]
        for row in rows
    ]


WAYS = [
    "Answer: {}",
    "I think.\nAnswer: ${}$",
    "Answer: {}.",
    "Answer: \\boxed{{{}}}",
    "Answer: $\\boxed{{{}}}$.",
    "answer: {} dollars",
    "Answer: x = {}",
    "Answer: 0\nAnswer: {} cents.",
]


@pytest.mark.skipif(not DATA.is_dir(), reason="needs GSM8K and AIME 2024 in ../shared/data")
@pytest.mark.parametrize(
    "name, least",
    [
        ("gsm8k_test", 1319),
        ("aime24", 30),
        pytest.param("gsm8k_train", 7472, marks=pytest.mark.slow),
    ],
)
def test_real_answers_match_themselves_and_not_their_neighbours(name, least):
    answers = answers_of(name)
    assert len(answers) >= least
    for truth, other in zip(answers, answers[1:] + answers[:1], strict=True):
        for way in WAYS:
            assert score_math(way.format(truth), truth).acc == 1, (way, truth)
            if truth.replace(",", "").isdigit():
                assert score_math(way.format(truth.replace(",", "")), truth).acc == 1, (way, truth)
            if float(truth.replace(",", "")) != float(other.replace(",", "")):
                assert score_math(way.format(other), truth).acc == 0, (way, other, truth)
        assert score_math_strict_box(f"so \\boxed{{{truth}}}", truth).acc == 1


# ---- hostile text ----

NASTY = [
    "Answer: " * 10**5,
    "Answer:" + " " * 10**6,
    "{" * 10**6,
    "Answer: 10**10**10",
    "Answer: " + "9" * 10**5,
    "Answer: \ud800",
    "Answer: \x00\x1b[2J",
    "Answer: \N{RIGHT-TO-LEFT OVERRIDE}6",
    "\\frac{" * 10**4,
    "Answer: __import__('os')",
    "Answer: 9**9**9",
    "Answer: " + "\\frac{1}{" * 30,
    "Answer: " + "\\boxed{" * 40,
    "Answer: " + "\\text{" * 50 + "}" * 50,
    "\\boxed{" + "{" * 10**5,
    "Answer: " + "1," * 140,
    "Answer: " + "1,111" * 50,
    "Answer: 1/" + "0" * 290,
    "Answer: " + "=" * 290,
    "Answer: " + " a" * 140,
    "answer" + "*" * 290,
    "answer" + "\t" * 280 + ":",
    "Answer: " + "6 " * 140,
    "Answer: \u0666",
    "Answer: " + "." * 290,
    "Answer: " + "frac" * 70,
    "Answer: " + "$" * 290,
    "Answer: " + "\\text{" * 48,
    "Answer: " + "answer" * 48,
    "Answer: 6" + " of" * 90 + " 7",
    "Answer: 6\u2028Answer: 7",
    "Answer: {6}" + "%" * 200,
]
PIECES = [
    "Answer:",
    "answer :",
    "\n",
    "\\boxed{",
    "}",
    "{",
    "$",
    "\\$",
    "\\frac",
    "\\text{",
    "6",
    "7",
    "1,234",
    ".",
    "-",
    "/",
    "=",
    "%",
    " ",
    "^",
    "\\circ",
    "dollars",
    "and",
    "\x1b[31m",
    "\x00",
    "\ud800",
    "\N{RIGHT-TO-LEFT MARK}",
    "**",
    "\\",
    "9**9**9",
    "\r",
    "٦",
    "⁶",
    "∞",
    "nan",
    "1e999",
    "0x6",
    "5 1/",
    "\\frac12",
    "sqrt",
    "mbox",
    "an ",
]
SEEDS = [
    "so it is six.\nAnswer: 6",
    "Answer: $\\boxed{\\frac{3}{4}}$",
    "Answer: 1,234.50 dollars",
    "Answer: -0.75\\%",
    "\\boxed{12\\text{ cm}^2}",
]
TRUTHS = ["6", "-1,234.5", "3/4", "20%", "\\frac{\\sqrt{3}}{2}", "yes", "\ud800", "9" * 301]


def assert_bounded(text, truths=TRUTHS):
    for truth in truths:
        for score_function in (score_math, score_math_strict_box):
            start = time.thread_time()
            score = score_function(text, truth)
            assert time.thread_time() - start < 0.05
            assert score == score_function(text, truth)
            assert score.acc in (0.0, 1.0) and len(score.pred) < 1000


@pytest.mark.parametrize("text", NASTY)
def test_hostile_text_is_wrong_and_quick(text):
    assert_bounded(text)
    assert score_math(text, "6").acc == 0


def test_10000_mutated_responses_raise_nothing_take_no_time_and_keep_their_scores():
    rng = random.Random(0)
    for _ in range(10_000):
        text = rng.choice(["", *SEEDS])
        for _ in range(rng.randrange(12)):
            at, length = rng.randint(0, 40), rng.randint(0, 3)
            piece = chr(rng.randrange(0x110000)) if rng.random() < 0.2 else rng.choice(PIECES)
            text = text[:at] + piece + text[at + length :]
        assert_bounded(text, ["6", "3/4"])


def test_scores_do_not_depend_on_the_process():
    code = (
        "import sys, json; sys.path[:0] = ['.', 'tests']; import test_reward as t\n"
        "print(json.dumps([str(t.score_math(text, truth))\n"
        "                  for text in t.NASTY + t.SEEDS + t.PIECES for truth in t.TRUTHS]))"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
            env={"PYTHONHASHSEED": seed},
        ).stdout
        for seed in "12"
    }
    assert len(printed) == 1 and len(json.loads(printed.pop())) > 500


def test_rewards_import_no_torch():
    code = "import reward, infra.reward_pool, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# ---- reward functions of one's own ----


def write_reward(tmp_path, body, arguments="response, ground_truth, **row", rows=()):
    path = tmp_path / "mine.py"
    path.write_text(f"def score({arguments}):\n    {body}\n")
    return load_reward_function(f"{path}:score", rows)


def scores_of(function, responses=("",), ground_truth="", row=None):
    """Each response's length in tokens is ten times that in characters."""
    lengths = [10 * len(response) for response in responses]
    return score_task(function, Task(list(responses), lengths, ground_truth, row or {}))


def test_a_number_becomes_a_score_and_the_row_is_there(tmp_path):
    function = write_reward(tmp_path, "return row['bonus'] if response == ground_truth else 0")
    scores = scores_of(function, ["x", "y"], "x", {"bonus": 2})
    assert scores == [Score(None, 2.0), Score(None, 0.0)]


@pytest.mark.parametrize("value", ["2.5", "{'score': 2.5}", "{'score': 2.5, 'acc': None}"])
def test_a_positive_score_is_no_accuracy(tmp_path, value):
    """Else a reward that is always positive would make all groups all-correct."""
    assert scores_of(write_reward(tmp_path, f"return {value}")) == [Score(None, 2.5)]


def test_a_score_passes_as_it_is(tmp_path):
    function = write_reward(
        tmp_path, "from reward import Score; return Score(0.5, 3.0, 'p', {'c': 1.0})"
    )
    assert scores_of(function) == [Score(0.5, 3.0, "p", {"c": 1.0})]


@pytest.mark.parametrize(
    "value, score",
    [
        ("{'score': 2, 'acc': False}", Score(0.0, 2.0)),
        ("{'score': 1, 'pred': None}", Score(None, 1.0)),
        (
            "{'score': -1, 'acc': 0, 'pred': 7, 'format': True, 'why': 'none'}",
            Score(0.0, -1.0, "7", {"format": 1.0, "why": "none"}),
        ),
    ],
)
def test_a_dict_becomes_a_score_with_extra_values(tmp_path, value, score):
    assert scores_of(write_reward(tmp_path, f"return {value}")) == [score]


def test_numpy_numbers_become_plain_ones(tmp_path):
    (score,) = scores_of(write_reward(tmp_path, "import numpy; return numpy.float32(2)"))
    assert score == Score(None, 2.0) and type(score.score) is float


def test_a_group_reward_gets_all_responses_of_a_prompt(tmp_path):
    function = write_reward(
        tmp_path,
        "return [len(r) - max(map(len, responses)) + bonus for r in responses]",
        "responses, ground_truth, bonus, **row",
    )
    scores = scores_of(function, ["a", "bbb", ""], "", {"bonus": 10})
    assert [score.score for score in scores] == [8.0, 10.0, 7.0]


def test_a_reward_may_ask_for_the_length_in_tokens(tmp_path):
    function = write_reward(
        tmp_path, "return response_length", "response, ground_truth, response_length, **row"
    )
    scores = scores_of(function, ["a", "bbb"], "", {"response_length": "a column"})
    assert [score.score for score in scores] == [10, 30]


def test_a_group_reward_gets_the_list_of_lengths(tmp_path):
    function = write_reward(
        tmp_path,
        "return [length - min(response_length) for length in response_length]",
        "responses, ground_truth, response_length",
    )
    assert [score.score for score in scores_of(function, ["a", "bbb"])] == [0, 20]


def test_a_reward_gets_the_columns_that_it_names(tmp_path):
    function = write_reward(tmp_path, "return level", "response, ground_truth, level=1")
    row = {"level": 3, "other": 4, "response": 5}
    assert scores_of(function, row=row) == [Score(None, 3.0)]
    assert scores_of(function, row={"ground_truth": 4}) == [Score(None, 1.0)]


@pytest.mark.parametrize("arguments", [
    "data_source, solution_str, ground_truth, extra_info=None", "prompts, completions, **kwargs",
    "prompt, response, ground_truth", "response, data_source, ground_truth"])
def test_arguments_in_another_order_are_refused_even_if_the_data_have_such_columns(tmp_path,
                                                                                   arguments):
    """verl's and TRL's: the response would be taken for the data source."""
    row = dict.fromkeys(["data_source", "prompt", "ground_truth", "answer"], "x")
    with pytest.raises(ValueError, match="is called as function.response, ground_truth, .*columns.: "
                                         "write a function around it"):
        write_reward(tmp_path, "return 1.0", arguments, [row])


def test_a_reward_may_call_its_arguments_what_it_likes(tmp_path):
    function = write_reward(tmp_path, "return float(text == answer)", "text, answer, **row")
    assert scores_of(function, ["6"], "6", {"text": "5", "answer": "so 6"}) == [Score(None, 1.0)]


@pytest.mark.parametrize(
    "body, message",
    [
        ("return float('nan')", "returned score=nan"),
        ("return float('inf')", "returned score=inf"),
        ("return {'score': 1, 'acc': 50}", "returned acc=50.0: correct .1. or not .0., or a number"),
        ("return {'score': 1, 'acc': float('nan')}", "returned acc=nan: correct"),
        ("return 1e300", "returned score=1e.300: a finite number of at most 1e.09 is expected"),
        ("return {'score': 1, 'c': float('nan')}", "returned c=nan"),
        ("return {'score': 1, 'acc': float('nan')}", "returned acc=nan"),
        ("return {'acc': 1}", "returned .'acc': 1.: a number, a dict with `score`"),
        ("return None", "returned None: a number, a dict with `score`, or a Score is expected"),
        (
            "from reward import Score; return Score(1.0, None)",
            "returned Score.*a number|'score': None",
        ),
        ("raise KeyError('q')", "raised KeyError: 'q' at mine.py:2$"),
        ("return 'high'", "'high'"),
    ],
)
def test_a_reward_that_fails_is_a_clear_error(tmp_path, body, message):
    with pytest.raises(ValueError, match=message):
        scores_of(write_reward(tmp_path, body))


def test_an_error_inside_a_library_names_the_line_in_ones_own_file(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import json\ndef parse(text):\n    return json.loads(text)\n\n"
        "def score(response, ground_truth):\n    return parse(response)\n"
    )
    with pytest.raises(ValueError, match=r"raised JSONDecodeError: .* at mine\.py:3$"):
        scores_of(load_reward_function(f"{tmp_path}/mine.py:score"), ["{"])


@pytest.mark.parametrize("body", ["return 1", "return [1]", "return {'score': 1}", "return None"])
def test_a_group_reward_that_returns_something_else_is_a_clear_error(tmp_path, body):
    message = "first argument is called `responses`, a list of 2 scores is expected"
    with pytest.raises(ValueError, match=message):
        scores_of(write_reward(tmp_path, body, "responses, ground_truth"), ["", ""])


def test_a_group_reward_whose_first_argument_is_not_called_responses_is_told_so(tmp_path):
    function = write_reward(tmp_path, "return [len(completions)] * 2", "completions, ground_truth")
    message = (
        r"returned \[2, 2\]: a number, a dict .* is expected \(a list only if its first "
        "argument is called `responses`: it then gets all responses of a prompt"
    )
    with pytest.raises(ValueError, match=message):
        scores_of(function, ["ab", "cd"])


def test_a_column_that_the_data_lack_is_named(tmp_path):
    function = write_reward(tmp_path, "return 1", "response, ground_truth, level, *, c=2, **row")
    with pytest.raises(
        ValueError,
        match="the data have the columns a, b: missing a required "
        "argument: 'level'.*give the argument a default, or add",
    ):
        scores_of(function, row={"a": 1, "b": 2})


def test_a_reward_without_a_second_argument_is_told_how_it_is_called(tmp_path):
    function = write_reward(tmp_path, "return 1", "response")
    message = r"called as function\(response, ground_truth, .*\(response\)"
    with pytest.raises(ValueError, match=message):
        scores_of(function)


def test_a_rewards_file_is_a_module_like_any_other(tmp_path):
    (tmp_path / "helper_of_mine.py").write_text("RIGHT = 3.0\n")
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "import helper_of_mine\n@dataclass\nclass A:\n    x: int\n"
        "def score(response, ground_truth):\n    return helper_of_mine.RIGHT\n"
    )
    assert scores_of(load_reward_function(f"{tmp_path}/mine.py:score")) == [Score(None, 3.0)]


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "maths",
            "'maths' is neither math, math_strict_box, math_verify nor path/to/file.py:function",
        ),
        ("toy", "'toy' is neither"),
        ("reward.py", "'reward.py' is neither"),
        ("missing.py:score", "there is no file /.*/missing.py$"),
        ("/no/where.py:score", "there is no file /no/where.py$"),
        ("reward.py:nothing", "reward.py has no function 'nothing'"),
        ("reward.py:ANSWER_WINDOW", "reward.py has no function 'ANSWER_WINDOW'"),
    ],
)
def test_an_unknown_reward_is_named(name, message):
    with pytest.raises(ValueError, match=r"reward\.name: .*" + message):
        load_reward_function(name)


@pytest.mark.parametrize(
    "text, message",
    [
        ("\nimport no_such_module", "ModuleNotFoundError: .* 'no_such_module' at mine.py:2"),
        ("def score(", "SyntaxError: .*mine.py, line 1"),
        ("import sys; sys.exit('no')", "SystemExit: no"),
        ("import json\njson.loads('{')", "JSONDecodeError: .* at mine.py:2"),
    ],
)
def test_a_failing_import_is_one_clear_line(tmp_path, text, message):
    (tmp_path / "mine.py").write_text(text)
    message = r"reward\.name: cannot import .*mine\.py: " + message
    with pytest.raises(ValueError, match=message) as error:
        load_reward_function(f"{tmp_path}/mine.py:score")
    assert "\n" not in str(error.value)


# ---- several reward functions ----


def test_several_are_summed_and_each_score_is_an_extra_value():
    scores = {
        "math": Score(1.0, 1.0, "6"),
        "style": Score(None, -3.0, "x", {"words": 4.0, "why": "long"}),
    }
    extra = {"math/score": 1.0, "style/score": -3.0, "style/words": 4.0, "style/why": "long"}
    assert weighted_sum(scores, [1.0, 0.5]) == Score(1.0, -0.5, "6", extra)


@pytest.mark.parametrize("status", ["timeout", "error"])
def test_if_one_of_several_reward_functions_fails_so_does_their_sum(status):
    scores = {"math": Score(1.0, 1.0, "6"), "style": failed_score(status, "no")}
    expected = Score(0.0, 0.0, status=status, message="style: no")
    assert weighted_sum(scores, [1.0, -0.5]) == expected


def test_extra_values_are_averaged_over_the_scores_that_have_them():
    scores = [
        Score(1, 1, "", {"a": 1.0, "b": "x"}),
        Score(1, 1, "", {"a": 2.0, "c": 5.0}),
        Score(1, 1),
    ]
    assert mean_extra(scores) == {"reward/a": 1.5, "reward/c": 5.0}
