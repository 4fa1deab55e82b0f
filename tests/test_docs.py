"""The README and docs are true: links, the quoted loop, keys, metrics, figures, examples."""

import json
import re
import shlex
import textwrap
from pathlib import Path

import pytest

from data_types import Task
from infra.config import embedded_task_warning, load_config, read_rules
from infra.reward_function import load_reward_function, score_task

pytestmark = pytest.mark.house
ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "forks/README.md"]
README = PAGES[0].read_text(encoding="utf-8")
REWARDS = (ROOT / "docs/REWARDS.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "bench/RESULTS.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_linked_file_exists(page):
    for target in re.findall(r"\]\(((?!http)[^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_the_quoted_loop_is_the_files():
    (quoted,) = re.findall(r"## The loop\n.*?```python\n(.*?)```", README, re.DOTALL)
    assert len(quoted.splitlines()) > 20 and "sync_weights" in quoted
    assert textwrap.indent(quoted, "    ") in (ROOT / "train_dapo.py").read_text(encoding="utf-8")


def test_every_function_that_the_equation_map_names_is_in_the_file_beside_it():
    rows = re.findall(r"\| `(\w+)` in \[`(\w+\.py)`\]", README)
    assert len(rows) >= 7
    for function, file in rows:
        assert f"\ndef {function}(" in (ROOT / file).read_text(encoding="utf-8"), function


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_key_that_a_page_names_is_legal(page):
    rules, text = read_rules(), page.read_text(encoding="utf-8")
    sections = {key.partition(".")[0] for key in rules if "." in key} - {"reward", "data"}
    functions = {"model.generate", "rollout.generate", "rollout.decode"}
    for key in re.findall(r"\b([a-z_]+\.[a-z_]+)\b(?!\()", text):
        section, _, leaf = key.partition(".")
        if section in sections and leaf not in ("py", "jsonl", "yaml") and key not in functions:
            assert key in rules, key
    for key in re.findall(r"(?<=[ `])([a-z_]+\.[a-z_]+)=", text):
        assert key in rules or key == "key.sub", key


def test_every_metric_of_a_run_is_defined(start):
    run_dir = start("log_with=", "actor.use_kl_loss=true", "actor.clip_ratio_c=3", "val.every=1")
    page = (ROOT / "docs/METRICS.md").read_text(encoding="utf-8")
    defined = set(re.findall(r"`([^`]+)`", page))
    defined = {name.replace("<set>", "val").replace("@k", "@2") for name in defined}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line).keys() <= defined


def test_the_reward_functions_of_the_docs_run_by_the_readmes_command(start, tmp_path):
    (example,) = re.findall(r"```python\n(# my_reward\.py\n.*?)```", REWARDS, re.DOTALL)
    (tmp_path / "my_reward.py").write_text(example)
    (overrides,) = re.findall(r"run_dir=runs/mine (.*)$", README, re.MULTILINE)
    overrides = overrides.replace("my_reward.py", str(tmp_path / "my_reward.py")).split()
    run_dir = start(*overrides, "total_training_steps=1", "filter_groups.metric=score")
    lines = (run_dir / "rollouts/step_00001.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert max(s["reward/score/score"] for s in samples) > 1.0  # times the level
    assert len({s["reward/rank/score"] for s in samples}) > 2
    assert max(s["reward/score/brevity"] for s in samples) <= 0.5  # from the length in tokens
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"reward/rank/score", "reward/score/brevity", "val/val/reward/rank/score"} <= last.keys()


def test_verls_compute_score_fits_as_the_docs_say(tmp_path):
    (adapter,) = re.findall(r"`(def score\(response, ground_truth, data_source.*?)`", REWARDS)
    (tmp_path / "mine.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    expected = ('s', ground_truth, 3)\n"
        f"    return float((data_source, solution_str, extra_info['i']) == expected)\n{adapter}\n")
    function = load_reward_function(f"{tmp_path / 'mine.py'}:score")
    row = {"data_source": "s", "extra_info": {"i": 3}, "ability": "MATH"}
    scores = score_task(function, Task(["6", "7"], [1, 1], "6", row))
    assert [score.score for score in scores] == [1.0, 0.0]


def test_the_readmes_own_data_example_runs(start, tmp_path):
    (row, overrides), = re.findall(
        r"echo '(.*)' > mine.jsonl\n.*run_dir=runs/own data.train_file=mine.jsonl (.*)", README)
    (tmp_path / "mine.jsonl").write_text(row + "\n")
    run_dir = start(f"data.train_file={tmp_path / 'mine.jsonl'}", *shlex.split(overrides))
    assert json.loads((run_dir / "metrics.jsonl").read_text())["step"] == 1


def test_the_readmes_recipe_sets_every_key_that_fits_the_embedded_task_only(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(re.search("```yaml\n(.*?)```", README, re.DOTALL)[1])
    assert load_config(recipe).data.train_batch_size == 32
    assert embedded_task_warning(recipe) == ""


def test_the_readmes_figures_are_those_of_the_results_file():
    rows = re.findall(r"^\|[^|]*(?:DAPO|GRPO|SmolLM2)[^|]*\| (\d) \|(.*)\|$", README,
                      re.MULTILINE)
    assert len(rows) == 6
    for seed, cells in rows:
        figures = re.findall(r"\d+\.\d+", cells)
        assert figures, cells
        assert any(f"| {seed} |" in line and all(figure in line for figure in figures)
                   for line in RESULTS.splitlines()), (seed, figures)


def test_the_readmes_speeds_are_those_of_the_results_file():
    speeds = README[README.index("## How fast"):]
    rows = re.findall(r"^\| .* \| \[`(\w+)\.py`\]\(bench/\1\.py\) \| (.*) \| [^|]* \|$", speeds,
                      re.MULTILINE)
    assert len(rows) == 4
    for name, measured in rows:
        section = re.search(rf"bench/{name}\.py[^\n]*\n```\n\n<!-- printed -->(.*?)<!-- end -->",
                            RESULTS, re.DOTALL).group(1)
        verdict = re.search(r"^.*goal.*$", section, re.MULTILINE).group(0)
        for figure in re.findall(r"\d+\.\d+", measured):
            assert figure in verdict, (name, figure)


def test_every_benchmark_of_the_results_file_exists():
    from bench.run_all import PAGE, SECTION
    commands = SECTION.findall(PAGE.read_text(encoding="utf-8"))
    assert len(commands) >= 8
    for command in commands:
        assert (ROOT / re.search(r"bench/\w+\.py", command).group(0)).exists()


@pytest.mark.parametrize("word", ["pypi", "download.pytorch", "/work/", "/tmp/w/"])
def test_nothing_of_the_workshop_is_left(word):
    paths = [*ROOT.glob("*.*"), *ROOT.glob("infra/*.py"), *ROOT.glob("configs/*"),
             *ROOT.glob("docs/*.md"), *ROOT.glob("bench/*"), ROOT / ".ci/run"]
    for path in paths:
        if path.is_file() and path.suffix in (".py", ".md", ".yaml", ".txt", ".toml", ""):
            assert word not in path.read_text(encoding="utf-8"), path


def test_the_readme_is_short():
    assert len(README.split()) <= 1750


def test_the_lock_file_has_the_same_versions_and_a_digest_of_everything():
    """It is made by the command at its head."""
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        assert line.startswith("#") or f"\n{line} \\\n    --hash=sha256:" in lock, line
    entries = re.split(r"\n(?=[a-z])", lock)[1:]
    assert len(entries) > 50 and all("==" in entry and "--hash=" in entry for entry in entries)


def test_every_documented_server_listens_on_this_machine_only():
    """vLLM's default is every address, and its development mode runs what it is sent."""
    lines = [line for page in PAGES for line in page.read_text(encoding="utf-8").splitlines()
             if re.search(r"vllm serve \S+ -", line)]
    assert len(lines) == 2 and all(" --host 127.0.0.1 " in line for line in lines)
