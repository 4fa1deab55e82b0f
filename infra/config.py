"""Reads config.yaml, a recipe and the command line into one checked namespace.

config.yaml is the schema: its keys are all the keys there are, its values the defaults, and the
brackets in its comments (`[float > 0]`, `[a | b]`) the types that every value is checked against.
The signs behind a bracket (`*` and `!`) are explained at the head of config.yaml.
"""

import argparse
import difflib
import json
import math
import operator
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import yaml

SCHEMA = Path(__file__).parent.parent / "config.yaml"
COMPARE = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
EMBEDDED_TASK = ("model.path", "data.train_file")  # the keys whose defaults are the embedded task


class KeyRule(NamedTuple):
    """What config.yaml says of a key: its value as text, and the `[type]*!` of its comment."""
    default: str
    type: str
    may_change: bool     # *: may differ when a run resumes from a checkpoint
    embedded_only: bool  # !: the default is right for the embedded task only


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a ValueError or OSError of the block into one line on stderr and exit code 1."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise SystemExit(tell_launcher(f"error: {escape_control(error)}")) from error


def tell_launcher(message: str) -> str | int:
    """Give the launcher of several processes what its report of their end, which comes last, shall
    say of this one. Returns the argument of SystemExit: the message, which Python then prints; 1 on
    a machine's other ranks, whose line is in that report; mostly it is the same on all."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": message, "timestamp": int(time.time())}))
            return message if os.environ.get("LOCAL_RANK", "0") == "0" else 1
    return message


def escape_control(text) -> str:
    """`text` with escapes for the characters that could steer a terminal or break the line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def compute_dtype(config: SimpleNamespace) -> str:
    """The type that the model computes in: that of autocast, else of its weights."""
    return {"bf16": "bfloat16", "fp16": "float16"}.get(config.mixed_precision, config.model.dtype)


@lru_cache
def stop_strings(text: str) -> tuple[str, ...]:
    """Those of `rollout.stop`: a JSON list of strings, or one string. Raises ValueError."""
    try:
        strings = json.loads(text, strict=False) if text.startswith('["') else [text] * bool(text)
    except ValueError:
        strings = [""]
    if not all(isinstance(string, str) and string for string in strings):
        raise ValueError(f'rollout.stop={text!r} is neither a string nor a JSON list of strings, '
                         r'such as ["\n\n", "Question:"]')
    return tuple(strings)


@lru_cache
def split_list(text: str) -> list[str]:
    """The parts of a value that commas separate, without blanks."""
    return [part.strip() for part in text.split(",") if part.strip()]


def read_command_line(description: str, training: bool = True) -> SimpleNamespace:
    """The config that `--config FILE [key.sub=value ...]` describes.

    If `training`, the process of rank 0 warns on stderr of values that only suit the embedded task.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", required=True, help="config.yaml, or a file of what differs")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="e.g. actor.lr=1e-4")
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
    rules, config = read_rules(), SimpleNamespace()
    defaults = {key: (SCHEMA.name, rule.default) for key, rule in rules.items()}
    for key, (source, text) in (defaults | read_given(path, overrides)).items():
        if text == "" and any(name.startswith(f"{key}.") for name in rules):
            continue  # a section, all of whose keys are commented out
        if key not in rules:
            nearest = " or ".join(nearest_keys(key, rules))
            raise ValueError(f"{source}: unknown config key {key}: "
                             f"{f'did you mean {nearest}? ' * bool(nearest)}"
                             "config.yaml lists every key")
        section, _, leaf = key.rpartition(".")
        values = vars(config).setdefault(section, SimpleNamespace()) if section else config
        setattr(values, leaf, parse_value(f"{source}: config key {key}", text, rules[key].type))
    check_config(config)
    return config


def nearest_keys(key: str, rules: Iterable[str]) -> list[str]:
    """The keys that an unknown one probably stands for: of the same name in another section (such
    as verl's `actor_rollout_ref.rollout.n`), or else spelt alike."""
    same = [rule for rule in rules if rule.rpartition(".")[2] == key.rpartition(".")[2]]
    inside = [rule for rule in same if key.endswith(f".{rule}")]
    return inside or same or difflib.get_close_matches(key, rules, 1, cutoff=0.8)


def read_given(path: str | Path, overrides: Sequence[str]) -> dict[str, tuple[str | Path, str]]:
    """What a recipe and the command line set: (source, text) by dotted key."""
    is_recipe = Path(path).resolve() != SCHEMA.resolve()
    given = {key: (path, node.value) for key, node in read_nodes(path).items() if is_recipe}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"command line: {override!r} is not of the form key.sub=value")
        if key == "data.prompt_template":  # a shell leaves \n as it is
            text = text.replace(r"\n", "\n")
        given[key] = ("command line", text)
    return given


def read_nodes(path: str | Path) -> dict[str, yaml.Node]:
    """The values of a config file by dotted key. A scalar node has its text and its line."""
    try:
        with open(path, encoding="utf-8") as file:
            root = yaml.compose(file)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}: --config names config.yaml, or a recipe "
                         "such as those in configs/") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path}: no `key: value` lines")
    nodes = {}
    for name, node in root.value:
        is_section = isinstance(node, yaml.MappingNode)
        for leaf, value in node.value if is_section else [(name, node)]:
            key = f"{name.value}.{leaf.value}" if is_section else name.value
            if not isinstance(value, yaml.ScalarNode):
                raise ValueError(f"{path}:{leaf.start_mark.line + 1}: {key} must be one value")
            if key in nodes:  # yaml alone would keep the last
                raise ValueError(f"{path}:{leaf.start_mark.line + 1}: {key} is there twice")
            nodes[key] = value
    return nodes


def read_rules() -> dict[str, KeyRule]:
    """The rules of config.yaml by dotted key. Raises ValueError for a key without a type."""
    rules, lines = {}, SCHEMA.read_text(encoding="utf-8").splitlines()
    for key, node in read_nodes(SCHEMA).items():
        bracket = re.search(r"# \[(.*?)\](\*?)(!?)", lines[node.start_mark.line])
        if not bracket:
            raise ValueError(f"key {key} in config.yaml needs a comment with its [type], for "
                             "example `# [float >= 0] what it does` ([int >= 1], [a | b], ...)")
        rules[key] = KeyRule(node.value, bracket[1], bool(bracket[2]), bool(bracket[3]))
    return rules


def embedded_task_warning(path: str | Path, overrides: Sequence[str] = ()) -> str:
    """Names the keys that still have the embedded task's values for another model or other data.

    These are the keys with a `!` in config.yaml that neither the recipe nor the command line sets.
    "" if there are none, or if model and training data are the embedded task's.
    """
    rules, given = read_rules(), read_given(path, overrides)
    other = [key for key in EMBEDDED_TASK if key in given and given[key][1] != rules[key].default]
    off = {key.rpartition(".")[0] for key, (_, text) in given.items()
           if key.endswith(".enable") and text.lower() == "false"}
    kept = [f"{key}={rule.default}" for key, rule in rules.items()
            if rule.embedded_only and key not in given and key.rpartition(".")[0] not in off]
    if not other or not kept:
        return ""
    return (f"{' and '.join(other)} set, but these keys still have the embedded task's values: "
            f"{', '.join(kept)}: set them too (config.yaml names the paper's values)")


def value_of_set(value: float | str, i: int) -> int | float:
    """The value for validation set `i` of a key that may have one for each."""
    return json.loads(value.split(",")[i]) if isinstance(value, str) else value


def longest_response(config: SimpleNamespace) -> int:
    """Tokens of the longest response, in training or validation."""
    lengths = str(config.val.max_response_length).split(",")
    return max(config.data.max_response_length, *map(int, lengths))


def flatten(config: SimpleNamespace) -> dict:
    """The values of a config by dotted key: `actor.lr` -> 1e-6."""
    flat = {}
    for name, value in vars(config).items():
        if isinstance(value, SimpleNamespace):
            flat |= {f"{name}.{leaf}": leaf_value for leaf, leaf_value in vars(value).items()}
        else:
            flat[name] = value
    return flat


def config_diff(earlier: dict, config: SimpleNamespace, every_key: bool = False) -> list[str]:
    """The keys, as `key: earlier -> now`, that make `config` another run than `earlier` (flat); or
    `every_key` that differs."""
    now, rules = flatten(config), read_rules()
    earlier = flatten(load_config(SCHEMA)) | earlier  # a key that is new since had its default
    return [f"{key}: {earlier.get(key)} -> {now.get(key)}"
            for key in sorted(earlier.keys() | now.keys())
            if earlier.get(key) != now.get(key)
            and (every_key or not (key in rules and rules[key].may_change))]


def parse_value(location: str, text: str, type: str) -> bool | int | float | str:
    """`text` as `type` asks for: `int >= 1`, `bool`, `str`, `a | b`, `a | int`, `int, ...`: one for
    each of val.file, separated by commas, which stay a text if there are several.

    Raises ValueError, which begins with `location`.
    """
    if type.endswith(", ...") and len(parts := split_list(text)) > 1:
        return ",".join(str(parse_value(location, part, type[:-5])) for part in parts)
    type = type.removesuffix(", ...")
    for option in type.split(" | "):
        kind, *bounds = option.split()
        if kind == "str" or text == option:
            return os.path.expanduser(text) if text.startswith("~/") else text
        if kind == "bool" and text.lower() in ("true", "false"):
            return text.lower() == "true"
        try:
            value = {"int": int, "float": float}[kind](text)
        except (KeyError, ValueError):
            continue
        limits = zip(bounds[::2], map(float, bounds[1::2]), strict=True)
        if math.isfinite(value) and all(COMPARE[sign](value, limit) for sign, limit in limits):
            return value
    expected = "true | false" if type == "bool" else type
    raise ValueError(f"{location}: {text!r} is not {expected}")


def attempt(parse: Callable[[], Any]) -> Any:
    """What it returns; None if it cannot be parsed."""
    with suppress(ValueError, RecursionError, re.error):
        return parse()


def check_config(config: SimpleNamespace) -> None:
    """Raise ValueError if values that are each legal contradict each other."""
    data, actor, rollout = config.data, config.actor, config.rollout
    buffer, names = config.overlong_buffer, split_list(config.reward.name)
    responses = data.train_batch_size * rollout.n
    most = config.filter_groups.max_num_gen_batches * (
        0 if data.gen_batch_size == "auto" else data.gen_batch_size)
    groups = attempt(lambda: re.compile(data.answer_regex).groups) if data.answer_regex else 1
    template_kwargs = attempt(lambda: json.loads(data.chat_template_kwargs or "{}"))
    weights = attempt(lambda: [float(weight) for weight in split_list(config.reward.weights)])
    stop_strings(rollout.stop)
    sets = len(split_list(config.val.file))
    unequal = [f"val.{key}={value}" for key, value in vars(config.val).items() if key in (
        "n", "temperature", "top_p", "max_response_length") and isinstance(value, str)
               and len(value.split(",")) != sets]
    urls = [re.fullmatch(r"https?://[^/,\s]+", url) for url in rollout.server_urls.split(",")]
    problems = [problem for is_wrong, problem in [
        (buffer.enable and buffer.len > data.max_response_length,
         f"overlong_buffer.len={buffer.len} is longer than data.max_response_length="
         f"{data.max_response_length}: every response would be penalised; make it smaller"),
        (responses % actor.ppo_mini_batch_size,
         f"actor.ppo_mini_batch_size={actor.ppo_mini_batch_size} does not divide the {responses} "
         "responses of a step (data.train_batch_size * rollout.n): set it to a divisor of them, "
         f"such as {math.gcd(responses, actor.ppo_mini_batch_size)}"),
        (config.filter_groups.enable and 0 < most < data.train_batch_size,
         f"filter_groups.max_num_gen_batches * data.gen_batch_size = {most} prompts can never "
         f"fill data.train_batch_size={data.train_batch_size}: raise one of the two"),
        (not split_list(data.train_file), "data.train_file names no file"),
        ("{prompt}" not in data.prompt_template,
         "data.prompt_template has no {prompt}: every prompt would be the same"),
        (not groups, f"data.answer_regex {data.answer_regex!r} is not a regular expression with a "
         "group: put the answer in parentheses"),
        (not split_list(data.answer_key) and any(":" not in name for name in names),
         f"data.answer_key is empty, and reward.name={config.reward.name} needs answers"),
        (not isinstance(template_kwargs, dict),
         f"data.chat_template_kwargs={data.chat_template_kwargs!r} is not a JSON object"),
        (not weights or len(weights) != len(names) or not all(map(math.isfinite, weights)),
         f"reward.weights={config.reward.weights!r}: a number for each of the {len(names)} of "
         "reward.name is expected, separated by commas"),
        (unequal, f"{', '.join(unequal)}: one value, or one for each of the {sets} of val.file"),
        (rollout.correction != "off" and actor.old_logprobs == "rollout",
         "rollout.correction compares the trainer's old log-probs with the sampler's: it needs "
         "actor.old_logprobs=recompute"),
        (rollout.mode == "server" and not all(urls),
         f"rollout.server_urls={rollout.server_urls!r}: rollout.mode=server wants http://host:port "
         "of each server, separated by commas"),
        (rollout.mode == "server" and rollout.tensor_parallel_size > 1,
         "rollout.tensor_parallel_size is for rollout.mode=colocate: set it to 1, and give "
         "--tensor-parallel-size to the server instead"),
        (0 < actor.clip_ratio_c <= 1,
         f"actor.clip_ratio_c={actor.clip_ratio_c} must be above 1, or 0 (off)"),
    ] if is_wrong]
    if problems:
        raise ValueError("; and ".join(problems))
