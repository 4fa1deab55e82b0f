"""Public data sets of language models: a small invented row of each layout, with its columns and
types as published, is read as docs/DATA.md says, or refused with the cause."""

import json
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from infra.config import load_config
from infra.data import load_data

PAGE = (Path(__file__).parent.parent / "docs/DATA.md").read_text(encoding="utf-8")
(BOX,) = re.findall(r"data\.answer_regex='(.*boxed.*)'", PAGE)
BOX = f"data.answer_regex={BOX}"
HASHES = "data.answer_regex=#### (.+)"
CHATML = ("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
          "{% if add_generation_prompt %}<assistant>{% endif %}")
ASKED = "<user>a1 b+2?<assistant>"
SOLVED = r"Note \boxed{1}. So \boxed{\frac{1}{\sqrt{2}}}."  # its last box is the answer


def user(text="a1 b+2?", **more):
    return {"role": "user", "content": text} | more


def assistant(text="3"):
    return {"role": "assistant", "content": text}


def verl(answer="3", **more):
    return {"data_source": "d", "prompt": [user()], "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": answer},
            "extra_info": {"index": 1}} | more


# Name: (kind of file, row, keys to set, prompt, answer).
READ = {
    # by themselves
    "DAPO-Math-17k": ("parquet", verl(), [], ASKED, "3"),
    "DAPO-Math-17k-Processed": (
        "parquet", verl(prompt="a1 b+2?", solution="3", source_prompt=[user("long")]),
        [], ASKED, "3"),
    "AIME-2024 (BytedTsinghua-SIA)": (
        "parquet", verl("033", extra_info={"index": 1, "raw_problem": "p", "split": None}),
        [], ASKED, "033"),
    "aime_2024 (HuggingFaceH4)": (
        "parquet", {"id": 60, "problem": "a1 b+2?", "solution": SOLVED, "answer": "003",
                    "url": "u", "year": "2024"}, [], ASKED, "003"),
    "AIME2025 (opencompass)": ("jsonl", {"question": "a1 b+2?", "answer": "3"}, [], ASKED, "3"),
    "aime_2025 (MathArena)": (
        "parquet", {"problem_idx": 1, "problem": "a1 b+2?", "answer": 3, "problem_type": ["A"]},
        [], ASKED, "3"),
    "MATH-500": (
        "jsonl", {"problem": "a1 b+2?", "solution": SOLVED, "answer": r"\left[ 3, \infty \right)",
                  "subject": "Algebra", "level": 2, "unique_id": "test/1.json"},
        [], ASKED, r"\left[ 3, \infty \right)"),
    "aimo-validation-amc": (
        "parquet", {"id": 0, "problem": "a1 b+2?", "answer": 142.0, "url": "u"},
        [], ASKED, "142"),
    "OlympiadBench": (
        "parquet", {"id": 1, "question": "a1 b+2?", "solution": ["s"], "final_answer": ["$3$"],
                    "context": None, "image_1": None, "modality": "Text-only",
                    "is_multiple_answer": False, "unit": None, "answer_type": "Numerical"},
        [], ASKED, "$3$"),
    "minervamath": ("parquet", {"question": "a1 b+2?", "answer": "1e33"}, [], ASKED, "1e33"),
    "NuminaMath-1.5": (
        "parquet", {"problem": "a1 b+2?", "solution": "s", "answer": "3", "problem_type": "A",
                    "question_type": "math-word-problem", "problem_is_valid": "Yes",
                    "solution_is_valid": "Yes", "source": "olympiads", "synthetic": False},
        [], ASKED, "3"),
    "OpenR1-Math-220k": (
        "parquet", {"problem": "a1 b+2?", "solution": "s", "answer": "3", "problem_type": "A",
                    "source": "s", "uuid": "u", "is_reasoning_complete": [True],
                    "generations": ["<think>"], "correctness_math_verify": [True],
                    "messages": [user("other"), assistant()]}, [], ASKED, "3"),
    "Big-Math-RL-Verified": (
        "parquet", {"problem": "a1 b+2?", "answer": "3", "source": "s", "domain": ["A"],
                    "llama8b_solve_rate": 0.5}, [], ASKED, "3"),
    "DeepScaleR-Preview-Dataset": (
        "array", {"problem": "a1 b+2?", "answer": "3", "solution": "s"}, [], ASKED, "3"),
    "Skywork-OR1-RL-Data": (
        "parquet", verl('["\\\\frac{1}{2}"]', extra_info={"index": 1, "model_difficulty": {"m": 1}}),
        [], ASKED, r"\frac{1}{2}"),
    "orz_math_57k (Open-Reasoner-Zero)": (
        "array", [{"from": "human", "value": "a1 b+2?"},
                  {"from": "assistant", "ground_truth": {"value": "3"}}], [], ASKED, "3"),
    "LIMO": ("jsonl", {"question": "a1 b+2?", "solution": "s", "answer": "3"}, [], ASKED, "3"),
    "LIMR": ("array", {"prompt": "a1 b+2?", "answer": "3"}, [], ASKED, "3"),
    "SimpleRL-Zoo-Data": (
        "parquet", verl(gt_answer="3", subject="A", level=3, question="a1 b+2?", target="3")
        | {"answer": SOLVED}, [], ASKED, "3"),
    "DeepMath-103K": (
        "parquet", {"question": "a1 b+2?", "final_answer": "3", "difficulty": 4.5, "topic": "t",
                    "r1_solution_1": "s", "r1_solution_2": "s", "r1_solution_3": "s"},
        [], ASKED, "3"),
    "Polaris-Dataset-53K": (
        "parquet", {"problem": "a1 b+2?", "answer": "3", "difficulty": "4/8"}, [], ASKED, "3"),
    "Eurus-2-RL-Data": (
        "parquet", verl(prompt=[{"role": "system", "content": "be"}, user()]),
        [], "<system>be" + ASKED, "3"),
    "open-s1": (
        "parquet", {"problem": "a1 b+2?", "solution": "s", "answer": "3"}, [], ASKED, "3"),
    "orca-math-word-problems-200k": (
        "parquet", {"question": "a1 b+2?", "answer": "It is 3 dollars."},
        [], ASKED, "It is 3 dollars."),
    "WebInstruct-verified": (
        "parquet", {"id": 1, "question": "a1 b+2?", "answer": "$3$", "answer_type": "Float",
                    "category": "Physics", "difficulty": "Senior"}, [], ASKED, "$3$"),
    "OpenMathInstruct-2 as NeMo-RL has it": (
        "jsonl", {"messages": [user(), assistant()], "task_name": "math"}, [], ASKED, "3"),
    "tulu-3-sft-mixture": (
        "parquet", {"id": "1", "messages": [user(), assistant("hi"), user("a2?"), assistant()],
                    "source": "s"}, [], "<user>a1 b+2?<assistant>hi<user>a2?<assistant>", "3"),
    "OpenThoughts-114k": (
        "parquet", {"system": "think", "conversations": [
            {"from": "user", "value": "a1 b+2?"}, {"from": "assistant", "value": "<think></think>3"}]},
        [], ASKED, "<think></think>3"),
    "OpenThoughts3-1.2M": (
        "parquet", {"difficulty": 7, "source": "s", "domain": "math", "conversations": [
            {"from": "human", "value": "a1 b+2?"}, {"from": "gpt", "value": "3"}]}, [], ASKED, "3"),
    "RLVR-GSM-MATH-IF (Tulu 3)": (
        "parquet", {"messages": [user()], "ground_truth": "3", "dataset": "gsm8k",
                    "constraint_type": None, "constraint": None}, [], ASKED, "3"),
    "trl-lib/tldr": ("parquet", {"prompt": "a1 b+2?", "completion": " 3"}, [], ASKED, " 3"),
    "TRL, conversational prompt-completion": (
        "parquet", {"prompt": [user()], "completion": [assistant()]}, [], ASKED, "3"),
    # with keys
    "AIME_2024 (Maxwell-Jia)": (
        "parquet", {"ID": "2024-I-1", "Problem": "a1 b+2?", "Solution": SOLVED, "Answer": 3},
        ["data.prompt_key=Problem", "data.answer_key=Answer"], ASKED, "3"),
    "gsm8k (openai)": (
        "parquet", {"question": "a1 b+2?", "answer": "1+2=<<1+2=3>>3\n#### 3"},
        [HASHES], ASKED, "3"),
    "grade-school-math (openai)": (
        "jsonl", {"question": "a1 b+2?", "answer": "1+2=3\n#### 3"}, [HASHES], ASKED, "3"),
    "gsm8k-platinum": (
        "parquet", {"question": "a1 b+2?", "answer": "1+2\n#### 3", "cleaning_status": "consensus"},
        [HASHES], ASKED, "3"),
    "hendrycks_math": (
        "parquet", {"problem": "a1 b+2?", "level": "Level 5", "type": "A", "solution": SOLVED},
        ["data.answer_key=solution", BOX], ASKED, r"\frac{1}{\sqrt{2}}"),
    "SVAMP (ChilleD)": (
        "parquet", {"ID": "c-1", "Body": "a1", "Question": "b+2?", "Equation": "( 1 + 2 )",
                    "Answer": "3", "Type": "Addition", "question_concat": "a1 b+2?"},
        ["data.prompt_key=question_concat", "data.answer_key=Answer"], ASKED, "3"),
    "Calc-mawps": (
        "parquet", {"id": "m", "question": "a1 b+2?", "chain": "c", "result": "3",
                    "result_float": 3.0, "equation": "x=1+2", "expression": "1+2"},
        ["data.answer_key=result"], ASKED, "3"),
    "NuminaMath-CoT": (
        "parquet", {"source": "s", "problem": "a1 b+2?", "solution": SOLVED,
                    "messages": [user(), assistant(SOLVED)]},
        ["data.answer_key=solution", BOX], ASKED, r"\frac{1}{\sqrt{2}}"),
    "NuminaMath-TIR": (
        "parquet", {"problem": "a1 b+2?", "solution": SOLVED,
                    "messages": [user(), assistant(SOLVED)]},
        ["data.prompt_key=messages", BOX], ASKED, r"\frac{1}{\sqrt{2}}"),
    "s1K": (
        "parquet", {"solution": "3", "question": "a1 b+2?", "cot_type": "math",
                    "source_type": "s", "metadata": "{}", "cot": None,
                    "thinking_trajectories": ["t"], "attempt": "3"},
        ["data.answer_key=solution"], ASKED, "3"),
    "Countdown as TinyZero prepares it": (
        "parquet", verl({"target": 98, "numbers": [44, 19, 35]}, target=98, nums=[44, 19, 35]),
        ["data.answer_key=target"], ASKED, "98"),
    "AReaL-boba-Data": (
        "jsonl", {"prompt": "a1 b+2?", "task": "math", "query_id": "q",
                  "solutions": [r"\boxed{3}"]}, ["data.answer_key=solutions", BOX], ASKED, "3"),
    "MetaMathQA": (
        "array", {"type": "MATH_Rephrased", "query": "a1 b+2?", "original_question": "o",
                  "response": "1+2=3.\nThe answer is: 3"},
        ["data.prompt_key=query", "data.answer_key=response",
         "data.answer_regex=The answer is: (.+)"], ASKED, "3"),
    "OpenMathInstruct-2": (
        "parquet", {"problem": "a1 b+2?", "generated_solution": "s", "expected_answer": "3",
                    "problem_source": "math"}, ["data.answer_key=expected_answer"], ASKED, "3"),
    "ultrachat_200k": (
        "parquet", {"prompt": "a1 b+2?", "prompt_id": "p", "messages": [user(), assistant("yes")]},
        ["data.prompt_key=messages"], ASKED, "yes"),
    "ultrafeedback-prompt (trl-lib)": (
        "parquet", {"prompt": [user()]}, ["data.answer_key=", "reward.name=mine.py:score"],
        ASKED, ""),
    "TACO": (
        "parquet", {"question": "a1 b+2?", "solutions": '["print(3)"]', "starter_code": "",
                    "input_output": '{"inputs": ["1\\n"], "outputs": ["3\\n"]}',
                    "difficulty": "EASY"},
        ["data.answer_key=input_output"], ASKED, '{"inputs": ["1\\n"], "outputs": ["3\\n"]}'),
    "apps": (
        "jsonl", {"problem_id": 1, "question": "a1 b+2?", "solutions": '["print(3)"]',
                  "input_output": '{"inputs": [], "outputs": []}', "difficulty": "interview",
                  "url": "u", "starter_code": ""},
        ["data.answer_key=input_output"], ASKED, '{"inputs": [], "outputs": []}'),
    "openai_humaneval": (
        "parquet", {"task_id": "HumanEval/0", "prompt": "a1 b+2?", "canonical_solution": "3",
                    "test": "def check(f): pass", "entry_point": "f"},
        ["data.answer_key=test"], ASKED, "def check(f): pass"),
    "mbpp": (
        "parquet", {"task_id": 1, "text": "a1 b+2?", "code": "3", "test_list": ["assert 1", "2"],
                    "test_setup_code": "", "challenge_test_list": []},
        ["data.prompt_key=text", "data.answer_key=code"], ASKED, "3"),
}
CHOICES = {"label": ["A", "B"], "text": ["7", "3"]}
# Name: (kind of file, row, keys, what the refusal says).
REFUSED = {
    "Countdown-Tasks-3to4": (
        "parquet", {"target": 98, "nums": [44, 19, 35]}, [],
        "no text or list of chat messages .*columns: target, nums.: set data.prompt_key"),
    "mmlu (cais)": (
        "parquet", {"question": "a1 b+2?", "subject": "s", "choices": ["7", "3"], "answer": 1}, [],
        r"the prompt lacks the choices \['7', '3'\]: write them into it, or delete their column"),
    "ai2_arc": (
        "parquet", {"id": "1", "question": "a1 b+2?", "choices": CHOICES, "answerKey": "B"},
        ["data.answer_key=answerKey"], r"the prompt lacks the choices \[\['A', 'B'\], \['7"),
    "commonsense_qa": (
        "parquet", {"id": "1", "question": "a1 b+2?", "question_concept": "c", "choices": CHOICES,
                    "answerKey": "B"}, [], "the prompt lacks the choices"),
    "boolq": (
        "parquet", {"question": "a1 b+2?", "answer": True, "passage": "p"}, [],
        "no single text or number .*found True; columns: question, answer, passage"),
}


@pytest.fixture(scope="module")
def chat():
    """The embedded tokenizer with a chat template."""
    tokenizer = AutoTokenizer.from_pretrained("toy/base")
    tokenizer.chat_template = CHATML
    return tokenizer


def load(tmp_path, tokenizer, kind, row, keys):
    """(prompts, log) of a file of two such rows."""
    path = tmp_path / f"data.{'json' if kind == 'array' else kind}"
    if kind == "parquet":
        from datasets import Dataset
        Dataset.from_list([row, row]).to_parquet(path)
    elif kind == "array":
        path.write_text(json.dumps([row, row], indent=2))
    else:
        path.write_text(f"{json.dumps(row)}\n" * 2)
    log = []
    config = load_config("config.yaml", [f"data.train_file={path}", "val.file=", "data.dedup=true",
                                         "data.max_prompt_length=999", *keys])
    return load_data(config, tokenizer, log.append).train, log


@pytest.mark.parametrize("name", READ)
def test_a_public_layout_is_read(tmp_path, chat, name):
    kind, row, keys, text, answer = READ[name]
    (prompt,), log = load(tmp_path, chat, kind, row, keys)
    assert (prompt.text, prompt.answer) == (text, answer)
    warnings = [line for line in log if line.startswith("warning")]
    assert len(warnings) == (name == "OpenThoughts-114k"), warnings
    assert all("column `system` is not read" in line for line in warnings)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_with_the_cause(tmp_path, chat, name):
    kind, row, keys, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path, chat, kind, row, keys)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


WITH_KEYS = {name: keys for name, (_, _, keys, *_) in READ.items() if keys}


@pytest.mark.parametrize("name", WITH_KEYS)
def test_keys_that_the_page_names_are_needed(tmp_path, chat, name):
    """Without them the row is refused, or its answer is a whole solution."""
    kind, row, _, text, answer = READ[name]
    try:
        (prompt,), _ = load(tmp_path, chat, kind, row, [])
    except ValueError as error:
        assert re.search("set data.(prompt|answer)_key", str(error))
    else:
        assert (prompt.text, prompt.answer) != (text, answer)


def table():
    """The rows of the page's table: {name: (columns, keys or refusal)}."""
    rows = re.findall(r"^\| (.+?) \| (`.+?`) \| (.*?) \| (.*?) \|$", PAGE, re.MULTILINE)
    return {name: (re.findall(r"`(.+?)`", columns), keys) for name, columns, keys, _ in rows}


def test_the_page_lists_each_layout_with_its_columns_and_keys():
    rows = table()
    assert rows.keys() == READ.keys() | REFUSED.keys()
    for name, (_, row, keys, *_) in (READ | REFUSED).items():
        columns, said = rows[name]
        assert columns == (list(row) if isinstance(row, dict) else ["from", "value", "ground_truth"])
        expected = " ".join("BOX" if key == BOX else f"`{key}`" for key in keys)
        expected = expected.replace("mine.py:score", "...").replace(HASHES, "data.answer_regex='"
                                                                    "#### (.+)'")
        expected = expected.replace("=The answer is: (.+)", "='The answer is: (.+)'")
        assert said == ("refused" if name in REFUSED else expected or "none"), name


def test_the_pages_figures_are_those_of_the_table():
    with_keys = len(WITH_KEYS)
    assert (f"{len(READ) + len(REFUSED)} layouts: {len(READ) - with_keys} are read as they are, "
            f"{with_keys} with keys, {len(REFUSED)} are refused") in PAGE
    assert len(READ) >= 36
