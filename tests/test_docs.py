"""What the README says is so: links, keys, metrics, figures, and the example of a reward."""

import json
import re
import shlex
from pathlib import Path

import pytest

from infra.config import read_rules
from reward import judge, load_verifier

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_linked_line_is_the_function_that_the_link_names():
    links = re.findall(r"\[`(\w+)\.(\w+)`\]\((\w+\.py)#L(\d+)\)", README)
    assert len(links) >= 8
    for module, function, file, line in links:
        assert file == f"{module}.py"
        text = (ROOT / file).read_text().splitlines()[int(line) - 1]
        assert text.startswith(f"def {function}("), f"{file}:{line} is {text!r}"


def test_every_linked_file_is_there():
    for target in re.findall(r"\]\(((?!http)[^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_every_key_that_the_readme_names_is_legal():
    rules = read_rules()
    sections = {key.partition(".")[0] for key in rules}
    named = set(re.findall(r"\b([a-z_]+\.[a-z_]+)\b(?!\()", README)) | set(re.findall(r"\b(\w+)=", README))
    for key in named:
        section, _, leaf = key.partition(".")
        if leaf and section in sections - {"reward"} and leaf not in ("py", "jsonl", "yaml"):
            assert key in rules, key


def test_every_metric_of_a_run_is_defined(start):
    run_dir = start("log_with=", "actor.use_kl_loss=true", "actor.clip_ratio_c=3", "val.every=1")
    defined = set(re.findall(r"`([^`]+)`", README[README.index("## Metrics"):]))
    defined = {name.replace("<set>", "val").replace("@k", "@2") for name in defined}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line).keys() <= defined


def test_the_readmes_reward_runs(start, tmp_path):
    (example,) = re.findall(r"```python\n(# my_reward\.py\n.*?)```", README, re.DOTALL)
    (tmp_path / "my_reward.py").write_text(example)
    (overrides,) = re.findall(r"run_dir=runs/mine (.*)$", README, re.MULTILINE)
    overrides = overrides.replace("my_reward.py", str(tmp_path / "my_reward.py")).split()
    run_dir = start(*overrides, "total_training_steps=1", "filter_groups.metric=score")
    samples = [json.loads(line) for line in (run_dir / "rollouts/step_00001.jsonl").read_text().splitlines()]
    assert max(s["verdict/score"] for s in samples) > 1.1 and len({s["verdict/rank"] for s in samples}) > 2  # levels, ranks
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"verdict/score", "verdict/rank", "verdict/score/brevity", "val/val/verdict/rank"} <= last.keys()


def test_verls_compute_score_fits_as_the_readme_says(tmp_path):
    (adapter,) = re.findall(r"`(def score\(response, ground_truth, data_source.*?)`", README)
    (tmp_path / "mine.py").write_text("def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
                                      f"    return float((data_source, solution_str, extra_info['i']) == ('s', ground_truth, 3))\n{adapter}\n")
    verifier = load_verifier(f"{tmp_path / 'mine.py'}:score")
    verdicts = judge(verifier, ["6", "7"], "6", {"data_source": "s", "extra_info": {"i": 3}, "ability": "MATH"})
    assert [verdict.score for verdict in verdicts] == [1.0, 0.0]


def test_the_readmes_own_data_example_runs(start, tmp_path):
    (row, overrides), = re.findall(r"echo '(.*)' > mine.jsonl\n.*run_dir=runs/own data.train_file=mine.jsonl (.*)", README)
    (tmp_path / "mine.jsonl").write_text(row + "\n")
    run_dir = start(f"data.train_file={tmp_path / 'mine.jsonl'}", *shlex.split(overrides))
    assert json.loads((run_dir / "metrics.jsonl").read_text())["step"] == 1


def test_the_readmes_figures_are_those_of_the_results_file():
    results = (ROOT / "bench/RESULTS.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|[^|]*(?:DAPO|GRPO)[^|]*\| (\d) \|(.*)\|$", README, re.MULTILINE)
    assert len(rows) >= 6
    for seed, cells in rows:
        figures = re.findall(r"\d+\.\d+", cells)
        assert figures and any(f"| {seed} |" in line and all(figure in line for figure in figures)
                               for line in results.splitlines()), (seed, figures)


def test_the_readmes_speeds_are_those_of_the_results_file():
    results = (ROOT / "bench/RESULTS.md").read_text(encoding="utf-8")
    speeds = README[README.index("## How fast"):README.index("## Your data")]
    rows = re.findall(r"^\| .* \| \[`(\w+)\.py`\]\(bench/\1\.py\) \| (.*) \| [^|]* \|$", speeds, re.MULTILINE)
    assert len(rows) == 6
    for name, measured in rows:
        printed = re.search(rf"bench/{name}\.py[^\n]*\n```\n\n<!-- printed -->(.*?)<!-- end -->", results, re.DOTALL).group(1)
        verdict = re.search(r"^.*goal.*$", printed, re.MULTILINE).group(0)
        for figure in re.findall(r"\d+\.\d+", measured):
            assert figure in verdict, (name, figure)


def test_every_benchmark_of_the_results_file_is_there():
    from bench.run_all import PAGE, SECTION
    commands = SECTION.findall(PAGE.read_text(encoding="utf-8"))
    assert len(commands) >= 8
    for command in commands:
        assert (ROOT / re.search(r"bench/\w+\.py", command).group(0)).exists()


@pytest.mark.parametrize("word", ["pypi", "download.pytorch", "/work/", "TODO", "FIXME"])
def test_nothing_of_the_workshop_is_left(word):
    for path in [*ROOT.glob("*.*"), *ROOT.glob("configs/*"), *ROOT.glob("bench/*"), ROOT / ".ci/run"]:
        if path.is_file() and path.suffix in (".py", ".md", ".yaml", ".txt", ".toml", ""):
            assert word not in path.read_text(encoding="utf-8"), path
