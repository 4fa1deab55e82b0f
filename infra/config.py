"""Reads config.yaml, a recipe and the command line into one checked namespace.

config.yaml is the schema: its keys are all the keys there are, its values the defaults, and the
brackets in its comments (`[float > 0]`, `[a | b]`) the types that every value is checked against.
The signs behind a bracket (`*` and `!`) are explained at the head of config.yaml.
"""

import argparse
import difflib
import math
import operator
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import yaml

SCHEMA = Path(__file__).parent.parent / "config.yaml"
COMPARE = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
EMBEDDED_TASK = ("model.path", "data.train_file")  # the keys whose defaults are the embedded task


class Rule(NamedTuple):
    """What the comment of a key in config.yaml says: `[type]*! ... Paper: value`."""
    type: str
    may_change: bool     # *: may differ when a run resumes from a checkpoint
    embedded_only: bool  # !: the default is right for the embedded task only
    paper: str | None    # the paper's value, if the comment names one


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a ValueError or OSError of the block into one line on stderr and exit code 1."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {escape_control(error)}") from error


def escape_control(text) -> str:
    """`text` with escapes for the characters that could steer a terminal or break the line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


@lru_cache
def split_list(text: str) -> list[str]:
    """The parts of a value that commas separate, without blanks."""
    return [part.strip() for part in text.split(",") if part.strip()]


def read_command_line(description: str, training: bool = True) -> SimpleNamespace:
    """The config that `--config FILE [key.sub=value ...]` describes.

    If `training`, the process of rank 0 warns on stderr of values that only suit the embedded task.
    """
    parser = argparse.ArgumentParser(
        description=description, epilog="config.yaml explains every key.")
    parser.add_argument("--config", required=True,
                        help="config.yaml, or a file that lists what differs from it")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value",
                        help="e.g. actor.lr=1e-4 run_dir=runs/mine")
    args = parser.parse_intermixed_args()
    with one_line_errors():
        config = load_config(args.config, args.overrides)
        warning = embedded_task_warning(args.config, args.overrides)
    if training and warning and os.environ.get("RANK", "0") == "0":
        print(f"warning: {escape_control(warning)}", file=sys.stderr)
    return config


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> SimpleNamespace:
    """Defaults from config.yaml, then the file `path`, then `key.sub=value` overrides.

    Raises ValueError for a key that does not exist, a value of another type, or values that
    contradict each other.
    """
    rules, defaults, config = read_rules(), read_yaml(SCHEMA), SimpleNamespace()
    for key in defaults.keys() - rules.keys():
        raise ValueError(
            f"key {key} in config.yaml needs a comment with its [type], for example "
            f"`# [float >= 0] what it does` ([int >= 1], [bool], [str], [a | b], ...)")
    sources = [(SCHEMA.name, defaults), (path, read_yaml(path)),
               ("command line", dict(map(split_override, overrides)))]
    for source, given in sources:
        for key, text in given.items():
            if text == "" and any(name.startswith(f"{key}.") for name in rules):
                continue  # a section, all of whose keys are commented out
            if key not in rules:
                raise ValueError(f"{source}: unknown config key {key}: {nearest(key, rules)}")
            section, _, leaf = key.rpartition(".")
            if section and not hasattr(config, section):
                setattr(config, section, SimpleNamespace())
            value = parse_value(f"{source}: config key {key}", text, rules[key].type)
            setattr(getattr(config, section) if section else config, leaf, value)
    check_config(config)
    return config


def embedded_task_warning(path: str | Path, overrides: Sequence[str] = ()) -> str:
    """Names the keys that still have the embedded task's values for another model or other data.

    These are the keys with a `!` in config.yaml that neither the recipe nor the command line sets.
    "" if there are none, or if model and training data are the embedded task's.
    """
    defaults, rules = read_yaml(SCHEMA), read_rules()
    recipe = {} if Path(path).resolve() == SCHEMA.resolve() else read_yaml(path)
    given = recipe | dict(map(split_override, overrides))
    other = [key for key in EMBEDDED_TASK if given.get(key, defaults[key]) != defaults[key]]
    kept = [f"{key}={defaults[key]} (paper: {rule.paper})" for key, rule in rules.items()
            if rule.embedded_only and key not in given]
    if not other or not kept:
        return ""
    return (f"{' and '.join(other)} {'is' if len(other) == 1 else 'are'} not the embedded task's, "
            f"but these keys still have its values: {', '.join(kept)}: set them")


def flatten(config: SimpleNamespace | dict) -> dict:
    """The values of a config by dotted key: `actor.lr` -> 1e-6."""
    flat = {}
    for name, value in (config if isinstance(config, dict) else vars(config)).items():
        if isinstance(value, dict | SimpleNamespace):
            flat |= {f"{name}.{key}": leaf for key, leaf in flatten(value).items()}
        else:
            flat[name] = value
    return flat


def config_diff(earlier: dict, config: SimpleNamespace) -> list[str]:
    """The keys, as `key: earlier -> now`, that make `config` another run than `earlier` (flat)."""
    now, rules = flatten(config), read_rules()
    earlier = flatten(load_config(SCHEMA)) | earlier  # a key that is new since had its default
    return [f"{key}: {earlier.get(key)} -> {now.get(key)}"
            for key in sorted(earlier.keys() | now.keys())
            if earlier.get(key) != now.get(key) and not (key in rules and rules[key].may_change)]


def read_yaml(path: str | Path) -> dict[str, str]:
    """The scalars of a config file as text, by dotted key; `parse_value` gives them their types."""
    try:
        sections = yaml.load(Path(path).read_text(encoding="utf-8"), UniqueKeyLoader)
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        raise ValueError(f"{path}{f':{mark.line + 1}' if mark else ''}: not valid YAML: "
                         f"{getattr(error, 'problem', None) or error}") from None
    if not isinstance(sections, dict):
        raise ValueError(f"{path}: no `key: value` lines")
    return flatten(sections)


class UniqueKeyLoader(yaml.BaseLoader):
    """Scalars stay text. A key that stands twice is an error; yaml alone would keep the last."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value} is there twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_rules() -> dict[str, Rule]:
    """What the comments of config.yaml say, by dotted key; keys without a bracket are left out."""
    comments, section, key = {}, "", ""  # comments: the line of a key and those that continue it
    for line in SCHEMA.read_text(encoding="utf-8").splitlines():
        if match := re.match(r"( *)(\w+):", line):
            indent, name = match.groups()
            section = section if indent else name
            key = f"{section}.{name}" if indent else name
        comments[key] = f"{comments.get(key, '')} {line.strip(' #')}".strip()
    rules = {}
    for key, comment in comments.items():
        if key and (match := re.search(r"# \[(.*?)\](\*?)(!?)", comment)):
            paper = re.search(r"Paper(?: \(its code\))?: +([^,;]+)", comment)
            rules[key] = Rule(match[1], bool(match[2]), bool(match[3]), paper and paper[1])
    return rules


def split_override(text: str) -> tuple[str, str]:
    """`actor.lr=1e-6` -> (`actor.lr`, `1e-6`)."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"command line: {text!r} is not of the form key.sub=value")
    return key, value


def parse_value(location: str, text: str, type: str) -> bool | int | float | str:
    """`text` as `type` asks for: `int >= 1`, `bool`, `str`, `a | b`, `a | int`.

    Raises ValueError, which begins with `location`.
    """
    for option in type.split(" | "):
        kind, *bounds = option.split()
        try:
            if kind == "str" and isinstance(text, str):
                return text
            if kind == "bool":
                return {"true": True, "false": False}[text.lower()]
            if kind in ("int", "float"):
                value = int(text) if kind == "int" else float(text)
                limits = zip(bounds[::2], map(float, bounds[1::2]), strict=True)
                within = all(COMPARE[sign](value, limit) for sign, limit in limits)
                if within and math.isfinite(value):
                    return value
            elif text == option:
                return text
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
    type = "true | false" if type == "bool" else type
    raise ValueError(f"{location}: {text!r} is not {'one of' if '|' in type else 'of type'} {type}")


def nearest(key: str, keys: Iterable[str]) -> str:
    """Advice that names the legal key most like `key`, whose section may be missing or wrong."""
    by_last = {name.rpartition(".")[2]: name for name in keys}
    if close := difflib.get_close_matches(key, keys, 1, 0.8):
        return f"did you mean {close[0]}?"
    if close := difflib.get_close_matches(key.rpartition(".")[2], by_last, 1, 0.7):
        return f"did you mean {by_last[close[0]]}?"
    return "config.yaml, as published, lists every key"


def check_config(config: SimpleNamespace) -> None:
    """Raise ValueError if values that are each legal contradict each other."""
    data, actor, rollout = config.data, config.actor, config.rollout
    buffer, filter_groups = config.overlong_buffer, config.filter_groups
    if buffer.enable and buffer.len > data.max_response_length:
        raise ValueError(
            f"overlong_buffer.len={buffer.len} is longer than data.max_response_length="
            f"{data.max_response_length}: every response would be penalised; make it smaller")
    responses, mini = data.train_batch_size * rollout.n, actor.ppo_mini_batch_size
    if responses % mini:
        divisors = [d for d in range(1, responses + 1) if responses % d == 0]
        divisor = min(divisors, key=lambda d: abs(d - mini))
        raise ValueError(
            f"actor.ppo_mini_batch_size={mini} does not divide the {responses} responses of a step "
            f"(data.train_batch_size * rollout.n): {divisor} would")
    prompts = 0 if data.gen_batch_size == "auto" else data.gen_batch_size
    most = filter_groups.max_num_gen_batches * prompts
    if filter_groups.enable and 0 < most < data.train_batch_size:
        raise ValueError(
            f"filter_groups.max_num_gen_batches * data.gen_batch_size = {most} prompts can never "
            f"fill data.train_batch_size={data.train_batch_size}: raise one of the two")
    if not split_list(data.train_file):
        raise ValueError("data.train_file names no file")
    if "{prompt}" not in data.prompt_template:
        raise ValueError("data.prompt_template has no {prompt}: every prompt would be the same")
    regex = f"data.answer_regex {data.answer_regex!r}"
    try:
        groups = re.compile(data.answer_regex).groups
    except re.error as error:
        raise ValueError(f"{regex} is no regular expression: {error}") from None
    if data.answer_regex and not groups:
        raise ValueError(f"{regex} has no group: put the answer in parentheses")
    check_weights(config.reward)
    if rollout.correction != "off" and actor.old_logprobs == "rollout":
        raise ValueError("rollout.correction compares the trainer's old log-probs with the "
                         "sampler's: it needs actor.old_logprobs=recompute")
    if rollout.mode == "server":
        urls = rollout.server_urls.split(",")
        if not all(re.fullmatch(r"https?://[^/,\s]+", url) for url in urls):
            raise ValueError(f"rollout.server_urls={rollout.server_urls!r}: rollout.mode=server "
                             "wants http://host:port of each server, separated by commas")
        if rollout.tensor_parallel_size > 1:
            raise ValueError("rollout.tensor_parallel_size is for rollout.mode=colocate: set it to "
                             "1, and give --tensor-parallel-size to the server instead")
    if 0 < actor.clip_ratio_c <= 1:
        raise ValueError(f"actor.clip_ratio_c={actor.clip_ratio_c} must be above 1, or 0 (off)")


def check_weights(reward: SimpleNamespace) -> None:
    """Raise ValueError unless `reward.weights` holds a finite number for each of `reward.name`."""
    names = split_list(reward.name)
    try:
        finite = [math.isfinite(float(weight)) for weight in split_list(reward.weights)]
    except ValueError:
        finite = []
    if not finite or not all(finite) or len(finite) != len(names):
        raise ValueError(f"reward.weights={reward.weights!r}: a number for each of the "
                         f"{len(names)} of reward.name is expected, separated by commas")
