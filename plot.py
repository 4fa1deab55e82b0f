"""Draw the metrics of runs: `python plot.py runs/a runs/b --out curves.png`.

`--metrics actor/entropy 'val/*/avg@*'` draws metrics of one's choice, a panel for each pattern.
Of a single run, each metric has a colour; of several, each run has a colour, each metric a style.
`python plot.py runs/a --step 8` writes a page with that step's responses, to be read in a browser.
"""

import argparse
import difflib
import io
import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from infra.config import one_line_errors
from infra.provenance import describe_branch
from infra.rollout_files import read_metrics
from infra.step_page import write_step_page

PANELS = {  # title: patterns of metric names; those that no run has are not drawn
    "validation": ("val/*/avg@*", "val/*/maj@*", "val/*/score@*"),
    "training accuracy": ("acc/before_filter", "acc/after_filter"),
    "reward": ("reward/mean",),
    "response length (tokens)": ("response_length/mean",),
    "groups (share)": ("groups/kept", "groups/all_correct", "groups/all_wrong"),
    "entropy": ("actor/entropy",),
    "mean token probability": ("actor/token_prob",),
    "clipped tokens (share)": ("actor/clip_frac_high", "actor/clip_frac_low"),
    "gradient norm": ("actor/grad_norm",),
}
STYLES = ("-", "--", ":", "-.", (0, (8, 3)), (0, (1, 4)), (0, (5, 1, 1, 1, 1, 1)))


def match_metrics(runs: dict[str, list[dict]], patterns: Sequence[str]) -> list[str]:
    """The names of the metrics that match, in the order of the patterns."""
    rows = [row for rows in runs.values() for row in rows]
    names = sorted(set().union(*rows) - {"step"})
    return list(dict.fromkeys(name for pattern in patterns for name in names
                              if fnmatchcase(name, pattern)))


def plot_runs(run_dirs: Sequence[str | Path], out: str | Path | io.BytesIO,
              metrics: Sequence[str] = (), step: int | None = None) -> None:
    """Draw the patterns `metrics`, or else `PANELS`, for all runs into the file `out`; of a `step`,
    in one column in which it is marked.

    Raises ValueError for a run without metrics, and for a pattern that matches no metric.
    """
    from matplotlib.figure import Figure  # takes a second to import
    from matplotlib.lines import Line2D
    runs = {str(run_dir): read_metrics(run_dir, print) for run_dir in run_dirs}
    for pattern in metrics:
        if not match_metrics(runs, [pattern]):
            nearest = difflib.get_close_matches(pattern, match_metrics(runs, ["*"]), cutoff=0)
            raise ValueError(f"--metrics {pattern!r} matches no metric of {', '.join(runs)}; "
                             f"nearest: {', '.join(nearest) or 'none was recorded'}")
    panels = {pattern: (pattern,) for pattern in metrics} or {
        title: names for title, names in PANELS.items() if match_metrics(runs, names)} or PANELS
    columns = min(3 if step is None else 1, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.4 * columns, 3 * lines + 0.4), layout="constrained")
    for i, (title, patterns) in enumerate(panels.items(), 1):
        axis = figure.add_subplot(lines, columns, i, title=title, xlabel="step")
        draw_panel(axis, runs, match_metrics(runs, patterns))
        if step is not None:
            axis.axvline(step, color="0.6", zorder=0)
    if len(runs) == 1:
        figure.suptitle(", ".join(filter(None, [Path(*runs).name, describe_branch(*runs)])))
    else:
        handles = [Line2D([], [], color=f"C{i}") for i in range(len(runs))]
        names = [", ".join(filter(None, [run, describe_branch(run)])) for run in runs]
        figure.legend(handles, names, loc="outside upper center", ncols=4 if len(runs) > 4 else 2)
    figure.savefig(out, dpi=100)


def plot_step(run_dirs: Sequence[str], step: int, out: str | Path, metrics: Sequence[str],
              neighbours: Sequence[int] = ()) -> None:
    """Write the page of a step of a run, with its curves, into the file `out`."""
    if len(run_dirs) > 1:
        raise ValueError(f"--step shows a step of one run, {len(run_dirs)} are named")
    rows = {row["step"]: row for row in read_metrics(run_dirs[0])}
    plot_runs(run_dirs, curves := io.BytesIO(), metrics, step)
    write_step_page(run_dirs[0], step, rows.get(step, {}), curves.getvalue(), out, neighbours)


def draw_panel(axis, runs: dict[str, list[dict]], names: list[str]) -> None:
    """One line for each of the metrics `names` in each run, and a legend if there are several."""
    for i, rows in enumerate(runs.values()):
        for j, name in enumerate(names):
            steps = [row["step"] for row in rows if name in row]
            values = [row[name] for row in rows if name in row]
            color, style = (f"C{j}", "-") if len(runs) == 1 else (f"C{i}", STYLES[j % len(STYLES)])
            axis.plot(steps, values, linestyle=style, color=color, label=None if i else name,
                      marker="." if len(steps) < 15 else "")
    if len(names) > 1:
        axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    axis.xaxis.get_major_locator().set_params(integer=True)


def main() -> None:
    """Draw the runs that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="directories of runs")
    parser.add_argument("--metrics", nargs="+", default=(), metavar="PATTERN",
                        help="names of metrics, * matches any characters; default: nine panels")
    parser.add_argument("--step", type=int, nargs="+", metavar="N",
                        help="write the page of this step instead; of several, linked")
    parser.add_argument("--out", help="the file that is written; default: curves.png, or "
                        "step_00008.html in the run's directory, for step 8")
    args = parser.parse_args()
    with one_line_errors():
        if args.step is None:
            plot_runs(args.runs, out := args.out or "curves.png", args.metrics)
            print(f"wrote {out}")
        for i, step in enumerate(args.step or ()):
            out = str(Path(args.runs[0]) / f"step_{step:05d}.html")
            out = args.out if args.out and len(args.step) == 1 else out
            neighbours = [*args.step[max(0, i - 1):i], *args.step[i + 1:i + 2]]
            plot_step(args.runs, step, out, args.metrics, neighbours)
            print(f"wrote {out}")


if __name__ == "__main__":
    main()
