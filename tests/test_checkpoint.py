"""A run that is stopped, killed or damaged resumes as if nothing had happened, or says why not."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import TINY
from filelock import FileLock
from transformers import AutoModelForCausalLM

import infra.checkpoint
import train_dapo
from data_types import Prompt
from infra.checkpoint import find_checkpoint, list_checkpoints
from infra.config import load_config
from infra.distributed import stop_on_signal
from sampling import prompt_at

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
from kill_resume import kill_and_resume, run_differences

ROOT = Path(__file__).parent.parent
SAVED = ["save_every=1", "val.file="]


@pytest.fixture(scope="module")
def master(tmp_path_factory):
    return tmp_path_factory.mktemp("master") / "run"


@pytest.fixture
def saved(start, master, tmp_path):
    """A run of two steps, with a checkpoint after each: trained once, then copied."""
    if not master.exists():
        start(*SAVED).rename(master)
    return shutil.copytree(master, tmp_path / "run")


@pytest.fixture(scope="module")
def longer(tmp_path_factory):
    return tmp_path_factory.mktemp("longer") / "run"


@pytest.fixture
def uninterrupted(start, longer, tmp_path):
    """The same run with three steps, none of them interrupted."""
    if not longer.exists():
        assert not (tmp_path / "run").exists()
        start("save_every=0", "val.file=", "total_training_steps=3").rename(longer)
    return longer


def metrics(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def names(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# ---- killed, stopped -----------------------------------------------------------------------------

@pytest.mark.slow
def test_kill_9_at_any_moment_changes_nothing(tmp_path):
    overrides = [*TINY, "total_training_steps=24", "val.max_prompts=4"]
    found, hit = kill_and_resume(tmp_path, 3, seed=1, overrides=overrides)
    assert found == [] and sum(hit.values()) >= 2  # a fast machine may finish before the third


def test_the_comparison_sees_a_difference(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "model").mkdir(parents=True)
        row = {"step": 1, "actor/loss": 0.5, "time/step": ord(name)}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        (tmp_path / name / "model/weights").write_text("w")
    assert run_differences(tmp_path / "a", tmp_path / "b") == []
    (tmp_path / "b/model/weights").write_text("v")
    (tmp_path / "b/metrics.jsonl").write_text('{"step": 1, "actor/loss": 0.6}\n')
    assert run_differences(tmp_path / "a", tmp_path / "b") == ["metrics.jsonl", "model/weights"]


def test_a_resumed_run_ends_as_if_it_had_not_been_interrupted(start, uninterrupted, saved):
    start(*SAVED, "total_training_steps=3")
    assert run_differences(uninterrupted, saved) == []


def test_resuming_removes_rollouts_of_later_steps_and_no_other_file(start, saved):
    for name in ("step_00009", "dropped_00009", "notes_2026"):
        (saved / f"rollouts/{name}.jsonl").write_text("{}\n")
    start(*SAVED, "total_training_steps=3")
    left = {path.stem for path in (saved / "rollouts").glob("*.jsonl")}
    assert "notes_2026" in left and not left & {"step_00009", "dropped_00009"}


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 0), (signal.SIGTERM, 143),
                                          (signal.SIGHUP, 129), (signal.SIGUSR1, 138)])
def test_a_signal_ends_the_step_saves_and_says_how_to_resume(tmp_path, start, number, code):
    """By the exit code too: a script can tell it from a run that is finished, or has failed."""
    run_dir = tmp_path / "stopped"
    common = [*TINY, "total_training_steps=20", "save_every=0", "val.file="]
    process = subprocess.Popen([sys.executable, "train_dapo.py", "--config", "config.yaml",
                                f"run_dir={run_dir}", *common], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    while not (run_dir / "metrics.jsonl").exists() or not (run_dir / "metrics.jsonl").read_text():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert "finishing this step" in err and not (run_dir / "model").exists()
    command = shlex.split(out.splitlines()[-1])
    assert command[:2] == ["python", "train_dapo.py"], out
    assert command[-1] == "resume=auto", out
    (name,) = names(run_dir)
    assert 1 <= int(name[-5:]) < 20  # a busy machine may be late to send the signal
    result = subprocess.run([sys.executable, *command[1:]], cwd=ROOT, capture_output=True,
                            text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert run_differences(run_dir, start(*common)) == []


def test_a_stopped_run_saves_and_says_how_to_resume(start, monkeypatch, capsys, uninterrupted):
    monkeypatch.setattr(Accelerator, "check_trigger", lambda self: True)
    overrides = ["save_every=0", "val.file=", "total_training_steps=3"]
    run_dir = start(*overrides)
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert names(run_dir) == ["step_00001"] and not (run_dir / "model").exists()
    assert command[:2] == ["python", "train_dapo.py"]
    assert command[-1] == "resume=auto" and set(overrides) < set(command)
    monkeypatch.setattr(Accelerator, "check_trigger", lambda self: False)
    assert run_differences(start(*overrides), uninterrupted) == []


def test_signal_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stop_on_signal(Accelerator(cpu=True)):
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_signal_that_nohup_has_switched_off_stays_so(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signal(Accelerator(cpu=True)) as received:
            os.kill(os.getpid(), signal.SIGHUP)
        assert received == []
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_that_died_before_its_first_checkpoint_starts_again(start):
    run_dir = start("save_every=0", "val.file=", "total_training_steps=1")
    for overrides in (["save_every=0"], ["save_every=5"], ["save_every=5", "actor.lr=0.5"]):
        with pytest.raises(SystemExit, match="holds an earlier run, without a checkpoint to resume "
                                             "from; name another"):  # its results are all there is
            start("val.file=", *overrides)
    shutil.rmtree(run_dir / "model")
    (run_dir / "metrics.jsonl").open("a").write('{"step": 2, "half a ro')
    with pytest.raises(SystemExit, match="another config .actor.lr: 0.0001 -> 0.5.: undo that; "
                                         "name another, for instance run_dir=[^ ]*run-2$"):
        start("val.file=", "save_every=5", "actor.lr=0.5")
    assert [row["step"] for row in metrics(start("save_every=5", "val.file="))] == [1, 2]


def test_a_run_that_died_in_its_first_row_starts_again(start, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 0, "va')
    assert [row["step"] for row in metrics(start("val.file="))] == [1, 2]


def test_a_partial_checkpoint_is_not_picked_up_and_goes_with_the_next_save(start, saved):
    partial = saved / "checkpoints/.step_00009.partial"
    partial.mkdir()
    shutil.copy(saved / "checkpoints/step_00002/progress.json", partial)
    start(*SAVED, "total_training_steps=3")
    assert [row["step"] for row in metrics(saved)] == [1, 2, 3] and not partial.exists()


def test_the_last_checkpoint_comes_after_the_model(start, uninterrupted, saved, monkeypatch):
    """Or a kill between them would leave a finished run whose model is an older one."""
    def interrupted(state, name):
        raise KeyboardInterrupt
    monkeypatch.setattr(infra.checkpoint, "save_model", interrupted)
    with pytest.raises(SystemExit, match="interrupted; the same command resumes from "
                                         ".*step_00002"):
        start(*SAVED, "total_training_steps=3")
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    start(*SAVED, "total_training_steps=3")
    assert run_differences(saved, uninterrupted) == []


def test_the_config_is_never_half_written(start, saved):
    """A start reads what the last one wrote: the file is replaced, so that a kill leaves one of the
    two."""
    file = saved / "config.yaml"
    before, inode = file.read_text(), file.stat().st_ino
    start(*SAVED, "total_training_steps=3")
    assert file.read_text() != before and file.stat().st_ino != inode


# ---- damaged -------------------------------------------------------------------------------------

@pytest.mark.parametrize(("damage", "file", "words"), [
    (truncate, "__0_0.distcp", "not what was written: __0_0.distcp"),
    (flip_a_bit, "__0_0.distcp", "not what was written: __0_0.distcp"),
    (Path.unlink, "__0_0.distcp", "No such file or directory: .*__0_0.distcp"),
    (flip_a_bit, ".metadata", "not what was written: .metadata"),
    (flip_a_bit, "progress.json", "not what was written: progress.json"),
    (Path.unlink, "digests.json", "No such file or directory: .*digests.json"),
    (truncate, "digests.json", "digests.json: "),
])
def test_a_damaged_checkpoint_is_skipped_with_a_warning(saved, capsys, damage, file, words):
    damage(saved / "checkpoints/step_00002" / file)
    config = load_config("config.yaml", [f"run_dir={saved}"])
    assert find_checkpoint(Accelerator(cpu=True), config) == saved / "checkpoints/step_00001"
    assert re.search(f"step_00002 is damaged: .*{words}", capsys.readouterr().out)


def test_a_run_whose_newest_checkpoint_is_damaged_ends_as_if_it_were_not(start, uninterrupted,
                                                                        saved, capsys):
    flip_a_bit(saved / "checkpoints/step_00002/__0_0.distcp")
    start(*SAVED, "total_training_steps=3")
    out = capsys.readouterr().out
    assert "step_00002 is damaged" in out
    assert f"resuming from {saved / 'checkpoints/step_00001'}" in out
    assert run_differences(uninterrupted, saved) == []


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start(start, saved):
    before = (saved / "metrics.jsonl").read_text()
    for path in (saved / "checkpoints").iterdir():
        flip_a_bit(path / "__0_0.distcp")
    with pytest.raises(SystemExit, match="no checkpoint is intact of .*step_00002, .*step_00001; "
                                         "start in another run_dir"):
        start(*SAVED, "total_training_steps=3")
    assert (saved / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("damage, kept, words", [
    (lambda rows: ["{}x", *rows], [1, 2, 3], "left out what cannot be read in line 1"),
    (lambda rows: [rows[0] + rows[1]], [1, 2, 3], ""),  # a lost line break
    (lambda rows: [rows[0][:40], rows[1]], [2, 3], "lacks 1 of the steps up to 2 (the first is 1)"),
    (lambda rows: ["\udcff[", "3", rows[1]], [2, 3], "left out what cannot be read in line 1"),
    (None, [3], "lacks 2 of the steps up to 2 (the first is 1)")])  # it was deleted
def test_what_is_left_of_damaged_metrics_is_kept_and_the_rest_said(start, saved, capsys, damage,
                                                                   kept, words):
    file = saved / "metrics.jsonl"
    rows = file.read_text().splitlines()
    file.unlink()
    if damage:
        file.write_text("\n".join(damage(rows)) + "\n", errors="surrogateescape")
    start("val.file=", "save_every=1", "total_training_steps=3")
    assert [row["step"] for row in metrics(saved)] == kept
    printed = capsys.readouterr().out
    assert (words in printed) if words else "warning" not in printed


def test_stray_files_among_checkpoints_are_no_checkpoints(start, saved):
    for name in ("step_notes.txt", "step_00009", "step_old"):
        (saved / "checkpoints" / name).touch()
    assert [path.name for path in list_checkpoints(saved)] == ["step_00002", "step_00001"]
    start("val.file=", "save_every=1", "total_training_steps=3")


def test_a_file_in_the_place_of_the_checkpoints_is_one_line(start, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").touch()
    with pytest.raises(SystemExit, match="run_dir: .*run/checkpoints is no directory: move it"):
        start("val.file=", "total_training_steps=1")


def test_a_full_disk_while_saving_is_one_line_and_the_older_checkpoint_stays(tmp_path, start):
    disk = tmp_path / "run"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)],
                           capture_output=True, text=True, check=False)
    if mount.returncode:
        pytest.skip(f"only root can make a small file system: {mount.stderr}")
    overrides = [*SAVED, "total_training_steps=3"]
    try:  # a checkpoint takes 2.1 MB: there is room for one and not for two
        with pytest.raises(SystemExit, match=r"^error: cannot save .*step_00002, on whose disk "
                           r"2 MB were free: .*\. The policy as it was is in .*last_good_model"):
            start(*overrides)
        assert names(disk) == ["step_00001"]
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free // 4096 * 4096))
        with pytest.raises(SystemExit, match=r"^error: .*No space left on device"):
            start(*overrides)  # now there is no room for a row of metrics either
        subprocess.run(["mount", "-o", "remount,size=19m", str(disk)], check=True)
        assert [row["step"] for row in metrics(start(*overrides))] == [1, 2, 3]
        assert names(disk) == ["step_00002", "step_00003"]
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


# ---- which checkpoints stay ----------------------------------------------------------------------

def test_the_newest_checkpoints_stay_and_models_are_exported(start, saved):
    run_dir = start(*SAVED, "keep_checkpoints=2", "save_model_every=2", "total_training_steps=4")
    assert names(run_dir) == ["step_00003", "step_00004"]
    assert sorted(path.name for path in run_dir.glob("model*")) == ["model", "model_step_00004"]
    model, exported = (run_dir / name / "model.safetensors"
                       for name in ("model", "model_step_00004"))
    assert model.read_bytes() == exported.read_bytes()


def test_a_damaged_newer_checkpoint_does_not_count_among_those_that_stay(start, saved):
    damaged = shutil.copytree(saved / "checkpoints/step_00002", saved / "checkpoints/step_00009")
    flip_a_bit(damaged / "__0_0.distcp")
    start(*SAVED, "keep_checkpoints=1", "total_training_steps=3")
    assert names(saved) == ["step_00003"]


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for step in (99_990, 100_000, 5):
        (tmp_path / f"checkpoints/step_{step:05d}").mkdir(parents=True)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_100000", "step_99990",
                                                                  "step_00005"]


@pytest.mark.slow
def test_saving_before_anything_was_learned_changes_nothing(start, tmp_path):
    """To read the state of an untrained optimizer, torch would let it take a step."""
    rows = []
    for i, line in enumerate((ROOT / "toy/train.jsonl").read_text().splitlines()):
        rows.append(Prompt(i, "", [], "", json.loads(line)))
    first = [prompt_at(rows, position, seed=0).row["prompt"] for position in range(6)]
    (tmp_path / "reward.py").write_text(
        "def score(response, ground_truth, prompt, **row):\n"
        f"    return float(prompt not in {first!r} and len(response) % 2)\n")
    overrides = ["val.file=", f"reward.name={tmp_path / 'reward.py'}:score",
                 "filter_groups.max_num_gen_batches=1"]
    run_dir = start("save_every=1", *overrides)
    skipped, trained = metrics(run_dir)
    assert skipped["consecutive_skips"] == 1 and trained["optimizer_steps"] > 0
    saved = run_dir.rename(tmp_path / "saved")
    unsaved = start("save_every=0", *overrides).rename(tmp_path / "unsaved")
    assert run_differences(saved, unsaved) == []
    shutil.rmtree(saved / "checkpoints/step_00002")
    saved.rename(tmp_path / "run")
    assert run_differences(start("save_every=1", *overrides), unsaved) == []


def test_a_step_that_was_skipped_counts_after_a_resume(start):
    """Three in a row stop the run: one before the resume, and two after it."""
    overrides = ["save_every=1", "val.file=", "reward.name=tests/hopeless.py:never_right",
                 "filter_groups.max_num_gen_batches=1", "filter_groups.max_skipped_steps=2"]
    run_dir = start(*overrides, "total_training_steps=1")
    with pytest.raises(SystemExit, match="3 steps in a row were skipped"):
        start(*overrides, "total_training_steps=9")
    assert [row["step"] for row in metrics(run_dir)] == [1, 2, 3]  # the last one is logged too


# ---- what is refused -----------------------------------------------------------------------------

def test_a_second_run_on_the_same_directory_is_refused(start, tmp_path):
    """flock belongs to the open file: another one in this process is as good as another
    process's."""
    (tmp_path / "run").mkdir()
    message = "another run is writing into .*run; wait for it, stop it"
    with FileLock(tmp_path / "run/.lock"), pytest.raises(SystemExit, match=message):
        start()
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_another_config_is_refused_with_the_list_of_what_differs(start, saved):
    before = (saved / "metrics.jsonl").read_text()
    with pytest.raises(SystemExit, match=r"step_00002 has another config \(actor.lr: 0.0001 -> "
                       r"0.1, rollout.n: 4 -> 8\): undo that; name another, for instance run_dir="
                       r".*run-2; or branch off: resume=.*step_00002 run_dir=.*run-2"):
        start(*SAVED, "total_training_steps=3", "actor.lr=0.1", "rollout.n=8")
    assert (saved / "metrics.jsonl").read_text() == before
    start("val.file=", "save_every=2", "keep_checkpoints=1", "total_training_steps=4",
          "actor.max_tokens_per_micro_batch=999", "val.n=3")  # these may differ
    assert names(saved) == ["step_00004"]


@pytest.mark.slow
def test_evaluations_by_other_settings_are_not_compared(start, capsys):
    start("save_every=1", "total_training_steps=1")
    capsys.readouterr()
    start("save_every=1", "total_training_steps=2")
    assert "before" in capsys.readouterr().out  # of the first start
    start("save_every=1", "total_training_steps=3", "val.n=3")
    out = capsys.readouterr().out
    assert "avg@3" in out and "avg@2" not in out and "before" not in out


def test_other_prompts_are_refused(start, saved, tmp_path):
    lines = (ROOT / "toy/train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "other.jsonl").write_text("".join(lines[:50]))
    with pytest.raises(SystemExit, match="is of a run on other prompts: what data.train_file holds "
                                         "has changed; undo that, or branch off: resume=.*step_00002"
                                         " run_dir=.*/run-2"):
        start("val.file=", "total_training_steps=3", f"data.train_file={tmp_path / 'other.jsonl'}")


def test_a_finished_run_is_not_run_for_zero_steps(start, saved):
    for steps in (2, 1):
        with pytest.raises(SystemExit, match="is finished, with 2 steps; raise total_training_steps"
                                             f"={steps} to train on, or name another"):
            start(*SAVED, f"total_training_steps={steps}")
    with pytest.raises(SystemExit, match="has another config .*n: 4 -> 8"):  # at once, not later
        start(*SAVED, "total_training_steps=2", "rollout.n=8")


def test_a_run_is_not_overwritten(start, saved):
    with pytest.raises(SystemExit, match="run holds an earlier run; name another, for instance "
                                         "run_dir=.*run-2"):
        start("resume=never")
    with pytest.raises(SystemExit, match="holds an earlier run; name another"):
        start(f"resume={saved / 'checkpoints/step_00001'}")
    with pytest.raises(SystemExit, match="resume: .*nowhere is not a checkpoint's directory"):
        start("resume=nowhere")
    for path in (saved, saved / "checkpoints/step_00007"):  # of a run, and one that is gone
        with pytest.raises(SystemExit, match="directory, auto or never; .*/step_00002 is one"):
            start(f"resume={path}", f"run_dir={saved}-2")


# ---- branching off -------------------------------------------------------------------------------

@pytest.fixture
def origin(saved, tmp_path):
    """The checkpoint after step 1 of another run."""
    return saved.rename(tmp_path / "origin") / "checkpoints/step_00001"


def test_a_checkpoint_that_is_named_starts_a_new_directory(start, origin, uninterrupted):
    run_dir = start(*SAVED, "total_training_steps=3", f"resume={origin}")
    assert run_differences(uninterrupted, run_dir) == [
        "rollouts/dropped_00001.jsonl", "rollouts/step_00001.jsonl"]
    with pytest.raises(SystemExit, match="holds an earlier run"):
        start("total_training_steps=4", f"resume={origin.with_name('step_00002')}")


def test_a_finished_checkpoint_is_not_run_for_zero_steps(start, origin):
    with pytest.raises(SystemExit, match="step_00002 is finished, with 2 steps; raise "
                                         "total_training_steps=2"):
        start(f"resume={origin.with_name('step_00002')}", "val.file=")


def test_a_branch_may_change_any_key_and_says_which(start, origin, tmp_path, capsys):
    (tmp_path / "few.jsonl").write_text('{"prompt": "a1b+1?", "answer": "2"}\n'
                                        '{"prompt": "a1b+2?", "answer": "3"}\n')
    changed = ["actor.lr=1e-5", "actor.weight_decay=0", "rollout.n=8",
               "data.prompt_template={prompt} ", f"data.train_file={tmp_path / 'few.jsonl'}"]
    run_dir = start(*SAVED, f"resume={origin}", *changed)
    lines = ["actor.lr: 0.0001 -> 1e-05", "actor.weight_decay: 0.1 -> 0.0",
             "data.prompt_template: {prompt} -> {prompt} ",
             f"data.train_file: toy/train.jsonl -> {tmp_path / 'few.jsonl'}", "rollout.n: 4 -> 8"]
    assert f"branching off {origin}: {', '.join(lines)}" in capsys.readouterr().out
    branch = json.loads((run_dir / "branch.json").read_text())
    assert branch == {"checkpoint": str(origin), "step": 1, "changed": lines, "code": []}
    before, after = metrics(run_dir)
    assert before == metrics(origin.parent.parent)[0]
    assert (before["responses/generated"], after["responses/generated"] % 8) == (24, 0)
    assert after["actor/lr"] == 1e-5


def test_a_branch_trains_with_its_own_weight_decay(start, origin, make_state, monkeypatch):
    state, prompts = make_state("actor.weight_decay=0.5", f"resume={origin}", *SAVED)
    infra.checkpoint.lock_run_dir(state.accelerator, state.config)
    infra.checkpoint.resume(state, prompts)
    assert [group["weight_decay"] for group in state.optimizer.param_groups] == [0.5]


def test_only_evaluations_by_the_same_settings_are_compared():
    earlier = {"val.n": 2, "val.every": 5, "reward.name": "math", "data.max_response_length": 9,
               "actor.lr": 0.1}
    for changed in ({}, {"val.every": 1}, {"actor.lr": 0.2}):
        assert infra.checkpoint.same_evaluation_settings(earlier, earlier | changed), changed
    for changed in ({"val.n": 3}, {"reward.name": "x"}, {"data.max_response_length": 8}):
        assert not infra.checkpoint.same_evaluation_settings(earlier, earlier | changed), changed


@pytest.mark.slow
def test_the_evaluations_before_a_branch_with_another_reward_are_dropped(start, tmp_path, capsys):
    origin = start("save_every=1", "total_training_steps=1").rename(tmp_path / "origin")
    named = f"resume={origin / 'checkpoints/step_00001'}"
    capsys.readouterr()
    start("total_training_steps=2", named, "reward.name=math_strict_box")
    assert not re.search("^ +before", capsys.readouterr().out, re.MULTILINE)
    shutil.rmtree(tmp_path / "run")
    start("total_training_steps=2", named, "actor.lr=1e-5")
    assert "before" in capsys.readouterr().out


@pytest.mark.slow
def test_a_branch_resumes_with_the_same_command_or_auto_and_without_its_origin(start, origin,
                                                                               tmp_path):
    named = ["val.file=", f"resume={origin}", "actor.lr=1e-5"]
    run_dir = start(*named, "save_every=1", "total_training_steps=2")
    start(*named, "save_every=1", "total_training_steps=3")
    shutil.rmtree(origin.parent.parent)
    start(*named, "save_every=1", "total_training_steps=4")
    with pytest.raises(SystemExit, match="another config .actor.lr: 1e-05 -> 0.0001."):
        start(*SAVED, "total_training_steps=5")
    start(*SAVED, "total_training_steps=5", "actor.lr=1e-5")
    start(*named, "save_every=1", "total_training_steps=6")
    assert [row["step"] for row in metrics(run_dir)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("resume", ["named",
                                    pytest.param("auto", marks=pytest.mark.slow)])
def test_a_branch_that_died_before_its_first_checkpoint_starts_from_its_origin(start, origin,
                                                                               resume):
    named, branch = f"resume={origin}", ["val.file=", "actor.lr=1e-5", "save_every=5"]
    run_dir = start(*branch, named)
    model = (run_dir / "model/model.safetensors").read_bytes()
    for name in ("checkpoints", "model"):
        shutil.rmtree(run_dir / name)
    with pytest.raises(SystemExit, match="another config .actor.lr: 1e-05 -> 0.5."):
        start("val.file=", "actor.lr=0.5", "save_every=5", named)
    start(*branch, named if resume == "named" else "resume=auto")
    assert (run_dir / "model/model.safetensors").read_bytes() == model
    assert [row["step"] for row in metrics(run_dir)] == [1, 2]


@pytest.mark.slow
def test_kill_9_of_a_branch_before_its_first_checkpoint_changes_nothing(tmp_path):
    start = [sys.executable, "train_dapo.py", "--config", "config.yaml", *TINY, "val.file=",
             "total_training_steps=6"]

    def run(*overrides):
        subprocess.run([*start, *overrides], cwd=ROOT, capture_output=True, check=True)

    run(f"run_dir={tmp_path / 'origin'}", "save_every=2", "total_training_steps=2")
    branch = [f"resume={tmp_path / 'origin/checkpoints/step_00002'}", "save_every=5",
              "actor.lr=1e-5"]
    run(f"run_dir={tmp_path / 'straight'}", *branch)
    process = subprocess.Popen([*start, f"run_dir={tmp_path / 'killed'}", *branch], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    file = tmp_path / "killed/metrics.jsonl"
    while not file.exists() or len(file.read_text().splitlines()) < 3:
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert not list((tmp_path / "killed").glob("checkpoints/step_*"))
    run(f"run_dir={tmp_path / 'killed'}", *branch)
    assert run_differences(tmp_path / "straight", tmp_path / "killed") == []


# ---- what is on the disk ----

def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(start, monkeypatch):
    """Its files, their directory, then the name, then the directory that has the name."""
    events, original, paths = [], os.fsync, {}

    def opened(path, flags, *args):
        descriptor = os_open(path, flags, *args)
        paths[descriptor] = Path(path)
        return descriptor

    def fsync(descriptor):
        events.append(("flushed", paths.get(descriptor)))
        original(descriptor)

    def rename(self, target):
        events.append(("renamed", self))
        return path_rename(self, target)
    os_open, path_rename = os.open, Path.rename
    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    run_dir = start("val.file=", "total_training_steps=1", "save_every=1")
    (path,) = list_checkpoints(run_dir)
    partial = path.with_name(f".{path.name}.partial")
    place = events.index(("renamed", partial))
    flushed = {file for event, file in events[:place] if event == "flushed"}
    assert {partial / file.name for file in path.iterdir()} | {partial} <= flushed
    assert events[place + 1] == ("flushed", path.parent)


def test_curves_are_drawn_at_the_end_of_a_run_and_not_of_a_stopped_one(start, monkeypatch):
    monkeypatch.setattr(Accelerator, "check_trigger", lambda self: True)
    run_dir = start("val.file=", "total_training_steps=2", curves=True)
    assert list_checkpoints(run_dir) and not (run_dir / "curves.png").exists()
    monkeypatch.setattr(Accelerator, "check_trigger", lambda self: False)
    start("val.file=", "total_training_steps=2", curves=True)
    assert (run_dir / "curves.png").exists()


# ---- errors --------------------------------------------------------------------------------------

PHASES = ["generate", "score_responses", "make_groups", "compute_advantages", "add_logprobs",
          "update_policy", "sync_weights", "step_metrics", "write_step", "save_results"]
ERRORS = [SystemExit("of a library"), KeyError("x"), IndexError("index out of range"),
          TypeError("t"), RuntimeError("CUDA error"), AssertionError(), MemoryError(),
          ZeroDivisionError("z"), NotImplementedError(), AttributeError("a"), StopIteration(),
          OSError("no space"), ValueError("v"), torch.OutOfMemoryError("CUDA out of memory")]


def keeps_the_policy(start, monkeypatch, capsys, tmp_path, phase, error):
    original, run_dir = getattr(train_dapo, phase), tmp_path / "run"

    def broken(*args, **kwargs):
        if (run_dir / "metrics.jsonl").exists():  # in the second step
            raise error
        return original(*args, **kwargs)
    shutil.rmtree(run_dir, ignore_errors=True)
    with monkeypatch.context() as patch:
        patch.setattr(train_dapo, phase, broken)
        with pytest.raises(SystemExit, match="^error: .*last_good_model"):
            start("val.file=", "save_every=0", "total_training_steps=2")
    shown = "in broken" in capsys.readouterr().err  # the traceback: where a bug is, matters
    if not isinstance(error, torch.OutOfMemoryError):  # one line in the phases that it belongs to
        assert shown == (not isinstance(error, (OSError, ValueError)))
    model = AutoModelForCausalLM.from_pretrained(run_dir / "last_good_model")
    base = AutoModelForCausalLM.from_pretrained(ROOT / "toy/base")
    assert not torch.equal(model.lm_head.weight, base.lm_head.weight)


@pytest.mark.parametrize("phase, error", list(zip(PHASES, ERRORS, strict=False)),
                         ids=lambda value: value if isinstance(value, str) else repr(value))
def test_an_error_of_any_kind_leaves_the_policy_and_one_last_line(
        start, monkeypatch, capsys, tmp_path, phase, error):
    keeps_the_policy(start, monkeypatch, capsys, tmp_path, phase, error)


def test_a_policy_that_cannot_be_saved_is_said_to_be_lost_in_the_last_line(start, monkeypatch):
    def fails(*args):
        raise RuntimeError("CUDA error")
    monkeypatch.setattr(infra.checkpoint, "save_model", fails)
    with pytest.raises(SystemExit, match=r"^error: RuntimeError\('CUDA error'\)\. The policy is "
                                         r"lost: CUDA error$"):
        start("val.file=", "save_every=0", "total_training_steps=1")


@pytest.mark.slow
@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_no_error_in_any_phase_loses_the_policy(start, monkeypatch, capsys, tmp_path, error):
    for phase in PHASES:
        keeps_the_policy(start, monkeypatch, capsys, tmp_path, phase, error)
