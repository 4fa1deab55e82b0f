"""The paper's ladder from naive GRPO to DAPO, DAPO without each of its parts, and the forks.

    python bench/ladder.py [--without | --forks [NAME ...]] [--config configs/ladder.yaml]
        [--seeds 0 1 2] [--out runs/ladder] [--picture ladder.png] [--jobs N] [key.sub=value ...]

Every row is trained once for each seed, `--jobs` runs at a time (default: one per core), with what
the config and the overrides say; a row turns techniques off, or applies a patch of forks/ to a copy
of the code. DAPO is the config and the working tree as they are. After Ctrl-C the same command
resumes: finished runs are kept, and tables share DAPO's. Runs of other settings or of other code in
the same --out are refused.

Prints two tables in Markdown: each row's means over the seeds, and its differences, paired by seed,
to the row before in the ladder and to DAPO in the other tables. Intervals are Student's, of 95%.
Exits with 1 if that of the accuracy (of all steps) of DAPO minus naive GRPO reaches 0.
"""

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
CORES = os.cpu_count() or 1
sys.path.insert(0, str(ROOT))
from infra.config import flatten, load_config, one_line_errors  # noqa: E402
from infra.rollout_files import read_metrics  # noqa: E402

OFF = {  # what turns each technique off; {low} is actor.clip_ratio_low
    "clip-higher": "actor.clip_ratio_high={low}",
    "soft overlong punishment": "overlong_buffer.enable=false",
    "token-level loss": "actor.loss_agg_mode=seq-mean-token-mean",
    "dynamic sampling": "filter_groups.enable=false"}
FILTERING = "algorithm.overlong_filtering=true"
NOT_HERE = {  # forks that are measured only if they are named
    "band_pass",  # once most prompts are solved, a step takes ten generation batches
    "geometric_mask", "icepop",  # change nothing if sampler and trainer do not differ
    "curriculum",  # changes nothing before the second epoch
    "one_step_ahead",  # needs servers
    "router_aux_loss"}  # needs a mixture of experts
CODE = ("*.py", "*.yaml", "*.md", "infra/*.*", "configs/*", "toy/*.py", "tests/*.py", "bench/*.py")
RUNNING: set[subprocess.Popen] = set()  # trainings in progress
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # of 1 to 9 degrees


class Row(NamedTuple):
    """A row of a table: what is trained for each seed. `fork` names a patch of forks/."""
    name: str
    overrides: tuple[str, ...] = ()
    fork: str = ""

    @property
    def folder(self) -> str:
        return re.sub(r"\W+", "_", self.name.split("=")[-1]).strip("_").lower()


def make_rows(args: argparse.Namespace) -> list[Row]:
    """The rows of the table that the command line asks for; DAPO is the last of the ladder, and
    the first of the others."""
    low = load_config(args.config, args.overrides).actor.clip_ratio_low
    off = {name: override.format(low=low) for name, override in OFF.items()}
    if args.forks is not None:
        known = sorted(path.stem for path in ROOT.glob("forks/*.patch"))
        names = args.forks or sorted(set(known) - NOT_HERE)
        if unknown := set(names) - set(known):
            raise ValueError(f"--forks {' '.join(sorted(unknown))}: none of {', '.join(known)}")
        return [Row("DAPO"), *(Row(name, fork=name) for name in names)]
    if args.without:
        return [Row("DAPO"), *(Row(f"without {name}", (off[name],)) for name in off)]
    clip, soft, token, dynamic = off.values()
    return [Row("naive GRPO", (clip, soft, token, dynamic)),
            Row("+ overlong filtering", (clip, soft, token, dynamic, FILTERING)),
            Row("+ clip-higher", (soft, token, dynamic, FILTERING)),
            Row("+ soft overlong punishment (no filtering)", (token, dynamic)),
            Row("+ token-level loss", (dynamic,)),
            Row("+ dynamic sampling = DAPO")]


# ---- the runs ------------------------------------------------------------------------------------

def patched_copy(fork: str, out: Path) -> Path:
    """A copy of the repository's code with a patch of forks/ applied. Raises ValueError if it does
    not apply."""
    copy, patch = out / "code" / fork, ROOT / f"forks/{fork}.patch"
    shutil.rmtree(copy, ignore_errors=True)
    for path in chain(*map(ROOT.glob, CODE)):
        target = copy / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    result = subprocess.run(["git", "apply", str(patch)], cwd=copy, capture_output=True,
                            env=os.environ | {"GIT_CEILING_DIRECTORIES": str(copy.parent)},
                            text=True, check=False)
    if result.returncode:
        raise ValueError(f"{patch} does not apply: is it, or another edit of the same lines, "
                         f"in the working tree (git status)? {result.stderr.strip()[:300]}")
    return copy


def run_dir_of(row: Row, seed: int, args: argparse.Namespace) -> Path:
    return args.out / row.folder / f"seed_{seed}"


def hash_code() -> str:
    """A hash of all code that a run executes, patches apart."""
    paths = [*ROOT.glob("*.py"), *ROOT.glob("infra/*.py")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(paths))).hexdigest()


def is_finished(row: Row, seed: int, args: argparse.Namespace) -> bool:
    """Whether a run is there, to its last step; records its settings if it has not begun.
    Raises ValueError if it is one with other settings, or of other code."""
    config = load_config(args.config, [*args.overrides, *row.overrides, f"seed={seed}"])
    patch = (ROOT / f"forks/{row.fork}.patch").read_text() if row.fork else ""
    settings = {**flatten(config), "the patch": patch, "the code": hash_code()}
    run_dir = run_dir_of(row, seed, args)
    record = run_dir.with_suffix(".settings")
    if not (run_dir / "metrics.jsonl").exists():
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(settings))
        return False
    before = json.loads(record.read_text())
    changed = [key if key.startswith("the ") else f"{key} was {before.get(key)}"
               for key in settings if settings[key] != before.get(key)]
    if changed:
        raise ValueError(f"{run_dir} was run with other settings ({', '.join(changed)}): name "
                         "another --out")
    return ((run_dir / "model").exists()
            and read_metrics(run_dir)[-1]["step"] == config.total_training_steps)


def train(row: Row, seed: int, code: Path, args: argparse.Namespace) -> None:
    """Train a run, or resume it. Raises OSError with the end of its log if it does not finish."""
    run_dir = run_dir_of(row, seed, args)
    config = args.config.resolve()
    if config.is_relative_to(ROOT):  # the copy's own: a patch may change config.yaml
        config = code / config.relative_to(ROOT)
    command = [sys.executable, str(code / "train_dapo.py"), "--config", str(config),
               *args.overrides, *row.overrides, f"seed={seed}", f"run_dir={run_dir}"]
    threads = str(max(1, CORES // args.jobs))
    with open(run_dir.with_suffix(".log"), "a+", encoding="utf-8") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log,
                                   start_new_session=True,  # signals reach the ladder alone
                                   env=os.environ | {"OMP_NUM_THREADS": threads})
        RUNNING.add(process)
        status = process.wait()
        RUNNING.remove(process)
        if status or not is_finished(row, seed, args):
            log.seek(0)
            raise OSError(f"{row.name}, seed {seed}: {log.read().strip()[-500:]}")


def train_all(rows: list[Row], args: argparse.Namespace) -> None:
    """Train what is not finished yet. Raises ValueError or OSError; SystemExit on Ctrl-C or
    SIGTERM, once the runs in progress have saved."""
    missing = [(row, seed) for seed in args.seeds for row in rows
               if not is_finished(row, seed, args)]
    code = {row: patched_copy(row.fork, args.out) if row.fork else ROOT
            for row in dict.fromkeys(row for row, _ in missing)}
    if missing:
        print(f"logs: {args.out}/*/seed_*.log", file=sys.stderr)
    total, errors = len(rows) * len(args.seeds), []
    pool = ThreadPoolExecutor(args.jobs)
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background job ignores the first
        signal.signal(number, signal.default_int_handler)
    with tqdm(total=total, initial=total - len(missing), desc="runs") as bar:
        futures = [pool.submit(train, row, seed, code[row], args) for row, seed in missing]
        try:
            for future in as_completed(futures):
                if future.exception():
                    errors.append(str(future.exception()))
                    tqdm.write(f"failed: {errors[-1]}", file=sys.stderr)
                bar.update()
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            tqdm.write("the runs in progress finish their step and save", file=sys.stderr)
            for process in list(RUNNING):
                process.send_signal(signal.SIGTERM)
            pool.shutdown()
            raise SystemExit("stopped; the same command resumes") from None
    if errors:
        raise OSError(f"{len(errors)} runs failed, the last: {errors[-1]}")


# ---- the table -----------------------------------------------------------------------------------

def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean and half of its 95% interval, by Student's t; NaN of one value. With more than ten
    values it is a little too wide."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return float(values.mean()), float("nan")
    t = T_975[min(len(values), 10) - 2]
    return float(values.mean()), float(t * values.std(ddof=1) / len(values)**0.5)


def over_steps(value: Callable[[dict], float], last_share: float = 1.0) -> Callable:
    """The mean of a step's value over a run's steps (those that trained), or the last of them."""
    def mean(run: list[dict]) -> float:
        values = [value(row) for row in run if "actor/entropy" in row] or [math.nan]
        return float(np.mean(values[-math.ceil(last_share * len(values)):]))
    return mean


def informative(row: dict) -> float:
    """The share of a step's groups that are neither all correct nor all wrong."""
    return 1 - row.get("groups/all_correct", math.nan) - row.get("groups/all_wrong", math.nan)


def accuracy_at_the_end(run: list[dict]) -> float:
    return next((row[name] for row in reversed(run) for name in row
                 if re.fullmatch(r"val/.*/avg@\d+", name)), math.nan)


MEASURES = {  # of a run: what the columns hold, and digits
    "accuracy, all steps": (over_steps(lambda row: row.get("acc/before_filter", math.nan)), 3),
    "validation, end": (accuracy_at_the_end, 3),
    "entropy, last quarter": (over_steps(itemgetter("actor/entropy"), 0.25), 3),
    "length": (over_steps(itemgetter("response_length/mean")), 1),
    "truncated": (over_steps(itemgetter("response_length/truncated")), 3),
    # without the filter all groups are kept and trained
    "informative of trained": (over_steps(lambda row: informative(row) / row["groups/kept"]), 2),
    "responses generated": (lambda run: sum(row.get("responses/generated", 0) for row in run), 0)}


def tables(rows: list[Row], runs: dict[Row, list[list[dict]]], to_first: bool) -> list[str]:
    """The lines of both tables in Markdown. `runs`: each row's runs, in the order of the seeds."""
    values = {row: {name: np.array([measure(run) for run in runs[row]], dtype=float)
                    for name, (measure, _) in MEASURES.items()} for row in rows}
    head = [f" | {' | '.join(MEASURES)} |", "|---" * (len(MEASURES) + 1) + "|"]
    lines = ["|" + head[0], head[1]]
    for row in rows:
        cells = [cell(values[row][name], f".{digits}f") for name, (_, digits) in MEASURES.items()]
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    lines += ["", f"| minus {'DAPO' if to_first else 'the row before'}" + head[0], head[1]]
    for before, row in zip([rows[0]] * len(rows) if to_first else rows, rows[1:], strict=False):
        cells = [cell(values[row][name] - values[before][name], f"+.{digits}f")
                 for name, (_, digits) in MEASURES.items()]
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    return lines


def cell(values: np.ndarray, digits: str) -> str:
    mean, half = interval(values)
    return f"{mean:{digits}}" if math.isnan(half) else f"{mean:{digits}} ± {half:{digits[-3:]}}"


# ---- the picture ---------------------------------------------------------------------------------

def curve(runs: list[list[dict]], value: Callable[[dict], float | None],
          over_responses: bool) -> tuple[list[float], list[tuple[float, float]]]:
    """x, and mean and half interval of y over the runs, at the steps at which all have a value."""
    points = []  # of each run: step -> (x, y)
    for rows in runs:
        generated, of_run = 0, {}
        for row in rows:
            generated += row.get("responses/generated", 0)
            y = value(row)
            if y is not None:
                of_run[row["step"]] = (generated if over_responses else row["step"], y)
        points.append(of_run)
    steps = sorted(set(points[0]).intersection(*points[1:]))
    x = [float(np.mean([of_run[step][0] for of_run in points])) for step in steps]
    return x, [interval([of_run[step][1] for of_run in points]) for step in steps]


def draw(rows: list[Row], runs: dict[Row, list[list[dict]]], path: Path) -> None:
    """Draw mean curves of all rows with bands of 95% into the file `path`."""
    from matplotlib.figure import Figure
    panels = [("accuracy over steps", lambda row: row.get("acc/before_filter"), False),
              ("accuracy over responses generated", lambda row: row.get("acc/before_filter"), True),
              ("entropy", lambda row: row.get("actor/entropy"), False),
              ("response length (tokens)", lambda row: row.get("response_length/mean"), False),
              ("truncated (share)", lambda row: row.get("response_length/truncated"), False),
              ("informative groups (share)",
               lambda row: informative(row) if "groups/all_wrong" in row else None, False)]
    figure = Figure(figsize=(13.5, 7), layout="constrained")
    axes = figure.subplots(2, 3).flat
    for axis, (title, value, over_responses) in zip(axes, panels, strict=True):
        for i, row in enumerate(rows):
            x, y = curve(runs[row], value, over_responses)
            mean, half = np.array(y).reshape(-1, 2).T
            axis.plot(x, mean, "-" if i < 10 else "--", color=f"C{i}", label=row.name)
            axis.fill_between(x, mean - half, mean + half, color=f"C{i}", alpha=0.15, linewidth=0)
        axis.set_title(title)
        axis.grid(alpha=0.3)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    figure.savefig(path, dpi=100)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs/ladder.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    tables = parser.add_mutually_exclusive_group()
    tables.add_argument("--without", action="store_true", help="DAPO without each of its parts")
    tables.add_argument("--forks", nargs="*", metavar="NAME",
                        help="forks/; default: all that do something here")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/ladder")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--jobs", type=int, default=CORES)
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value")
    args = parser.parse_intermixed_args(words)
    args.out = args.out.resolve()
    if args.jobs < 1:
        parser.error("--jobs: at least 1")
    if taken := [word for word in args.overrides if re.match("(seed|run_dir)=", word)]:
        parser.error(f"{taken[0]}: --seeds and --out say it")
    if args.forks:  # --forks takes what follows it
        args.overrides += [word for word in args.forks if "=" in word]
        args.forks = [word for word in args.forks if "=" not in word]
    return args


def main() -> None:
    """Train what is missing, print the table, draw the picture."""
    args = parse()
    with one_line_errors():
        rows = make_rows(args)
        train_all(rows, args)
    runs = {row: [read_metrics(run_dir_of(row, seed, args)) for seed in args.seeds]
            for row in rows}
    print("\n".join(tables(rows, runs, to_first=rows[0].name == "DAPO")))
    if args.picture:
        draw(rows, runs, args.picture)
    if rows[0].name == "DAPO":
        sys.exit(print(f"\n{len(args.seeds)} seeds; no goal"))
    accuracy = MEASURES["accuracy, all steps"][0]
    difference, half = interval([accuracy(dapo) - accuracy(grpo)
                                 for dapo, grpo in zip(runs[rows[-1]], runs[rows[0]], strict=True)])
    of_seeds = f"{len(args.seeds)} seeds" if len(args.seeds) > 1 else "one seed, so no interval"
    print(f"\nDAPO minus naive GRPO, {of_seeds}: {difference:+.3f} ± {half:.3f} (goal above 0)")
    sys.exit(difference - half <= 0)  # not with one seed


if __name__ == "__main__":
    main()
