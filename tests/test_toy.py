"""toy/make_toy.py: the task is as described, and the code still makes what the repository holds."""

import json
import random
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from data_types import SamplingParams
import toy.make_toy as toy
from reward import score_math
from rollout import transformers_engine

ROOT = Path(__file__).parent.parent
ROWS = [
    json.loads(line)
    for name in ("train", "val")
    for line in (ROOT / f"toy/{name}.jsonl").read_text().splitlines()
]


def solve(prompt):
    """An independent reading of a prompt, left to right modulo 10."""
    value, *steps = re.findall(r"[a-j]([-+*]?)(\d)", prompt)
    result = int(value[1])
    for op, operand in steps:
        result = {
            "+": result + int(operand),
            "-": result - int(operand),
            "*": result * int(operand),
        }[op] % 10
    return str(result)


def test_every_answer_in_the_files_is_right():
    assert len(ROWS) == 5500 and all(solve(row["prompt"]) == row["answer"] for row in ROWS)


def test_validation_problems_are_held_out():
    train, val = {row["prompt"] for row in ROWS[:5000]}, {row["prompt"] for row in ROWS[5000:]}
    assert len(val) == 500 and not train & val


def test_worked_answers_are_right_step_by_step():
    rng = random.Random(0)
    for _ in range(200):
        prompt, response = toy.make_demonstration(
            rng, worked_rate=1.0, error_rate=0.0, filler_rate=0.0
        )
        assert score_math(response, solve(prompt)).acc == 1
        assert all(
            str(eval(step[0]) % 10) == step[1]
            for step in re.findall(r"[a-j](\d[-+*]\d)=(\d)", response)
        )


def test_the_rates_of_demonstrations_are_those_asked_for():
    rng = random.Random(0)
    texts = [
        toy.make_demonstration(rng, worked_rate=0.2, error_rate=0.0, filler_rate=0.3)[1]
        for _ in range(4000)
    ]
    assert sum("=" in t for t in texts) / 4000 == pytest.approx(0.2, abs=0.03)
    assert sum("." in t for t in texts) / 4000 == pytest.approx(0.3, abs=0.03)


def test_the_tokenizer_round_trips_and_keeps_the_answer_in_one_token(tokenizer):
    text = "a7 b*3 c+5? b7*3=1 c1+5=6....\nAnswer: 6"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.convert_tokens_to_ids("\nAnswer: ") in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode("é")) == toy.FILLER  # foreign text is no error


def measure_style(model, tokenizer, problems=200):
    """Accuracy of sampled responses, share that shows its work, accuracy of those."""
    rows = ROWS[5000 : 5000 + problems]
    engine = transformers_engine(model, tokenizer, nullcontext, 1024, False)
    groups = engine.generate(
        [tokenizer.encode(row["prompt"]) for row in rows],
        [(i,) for i in range(problems)],
        SamplingParams(n=4, max_tokens=96),
    )
    results = [
        ("=" in r.text, score_math(r.text, row["answer"]).acc)
        for row, group in zip(rows, groups, strict=True)
        for r in group
    ]
    worked = [acc for shows, acc in results if shows]
    return (
        sum(acc for _, acc in results) / len(results),
        len(worked) / len(results),
        sum(worked) / len(worked),
    )


def check_base(model, tokenizer):
    accuracy, share, worked = measure_style(model, tokenizer)
    assert accuracy < 0.40 and 0.08 < share < 0.35 and worked > 0.80


def test_the_committed_base_can_reason_but_seldom_does(model, tokenizer):
    check_base(model, tokenizer)
    assert (ROOT / "toy/base/model.safetensors").stat().st_size < 2_000_000


def test_the_base_of_the_ladder_shows_its_work_more_seldom(tokenizer):
    base = AutoModelForCausalLM.from_pretrained(ROOT / "toy/hard/base").eval()
    accuracy, share, worked = measure_style(base, tokenizer)
    assert accuracy < 0.20 and 0.02 < share < 0.12 and worked > 0.70
    text = toy.make_demonstration(random.Random(0), 1, 0, 0, pause_rate=1)[1]
    assert text.count("=") == text.count(toy.FILLER) > 0  # one after each step


def test_the_code_still_writes_the_committed_data_files(tmp_path):
    seen = set()
    toy.write_problems(tmp_path / "val.jsonl", "validation", 500, seen)
    toy.write_problems(tmp_path / "train.jsonl", "train 0", 5000, seen)
    for name in ("val.jsonl", "train.jsonl"):
        assert (tmp_path / name).read_bytes() == (ROOT / "toy" / name).read_bytes()


def test_the_code_still_makes_the_committed_tokenizer(tokenizer):
    assert toy.make_tokenizer().backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


@pytest.mark.slow
def test_the_script_still_writes_an_equally_good_base_and_the_committed_data(
    tokenizer, tmp_path, monkeypatch
):
    measured = toy.reasoning_accuracy  # quicker: 0.95 is enough here, 0.97 for the committed one
    monkeypatch.setattr(toy, "reasoning_accuracy", lambda *args: measured(*args) + 0.02)
    monkeypatch.setattr("sys.argv", ["make_toy.py", "--out", str(tmp_path / "new")])
    toy.main()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new/base").eval()
    check_base(model, tokenizer)
    committed = AutoModelForCausalLM.from_pretrained(ROOT / "toy/base")
    assert model.num_parameters() == committed.num_parameters()
    assert (tmp_path / "new/train.jsonl").read_bytes() == (ROOT / "toy/train.jsonl").read_bytes()
