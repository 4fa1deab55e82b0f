r"""What a response is worth: the built-in reward functions and the overlong penalty.

`math` is DAPO's published reward (section 2.4; `math_dapo` in the released code): +1 if the last
`Answer: ...` of a response's last 300 characters equals the ground truth, -1 if not, both in that
code's normal form: Minerva's (Lewkowycz et al. 2022, appendix D.1), but the word `ft` stays.
Departures:

- A full stop that ends an answer is dropped, also inside \boxed{6.}, $6.$ or \text{6.}.
- An empty or missing answer is never right, and its `pred` is "" instead of "[INVALID]".
- A ground truth of more than 300 characters is never right, so that the work is bounded.
- `math_strict_box` looks for the last \boxed{...} in the last 300 characters; published: 100.

How a reward function of your own is called, and what it may return: infra/reward_function.py.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

from data_types import Score

ANSWER_WINDOW = 300  # characters at the end of a response in which the answer must stand
ANSWER = re.compile(r"Answer\s*:\s*([^\n]+)", re.IGNORECASE)
SUBSTITUTIONS = [
    ("an ", ""), ("a ", ""), (".$", "$"), (r"\$", ""), ("\\ ", ""), (" ", ""), ("mbox", "text"),
    (r",\text{and}", ","), (r"\text{and}", ","), (r"\text{m}", r"\text{}")]
REMOVED_EXPRESSIONS = [
    "square", "ways", "integers", "dollars", "mph", "inches", "hours", "km", "units", r"\ldots",
    "sue", "points", "feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds",
    "meters", "meals", "edges", "students", "childrentickets", "multiples", r"\text{s}",
    r"\text{.}", "\\text{\ns}", r"\text{}^2", r"\text{}^3", "\\text{\n}", r"\text{}",
    r"\mathrm{th}", r"^\circ", r"^{\circ}", r"\;", r",\!", "{,}", '"', r"\dots"]
LATEX = [(re.compile(pattern, re.MULTILINE), plain) for pattern, plain in [
    (r"^[^$\n]*\$([^$\n]*)\$.*", r"$\1$"),  # only what the first pair of dollar signs encloses
    (r"\\text\{([^}\n]*)\}", r"\1"), (r"\\textbf\{([^}\n]*)\}", r"\1"),
    (r"\\overline\{([^}\n]*)\}", r"\1"), (r"\\boxed\{(.*)\}", r"\1"),
    (r"frac([^{])(.)", r"frac{\1}{\2}"), (r"sqrt([^{])", r"sqrt{\1}")]]


def overlong_penalty(response_len: int, max_response_length: int, overlong_buffer_len: int,
                     penalty_factor: float = 1.0) -> float:
    """Soft overlong punishment (equation 13; L_max is `max_response_length`, L_cache is
    `overlong_buffer_len`): 0 up to L_max - L_cache, then linear, and -penalty_factor from L_max on.
    Lengths in tokens."""
    excess = response_len - (max_response_length - overlong_buffer_len)
    return -min(max(excess / overlong_buffer_len, 0.0), 1.0) * penalty_factor


# ---- mathematics --------------------------------------------------------------------------------

def last_boxed(text: str) -> str:
    r"""The content of the last \boxed{...}; "" if there is none or its brace is not closed."""
    start, depth = text.rfind("\\boxed{"), 0
    for end in range(start + 6, len(text) if start >= 0 else 0):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            return text[start + 7:end]
    return ""


def extract_answer(response: str) -> str:
    """The text after the last `Answer:` of the last 300 characters; "" if there is none."""
    answers = ANSWER.findall(response[-ANSWER_WINDOW:])
    return answers[-1] if answers else ""


@lru_cache(maxsize=4096)
def normalize_answer(text: str) -> str:
    """An answer in the published rule's normal form; "" for more than 300 characters."""
    if len(text) > ANSWER_WINDOW:
        return ""
    text = text.rpartition("=")[2]
    for old, new in SUBSTITUTIONS + [(expression, "") for expression in REMOVED_EXPRESSIONS]:
        text = text.replace(old, new)
    for pattern, plain in LATEX:
        text = pattern.sub(plain, text)
    text = text.replace("$", "").strip().removesuffix(".")
    digits = text.replace(",", "")
    return digits if digits.isdigit() else text.strip()


def exact_match(pred: str, ground_truth: str) -> Score:
    """+1 if the two are equal and not empty, -1 if not."""
    right = pred != "" and pred == ground_truth
    return Score(acc=float(right), score=1.0 if right else -1.0, pred=pred)


def score_math(response: str, ground_truth: str) -> Score:
    """DAPO's published rule: the last `Answer:`, normalised and compared exactly."""
    return exact_match(normalize_answer(extract_answer(response)), normalize_answer(ground_truth))


def score_math_strict_box(response: str, ground_truth: str) -> Score:
    r"""The last \boxed{...} of the last 300 characters, compared exactly and not normalised."""
    return exact_match(last_boxed(response[-ANSWER_WINDOW:]), ground_truth)


# ---- one score of several reward functions ------------------------------------------------------

def failed_score(status: str, message: str) -> Score:
    """A wrong response, on which the reward function failed; `sampling.score_responses` gives it
    the lowest score of the others."""
    return Score(0.0, 0.0, status=status, message=message)


def weighted_sum(scores: dict[str, Score], weights: Sequence[float]) -> Score:
    """One score of several reward functions: the weighted sum of their scores. `acc` and `pred`
    are the first one's. Each function's score becomes the extra value `<name>/score`. If one
    fails, so does the sum: a policy gains nothing by it."""
    for name, score in scores.items():
        if score.status != "ok":
            return failed_score(score.status, f"{name}: {score.message}")
    total, extra = 0.0, {}
    for weight, (name, score) in zip(weights, scores.items(), strict=True):
        total += weight * score.score
        extra[f"{name}/score"] = score.score
        extra |= {f"{name}/{key}": value for key, value in score.extra.items()}
    first = next(iter(scores.values()))
    return Score(first.acc, total, first.pred, extra)


def mean_extra(scores: Sequence[Score]) -> dict[str, float]:
    """Metrics `reward/<name>`: the mean of each numeric extra value over scores that have it."""
    values: dict[str, list[float]] = {}
    for score in scores:
        for name, value in score.extra.items():
            if isinstance(value, float):
                values.setdefault(name, []).append(value)
    return {f"reward/{name}": sum(numbers) / len(numbers) for name, numbers in values.items()}
