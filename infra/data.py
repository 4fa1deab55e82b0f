"""Prompts from files and from data sets on the hub.

A row needs a prompt (a text, or a list of chat messages) and an answer; the keys of the config's
section `data` say in which columns they are. Their defaults know the usual names of columns and
the layout of verl's data sets. Reward functions may use the other columns.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from decimal import Decimal
from itertools import count
from pathlib import Path
from types import SimpleNamespace

from tqdm import tqdm

from data_types import Data, Prompt
from infra.config import split_list

SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
MAX_LINE = 4 * 2**20  # bytes of a row of JSONL; a file with a longer line is of another kind
HERE = " in the current directory: run from the repository root, or give an absolute path"

RawPrompt = str | tuple[tuple[str, str], ...]  # a text; or a chat, (role, content) of each message


def read_rows(source: str) -> Iterator[tuple[str, dict]]:
    """(location, row) for every row of a .jsonl or .parquet file, of `owner/name[[:config]:split]`
    on the hub, or of a directory in the hub's layout.

    Raises ValueError with the location of what cannot be read, and how to repair it.
    """
    suffix, is_file = Path(source).suffix.lower(), Path(source).is_file()
    if is_file and suffix in SUFFIXES:
        return read_table(source) if suffix == ".parquet" else read_jsonl(source)
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+){0,2}", source) and suffix not in SUFFIXES
    if not is_file and (on_hub or Path(source.partition(":")[0]).is_dir()):
        return read_table(source)
    if is_file:
        raise ValueError(f"{source}: neither .jsonl nor .parquet: convert it to one of them")
    here = "" if Path(source).is_absolute() else HERE
    raise ValueError(f"{source}: no such data file{here}")


def read_jsonl(path: str) -> Iterator[tuple[str, dict]]:
    """(location, row) for every line of a file that is not blank."""
    with open(path, "rb") as file:
        for number in count(1):
            line = file.readline(MAX_LINE)  # of a longer one, the part so far is not valid JSON
            if not line:
                return
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
                problem = f"found {type(row).__name__}"
            except (ValueError, RecursionError) as error:
                row, problem = None, error
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number}: a JSON object in UTF-8 of at most "
                                 f"{MAX_LINE // 2**20} MiB is expected on each line ({problem}): "
                                 "fix or delete this line, or convert the file")
            yield f"{path}:{number}", row


def read_table(source: str) -> Iterator[tuple[str, dict]]:
    """(location, row) for every row of a Parquet file, or of a data set on the hub or in a
    directory, without holding all of them."""
    path, *config, split = source.split(":") if ":" in source else (source, "train")
    number = 0
    try:
        if Path(source).is_file():
            from pyarrow.parquet import ParquetFile
            tables = ParquetFile(source).iter_batches(1024)
        else:
            from datasets import load_dataset  # takes seconds to import
            tables = load_dataset(path, *config, split=split).with_format("arrow").iter(1024)
        for table in tables:
            for row in table.to_pylist():
                number += 1
                yield f"{source}: row {number}", row
    except Exception as error:  # each kind of file has its own
        reason = " ".join(str(error).split())[:200]
        here = "" if Path(path).exists() or Path(path).is_absolute() else f", or a directory{HERE}"
        raise ValueError(f"{source}: not readable after row {number} ({reason}): a whole Parquet "
                         "file, or owner/name:split or owner/name:config:split on the hub, is "
                         f"expected{here}") from error


def find_column(row: dict, keys: str):
    """The value of the first of `keys` that the row has; None if it has none of them.

    `a,b.c` is column `a`, or within column `b` what `c` names.
    """
    for key in split_list(keys):
        value = row.get(key)
        if value is None and "." in key:
            value = row
            for part in key.split("."):
                value = value.get(part) if isinstance(value, dict) else None
        if value not in (None, "") and value == value:  # some files have NaN for an empty cell
            return value
    return None


def read_raw_prompt(location: str, row: dict, data: SimpleNamespace) -> RawPrompt:
    """A row's prompt before the templates. Raises ValueError, with `location`, without one."""
    raw = find_column(row, data.prompt_key)
    if isinstance(raw, str):
        return raw
    try:
        chat = tuple([(message["role"], message["content"]) for message in raw])
        if chat and all(isinstance(text, str) for message in chat for text in message):
            return chat
    except (TypeError, KeyError):
        pass
    raise column_error(location, row, data, "prompt_key",
                       "text or list of chat messages with `role` and `content`")


def read_answer(location: str, row: dict, data: SimpleNamespace) -> str:
    """The answer of a row. Raises ValueError, with `location`, without one."""
    answer = find_column(row, data.answer_key)
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise column_error(location, row, data, "answer_key", "text or number")
    if isinstance(answer, float):
        # As answers are written: 0.00001, not 1e-5; 72, which a column with a gap makes 72.0.
        answer = int(answer) if answer.is_integer() else f"{Decimal(repr(answer)):f}"
    if not data.answer_regex:
        return str(answer)
    match = re.search(data.answer_regex, str(answer))
    if not match or not match.group(1):
        raise ValueError(f"{location}: data.answer_regex {data.answer_regex!r} does not match the "
                         f"answer {str(answer)[-40:]!r}: fix one of them")
    return match.group(1).strip()


def column_error(location: str, row: dict, data: SimpleNamespace, key: str,
                 expected: str) -> ValueError:
    """The error for a row without something `expected` in the column that `data.<key>` names."""
    names, columns = getattr(data, key), ", ".join(map(str, row))
    found = repr(find_column(row, names))[:60]
    return ValueError(f"{location}: no {expected} in {names!r} (found {found}; columns: {columns}):"
                      f" set data.{key}, or fix the row")


def tokenize(location: str, raw: RawPrompt, tokenizer,
             data: SimpleNamespace) -> tuple[str, list[int]]:
    """The text that the policy reads for a prompt, and its token ids.

    The prompt template applies to a chat's last message. Without a chat template, messages become
    paragraphs. Raises ValueError, with `location`, if the chat template or the tokenizer fails.
    """
    messages = (("user", raw),) if isinstance(raw, str) else raw
    chat = [{"role": role, "content": text} for role, text in messages]
    chat[-1]["content"] = data.prompt_template.replace("{prompt}", chat[-1]["content"])
    templated = bool(data.apply_chat_template and tokenizer.chat_template)
    text = "\n\n".join(message["content"] for message in chat)
    try:
        if templated:
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        # a chat template writes the special tokens itself
        return text, tokenizer.encode(text, add_special_tokens=not templated)
    except Exception as error:
        raise ValueError(f"{location}: the prompt cannot be tokenized ({type(error).__name__}: "
                         f"{error}): fix or delete the row") from error


def load_prompts(source: str, tokenizer, data: SimpleNamespace, max_prompts: int = 0,
                 seen: dict[RawPrompt, Prompt] | None = None,
                 log: Callable[[str], None] = lambda line: None) -> tuple[list[Prompt], Counter]:
    """The prompts of a source (its first `max_prompts`, if positive), and what was counted.

    `log` gets the counts as a line: `rows` read, those whose prompt is `repeated`, those of these
    `with another answer`, and `overlong` ones. `seen` holds the first of equal prompts, of
    earlier sources too. Equal rows share one `Prompt`. Raises ValueError for unusable data.
    """
    prompts, counts, longest = [], Counter(), data.max_prompt_length
    seen = {} if seen is None else seen
    for location, row in tqdm(read_rows(source), source, unit=" rows", delay=3, leave=False,
                              disable=os.environ.get("RANK", "0") != "0"):
        raw = read_raw_prompt(location, row, data)
        prompt = first = seen.get(raw)
        if not first or first.row != row:
            text, ids = (first.text, first.token_ids) if first else tokenize(
                location, raw, tokenizer, data)
            prompt = Prompt(counts["rows"], text, ids, read_answer(location, row, data), row)
            seen.setdefault(raw, prompt)
        counts["rows"] += 1
        if first:
            counts["repeated"] += 1
            counts["with another answer"] += first.answer != prompt.answer
            if data.dedup:
                continue
        if len(prompt.token_ids) > longest:
            counts["overlong"] += 1
            if data.overlong_prompts == "drop":
                continue
            if data.overlong_prompts == "error":
                raise ValueError(
                    f"{location}: {len(prompt.token_ids)} tokens, more than data.max_prompt_length="
                    f"{longest}: raise it, or set data.overlong_prompts")
            prompt = replace(prompt, token_ids=prompt.token_ids[-longest:])
        prompts.append(prompt)
        if len(prompts) == max_prompts:
            break
    if not prompts:
        raise ValueError(f"{source}: none of {counts['rows']} rows is a new prompt of at most "
                         f"data.max_prompt_length={longest} tokens: raise it, or leave this out")
    found = ", ".join(f"{number} {name}" for name, number in counts.items() if number)
    log(f"{source}: {len(prompts)} prompts of {found}" if len(counts) == 1 else
        f"warning: {source}: {len(prompts)} prompts of {found}: see data.dedup, "
        f"data.overlong_prompts and data.max_prompt_length={longest}")
    return prompts, counts


def load_data(config: SimpleNamespace, tokenizer, log: Callable[[str], None],
              training: bool = True) -> Data:
    """The prompts of `data.train_file` (if `training`; several files are one) and of `val.file`.

    `log` gets a line on each file, and warnings. Raises ValueError for unusable data.
    """
    train, seen, val = [], {}, {}
    for source in split_list(config.data.train_file) if training else []:
        train += load_prompts(source, tokenizer, config.data, 0, seen, log)[0]
    sources = split_list(config.val.file)
    paths = [Path(source.partition(":")[0]) for source in sources]
    names = [path.stem if path.suffix.lower() in SUFFIXES else path.name for path in paths]
    for name, source in zip(names, sources, strict=True):
        known: dict[RawPrompt, Prompt] = {}
        try:
            prompts, _ = load_prompts(source, tokenizer, config.data, config.val.max_prompts,
                                      known, log)
        except ValueError as error:
            raise ValueError(f"{error} (val.file is read with the same data.* keys; `val.file=` "
                             "trains without validation)") from error
        val[name if names.count(name) == 1 else source] = prompts
        if leaked := len(known.keys() & seen.keys()):
            log(f"warning: {source}: {leaked} of its {len(known)} prompts are in data.train_file "
                "too")
    return Data(train, val)
