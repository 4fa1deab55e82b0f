"""Prompts from files and from data sets on the hub.

A row needs a prompt (a text, or a list of chat messages) and an answer; the keys of the config's
section `data` say in which columns they are. Their defaults know the usual names of columns and
the layout of verl's data sets. Reward functions may use the other columns. See docs/DATA.md.
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
ROLES = {"human": "user"} | dict.fromkeys(("gpt", "chatgpt", "model", "bot", "ai"), "assistant")
CHAT_AS_TEXT = re.compile(r"(?s)\s*\[\s*{.*['\"](role|from)['\"]\s*:.*}[\s,]*\]\s*")
OPEN_TAG = re.compile(r"(?s)<(think|thinking|reasoning)>(?!.*</\1>)|<(?!e(nd|o)|br|hr)\w+>\s*$")
LAST_MESSAGE = "without the assistant's last message (taken for the solution)"
TODAY = datetime(2024, 7, 26)  # for chat templates: what those of Llama 3 write without a clock

Chat = tuple[tuple[str, str], ...]  # (role, content) of each message; a text is one of the user


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
    file that is one array. A row that is a list of messages becomes its column `messages`."""
    with open(path, "rb") as file:
        place, lines = f"{path}:", iter(lambda: file.readline(MAX_LINE), b"")
        if path.lower().endswith(".json") and re.match(rb"(\xef\xbb\xbf)?\s*\[", file.peek()):
            try:
                place, lines = f"{path}: row ", map(json.dumps, json.load(file))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}: no array ({error}): fix it, or name it .jsonl") from None
        for number, line in enumerate(lines, 1):  # of a longer line, the start is not valid JSON
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
    """(location, row) for each row of a Parquet file, or of a data set on the hub or on disk."""
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
    """The list that a text which begins with a bracket is, in JSON or Python; [] if it is none."""
    for parse in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return list(parse(text.strip()))
    return []


def read_message(message: dict) -> tuple[str, str]:
    """(role, content) of a chat message. Raises ValueError with it if they are not text."""
    role, content = message.get("role") or message.get("from"), message.get("content")
    if content is None:
        content = message.get("value", find_column(message, "ground_truth.value"))
    if isinstance(content, list) and all(part["type"] == "text" for part in content):
        content = "".join(part["text"] for part in content)
    if message.get("tool_calls") or not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(f" as text: one is {repr(message)[:80]},")
    return ROLES.get(role.lower(), role.lower()), content


def read_chat(location: str, row: dict, data: SimpleNamespace) -> tuple[Chat, str | None]:
    """A row's prompt before the templates, and the solution that its chat ends with, or None: what
    the assistant says last, unless it leaves a tag (<think>) open, for the policy to continue.
    Raises ValueError, with `location`, without a prompt."""
    raw = find_column(row, data.prompt_key)
    if isinstance(raw, str) and not CHAT_AS_TEXT.fullmatch(raw):
        return (("user", raw),), None
    try:
        chat = [read_message(part) for part in (parse_list(raw) if isinstance(raw, str) else raw)]
        last = chat.pop() if chat[-1][0] == "assistant" else None
        if chat[-1][0] not in ("user", "tool", "system", "developer"):
            raise ValueError(f", the user's last or before a solution, not {chat[-1][0]!r}'s,")
        to_continue = last and OPEN_TAG.search(last[1])
        return ((*chat, last), None) if to_continue else (tuple(chat), last and last[1])
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise column_error(location, row, data, "prompt_key", "text or list of chat messages with "
                           "`role` and `content`"
                           f"{error if type(error) is ValueError else ', or JSON of it'}") from None


def read_answer(location: str, row: dict, data: SimpleNamespace, end: str | None) -> str:
    """The answer of a row, or else the `end` of its chat; "" if `data.answer_key` names no column.
    Raises ValueError, with `location`, without an answer."""
    if not split_list(data.answer_key):
        return ""
    answer = find_column(row, data.answer_key)
    entries = answer = end if answer is None else answer
    if isinstance(answer, str) and re.match(r"\s*\[\s*[\"']", answer):
        entries = parse_list(answer)
    answer = entries[0] if isinstance(entries, list) and len(entries) == 1 else answer
    answer = answer.get("content") if isinstance(answer, dict) else answer  # a message
    if isinstance(answer, float | Decimal):
        # As answers are written: 0.00001, not 1e-5; 72, which a column with a gap makes 72.0.
        answer = re.sub(r"\.0*$|(\.\d*?)0+$", r"\1", f"{Decimal(str(answer)):f}")
    if answer == "" or isinstance(answer, bool) or not isinstance(answer, str | int):
        raise column_error(location, row, data, "answer_key", "single text or number")
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


def check_columns(location: str, source: str, row: dict, prompt: str, log: Callable) -> None:
    """Warn of columns that are not read. Raises ValueError if `prompt` lacks the row's choices."""
    for name in ("tools", "system", "image", "images"):
        if row.get(name) and row[name] not in ("[]", "{}", "null"):
            log(f"warning: {source}: column `{name}` is not read: only the prompt is, for one turn")
    choices = row.get("choices") or row.get("options")
    choices = list(choices.values()) if isinstance(choices, dict) else choices
    if isinstance(choices, list) and any(str(choice) not in prompt for choice in choices):
        raise ValueError(f"{location}: the prompt lacks the choices {repr(choices)[:60]}: write "
                         "them into it, or delete their column")


def tokenize(location: str, messages: Chat, tokenizer, data: SimpleNamespace,
             log: Callable[[str], None]) -> tuple[str, list[int]]:
    """The text that the policy reads for a prompt, and its token ids. The prompt template changes
    the last message that is not the assistant's. Without a chat template, messages become
    paragraphs. Raises ValueError, with `location`, if something fails."""
    chat = [{"role": role, "content": text} for role, text in messages]
    to_continue = chat[-1]["role"] == "assistant"
    last = chat[-1 - to_continue]
    last["content"] = data.prompt_template.replace("{prompt}", last["content"])
    templated = bool(data.apply_chat_template and tokenizer.chat_template)
    text = "\n\n".join(message["content"] for message in chat)
    options = {"strftime_now": lambda form: log(
        f"warning: the chat template writes a date, {TODAY:%d %b %Y} on all days: if it has a name "
        """for it, data.chat_template_kwargs='{"date_string": "1 Dec 2026"}' sets another""")
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
                         f"{error}): fix the row, or data.chat_template_kwargs") from error
    eos = tokenizer.eos_token
    if templated and eos and text.rstrip().endswith(eos):
        log(f"warning: the chat template ends prompts with {eos}, which ends responses: see "
            "data.apply_chat_template and data.chat_template_kwargs")
    elif ids[-1:] == [tokenizer.eos_token_id] and not text.endswith(eos):
        log(f"warning: the tokenizer appends {eos}, which ends responses, to prompts: removed")
        ids.pop()
    return text, ids


def load_prompts(source: str, tokenizer, data: SimpleNamespace, max_prompts: int = 0,
                 seen: dict[Chat, Prompt] | None = None,
                 log: Callable[[str], None] = lambda line: None) -> tuple[list[Prompt], Counter]:
    """The prompts of a source (its first `max_prompts`, if positive), and what was counted.

    `log` gets warnings, again and again, and the counts as a line: `rows` read, those whose prompt
    is `repeated`, those of these `with another answer`, `overlong` ones, and chats without the
    solution at their end. `seen` holds the first of equal prompts, of earlier sources too.
    Equal rows share one `Prompt`. Raises ValueError for unusable data.
    """
    prompts, counts, longest = [], Counter(), data.max_prompt_length
    seen = {} if seen is None else seen
    for location, row in tqdm(read_rows(source), source, unit=" rows", delay=3, leave=False,
                              disable=os.environ.get("RANK", "0") != "0"):
        chat, end = read_chat(location, row, data)
        prompt = first = seen.get(chat)
        if not first or first.row != row:
            text, ids = (first.text, first.token_ids) if first else tokenize(
                location, chat, tokenizer, data, log)
            check_columns(location, source, row, text, log)
            prompt = Prompt(counts["rows"], text, ids, read_answer(location, row, data, end), row)
            seen.setdefault(chat, prompt)
        counts["rows"] += 1
        if end and (not data.answer_key or find_column(row, data.answer_key) is not None):
            counts[LAST_MESSAGE] += 1
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
                raise ValueError(f"{location}: {len(prompt.token_ids)} tokens, more than data.max_"
                                 f"prompt_length={longest}: raise it, or set data.overlong_prompts")
            prompt = replace(prompt, token_ids=prompt.token_ids[-longest:])
        prompts.append(prompt)
        if len(prompts) == max_prompts:
            break
    if not prompts:
        raise ValueError(f"{source}: no prompt is left of {counts['rows']} rows: "
                         f"{counts['repeated']} are repeated, {counts['overlong']} longer than "
                         f"data.max_prompt_length={longest} tokens: raise it, or name another file")
    found = ", ".join(f"{number} {name}" for name, number in counts.items() if number)
    plain = {"rows", "repeated", "with another answer"} if data.dedup else {"rows"}
    keys = [key for key, name in (
        ("data.dedup", "repeated"), ("data.answer_key", "with another answer"),
        (f"data.overlong_prompts and data.max_prompt_length={longest}", "overlong"),
        ("docs/DATA.md", LAST_MESSAGE)) if counts[name]]
    log(f"{source}: {len(prompts)} prompts of {found}" if counts.keys() <= plain else
        f"warning: {source}: {len(prompts)} prompts of {found}: see {', '.join(keys)}")
    return prompts, counts


def load_data(config: SimpleNamespace, tokenizer, log: Callable[[str], None],
              training: bool = True) -> Data:
    """The prompts of `data.train_file` (if `training`; several files are one) and of `val.file`.

    `log` gets a line on each file, and warnings. Raises ValueError for unusable data.
    """
    train, seen, val = [], {}, {}
    log = cache(log)  # says the same once
    for source in split_list(config.data.train_file) if training else []:
        train += load_prompts(source, tokenizer, config.data, 0, seen, log)[0]
    sources = split_list(config.val.file)
    paths = [Path(source.partition(":")[0]) for source in sources]
    names = [path.stem if path.suffix.lower() in SUFFIXES else path.name for path in paths]
    for name, source in zip(names, sources, strict=True):
        known: dict[Chat, Prompt] = {}
        try:
            prompts, _ = load_prompts(source, tokenizer, config.data, config.val.max_prompts,
                                      known, log)
        except ValueError as error:
            raise ValueError(f"{error} (val.file is read with the same data.* keys; `val.file=` "
                             "trains without validation)") from error
        val[name if names.count(name) == 1 else source] = prompts
        if both := len(known.keys() & seen.keys()):
            log(f"warning: {source}: {both} of its {len(known)} prompts are in data.train_file too")
    return Data(train, val)
