"""A run knows its code: what it records, and resuming with other code."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from infra import provenance
from infra.config import flatten, load_config
from infra.trackers import start_tracker

STEPS = ["save_every=1", "val.file="]
REWARD = "def score(response, ground_truth):\n    return len(response) % {number}\n"


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=b", *arguments],
                          cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of some files, which is where the code is."""
    root = tmp_path / "repository"
    (root / "infra").mkdir(parents=True)
    for name in ("losses.py", "infra/setup.py", "README.md"):
        (root / name).write_text(f"# {name}\n" * 9)
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "first")
    monkeypatch.setattr(provenance, "ROOT", root)
    return root


def config_of(tmp_path, *overrides: str):
    (tmp_path / "run").mkdir(exist_ok=True)
    return load_config("config.yaml", [f"run_dir={tmp_path / 'run'}", *overrides])


def test_the_file_of_a_launch_restores_the_code_from_its_commit(repository, tmp_path,
                                                                    monkeypatch):
    """With its changes in tracked files and new ones, whatever git is told to show."""
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # as in many containers
    for key, value in {"diff.noprefix": "true", "color.ui": "always", "diff.context": "0",
                       "diff.mnemonicPrefix": "true", "diff.own.textconv": "wc"}.items():
        git(repository, "-c", "safe.directory=*", "config", key, value)
    (repository / ".git/info/attributes").write_text("*.py diff=own\n")
    (repository / "losses.py").write_text("# losses.py\n" * 5 + "not UTF-8: \udcff\n"
                                          + "# losses.py\n" * 4, "utf-8", "surrogateescape")
    (repository / "infra/new.py").write_text("new = 1")
    version = provenance.write_code(config_of(tmp_path), 7)
    file = tmp_path / "run/code/from_step_00007.patch"
    monkeypatch.delenv("GIT_TEST_ASSUME_DIFFERENT_OWNER")
    commit = git(repository, "rev-parse", "HEAD")
    assert version == f"commit {commit}, with changes in losses.py, infra/new.py"
    assert file.read_bytes().startswith(f"commit {commit}\n".encode())
    other = tmp_path / "other"
    git(tmp_path, "clone", "-q", str(repository), str(other))
    git(other, "apply", str(file))
    for name in ("losses.py", "infra/new.py", "infra/setup.py"):
        assert (other / name).read_bytes() == (repository / name).read_bytes()


def test_new_files_count_beside_ours_and_the_reward_functions_only(repository, tmp_path):
    """Not the thousands of a virtual environment in the repository."""
    for name in ("env/module.py", "rewards/own.py", "rewards/helper.py", "new.py"):
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_text("new = 1\n")
    config = config_of(tmp_path, f"reward.name={repository}/rewards/own.py:score")
    assert provenance.write_code(config, 1).endswith(
        "with changes in new.py, rewards/helper.py, rewards/own.py")


def test_a_long_diff_is_left_out_and_no_repository_is_said(repository, tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "LONGEST_DIFF", 10)
    (repository / "losses.py").write_text("another")
    assert provenance.write_code(config_of(tmp_path), 1).endswith("with changes in losses.py")
    assert "left out" in (tmp_path / "run/code/from_step_00001.patch").read_text()
    monkeypatch.setenv("PATH", "")
    assert provenance.write_code(config_of(tmp_path), 1) == "commit no repository"


def test_the_code_of_a_step_is_that_of_the_launch_which_made_it(repository, tmp_path):
    """The page of a step says it."""
    commit = git(repository, "rev-parse", "HEAD")
    provenance.write_code(config_of(tmp_path), 1)
    (repository / "losses.py").write_text("another")
    provenance.write_code(config_of(tmp_path), 100_001)
    run_dir = tmp_path / "run"
    (run_dir / "code/from_step_old.patch").touch()
    assert provenance.describe_code(run_dir, 0) == ""
    assert provenance.describe_code(run_dir, 99_999) == f"commit {commit}"
    changed = f"commit {commit}, with changes in losses.py"
    assert provenance.describe_code(run_dir, 100_001) == changed
    assert provenance.describe_code(tmp_path, 1) == ""


def test_what_a_run_does_not_depend_on_is_no_other_code(repository, tmp_path):
    config = config_of(tmp_path)
    earlier = provenance.code_digests(config)
    assert set(earlier) == {"losses.py", "infra/setup.py"}
    for name in ("bench/x.py", "docs/x.py", "tests/x.py", "README.md"):
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_text("other")
    assert provenance.changed_code(earlier, config) == []
    (repository / "losses.py").write_text("other")
    (repository / "infra/new.py").touch()
    (repository / "infra/setup.py").unlink()
    assert provenance.changed_code(earlier, config) == ["infra/new.py", "infra/setup.py",
                                                        "losses.py"]
    assert provenance.changed_code({}, config) == []  # a checkpoint of before there were digests


def test_what_a_reward_file_imports_from_beside_it_is_code_too(tmp_path):
    """And what that imports; libraries and files that nobody imports are not."""
    for name, text in {"own.py": "import helper, json\nfrom pack.part import x\nfrom . import near",
                       "helper.py": "from deep import y", "deep.py": "import own", "near.py": "",
                       "pack/part.py": "x = 1", "other.py": "", "broken.py": "def"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = provenance.reward_files(config_of(
        tmp_path, f"reward.name={tmp_path}/own.py:score,{tmp_path}/broken.py:score",
        "reward.weights=1,1"))
    assert {str(Path(name).relative_to(tmp_path)) for name in found} == {
        "own.py", "helper.py", "deep.py", "near.py", "pack/part.py", "broken.py"}
    assert len(found) == 6


def test_a_run_resumes_with_other_code_only_if_it_is_told_to(start, tmp_path, capsys):
    """Here a reward file; it is among the digests like our own files."""
    file = tmp_path / "own.py"
    file.write_text(REWARD.format(number=3))
    named = [*STEPS, f"reward.name={file}:score"]
    run_dir = start(*named, "total_training_steps=1")
    file.write_text(REWARD.format(number=4))
    with pytest.raises(SystemExit) as error:
        start(*named, "total_training_steps=2")
    for words in (f"other code ({file} differ", "undo that", f"run_dir={run_dir}-2",
                  f"resume={run_dir / 'checkpoints/step_00001'}", "resume_with_other_code=true"):
        assert words in str(error.value)
    capsys.readouterr()
    start(*named, "total_training_steps=2", "resume_with_other_code=true")
    assert f"step_00001 with other code: {file}\n" in capsys.readouterr().out
    start(*named, "total_training_steps=3")  # the newest checkpoint is of this code
    assert [path.name for path in sorted((run_dir / "code").glob("*.patch"))] == [
        f"from_step_0000{step}.patch" for step in (1, 2, 3)]
    text = (run_dir / "code/from_step_00002.patch").read_text()
    digest = re.search(f"^(.*)  {file}$", text, re.MULTILINE)[1]
    assert (run_dir / f"code/{digest[:12]}_own.py").read_text() == REWARD.format(number=4)


def test_steps_that_are_trained_again_lose_the_code_of_before(start):
    """As their responses: here a later launch, whose checkpoints are damaged, was of other code."""
    run_dir = start(*STEPS, "total_training_steps=1")
    (run_dir / "code/from_step_00009.patch").touch()
    start(*STEPS, "total_training_steps=2")
    assert sorted(path.name for path in (run_dir / "code").iterdir()) == [
        "from_step_00001.patch", "from_step_00002.patch"]


def test_a_branch_may_have_other_code_and_says_which(start, tmp_path):
    file = tmp_path / "own.py"
    file.write_text(REWARD.format(number=3))
    named = [*STEPS, f"reward.name={file}:score"]
    origin = start(*named, "total_training_steps=1").rename(tmp_path / "origin")
    file.write_text(REWARD.format(number=4))
    run_dir = start(*named, "total_training_steps=2", f"resume={origin}/checkpoints/step_00001")
    assert json.loads((run_dir / "branch.json").read_text())["code"] == [str(file)]
    assert provenance.describe_branch(run_dir) == "branch of origin after step 1"
    assert provenance.describe_code(run_dir, 2).endswith(", branch of origin after step 1")
    assert provenance.describe_branch(origin) == ""


def test_a_tracker_gets_the_code_and_the_project(tmp_path):
    calls = []

    class Recorder:
        trackers, is_main_process = (), True

        def init_trackers(self, *arguments):
            calls.append(arguments)
    config = config_of(tmp_path, "log_project=mine")
    start_tracker(Recorder(), config, "commit abc", resumed=False)
    ((project, settings, _),) = calls
    assert project == "mine" and settings == flatten(config) | {"code": "commit abc"}
