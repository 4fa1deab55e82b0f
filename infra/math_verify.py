r"""`reward.name=math_verify`: answers compared as mathematics.

The library of that name evaluates, rounds and drops what it cannot read, and a policy finds every
wrong answer that it calls right. So it is asked only about what no stricter rule decides: words;
numbers to another base and ratios, as they are written; plain numbers, by their exact value (0.333
is not 1/3, 2+3 is not 5, > 5 is not 5, 28% is 0.28 and 28, a unit does not count); lists without
brackets, pairs and intervals, part by part and in order. Sums, factorials and the like that the
ground truth lacks are work that the policy left.
"""

import logging
import re
from fractions import Fraction
from functools import lru_cache

from data_types import Score
from reward import ANSWER_WINDOW, last_boxed

ANSWER_LINE = re.compile(r"Answer[\s*]*:[\s*]*([^\n]+)", re.IGNORECASE)  # **Answer:** 6
NOTATION = [(re.compile(pattern), plain) for pattern, plain in [  # what makes no difference
    (r"\\\$|\\!|\\(?:left|right|displaystyle)(?![a-z])", ""), (r"(?<!\\)\\[()[\]]|\$\$", "$"),
    (r"^[A-Za-z\s,.:;'*]*\$([^$]*)\$[A-Za-z\s,.:;*]*$", r"\1"),  # words around a formula
    (r"\$", ""), (r"(?<!\\)\\[,;: ]|\\q?quad(?![a-z])|~", " "), (r"\{,\}", ","),
    (r"\\[dtc]frac", r"\\frac"), (r"\\frac\s*([0-9a-z])", r"\\frac{\1}"),
    (r"(\\frac\{[^{}]*\})\s*([0-9a-z])", r"\1{\2}"), (r"(?<=[0-9])i(?![a-z])", " i"),
    (r"\^(?:\\circ|\{\\circ\})|°", ""), (r"\\%|\s*(?:percent(?:age)?|pct)\b", "%"),
    ("\N{MINUS SIGN}", "-"), ("\N{MULTIPLICATION SIGN}", r"\\times "),
    (">=|≥", r"\\geq "), ("<=|≤", r"\\leq "), ("!=|≠", r"\\neq "),
    (r"(?<![A-Za-z\s])\s*\\approx.*", ""), (r"\\approx", "="),
    (r"(?:,\s*)?(?:\\text\w*\{,?\s*(?:and|or)\s*\}|\b(?:and|or)\b)", ", "),
    (r"(?<=[0-9])(?<![0-9]{4})[, ](?=(?:[0-9]{3}[, ])*[0-9]{3}(?![0-9,]))(?![^(\[]*[)\]])", ""),
    (r"(?<![0-9A-Za-z])\s+|\s+(?![0-9A-Za-z])|[\s.,;*]+$", "")]]
TEXT = re.compile(r"\\(?:text\w*|mbox|mathrm)\{([^{}]*)\}")
UNIT = re.compile(rf"(?<=[0-9}}%.])\s*(?:{TEXT.pattern}|[ckm]m|kg|(?:(?<=\}})| )[A-Za-z]{{3}}"
                  r"[A-Za-z .]*)(?:\^\{?[23]\}?)?$")
NUMBER = re.compile(  # 5, -1/3, 7 3/4, 3\times 10^8, 20%
    r"([-+]?) ?(?:([0-9]+) (?=[0-9]+/))?([0-9]+\.?[0-9]*|\.[0-9]+)(?:/(-?0*[1-9][0-9]*))?"
    r"(?:(?:e|(?:\\times|\\cdot|\*) ?10\^)\{?([-+]?[0-9]{1,3})\}?)?(%?)")
WORK = re.compile(
    r"\\(?:sum|int|prod|lim|d?t?binom|gcd|lcm|max|min|log|ln)(?![a-z])|(?<!\\)!|mod|choose|hal[fv]|"
    r"thirds|twice|minus|negative|root|squared|cubed|factorial|hundred|thousand|illion|dozen")
AS_WRITTEN = re.compile("[0-9]}?_|[0-9]:[0-9]")  # 17_8, 1:5
COMMA = re.compile(r"[,;](?![^(\[{]*[)\]}])")  # outside of brackets
PAIRS = re.compile(r"([(\[])([^()\[\]]*)([)\]])\n\1([^()\[\]]*)\3")  # two of the same brackets
SET = re.compile(r"\\\{.*\n|\n.*\\\{|(?:\\pm|[(\[]).*\n|=.*[,;].*=.*\n.*=")  # has no order


def answer_or_box(response: str) -> str:
    """What is compared: the last `Answer:` line, or the last box if that comes later."""
    tail = response[-ANSWER_WINDOW:]
    lines = [(-1, ""), *((match.start(), match[1]) for match in ANSWER_LINE.finditer(tail))]
    start, answer = lines[-1]
    box = last_boxed(tail) if tail.rfind("\\boxed{") > start else ""
    return (box or answer).strip(" *")


@lru_cache(maxsize=4096)
def plain_notation(text: str) -> str:
    """An answer without what makes no difference; "" for more than 300 characters."""
    text = (last_boxed(text) or text) if len(text) <= ANSWER_WINDOW else ""
    for pattern, plain in NOTATION:
        text = pattern.sub(plain, text)
    return text


def numbers_of(unread: str) -> list[Fraction]:
    """The value of a plain number; of 20% both 1/5 and 20; [] for anything else."""
    text = TEXT.sub(r"\1", UNIT.sub("", unread)).strip("(){} ")
    text = re.sub(r"\\frac\{([^{}]+)\}\{([^{}]+)\}?", r" \1/\2", text).strip()
    if WORK.search(unread) or not (match := NUMBER.fullmatch(text.replace("- -", ""))):
        return []
    sign, whole, number, divisor, exponent, percent = match.groups()
    value = Fraction(whole or 0) + Fraction(number) / Fraction(divisor or 1)
    value *= (-1 if sign == "-" else 1) * Fraction(10) ** int(exponent or 0)
    return [value / 100, value] if percent else [value]


def words_of(text: str) -> str:
    """The words of which an answer consists, in lower case; "" if it is anything else."""
    text = TEXT.sub(r"\1", text).strip("()\"'. ")
    return (text.lower() if len(text) > 1 else text) if re.fullmatch("[A-Za-z' -]+", text) else ""


def same_to_library(truth: str, answer: str) -> bool:
    """Whether the library calls two answers equal; decimals to 15 digits. infra/reward_pool.py sets
    the limit of time."""
    from math_verify import parse, verify
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # warns that there is no limit
    try:
        exprs = [parse(f"${text}$".replace("%", r"\%"), parsing_timeout=None)
                 for text in (truth, answer)]
        return verify(*exprs, float_rounding=15, timeout_seconds=None)
    except MemoryError:  # a failure of the worker, not a wrong answer
        raise
    except Exception:  # sympy raises anything on a malformed answer, which is then wrong
        return False


def is_equal(truth: str, answer: str) -> bool:
    """Whether two answers in plain notation are equal."""
    if truth == answer:
        return True
    if AS_WRITTEN.search(f"{truth} {answer}"):
        return len({re.sub(r"[{}\s]|\\text|.*=", "", text) for text in (truth, answer)}) == 1
    if pairs := PAIRS.fullmatch(f"{truth}\n{answer}"):
        return is_equal(pairs[2], pairs[4])
    truths, answers = COMMA.split(truth), COMMA.split(answer)
    if len(truths) > 1 or len(answers) > 1:
        if len(truths) == len(answers) and all(map(is_equal, truths, answers)):
            return True
        return bool(SET.search(f"{truth}\n{answer}")) and same_to_library(truth, answer)
    answer = answer if "=" in truth else answer.rpartition("=")[2]
    if (words := words_of(truth)) and (len(words) > 2 or words_of(answer)):
        return words == words_of(answer)
    if numbers := numbers_of(truth):
        return not {*numbers}.isdisjoint(numbers_of(answer))
    return same_to_library(truth, answer)


def score_math_verify(response: str, ground_truth: str) -> Score:
    """+1 if the response's answer is equal, -1 if not. Right answers have the same `pred`, and so
    have numbers of the same value."""
    raw, truth = answer_or_box(response), plain_notation(ground_truth)
    answer = plain_notation(raw)
    if WORK.search(raw) and not WORK.search(ground_truth):
        return Score(0.0, -1.0, raw)
    if answer and truth and is_equal(truth, answer):
        return Score(1.0, 1.0, truth)
    values = numbers_of(re.sub("^[^,;=]*=", "", answer))
    return Score(0.0, -1.0, str(values[0]) if values else answer)
