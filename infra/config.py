"""What may be set, and to what? Reads config.yaml, a recipe and the command line into one checked namespace.

config.yaml is the schema: its keys are all the keys there are, its values the defaults, and the brackets
in its comments (`[float > 0]`, `[a | b]`) the types that every value is held to, its own included. A star
behind them (`[int >= 1]*`) marks what may differ when a run goes on from a checkpoint.
"""

import argparse
import difflib
import math
import operator
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import yaml

SCHEMA = Path(__file__).parent.parent / "config.yaml"
COMPARE = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Around what depends on the user's input: an error there is one line on stderr, and exit code 1."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {escape_control(error)}") from error


def escape_control(text) -> str:
    """`text` without what could steer a terminal, or break its line: such characters as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


@lru_cache
def split_list(text: str) -> list[str]:
    """The parts of a value that commas separate."""
    return [part.strip() for part in text.split(",") if part.strip()]


def read_command_line(description: str) -> SimpleNamespace:
    """The config that `--config FILE [key.sub=value ...]` describes."""
    parser = argparse.ArgumentParser(description=description, epilog="config.yaml explains every key.")
    parser.add_argument("--config", required=True, help="config.yaml, or a file that lists what differs from it")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="e.g. actor.lr=1e-4 run_dir=runs/mine")
    args = parser.parse_intermixed_args()
    with one_line_errors():
        return load_config(args.config, args.overrides)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> SimpleNamespace:
    """Defaults from config.yaml, then `path`, then `key.sub=value` overrides.

    Raises ValueError for a key that does not exist, a value of another type, or values that contradict
    each other.
    """
    rules, values = read_rules(), {}
    for source, given in ((SCHEMA.name, read_yaml(SCHEMA)), (path, read_yaml(path)),
                          ("command line", dict(map(split_override, overrides)))):
        for key, text in given.items():
            if text == "" and any(rule.startswith(f"{key}.") for rule in rules):
                continue  # a section, all of whose keys are commented out
            if key not in rules:
                raise ValueError(f"{source}: unknown config key {key}: {nearest(key, rules)}")
            values[key] = parse_value(f"{source}: config key {key}", text, rules[key])
    config = SimpleNamespace()
    for key, value in values.items():
        section, _, leaf = key.rpartition(".")
        if section and not hasattr(config, section):
            setattr(config, section, SimpleNamespace())
        setattr(getattr(config, section) if section else config, leaf, value)
    check_config(config)
    return config


def flatten(config: SimpleNamespace) -> dict[str, bool | int | float | str]:
    """The values by dotted key: `actor.lr` -> 1e-6."""
    return {f"{section}.{key}" if key else section: leaf for section, value in vars(config).items()
            for key, leaf in (vars(value) if isinstance(value, SimpleNamespace) else {"": value}).items()}


def config_diff(earlier: dict, config: SimpleNamespace) -> list[str]:
    """The keys, as `key: earlier -> now`, in which `config` makes another run than the flat config `earlier` did."""
    now, free = flatten(config), read_rules(free=True)
    earlier = flatten(load_config(SCHEMA)) | earlier  # a key that was not there yet had its default
    return [f"{key}: {earlier.get(key)} -> {now.get(key)}" for key in sorted(earlier.keys() | now.keys())
            if key not in free and earlier.get(key) != now.get(key)]


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
    flat = {}
    for section, value in sections.items():
        for key, leaf in value.items() if isinstance(value, dict) else [("", value)]:
            flat[f"{section}.{key}".rstrip(".")] = leaf
    return flat


class UniqueKeyLoader(yaml.BaseLoader):
    """Scalars stay text; a key that is written twice is an error, where yaml would keep the last one silently."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        for i, (key, _) in enumerate(node.value):
            if key.value in keys[:i]:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is there twice", key.start_mark)
        return super().construct_mapping(node, deep)


def read_rules(free: bool = False) -> dict[str, str]:
    """What the brackets of config.yaml say of each key: `actor.lr` -> `float > 0`. `free`: of those with a star."""
    rules, section = {}, ""
    for line in SCHEMA.read_text(encoding="utf-8").splitlines():
        if match := re.match(r"( *)(\w+):", line):
            indented, name = match.groups()
            section = section if indented else name
            if (rule := re.search(r"# \[(.*?)\](\*?)", line)) and (rule.group(2) or not free):
                rules[f"{section}.{name}" if indented else name] = rule.group(1)
    return rules


def split_override(text: str) -> tuple[str, str]:
    """`actor.lr=1e-6` -> (`actor.lr`, `1e-6`)."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"command line: {text!r} is not of the form key.sub=value")
    return key, value


def parse_value(place: str, text: str, rule: str) -> bool | int | float | str:
    """`text` as `rule` (`int >= 1`, `bool`, `str`, `a | b`, `a | int`) asks for. Raises ValueError, with `place`."""
    for option in rule.split(" | "):
        kind, *bounds = option.split()
        try:
            if kind == "str" and isinstance(text, str):
                return text
            if kind == "bool":
                return {"true": True, "false": False}[text.lower()]
            if kind in ("int", "float"):
                value = int(text) if kind == "int" else float(text)
                limits = zip(bounds[::2], map(float, bounds[1::2]), strict=True)
                if math.isfinite(value) and all(COMPARE[sign](value, limit) for sign, limit in limits):
                    return value
            elif text == option:
                return text
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
    rule = "true | false" if rule == "bool" else rule
    raise ValueError(f"{place}: {text!r} is not {'one of' if '|' in rule else 'of type'} {rule}")


def nearest(key: str, keys: Iterable[str]) -> str:
    """The legal key that `key` was probably meant to be, by its last part first: the section is easily left out."""
    def last(name: str) -> str:
        return name.rpartition(".")[2]
    best = max(sorted(keys), key=lambda k: (difflib.SequenceMatcher(None, last(k), last(key)).ratio(),
                                            difflib.SequenceMatcher(None, k, key).ratio()))
    close = difflib.SequenceMatcher(None, last(best), last(key)).ratio() > 0.7
    return f"did you mean {best}?" if close else "config.yaml, as published, lists every key"


def check_config(config: SimpleNamespace) -> None:
    """Raise ValueError where values that are each legal contradict each other."""
    responses, mini = config.data.train_batch_size * config.rollout.n, config.actor.ppo_mini_batch_size
    if config.overlong_buffer.enable and config.overlong_buffer.len > config.data.max_response_length:
        raise ValueError(f"overlong_buffer.len={config.overlong_buffer.len} is longer than data.max_response_length="
                         f"{config.data.max_response_length}: every response would be penalised; make it smaller")
    if responses % mini:
        divisors = [d for d in range(1, responses + 1) if responses % d == 0]
        raise ValueError(f"actor.ppo_mini_batch_size={mini} does not divide the {responses} responses of a step "
                         f"(data.train_batch_size * rollout.n): {min(divisors, key=lambda d: abs(d - mini))} would")
    given = 0 if config.data.gen_batch_size == "auto" else config.data.gen_batch_size
    most = config.filter_groups.max_num_gen_batches * given
    if config.filter_groups.enable and 0 < most < config.data.train_batch_size:
        raise ValueError(f"filter_groups.max_num_gen_batches * data.gen_batch_size = {most} prompts can never fill "
                         f"data.train_batch_size={config.data.train_batch_size}: raise one of the two")
    check_lists(config)
    if "{prompt}" not in config.data.prompt_template:
        raise ValueError("data.prompt_template has no {prompt}: every prompt would be the same")
    try:
        groups = re.compile(config.data.answer_regex).groups
    except re.error as error:
        raise ValueError(f"data.answer_regex {config.data.answer_regex!r} is no regular expression: {error}") from None
    if config.data.answer_regex and not groups:
        raise ValueError(f"data.answer_regex {config.data.answer_regex!r} has no group: put the answer in parentheses")
    if config.rollout.correction != "off" and config.actor.old_logprobs == "rollout":
        raise ValueError("rollout.correction compares the trainer's old log-probs with the sampler's: it needs "
                         "actor.old_logprobs=recompute")
    rollout = config.rollout
    if rollout.mode == "server":
        if not all(re.fullmatch(r"https?://[^/,\s]+", url) for url in rollout.server_urls.split(",")):
            raise ValueError(f"rollout.server_urls={rollout.server_urls!r}: rollout.mode=server wants http://host:port "
                             "of each server, separated by commas")
        if rollout.tensor_parallel_size > 1:
            raise ValueError("rollout.tensor_parallel_size is for rollout.mode=colocate; a server has an option of "
                             "its own, --tensor-parallel-size: set it to 1 here")
    if 0 < config.actor.clip_ratio_c <= 1:
        raise ValueError(f"actor.clip_ratio_c={config.actor.clip_ratio_c} must be above 1, or 0 (off)")


def check_lists(config: SimpleNamespace) -> None:
    """The same of values that hold several, separated by commas."""
    weights, files = split_list(config.data.train_weights), split_list(config.data.train_file)
    if not files:
        raise ValueError("data.train_file names no file")
    if weights and (len(weights) != len(files) or not all(re.fullmatch("[1-9][0-9]{0,3}", part) for part in weights)):
        raise ValueError(f"data.train_weights={config.data.train_weights!r}: a whole number from 1 to 9999 for each of "
                         f"the {len(files)} of data.train_file is expected, separated by commas")
    names = split_list(config.reward.name)
    try:
        finite = [math.isfinite(float(weight)) for weight in split_list(config.reward.weights)]
    except ValueError:
        finite = []
    if not finite or not all(finite) or len(finite) != len(names):
        raise ValueError(f"reward.weights={config.reward.weights!r}: a number for each of the {len(names)} of "
                         "reward.name is expected, separated by commas")
