"""Prompts from files and from data sets on the hub.

A row needs a prompt (a text, or a list of chat messages) and an answer; the keys of the config's
section `data` say in which columns they are. Their defaults know the usual names of columns and
the layout of verl's data sets. Reward functions may use the other columns.
"""

import gc
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import count, islice
from pathlib import Path
from types import SimpleNamespace

from tqdm import tqdm

from infra.config import split_list

FILES = (".jsonl", ".ndjson", ".json", ".parquet")
MAX_LINE = 4 * 2**20  # bytes of a row of JSONL; a file with a longer line is of another kind
CHUNK = 1024  # rows that are read and tokenized together
HERE = " in the current directory: run from the repository root, or give an absolute path"

Task = str | tuple[tuple[str, str], ...]  # a text; or a chat, (role, content) of each message


@dataclass(frozen=True)
class Prompt:
    """What the policy is given. `id` is its row in the data (from 0), `row` all of its columns."""
    id: int
    text: str
    token_ids: list[int]
    answer: str
    row: dict


@dataclass(frozen=True)
class Data:
    """All prompts of a run: those to train on, and the validation sets by name."""
    train: list[Prompt]
    val: dict[str, list[Prompt]]


def read_rows(source: str) -> Iterator[tuple[str, dict]]:
    """(location, row) for every row of a .jsonl or .parquet file, of `owner/name[[:config]:split]`
    on the hub, or of a directory in the hub's layout.

    Raises ValueError with the location of what cannot be read, and how to repair it.
    """
    kind = Path(source).suffix.lower()
    if Path(source).is_file():
        if kind not in FILES:
            raise ValueError(f"{source}: neither .jsonl nor .parquet: convert it to one of them")
        return read_parquet(source) if kind == ".parquet" else read_jsonl(source)
    on_hub = kind not in FILES and re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+){0,2}", source)
    if on_hub or Path(source.partition(":")[0]).is_dir():
        return read_hub(source)
    raise ValueError(f"{source}: no such data file" + ("" if Path(source).is_absolute() else HERE))


def read_jsonl(path: str) -> Iterator[tuple[str, dict]]:
    """(location, row) for every line of a file that is not blank."""
    with open(path, "rb") as file:
        for number in count(1):
            line, location = file.readline(MAX_LINE + 1), f"{path}:{number}"
            if not line:
                return
            if len(line) > MAX_LINE:
                raise ValueError(f"{location}: a line of more than {MAX_LINE // 2**20} MiB: a row "
                                 "a line is expected; fix or delete it")
            try:
                text = line.decode("utf-8-sig")
                row = json.loads(text) if text.strip() else None
            except UnicodeDecodeError as error:
                raise ValueError(f"{location}: not UTF-8 text (byte {error.start + 1} of the line)"
                                 ": convert the file, for example with iconv") from None
            except (ValueError, RecursionError) as error:
                message = f"{location}: not valid JSON ({error}): fix or delete this line"
                raise ValueError(message) from None
            if isinstance(row, dict):
                yield location, row
            elif text.strip():
                raise ValueError(f"{location}: a JSON object on each line is expected, found "
                                 f"{type(row).__name__}: fix or delete this line")


def read_parquet(path: str) -> Iterator[tuple[str, dict]]:
    """(location, row) for every row of a Parquet file, without holding all of them."""
    import pyarrow
    import pyarrow.parquet
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(CHUNK):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: not readable as Parquet after row {number} ({reason}): it may "
                         "be cut; fetch or write it again") from error


def read_hub(source: str) -> Iterator[tuple[str, dict]]:
    """(location, row) for every row of a data set on the hub, or in a directory."""
    from datasets import load_dataset  # takes seconds to import
    path, *config, split = source.split(":") if ":" in source else (source, "train")
    try:
        dataset = load_dataset(path, *config, split=split)
    except Exception as error:  # each kind of file has its own
        reason = " ".join(str(error).split())[:200]
        here = "" if Path(path).is_dir() else f"; and there is no directory {path}{HERE}"
        raise ValueError(f"{source}: cannot be loaded as a data set ({reason}): owner/name:split, "
                         f"owner/name:config:split or a file is expected{here}") from error
    rows = (row for table in dataset.with_format("arrow").iter(CHUNK) for row in table.to_pylist())
    for number, row in enumerate(rows, 1):
        yield f"{source}: row {number}", row


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


def read_task(location: str, row: dict, data: SimpleNamespace) -> Task:
    """The task of a row, before the templates. Raises ValueError, with `location`, without one."""
    task = find_column(row, data.prompt_key)
    if isinstance(task, str):
        return task
    try:
        chat = tuple([(message["role"], message["content"]) for message in task])
        if chat and all(isinstance(text, str) for message in chat for text in message):
            return chat
    except (TypeError, KeyError):
        pass
    problem = missing("prompt_key", row, data) if task is None else (
        f"the prompt is {repr(task)[:60]}: a text, or a list of chat messages with `role` and "
        "`content`, is expected; set data.prompt_key, or fix the row")
    raise ValueError(f"{location}: {problem}")


def read_answer(location: str, row: dict, data: SimpleNamespace) -> str:
    """The answer of a row. Raises ValueError, with `location`, without one."""
    answer = find_column(row, data.answer_key)
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        problem = missing("answer_key", row, data) if answer is None else (
            f"the answer is {repr(answer)[:60]}: a text or a number is expected; set "
            "data.answer_key (a reward function gets all columns besides), or fix the row")
        raise ValueError(f"{location}: {problem}")
    if isinstance(answer, float):
        answer = f"{Decimal(repr(answer)):f}"  # as answers are written: 1e-5 is 0.00001
    if not data.answer_regex:
        return str(answer)
    match = re.search(data.answer_regex, str(answer))
    if not match or not match.group(1):
        raise ValueError(f"{location}: data.answer_regex {data.answer_regex!r} does not match the "
                         f"answer {str(answer)[-40:]!r}: fix one of them")
    return match.group(1).strip()


def missing(key: str, row: dict, data: SimpleNamespace) -> str:
    """The error message for a row without the column that `data.<key>` names."""
    return (f"no {getattr(data, key)!r}, or nothing in it (it has: {', '.join(map(str, row))}): "
            f"set data.{key}, or fix the row")


def tokenize(tasks: list[Task], tokenizer, data: SimpleNamespace) -> list[tuple[str, list[int]]]:
    """The text that the policy reads for each task, and its token ids.

    The prompt template applies to a chat's last message. Without a chat template, messages become
    paragraphs.
    """
    chats = []
    for task in tasks:
        messages = (("user", task),) if isinstance(task, str) else task
        chat = [{"role": role, "content": text} for role, text in messages]
        chat[-1]["content"] = data.prompt_template.replace("{prompt}", chat[-1]["content"])
        chats.append(chat)
    templated = bool(data.apply_chat_template and tokenizer.chat_template)
    if templated:
        texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
                 for chat in chats]
    else:
        texts = ["\n\n".join(message["content"] for message in chat) for chat in chats]
    # a chat template writes the special tokens itself
    token_ids = tokenizer(texts, add_special_tokens=not templated)["input_ids"]
    return list(zip(texts, token_ids, strict=True))


def tokenize_new(locations: dict[Task, str], tokenizer, data: SimpleNamespace) -> dict:
    """`tokenize` by task. Raises ValueError with the location of a task for which that fails."""
    try:
        return dict(zip(locations, tokenize(list(locations), tokenizer, data), strict=True))
    except Exception as error:  # by the chat template; by the tokenizer, for half a character
        if len(locations) > 1:  # one by one, to find it
            return {task: tokenize_new({task: location}, tokenizer, data)[task]
                    for task, location in locations.items()}
        raise ValueError(f"{next(iter(locations.values()))}: the prompt cannot be tokenized "
                         f"({type(error).__name__}: {error}): fix or delete the row") from error


def read_prompts(source: str, tokenizer, data: SimpleNamespace,
                 seen: dict[Task, Prompt]) -> Iterator[tuple[str, Prompt, Prompt | None]]:
    """For each row its location, its prompt, and the first prompt of its task, if it repeats one.

    `seen` holds those first ones, of earlier sources too. Rows that are equal share one `Prompt`.
    """
    rows = enumerate(tqdm(read_rows(source), source, unit=" rows", delay=3, leave=False,
                          disable=os.environ.get("RANK", "0") != "0"))
    while chunk := list(islice(rows, CHUNK)):
        tasks = [read_task(location, row, data) for _, (location, row) in chunk]
        new = {task: location for task, (_, (location, _)) in zip(tasks, chunk, strict=True)
               if task not in seen}
        tokenized = tokenize_new(new, tokenizer, data) if new else {}
        for task, (number, (location, row)) in zip(tasks, chunk, strict=True):
            prompt = first = seen.get(task)
            if not first or first.row != row:
                text, ids = (first.text, first.token_ids) if first else tokenized[task]
                prompt = Prompt(number, text, ids, read_answer(location, row, data), row)
                seen.setdefault(task, prompt)
            yield location, prompt, first


def load_prompts(source: str, tokenizer, data: SimpleNamespace, max_prompts: int = 0,
                 seen: dict | None = None) -> tuple[list[Prompt], Counter]:
    """The prompts of a source (its first `max_prompts`, if positive), and what was counted.

    The counts: `rows` read; how many repeat a prompt (`repeated`; dropped, if `data.dedup`), and do
    so with `another answer`; and how many are `overlong`: `data.overlong_prompts` says what happens
    to them. `seen` is for `read_prompts`. Raises ValueError for unusable data.
    """
    prompts, counts, longest = [], Counter(), data.max_prompt_length
    seen = {} if seen is None else seen
    for location, prompt, first in read_prompts(source, tokenizer, data, seen):
        counts["rows"] += 1
        if first:
            counts["repeated"] += 1
            counts["another answer"] += first.answer != prompt.answer
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
    if prompts:
        return prompts, counts
    if not counts["rows"]:
        raise ValueError(f"{source}: no rows")
    if not counts["overlong"]:
        raise ValueError(f"{source}: all prompts are in the files before it: leave it out")
    raise ValueError(f"{source}: all {counts['overlong']} prompts are longer than "
                     f"data.max_prompt_length={longest}: raise it")


def load_source(source: str, tokenizer, config: SimpleNamespace, max_prompts: int, seen: dict,
                log: Callable[[str], None]) -> list[Prompt]:
    """The prompts of `load_prompts`; `log` gets a line on what was found, and warnings."""
    data = config.data
    gc.disable()  # with it, reading millions of rows takes half as long again
    try:
        prompts, counts = load_prompts(source, tokenizer, data, max_prompts, seen)
    finally:
        gc.enable()
    rows, repeated, overlong = counts["rows"], counts["repeated"], counts["overlong"]
    found, warning = f"{source}: {len(prompts)} prompts", f"warning: {source}:"
    if repeated and data.dedup:
        found += f"; {repeated} rows that repeat one were dropped"
    if overlong and data.overlong_prompts == "drop":
        found += f"; {overlong} of more than {data.max_prompt_length} tokens were dropped"
    log(found)
    if repeated and not data.dedup:
        log(f"{warning} {repeated} of {rows} rows repeat a prompt, and count as often: "
            "data.dedup=true drops them")
    if changed := counts["another answer"]:
        log(f"{warning} {changed} rows repeat a prompt with another answer")
    if overlong and data.overlong_prompts == "truncate_left":
        log(f"{warning} {overlong} prompts of more than {data.max_prompt_length} tokens were cut "
            "on the left, and may have lost the question: raise data.max_prompt_length, or drop "
            "them")
    return prompts


def load_data(config: SimpleNamespace, tokenizer, log: Callable[[str], None],
              training: bool = True) -> Data:
    """The prompts of `data.train_file` (if `training`; several files are one) and of `val.file`.

    `log` gets a line on each file, and warnings. Raises ValueError for unusable data.
    """
    train, seen, val = [], {}, {}
    for source in split_list(config.data.train_file) if training else []:
        train += load_source(source, tokenizer, config, 0, seen, log)
    sources = split_list(config.val.file)
    names = [set_name(source) for source in sources]
    for name, source in zip(names, sources, strict=True):
        of_val: dict[Task, Prompt] = {}
        try:
            prompts = load_source(source, tokenizer, config, config.val.max_prompts, of_val, log)
        except ValueError as error:
            raise ValueError(f"{error} (val.file is read with the same data.* keys; `val.file=` "
                             "trains without validation)") from error
        val[name if names.count(name) == 1 else source] = prompts
        if leaked := len(of_val.keys() & seen.keys()):
            log(f"warning: {source}: {leaked} of its {len(of_val)} prompts are in data.train_file "
                "too")
    return Data(train, val)


def set_name(source: str) -> str:
    """The name of a validation set: that of its file without the suffix, or of the data set."""
    path = Path(source.partition(":")[0])
    return path.stem if path.suffix.lower() in FILES else path.name
