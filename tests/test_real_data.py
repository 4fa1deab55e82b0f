"""The same script on real text: GSM8K, with a byte-level tokenizer trained on it and a tiny random model."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from infra.config import load_config
from infra.setup import setup
from rollout import transformers_engine

DATA = Path(__file__).parent.parent.parent / "shared/data"
pytestmark = pytest.mark.skipif(
    not DATA.is_dir(), reason="needs GSM8K and AIME 2024 in ../shared/data"
)
RECIPE = "configs/gsm8k_qwen2.5_1.5b.yaml"


def whole_rows(name):
    """The lines of a data file; a copy whose last row is cut (as copies are) does without it."""
    lines = (DATA / name).read_text(encoding="utf-8").splitlines()
    return lines if lines[-1].endswith("}") else lines[:-1]


@pytest.fixture(scope="module")
def gsm8k(tmp_path_factory):
    path = tmp_path_factory.mktemp("gsm8k") / "gsm8k_train.jsonl"
    path.write_text("\n".join(whole_rows("gsm8k_train.jsonl")), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tiny_qwen(tmp_path_factory):
    """A model directory as a hub would give it: byte-level BPE, chat template, two EOS ids, random weights."""
    path = tmp_path_factory.mktemp("tiny_qwen")
    lines = whole_rows("gsm8k_train.jsonl")[:500]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(
        (json.loads(line)["question"] for line in lines),
        trainers.BpeTrainer(
            vocab_size=1000,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    fast.save_pretrained(path)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(fast),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
        )
    )
    model.generation_config.eos_token_id = [0, 2]
    model.save_pretrained(path)
    return path


def real(tiny_qwen, gsm8k, tmp_path, *more):
    """Overrides for the real recipe. A random model is never right, so the reward is the share of digits."""
    (tmp_path / "digits.py").write_text(
        "def score(response, ground_truth, question, **row):\n"
        "    assert isinstance(question, str) and ground_truth.replace(',', '').replace('-', '').replace('.', '').isdigit()\n"
        "    return sum(c.isdigit() for c in response) / (len(response) + 1)\n"
    )
    return [
        f"model.path={tiny_qwen}",
        f"data.train_file={gsm8k}",
        f"val.file={DATA / 'gsm8k_test.jsonl'}",
        "data.max_response_length=24",
        "overlong_buffer.len=8",
        "mixed_precision=no",
        "filter_groups.metric=score",
        f"reward.name={tmp_path / 'digits.py'}:score",
        "actor.lr=1e-3",
        *more,
    ]


@pytest.mark.dapo
def test_real_steps_on_the_real_file(start, tiny_qwen, gsm8k, tmp_path, capsys):
    run_dir = start(*real(tiny_qwen, gsm8k, tmp_path), config=RECIPE)
    out = capsys.readouterr().out
    assert (
        f"gsm8k_train.jsonl: {len(whole_rows('gsm8k_train.jsonl'))} prompts" in out
        and "gsm8k_test.jsonl: 6 prompts" in out
    )
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["optimizer_steps"] == 4 and rows[-1]["actor/grad_norm"] > 0
    samples = [
        json.loads(line)
        for path in sorted((run_dir / "rollouts").glob("step_*"))
        for line in path.read_text().splitlines()
    ]
    assert all(
        s["prompt"].startswith("<|im_start|>user\n")
        and s["prompt"].endswith("<|im_start|>assistant\n")
        for s in samples
    )
    assert {s["finish_reason"] for s in samples} <= {"stop", "length"} and len(
        {s["prompt"] for s in samples}
    ) == 4
    AutoModelForCausalLM.from_pretrained(run_dir / "model")


@pytest.mark.parametrize(
    "what, count",
    [
        ("drop", "5[0-9]+ prompts of 7473 rows, 1[0-9]+ overlong: see .*data.overlong_prompts"),
        (
            "truncate_left",
            "7473 prompts of 7473 rows, 1[0-9]+ overlong: see .*data.overlong_prompts",
        ),
    ],
)
def test_long_prompts_are_dropped_or_cut_and_counted(
    start, tiny_qwen, gsm8k, tmp_path, capsys, what, count
):
    start(
        *real(
            tiny_qwen,
            gsm8k,
            tmp_path,
            "data.max_prompt_length=150",
            f"data.overlong_prompts={what}",
            "total_training_steps=1",
            "val.max_prompts=6",
        ),
        config=RECIPE,
    )
    import re

    assert re.search(count, capsys.readouterr().out)


def test_the_math_reward_on_a_random_model_skips_steps_and_says_why(
    start, tiny_qwen, gsm8k, tmp_path
):
    """Nothing is ever right: the run must not divide by zero, hang or train on noise, but say so and stop."""
    with pytest.raises(
        SystemExit,
        match="2 steps in a row were skipped.*0% all-correct, 100% all-wrong, .* truncated: ",
    ):
        start(
            *real(
                tiny_qwen,
                gsm8k,
                tmp_path,
                "reward.name=math",
                "filter_groups.metric=acc",
                "filter_groups.max_num_gen_batches=1",
                "filter_groups.max_skipped_steps=1",
                "val.file=",
            ),
            config=RECIPE,
        )


@pytest.mark.dapo
def test_aime_as_published_and_gsm8k_train_side_by_side(start, tiny_qwen, gsm8k, tmp_path, capsys):
    """AIME in verl's layout, in Parquet, each problem 32 times, with as much of GSM8K; both validate."""
    from datasets import Dataset

    (tmp_path / "length.py").write_text(
        "def score(response, ground_truth, **row):\n"
        "    return {'score': len(response), 'is_aime': row.get('data_source') == 'aime'}\n"
    )
    Dataset.from_list(
        [
            {
                "data_source": "aime",
                "prompt": [{"role": "user", "content": row["problem"]}],
                "ability": "MATH",
                "reward_model": {"style": "rule", "ground_truth": row["answer"]},
                "extra_info": {"index": i},
            }
            for i, row in enumerate(map(json.loads, whole_rows("aime24.jsonl")))
        ]
        * 32
    ).to_parquet(tmp_path / "aime-2024.parquet")
    aime, few = str(tmp_path / "aime-2024.parquet"), tmp_path / "gsm8k_few.jsonl"
    few.write_text("\n".join(whole_rows("gsm8k_train.jsonl")[:30]), encoding="utf-8")
    run_dir = start(
        *real(
            tiny_qwen,
            gsm8k,
            tmp_path,
            f"data.train_file={few},{aime}",
            "data.dedup=true",
            r"data.answer_regex=([-\d,.]+)\s*$",
            f"val.file={DATA / 'gsm8k_test.jsonl'},{aime}",
            "val.max_prompts=3",
            "data.max_prompt_length=900",
            f"reward.name={tmp_path / 'length.py'}:score",
            "save_rollouts=99",
            "total_training_steps=1",
        ),
        config=RECIPE,
    )
    out = capsys.readouterr().out
    assert "aime-2024.parquet: 30 prompts of 960 rows, 930 repeated" in out
    assert "warning: " + aime + ": 3 of its 3 prompts are in data.train_file too" in out
    first, last = (
        json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()
    )
    assert (
        first["val/gsm8k_test/reward/is_aime"] == 0 and first["val/aime-2024/reward/is_aime"] == 1
    )
    assert last["groups/trained"] == 4 and 0 < last["reward/is_aime"] < 1


@pytest.mark.parametrize("recipe", ["gsm8k_qwen2.5_1.5b", "dapo_qwen2.5_32b"])
def test_the_recipes_print_no_warning_on_data_as_published(recipe, tiny_qwen, gsm8k, tmp_path,
                                                           capsys):
    """With a model and settings that fit this machine; rows of the 32B recipe repeat, as those of
    DAPO-Math-17k and AIME 2024 do."""
    from datasets import Dataset
    math = tmp_path / "math.parquet"
    rows = [{"prompt": [{"role": "user", "content": f"{row['problem']}\n\nAnswer: $Answer"}],
             "reward_model": {"ground_truth": row["answer"], "style": "rule"}}
            for row in map(json.loads, whole_rows("aime24.jsonl"))]
    Dataset.from_list(rows[1:] * 3).to_parquet(math)
    Dataset.from_list(rows[:1] * 3).to_parquet(tmp_path / "val.parquet")
    train, val = (gsm8k, DATA / "gsm8k_test.jsonl") if "gsm8k" in recipe else (
        math, tmp_path / "val.parquet")
    config = load_config(f"configs/{recipe}.yaml", [
        f"model.path={tiny_qwen}", f"data.train_file={train}", f"val.file={val}",
        "mixed_precision=no", "rollout.tensor_parallel_size=1", "data.max_prompt_length=900",
        "data.max_response_length=100", "overlong_buffer.len=20", f"run_dir={tmp_path / 'run'}",
        "data.train_batch_size=16", "actor.ppo_mini_batch_size=64"])
    setup(config, transformers_engine)
    out, err = capsys.readouterr()
    found = [line for line in (out + err).splitlines() if "warning" in line.lower()]
    assert found == []
