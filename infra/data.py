"""Prompts from files and from data sets on the hub.

A row needs a prompt (a text, or a list of chat messages) and an answer; the keys of the config's
section `data` say in which columns they are. Their defaults know the usual names of columns and
the layout of verl's data sets. Reward functions may use the other columns. docs/DATA.md says how
public data sets are read.
"""

import ast
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from decimal import Decimal
from functools import cache
from pathlib import Path
from types import SimpleNamespace

from tqdm import tqdm

from data_types import Data, Prompt
from infra.config import split_list

SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
MAX_LINE = 4 * 2**20  # bytes of a row of JSONL; a file with a longer line is of another kind
HERE = " in the current directory: run from the repository root, or give an absolute path"

ROLES = {"human": "user"} | dict.fromkeys(("gpt", "chatgpt", "model", "bot"), "assistant")
CHAT_AS_TEXT = re.compile(
    r"""\s*(array\()?\[\s*{\s*["'](role|content|from|value)["']\s*:.*[])]\s*""", re.DOTALL)
OPEN_TAG = re.compile(r"<(think|thinking|reasoning)>(?!.*</\1>)|<\w+>\s*$", re.DOTALL)
TODAY = datetime(2024, 7, 26)  # for chat templates: what those of Llama 3 write without a clock

RawPrompt = str | tuple[tuple[str, str], ...]  # a text; or a chat, (role, content) of each message


def read_rows(source: str) -> Iterator[tuple[str, dict]]:
    """(location, row) for every row of a .jsonl, .json or .parquet file, of
    `owner/name[[:config]:split]` on the hub, or of a directory in the hub's layout.

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
    """(location, row) for every line of a file that is not blank, or for every entry of a .json
    file that is one array. A row that is a list of chat messages gets the column `messages`."""
    with open(path, "rb") as file:
        # Of a line that is longer, the part so far is not valid JSON.
        place, lines = f"{path}:", iter(lambda: file.readline(MAX_LINE), b"")
        if path.lower().endswith(".json") and re.match(rb"(\xef\xbb\xbf)?\s*\[", file.peek()):
            try:
                place, lines = f"{path}: row ", map(json.dumps, json.load(file))
            except (ValueError, RecursionError) as error:
                if not str(error).startswith("Extra data"):  # as where each line is a list
                    raise ValueError(f"{path}: not a JSON array ({error}): fix the file") from None
                file.seek(0)
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line if isinstance(line, str) else line.decode("utf-8-sig"))
                problem = f"found {type(row).__name__}"
            except (ValueError, RecursionError) as error:
                row, problem = None, error
            if isinstance(row, list) and row and all(isinstance(part, dict) for part in row):
                row = {"messages": row}
            if not isinstance(row, dict):
                raise ValueError(f"{place}{number}: a JSON object in UTF-8 of at most "
                                 f"{MAX_LINE // 2**20} MiB is expected on each line ({problem}): "
                                 "fix or delete this line, or convert the file")
            yield f"{place}{number}", row


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
        if value not in (None, "", []) and value == value:  # some files have NaN for an empty cell
            return value
    return None


def parse_list(text: str) -> list:
    """The list that a text is in JSON or Python; [] if it is none."""
    for parse in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            if isinstance(value := parse(text.strip()), list):
                return value
    return []


def read_message(message: dict) -> tuple[str, str]:
    """(role, content) of a chat message, which may call them `from` and `value`. Raises ValueError
    with the cause if it has something else than text."""
    role, content = message.get("role") or message.get("from"), message.get("content")
    if content is None:
        content = message.get("value", find_column(message, "ground_truth.value"))
    if isinstance(content, list) and all(part["type"] == "text" for part in content):
        content = "".join(part["text"] for part in content)
    if message.get("tool_calls") or not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(f", all of them text: one is {repr(message)[:60]}")
    return ROLES.get(role.lower(), role), content


def read_raw_prompt(location: str, row: dict,
                    data: SimpleNamespace) -> tuple[RawPrompt, str | None]:
    """A row's prompt before the templates, and the solution that its chat ends with, or None.

    The assistant's words at the end are a solution, unless they leave a tag such as <think> open:
    then the policy continues them. Raises ValueError, with `location`, without a prompt.
    """
    raw, cause = find_column(row, data.prompt_key), ""
    if isinstance(raw, str):
        if not CHAT_AS_TEXT.fullmatch(raw):
            return raw, None
        raw, cause = parse_list(raw), " in JSON"
    try:
        chat = [read_message(message) for message in raw]
        last = chat.pop()[1] if chat and chat[-1][0] == "assistant" else None
        if chat and chat[-1][0] != "assistant":
            if last is None or not OPEN_TAG.search(last):
                return tuple(chat), last
            return (*chat, ("assistant", last)), None
        cause = cause if last is None else ", of which another's comes before the assistant's"
    except ValueError as error:
        cause = str(error)
    except (TypeError, AttributeError, KeyError):  # no list, or not of dicts
        pass
    raise column_error(location, row, data, "prompt_key",
                       f"text or list of chat messages with `role` and `content`{cause}")


def read_answer(location: str, row: dict, data: SimpleNamespace, solution: str | None) -> str:
    """The answer of a row, or else the `solution` that its chat ends with; "" if `data.answer_key`
    names no column. Raises ValueError, with `location`, without an answer."""
    if not split_list(data.answer_key):
        return ""
    answer, expected = find_column(row, data.answer_key), "text or number"
    answer = solution if answer is None else answer
    if isinstance(answer, str) and re.match(r"\s*\[\s*[\"']", answer):
        entries = parse_list(answer)
        answer = entries[0] if len(entries) == 1 and isinstance(entries[0], str) else answer
    if isinstance(answer, list) and len(answer) == 1:
        (answer,) = answer
        if isinstance(answer, dict) and "content" in answer:  # a completion of one message
            answer = answer["content"]
    elif isinstance(answer, list):
        expected = f"single text or number, but {len(answer)} entries,"
    if isinstance(answer, float | Decimal):
        # As answers are written: 0.00001, not 1e-5; 72, which a column with a gap makes 72.0.
        answer = f"{Decimal(str(answer)):f}"
        answer = answer.rstrip("0").rstrip(".") if "." in answer else answer
    if answer == "" or isinstance(answer, bool) or not isinstance(answer, str | int):
        raise column_error(location, row, data, "answer_key", expected)
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
    names, columns = getattr(data, key), ", ".join(map(str, row))[:150]
    found = repr(find_column(row, names))[:60]
    none = " (`data.answer_key=` if rewards need no answer)" if key == "answer_key" else ""
    return ValueError(f"{location}: no {expected} in {names!r} (found {found}; columns: {columns}):"
                      f" set data.{key}{none}, or fix the row")


def check_other_columns(location: str, source: str, row: dict, prompt: str,
                        warn: Callable[[str], None]) -> None:
    """Warn of columns that are not read. Raises ValueError, with `location`, if `prompt` lacks the
    choices that go with it."""
    for name in ("tools", "system", "image", "images"):
        if row.get(name):
            warn(f"{source}: the column `{name}` is not read, and rollouts are of text and of one "
                 "turn: write what the policy needs of it into the prompt")
    choices = row.get("choices") or row.get("options") or ""
    if isinstance(choices, dict):
        choices = choices.get("text") or choices.values()
    if any(str(choice) not in prompt for choice in choices):
        raise ValueError(f"{location}: the prompt lacks the row's choices: write them into it, or "
                         "delete their column")


def tokenize(location: str, raw: RawPrompt, tokenizer, data: SimpleNamespace,
             warn: Callable[[str], None]) -> tuple[str, list[int]]:
    """The text that the policy reads for a prompt, and its token ids.

    The prompt template applies to the last message, or to the one before the assistant's words that
    the policy continues. Without a chat template, messages become paragraphs. `warn` gets what is
    odd. Raises ValueError, with `location`, if the chat template or the tokenizer fails.
    """
    messages = (("user", raw),) if isinstance(raw, str) else raw
    chat = [{"role": role, "content": text} for role, text in messages]
    to_continue = chat[-1]["role"] == "assistant"
    last = chat[-1 - to_continue]
    last["content"] = data.prompt_template.replace("{prompt}", last["content"])
    templated = bool(data.apply_chat_template and tokenizer.chat_template)
    text = "\n\n".join(message["content"] for message in chat)
    options = {"strftime_now": lambda form: warn(
        f"the chat template writes a date, always {TODAY:%d %b %Y} so that prompts stay the same: "
        """data.chat_template_kwargs='{"date_string": "1 Dec 2026"}' sets another""")
        or TODAY.strftime(form)} | json.loads(data.chat_template_kwargs or "{}")
    try:
        if templated:
            text = tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=not to_continue,
                continue_final_message=to_continue, **options)
        # a chat template writes the special tokens itself
        ids = tokenizer.encode(text, add_special_tokens=not templated)
    except Exception as error:
        raise ValueError(f"{location}: the prompt cannot be tokenized ({type(error).__name__}: "
                         f"{error}): fix or delete the row") from error
    if templated and text.rstrip().endswith(tokenizer.eos_token or "\0"):
        warn(f"the chat template ends prompts with the end of a response, {tokenizer.eos_token}: "
             "see data.apply_chat_template and data.chat_template_kwargs")
    elif ids[-1:] == [tokenizer.eos_token_id] and not text.endswith(tokenizer.eos_token):
        warn(f"the tokenizer appends the end of a response, {tokenizer.eos_token}, to prompts: "
             "it is removed")
        ids.pop()
    return text, ids


def load_prompts(source: str, tokenizer, data: SimpleNamespace, max_prompts: int = 0,
                 seen: dict[RawPrompt, Prompt] | None = None,
                 log: Callable[[str], None] = lambda line: None,
                 warn: Callable[[str], None] = lambda line: None) -> tuple[list[Prompt], Counter]:
    """The prompts of a source (its first `max_prompts`, if positive), and what was counted.

    `log` gets the counts as a line: `rows` read, those whose prompt is `repeated`, those of these
    `with another answer`, `overlong` ones, and chats without the solution that they ended with.
    `warn` gets further warnings, often the same. `seen` holds the first of equal prompts, of
    earlier sources too. Equal rows share one `Prompt`. Raises ValueError for unusable data.
    """
    prompts, counts, longest = [], Counter(), data.max_prompt_length
    seen = {} if seen is None else seen
    for location, row in tqdm(read_rows(source), source, unit=" rows", delay=3, leave=False,
                              disable=os.environ.get("RANK", "0") != "0"):
        raw, solution = read_raw_prompt(location, row, data)
        prompt = first = seen.get(raw)
        if not first or first.row != row:
            text, ids = (first.text, first.token_ids) if first else tokenize(
                location, raw, tokenizer, data, warn)
            check_other_columns(location, source, row, text, warn)
            answer = read_answer(location, row, data, solution)
            prompt = Prompt(counts["rows"], text, ids, answer, row)
            seen.setdefault(raw, prompt)
        counts["rows"] += 1
        if solution is not None and (not data.answer_key or find_column(row, data.answer_key)):
            counts["without the solution at the end"] += 1
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
    plain = {"rows", "repeated", "with another answer"} if data.dedup else {"rows"}
    log(f"{source}: {len(prompts)} prompts of {found}" if counts.keys() <= plain else
        f"warning: {source}: {len(prompts)} prompts of {found}: see data.dedup, data.answer_key, "
        f"data.overlong_prompts and data.max_prompt_length={longest}")
    return prompts, counts


def load_data(config: SimpleNamespace, tokenizer, log: Callable[[str], None],
              training: bool = True) -> Data:
    """The prompts of `data.train_file` (if `training`; several files are one) and of `val.file`.

    `log` gets a line on each file, and warnings. Raises ValueError for unusable data.
    """
    train, seen, val = [], {}, {}
    warn = cache(lambda line: log(f"warning: {line}"))  # prints each line once
    for source in split_list(config.data.train_file) if training else []:
        train += load_prompts(source, tokenizer, config.data, 0, seen, log, warn)[0]
    sources = split_list(config.val.file)
    paths = [Path(source.partition(":")[0]) for source in sources]
    names = [path.stem if path.suffix.lower() in SUFFIXES else path.name for path in paths]
    for name, source in zip(names, sources, strict=True):
        known: dict[RawPrompt, Prompt] = {}
        try:
            prompts, _ = load_prompts(source, tokenizer, config.data, config.val.max_prompts,
                                      known, log, warn)
        except ValueError as error:
            raise ValueError(f"{error} (val.file is read with the same data.* keys; `val.file=` "
                             "trains without validation)") from error
        val[name if names.count(name) == 1 else source] = prompts
        if leaked := len(known.keys() & seen.keys()):
            log(f"warning: {source}: {leaked} of its {len(known)} prompts are in data.train_file "
                "too")
    return Data(train, val)
