"""How good is this text? Verifiers and the overlong penalty: text and numbers in, numbers out.

DAPO's reward is +1 for a right final answer and -1 for any other (section 2.4), plus a penalty near
the length limit (equation 13). Departures from the paper: a response of exactly the maximum length
gets the same -penalty_factor from both of the equation's branches, so one expression serves for both.

A verifier of your own: a function `score(response, ground_truth, **row)` in any Python file, named as
`reward.name=path/to/file.py:score`. It returns a number, or a `Score` where the accuracy is not simply
"the number is positive".
"""

import importlib.util
import math
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ANSWER_WINDOW = 300  # characters at the end of a response in which the answer must stand
ANSWER_LINE = re.compile(r"answer\s*:\s*([^\n]+)", re.IGNORECASE)
NUMBER = re.compile(r"[-+]?\d+(\.\d*)?|[-+]?\.\d+")


@dataclass(frozen=True)
class Score:
    """A verdict: `acc` is right (1) or wrong (0), `score` what it is worth, `pred` the answer that was read."""
    acc: float
    score: float
    pred: str = ""


TIMED_OUT = Score(0.0, -1.0, "(no verdict: the verifier took too long, or too much memory, or died)")


def overlong_penalty(response_len: int, max_response_length: int, overlong_buffer_len: int,
                     penalty_factor: float = 1.0) -> float:
    """Soft overlong punishment (equation 13): 0 up to the buffer's start, then falling in a straight line.

    Lengths in tokens. Returns a number in [-penalty_factor, 0]: -penalty_factor at `max_response_length`
    and, should a response be longer, beyond it.
    """
    excess = response_len - (max_response_length - overlong_buffer_len)
    return -min(max(excess / overlong_buffer_len, 0.0), 1.0) * penalty_factor


def normalise_answer(text: str) -> str:
    """An answer's plain form, for comparison: no mark-up, no thousands separators, numbers written one way."""
    text = text.strip().strip("*_`").strip()
    text = text.replace("\\$", "").replace("$", "").replace("\\!", "").replace("\\,", ",")
    boxed = re.fullmatch(r"\\(?:boxed|text|mathrm)\{([^{}]*)\}\.?", text.strip())
    text = (boxed.group(1) if boxed else text).strip().rstrip(".").strip()
    number = re.sub(r"(?<=\d),(?=\d{3})", "", text)
    if not NUMBER.fullmatch(number):
        return " ".join(text.lower().split())
    sign = "-" if number.startswith("-") else ""
    whole, _, fraction = number.lstrip("+-").partition(".")
    whole, fraction = whole.lstrip("0") or "0", fraction.rstrip("0")
    plain = f"{whole}.{fraction}" if fraction else whole
    return plain if plain == "0" else sign + plain


def score_math(response: str, ground_truth: str) -> Score:
    """Judge the last `Answer: ...` line within a response's last 300 characters: +1 if right, -1 if not."""
    answers = ANSWER_LINE.findall(response[-ANSWER_WINDOW:])
    pred = normalise_answer(answers[-1]) if answers else ""
    right = bool(pred) and pred == normalise_answer(ground_truth)
    return Score(acc=float(right), score=1.0 if right else -1.0, pred=pred)


def load_verifier(name: str) -> Callable:
    """The verifier called `name`: `math`, or `path/to/file.py:function`. Raises ValueError where there is none."""
    if name == "math":
        return lambda response, ground_truth, **row: score_math(response, ground_truth)
    path, _, function = name.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        raise ValueError(f"reward.name: {name!r} is neither `math` nor an existing path/to/file.py:function")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"reward.name: cannot import {path}: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, function, None)):
        raise ValueError(f"reward.name: {path} has no function {function!r}")
    return getattr(module, function)


def judge(verifier: Callable, response: str, ground_truth: str, row: dict) -> Score:
    """Call a verifier; a plain number becomes a `Score`. Raises ValueError where it fails or is not finite."""
    columns = {key: value for key, value in row.items() if key not in ("response", "ground_truth")}
    try:
        verdict = verifier(response, ground_truth, **columns)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        hint = " (it gets all of the row's columns: end its arguments with **row)" * ("keyword argument" in str(error))
        raise ValueError(f"the reward function raised {type(error).__name__}: {error}{hint} "
                         f"at {Path(where.filename).name}:{where.lineno}") from error
    try:
        if not isinstance(verdict, Score):
            verdict = Score(float(verdict) > 0, verdict)
        verdict = Score(float(verdict.acc), float(verdict.score), str(verdict.pred))
    except (TypeError, ValueError):
        raise ValueError(f"the reward function returned {verdict!r}: a number or a Score is expected") from None
    if not (math.isfinite(verdict.score) and math.isfinite(verdict.acc)):
        raise ValueError(f"the reward function returned {verdict.score} with accuracy {verdict.acc}")
    return verdict
