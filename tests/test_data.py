"""infra/data.py: rows of every kind become prompts; what is wrong with them is said in one line."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

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
    with pytest.raises(ValueError, match="none of 2 rows is a new prompt .*leave this out"):
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
        f"warning: {path}: 2 of 2 prompts are in data.train_file too",
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
        ([], ": none of 0 rows is a new prompt"),
        (["", "  "], ": none of 0 rows is a new prompt"),
        (
            [{"prompt": "a" + "1" * 99, "answer": "1"}],
            ": none of 1 rows is a new prompt of at most data.max_prompt_length=64 tokens: raise it",
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
