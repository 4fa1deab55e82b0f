"""How good is this text? Verifiers and the overlong penalty: text and numbers in, numbers out.

DAPO's reward is +1 for a right final answer and -1 for any other (section 2.4), plus a penalty near
the length limit (equation 13). Departures from the paper: a response of exactly the maximum length
gets the same -penalty_factor from both of the equation's branches, so one expression serves for both.

Text is only ever read: nothing in it is evaluated, and no more of it is looked at than its last 300 characters.

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
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

ANSWER_WINDOW = 300  # characters at the end of a response in which the answer must stand
ANSWER_LINE = re.compile(r"answer[*_`]*\s*:\s*([^\n]+)", re.IGNORECASE)
BUILT_IN = ("math", "math_strict_box", "math_verify", "toy")

MARKUP = [(re.compile(pattern), plain) for pattern, plain in (
    (r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r" \1 "), (r"\s+([\^²³])", r"\1"),
    (r"(?<=[0-9])\s*(\\[dt]?frac)", r" \1"),  # mixed numbers
    (r"\\[dt]?frac\s*\{\s*(-?[0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}", r"\1/\2"),
    (r"\\[dt]?frac\s*([0-9])\s*([0-9])", r"\1/\2"),
    (r"(?<=[0-9])(?:\{,\}|\\[,!]|,\\!)(?=[0-9]{3})", ","),  # LaTeX's thousands
    (r"\^?\{?\\circ\}?|\\degrees?(?![a-z])|°", " degrees "),
    (r"\\left(?![a-z])|\\right(?![a-z])|\\[()\[\]]|\\?[$€£]|\*\*", ""),
    (r"\\[,;:!~ ]|~", " "), (r"\\%", "%"), ("\N{MINUS SIGN}", "-"))]
NUMBER = re.compile(r"([-+]?) ?((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]*)?)(?:/([0-9]+))?(?![0-9])(.*)",
                    re.DOTALL)
SYMBOLS = {"%", "mm", "cm", "m", "km", "in", "ft", "yd", "mi", "mg", "g", "kg", "oz", "lb", "lbs", "ml", "l", "s", "h",
           "hr", "hrs", "min", "mins", "am", "pm", "mph", "c", "f", "j", "w", "v"}  # may touch the number
UNIT = re.compile(r"([a-z%]+)(?:\^\{?[23]\}?|[²³])?(?:/[a-z]+(?:\^\{?[23]\}?|[²³])?)?[.,;!]*")
AMOUNTS = {"or", "and", "to", "not", "plus", "minus", "times", "over", "by", "point", "half", "halves", "third",
           "thirds", "quarter", "quarters", "hundred", "thousand", "million", "billion", "trillion", "dozen", "dozens",
           "squared", "cubed", "factorial", "choose", "pi", "mod"}  # words behind a number that make it another


@dataclass(frozen=True)
class Score:
    """A verdict: `acc` is right (1) or wrong (0), `score` what it is worth, `pred` the answer that was read; `columns`
    is whatever else the verifier has to say: numbers become metrics."""
    acc: float
    score: float
    pred: str = ""
    columns: dict[str, float | str] = field(default_factory=dict)


TIMED_OUT = Score(0.0, -1.0, "(no verdict: the verifier took too long, or too much memory, or died)")
FAILED = Score(0.0, -1.0, "(no verdict: the verifier raised an error)")


def overlong_penalty(response_len: int, max_response_length: int, overlong_buffer_len: int,
                     penalty_factor: float = 1.0) -> float:
    """Soft overlong punishment (equation 13): 0 up to the buffer's start, then falling in a straight line.

    Lengths in tokens. Returns a number in [-penalty_factor, 0]: -penalty_factor at `max_response_length`
    and, should a response be longer, beyond it.
    """
    excess = response_len - (max_response_length - overlong_buffer_len)
    return -min(max(excess / overlong_buffer_len, 0.0), 1.0) * penalty_factor


# ---- mathematics ------------------------------------------------------------------------------------------------

def last_box(text: str) -> str | None:
    """What the last \\boxed{...} that is closed holds; None where there is none."""
    start = text.rfind("\\boxed{")
    depth = 0
    for at in range(start + 6, len(text)) if start >= 0 else ():
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0:
            return text[start + 7:at]
    return None


def find_answer(response: str) -> str:
    """What the last `Answer: ...` line in a response's last 300 characters says; nothing where there is none."""
    answers = ANSWER_LINE.findall(response[-ANSWER_WINDOW:])
    return answers[-1] if answers else ""


def normalise_answer(text: str, fractions: bool = False) -> str:
    """An answer's plain form, for comparison: no mark-up, what is boxed or behind the last `=`; of a number no
    separators, units or words behind it, and one way to write it. `fractions`: 3/4, 6/8 and 0.75 are the same."""
    text = last_box(text) or text
    for pattern, plain in MARKUP:
        text = pattern.sub(plain, text)
    text = re.split(r"(?<![<>!])=", text)[-1].strip(" \t\r\n*_`").rstrip(" .,;")
    sign, number, denominator, rest = NUMBER.fullmatch(text).groups()
    if not number.strip(".") or not is_unit(rest) or (denominator and not (fractions and int(denominator))):
        return re.sub(r"(?<!\w)\s+|\s+(?!\w)", "", " ".join(text.lower().split()))  # 6 0 is not 60
    whole, _, decimals = number.replace(",", "").partition(".")
    whole, decimals = whole.lstrip("0") or "0", decimals.rstrip("0")
    plain = f"{whole}.{decimals}" if decimals else whole
    if fractions:
        plain = str(Fraction(plain) / int(denominator or 1))
    return plain if plain == "0" else sign.strip("+") + plain


def is_unit(text: str) -> bool:
    """Whether what stands behind a number leaves it that number: nothing, a unit, or a few words."""
    words = text.lower().split()
    if words and text[0] not in " %" and words[0].strip(".,;!") not in SYMBOLS:  # 6x, 6!, 6), 6-7
        match = UNIT.fullmatch(words[0])
        if not match or match.group(1) not in SYMBOLS:
            return False
    for word in words:
        match = UNIT.fullmatch(word)
        if not match or match.group(1) in AMOUNTS or (len(match.group(1)) == 1 and match.group(1) not in SYMBOLS):
            return False
    return True


def compare(answer: str, ground_truth: str) -> Score:
    """+1 if right, -1 if not. Fractions are worked out only where the ground truth is one, lest the policy learn to
    leave a last division to the verifier."""
    if len(ground_truth) > ANSWER_WINDOW:
        return Score(0.0, -1.0, normalise_answer(answer))
    fractions = bool(re.search(r"[0-9]/[0-9]|frac", ground_truth))
    pred = normalise_answer(answer, fractions)
    right = bool(pred) and pred == normalise_answer(ground_truth, fractions)
    return Score(acc=float(right), score=1.0 if right else -1.0, pred=pred)


def score_math(response: str, ground_truth: str) -> Score:
    """Judge the last `Answer: ...` line within a response's last 300 characters: +1 if right, -1 if not."""
    return compare(find_answer(response), ground_truth)


def score_math_strict_box(response: str, ground_truth: str) -> Score:
    """The same of the last \\boxed{...} within those: nothing else counts."""
    return compare(last_box(response[-ANSWER_WINDOW:]) or "", ground_truth)


@lru_cache(maxsize=256)
def parse_latex(text: str) -> list:
    """What math_verify reads in a text."""
    from math_verify import parse
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns that nothing limits its time
    return parse(text if re.search(r"\$|boxed|\\[(\[]", text) else f"${text}$", parsing_timeout=None)


def score_math_verify(response: str, ground_truth: str) -> Score:
    """The same line, or where there is none the last box, compared as mathematics by the library math_verify: LaTeX,
    sets, intervals, expressions. Without the library's own limits of time, which are signals: see judges.py."""
    from math_verify import verify
    answer = find_answer(response) or last_box(response[-ANSWER_WINDOW:]) or ""
    plain = compare(answer, ground_truth)
    if plain.acc or not plain.pred:
        return plain
    try:
        right = verify(parse_latex(ground_truth), parse_latex(answer), timeout_seconds=None)
    except MemoryError:
        raise
    except Exception:  # whatever sympy thinks of such a text
        right = False
    return Score(float(right), 1.0 if right else -1.0, plain.pred)


# ---- verifiers --------------------------------------------------------------------------------------------------

def load_verifier(name: str) -> Callable:
    """The verifier called `name`: built in, or `path/to/file.py:function`. Raises ValueError where there is none."""
    if name in ("math", "math_strict_box"):
        return globals()[f"score_{name}"]
    if name == "math_verify":
        score_math_verify("Answer: $\\sqrt{1}$", "2")  # a first time, which takes a second
        return score_math_verify
    if name == "toy":
        from toy import score
        return score
    path, _, function = name.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        raise ValueError(f"reward.name: {name!r} is neither {', '.join(BUILT_IN)} nor an existing "
                         "path/to/file.py:function")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
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
    wanted = arguments_of(verifier)
    columns = {key: value for key, value in row.items() if key not in ("response", "responses", "ground_truth") and (
        key in wanted or any(argument.kind is argument.VAR_KEYWORD for argument in wanted.values()))}
    try:
        verdicts = (verifier(list(responses), ground_truth, **columns) if is_batched(verifier) else
                    [verifier(response, ground_truth, **columns) for response in responses])
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(f"the reward function raised {type(error).__name__}: {error} "
                         f"at {Path(where.filename).name}:{where.lineno}") from error
    if isinstance(verdicts, (str, dict)) or not hasattr(verdicts, "__len__") or len(verdicts) != len(responses):
        raise ValueError(f"the reward function returned {repr(verdicts)[:60]}: a list of {len(responses)} verdicts is "
                         "expected of one whose first argument is `responses`")
    return [as_score(verdict) for verdict in verdicts]


def as_score(verdict) -> Score:
    """A number, a dict with `score`, or a `Score`, as a `Score` of plain numbers. Raises ValueError for anything else,
    and for numbers that are not finite."""
    try:
        fields = dict(verdict) if isinstance(verdict, dict) else dict(vars(verdict)) if isinstance(
            verdict, Score) else {"score": verdict}
        score = float(fields.pop("score"))
        acc, pred = float(fields.pop("acc", score > 0)), str(fields.pop("pred", ""))
        columns = {str(name): float(value) if hasattr(value, "__float__") else str(value)
                   for name, value in (fields.pop("columns", {}) | fields).items()}
    except (TypeError, ValueError, KeyError):
        raise ValueError(f"the reward function returned {repr(verdict)[:200]}: a number, a dict with `score`, or a "
                         "Score is expected") from None
    for name, value in {"score": score, "acc": acc, **columns}.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"the reward function returned {name}={value}")
    return Score(acc, score, pred, columns)


def weigh(scores: dict[str, Score], weights: Sequence[float]) -> Score:
    """The verdict of several verifiers: the sum of their scores, times their weights. What is right, and the answer,
    is the first one's affair. Each one's score becomes a column."""
    for no_verdict in (TIMED_OUT, FAILED):
        if no_verdict in scores.values():
            return no_verdict
    first = next(iter(scores.values()))
    columns = {name: score.score for name, score in scores.items()}
    for name, score in scores.items():
        columns |= {f"{name}/{key}": value for key, value in score.columns.items()}
    return Score(first.acc, sum(weight * score.score for weight, score in zip(weights, scores.values(), strict=True)),
                 first.pred, columns)


def mean_columns(scores: Sequence[Score]) -> dict[str, float]:
    """`verdict/<column>` for a verifier's own columns: the mean over the responses that have it as a number."""
    columns: dict[str, list[float]] = {}
    for score in scores:
        for name, value in score.columns.items():
            if isinstance(value, float):
                columns.setdefault(name, []).append(value)
    return {f"verdict/{name}": sum(values) / len(values) for name, values in columns.items()}
