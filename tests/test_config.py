"""infra/config.py: one schema, typed and checked, with errors that propose the repair."""

import re
from pathlib import Path

import pytest
import yaml

import infra.config as config_module
from infra.config import (
    config_diff,
    embedded_task_warning,
    flatten,
    load_config,
    read_command_line,
    read_rules,
    read_nodes,
)

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["actor.clip_ratio_hgh=0.3"],
            "command line: unknown config key actor.clip_ratio_hgh: did you mean actor.clip_ratio_high",
        ),
        (
            ["clip_ratio_high=0.3"],
            "unknown config key clip_ratio_high: did you mean actor.clip_ratio_high",
        ),
        (["zebra=1"], "unknown config key zebra: config.yaml lists every key"),
        (["actor_rollout_ref.rollout.n=8"], "rollout.n: did you mean rollout.n[?]"),
        (["temperature=1"], "did you mean rollout.temperature or val.temperature[?]"),
        (["actor.lr"], "'actor.lr' is not of the form key.sub=value"),
        (["actor.lr=fast"], "config key actor.lr: 'fast' is not float > 0"),
        (["actor.lr=0"], "config key actor.lr: '0' is not float > 0"),
        (["actor.lr=nan"], "config key actor.lr: 'nan' is not float > 0"),
        (["seed=1.5"], "config key seed: '1.5' is not int >= 0"),
        (
            ["filter_groups.enable=yes"],
            "config key filter_groups.enable: 'yes' is not true . false",
        ),
        (
            ["actor.loss_agg_mode=token_mean"],
            "token-mean | seq-mean-token-sum | seq-mean-token-mean",
        ),
        (["rollout.top_p=1.1"], "float > 0 <= 1"),
        (
            ["overlong_buffer.len=97"],
            "overlong_buffer.len=97 is longer than data.max_response_length=96",
        ),
        (["rollout.n=1"], "config key rollout.n: '1' is not int >= 2"),
        (
            ["actor.ppo_mini_batch_size=100"],
            "actor.ppo_mini_batch_size=100 does not divide the 512 responses.*divisor",
        ),
        (["data.gen_batch_size=3"], "can never fill data.train_batch_size=32"),
        (["data.gen_batch_size=0"], "'0' is not auto . int >= 1"),
        (["data.gen_batch_size=often"], "'often' is not auto . int >= 1"),
        (
            ["data.answer_regex=("],
            "data.answer_regex '\\(' is not a regular expression with a group",
        ),
        (
            ["data.answer_regex=#"],
            "data.answer_regex '#' is not .* with a group: put the answer in paren",
        ),
        (["data.train_file="], "data.train_file names no file"),
        (["reward.weights=1,2"], "reward.weights='1,2': a number for each of the 1 of reward.name"),
        (["reward.weights=x"], "reward.weights='x'"),
        (["data.train_weights=1"], "unknown config key data.train_weights"),
        (["data.prompt_template=hello"], "data.prompt_template has no {prompt}"),
        (["actor.clip_ratio_c=0.9"], "actor.clip_ratio_c=0.9 must be above 1"),
    ],
)
def test_a_bad_value_is_named_with_its_repair(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config("config.yaml", overrides)


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "actor:\n  lr: 1e-6\n  clip_ratio_lo: 0.1\n",
            "recipe.yaml: unknown config key actor.clip_ratio_lo: .*clip_ratio_low",
        ),
        ("actor:\n  lr: [1\n", "recipe.yaml: not valid YAML: .*line 3, column 1"),
        ("actor:\n  lr: 1\nseed: 1\nactor:\n  lr: 2\n", "recipe.yaml:5: actor.lr is there twice"),
        ("seed: one\n", "recipe.yaml: config key seed: 'one' is not int >= 0"),
        ("actor: 3\n", "recipe.yaml: unknown config key actor"),
        ("just text\n", "recipe.yaml: no `key: value` lines"),
        ("actor:\n  lr: [1]\n", "recipe.yaml:2: actor.lr must be one value"),
    ],
)
def test_a_bad_recipe_is_named(tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path / "recipe.yaml")


def test_a_missing_config_is_one_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train_dapo.py", "--config", "nowhere.yaml"])
    with pytest.raises(SystemExit, match="^error: nowhere.yaml: No such file or directory: --config "):
        read_command_line("")


@pytest.fixture
def edit_schema(tmp_path, monkeypatch):
    """`edit_schema(old, new)`: config.yaml with `old` replaced is the schema; returns its path."""

    def edit_schema(old, new):
        text = (ROOT / "config.yaml").read_text()
        assert old in text
        (tmp_path / "config.yaml").write_text(text.replace(old, new))
        monkeypatch.setattr(config_module, "SCHEMA", tmp_path / "config.yaml")
        return tmp_path / "config.yaml"

    return edit_schema


@pytest.mark.parametrize(
    "line", ["  lr_min: 0.1", "  lr_min: 0.1  # float", "  lr_min: 0.1  # the least"]
)
def test_a_new_key_without_its_type_is_one_line_that_shows_how(edit_schema, line):
    path = edit_schema("  lr_warmup_steps:", f"{line}\n  lr_warmup_steps:")
    with pytest.raises(
        ValueError,
        match=r"^key actor.lr_min in config.yaml needs a comment with its \[type\], for "
        r"example `# \[float >= 0\] what it does` .*$",
    ):
        load_config(path)


def test_a_new_key_with_its_type_needs_nothing_else(edit_schema):
    path = edit_schema(
        "  lr_warmup_steps:", "  lr_min: 0.1  # [float >= 0] the least\n  lr_warmup_steps:"
    )
    assert load_config(path).actor.lr_min == 0.1
    assert load_config(path, ["actor.lr_min=0"]).actor.lr_min == 0
    with pytest.raises(ValueError, match="actor.lr_min: '-1' is not float >= 0"):
        load_config(path, ["actor.lr_min=-1"])


def test_a_default_of_another_type_is_named(edit_schema):
    path = edit_schema("lr: 0.0001 ", "lr: fast ")
    with pytest.raises(
        ValueError, match="config.yaml: config key actor.lr: 'fast' is not float > 0"
    ):
        load_config(path)


def test_a_section_without_keys_changes_nothing(tmp_path):
    (tmp_path / "recipe.yaml").write_text("seed: 3\nactor:\n  # lr: 1\n")
    assert load_config(tmp_path / "recipe.yaml").seed == 3


def test_a_line_break_and_a_home_directory_on_the_command_line_are_what_people_mean(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = load_config("config.yaml", [r"data.prompt_template={prompt}\n\nAnswer: ",
                                         "run_dir=~/runs/a", r"data.answer_regex=a\n(.)"])
    assert config.data.prompt_template == "{prompt}\n\nAnswer: "
    assert config.run_dir == "/home/me/runs/a" and config.data.answer_regex == r"a\n(.)"


def test_scientific_notation_without_a_point_is_a_number():
    assert (
        load_config("config.yaml", ["actor.lr=1e-6"]).actor.lr == 1e-6
    )  # YAML 1.1 reads it as text


def test_the_command_line_comes_last_and_a_recipe_lists_only_what_differs(tmp_path):
    (tmp_path / "recipe.yaml").write_text("seed: 1\nactor:\n  lr: 3e-5\n")
    config = load_config(tmp_path / "recipe.yaml", ["seed=2"])
    assert (config.seed, config.actor.lr, config.actor.clip_ratio_high) == (2, 3e-5, 0.28)


def test_every_key_has_a_type_and_a_comment():
    assert read_rules().keys() == read_nodes(ROOT / "config.yaml").keys()
    for line in (ROOT / "config.yaml").read_text().splitlines():
        if "# [" in line:
            assert re.search(r"\]\*?!? \S", line), f"no explanation: {line}"


def code_of(*patterns):
    return "".join(path.read_text() for pattern in patterns for path in ROOT.glob(pattern))


def test_every_key_is_read_by_some_code():
    code = code_of("*.py", "infra/*.py")
    unread = [key for key in read_rules() if not re.search(rf"\.{key.rpartition('.')[2]}\b", code)]
    assert not unread


def test_every_key_that_the_code_reads_is_in_config_yaml():
    """Only the published files: a forker's own scripts may have a `config` of another kind."""
    rules = read_rules()
    sections = {key.partition(".")[0] for key in rules if "." in key}
    files = [
        f"{name}.py"
        for name in ("train_dapo", "sampling", "rollout", "reward", "losses", "evaluate", "plot")
    ]
    read = re.findall(r"\bconfig\.(\w+)(?:\.(\w+))?", code_of(*files, "infra/*.py"))
    keys = {f"{section}.{key}" for section, key in read if section in sections and key}
    assert len(keys) > 20 and not keys - rules.keys()


# ---- the embedded task's values meet nothing else unnoticed ----

MARKED = {key for key, rule in read_rules().items() if rule.embedded_only}


def warned(capsys, monkeypatch, *argv, training=True):
    """The warnings of a start with this command line."""
    monkeypatch.setattr("sys.argv", ["train_dapo.py", "--config", *map(str, argv)])
    read_command_line("", training)
    out, err = capsys.readouterr()
    assert out == ""
    return err


def test_the_keys_that_suit_the_embedded_task_only_are_these():
    assert sorted(MARKED) == [
        "actor.lr",
        "actor.ppo_mini_batch_size",
        "data.max_prompt_length",
        "data.max_response_length",
        "data.train_file",
        "model.path",
        "overlong_buffer.len",
        "val.file",
    ]
    text = (ROOT / "config.yaml").read_text()
    for key in MARKED:  # the warning refers to the paper's value
        comment = re.search(rf"^ +{key.rpartition('.')[2]}:.*\n(?: +#.*\n)*", text, re.MULTILINE)[0]
        assert "Paper" in comment, key


def test_default_type_and_signs_are_read_from_config_yaml():
    rules = read_rules()
    assert rules["actor.lr"] == ("0.0001", "float > 0", False, True)
    assert rules["val.file"] == ("toy/val.jsonl", "str", True, True)
    assert rules["seed"] == ("0", "int >= 0", False, False)


@pytest.mark.parametrize(
    "override, kept, set_already",
    [
        (
            "model.path=elsewhere",
            ["actor.lr=0.0001", "data.train_file=toy/train.jsonl"],
            "model.path=",
        ),
        (
            "data.train_file=mine.jsonl",
            ["val.file=toy/val.jsonl", "model.path=toy/base"],
            "data.train_file=",
        ),
    ],
)
def test_another_model_or_other_data_with_the_toys_values_is_one_warning(
    capsys, monkeypatch, override, kept, set_already
):
    warning = warned(capsys, monkeypatch, "config.yaml", override)
    key = override.partition("=")[0]
    assert warning.startswith(
        f"warning: {key} set, but these keys still have the embedded task's values: "
    )
    assert (
        warning.endswith(": set them too (config.yaml names the paper's values)\n")
        and warning.count("\n") == 1
    )
    assert all(text in warning for text in kept) and set_already not in warning


def test_what_the_readme_asks_of_a_recipe_leaves_the_toys_lr_named(tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.yaml").write_text(
        "model:\n  path: elsewhere\ndata:\n  train_file: mine.jsonl\n  max_prompt_length: 512\n"
        "  max_response_length: 512\nval:\n  file: val.jsonl\n"
    )
    mini = load_config("config.yaml").actor.ppo_mini_batch_size
    warning = warned(capsys, monkeypatch, tmp_path / "mine.yaml", "overlong_buffer.len=128")
    assert warning == (
        "warning: model.path and data.train_file set, but these keys still have the embedded task's "
        f"values: actor.ppo_mini_batch_size={mini}, actor.lr=0.0001: set them too (config.yaml names the paper's values)\n"
    )
    same = [
        "overlong_buffer.len=128",
        f"actor.ppo_mini_batch_size={mini}",
        "actor.lr=0.0001",
    ]  # meant so
    assert warned(capsys, monkeypatch, tmp_path / "mine.yaml", *same) == ""


def test_neither_the_embedded_task_nor_an_evaluation_nor_other_ranks_warn(capsys, monkeypatch):
    assert warned(capsys, monkeypatch, "config.yaml", "seed=1", "model.path=toy/base") == ""
    assert (
        warned(capsys, monkeypatch, "config.yaml", "model.path=runs/toy/model", training=False)
        == ""
    )
    monkeypatch.setenv("RANK", "1")
    assert warned(capsys, monkeypatch, "config.yaml", "model.path=elsewhere") == ""
    monkeypatch.setenv("RANK", "0")
    assert warned(capsys, monkeypatch, "config.yaml", "model.path=elsewhere") != ""


@pytest.mark.parametrize(
    "recipe", sorted((ROOT / "configs").glob("[!a]*.yaml")), ids=lambda p: p.name
)
def test_every_recipe_sets_all_that_suits_the_embedded_task_only(recipe):
    assert read_nodes(recipe).keys() >= MARKED
    assert embedded_task_warning(recipe) == ""


# ---- recipes ----


@pytest.mark.parametrize(
    "recipe", sorted((ROOT / "configs").glob("[!a]*.yaml")), ids=lambda p: p.name
)
def test_every_recipe_is_legal(recipe):
    load_config(recipe)


def test_the_paper_recipe_has_the_papers_values():
    config = load_config("configs/dapo_qwen2.5_32b.yaml")
    assert (config.data.train_batch_size, config.rollout.n, config.actor.ppo_mini_batch_size) == (
        512,
        16,
        512,
    )
    assert (
        config.actor.clip_ratio_low,
        config.actor.clip_ratio_high,
        config.actor.loss_agg_mode,
    ) == (0.2, 0.28, "token-mean")
    assert (
        config.data.max_response_length,
        config.overlong_buffer.len,
        config.overlong_buffer.penalty_factor,
    ) == (20480, 4096, 1.0)
    assert (
        config.actor.lr,
        config.actor.lr_warmup_steps,
        config.actor.weight_decay,
        config.actor.grad_clip,
    ) == (1e-6, 20, 0.1, 1.0)
    assert (config.rollout.temperature, config.rollout.top_p) == (1.0, 1.0)
    assert (config.val.n, config.val.temperature, config.val.top_p) == (32, 1.0, 0.7)
    assert (
        config.filter_groups.enable
        and config.filter_groups.metric == "acc"
        and config.overlong_buffer.enable
    )
    assert (
        not config.actor.use_kl_loss
        and not config.algorithm.use_kl_in_reward
        and not config.algorithm.overlong_filtering
    )


def test_what_is_off_needs_no_value_for_other_data():
    data = ["data.train_file=other.jsonl"]
    assert "overlong_buffer.len=24" in embedded_task_warning("config.yaml", data)
    off = embedded_task_warning("config.yaml", [*data, "overlong_buffer.enable=False"])
    assert "data.max_prompt_length" in off and "overlong_buffer" not in off


def test_the_resolved_config_of_a_run_is_a_config_again(start):
    run_dir = start("actor.lr=1e-5", "actor.clip_ratio_c=3", "total_training_steps=1", "val.file=")
    config = load_config(run_dir / "config.yaml")
    assert (config.actor.lr, config.actor.clip_ratio_c, config.rollout.n) == (1e-5, 3.0, 4)
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["mixed_precision"] == "no"


def test_what_may_differ_when_a_run_resumes_is_no_difference():
    earlier = flatten(load_config("config.yaml", ["actor.lr=1e-5", "save_every=3"]))
    assert config_diff(earlier, load_config("config.yaml", ["actor.lr=1e-6", "save_every=4"])) == [
        "actor.lr: 1e-05 -> 1e-06"
    ]
    del (
        earlier["actor.lr"],
        earlier["seed"],
    )  # of a version without these keys: they had their defaults
    assert config_diff(earlier | {"gone": 1}, load_config("config.yaml", ["seed=1"])) == [
        "gone: 1 -> None",
        "seed: 0 -> 1",
    ]
