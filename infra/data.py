"""Where do prompts come from? Files and names on the hub in; prompts out, and a word on what is wrong with them.

A row needs a task (a text, or a list of chat messages) and an answer. Where to find them is the config's affair; its
defaults know the usual names of columns and the layout that verl's data sets have. What else a row holds is for
verifiers.
"""

import gc
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import chain, count, islice
from pathlib import Path
from types import SimpleNamespace

from tqdm import tqdm

from infra.config import split_list

FILES = (".jsonl", ".ndjson", ".json", ".parquet")
MAX_LINE = 4 * 2**20  # bytes of a row of JSONL; what is longer is no row, but a file that is something else
CHUNK = 1024  # rows at a time: as many prompts are tokenized together


@dataclass(frozen=True)
class Prompt:
    """A task. `id` is its row in the data (from 0), `row` all of its columns, for a verifier that wants them."""
    id: int
    text: str
    token_ids: list[int]
    answer: str
    row: dict


Task = str | tuple[tuple[str, str], ...]  # a text; or a chat: (role, content) of each message
Mixture = list[tuple[int, list[Prompt]]]  # parts, and how many of each are drawn for how many of the others


@dataclass(frozen=True)
class Data:
    """All prompts of a run: what is trained on, and the validation sets by their names."""
    train: Mixture
    val: dict[str, list[Prompt]]


# ---- rows -------------------------------------------------------------------------------------------------------

def read_rows(source: str) -> Iterator[tuple[str, dict]]:
    """(place, row) for every row of a .jsonl or .parquet file, or of `owner/name[[:config]:split]` on the hub, or of
    a directory as the hub has them. Raises ValueError with the place of what cannot be read, and the repair."""
    kind = Path(source).suffix.lower()
    if Path(source).is_file():
        if kind not in FILES:
            raise ValueError(f"{source}: neither .jsonl nor .parquet: convert it to one of them")
        return read_parquet(source) if kind == ".parquet" else read_jsonl(source)
    if Path(source.partition(":")[0]).is_dir() or (
            kind not in FILES and re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+){0,2}", source)):
        return read_hub(source)
    raise ValueError(f"{source}: no such data file")


def read_jsonl(path: str) -> Iterator[tuple[str, dict]]:
    """The rows of a file that has one on each line."""
    with open(path, "rb") as file:
        for number in count(1):
            line, place = file.readline(MAX_LINE + 1), f"{path}:{number}"
            if not line:
                return
            if len(line) > MAX_LINE:
                raise ValueError(f"{place}: a line of more than {MAX_LINE // 2**20} MiB: a row a line is expected; "
                                 "mend or delete it")
            try:
                text = line.decode("utf-8-sig")
                row = json.loads(text) if text.strip() else None
            except UnicodeDecodeError as error:
                raise ValueError(f"{place}: not UTF-8 text (byte {error.start + 1} of the line): convert the file, "
                                 "for example with iconv") from None
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{place}: not valid JSON ({error}): mend or delete this line") from None
            if isinstance(row, dict):
                yield place, row
            elif text.strip():
                raise ValueError(f"{place}: a JSON object on each line is expected, found {type(row).__name__}: mend "
                                 "or delete this line")


def read_parquet(path: str) -> Iterator[tuple[str, dict]]:
    """The rows of a Parquet file, without holding all of them."""
    import pyarrow
    import pyarrow.parquet
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(CHUNK):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as Parquet after row {number} ({' '.join(str(error).split())[:200]}): "
                         "it may be cut; fetch or write it again") from error


def read_hub(source: str) -> Iterator[tuple[str, dict]]:
    """The rows of a data set on the hub, or in a directory."""
    from datasets import load_dataset  # takes seconds to import
    path, *config, split = source.split(":") if ":" in source else (source, "train")
    try:
        dataset = load_dataset(path, *config, split=split)
    except Exception as error:  # each kind of file has its own
        raise ValueError(f"{source}: cannot be loaded as a data set ({' '.join(str(error).split())[:200]}): "
                         "owner/name:split, owner/name:config:split or a file is expected") from error
    rows = (row for table in dataset.with_format("arrow").iter(CHUNK) for row in table.to_pylist())
    for number, row in enumerate(rows, 1):
        yield f"{source}: row {number}", row


# ---- tasks ------------------------------------------------------------------------------------------------------

def find_column(row: dict, keys: str):
    """The value of the first of `keys` that the row has: `a,b.c` is column `a`, or within column `b` what `c` names."""
    for key in split_list(keys):
        value = row.get(key)
        if value is None and "." in key:
            value = row
            for part in key.split("."):
                value = value.get(part) if isinstance(value, dict) else None
        if value not in (None, "") and value == value:  # NaN is what some write for nothing
            return value
    return None


def read_task(place: str, row: dict, data: SimpleNamespace) -> Task:
    """The task of one row. Raises ValueError, with its place, where it has none, or something else."""
    task = find_column(row, data.prompt_key)
    if isinstance(task, str):
        return task
    try:
        chat = tuple([(message["role"], message["content"]) for message in task])
        if chat and all(isinstance(text, str) for message in chat for text in message):
            return chat
    except (TypeError, KeyError):
        pass
    raise ValueError(f"{place}: " + (
        missing("prompt_key", row, data) if task is None else f"the prompt is {repr(task)[:60]}: a text, or a list of "
        "chat messages with `role` and `content`, is expected; set data.prompt_key, or mend the row"))


def read_answer(place: str, row: dict, data: SimpleNamespace) -> str:
    """The answer of one row. Raises ValueError, with its place, where it has none, or something else."""
    answer = find_column(row, data.answer_key)
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
        raise ValueError(f"{place}: " + (
            missing("answer_key", row, data) if answer is None else f"the answer is {repr(answer)[:60]}: a text or a "
            "number is expected; set data.answer_key (a verifier gets all columns besides), or mend the row"))
    if isinstance(answer, float):
        answer = f"{Decimal(repr(answer)):f}"  # as answers are written: 1e-5 is 0.00001
    if not data.answer_regex:
        return str(answer)
    match = re.search(data.answer_regex, str(answer))
    if not match or not match.group(1):
        raise ValueError(f"{place}: data.answer_regex {data.answer_regex!r} does not match the answer "
                         f"{str(answer)[-40:]!r}: mend one of them")
    return match.group(1).strip()


def missing(option: str, row: dict, data: SimpleNamespace) -> str:
    """What to say of a row that lacks what `data.<option>` names."""
    columns = ", ".join(map(str, row))
    return f"no {getattr(data, option)!r}, or nothing in it (it has: {columns}): set data.{option}, or mend the row"


def tokenize(tasks: list[Task], tokenizer, data: SimpleNamespace) -> list[tuple[str, list[int]]]:
    """The tasks as the policy is to read them: texts, and their token ids. The prompt template is for a chat's last
    message; where there is no chat template, messages are paragraphs."""
    chats = [[{"role": role, "content": text} for role, text in ([("user", task)] if isinstance(task, str) else task)]
             for task in tasks]
    for chat in chats:
        chat[-1]["content"] = data.prompt_template.replace("{prompt}", chat[-1]["content"])
    templated = bool(data.apply_chat_template and tokenizer.chat_template)
    if templated:
        texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    else:
        texts = ["\n\n".join(message["content"] for message in chat) for chat in chats]
    token_ids = tokenizer(texts, add_special_tokens=not templated)["input_ids"]  # a template writes its own
    return list(zip(texts, token_ids, strict=True))


# ---- prompts ----------------------------------------------------------------------------------------------------

def read_prompts(source: str, tokenizer, data: SimpleNamespace,
                 known: dict[Task, Prompt]) -> Iterator[tuple[str, Prompt, Prompt | None]]:
    """For each row its place, its prompt, and the first one of the same task, where it repeats that.

    `known` has those first ones, earlier sources' too. Rows that are alike throughout share one `Prompt`.
    """
    rows = enumerate(tqdm(read_rows(source), source, unit=" rows", delay=3, leave=False,
                          disable=os.environ.get("RANK", "0") != "0"))
    while chunk := list(islice(rows, CHUNK)):
        tasks = [read_task(place, row, data) for _, (place, row) in chunk]
        new = {task: place for task, (_, (place, _)) in zip(tasks, chunk, strict=True) if task not in known}
        read = dict(zip(new, tokenize_new(new, tokenizer, data), strict=True)) if new else {}
        for task, (number, (place, row)) in zip(tasks, chunk, strict=True):
            prompt = first = known.get(task)
            if not first or first.row != row:
                text, token_ids = (first.text, first.token_ids) if first else read[task]
                prompt = Prompt(number, text, token_ids, read_answer(place, row, data), row)
                known.setdefault(task, prompt)
            yield place, prompt, first


def tokenize_new(places: dict[Task, str], tokenizer, data: SimpleNamespace) -> list[tuple[str, list[int]]]:
    """`tokenize`. Raises ValueError with the place of a task for which that fails."""
    try:
        return tokenize(list(places), tokenizer, data)
    except Exception as error:  # a chat template's, or the tokenizer's, of half a character
        for task, place in places.items():
            try:
                tokenize([task], tokenizer, data)
            except Exception as of_this:
                raise ValueError(f"{place}: the prompt cannot be tokenized ({type(of_this).__name__}: {of_this}): mend "
                                 "or delete the row") from error
        raise


def load_prompts(source: str, tokenizer, data: SimpleNamespace, max_prompts: int = 0,
                 known: dict | None = None) -> tuple[list[Prompt], Counter]:
    """The prompts of a source (its first `max_prompts`, where positive), by the keys of the config's section `data`.

    Also how many `rows` were read, how many of them repeat a prompt (`repeated`; dropped, where `data.dedup`), with
    `another answer` than the first, and how many are `overlong`: those lose their left end, are dropped, or an error.
    `known` is for `read_prompts`. Raises ValueError for unusable data.
    """
    prompts, counts = [], Counter()
    for place, prompt, first in read_prompts(source, tokenizer, data, {} if known is None else known):
        counts["rows"] += 1
        if first:
            counts["repeated"] += 1
            counts["another answer"] += first.answer != prompt.answer
            if data.dedup:
                continue
        if len(prompt.token_ids) > data.max_prompt_length:
            counts["overlong"] += 1
            if data.overlong_prompts == "drop":
                continue
            if data.overlong_prompts == "error":
                raise ValueError(f"{place}: {len(prompt.token_ids)} tokens, more than data.max_prompt_length="
                                 f"{data.max_prompt_length}: raise it, or set data.overlong_prompts")
            prompt = replace(prompt, token_ids=prompt.token_ids[-data.max_prompt_length:])
        prompts.append(prompt)
        if len(prompts) == max_prompts:
            break
    if not prompts:
        raise ValueError(f"{source}: " + (
            "no rows" if not counts["rows"] else "all prompts are in the files before it: leave it out" if
            not counts["overlong"] else f"all {counts['overlong']} prompts are longer than data.max_prompt_length="
            f"{data.max_prompt_length}: raise it"))
    return prompts, counts


def load_data(config: SimpleNamespace, tokenizer, say: Callable[[str], None], training: bool = True) -> Data:
    """All that `data.train_file` and `val.file` name; `say` gets a line on each, and warnings. Raises ValueError."""
    known, weights = {}, [int(weight) for weight in split_list(config.data.train_weights)]
    parts = [load_source(source, tokenizer, config, 0, known, say)
             for source in split_list(config.data.train_file) if training]
    train = list(zip(weights, parts, strict=True)) if weights and training else [(1, [*chain(*parts)])]
    val, sources = {}, split_list(config.val.file)
    for source in sources:
        of_val: dict[Task, Prompt] = {}
        try:
            prompts = load_source(source, tokenizer, config, config.val.max_prompts, of_val, say)
        except ValueError as error:
            raise ValueError(f"{error} (val.file is read with the same data.* keys; `val.file=` goes without)"
                             ) from error
        alike = [other for other in sources if set_name(other) == set_name(source)]
        val[set_name(source) if len(alike) == 1 else source] = prompts
        if leaked := len(of_val.keys() & known.keys()):
            say(f"warning: {source}: {leaked} of its {len(of_val)} prompts are in data.train_file too")
    return Data(train[0][1] if train else [], val)


def set_name(source: str) -> str:
    """What a validation set is called, where no other is: the name of its file, or of the data set."""
    path = Path(source.partition(":")[0])
    return path.stem if path.suffix.lower() in FILES else path.name


def load_source(source: str, tokenizer, config: SimpleNamespace, max_prompts: int, known: dict,
                say: Callable[[str], None]) -> list[Prompt]:
    """`load_prompts`, and a word on what was found."""
    data = config.data
    gc.disable()  # which looks for cycles among millions of rows, half as long again as it takes to read them
    try:
        prompts, counts = load_prompts(source, tokenizer, data, max_prompts, known)
    finally:
        gc.enable()
    repeated, overlong, cut = counts["repeated"], counts["overlong"], data.overlong_prompts == "truncate_left"
    found = [f"{source}: {len(prompts)} prompts"]
    if repeated and data.dedup:
        found.append(f"{repeated} rows that repeat one were dropped")
    if overlong and not cut:
        found.append(f"{overlong} of more than {data.max_prompt_length} tokens were dropped")
    say("; ".join(found))
    if repeated and not data.dedup:
        say(f"warning: {source}: {repeated} of {counts['rows']} rows repeat a prompt, and count as often: "
            "data.dedup=true drops them")
    if counts["another answer"]:
        say(f"warning: {source}: {counts['another answer']} rows repeat a prompt with another answer")
    if overlong and cut:
        say(f"warning: {source}: {overlong} prompts of more than {data.max_prompt_length} tokens were cut on the left, "
            "and may have lost what they ask: raise data.max_prompt_length, or drop them")
    return prompts
