"""Draw the metrics of runs: `python plot.py runs/a runs/b --out curves.png`.

`--metrics actor/entropy 'val/*/avg@*'` draws metrics of one's choice, a panel for each pattern.
Of a single run, each metric has a colour; of several, each run has a colour, each metric a style.
"""

import argparse
import difflib
import json
import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from posixpath import commonpath

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


def read_metrics(run_dir: str | Path) -> list[dict]:
    """The rows of a run's metrics.jsonl. Raises ValueError if it is missing or not JSON."""
    path = Path(run_dir) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; a run's directory is expected")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise ValueError(f"{path}:{number}: not valid JSON") from None
    return rows


def match_metrics(runs: dict[str, list[dict]], patterns: Sequence[str]) -> list[str]:
    """The names of the metrics that match, in the order of the patterns."""
    rows = [row for rows in runs.values() for row in rows]
    names = sorted(set().union(*rows) - {"step"})
    return list(dict.fromkeys(name for pattern in patterns for name in names
                              if fnmatchcase(name, pattern)))


def plot_runs(run_dirs: Sequence[str | Path], out: str | Path, metrics: Sequence[str] = ()) -> None:
    """Draw the patterns `metrics`, or else `PANELS`, for all runs into the file `out`.

    Raises ValueError for a run without metrics, and for a pattern that matches no metric.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    runs = {str(run_dir): read_metrics(run_dir) for run_dir in run_dirs}
    for pattern in metrics:
        if not match_metrics(runs, [pattern]):
            nearest = difflib.get_close_matches(pattern, match_metrics(runs, ["*"]), cutoff=0)
            raise ValueError(f"--metrics {pattern!r} matches no metric of {', '.join(runs)}; "
                             f"nearest: {', '.join(nearest) or 'none, no step was recorded yet'}")
    panels = {pattern: (pattern,) for pattern in metrics} or PANELS
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.4 * columns, 3 * lines + 0.4),
                                layout="constrained", squeeze=False)
    for axis in axes.flat[len(panels):]:
        axis.axis("off")
    for axis, (title, patterns) in zip(axes.flat, panels.items(), strict=False):
        draw_panel(axis, runs, match_metrics(runs, patterns))
        axis.set_title(title)
        if title.startswith("clipped"):
            axis.set_yscale("symlog", linthresh=1e-4)  # small, and zero at times
    if len(runs) == 1:
        figure.suptitle(*runs)
    else:
        handles = [plt.Line2D([], [], color=f"C{i}") for i in range(len(runs))]
        figure.legend(handles, list(runs), loc="outside upper center", ncols=4)
    figure.savefig(out, dpi=100)
    plt.close(figure)


def draw_panel(axis, runs: dict[str, list[dict]], names: list[str]) -> None:
    """One line for each of the metrics `names` in each run, and a legend if there are several."""
    shared = commonpath([name.rpartition("/")[0] for name in names] or [""])  # not in the legend
    for i, rows in enumerate(runs.values()):
        for j, name in enumerate(names):
            steps = [row["step"] for row in rows if name in row]
            values = [row[name] for row in rows if name in row]
            color, style = (f"C{j}", "-") if len(runs) == 1 else (f"C{i}", STYLES[j % len(STYLES)])
            label = name.removeprefix(shared).lstrip("/") if i == 0 else None
            axis.plot(steps, values, linestyle=style, color=color, label=label,
                      marker="." if len(steps) < 15 else "")
    if len(names) > 1:
        legend = axis.legend(fontsize=8)
        for handle in legend.legend_handles if len(runs) > 1 else ():
            handle.set_color("black")  # a colour is a run
    axis.grid(alpha=0.3)
    axis.set_xlabel("step")
    axis.xaxis.get_major_locator().set_params(integer=True)


def main() -> None:
    """Draw the runs that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="directories of runs")
    parser.add_argument("--metrics", nargs="+", default=(), metavar="PATTERN",
                        help="names of metrics, * matches any characters; default: nine panels")
    parser.add_argument("--out", default="curves.png", help="the picture; default: %(default)s")
    args = parser.parse_args()
    try:
        plot_runs(args.runs, args.out, args.metrics)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
