"""A run that is stopped, killed or damaged goes on as if nothing had happened, or says what is wrong."""

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate import Accelerator
from conftest import TINY
from filelock import FileLock

import train_dapo
from infra.checkpoint import find_checkpoint, list_checkpoints
from infra.data import Prompt
from sampling import draw_prompts

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
from kill_resume import config_diff, kill_and_resume

ROOT = Path(__file__).parent.parent


def test_kill_9_at_any_moment_changes_nothing(tmp_path):
    found, hit = kill_and_resume(tmp_path, 3, seed=1, overrides=[*TINY, "total_training_steps=8", "val.max_prompts=4"])
    assert found == [] and sum(hit.values()) >= 2  # a fast machine may be done before the third


def test_the_comparison_sees_a_difference(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps({"step": 1, "actor/loss": 0.5, "time/step": ord(name)}) + "\n")
        (tmp_path / name / "model/weights").write_text("w")
    assert config_diff(tmp_path / "a", tmp_path / "b") == []
    (tmp_path / "b/model/weights").write_text("v")
    (tmp_path / "b/metrics.jsonl").write_text('{"step": 1, "actor/loss": 0.6}\n')
    assert config_diff(tmp_path / "a", tmp_path / "b") == ["metrics.jsonl", "model/weights"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_exits_0_with_the_line_that_resumes(tmp_path, start, number):
    run_dir, common = tmp_path / "stopped", [*TINY, "total_training_steps=4", "save_every=0", "val.file="]
    process = subprocess.Popen([sys.executable, "train_dapo.py", "--config", "config.yaml", f"run_dir={run_dir}", *common],
                               cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (run_dir / "metrics.jsonl").exists() or not (run_dir / "metrics.jsonl").read_text():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "finishing this step" in err and not (run_dir / "model").exists()
    command = shlex.split(out.splitlines()[-1])
    assert command[:3] == ["accelerate", "launch", "train_dapo.py"] and command[-1] == "resume=auto", out
    saved = [path.name for path in (run_dir / "checkpoints").iterdir()]
    assert len(saved) == 1 and 1 <= int(saved[0][-5:]) < 4
    result = subprocess.run([sys.executable, *command[2:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert config_diff(run_dir, start(*common)) == []


@pytest.fixture(scope="module")
def master(tmp_path_factory):
    return tmp_path_factory.mktemp("master") / "run"


@pytest.fixture
def saved(start, master, tmp_path):
    """A run of two steps, with a checkpoint after each: trained once, then copied."""
    if not master.exists():
        start("save_every=1", "val.file=").rename(master)
    return shutil.copytree(master, tmp_path / "run")


def metrics(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(("damage", "file", "words"), [
    (truncate, "__0_0.distcp", "__0_0.distcp is not what was written"),
    (flip_a_bit, "__0_0.distcp", "__0_0.distcp is not what was written"),
    (Path.unlink, "__0_0.distcp", "__0_0.distcp is missing"),
    (flip_a_bit, ".metadata", ".metadata is not what was written"),
    (flip_a_bit, "progress.json", "progress.json is not what was written"),
    (Path.unlink, "digests.json", "digests.json is missing"),
    (truncate, "digests.json", "digests.json"),
])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(saved, capsys, damage, file, words):
    damage(saved / "checkpoints/step_00002" / file)
    assert find_checkpoint(Accelerator(cpu=True), saved, "auto") == saved / "checkpoints/step_00001"
    assert f"step_00002 is damaged: {words}" in capsys.readouterr().out


def test_a_run_whose_newest_checkpoint_is_damaged_ends_as_if_it_were_not(start, saved, capsys, tmp_path):
    flip_a_bit(saved / "checkpoints/step_00002/__0_0.distcp")
    start("save_every=1", "val.file=", "total_training_steps=3")
    out = capsys.readouterr().out
    assert "step_00002 is damaged" in out and f"going on from {saved / 'checkpoints/step_00001'}" in out
    saved.rename(tmp_path / "damaged")
    assert config_diff(start("val.file=", "total_training_steps=3"), tmp_path / "damaged") == []


def test_nothing_starts_from_nothing_where_all_checkpoints_are_damaged(start, saved):
    before = (saved / "metrics.jsonl").read_text()
    for path in (saved / "checkpoints").iterdir():
        flip_a_bit(path / "__0_0.distcp")
    with pytest.raises(SystemExit, match="no checkpoint is whole of .*step_00001, .*step_00002; start anew in another run_dir"):
        start("save_every=1", "val.file=", "total_training_steps=3")
    assert (saved / "metrics.jsonl").read_text() == before


def test_a_full_disk_while_saving_is_one_line_and_the_older_checkpoint_stays(tmp_path, monkeypatch, start):
    disk = tmp_path / "run"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True, text=True, check=False)
    if mount.returncode:
        pytest.skip(f"a small file system is for root to make: {mount.stderr}")
    try:  # a checkpoint takes 2.1 MB: there is room for one and not for two
        with pytest.raises(SystemExit, match=r"^error: cannot save .*step_00002, on whose disk 2 MB were free: .*\. The policy as "
                                             r"it was is in .*last_good_model"):
            start("save_every=1", "val.file=", "total_training_steps=3")
        assert [path.name for path in (disk / "checkpoints").iterdir()] == ["step_00001"]
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free // 4096 * 4096))  # now not even a row of metrics
        with pytest.raises(SystemExit, match=r"^error: .*No space left on device"):
            start("save_every=1", "val.file=", "total_training_steps=3")
        subprocess.run(["mount", "-o", "remount,size=19m", str(disk)], check=True)
        run_dir = start("save_every=1", "val.file=", "total_training_steps=3")
        assert [row["step"] for row in metrics(run_dir)] == [1, 2, 3]
        assert sorted(path.name for path in (disk / "checkpoints").iterdir()) == ["step_00002", "step_00003"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_second_run_on_the_same_directory_refuses(start, tmp_path):
    """flock belongs to the open file, so that another one in this process is as good as another process's."""
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run/.lock"), pytest.raises(SystemExit, match="another run is writing into .*run; wait for it, stop it"):
        start()
    assert not (tmp_path / "run/metrics.jsonl").exists()
    start("total_training_steps=1", "val.file=")


def test_another_config_is_refused_with_the_list_of_what_differs(start, saved):
    before = (saved / "metrics.jsonl").read_text()
    with pytest.raises(SystemExit, match=r"another config \(actor.lr: 0.0002 -> 0.1, rollout.n: 4 -> 8\): undo that, or name another"):
        start("save_every=1", "total_training_steps=3", "actor.lr=0.1", "rollout.n=8")
    assert (saved / "metrics.jsonl").read_text() == before
    start("save_every=2", "keep_checkpoints=1", "total_training_steps=3", "actor.max_tokens_per_micro_batch=999", "val.n=3")
    start("save_every=2", "keep_checkpoints=1", "total_training_steps=4", "val.n=2")  # other figures than those saved
    assert [path.name for path in (saved / "checkpoints").iterdir()] == ["step_00004"]


def test_figures_of_another_validation_are_not_compared(start, capsys):
    start("save_every=1")
    capsys.readouterr()
    start("save_every=1", "total_training_steps=3")
    assert "before" in capsys.readouterr().out  # of the first start
    start("save_every=1", "total_training_steps=4", "val.n=3")
    out = capsys.readouterr().out
    assert "avg@3" in out and "avg@2" not in out and "before" not in out


def test_other_prompts_are_refused(start, saved, tmp_path):
    (tmp_path / "other.jsonl").write_text("".join((ROOT / "toy/train.jsonl").read_text().splitlines(keepends=True)[:50]))
    with pytest.raises(SystemExit, match="is of a run on other prompts: data.train_file has changed"):
        start("val.file=", "total_training_steps=3", f"data.train_file={tmp_path / 'other.jsonl'}")


def test_a_finished_run_is_not_run_for_zero_steps(start, saved):
    with pytest.raises(SystemExit, match=r"is finished, with 2 steps; raise total_training_steps=2 to train on, or name another"):
        start("save_every=1", "val.file=")
    with pytest.raises(SystemExit, match="is finished, with 2 steps"):
        start("save_every=1", "val.file=", "total_training_steps=1")


def test_raising_the_number_of_steps_is_the_same_as_having_asked_for_them_at_once(start, saved, tmp_path):
    start("save_every=1", "val.file=", "total_training_steps=4")
    saved.rename(tmp_path / "twice")
    assert config_diff(start("save_every=0", "val.file=", "total_training_steps=4"), tmp_path / "twice") == []


def test_a_checkpoint_that_is_named_starts_a_new_directory(start, saved, tmp_path):
    source = tmp_path / "source"
    saved.rename(source)
    run_dir = start("save_every=1", "val.file=", "total_training_steps=3", f"resume={source / 'checkpoints/step_00001'}")
    assert [row["step"] for row in metrics(run_dir)] == [1, 2, 3]
    assert metrics(run_dir)[1]["actor/loss"] == metrics(source)[1]["actor/loss"]
    before = (run_dir / "model/model.safetensors").read_bytes()
    shutil.rmtree(run_dir / "checkpoints/step_00003")  # as if it had been killed: the same command goes on
    start("save_every=1", "val.file=", "total_training_steps=3", f"resume={source / 'checkpoints/step_00001'}")
    assert (run_dir / "model/model.safetensors").read_bytes() == before
    shutil.rmtree(run_dir / "checkpoints")
    shutil.rmtree(run_dir / "model")  # and as if that had been before its first checkpoint
    start("save_every=2", "val.file=", "total_training_steps=3", f"resume={source / 'checkpoints/step_00001'}")
    assert (run_dir / "model/model.safetensors").read_bytes() == before
    with pytest.raises(SystemExit, match="holds an earlier run"):
        start(f"resume={source / 'checkpoints/step_00002'}")
    with pytest.raises(SystemExit, match="resume: nowhere is not auto, never or a checkpoint's directory"):
        start("resume=nowhere")
    with pytest.raises(SystemExit, match="run holds an earlier run; name another, for instance run_dir=.*run-2"):
        start("resume=never")
    run_dir.rename(tmp_path / "elsewhere")
    with pytest.raises(SystemExit, match="step_00002 is finished, with 2 steps; raise total_training_steps=2"):
        start(f"resume={source / 'checkpoints/step_00002'}", "val.file=")


def test_the_newest_checkpoints_stay_and_models_are_exported(start):
    run_dir = start("save_every=1", "keep_checkpoints=2", "save_model_every=2", "total_training_steps=4", "val.file=")
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step_00003", "step_00004"]
    assert sorted(path.name for path in run_dir.glob("model*")) == ["model", "model_step_00002", "model_step_00004"]
    assert (run_dir / "model/model.safetensors").read_bytes() == (run_dir / "model_step_00004/model.safetensors").read_bytes()


def test_a_run_that_died_before_its_first_checkpoint_begins_anew(start, tmp_path):
    run_dir = start("save_every=0", "val.file=", "total_training_steps=1")
    for overrides in (["save_every=0"], ["save_every=5"], ["save_every=5", "actor.lr=0.5"]):  # its results are all there is
        with pytest.raises(SystemExit, match="holds an earlier run, without a checkpoint to go on from; name another"):
            start("val.file=", *overrides)
    shutil.rmtree(run_dir / "model")
    (run_dir / "metrics.jsonl").open("a").write('{"step": 2, "half a ro')
    with pytest.raises(SystemExit, match="another config .actor.lr: 0.0002 -> 0.5."):
        start("val.file=", "save_every=5", "actor.lr=0.5")
    assert [row["step"] for row in metrics(start("save_every=5", "val.file="))] == [1, 2]


def test_a_run_that_died_in_its_first_row_begins_anew(start, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 0, "va')
    assert [row["step"] for row in metrics(start("val.file="))] == [1, 2]


def test_metrics_that_are_damaged_are_named_with_their_line(start, saved):
    (saved / "metrics.jsonl").write_text("{}x\n" + (saved / "metrics.jsonl").read_text())
    with pytest.raises(SystemExit, match=r"metrics.jsonl:1: not valid JSON: delete this line"):
        start("val.file=", "total_training_steps=3")


def test_saving_before_anything_was_learned_changes_nothing(start, tmp_path):
    """torch's way to ask an optimizer for its state is to let it take a step."""
    lines = (ROOT / "toy/train.jsonl").read_text().splitlines()
    rows = [Prompt(i, "", [], "", json.loads(line)) for i, line in enumerate(lines)]
    first = [prompt.row["prompt"] for _, prompt in draw_prompts([(1, rows)], 0, 6, seed=0)]
    (tmp_path / "reward.py").write_text("def score(response, ground_truth, prompt, **row):\n    return float("
                                        f"prompt not in {first!r} and len(response) % 2)\n")
    overrides = ["val.file=", "total_training_steps=3", f"reward.name={tmp_path / 'reward.py'}:score",
                 "filter_groups.max_num_gen_batches=1"]
    start("save_every=1", "keep_checkpoints=9", *overrides).rename(tmp_path / "saved")
    assert metrics(tmp_path / "saved")[0]["skipped_in_a_row"] == 1 and metrics(tmp_path / "saved")[-1]["optimizer_steps"] > 0
    start("save_every=0", *overrides).rename(tmp_path / "unsaved")
    assert config_diff(tmp_path / "saved", tmp_path / "unsaved") == []
    for step in (2, 3):
        shutil.rmtree(tmp_path / f"saved/checkpoints/step_0000{step}")
    (tmp_path / "saved").rename(tmp_path / "run")
    assert config_diff(start("save_every=1", *overrides), tmp_path / "unsaved") == []


def test_the_last_checkpoint_comes_after_the_policy(start, saved, monkeypatch, tmp_path):
    """Or a kill between them would leave a run that is finished, and whose policy is an older one."""
    shutil.copytree(saved, tmp_path / "straight")
    monkeypatch.setattr(train_dapo, "save_model", lambda run, name: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit, match="interrupted; the same command goes on from .*step_00003"):
        start("save_every=1", "val.file=", "total_training_steps=4")
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    start("save_every=1", "val.file=", "total_training_steps=4")
    (tmp_path / "run").rename(tmp_path / "killed")
    (tmp_path / "straight").rename(tmp_path / "run")
    assert config_diff(start("save_every=1", "val.file=", "total_training_steps=4"), tmp_path / "killed") == []


def test_the_config_is_never_half_written(start, saved):
    """A start reads what the last one wrote: it is replaced, not written over, so that a kill leaves one of the two."""
    before, inode = (saved / "config.yaml").read_text(), (saved / "config.yaml").stat().st_ino
    start("save_every=1", "val.file=", "total_training_steps=3")
    assert (saved / "config.yaml").read_text() != before and (saved / "config.yaml").stat().st_ino != inode


def test_older_checkpoints_of_a_damaged_newer_one_are_not_pruned_in_its_place(start, saved):
    damaged = shutil.copytree(saved / "checkpoints/step_00002", saved / "checkpoints/step_00009")
    flip_a_bit(damaged / "__0_0.distcp")
    start("save_every=1", "keep_checkpoints=1", "val.file=", "total_training_steps=3")
    assert [path.name for path in (saved / "checkpoints").iterdir()] == ["step_00003"]


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for step in (99_990, 100_000, 5):
        (tmp_path / f"checkpoints/step_{step:05d}").mkdir(parents=True)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_100000", "step_99990", "step_00005"]


def test_a_step_that_was_skipped_counts_after_a_resume(start):
    """Three in a row stop the run: one before the resume, and two after it."""
    overrides = ["save_every=1", "val.file=", "reward.name=tests/hopeless.py:never_right", "filter_groups.max_num_gen_batches=1",
                 "filter_groups.max_skipped_steps=2"]
    run_dir = start(*overrides, "total_training_steps=1")
    with pytest.raises(SystemExit, match="3 steps in a row were skipped"):
        start(*overrides, "total_training_steps=9")
    assert [row["step"] for row in metrics(run_dir)] == [1, 2]


def test_what_a_process_dies_in_the_middle_of_is_not_picked_up(start, saved):
    half = saved / "checkpoints/.step_00009.partial"
    half.mkdir()
    (half / "progress.json").write_text((saved / "checkpoints/step_00002/progress.json").read_text())
    start("save_every=1", "val.file=", "total_training_steps=3")
    assert [row["step"] for row in metrics(saved)] == [1, 2, 3] and not half.exists()


def test_signal_handlers_are_put_back(start):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    start("total_training_steps=1", "val.file=")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
