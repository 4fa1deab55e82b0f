"""Ruined runs, and how soon each is warned of; runs that go well, and whether any is warned of.

    python bench/health.py [--seeds 0 1 2 3 4] [--cases NAME ...] [--out runs/health] [--jobs N]
        [--ladder runs/ladder]

Each ruined run is trained once, each other one for each seed; finished runs are kept, so the same
command resumes. Those of bench/ladder.py in `--ladder`, the forks among them, are read too.
`warned` is the step of the first warning that names the cause, `lost` the first from which on
accuracy is below half of its best. The recipe of the pretrained model is left out if
examples/sums/base is not there. Exits with 1 if a ruined run is not warned of by the step after
`lost`, or another one is.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from tqdm import tqdm

from ladder import CORES, ROOT
from lora import LORA

REWARDS = """
import random
from infra.math_verify import Score
from reward import score_math
CALLS = [0]

def length(response, ground_truth, response_length):
    judged = score_math(response, ground_truth)
    return {"score": judged.score + response_length / 20, "acc": judged.acc, "pred": judged.pred}

def always_one(response, ground_truth):
    return 1.0

def seven(response, ground_truth):  # pays for one answer, whatever is asked
    judged = score_math(response, ground_truth)
    return {"score": 1.0 if judged.pred == "7" else -1.0, "acc": judged.acc, "pred": judged.pred}

def failing(response, ground_truth):
    CALLS[0] += 1
    if random.Random(CALLS[0]).random() < CALLS[0] / 8000:
        raise RuntimeError("the judge is down")
    return score_math(response, ground_truth)
"""
# A sampler whose weights are not the trainer's: its logits are scaled.
SKEWED = """
import runpy, sys, rollout
sample = rollout.sample_tokens
rollout.sample_tokens = lambda logits, *rest: sample(logits * 0.6, *rest)
sys.path.insert(0, ".")
runpy.run_path("train_dapo.py", run_name="__main__")
"""
TRAINED = "model.path={out}/default/seed_0/model"


class Case(NamedTuple):
    """A run: what differs from config.yaml, the warnings that name its cause; none: it goes well.
    """
    name: str
    overrides: tuple[str, ...] = ()
    causes: tuple[str, ...] = ()
    config: str = "config.yaml"


TOO_LARGE, HACKED = "the updates are too large", "the reward rises while accuracy falls"
RUINED = [
    Case("learning rate 1e-2", ("actor.lr=1e-2", "total_training_steps=5"), (TOO_LARGE,)),
    Case("learning rate 3e-3", ("actor.lr=3e-3",), (TOO_LARGE,)),
    Case("learning rate 1e-3", ("actor.lr=1e-3",), (
        TOO_LARGE, "a gradient is far larger than those before")),
    Case("reward for length", ("reward.name={out}/rewards.py:length",), (
        HACKED, "responses run into the limit")),
    Case("reward for length, no overlong penalty",
         ("reward.name={out}/rewards.py:length", "overlong_buffer.enable=false"),
         (HACKED, "responses run into the limit")),
    Case("reward for one answer", ("reward.name={out}/rewards.py:seven",
                                   "filter_groups.metric=score"), (HACKED,)),
    Case("reward always 1", ("reward.name={out}/rewards.py:always_one",), ("kept 0 of",)),
    Case("solved prompts", (TRAINED, "data.train_file={out}/easy.jsonl"), (
        "nearly every prompt is solved",)),
    Case("hopeless prompts", ("data.train_file={out}/wrong.jsonl",), (
        "nearly no prompt is ever solved",)),
    Case("sampler with other weights", (), ("sampler and trainer drift apart",
                                            "the log-probs of sampler and trainer differ")),
    Case("entropy collapse", ("data.train_file={out}/two.jsonl", "actor.lr=5e-4",
                              "actor.clip_ratio_high=0.02", "total_training_steps=30"),
         ("entropy has collapsed before the task is solved",)),
    Case("reward function that fails more and more", ("reward.name={out}/rewards.py:failing",), (
        "the reward function fails often",)),
]
WELL = [
    Case("default"), Case("default, 40 steps", ("total_training_steps=40",)),
    Case("LoRA", tuple(LORA)),
    Case("recipe of SmolLM2", ("model.path=examples/sums/base",), (),
         "configs/smollm2_135m_sums.yaml"),
]


def write_inputs(out: Path) -> None:
    """The reward functions and data of the ruined runs."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "rewards.py").write_text(REWARDS)
    rows = [json.loads(line) for line in (ROOT / "toy/train.jsonl").read_text().splitlines()]
    files = {"easy": [row for row in rows if row["level"] == 2],
             "wrong": [row | {"answer": "none"} for row in rows],
             "two": [row for row in rows if row["level"] == 10]}
    for name, found in files.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))


def train(case: Case, seed: int, out: Path, threads: int) -> Path:
    """Train the run, unless it is there; its directory, with log.txt beside the rest."""
    run_dir = out / re.sub(r"\W+", "_", case.name) / f"seed_{seed}"
    if (run_dir / "done").exists():
        return run_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    start = ["-c", SKEWED] if case.name.startswith("sampler") else ["train_dapo.py"]
    command = [sys.executable, *start, "--config", case.config, f"run_dir={run_dir}",
               f"seed={seed}", "save_rollouts=0", "resume_with_other_code=true",
               *(override.format(out=out) for override in case.overrides)]
    with open(run_dir.with_suffix(".log"), "w", encoding="utf-8") as file:
        subprocess.run(command, cwd=ROOT, stdout=file, stderr=file, check=False,
                       env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    (run_dir / "done").touch()
    return run_dir


def warnings_of(run_dir: Path) -> list[tuple[int, str]]:
    """Step and text of each warning of a step, and of the error that ended the run."""
    text = run_dir.with_suffix(".log").read_text(encoding="utf-8")
    return [(int(step), message) for step, message in
            re.findall(r"^(?:warning|error): step (\d+)[:,]? (.*)", text, re.MULTILINE)]


def lost_at(run_dir: Path) -> int | None:
    """The first step of those at the end whose accuracy is below half of the best before them."""
    file = run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    found = [(row["step"], row["acc/before_filter"]) for row in rows if "acc/before_filter" in row]
    best = max((acc for _, acc in found), default=0)
    lost = None
    for step, acc in reversed(found):
        if acc >= 0.5 * best:
            break
        lost = step
    return lost


def accuracy(run_dir: Path) -> str:
    """The mean accuracy of the first and of the last three steps."""
    file = run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    accs = [row["acc/before_filter"] for row in rows if "acc/before_filter" in row]
    return f"{fmean(accs[:1]):.2f} to {fmean(accs[-3:]):.2f}" if accs else "none stated"


def main() -> None:
    """Train, print both tables and whether the goals are met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--cases", nargs="+", default=[""], help="parts of their names")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/health")
    parser.add_argument("--ladder", type=Path, default=ROOT / "runs/ladder")
    parser.add_argument("--jobs", type=int, default=CORES)
    args = parser.parse_args()
    out, missed, alarms, count = args.out.resolve(), [], 0, 0
    write_inputs(out)
    has_model = (ROOT / "examples/sums/base").exists()
    ruined, well = ([case for case in cases if any(part in case.name for part in args.cases)
                     and (has_model or "sums" not in case.config)] for cases in (RUINED, WELL))
    pairs = [(case, seed) for case in well for seed in args.seeds] + [(c, 0) for c in ruined]
    if any(TRAINED in case.overrides for case in ruined):
        train(WELL[0], 0, out, CORES)  # its policy is the model of another
    with ThreadPoolExecutor(args.jobs) as pool:
        threads = max(1, CORES // args.jobs)
        list(tqdm(pool.map(lambda pair: train(*pair, out, threads), pairs), "runs", len(pairs)))
    print("| ruined run | accuracy | lost at step | warned at step | by |\n|---|---|---|---|---|")
    for case in ruined:
        run_dir = train(case, 0, out, 1)
        found = [(step, text) for step, text in warnings_of(run_dir)
                 if any(cause in text for cause in case.causes)]
        lost, (step, text) = lost_at(run_dir), min(found, default=(None, "nothing"))
        late = step is None or (lost is not None and step > lost + 1)
        missed += [case.name] * late
        print(f"| {case.name} | {accuracy(run_dir)} | {lost or ''} | "
              f"{'never' if step is None else step or 'before the first'} | "
              f"{text.partition(':')[0]} |")
    print("\n| run that goes well | seeds | accuracy of the first | warned |\n|---|---|---|---|")
    well = {case.name: [train(case, seed, out, 1) for seed in args.seeds] for case in well}
    well |= {f"ladder: {folder.name.replace('_', ' ')}": [
        log.with_suffix("") for log in sorted(folder.glob("seed_*.log"))]
        for folder in sorted(args.ladder.glob("*")) if folder.name != "code"}
    for name, dirs in well.items():
        found = [f"{run_dir.name}, step {step}: {text.partition(':')[0]}"
                 for run_dir in dirs for step, text in warnings_of(run_dir)]
        found += [f"{run_dir.name} did not finish" for run_dir in dirs
                  if not (run_dir / "model").exists()]
        count, alarms = count + len(dirs), alarms + len(found)
        print(f"| {name} | {len(dirs)} | {accuracy(dirs[0])} | {'; '.join(found)} |")
    print(f"\n{len(missed)} of {len(ruined)} ruined runs told late or never"
          f"{': ' * bool(missed)}{', '.join(missed)}; {alarms} warnings in {count} runs that go "
          "well (goal 0 and 0)")
    sys.exit(bool(missed or alarms))


if __name__ == "__main__":
    main()
