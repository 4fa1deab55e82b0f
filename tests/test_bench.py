"""Every script in bench/ runs, at its smallest size; its figures and goals are not looked at."""

import json
import math
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BENCH = ROOT / "bench"
sys.path.insert(0, str(BENCH))
import equality  # noqa: E402
import ladder  # noqa: E402
import run_all  # noqa: E402

TINY = ["data.train_batch_size=4", "rollout.n=4", "actor.ppo_mini_batch_size=8",
        "total_training_steps=1", "val.max_prompts=4"]
SCRIPTS = {  # its smallest size, and what it prints at the end
    "backends": (["--ways", "transformers", "--steps", "1"], "| transformers |"),
    "compare_trl": (["--one", "ours", "--part", "accuracy", "--max-steps", "5", *TINY[:3],
                     "val.max_prompts=4"], '"accuracies": {"1":'),
    "embedded": ([*TINY, "--here", "--seeds", "0"], "goals: before at most"),
    "endurance": (["--steps", "120", "--window", "40"], "(goal at most 5%)"),
    "equality": ([str(ROOT), str(ROOT), "--steps", "1", *TINY[:3], "val.file="],
                 "the same to the bit"),
    "estimate": (["--shape", "tiny", "--cases", "fp16, checkpointed", "bf16, one micro-batch"],
                 "(goal 0.7 to 1.3)"),
    "faults": (["--faults", "1", "--kinds", "one"], "to other results (goal: 1 and 0)"),
    "health": (["--cases", "hopeless", "--out", "runs", "--ladder", "none"], "(goal 0 and 0)"),
    "kill_resume": (["--kills", "1", *TINY, "val.file="], "differences (goal: 1 and 0)"),
    "ladder": (["--seeds", "0", "--out", "runs", "--picture", "ladder.png", *TINY],
               "(goal above 0)"),
    "logprob_memory": (["--tokens", "64", "--vocabulary", "512", "--rounds", "1"], "(goal 1.3)"),
    "lora": ([*TINY, "--seeds", "0"], "goals: LoRA's accuracy"),
    "memory": ([], "goal: ratios within"),
    "mismatch": (["--model", "tiny", "--backend", "transformers", "--prompts", "2", "--n", "2",
                  "--tokens", "8"], "| tiny | transformers | float32 |"),
    "one_step_ahead": (["--seeds", "0", "--rate", "10000", *TINY, "total_training_steps=2"],
                       "(goal 0.6)"),
    "recipe": (["--config", "config.yaml", "--seeds", "0", "--accuracy", "0.1", *TINY],
               "slowest seed: "),
    "rollout_vs_generate": (["--models", "toy/base", "random", "hybrid", "mamba", "--rounds", "1",
                             "--n", "2", "--prompts", "2", "--max-tokens", "8",
                             "--random-prompts", "2", "--random-max-tokens", "8"], "(goal 1.5)"),
    "scaling": (["actor.ppo_mini_batch_size=32", "--rounds", "1", "--sizes", "64", "128"],
                "(goal 1.05)"),
    "shared_prompts": (["--rounds", "1", "--layers", "1"], "(goal 0.8)"),
    "startup": (["--rounds", "1", "val.max_prompts=4"], "to the first response"),
    "update_gpu": (["--shape", "tiny", "--rounds", "1", "--tokens", "32"],
                   "update of tiny by blocks: "),
    "update_vs_bare": (["data.train_batch_size=8", "rollout.n=4", "actor.ppo_mini_batch_size=16",
                        "--rounds", "1", "--models", "toy/base"], "(goal 1.1)"),
    "vllm_gpu": (["--shape", "tiny", "--backend", "transformers", "--tokens", "8"],
                 "| tiny | transformers |"),
    "vllm_speed": (["step", "--model", "tiny", "--tokens", "8", "--rounds", "1",
                    "rollout.backend=transformers", *TINY[:3]], "(goal 0.03)"),
    "waste": (["--steps", "2", "--real-steps", "1"], "(goal 1.2)"),
}


def test_every_script_is_tried():
    others = {"run_all", "harness"}  # tested below; imported by the others
    assert {path.stem for path in BENCH.glob("*.py")} == SCRIPTS.keys() | others
    subprocess.run(["bash", "-n", str(BENCH / "gpu.sh")], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_script_runs_at_its_smallest_size(name, tmp_path):
    arguments, printed = SCRIPTS[name]
    result = subprocess.run([sys.executable, str(BENCH / f"{name}.py"), *arguments], cwd=tmp_path,
                            capture_output=True, text=True, timeout=300, check=False)
    assert printed in result.stdout[-1000:], result.stdout[-1000:] + result.stderr[-3000:]
    assert result.returncode in (0, 1) and "Traceback" not in result.stderr, result.stderr[-3000:]


# ---- gpu.sh: stand-ins for the tools and for the runs, since it wants a GPU ----------------------

@pytest.fixture
def gpu_sh(tmp_path):
    """`gpu_sh(losses, *parts)`: the script's exit code and summary, where each training run has
    these losses (None: it crashes), and each benchmark passes unless `bench_fails`; there is a GPU
    unless `gpu` is False, and TRL and vLLM unless `more` is False."""
    def run(losses, *parts, gpu=True, more=True, bench_fails=False, seconds="60"):
        tools = tmp_path / "tools"
        tools.mkdir()
        rows = [{}, *({"actor/loss": loss} for loss in losses or ())]
        (tmp_path / "rows").write_text("\n".join(map(json.dumps, rows)))
        train = f'for a; do case $a in run_dir=*) d=${{a#*=}}; mkdir -p "$d"; cp {tmp_path}/rows' \
                ' "$d/metrics.jsonl";; esac; done'
        scripts = {"accelerate": "exit 1" if losses is None else train, "python3": f"""case "$1$2" in
            bench/*) echo "$1"; exit {int(bench_fails)};;
            *torch*) echo torch;;
            *find_spec*) exit {int(not more)};;
            *) exec {sys.executable} "$@";; esac"""}
        if gpu:
            scripts["nvidia-smi"] = "echo A GPU, 80 GB"
        for name, text in scripts.items():
            (tools / name).write_text(f"#!/bin/sh\n{text}\n")
            (tools / name).chmod(0o755)
        environment = {"PATH": f"{tools}:/usr/bin:/bin", "PART_SECONDS": seconds,
                       "TRL_PYTHON": "python" * more}
        result = subprocess.run(["bash", str(BENCH / "gpu.sh"), str(tmp_path / "out"), *parts],
                                env=environment, capture_output=True, text=True, check=False)
        assert "command not found" not in result.stderr, result.stderr
        return result.returncode, (tmp_path / "out/summary.txt").read_text()
    return run


def test_gpu_sh_reaches_its_goal_if_every_run_has_three_losses_as_in_one_process(gpu_sh, tmp_path):
    code, summary = gpu_sh([0.5, 0.25, 0.125])
    assert code == 0 and "one process's: reached" in summary and "skipped" not in summary
    # what tells most comes first, and each part has its log
    order = [summary.index(name) for name in
             ("plain", "goal:", "update_gpu", "vllm_step", "compare_trl_1.5B", "mismatch_0.5B",
              "estimate_1.5B", "scaling")]
    assert order == sorted(order)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "summary.txt", "losses.log", "update.log", "vllm.log", "trl.log", "mismatch.log",
        "memory.log", "other.log"}


@pytest.mark.parametrize("losses", [None, [], [0.5, 0.25], [0.5, math.nan, 0.25]])
def test_gpu_sh_misses_its_goal_if_runs_crash_or_have_too_few_losses(losses, gpu_sh):
    code, summary = gpu_sh(losses, "losses")
    assert code == 1 and "one process's: missed" in summary and "reached" not in summary
    found = sum(map(math.isfinite, losses or []))
    assert f"fsdp2_fp16: {found} finite losses, 3 are needed" in summary


def test_gpu_sh_names_what_it_skips(gpu_sh):
    code, summary = gpu_sh([0.5, 0.25, 0.125], more=False)
    assert code == 0 and "skipped vllm: vLLM is not installed" in summary
    assert "skipped trl: " in summary and "skipped mismatch with vLLM: " in summary
    assert "mismatch_1.5B: exit 0" in summary and "vllm_step" not in summary


def test_gpu_sh_says_that_there_is_no_gpu_and_fails(gpu_sh):
    code, summary = gpu_sh([0.5, 0.25, 0.125], gpu=False)
    assert code == 1 and "skipped everything: " in summary and "plain" not in summary


def test_gpu_sh_fails_if_a_benchmark_misses_its_goal(gpu_sh):
    code, summary = gpu_sh([0.5, 0.25, 0.125], "update", bench_fails=True)
    assert code == 1 and "update_gpu: exit 1" in summary and "goal:" not in summary


def test_gpu_sh_ends_a_part_in_its_time(gpu_sh):
    code, summary = gpu_sh([0.5, 0.25, 0.125], "losses", "update", seconds="0")
    assert code == 1 and "plain: not run, part losses has used its time" in summary
    assert "update_gpu: not run" in summary


# ---- equality ------------------------------------------------------------------------------------

@pytest.fixture
def runs(tmp_path):
    """Two runs' directories that are the same."""
    for name in ("old", "new"):
        run_dir = tmp_path / name
        (run_dir / "rollouts").mkdir(parents=True)
        (run_dir / "model").mkdir()
        (run_dir / "model/model.safetensors").write_text("w")
        response = dict.fromkeys(equality.RESPONSE, 1)
        (run_dir / "rollouts/step_00001.jsonl").write_text(json.dumps(response) + "\n")
        kl = "actor/kl" if name == "old" else "actor/approx_kl"
        (run_dir / "metrics.jsonl").write_text(
            json.dumps({"step": 1, kl: 0.5, "time/step": len(name), f"only/{name}": 1}) + "\n")
    return tmp_path / "old", tmp_path / "new"


def test_equality_knows_renamed_metrics_and_lists_those_of_one_side(runs):
    assert equality.compare(*runs) == ([], ["only/new", "only/old"])


@pytest.mark.parametrize(("file", "before", "after", "found"), [
    ("rollouts/step_00001.jsonl", '"advantage": 1', '"advantage": 1.0000001',
     "rollouts/step_00001.jsonl: advantage of 1 responses"),
    ("rollouts/step_00001.jsonl", "\n", "\n{}\n", "rollouts/step_00001.jsonl: 1 and 2 responses"),
    ("metrics.jsonl", "0.5", "0.6", "step 1: actor/approx_kl 0.5 and 0.6"),
    ("model/model.safetensors", "w", "v", "model/model.safetensors")])
def test_equality_sees_every_difference(runs, file, before, after, found):
    file = runs[1] / file
    file.write_text(file.read_text().replace(before, after))
    assert equality.compare(*runs)[0] == [found]


# ---- ladder --------------------------------------------------------------------------------------

def test_intervals_by_hand():
    # mean 2, standard deviation 1, t of 2 degrees of freedom 4.303, by sqrt(3)
    assert ladder.interval([1, 2, 3]) == pytest.approx((2, 4.303 / 3**0.5))
    mean, half = ladder.interval([0.5])
    assert mean == 0.5 and half != half


def test_the_ladder_ends_with_dapo_and_each_row_without_a_part_lacks_that_one():
    def rows(*arguments: str) -> dict[str, tuple[str, ...]]:
        args = ladder.parse(["actor.clip_ratio_low=0.1", *arguments])
        return {row.name: row.overrides for row in ladder.make_rows(args)}
    off = {"actor.clip_ratio_high=0.1", "overlong_buffer.enable=false",
           "actor.loss_agg_mode=seq-mean-token-mean", "filter_groups.enable=false"}
    steps = [set(overrides) for overrides in rows().values()]
    filtering = {"algorithm.overlong_filtering=true"}
    assert steps[:2] == [off, off | filtering] and steps[-1] == set()
    assert [before - after for before, after in pairwise(steps[1:])] == [
        {"actor.clip_ratio_high=0.1"}, {"overlong_buffer.enable=false", *filtering},
        {"actor.loss_agg_mode=seq-mean-token-mean"}, {"filter_groups.enable=false"}]
    without = rows("--without")
    assert without.pop("DAPO") == () and set(without.values()) == {(key,) for key in off}
    forks = [path.stem for path in (ROOT / "forks").glob("*.patch")]
    assert set(rows("--forks")) == {"DAPO", *forks} - ladder.NOT_HERE
    assert set(rows("--forks", *forks)) == {"DAPO", *forks}


def test_a_ladder_without_validation_has_a_table():
    assert math.isnan(ladder.accuracy_at_the_end([{"step": 1}]))
    assert math.isnan(ladder.informative({"step": 1}))


def test_a_fork_that_does_not_apply_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "forks").mkdir()
    (tmp_path / "losses.py").write_text("x = 1\n")
    (tmp_path / "forks/own.patch").write_text(
        "--- a/losses.py\n+++ b/losses.py\n@@ -1 +1 @@\n-y\n+z\n")
    monkeypatch.setattr(ladder, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="own.patch does not apply: is it, or another edit"):
        ladder.patched_copy("own", tmp_path / "out")


def test_the_ladder_names_what_differs_from_a_run_but_not_before_it_has_begun(tmp_path):
    args = ladder.parse(["--out", str(tmp_path), "--seeds", "0"])
    row = ladder.Row("DAPO")
    assert not ladder.is_finished(row, 0, args)
    args.overrides = ["total_training_steps=3"]
    assert not ladder.is_finished(row, 0, args)
    run_dir = ladder.run_dir_of(row, 0, args)
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_text('{"step": 3}\n')
    assert not ladder.is_finished(row, 0, args)  # no model yet
    (run_dir / "model").mkdir()
    assert ladder.is_finished(row, 0, args)
    args.overrides = ["total_training_steps=4"]
    with pytest.raises(ValueError, match=r"other settings \(total_training_steps was 3\)"):
        ladder.is_finished(row, 0, args)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_ladder_stops_on_a_signal_with_its_runs_and_resumes(tmp_path, number):
    command = [sys.executable, str(BENCH / "ladder.py"), "--seeds", "0", "--out", str(tmp_path),
               *TINY[:3], "total_training_steps=4", "val.file=", "save_every=1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    started = []
    while not started and process.poll() is None:
        time.sleep(0.2)
        started = list(tmp_path.glob("*/seed_0/metrics.jsonl"))
    process.send_signal(number)
    assert "stopped; the same command resumes" in process.communicate(timeout=120)[1]
    assert process.returncode == 1 and len(list(tmp_path.glob("*/seed_0"))) <= ladder.CORES
    lines = sum(len(path.read_text().splitlines()) for path in started)
    time.sleep(2)  # nothing trains on
    assert sum(len(path.read_text().splitlines()) for path in started) == lines
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert "one seed, so no interval" in result.stdout, result.stderr


def fake_run(accuracies: list[float], kept: float = 1.0) -> list[dict]:
    """The rows of a run that generates 10 responses a step, in half of whose groups all are wrong."""
    rows = [{"step": 0, "val/val/avg@4": 0.1}]
    for step, accuracy in enumerate(accuracies, 1):
        rows.append({"step": step, "acc/before_filter": accuracy, "responses/generated": 10,
                     "groups/all_correct": 0.0, "groups/all_wrong": 0.5, "groups/kept": kept,
                     "actor/entropy": 0.3 - step / 10, "response_length/mean": 7.0,
                     "response_length/truncated": 0.0})
    return [*rows[:-1], {**rows[-1], "val/val/avg@4": 0.9}]


def test_differences_are_paired_by_seed_and_curves_count_responses():
    grpo, dapo = ladder.Row("naive GRPO"), ladder.Row("DAPO")
    runs = {grpo: [fake_run([0.2, 0.4]), fake_run([0.2, 0.8])],
            dapo: [fake_run([0.3, 0.5]), fake_run([0.3, 0.9], kept=0.5)]}
    lines = ladder.tables([grpo, dapo], runs, to_first=False)
    # accuracy: 0.3 and 0.5, 12.706 * 0.1 (their distance by 2); each seed gained 0.1; entropy: 0.1
    # in the last quarter of two steps; half of what is trained is informative, or all of it
    assert lines[2] == ("| naive GRPO | 0.400 ± 1.271 | 0.900 ± 0.000 | 0.100 ± 0.000 | 7.0 ± 0.0 "
                        "| 0.000 ± 0.000 | 0.50 ± 0.00 | 20 ± 0 |")
    assert lines[5].startswith("| minus the row before | accuracy, all steps |")
    assert lines[7] == ("| DAPO | +0.100 ± 0.000 | +0.000 ± 0.000 | +0.000 ± 0.000 | +0.0 ± 0.0 "
                        "| +0.000 ± 0.000 | +0.25 ± 3.18 | +0 ± 0 |")
    x, y = ladder.curve(runs[grpo], lambda row: row.get("acc/before_filter"), over_responses=True)
    assert x == [10, 20] and [mean for mean, _ in y] == pytest.approx([0.2, 0.6])


@pytest.mark.slow
def test_the_ladder_trains_forks_keeps_what_is_finished_and_refuses_other_settings(tmp_path):
    def run(*more: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, str(BENCH / "ladder.py"), "--seeds", "0", "--out",
                               str(tmp_path / "out"), "--forks", "gspo", *TINY, *more],
                              capture_output=True, text=True, timeout=300, check=False)
    first = run()
    assert first.returncode == 0 and "| gspo |" in first.stdout, first.stderr[-3000:]
    config = (tmp_path / "out/gspo/seed_0/config.yaml").read_text()
    assert "loss_agg_mode: seq-mean-token-mean" in config  # the patch's own config.yaml
    before = (tmp_path / "out/gspo/seed_0/metrics.jsonl").stat().st_mtime_ns
    assert run().stdout == first.stdout
    assert (tmp_path / "out/gspo/seed_0/metrics.jsonl").stat().st_mtime_ns == before
    assert "was run with other settings" in run("actor.lr=0.01").stderr


# ---- run_all -------------------------------------------------------------------------------------

@pytest.fixture
def page(tmp_path, monkeypatch):
    """A page of results with one command, which prints a table and whether its goal was reached."""
    script, page = tmp_path / "measure.py", tmp_path / "RESULTS.md"
    script.write_text("import sys\nprint('warning\\n| a |\\n|---|\\n| 2 |\\n\\nratio 2 (goal 1)')\n"
                      "sys.exit(1)\n")
    page.write_text(f"# Before\n\n```bash\npython {script}\n```\n\n<!-- printed -->\nold\n"
                    "<!-- end -->\n\nAfter.\n")
    monkeypatch.setattr(run_all, "PAGE", page)
    return page


def test_run_all_puts_what_is_printed_below_its_command(page, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run_all.py"])
    with pytest.raises(SystemExit) as error:
        run_all.main()
    text = page.read_text()
    assert error.value.code == 1 and "old" not in text and "warning" not in text
    assert "<!-- printed -->\n| a |\n|---|\n| 2 |\n\nratio 2 (goal 1): **missed**." in text
    assert text.startswith("# Before\n") and text.endswith("<!-- end -->\n\nAfter.\n")


def test_run_all_leaves_the_section_of_a_command_that_fails(page, monkeypatch, capsys):
    before = page.read_text()
    (page.parent / "measure.py").write_text("raise RuntimeError('no')")
    monkeypatch.setattr(sys, "argv", ["run_all.py"])
    with pytest.raises(SystemExit):
        run_all.main()
    assert page.read_text() == before and "FAILED" in capsys.readouterr().out


def test_every_command_of_the_results_is_a_script(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run_all.py", "--list"])
    with pytest.raises(SystemExit) as error:
        run_all.main()
    commands = error.value.code.splitlines()
    assert len(commands) > 5
    assert all((ROOT / command.split()[1]).is_file() for command in commands)
