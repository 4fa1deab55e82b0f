"""Checks before the first step: a run that would train on nothing is told, with the key to set."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import read_rows
from transformers import AutoTokenizer

import infra.checks
from data_types import Prompt
from infra.checks import check_first_prompt, check_launch
from infra.config import load_config

ROOT = Path(__file__).parent.parent
CHATML = ("{% for m in messages %}<|start|>{{ m['role'] }} {{ m['content'] }}<|end|>{% endfor %}"
          "{% if add_generation_prompt %}<|start|>assistant {% endif %}")
ONE_STEP = ["val.file=", "total_training_steps=1"]


@pytest.fixture
def base(tmp_path):
    """A copy of the embedded model's directory, to be edited."""
    return Path(shutil.copytree("toy/base", tmp_path / "base"))


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def write_data(tmp_path, *answers: str) -> str:
    rows = [{"prompt": f"a{i % 10} b+1?", "answer": answer} for i, answer in enumerate(answers)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"data.train_file={tmp_path / 'data.jsonl'}"


def warnings_of(capsys) -> list[str]:
    """The warnings printed so far, but that the recipe is not complete."""
    out, err = capsys.readouterr()
    return re.findall("^warning: (?!.*embedded task's values)(.*)$", out + err, re.MULTILINE)


# ---- token ids ----

def test_a_prompt_beyond_the_embedding_is_one_line_before_the_first_step(start, base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(base)
    with pytest.raises(SystemExit, match="error: model.path: the tokenizer's token '<new>' has the "
                       "id 28, but the model has 28 embeddings: ") as error:
        start(f"model.path={base}", "data.prompt_template=<new>{prompt}", *ONE_STEP)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
    start(f"model.path={base}", *ONE_STEP)  # a token that no prompt has does no harm


# ---- processes, prompts, validation ----

@pytest.mark.parametrize("command, processes, told", [
    ("accelerate launch --num_processes 2 train_dapo.py", 1, True),
    ("accelerate launch --num_processes=2 train_dapo.py", 1, True),
    ("accelerate launch --num-processes 2 train_dapo.py", 1, True),
    ("accelerate launch --multi_gpu --num_processes 2 train_dapo.py", 2, False),
    ("accelerate launch --num_processes 1 train_dapo.py", 1, False), ("bash", 1, False)])
def test_a_launcher_that_starts_fewer_processes_than_it_was_asked_for_is_told(
        monkeypatch, command, processes, told):
    parent = SimpleNamespace(cmdline=command.split)
    monkeypatch.setattr(infra.checks.psutil, "Process", lambda: SimpleNamespace(parent=lambda: parent))
    found = [*check_launch(processes)]
    assert len(found) == told and all("asked for 2 processes and started one" in one for one in found)


def test_prompts_that_repeat_within_a_step_and_equal_validation_responses_are_told(
        start, tmp_path, capsys):
    start(write_data(tmp_path, "1", "2", "3"), "val.max_prompts=2", "val.temperature=0", "val.n=2",
          "total_training_steps=1")
    found = warnings_of(capsys)
    assert any(one.startswith("data.train_file has 3 prompts, fewer than data.train_batch_size=4")
               for one in found)
    assert any(one.startswith("val.temperature=0 with val.n=2: all responses") for one in found)


# ---- what the data have already ----

def test_a_bos_or_a_chat_template_that_prompts_have_already_is_told(start, base, tmp_path, capsys):
    add_chat(base, CHATML.replace("<|end|>", "<eos>"))
    row = {"prompt": "<|start|>user a1 b+1?<eos><|start|>assistant ", "answer": "2"}
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    options = [f"model.path={base}", f"data.train_file={tmp_path / 'data.jsonl'}",
               "filter_groups.max_num_gen_batches=1", *ONE_STEP]
    start(*options)
    (warning,) = [line for line in warnings_of(capsys) if line.startswith("prompts")]
    assert warning.startswith("prompts in the data have a chat template's '<eos>' already, and ")
    assert warning.endswith("set data.apply_chat_template=false")
    shutil.rmtree(tmp_path / "run")
    start(*options, "data.apply_chat_template=false")
    assert not [line for line in warnings_of(capsys) if line.startswith("prompts")]

    edit_json(base / "tokenizer_config.json", bos_token="<|start|>", add_bos_token=True)
    tokenizer = AutoTokenizer.from_pretrained(base)
    prompt = Prompt(0, "", [tokenizer.bos_token_id] * 2 + [5], "2", {"prompt": "a1"})
    (warning,) = check_first_prompt(load_config("config.yaml").data, tokenizer, prompt)
    assert warning.startswith("prompts begin with '<|start|>' twice")


# ---- what ends a response ----

@pytest.mark.parametrize("kind", ["none", "beyond the embedding"])
def test_a_model_whose_responses_cannot_end_is_told_so(start, base, capsys, kind):
    for name in ("config.json", "generation_config.json"):
        edit_json(base / name, eos_token_id=None)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.eos_token = None if kind == "none" else "<end>"
    if kind != "none":
        tokenizer.add_special_tokens({"eos_token": "<end>"})
        assert tokenizer.eos_token_id == 28
    tokenizer.save_pretrained(base)
    run_dir = start(f"model.path={base}", *ONE_STEP)
    assert [row["response_length/truncated"] for row in read_rows(run_dir)] == [1.0]
    (warning, *_) = warnings_of(capsys)
    assert "name no EOS that the model can write" in warning and "rollout.stop_tokens" in warning


def add_chat(base: Path, template: str) -> None:
    """Give the copy's tokenizer two of its tokens as marks of a chat, and a template."""
    text = (base / "tokenizer.json").read_text()
    content = json.loads(text)
    start_id, end_id = (max(content["model"]["vocab"].values()) - i for i in (1, 0))
    by_id = {i: name for name, i in content["model"]["vocab"].items()}
    for token_id, name in ((start_id, "<|start|>"), (end_id, "<|end|>")):
        content["model"]["vocab"][name] = content["model"]["vocab"].pop(by_id[token_id])
        content["added_tokens"].append(
            {"id": token_id, "content": name, "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False, "special": True})
    (base / "tokenizer.json").write_text(json.dumps(content))
    (base / "chat_template.jinja").write_text(template)


def test_an_end_of_turn_that_ends_no_response_is_told_with_the_key(start, base, capsys):
    add_chat(base, CHATML)
    start(f"model.path={base}", *ONE_STEP)
    (warning,) = warnings_of(capsys)
    assert warning == ("the chat template ends a turn with '<|end|>', but a response ends with "
                       "'<eos>': set rollout.stop_tokens=<|end|>")


def test_stop_tokens_end_responses_here_and_in_the_exported_model(start, base, capsys):
    add_chat(base, CHATML)
    run_dir = start(f"model.path={base}", "rollout.stop_tokens=<|end|>", *ONE_STEP)
    out = capsys.readouterr().out
    assert "warning" not in out and "a response ends with '<eos>' or '<|end|>'" in out
    saved = json.loads((run_dir / "model/generation_config.json").read_text())
    assert saved["eos_token_id"] == [0, 27]


def test_a_stop_token_that_the_tokenizer_lacks_is_one_line(start):
    with pytest.raises(SystemExit, match="rollout.stop_tokens: the tokenizer has no token '<|x|>'"
                       .replace("|", r"\|")):
        start("rollout.stop_tokens=<|x|>")


def test_a_template_that_ends_turns_with_the_eos_or_refuses_chats_prints_nothing(start, base,
                                                                              capsys):
    for template in (CHATML.replace("<|end|>", "<eos>"), "{{ messages[0]['content'] }}",
                     "{% if messages|length > 1 %}{{ raise_exception('one turn') }}{% endif %}a1"):
        (base / "chat_template.jinja").write_text(template)
        start(f"model.path={base}", "run_dir=" + str(base.parent / "run"), "resume=never", *ONE_STEP)
        shutil.rmtree(base.parent / "run")
        assert warnings_of(capsys) == []


# ---- references ----

@pytest.mark.parametrize("answers, key", [
    (["so 1 + 2 #### 3", "it is #### 4"], "set data.answer_regex='#### (.+)'"),
    (["hence \\boxed{3}.", "thus \\boxed{\\frac{1}{2}}"], r"set data.answer_regex='boxed\{(.*)\}'"),
    (["3\n4", "the\nway"], "set data.answer_key or data.answer_regex"),
    (["3" * 301, "4"], "set data.answer_key or data.answer_regex")],
    ids=["GSM8K as published", "solutions with a box", "two lines", "a whole solution"])
def test_references_that_cannot_be_right_are_counted_and_the_first_is_shown(
        start, tmp_path, capsys, answers, key):
    start(write_data(tmp_path, *answers), "filter_groups.max_num_gen_batches=1", *ONE_STEP)
    wrong = [answer for answer in answers if answer != "4"]
    first = f"reward.name=math: {len(wrong)} of {len(answers)} reference answers are not right"
    found = [line for line in warnings_of(capsys) if line.startswith("reward.name")]
    assert len(found) == 1 and found[0].startswith(first) and key in found[0]
    assert repr(answers[0][-60:]) in found[0]


def test_the_advised_regex_makes_the_references_right(start, tmp_path, capsys):
    for answers, regex in ((["1 #### 3", "2 #### 4"], "#### (.+)"),
                           ([r"so \boxed{\frac{1}{2}}.", r"\boxed{7}"], r"boxed\{(.*)\}")):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        start(write_data(tmp_path, *answers), f"data.answer_regex={regex}",
              "filter_groups.max_num_gen_batches=1", *ONE_STEP)
        assert not [line for line in warnings_of(capsys) if line.startswith("reward.name")]


@pytest.mark.parametrize("name, right, warned", [
    ("math_strict_box", "3/4", 0), ("math_verify", "\\frac{3}{4}", 0),
    ("mine.py:score", "3", 0), ("mine.py:never", "3", 1), ("mine.py:number", "3", 0),
    ("mine.py:some", "3", 0)])
def test_each_kind_of_reward_function_judges_its_references(start, tmp_path, capsys, monkeypatch,
                                                           name, right, warned):
    """One of the user's own is told only if it states accuracies and none is right."""
    (tmp_path / "mine.py").write_text(
        "from reward import score_math as score\n"
        "def never(response, ground_truth):\n    return {'score': len(response) % 2, 'acc': 0}\n"
        "def number(response, ground_truth):\n    return float(len(response) % 2)\n"
        "def some(response, ground_truth):\n"
        "    return {'score': len(response) % 2, 'acc': ground_truth == '3'}\n")
    name = str(tmp_path / name) if name.startswith("mine") else name
    start(write_data(tmp_path, right, "4"), f"reward.name={name}",
          "filter_groups.max_num_gen_batches=1", *ONE_STEP)
    found = [line for line in warnings_of(capsys) if line.startswith("reward.name")]
    assert len(found) == warned


def test_the_default_run_prints_no_warning(start, capsys):
    start("total_training_steps=1", "val.max_prompts=4")
    assert warnings_of(capsys) == []
