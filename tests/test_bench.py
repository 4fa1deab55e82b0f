"""Every script in bench/ runs, at its smallest size; its figures and goals are not looked at."""

import json
import subprocess
import sys
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
                     "val.max_prompts=4"], '"accuracies": {"5":'),
    "embedded": ([*TINY, "--here", "--seeds", "0"], "goals: before at most"),
    "equality": ([str(ROOT), str(ROOT), "--steps", "1", *TINY[:3], "val.file="],
                 "the same to the bit"),
    "estimate": (["--shape", "tiny", "--cases", "fp16, checkpointed", "bf16, one micro-batch"],
                 "(goal 0.85 to 1.15)"),
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
    "rollout_vs_generate": (["--models", "toy/base", "random", "hybrid", "mamba", "--rounds", "1",
                             "--n", "2", "--prompts", "2", "--max-tokens", "8",
                             "--random-prompts", "2", "--random-max-tokens", "8"], "(goal 1.5)"),
    "scaling": (["actor.ppo_mini_batch_size=32", "--rounds", "1", "--sizes", "64", "128"],
                "(goal 1.05)"),
    "update_gpu": (["--shape", "tiny", "--rounds", "1", "--tokens", "32"], "rows as they are |"),
    "update_vs_bare": (["--rounds", "1", "--models", "toy/base", "data.train_batch_size=8",
                        "rollout.n=4", "actor.ppo_mini_batch_size=16"], "(goal 0.85)"),
    "vllm_gpu": (["--shape", "tiny", "--backend", "transformers", "--tokens", "8"],
                 "| tiny | transformers |"),
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
    forks = {path.stem for path in (ROOT / "forks").glob("*.patch")} - {"one_step_ahead"}
    assert sorted(rows("--forks")) == ["DAPO", *sorted(forks)]


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
