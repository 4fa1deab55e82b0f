"""What did the run look like? metrics.jsonl to a picture: `python plot.py runs/a runs/b --out curves.png`.

Each directory is one colour; where a panel holds several metrics, line styles tell them apart.
"""

import argparse
import json
from pathlib import Path

PANELS = {  # title: metrics by the end of their names
    "validation accuracy": ("/avg@*", "/maj@*"),
    "training accuracy": ("acc/before_filter", "acc/after_filter"),
    "reward": ("reward/mean",),
    "response length (tokens)": ("response_length/mean",),
    "groups (share)": ("groups/kept", "groups/all_correct", "groups/all_wrong"),
    "entropy": ("actor/entropy",),
    "mean token probability": ("actor/token_prob",),
    "clipped tokens (share)": ("actor/clip_frac_high", "actor/clip_frac_low"),
    "gradient norm": ("actor/grad_norm",),
}
STYLES = ("-", "--", ":")


def read_metrics(run_dir: str | Path) -> list[dict]:
    """The rows of a run's metrics.jsonl. Raises ValueError where there is none, or a line is not JSON."""
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


def find_series(rows: list[dict], pattern: str) -> tuple[list[int], list[float]]:
    """Steps and values of the metric whose name ends with `pattern` (`*` at its end: any number)."""
    stem = pattern.rstrip("*")
    points = [(row["step"], value) for row in rows for name, value in row.items()
              if (stem in name and pattern.endswith("*")) or name == pattern]
    return [step for step, _ in points], [value for _, value in points]


def plot_runs(run_dirs: list[str | Path], out: str | Path) -> None:
    """Draw all panels for all runs into the file `out`."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(3, 3, figsize=(13, 9), layout="constrained")
    runs = {str(run_dir): read_metrics(run_dir) for run_dir in run_dirs}
    for axis, (title, patterns) in zip(axes.flat, PANELS.items(), strict=True):
        for i, rows in enumerate(runs.values()):
            for style, pattern in zip(STYLES, patterns, strict=False):
                steps, values = find_series(rows, pattern)
                axis.plot(steps, values, style, color=f"C{i}", marker="." if len(steps) < 15 else "")
        if len(patterns) > 1:
            handles = [plt.Line2D([], [], color="black", linestyle=style) for style in STYLES[:len(patterns)]]
            axis.legend(handles, [p.strip("/*").rpartition("/")[2].replace("@", "@k") for p in patterns], fontsize=8)
        if title.startswith("clipped"):
            axis.set_yscale("symlog", linthresh=1e-4)  # small, and zero at times
        axis.set_title(title)
        axis.grid(alpha=0.3)
        axis.set_xlabel("step")
    figure.legend([plt.Line2D([], [], color=f"C{i}") for i in range(len(runs))], list(runs),
                  loc="outside upper center", ncols=4)
    figure.savefig(out, dpi=100)
    plt.close(figure)


def main() -> None:
    """Overlay the runs that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="directories of runs")
    parser.add_argument("--out", default="curves.png")
    args = parser.parse_args()
    try:
        plot_runs(args.runs, args.out)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
