"""How good is this text? Verifiers and the overlong penalty: text and numbers in, numbers out.

DAPO's reward is +1 for a right final answer and -1 for any other (section 2.4), plus a penalty near
the length limit (equation 13). Departures from the paper: a response of exactly the maximum length
gets the same -penalty_factor from both of the equation's branches, so one expression serves for both.

Text is only ever read: nothing in it is executed, and of an answer no more is looked at than the last 300 characters.

A verifier of your own is a function in any Python file, `reward.name=path/to/file.py:function`. It is called as
`function(response, ground_truth, **row)`, with those of the row's columns that it names (or all, for `**row`). If its
first argument is called `responses`, it gets all responses to one prompt, and returns a list. A verdict is a number;
or a dict of `score` and, where they are known, `acc`, `pred` and further columns; or a `Score`.
"""

import importlib.util
import inspect
import logging
import math
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

ANSWER_WINDOW = 300  # characters at the end of a response in which the answer must stand
ANSWER_LINE = re.compile("answer[*_`]*\\s*[:\N{FULLWIDTH COLON}]" r"[*_`}]*\s*(?:(?:\$\$|\\\[)\s*)?([^\n]+)",
                         re.IGNORECASE)
BUILT_IN = ("math", "math_strict_box", "math_verify", "toy")

MARKUP = [(re.compile(pattern), plain) for pattern, plain in (  # in this order; what is dropped leaves a space, lest
    (r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r" \1 "),  # two numbers become one
    (r"\s+([\^²³])", r"\1"),
    (r"(?<=[0-9])(?:\{,\}|\\,|,\\!)(?=[0-9]{3})", ","),  # LaTeX's thousands
    (r"\^?\{?\\circ\}?|\\degrees?(?![a-z])|°", " degrees "),
    (r"\\left(?![a-z])|\\right(?![a-z])|\\[()\[\]]|\\?[$€£]|\*\*|\\[,;:!~ ]|~|\\q?quad(?![a-z])", " "),
    (r"\\[dt]frac", r"\\frac"),
    (r"(?<=[0-9])\s*\\frac", r" \\frac"),  # a mixed number
    (r"\\frac\s*\{\s*(-?[0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}", r"\1/\2"), (r"\\frac\s*([0-9])\s*([0-9])", r"\1/\2"),
    (r"\\leq?(?![a-z])|≤", "<="), (r"\\geq?(?![a-z])|≥", ">="),
    (r"\\%|\bpercent\b", "%"), ("[\N{MINUS SIGN}\N{EN DASH}]", "-"))]
PARENTHESES = re.compile(r"\(?\s*([A-Za-z])\s*\)|\(\s*([-+]?[0-9]+(?:\.[0-9]+)?)\s*\)")  # around a choice, or a number
NAME = re.compile(r"[^=<>!0-9]{1,40}=([^=]+)")  # x = 5, m + n = 25
NUMBER = re.compile(r"([-+]?) ?((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]*)?)"
                    r"(?:(?: ([0-9]+))? ?/ ?([0-9]+))?(?![0-9])(.*)", re.DOTALL)
GLUED = {"%", "mm", "cm", "m", "km", "in", "ft", "yd", "mi", "mg", "g", "kg", "oz", "lb", "lbs", "ml", "hr", "hrs",
         "min", "mins", "mph"}  # units that may touch the number
UNIT = re.compile(r"([A-Za-z%]+)(?:\^\{?[23]\}?|[²³])?(?:/[A-Za-z]+(?:\^\{?[23]\}?|[²³])?)?[.,;!]*")
AMOUNTS = re.compile("""or|and|to|not|plus|minus|times|over|by|point|hal(f|ves)|thirds?|quarters?|tenths?|dozens? |
    hundreds?|thousands?|millions?|billions?|trillions?|lakh|crore|tens|squared|cubed|factorial|choose|pi|mod|modulo |
    less|more|xor|maybe|wrong|zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve |
    (?:twen|thir|for|fif|six|seven|eigh|nine)ty""", re.IGNORECASE | re.VERBOSE)  # words that make it another number
ALGEBRA = re.compile(r"[A-Za-z]| (?!in\b|m\b|[ckm]m\b|k?g\b)[A-Za-z]{1,2}\b")  # a ground truth's 3x, 3 xy
WORK = re.compile(r"\\(?:sum|int|prod|lim|d?t?binom|gcd|lcm|max|min|log|ln)(?![a-z])|!|mod|choose")  # left undone
ARITHMETIC = re.compile(rf"[0-9)}}]\s*(?:[-+*^(]|\\times|\\cdot|\\div)|sqrt|{WORK.pattern}")


@dataclass(frozen=True)
class Score:
    """A verdict: `acc` is right (1) or wrong (0), `score` what it is worth, `pred` the answer that was read; `columns`
    is whatever else the verifier has to say: numbers become metrics."""
    acc: float
    score: float
    pred: str = ""
    columns: dict[str, float | str] = field(default_factory=dict)


TIMED_OUT = Score(0.0, -1.0, columns={"no verdict": "the verifier took too long, or too much memory, or died"})
FAILED = Score(0.0, -1.0, columns={"no verdict": "the verifier failed"})


def overlong_penalty(response_len: int, max_response_length: int, overlong_buffer_len: int,
                     penalty_factor: float = 1.0) -> float:
    """Soft overlong punishment (equation 13): 0 up to the buffer's start, then falling in a straight line.

    Lengths in tokens. Returns a number in [-penalty_factor, 0]: -penalty_factor at `max_response_length`
    and, should a response be longer, beyond it.
    """
    excess = response_len - (max_response_length - overlong_buffer_len)
    return -min(max(excess / overlong_buffer_len, 0.0), 1.0) * penalty_factor


# ---- mathematics ------------------------------------------------------------------------------------------------

def last_boxed(text: str) -> str | None:
    """What the last \\boxed{...} that is closed holds; None where there is none."""
    end = len(text)
    while (start := text.rfind("\\boxed{", 0, end)) >= 0:
        depth = 0
        for at in range(start + 6, len(text)):
            depth += (text[at] == "{") - (text[at] == "}")
            if depth == 0:
                return text[start + 7:at]
        end = start
    return None


def find_answer(response: str) -> str:
    """What the last `Answer: ...` line in a response's last 300 characters says; nothing where there is none."""
    answers = ANSWER_LINE.findall(response[-ANSWER_WINDOW:])
    return answers[-1] if answers else ""


def extract_answer(response: str) -> str:
    """A response that says no more than `Answer: ...`: the last such line, or where there is none the last box."""
    answer = find_answer(response) or last_boxed(response[-ANSWER_WINDOW:]) or ""
    return "Answer: " + answer.replace("\n", " ")


def read_number(text: str, fractions: bool = False) -> tuple[str, str] | None:
    """A number in one way to write it, and what stands behind it; None where a text is no number.

    `fractions`: 3/4, 6/8 and 0.75 are the same; without, a fraction is no number.
    """
    sign, number, numerator, denominator, rest = NUMBER.fullmatch(text).groups()
    if not number.strip(".") or (denominator and not (fractions and int(denominator))):
        return None
    whole, _, decimals = number.replace(",", "").partition(".")
    whole, decimals = whole.lstrip("0") or "0", decimals.rstrip("0")
    plain = f"{whole}.{decimals}" if decimals else whole
    if fractions:
        value = Fraction(plain) + Fraction(int(numerator), int(denominator)) if numerator else (
            Fraction(plain) / int(denominator or 1))
        plain = str(value)
    return plain if plain == "0" else sign.strip("+") + plain, rest


def is_unit(text: str) -> bool:
    """Whether what stands behind a number leaves it that number: nothing, a unit, or a few words."""
    words = text.split()
    for at, word in enumerate(words):
        match = UNIT.fullmatch(word)
        if not match or AMOUNTS.fullmatch(match.group(1)) or (
                at == 0 and text[0] not in " %" and match.group(1) not in GLUED) or (
                len(word) == 1 and word not in "%mgshl"):
            return False
    return True


def plain_text(text: str) -> str:
    """What is boxed, or all of it, without mark-up."""
    text = last_boxed(text) or text
    for pattern, plain in MARKUP:
        text = pattern.sub(plain, text)
    text = text.strip(" \t\r\n*_`").rstrip(" .,;")
    if match := PARENTHESES.fullmatch(text):
        text = match.group(1) or match.group(2)
    return " ".join(text.split())


def normalise_answer(text: str, ground_truth: str) -> str:
    """The plain form of an answer, by the kind that the ground truth is of; equal to its own where it is right.

    An equation, and what is no number, are compared as they stand. Of a number, separators, zeros and signs are
    written one way. A unit or words behind it go, where they are the ground truth's too or that has none. Fractions
    are worked out only where the ground truth is one, lest the policy leave a last division to the verifier.
    """
    truth, text = plain_text(ground_truth), plain_text(text)
    fractions = bool(re.search(r"[0-9] ?/ ?[0-9]", truth))
    if "=" not in truth and (match := NAME.fullmatch(text)):
        text = match.group(1).strip()
    wanted, found = read_number(truth, fractions), read_number(text, fractions)
    if wanted and found and is_unit(found[1]) and is_unit(wanted[1]) and not ALGEBRA.match(wanted[1]):
        units = [re.sub(r"\s|[.,;!]", "", rest.lower()) for _, rest in (wanted, found)]
        if not all(units) or units[0] == units[1]:
            return found[0]
    return re.sub(r"(?<!\w) | (?!\w)", "", text.lower())  # 6 0 is not 60


def compare(answer: str, ground_truth: str) -> Score:
    """+1 if right, -1 if not. A ground truth of more than 300 characters is nobody's."""
    ground_truth = ground_truth[:ANSWER_WINDOW + 1]
    pred = normalise_answer(answer, ground_truth)
    right = bool(pred) and len(ground_truth) <= ANSWER_WINDOW and pred == normalise_answer(ground_truth, ground_truth)
    return Score(acc=float(right), score=1.0 if right else -1.0, pred=pred)


def score_math(response: str, ground_truth: str) -> Score:
    """Judge the last `Answer: ...` line within a response's last 300 characters: +1 if right, -1 if not."""
    return compare(find_answer(response), ground_truth)


def score_math_strict_box(response: str, ground_truth: str) -> Score:
    """The same of the last \\boxed{...} within those: nothing else counts."""
    return compare(last_boxed(response[-ANSWER_WINDOW:]) or "", ground_truth)


@lru_cache(maxsize=256)
def parse_latex(text: str) -> list:
    """What math_verify reads in a text."""
    from math_verify import parse
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns that nothing limits its time
    return parse(text if re.search(r"\$|boxed|\\[(\[]", text) else f"${text}$", parsing_timeout=None)


def score_math_verify(response: str, ground_truth: str) -> Score:
    """`extract_answer`, compared as mathematics by the library math_verify: LaTeX, sets, intervals, expressions. Without
    the library's own limits of time, which are signals: see judges.py.

    It works out what it is given, so it is not given work that the policy left undone: sums, integrals, factorials
    that are not in the ground truth, or any arithmetic where that is a number. Nor times, nor bare lists, whose order
    it does not mind.
    """
    from math_verify import verify
    answer = extract_answer(response).partition(" ")[2]
    verdict = compare(answer, ground_truth)
    plain, truth = plain_text(answer), plain_text(ground_truth[:ANSWER_WINDOW])
    number = read_number(truth, fractions=True)
    undone = WORK if not number or number[1] else ARITHMETIC
    if verdict.acc or not plain or (undone.search(plain) and not undone.search(truth)) or re.search(
            "[0-9]:[0-9]", plain) or ("," in truth and not re.search(r"[\[({]", truth)):
        return verdict
    try:
        right = verify(parse_latex(ground_truth), parse_latex(answer), timeout_seconds=None)
    except MemoryError:
        raise
    except Exception:  # whatever sympy thinks of such a text
        right = False
    return Score(float(right), 1.0 if right else -1.0, verdict.pred)


# ---- verifiers --------------------------------------------------------------------------------------------------

def load_verifier(name: str) -> Callable:
    """The verifier called `name`: built in, or `path/to/file.py:function`. Raises ValueError where there is none."""
    if name in ("math", "math_strict_box"):
        return globals()[f"score_{name}"]
    if name == "math_verify":
        for answer in (r"\frac{5\pi}{2}", r"x^{2} \cdot \sqrt{3}", r"\{1, 2\}", "(1, 2)"):  # first times are slow
            score_math_verify(f"Answer: ${answer}$", r"2\pi")
        return score_math_verify
    if name == "toy":
        from toy.make_toy import score
        return score
    path, _, function = name.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        raise ValueError(f"reward.name: {name!r} is neither {', '.join(BUILT_IN)} nor an existing "
                         "path/to/file.py:function")
    spec = importlib.util.spec_from_file_location(f"verifier_{Path(path).stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses and pickle look
    sys.path.append(str(Path(path).resolve().parent))  # of what it imports
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"reward.name: cannot import {path}: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, function, None)):
        raise ValueError(f"reward.name: {path} has no function {function!r}")
    return getattr(module, function)


@lru_cache
def arguments_of(verifier: Callable) -> dict[str, inspect.Parameter]:
    """Its arguments by their names."""
    return dict(inspect.signature(verifier).parameters)


def is_batched(verifier: Callable) -> bool:
    """Whether it judges all responses to a prompt at once."""
    return next(iter(arguments_of(verifier)), "") == "responses"


def judge(verifier: Callable, responses: Sequence[str], ground_truth: str, row: dict) -> list[Score]:
    """Verdicts on responses to one prompt. Raises ValueError where the verifier fails, or returns something else."""
    taken, wanted = list(arguments_of(verifier))[:2], arguments_of(verifier)
    columns = {key: value for key, value in row.items() if key not in taken and (
        key in wanted or any(argument.kind is argument.VAR_KEYWORD for argument in wanted.values()))}
    for name, argument in list(wanted.items())[2:]:
        if name not in columns and argument.default is argument.empty and argument.kind not in (
                argument.VAR_KEYWORD, argument.VAR_POSITIONAL):
            raise ValueError(f"the reward function wants a column {name!r}, which the data lack (they have: "
                             f"{', '.join(map(str, row))}): give the argument a default, or mend the data")
    try:
        verdicts = (verifier(list(responses), ground_truth, **columns) if is_batched(verifier) else
                    [verifier(response, ground_truth, **columns) for response in responses])
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(f"the reward function raised {type(error).__name__}: {str(error)[:300]} "
                         f"at {Path(where.filename).name}:{where.lineno}") from error
    if isinstance(verdicts, (str, dict)) or not hasattr(verdicts, "__len__") or len(verdicts) != len(responses):
        raise ValueError(f"the reward function returned {repr(verdicts)[:60]}: a list of {len(responses)} verdicts is "
                         "expected of one whose first argument is `responses`")
    return [to_score(verdict) for verdict in verdicts]


def to_score(verdict) -> Score:
    """A number, a dict with `score`, or a `Score`, as a `Score` of plain numbers. Raises ValueError for anything else,
    and for numbers that are not finite."""
    try:
        fields = dict(verdict) if isinstance(verdict, dict) else dict(vars(verdict)) if isinstance(
            verdict, Score) else {"score": verdict}
        score = float(fields.pop("score"))
        acc, pred = float(fields.pop("acc", score > 0)), str(fields.pop("pred", ""))
        columns = {str(name): float(value) if hasattr(value, "__float__") else str(value)
                   for name, value in (fields.pop("columns", {}) | fields).items()}
    except Exception:  # a tensor of several numbers has its own
        raise ValueError(f"the reward function returned {repr(verdict)[:200]}: a number, a dict with `score`, or a "
                         "Score is expected") from None
    for name, value in {"score": score, "acc": acc, **columns}.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"the reward function returned {name}={value}")
    return Score(acc, score, pred, columns)


def weighted_sum(scores: dict[str, Score], weights: Sequence[float]) -> Score:
    """The verdict of several verifiers: the sum of their scores, times their weights. What is right, and the answer,
    is the first one's affair. Each one's score becomes a column."""
    if TIMED_OUT in scores.values():
        return no_verdict(TIMED_OUT, weights)
    first = next(iter(scores.values()))
    columns = {name: score.score for name, score in scores.items()}
    for name, score in scores.items():
        columns |= {f"{name}/{key}": value for key, value in score.columns.items()}
    return Score(first.acc, sum(weight * score.score for weight, score in zip(weights, scores.values(), strict=True)),
                 first.pred, columns)


def no_verdict(kind: Score, weights: Sequence[float]) -> Score:
    """`TIMED_OUT` or `FAILED`, worth what it is to be wrong to all verifiers: to break one must not pay."""
    return replace(kind, score=-sum(map(abs, weights)))


def mean_columns(scores: Sequence[Score]) -> dict[str, float]:
    """`verdict/<column>` for a verifier's own columns: the mean over the responses that have it as a number."""
    columns: dict[str, list[float]] = {}
    for score in scores:
        for name, value in score.columns.items():
            if isinstance(value, float):
                columns.setdefault(name, []).append(value)
    return {f"verdict/{name}": sum(values) / len(values) for name, values in columns.items()}

from typing import NamedTuple
@dataclass(frozen=True)
class Score:
    acc: float | None
    score: float
    pred: str = ""
    extra: dict = field(default_factory=dict)
    status: str = "ok"
    message: str = ""
class Task(NamedTuple):
    responses: list
    lengths: list
    ground_truth: str
    row: dict
def mean_extra(scores): return {}
