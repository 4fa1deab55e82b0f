"""infra/data.py: rows of every kind become prompts; what is wrong with them is said in one line."""

import copy
import json
import re
import subprocess
import sys
from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers.processors import TemplateProcessing

from infra.config import load_config
from infra.data import load_data, load_prompts, read_rows

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared/data"
CHATML = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}?{% endif %}"
)


def how(**more):
    """The section `data` of the default config, with some keys changed."""
    return SimpleNamespace(**vars(load_config("config.yaml").data) | more)


def write(path, *rows):
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return str(path)


def write_parquet(path, rows):
    from datasets import Dataset

    Dataset.from_list(rows).to_parquet(path)
    return str(path)


def verl_row(i, answer="34"):
    """A row as DAPO-Math-17k and AIME 2024 are published in."""
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": f"a{i}", "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": f"i{i}"},
    }


@pytest.fixture
def path(tmp_path):
    return tmp_path / "data.jsonl"


@pytest.fixture
def chat(tokenizer):
    """The tokenizer, with a chat template for once."""
    tokenizer.chat_template = CHATML
    yield tokenizer
    tokenizer.chat_template = None


def load_all(tokenizer, *overrides):
    """`load_data` of the default config: what it loads, and the lines that it logs."""
    said = []
    return load_data(load_config("config.yaml", overrides), tokenizer, said.append), said


# ---- what goes in ----


def test_template_and_answer_regex(path, tokenizer):
    write(path, {"q": "a1 b+2", "a": "so #### 3"})
    (prompt,), counts = load_prompts(
        str(path),
        tokenizer,
        how(prompt_key="q", answer_key="a", answer_regex="#### (.+)", prompt_template="{prompt}?"),
    )
    assert (prompt.text, prompt.answer, prompt.row) == (
        "a1 b+2?",
        "3",
        {"q": "a1 b+2", "a": "so #### 3"},
    )
    assert tokenizer.decode(prompt.token_ids) == "a1 b+2?" and counts == {"rows": 1}


def test_braces_in_the_task_are_left_alone(path, tokenizer):
    write(path, {"prompt": "{x} {prompt} {{", "answer": "1"})
    (prompt,), _ = load_prompts(str(path), tokenizer, how(prompt_template="Q: {prompt}"))
    assert prompt.text.startswith("Q: {x} ") and prompt.text.endswith(" {{")


def test_the_chat_template_is_used_where_there_is_one(path, chat):
    write(path, {"prompt": "1", "answer": "1"})
    (with_template,), _ = load_prompts(str(path), chat, how())
    (without,), _ = load_prompts(str(path), chat, how(apply_chat_template=False))
    assert (with_template.text, without.text) == ("<user>1?", "1")


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_verls_published_layout_loads_as_it_is(tmp_path, chat, kind):
    rows = [verl_row(i, answer) for i, answer in enumerate(("34", "-1"))]
    path = (
        write_parquet(tmp_path / "d.parquet", rows)
        if kind == "parquet"
        else write(tmp_path / "d.jsonl", *rows)
    )
    prompts, _ = load_prompts(path, chat, how())
    assert [(p.text, p.answer, p.row["data_source"], p.row) for p in prompts] == [
        ("<user>a0?", "34", "math_dapo", rows[0]),
        ("<user>a1?", "-1", "math_dapo", rows[1]),
    ]


def test_a_chat_of_several_messages_with_and_without_a_template(path, chat):
    write(
        path,
        {
            "prompt": [{"role": "system", "content": "be"}, {"role": "user", "content": "a1"}],
            "answer": 7,
        },
    )
    (prompt,), _ = load_prompts(str(path), chat, how(prompt_template="{prompt}!"))
    assert (prompt.text, prompt.answer) == ("<system>be<user>a1!?", "7")
    (prompt,), _ = load_prompts(str(path), chat, how(apply_chat_template=False))
    assert prompt.text == "be\n\na1"


def test_parquet_is_read_like_jsonl(tmp_path, tokenizer):
    rows = [{"prompt": "a1", "answer": "1"}, {"prompt": "a2", "answer": "2"}]
    prompts, _ = load_prompts(write_parquet(tmp_path / "data.parquet", rows), tokenizer, how())
    assert [p.row for p in prompts] == rows


def test_a_data_set_as_the_hub_has_it_is_read_by_split(tmp_path, tokenizer):
    """A directory, since there is no hub here: `datasets` resolves both."""
    (tmp_path / "owner/name").mkdir(parents=True)
    write(tmp_path / "owner/name/train.jsonl", {"question": "a1", "answer": "1"})
    write(
        tmp_path / "owner/name/test.jsonl",
        {"question": "a2", "answer": "2"},
        {"question": "a3", "answer": "3"},
    )
    name = str(tmp_path / "owner/name")
    assert [p.text for p in load_prompts(name, tokenizer, how())[0]] == ["a1"]
    assert [p.text for p in load_prompts(f"{name}:test", tokenizer, how())[0]] == ["a2", "a3"]
    with pytest.raises(
        ValueError, match="owner/name:nowhere: not readable after row 0 .*owner/name:split"
    ):
        load_prompts(f"{name}:nowhere", tokenizer, how())


def test_a_name_that_the_hub_does_not_know_is_one_line(tokenizer):
    with pytest.raises(
        ValueError,
        match="owner/nowhere:main:test: not readable after row 0 .*, or a directory in the "
        "current directory: run from",
    ) as error:
        load_prompts("owner/nowhere:main:test", tokenizer, how())
    assert "\n" not in str(error.value)


def test_of_several_columns_the_first_that_a_row_has(path, tokenizer):
    write(
        path,
        {"a": "", "problem": "a1", "extra": {"deep": {"er": 5}}},
        {"problem": "a2", "a.b": "6"},
    )
    prompts, _ = load_prompts(
        str(path), tokenizer, how(prompt_key="a,problem", answer_key="a.b, extra.deep.er")
    )
    assert [(p.text, p.answer) for p in prompts] == [("a1", "5"), ("a2", "6")]


# ---- long, repeated and mixed ----


def test_a_long_prompt_is_dropped_cut_or_an_error(path, tokenizer):
    write(path, {"prompt": "a1", "answer": "1"}, {"prompt": "a1 b+2 c+3", "answer": "6"})
    kept, counts = load_prompts(str(path), tokenizer, how(max_prompt_length=3))
    assert ([p.text for p in kept], counts["overlong"]) == (["a1"], 1)
    kept, _ = load_prompts(
        str(path), tokenizer, how(max_prompt_length=3, overlong_prompts="truncate_left")
    )
    assert tokenizer.decode(kept[1].token_ids) == " c+3"
    with pytest.raises(ValueError, match="data.jsonl:2: 8 tokens.*max_prompt_length=3"):
        load_prompts(str(path), tokenizer, how(max_prompt_length=3, overlong_prompts="error"))


def test_repeated_prompts_are_counted_and_dropped_on_request(path, tokenizer):
    write(
        path,
        *[{"prompt": "a1", "answer": "1"}, {"prompt": "a2", "answer": "2"}] * 3,
        {"prompt": "a1", "answer": "7", "id": 3},
    )
    kept, counts = load_prompts(str(path), tokenizer, how())
    assert [p.answer for p in kept] == ["1", "2"] * 3 + ["7"] and kept[0] is kept[2]
    assert counts == {"rows": 7, "repeated": 5, "with another answer": 1}
    kept, counts = load_prompts(str(path), tokenizer, how(dedup=True))
    assert [p.answer for p in kept] == ["1", "2"] and counts["repeated"] == 5
    assert [
        p.answer for p in load_prompts(str(path), tokenizer, how(dedup=True), max_prompts=1)[0]
    ] == ["1"]


def test_several_files_are_one(tmp_path, tokenizer):
    a = write(
        tmp_path / "a.jsonl", {"prompt": "a1", "answer": "1"}, {"prompt": "a2", "answer": "2"}
    )
    b = write(
        tmp_path / "b.jsonl", {"prompt": "a3", "answer": "3"}, {"prompt": "a1", "answer": "1"}
    )
    files = [f"data.train_file={a}, {b}", "val.file="]
    data, _ = load_all(tokenizer, *files)
    assert [p.text for p in data.train] == ["a1", "a2", "a3", "a1"]
    data, said = load_all(tokenizer, *files, "data.dedup=true")
    assert [p.text for p in data.train] == ["a1", "a2", "a3"]
    assert said == [
        f"{a}: 2 prompts of 2 rows",
        f"{b}: 1 prompts of 2 rows, 1 repeated",
    ]
    with pytest.raises(ValueError, match="no prompt is left of 2 rows: .*name another file"):
        load_all(tokenizer, f"data.train_file={a},{a}", "val.file=", "data.dedup=true")


def test_without_training_only_the_validation_sets_are_read(tokenizer):
    log = []
    data = load_data(
        load_config("config.yaml", ["data.train_file=nowhere.jsonl"]),
        tokenizer,
        log.append,
        training=False,
    )
    assert (
        data.train == []
        and len(data.val["val"]) == 500
        and log == ["toy/val.jsonl: 500 prompts of 500 rows"]
    )


def test_several_validation_sets_go_by_their_names(tmp_path, tokenizer):
    a = write(tmp_path / "a.jsonl", {"prompt": "a1", "answer": "1"})
    (tmp_path / "c").mkdir()
    data, _ = load_all(tokenizer, f"val.file={a},toy/val.jsonl", "val.max_prompts=3")
    assert {name: len(prompts) for name, prompts in data.val.items()} == {"a": 1, "val": 3}
    other = write(tmp_path / "c/a.jsonl", {"prompt": "a1", "answer": "1"})
    assert load_all(tokenizer, f"val.file={a},{other}")[0].val.keys() == {
        a,
        other,
    }  # two of one name go by their paths


def test_what_ruins_runs_is_said_at_the_start(path, tokenizer):
    write(
        path,
        *[{"prompt": "a1", "answer": "1"}] * 3,
        {"prompt": "a1", "answer": "7"},
        {"prompt": "a1 b+2 c+3", "answer": "6"},
    )
    _, said = load_all(
        tokenizer,
        f"data.train_file={path}",
        f"val.file={path}",
        "data.max_prompt_length=3",
        "data.overlong_prompts=truncate_left",
    )
    assert said == [
        f"warning: {path}: 5 prompts of 5 rows, 3 repeated, 1 with another answer, 1 overlong: see "
        "data.dedup, data.answer_key, data.overlong_prompts and data.max_prompt_length=3",
        f"warning: {path}: 2 of its 2 prompts are in data.train_file too",
    ]


def test_the_embedded_task_loads_without_a_warning(tokenizer):
    assert load_all(tokenizer)[1] == [
        "toy/train.jsonl: 5000 prompts of 5000 rows",
        "toy/val.jsonl: 500 prompts of 500 rows",
    ]


# ---- what does not ----

GOOD = {"prompt": "a1", "answer": "1"}


@pytest.mark.parametrize(
    "lines, message",
    [
        ([json.dumps(GOOD), '{"prompt": '], ":2: a JSON object .*fix or delete this line"),
        (["[" * 100_000], ":1: a JSON object .*fix or delete this line"),
        (
            ['{"prompt": "a1", "answer": ' + "1" * 5000 + "}"],
            ":1: a JSON object .*fix or delete this line",
        ),
        (["[1, 2]"], ":1: a JSON object .* on each line .found list.: fix or delete this line"),
        (
            [GOOD, {"task": "a1"}],
            ":2: no text or list .* in 'prompt,question,problem,.*' .found None; columns: task.: set data.prompt_key, or fix",
        ),
        (
            [{"prompt": "a1"}],
            ":1: no single text or number in 'reward_model.ground_truth,.*,answer,.*: set data.answer_key "
            ".`data.answer_key=` if rewards need no answer., or fix the row",
        ),
        ([{"prompt": "a1", "answer": None}], ":1: no single text or number in 'reward_model.*fix the row"),
        (
            [{"prompt": "a1", "answer": float("nan")}],
            ":1: no single text or number in 'reward_model.*fix the row",
        ),
        ([{"prompt": "", "answer": "1"}], ":1: no text or list.*'prompt.*fix the row"),
        (
            [GOOD, {"prompt": 5, "answer": "1"}],
            ":2: no text or list of chat messages .* in 'prompt,.*found 5; columns: prompt, answer.: set data.prompt_key, or fix the row",
        ),
        ([{"prompt": [], "answer": "1"}], ":1: no text or list of chat messages.*or fix the row"),
        (
            [{"prompt": [{"role": "user"}], "answer": "1"}],
            ":1: no text or list of chat messages.*or fix the row",
        ),
        (
            [{"prompt": [{"role": "user", "content": 3}], "answer": "1"}],
            ":1: no text or list of chat messages.*fix the row",
        ),
        (
            [GOOD, {"prompt": "a2", "answer": {"x": 1}}],
            ":2: no single text or number .*found {'x': 1}.*fix the row",
        ),
        ([{"prompt": "a2", "answer": True}], ":1: no single text or number .*found True.*fix the row"),
        (
            [GOOD, '{"prompt": "a\\ud800", "answer": "1"}'],
            ":2: the prompt cannot be tokenized .*fix the row, or data.chat",
        ),
        ([GOOD, "x" * 10_000_000], ":2: a JSON object in UTF-8 of at most 4 MiB .*fix or delete"),
        ([], ": no prompt is left of 0 rows"),
        (["", "  "], ": no prompt is left of 0 rows"),
        (
            [{"prompt": "a" + "1" * 99, "answer": "1"}],
            ": no prompt is left of 1 rows: 0 are repeated, 1 longer than data.max_prompt_length=64 tokens: raise it",
        ),
    ],
)
def test_a_bad_file_is_one_line_with_place_and_repair(path, tokenizer, lines, message):
    write(path, *lines)
    with pytest.raises(ValueError, match=message) as error:
        load_prompts(str(path), tokenizer, how())
    assert (
        str(error.value).startswith(str(path))
        and "\n" not in str(error.value)
        and len(str(error.value)) < 400
    )


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_another_encoding_is_named(path, tokenizer, encoding):
    path.write_bytes(
        '{"prompt": "a1", "answer": "1"}\n{"prompt": "é", "answer": "1"}\n'.encode(encoding)
    )
    with pytest.raises(
        ValueError,
        match=rf"data.jsonl:{1 + (encoding == 'latin-1')}: a JSON object in UTF-8 .*decode byte.*convert the file",
    ):
        load_prompts(str(path), tokenizer, how())


def test_a_byte_order_mark_is_no_harm(path, tokenizer):
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert [p.text for p in load_prompts(str(path), tokenizer, how())[0]] == ["a1"]


def test_a_cut_parquet_file_is_one_line(tmp_path, tokenizer):
    path = tmp_path / "d.parquet"
    whole = Path(write_parquet(path, [verl_row(i) for i in range(5000)])).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        ValueError, match="d.parquet: not readable after row 0 .*: a whole Parquet file"
    ):
        load_prompts(str(path), tokenizer, how())
    path.write_bytes(
        whole[:1000] + bytes(len(whole) // 4) + whole[1000 + len(whole) // 4 :]
    )  # the end is there
    with pytest.raises(ValueError, match="d.parquet: not readable after row [0-9]+ ") as error:
        load_prompts(str(path), tokenizer, how())
    assert "\n" not in str(error.value)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="d.parquet: not readable after row 0 "):
        load_prompts(str(path), tokenizer, how())


def test_a_parquet_row_without_its_columns_is_named(tmp_path, tokenizer):
    path = write_parquet(tmp_path / "d.parquet", [GOOD, {"prompt": None, "answer": "1"}])
    with pytest.raises(
        ValueError,
        match="d.parquet: row 2: no text .*'prompt.* .found None; columns: prompt, answer.: set data.prompt_key, or",
    ):
        load_prompts(path, tokenizer, how())


@pytest.mark.parametrize(
    "source",
    ["nowhere.jsonl", "nowhere.parquet", "no/where.jsonl", "a/b/c", "data.csv", "no/where.PARQUET"],
)
def test_a_file_that_is_not_there_was_looked_for_in_the_current_directory(source):
    with pytest.raises(ValueError) as error:
        read_rows(source)
    assert str(error.value) == (
        f"{source}: no such data file in the current directory: run from the repository root, or give "
        "an absolute path"
    )
    with pytest.raises(ValueError, match="/no/such.jsonl: no such data file$"):
        read_rows("/no/such.jsonl")


def test_the_default_data_from_another_directory_is_said_to_be_elsewhere(
    tokenizer, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError,
        match="^toy/train.jsonl: no such data file in the current directory: run from the ",
    ):
        load_data(load_config(ROOT / "config.yaml"), tokenizer, print)


def test_a_file_of_another_kind_is_said_to_be(tmp_path):
    (tmp_path / "data.csv").write_text("prompt,answer\na1,1\n")
    with pytest.raises(ValueError, match="data.csv: neither .jsonl nor .parquet: convert it"):
        read_rows(str(tmp_path / "data.csv"))


def test_numbers_are_answers_as_they_are_written(path, tokenizer):
    write(
        path,
        *(
            {"prompt": f"a{i}", "answer": answer}
            for i, answer in enumerate((7, 7.5, 1e22, 1e-5, "1e5", 72.0))
        ),
    )
    assert [p.answer for p in load_prompts(str(path), tokenizer, how())[0]] == [
        "7",
        "7.5",
        "1" + "0" * 22,
        "0.00001",
        "1e5",
        "72",
    ]


def test_a_template_that_refuses_is_named_with_the_row(path, chat):
    chat.chat_template = (
        "{{ raise_exception('no system turns') if messages[0]['role'] == 'system' else 'x' }}"
    )
    write(path, GOOD, {"prompt": [{"role": "system", "content": "a"}], "answer": "1"})
    with pytest.raises(
        ValueError,
        match="data.jsonl:2: the prompt cannot be tokenized .*no system turns.*fix the row, or data.chat",
    ):
        load_prompts(str(path), chat, how())


# ---- chats, lists and templates ----

ASK = {"role": "user", "content": "a1"}


def say(text):
    return {"role": "assistant", "content": text}


def load_rows(path, tokenizer, *rows, keys=()):
    """`load_data` of rows, without validation: the prompts, and the lines that it logs."""
    more = [f"data.train_file={write(path, *rows)}", "val.file=", "data.max_prompt_length=999"]
    data, said = load_all(tokenizer, *more, *keys)
    return data.train, said


@pytest.mark.parametrize("words", ["<think>", "Let me see.\n<think>\n", "<think>\nFirst, I ",
                                   "<think>a</think> <think>b", "Now.\n<plan>"])
def test_an_open_tag_of_the_assistant_is_continued(path, chat, words):
    """The template is for the user's message; with the answer's column or without."""
    row = {"prompt": [ASK, say(words)], "answer": "3"}
    (prompt,), said = load_rows(path, chat, row, keys=["data.prompt_template=Q: {prompt}!"])
    assert prompt.text == f"<user>Q: a1!<assistant>{words}" and prompt.answer == "3"
    assert said == [f"{path}: 1 prompts of 1 rows"]
    (plain,), _ = load_rows(path, chat, row, keys=["data.apply_chat_template=false"])
    assert plain.text == f"a1\n\n{words}"
    with pytest.raises(ValueError, match=":1: no single text or number in"):
        load_rows(path, chat, {"prompt": [ASK, say(words)]})


@pytest.mark.parametrize("words", ["3", "<think>so</think>3", "if a <b> c", "vector<int> v;",
                                   "3<end_of_turn>", "3 <eos>", "3<br>\n", ""])
def test_a_solution_of_the_assistant_is_never_in_the_prompt(path, chat, words):
    """It is the answer if no column has one; if one has, or answers are off, it is left out."""
    with_answer = {"messages": [ASK, say(words)], "answer": "7"}
    (prompt,), said = load_rows(path, chat, with_answer)
    assert (prompt.text, prompt.answer) == ("<user>a1?", "7")
    left_out = (f"warning: {path}: 1 prompts of 1 rows, 1 without the assistant's last message "
                "(taken for the solution): see docs/DATA.md")
    assert not words or said[0] == left_out
    own = ["data.answer_key=", "reward.name=mine.py:score"]
    (prompt,), said = load_rows(path, chat, with_answer, keys=own)
    assert (prompt.text, prompt.answer) == ("<user>a1?", "")
    assert not words or said[0].startswith(left_out)
    if words:
        (prompt,), said = load_rows(path, chat, {"messages": [ASK, say(words)]})
        assert (prompt.text, prompt.answer) == ("<user>a1?", words)
        assert said == [f"{path}: 1 prompts of 1 rows"]


def test_an_answer_of_zero_is_one(path, chat):
    (prompt,), said = load_rows(path, chat, {"messages": [ASK, say("1 - 1 = 0")], "answer": 0})
    assert prompt.answer == "0" and "1 without the assistant's last message" in said[0]


@pytest.mark.parametrize("rows", [
    [ASK, say("so"), say("3")], [say("3")], [say("<think>")], [ASK, say("so"), say("<think>")],
    [ASK, {"role": "solver", "content": "3"}]], ids=str)
def test_a_chat_whose_last_reader_is_unclear_is_refused(path, chat, rows):
    with pytest.raises(ValueError, match="^[^ ]*:1: no text or list of chat messages"):
        load_rows(path, chat, {"prompt": rows, "answer": "3"})


@pytest.mark.parametrize("text", [
    '[{"role": "system", "content": ""}, {"role": "user", "content": "a\\u0031", "name": null}]',
    "[{'content': '', 'role': 'system'},\n {'content': 'a1', 'role': 'user'}]",
    ' [{"from": "system", "value": ""}, {"from": "human", "value": "a1"}]\n'])
def test_text_that_is_a_list_of_messages_is_that_list(path, chat, text):
    (prompt,), _ = load_rows(path, chat, {"prompt": text, "answer": "1"})
    assert prompt.text == "<system><user>a1?"


@pytest.mark.parametrize("text", ["[1, 2]", '["a", "b"]', '[{"a": 1}]', "[x] is {'role': 1}", "[{",
                                  "[{'role': 'user', 'content': 'x'}][0] is?"])
def test_other_text_in_brackets_stays_text(path, chat, text):
    (prompt,), _ = load_rows(path, chat, {"prompt": text, "answer": "1"})
    assert prompt.text == f"<user>{text}?"


def test_text_that_looks_like_messages_but_is_none_is_refused(path, chat):
    text = "[{'role': 'user', 'content': 'a1'}\n {'role': 'user', 'content': 'a2'}]"  # of numpy
    with pytest.raises(ValueError, match=":1: no .* messages with `role` and `content`, or JSON of"):
        load_rows(path, chat, {"prompt": text, "answer": "1"})


def test_parts_of_text_are_joined_and_other_parts_refused(path, chat):
    parts = [{"type": "text", "text": "a1 "}, {"type": "text", "text": "b+2", "image": None}]
    (prompt,), _ = load_rows(path, chat, {"prompt": [{"role": "user", "content": parts}],
                                          "answer": "1"})
    assert prompt.text == "<user>a1 b+2?"
    chats = {"image": [ASK, {"role": "user", "content": [*parts, {"type": "image"}]}],
             "tool_calls": [ASK, say("") | {"tool_calls": [{"name": "f"}]}, ASK],
             "None": [ASK, {"role": "user", "content": None}]}
    for cause, messages in chats.items():
        with pytest.raises(ValueError, match=":1: no text or list .* as text: one is ") as error:
            load_rows(path, chat, {"prompt": messages, "answer": "1"})
        assert cause in str(error.value) or cause == "image"


def test_names_of_roles(path, chat):
    rows = [{"conversations": [{"from": "human", "value": "a1"}, {"from": name, "value": "2"}]}
            for name in ("gpt", "Assistant", "model", "bot", "chatgpt")]
    prompts, _ = load_rows(path, chat, *rows)
    assert {(prompt.text, prompt.answer) for prompt in prompts} == {("<user>a1?", "2")}


@pytest.mark.parametrize("head", ["", "\ufeff", " \n"])
def test_a_json_file_is_an_array_or_lines(tmp_path, tokenizer, head):
    path, chat = tmp_path / "data.json", [{"from": "human", "value": "a2"},
                                          {"from": "assistant", "ground_truth": {"value": "2"}}]
    for text in (json.dumps([GOOD, chat], indent=1), f"{json.dumps(GOOD)}\n{json.dumps(chat)}\n"):
        path.write_text(head + text, encoding="utf-8")
        prompts, _ = load_prompts(str(path), tokenizer, how())
        assert [(prompt.text, prompt.answer) for prompt in prompts] == [("a1", "1"), ("a2", "2")]
    assert [place for place, _ in read_rows(str(path))][-1] == f"{path}:{2 + (head == ' ' + chr(10))}"


@pytest.mark.parametrize("text, message", [
    ('[{"prompt": "a1", "answer": "1"},', ": no array .Expecting value.*fix it, or name it .jsonl"),
    ('[{"prompt": "a1", "answer": "1"}, 3]', ": row 2: a JSON object .*found int"),
    ('[{"prompt": "a1"}]', ": row 1: no single text or number in"),
    ('[[{"role": "user"}]]\n[]\n', ": no array .Extra data.*or name it .jsonl")])
def test_a_broken_array_is_one_line(tmp_path, tokenizer, text, message):
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^{path}{message}") as error:
        load_prompts(str(path), tokenizer, how())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("answer, read", [
    (["3"], "3"), ([7.5], "7.5"), ('["3"]', "3"), ("['3']", "3"), (r'["\\frac{1}{2}"]', r"\frac{1}{2}"),
    ("[3]", "[3]"), ("[1,2]", "[1,2]"), ('["1", "2"]', '["1", "2"]'), ('["x', '["x'), ("[0, 1)", "[0, 1)"),
    ([say("3")], "3"), (100.0, "100"), (7.50, "7.5"), (-0.25, "-0.25")], ids=str)
def test_a_list_of_one_answer_is_that_answer(path, tokenizer, answer, read):
    (prompt,), _ = load_prompts(write(path, {"prompt": "a1", "answer": answer}), tokenizer, how())
    assert prompt.answer == read


@pytest.mark.parametrize("answer", [["1", "2"], [["1"]], [True], [None], '[""]', [{"x": 1}]], ids=str)
def test_several_answers_are_refused(path, tokenizer, answer):
    with pytest.raises(ValueError, match=":1: no single text or number in .*found .*set data.answer"):
        load_prompts(write(path, {"prompt": "a1", "answer": answer}), tokenizer, how())


def test_an_empty_column_is_none(path, tokenizer):
    row = {"prompt": "a1", "final_answer": [], "answer": "3"}
    assert load_prompts(write(path, row), tokenizer, how())[0][0].answer == "3"


def test_numbers_of_parquet_are_numbers_and_dates_are_not(tmp_path, tokenizer):
    path = tmp_path / "d.parquet"
    for value, read in ((Decimal("3.50"), "3.5"), (Decimal("72.00"), "72"), (Decimal("1200"), "1200"),
                        (date(2026, 12, 1), None), (b"3", None), (timedelta(1), None)):
        write_parquet(path, [{"prompt": "a1", "answer": value}])
        if read:
            assert load_prompts(str(path), tokenizer, how())[0][0].answer == read
            continue
        with pytest.raises(ValueError, match="row 1: no single text or number"):
            load_prompts(str(path), tokenizer, how())


def test_columns_that_are_not_read_are_named_once(tmp_path, tokenizer):
    rows = [GOOD | {"tools": [{"name": "f"}]}, {"prompt": "a2", "answer": "1", "tools": [{"x": 1}]}]
    a, b = write(tmp_path / "a.jsonl", *rows), write(tmp_path / "b.jsonl", *rows)
    _, said = load_all(tokenizer, f"data.train_file={a}", f"val.file={b}")
    unread = [line for line in said if "`tools` is not read: only the prompt is, for one turn" in line]
    assert [line.split(": ")[1] for line in unread] == [a, b]
    empty = write(tmp_path / "c.jsonl", *(GOOD | {"tools": none} for none in ([], None, "[]", "")))
    assert not [line for line in load_all(tokenizer, f"data.train_file={empty}", "val.file=")[1]
                if "tools" in line]


def test_choices_must_be_in_the_prompt(path, tokenizer):
    row = {"answer": "B", "options": ["12", "13"]}
    with pytest.raises(ValueError, match="jsonl:1: the prompt lacks the choices .*delete their"):
        load_prompts(write(path, row | {"prompt": "a12"}), tokenizer, how())
    load_prompts(write(path, row | {"prompt": "a12 b13"}), tokenizer, how())
    load_prompts(write(path, GOOD | {"options": 4}, GOOD | {"options": "A) 7"}), tokenizer, how())


DATED = ("{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
         "{% endif %}{{ date_string }}{{ thinking }}" + CHATML)


def test_the_date_of_a_template_is_the_same_on_all_days(path, chat):
    """transformers would write today's; one warning for the run names date and key."""
    chat.chat_template = DATED
    files = [f"data.train_file={write(path, GOOD, GOOD | {'prompt': 'a2'})}", f"val.file={path}"]
    data, said = load_all(chat, *files)
    assert [prompt.text for prompt in data.train] == ["26 Jul 2024<user>a1?", "26 Jul 2024<user>a2?"]
    warnings = [line for line in said if "writes a date" in line]
    assert len(warnings) == 1 and "26 Jul 2024" in warnings[0]
    (repair,) = re.findall("(data.chat_template_kwargs=)'(.*)'", warnings[0])
    data, said = load_all(chat, *files, "".join(repair))
    assert data.train[0].text == "1 Dec 2026<user>a1?" and not [s for s in said if "writes a" in s]


def test_what_the_chat_template_takes_is_passed_on(path, chat):
    chat.chat_template = "{{ thinking }}" + CHATML
    keys = ['data.chat_template_kwargs={"thinking": false}']
    assert load_rows(path, chat, GOOD, keys=keys)[0][0].text == "False<user>a1?"
    keys = ['data.chat_template_kwargs={"add_generation_prompt": false}']
    with pytest.raises(ValueError, match="add_generation_prompt.*or data.chat_template_kwargs"):
        load_rows(path, chat, GOOD, keys=keys)


@pytest.mark.parametrize("value", ["{'thinking': false}", "[1]", "true", "{"])
def test_template_arguments_that_are_no_object_are_refused_at_the_start(value):
    with pytest.raises(ValueError, match="^data.chat_template_kwargs=.* is not a JSON object$"):
        load_config("config.yaml", [f"data.chat_template_kwargs={value}"])


def test_no_answers_are_for_reward_functions_of_ones_own(path, tokenizer):
    with pytest.raises(ValueError, match="data.answer_key is empty, and reward.name=math needs ans"):
        load_config("config.yaml", ["data.answer_key="])
    with pytest.raises(ValueError, match="`data.answer_key=` if rewards need no answer") as error:
        load_rows(path, tokenizer, {"prompt": "a1"})
    key = re.search("`(.*)`", str(error.value))[1]
    (prompt,), _ = load_rows(path, tokenizer, {"prompt": "a1"}, keys=[key, "reward.name=m.py:f"])
    assert prompt.answer == ""


def test_an_eos_that_the_tokenizer_appends_is_removed(path, tokenizer):
    """transformers' own post-processor appends it, as add_eos_token does."""
    appends = copy.deepcopy(tokenizer)
    appends.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", appends.eos_token_id)])
    assert appends("a1")["input_ids"][-1] == appends.eos_token_id
    rows = GOOD, {"prompt": "a2", "answer": "1"}
    prompts, said = load_rows(path, appends, *rows)
    assert [p.token_ids for p in prompts] == [p.token_ids for p in load_rows(path, tokenizer, *rows)[0]]
    assert len([line for line in said if "appends <eos>" in line]) == 1
    (prompt,), said = load_rows(path, tokenizer, {"prompt": "a1<eos>", "answer": "1"})
    assert prompt.token_ids[-1] == tokenizer.eos_token_id and len(said) == 1  # the text has it


def test_a_chat_template_that_ends_prompts_with_an_eos_is_warned_about(path, chat):
    chat.chat_template = "{% for m in messages %}{{ m['content'] }}<eos>\n{% endfor %}"
    _, said = load_rows(path, chat, GOOD, {"prompt": "a2", "answer": "1"})
    (warning,) = [line for line in said if line.startswith("warning")]
    assert "<eos>" in warning and "data.apply_chat_template and data.chat_template_kwargs" in warning


def test_rows_that_repeat_are_no_warning_if_they_are_dropped(path, tokenizer):
    rows = [GOOD, GOOD, GOOD | {"answer": "2"}]
    _, said = load_rows(path, tokenizer, *rows, keys=["data.dedup=true"])
    assert said == [f"{path}: 1 prompts of 3 rows, 2 repeated, 1 with another answer"]
    assert load_rows(path, tokenizer, *rows)[1][0].startswith("warning: ")


# ---- real, and as large as published ----


@pytest.mark.skipif(not DATA.is_dir(), reason="needs GSM8K and AIME 2024 in ../shared/data")
def test_real_files_load_without_a_word_on_their_columns(tokenizer):
    more = ["data.max_prompt_length=5000", r"data.answer_regex=([-\d,.]+)\s*$"]
    files = f"val.file={DATA / 'gsm8k_test.jsonl'},{DATA / 'aime24.jsonl'}"
    data, said = load_all(tokenizer, files, *more)
    assert {name: len(prompts) for name, prompts in data.val.items()} == {
        "gsm8k_test": 1319,
        "aime24": 30,
    }
    assert (
        data.val["gsm8k_test"][0].answer == "18"
        and data.val["aime24"][0].answer == "204"
        and len(said) == 3
    )


MAKE = """
import sys, uuid, pyarrow, pyarrow.parquet
sys.path[:0] = ["tests", "."]
import test_data
rows = [test_data.verl_row(i) | {"extra_info": {"index": str(uuid.UUID(int=i))}} for i in range(17_917)]
for i, row in enumerate(rows):
    row["prompt"][0]["content"] = f"Solve problem {i} step by step. " + "Let x be a real number, and y another. " * 14
table = pyarrow.Table.from_pylist(rows)
with pyarrow.parquet.ParquetWriter(sys.argv[1], table.schema) as file:
    for _ in range(100):
        file.write_table(table)
"""
LOAD = """
import resource, sys, time
sys.path[:0] = ["tests", "."]
from transformers import AutoTokenizer
from data_types import Progress
from infra.config import load_config
from infra.data import load_data
from sampling import draw_prompts
tokenizer = AutoTokenizer.from_pretrained("toy/base")
config = load_config("config.yaml", [f"data.train_file={sys.argv[1]}", "val.file=", "data.max_prompt_length=999", sys.argv[2]])
start = time.process_time()  # the clock on the wall runs on while other processes have the cores
data = load_data(config, tokenizer, print)
draw_prompts(data.train, config, Progress().counters, [], 0)  # shuffles all of them
print(time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.slow
def test_1791700_rows_load_lose_what_repeats_and_are_shuffled_within_a_minute_and_4_gb(tmp_path):
    path = tmp_path / "dapo-math-17k.parquet"
    for script, *more in (MAKE,), (LOAD, "data.dedup=true"):
        result = subprocess.run(
            [sys.executable, "-c", script, str(path), *more],
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=True,
        )
    path.unlink()
    assert ": 17917 prompts of 1791700 rows" in result.stdout
    seconds, gigabytes = map(float, result.stdout.split()[-2:])
    assert seconds < 60 and gigabytes < 4
