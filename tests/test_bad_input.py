"""What users get wrong: one clear line that names the place and the repair, exit code 1, nothing half-written."""

import json
import re
import shutil
import signal
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import infra.setup as infra_setup
import train_dapo
from infra.config import load_config
from infra.setup import load_model

ROOT = Path(__file__).parent.parent


def test_a_misspelt_key_is_one_line_before_anything_is_loaded(start, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_dapo, "setup", None)
    with pytest.raises(SystemExit) as error:
        start("actor.clip_ratio_hgh=0.3")
    assert error.value.code == (
        "error: command line: unknown config key actor.clip_ratio_hgh: "
        "did you mean actor.clip_ratio_high? config.yaml lists every key"
    )  # Python prints it on stderr and exits with 1
    assert capsys.readouterr().out == "" and not (tmp_path / "run").exists()


def test_a_broken_weights_file_is_one_line(start, tmp_path):
    shutil.copytree(ROOT / "toy/base", tmp_path / "broken")
    (tmp_path / "broken/model.safetensors").write_bytes(b"half")
    with pytest.raises(SystemExit, match="error: model.path: cannot load .*broken: "):
        start(f"model.path={tmp_path / 'broken'}")


def test_a_reward_file_that_cannot_be_imported_is_one_line(start, tmp_path):
    (tmp_path / "mine.py").write_text("import nowhere_to_be_found\n")
    with pytest.raises(
        SystemExit, match="error: reward.name: cannot import .*mine.py: ModuleNotFoundError"
    ):
        start(f"reward.name={tmp_path / 'mine.py'}:score")


@pytest.fixture
def data(tmp_path):
    """`data(row, ...)`: the path of a JSONL file."""

    def data(*rows):
        (tmp_path / "data.jsonl").write_text(
            "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
        )
        return str(tmp_path / "data.jsonl")

    return data


def write_reward(tmp_path, body):
    (tmp_path / "mine.py").write_text(f"def score(response, ground_truth, **row):\n    {body}\n")
    return f"reward.name={tmp_path / 'mine.py'}:score"


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["data.train_file=nowhere.jsonl"],
            "error: nowhere.jsonl: no such data file in the current directory: run from",
        ),
        (
            ["val.file=nowhere.jsonl"],
            "error: nowhere.jsonl: no such data file in the current directory: run from",
        ),
        (["model.path=nowhere"], "error: model.path: nowhere "),
        (["model.path=owner/nowhere"], "error: model.path: .*owner/nowhere"),
        (["model.path=toy"], "error: model.path: cannot load toy"),
        (["model.attn_implementation=fast"], "error: model.path or model.attn_implementation=fast: cannot load toy/base"),
        (
            ["reward.name=maths"],
            "error: reward.name: 'maths' is neither math, math_strict_box, math_verify nor",
        ),
        (
            ["reward.name=math,math_strict_box"],
            "error: reward.weights='1': a number for each of the 2 of reward.name is expected",
        ),
        (
            ["data.max_prompt_length=2"],
            "error: toy/train.jsonl: no prompt is left of 5000 rows: 0 are repeated, 5000 longer than data.max_prompt_length=2 tokens",
        ),
        (
            ["data.prompt_key=task"],
            "error: toy/train.jsonl:1: no text or list .* in 'task' .found None; columns: prompt, answer, level",
        ),
        (
            ["data.train_file={mine}", "data.prompt_key=task"],
            "val.jsonl:1: no text .* in 'task'.*`val.file=` trains without validation",
        ),
        (["log_with=nothing"], "error: .*nothing"),
        (["log_with=wandb"], "error: log_with: wandb is not installed: pip install wandb"),
        (
            ["data.max_response_length=500"],
            "error: data.max_prompt_length . the longest response = 564 tokens, but toy/base has 256",
        ),
        (
            ["rollout.tensor_parallel_size=2"],
            "rollout.tensor_parallel_size: only vllm has engines of several processes; set it to 1",
        ),
        (
            ["rollout.correction=token", "actor.old_logprobs=rollout"],
            "rollout.correction compares .* needs actor.old_logprobs=recompute",
        ),
        pytest.param(
            ["rollout.backend=vllm"],
            "rollout.backend: vllm is not installed: pip install -r requirements-vllm.txt",
            marks=pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed"),
        ),
    ],
)
def test_what_is_wrong_is_said_before_a_run_begins(start, tmp_path, overrides, message):
    (tmp_path / "mine.jsonl").write_text('{"task": "a1 b+1?", "answer": "2"}\n')
    with pytest.raises(SystemExit, match=message) as error:
        start(*(override.format(mine=tmp_path / "mine.jsonl") for override in overrides))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "rows, message",
    [
        (
            [{"prompt": "a1 b+1?", "answer": "2"}, "{broken\n"],
            "data.jsonl:2: a JSON object .* is expected",
        ),
        ([{"prompt": "a1 b+1?"}], "data.jsonl:1: no single text or number in 'reward_model.ground_truth,"),
        ([], "data.jsonl: no prompt is left of 0 rows"),
    ],
)
def test_bad_data_is_named_with_its_line(start, tmp_path, data, rows, message):
    with pytest.raises(SystemExit, match=message):
        start(f"data.train_file={data(*rows)}")
    assert not (tmp_path / "run").exists()


def test_a_reward_function_that_fails_is_named_with_the_sample(start, tmp_path):
    for body, message in [
        ("raise KeyError('unit')", "the reward function raised KeyError: 'unit'"),
        ("return float('nan')", "the reward function returned score=nan"),
    ]:
        with pytest.raises(
            SystemExit,
            match=rf"error: validation, prompt 0 \('a7 b-5 .*'\), response \(.*\): {message}",
        ):
            start(write_reward(tmp_path, body))
        assert (
            not (tmp_path / "run/metrics.jsonl").exists()
            and not (tmp_path / "run/last_good_model").exists()
        )
    start("total_training_steps=1")  # so the same directory is free once the mistake is fixed


def test_a_reward_function_that_fails_on_some_texts_does_not_end_the_run(start, tmp_path, capsys):
    """And its messages cannot steer the terminal."""
    body = "if '=' in response: raise ValueError('\\x1b[2J\\n\\u202e' + response[:3])\n    return float(len(response) % 2)"
    run_dir = start(write_reward(tmp_path, body), "total_training_steps=1")
    _, last = (json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines())
    assert last["reward/errors"] > 0 and last["groups/trained"] == 4
    (warning,) = re.findall(
        "^warning: step 1, [0-9]+ responses count as wrong.* prompt .*$",
        capsys.readouterr().out,
        re.MULTILINE,
    )[-1:]
    assert (
        r"raised ValueError: \x1b[2J\n\u202e" in warning
        and "\x1b" not in warning
        and "\u202e" not in warning
    )


def test_a_risky_config_is_warned_about(start, capsys):
    start("rollout.top_p=0.9", "total_training_steps=1", "val.file=")
    out = capsys.readouterr().out
    assert re.search(
        "^warning: rollout.top_p=0.9: .* distribution that was not sampled from; 1.0 is sound$",
        out,
        re.MULTILINE,
    )


@pytest.fixture
def listens_to_ctrl_c():
    """As a process in a terminal does; one that a script has put into the background does not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_ctrl_c_stops_at_once_and_is_one_line(start, monkeypatch, listens_to_ctrl_c):
    def interrupt_twice(*_):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train_dapo, "update_policy", interrupt_twice)
    with pytest.raises(
        SystemExit, match="^interrupted; the same command starts from the beginning$"
    ):
        start()


def test_a_failure_in_the_middle_keeps_what_there_is(start, tmp_path, monkeypatch):
    """The reward breaks for good at a certain step; metrics so far and the policy as it was are on disk."""
    body = (
        "import pathlib; seen = pathlib.Path(__file__).with_name('count'); n = int(seen.read_text()) if seen.exists() else 0\n"
        "    seen.write_text(str(n + 1))\n    if n > 64: raise ValueError('enough')\n    return float(n % 2)"
    )
    monkeypatch.setattr(infra_setup, "cpus_per_process", lambda accelerator: 1)  # it counts
    with pytest.raises(
        SystemExit,
        match=r"step [23], prompt .*enough at mine.py:4 .and so on all [0-9]+ responses.. The policy as it was is in .*last_good_model",
    ):
        start(write_reward(tmp_path, body), "total_training_steps=3")
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) in (2, 3)
    assert (tmp_path / "run/last_good_model/model.safetensors").exists()


# ---- what checkpoints bring ----

@pytest.fixture
def base(tmp_path):
    """A copy of the embedded model's directory, to be edited."""
    return Path(shutil.copytree("toy/base", tmp_path / "base"))


@pytest.mark.parametrize("settings", [
    {"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"do_sample": False, "min_p": 0.1},
    {"num_beams": 1, "early_stopping": True}, {"do_sample": False, "top_k": 20}], ids=str)
def test_a_generation_config_that_cannot_be_saved_is_repaired_at_the_start(start, base, capsys,
                                                                          settings):
    """Its tokens that end a response stay; the trained policy and checkpoints are saved."""
    file = base / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [0, 3], **settings}))
    options = [f"model.path={base}", "val.file=", "save_every=1"]
    run_dir = start(*options, "total_training_steps=1")
    out = capsys.readouterr().out
    assert "generation_config.json cannot be saved" in out
    assert "drops " in out and all(name in out for name in settings if settings[name])
    saved = json.loads((run_dir / "model/generation_config.json").read_text())
    assert saved["eos_token_id"] == [0, 3] and not settings.keys() & saved.keys()
    start(*options, "total_training_steps=2")  # nor does a resumed run fail there


@pytest.mark.parametrize("scaling, reach", [
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 1024),
    ({"rope_type": "linear", "factor": 4.0}, 1024), ({"type": "yarn", "factor": 2.0}, 512),
    ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16,
      "low_freq_factor": 1.0, "high_freq_factor": 4.0}, 256)], ids=str)
def test_a_model_with_scaled_positions_reaches_as_far_as_they_do(base, scaling, reach):
    config = json.loads((base / "config.json").read_text())
    del config["rope_parameters"]
    config |= {"rope_scaling": scaling, "rope_theta": 10000.0, "max_position_embeddings": 256}
    (base / "config.json").write_text(json.dumps(config))
    options = [f"model.path={base}", "data.max_prompt_length=64"]
    load_model(load_config("config.yaml", [*options, f"data.max_response_length={reach - 64}"]))
    with pytest.raises(ValueError, match=f"= {reach + 1} tokens, but .* has {reach} positions"):
        load_model(load_config("config.yaml", [*options, f"data.max_response_length={reach - 63}"]))


@pytest.mark.parametrize("quantization", [
    {"quant_method": "gptq", "bits": 4}, {"quant_method": "fp8"}, {"quant_method": "mxfp4"},
    {"quant_method": "bitsandbytes", "load_in_4bit": True}], ids=lambda q: q["quant_method"])
def test_quantized_weights_are_refused_in_one_line(start, base, quantization):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    with pytest.raises(SystemExit, match="error: model.path: the weights of .* are quantized"):
        start(f"model.path={base}")


MODEL_CODE = """
from transformers import LlamaForCausalLM
from .configuration_mine import MineConfig


class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""


@pytest.fixture
def own_code(base):
    """A checkpoint whose model is code of its own."""
    (base / "configuration_mine.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass MineConfig(LlamaConfig):\n"
        '    model_type = "mine"\n')
    (base / "modeling_mine.py").write_text(MODEL_CODE)
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "mine", "architectures": ["MineForCausalLM"], "auto_map": {
        "AutoConfig": "configuration_mine.MineConfig",
        "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}}
    (base / "config.json").write_text(json.dumps(config))
    return base


def test_code_of_a_checkpoint_runs_only_if_its_key_is_set(start, own_code, tmp_path, monkeypatch):
    """Nothing asks on the terminal; the exported model has the code too."""
    monkeypatch.setattr("builtins.input", None)
    (own_code / "configuration_mine.py").open("a").write(
        f"\nopen({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(SystemExit, match="error: model.path: .* brings code of its own; read it, "
                       "and set model.trust_remote_code=true to run it$"):
        start(f"model.path={own_code}")
    assert not (tmp_path / "ran").exists()
    run_dir = start(f"model.path={own_code}", "model.trust_remote_code=true", "val.file=",
                    "total_training_steps=1")
    assert (tmp_path / "ran").exists()
    exported = AutoModelForCausalLM.from_pretrained(run_dir / "model", trust_remote_code=True)
    assert type(exported).__name__ == "MineForCausalLM"


# ---- the type of what is exported ----

def dtypes_in(model_dir: Path) -> set[torch.dtype]:
    weights = load_file(model_dir / "model.safetensors").values()
    return {weight.dtype for weight in weights if weight.is_floating_point()}


@pytest.mark.parametrize("stored, overrides, expected", [
    ("bfloat16", [], "bfloat16"), ("float16", [], "float16"), ("float32", [], "float32"),
    ("bfloat16", ["save_dtype=float32"], "float32"), ("float32", ["save_dtype=bfloat16"], "bfloat16"),
    ("float32", ["model.dtype=bfloat16"], "bfloat16"), ("bfloat16", ["model.lora_rank=2"], "bfloat16")])
def test_models_are_exported_in_the_checkpoints_own_type(start, base, capsys, stored, overrides,
                                                        expected):
    AutoModelForCausalLM.from_pretrained(base, dtype=stored).save_pretrained(base)
    run_dir = start(f"model.path={base}", "val.file=", "total_training_steps=1", *overrides)
    assert dtypes_in(run_dir / "model") == {getattr(torch, expected)}
    assert json.loads((run_dir / "model/config.json").read_text())["dtype"] == expected
    assert AutoModelForCausalLM.from_pretrained(run_dir / "model").dtype == getattr(torch, expected)
    trained_in = "bfloat16" if "model.dtype=bfloat16" in overrides else "float32"
    said = f"models are saved in {expected} (save_dtype)" in capsys.readouterr().out
    assert said == (expected != trained_in)
