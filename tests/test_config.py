"""config.py: one schema, typed, checked, with errors that propose the repair."""

import re
from pathlib import Path

import pytest
import yaml

import infra.config as config_module
from infra.config import load_config, read_rules, read_yaml

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("overrides, message", [
    (["actor.clip_ratio_hgh=0.3"], "command line: unknown config key actor.clip_ratio_hgh: did you mean actor.clip_ratio_high"),
    (["clip_ratio_high=0.3"], "unknown config key clip_ratio_high: did you mean actor.clip_ratio_high"),
    (["zebra=1"], "unknown config key zebra: config.yaml, as published, lists every key"),
    (["actor.lr"], "'actor.lr' is not of the form key.sub=value"),
    (["actor.lr=fast"], "config key actor.lr: 'fast' is not of type float > 0"),
    (["actor.lr=0"], "config key actor.lr: '0' is not of type float > 0"),
    (["actor.lr=nan"], "config key actor.lr: 'nan' is not of type float > 0"),
    (["seed=1.5"], "config key seed: '1.5' is not of type int >= 0"),
    (["filter_groups.enable=yes"], "config key filter_groups.enable: 'yes' is not one of true . false"),
    (["actor.loss_agg_mode=token_mean"], "one of token-mean | seq-mean-token-sum | seq-mean-token-mean"),
    (["rollout.top_p=1.1"], "float > 0 <= 1"),
    (["overlong_buffer.len=97"], "overlong_buffer.len=97 is longer than data.max_response_length=96"),
    (["rollout.n=1"], "config key rollout.n: '1' is not of type int >= 2"),
    (["actor.ppo_mini_batch_size=100"], "actor.ppo_mini_batch_size=100 does not divide the 512 responses.*128 would"),
    (["data.gen_batch_size=3"], "can never fill data.train_batch_size=32"),
    (["data.gen_batch_size=0"], "'0' is not one of auto . int >= 1"),
    (["data.gen_batch_size=often"], "'often' is not one of auto . int >= 1"),
    (["data.answer_regex=("], "data.answer_regex '\\(' is no regular expression"),
    (["data.answer_regex=#"], "data.answer_regex '#' has no group"),
    (["data.prompt_template=hello"], "data.prompt_template has no {prompt}"),
    (["actor.clip_ratio_c=0.9"], "actor.clip_ratio_c=0.9 must be above 1"),
])
def test_a_bad_value_is_named_with_its_repair(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config("config.yaml", overrides)


@pytest.mark.parametrize("text, message", [
    ("actor:\n  lr: 1e-6\n  clip_ratio_lo: 0.1\n", "recipe.yaml: unknown config key actor.clip_ratio_lo: .*clip_ratio_low"),
    ("actor:\n  lr: [1\n", "recipe.yaml:3: not valid YAML"),
    ("actor:\n  lr: 1\nseed: 1\nactor:\n  grad_clip: 1\n", "recipe.yaml:4: not valid YAML: actor is there twice"),
    ("seed: one\n", "recipe.yaml: config key seed: 'one' is not of type int >= 0"),
    ("actor: 3\n", "recipe.yaml: unknown config key actor"),
    ("just text\n", "recipe.yaml: no `key: value` lines"),
    ("actor:\n  lr: [1]\n", r"config key actor.lr: \['1'\] is not of type float"),
])
def test_a_bad_recipe_is_named(tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path / "recipe.yaml")


def test_a_missing_config_is_one_line():
    with pytest.raises(ValueError, match="--config nowhere.yaml: No such file"):
        load_config("nowhere.yaml")


@pytest.mark.parametrize("old, new, message", [
    ("  max_prompt_length: 64 ", "  # max_prompt_length: 64 ", "key data.max_prompt_length is not there: put its line back"),
    ("lr: 0.0002 ", "lr: fast ", "actor.lr: 'fast' is not of type float > 0"),
    ("clip_ratio_high: 0.28", "clip_ratio_hgh: 0.28", "unknown key actor.clip_ratio_hgh, which no code reads: did you mean clip_ratio_high"),
    ("seed: 0  ", "sed: 0\nseed: 0  ", "key sed lacks the comment that gives its .type.: did you mean seed"),
])
def test_a_mistake_in_config_yaml_itself_is_found(tmp_path, monkeypatch, old, new, message):
    """It is the file that everyone edits."""
    for path in ROOT.glob("*.py"):
        (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / "config.yaml").write_text((ROOT / "config.yaml").read_text().replace(old, new))
    monkeypatch.setattr(config_module, "SCHEMA", tmp_path / "config.yaml")
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path / "config.yaml")


def test_a_section_without_keys_changes_nothing(tmp_path):
    (tmp_path / "recipe.yaml").write_text("seed: 3\nactor:\n  # lr: 1\n")
    assert load_config(tmp_path / "recipe.yaml").seed == 3


def test_scientific_notation_without_a_point_is_a_number():
    assert load_config("config.yaml", ["actor.lr=1e-6"]).actor.lr == 1e-6  # YAML 1.1 reads it as text


def test_the_command_line_comes_last_and_a_recipe_lists_only_what_differs(tmp_path):
    (tmp_path / "recipe.yaml").write_text("seed: 1\nactor:\n  lr: 3e-5\n")
    config = load_config(tmp_path / "recipe.yaml", ["seed=2"])
    assert (config.seed, config.actor.lr, config.actor.clip_ratio_high) == (2, 3e-5, 0.28)


def test_every_key_has_a_type_and_a_comment_and_is_read():
    rules = read_rules()
    assert rules.keys() == read_yaml(ROOT / "config.yaml").keys()
    for line in (ROOT / "config.yaml").read_text().splitlines():
        if "# [" in line:
            assert re.search(r"\]\*? \S", line), f"no explanation: {line}"
    code = "".join(path.read_text() for path in ROOT.glob("*.py"))
    assert all(f".{key.rpartition('.')[2]}" in code for key in rules)


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs").glob("*qwen*.yaml")), ids=lambda p: p.name)
def test_every_recipe_is_legal(recipe):
    load_config(recipe)


def test_the_paper_recipe_has_the_papers_values():
    config = load_config("configs/dapo_qwen2.5_32b.yaml")
    assert (config.data.train_batch_size, config.rollout.n, config.actor.ppo_mini_batch_size) == (512, 16, 512)
    assert (config.actor.clip_ratio_low, config.actor.clip_ratio_high, config.actor.loss_agg_mode) == (0.2, 0.28, "token-mean")
    assert (config.data.max_response_length, config.overlong_buffer.len, config.overlong_buffer.penalty_factor) == (
        20480, 4096, 1.0)
    assert (config.actor.lr, config.actor.lr_warmup_steps, config.actor.weight_decay, config.actor.grad_clip) == (
        1e-6, 20, 0.1, 1.0)
    assert (config.rollout.temperature, config.rollout.top_p) == (1.0, 1.0)
    assert (config.val.n, config.val.temperature, config.val.top_p) == (32, 1.0, 0.7)
    assert config.filter_groups.enable and config.filter_groups.metric == "acc" and config.overlong_buffer.enable
    assert not config.actor.use_kl_loss and not config.algorithm.use_kl_in_reward and not config.algorithm.overlong_filtering


def test_the_resolved_config_of_a_run_is_a_config_again(start):
    run_dir = start("actor.lr=1e-5", "actor.clip_ratio_c=3")
    config = load_config(run_dir / "config.yaml")
    assert (config.actor.lr, config.actor.clip_ratio_c, config.rollout.n) == (1e-5, 3.0, 4)
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["mixed_precision"] == "no"
