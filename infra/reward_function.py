"""Loading a reward function by its name, and calling it.

A reward function of your own is `reward.name=path/to/file.py:function`. It is called as
`function(response, ground_truth, **columns)` with those of the row's columns that it names, or all
if it takes `**row`; an argument called `response_length` gets the response's length in tokens, EOS
included. A *group reward*, whose first argument is called `responses`, gets all responses of a
prompt (and the list of their lengths) and returns a list of scores. A score is a number; a dict
with `score` and optionally `acc`, `pred` and further values; or a `reward.Score`. An `async def`
function is awaited. Its imports find files beside it first, this repository's last.
"""

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Coroutine, Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from data_types import Score, Task
from infra.math_verify import score_math_verify
from reward import score_math, score_math_strict_box

BUILT_IN = {"math": score_math, "math_strict_box": score_math_strict_box,
            "math_verify": score_math_verify}
signature_of = lru_cache(inspect.signature)
LARGEST = 1e9  # a score: one of 1e300 would end in a gradient that is not finite
OURS = Path(__file__).resolve().parent.parent


def load_reward_function(name: str, example_rows: Sequence[dict] = ()) -> Callable:
    """The reward function called `name`. Raises ValueError if it cannot be loaded, or called with
    one of `example_rows`."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    path, _, function_name = name.rpartition(":")
    if not path.endswith(".py"):
        raise ValueError(f"reward.name: {name!r} is neither {', '.join(BUILT_IN)} nor "
                         "path/to/file.py:function")
    if not Path(path).is_file():
        raise ValueError(f"reward.name: {name!r}: there is no file {Path(path).absolute()}")
    try:
        module = import_file(Path(path).resolve())
    except (Exception, SystemExit) as error:
        raise ValueError(f"reward.name: cannot import {path}: "
                         f"{describe_error(error, str(Path(path).resolve()))}") from error
    if not callable(function := getattr(module, function_name, None)):
        raise ValueError(f"reward.name: {path} has no function {function_name!r}")
    if inspect.isfunction(type(function).__call__):
        function = function.__call__  # of an object, which need not be hashable
    try:
        signature_of(function)
    except ValueError:  # what is written in C may not tell its arguments
        function = type
    if (inspect.isclass(function) or inspect.isgeneratorfunction(function)
            or inspect.isasyncgenfunction(function)):
        raise ValueError(f"reward.name: {name} is a class, has a `yield`, or does not tell its "
                         "arguments: name a function that returns a score, or an object")
    first, *others = [*signature_of(function).parameters, ""]
    if "ground_truth" in others[1:] or first in ("data_source", "prompt", "prompts"):
        raise ValueError(f"reward.name: {name} takes ({', '.join([first, *others[:-1]])}), but is "
                         "called as function(response, ground_truth, **columns): write a function "
                         "around it (docs/REWARDS.md has one for verl's compute_score)")
    for row in example_rows:
        keyword_arguments(function, row)
    return function


def import_file(path: Path) -> ModuleType:
    """The module in a file. Its imports look beside it and above its package, then in libraries,
    then in the working directory, then here."""
    root = next(above for above in path.parents if not (above / "__init__.py").is_file())
    for name in ("reward", "data_types", "infra"):  # a file of the user's own, called like ours
        beside = {path.parent / f"{name}.py", path.parent / name / "__init__.py"} - {path}
        if path.parent != OURS and any(map(Path.is_file, beside)):
            for loaded in [key for key in sys.modules if key.partition(".")[0] == name]:
                del sys.modules[loaded]
    sys.path[:0] = [str(where) for where in dict.fromkeys([path.parent, root]) if where != OURS]
    sys.path.insert(-1, str(Path.cwd()))
    if root == path.parent and path.is_relative_to(Path.cwd()):
        root = Path.cwd()  # its directory may be a package without __init__.py
    name = ".".join(path.relative_to(root).with_suffix("").parts)
    name = name if "." in name else f"reward_{name}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # for dataclasses
    spec.loader.exec_module(module)
    return module


def is_group_reward(function: Callable) -> bool:
    """Whether a reward function scores all responses of a prompt in one call."""
    return next(iter(signature_of(function).parameters), "") == "responses"


def keyword_arguments(function: Callable, row: dict, length: int | list[int] = 0) -> dict:
    """What `function` gets besides the response and the ground truth: columns of `row`, lengths.

    Raises ValueError if it cannot be called so, above all if it names a column that `row` lacks.
    """
    signature = signature_of(function)
    names = list(signature.parameters)
    takes_all = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    arguments = {name: value for name, value in row.items()
                 if name in names[2:] or (takes_all and name not in names)}
    if "response_length" in names:
        arguments["response_length"] = length
    try:
        signature.bind("response", "ground_truth", **arguments)
    except TypeError as error:
        raise ValueError(
            "reward.name: the reward function is called as function(response, ground_truth, "
            f"**columns), and the data have the columns {', '.join(map(str, row))}: {error} (of "
            f"{signature}); give the argument a default, or add the column to the data") from None
    return arguments


def score_task(function: Callable, task: Task) -> list[Score]:
    """`await_scores` of a function that is not `async`."""
    return finish(await_scores(function, task))


def finish(coroutine: Coroutine) -> Any:
    """The result of a coroutine that waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value


async def await_scores(function: Callable, task: Task) -> list[Score]:
    """A score for each response of a prompt. Raises ValueError if the function fails, with the line
    in the function's own file, or if it returns something else than scores."""
    group = is_group_reward(function)
    calls = zip(task.responses, task.lengths, strict=True)
    values = []
    for response, length in [(task.responses, task.lengths)] if group else calls:
        arguments = keyword_arguments(function, task.row, length)
        try:
            value = function(response, task.ground_truth, **arguments)
            values.append(await value if inspect.iscoroutinefunction(function) else value)
        except Exception as error:
            module = sys.modules.get(getattr(function, "func", function).__module__)
            own_file = getattr(module, "__file__", None)
            raise ValueError("the reward function raised "
                             f"{describe_error(error, own_file)}") from error
    if group:
        (values,) = values
        if not hasattr(values, "__len__") or len(values) != len(task.responses):
            raise ValueError(f"the reward function returned {repr(values)[:60]}: as its first "
                             f"argument is called `responses`, a list of {len(task.responses)} "
                             "scores is expected")
    return [to_score(value) for value in values]


def describe_error(error: BaseException, own_file: str | None) -> str:
    """`KeyError: 'x' at mine.py:7`: the innermost line that lies in `own_file`, not in a library
    that it calls, as that is the line which the author of the reward function can change."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
             if frame.filename == own_file]
    where = f" at {Path(own_file).name}:{lines[-1]}" if lines else ""
    return f"{type(error).__name__}: {str(error)[:300]}{where}"


def to_score(value) -> Score:
    """A number, a dict with `score`, or a `Score`, as a `Score` of plain numbers.

    `acc` stays None if it is not stated: a positive score need not mean a right answer. Raises
    ValueError for anything else, and for numbers that advantages would overflow with.
    """
    if isinstance(value, Score):
        value = value.extra | {"score": value.score, "acc": value.acc, "pred": value.pred}
    try:
        fields = dict(value) if isinstance(value, dict) else {"score": value}
        score, acc, pred = (fields.pop(name, None) for name in ("score", "acc", "pred"))
        score, acc = float(score), None if acc is None else float(acc)
        extra = {str(name): float(number) if hasattr(number, "__float__") else str(number)
                 for name, number in fields.items()}
    except Exception:  # a tensor of several numbers raises an error of its own
        raise ValueError(f"the reward function returned {repr(value)[:200]}: a number, a dict with "
                         "`score`, or a Score is expected (a list only if its first argument is "
                         "called `responses`: it then gets all responses of a prompt)") from None
    if acc is not None and not 0 <= acc <= 1:
        raise ValueError(f"the reward function returned acc={acc}: correct (1) or not (0), or a "
                         "number between, is expected")
    for name, number in {"score": score, **extra}.items():
        if isinstance(number, float) and not abs(number) <= LARGEST:  # nan is not
            raise ValueError(f"the reward function returned {name}={number}: a finite number of at "
                             f"most {LARGEST:g} is expected")
    return Score(acc, score, "" if pred is None else str(pred), extra)
