"""What plot.py draws: a line for each metric, a panel for each pattern, and errors of one line."""

import json
import sys

import pytest
from matplotlib.figure import Figure

import plot


@pytest.fixture
def make_run_dir(tmp_path):
    """`make_run_dir("a", rows)`: a run's directory with these rows in metrics.jsonl."""

    def make_run_dir(name: str, rows: list[dict]) -> str:
        (tmp_path / name).mkdir()
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name / "metrics.jsonl").write_text(text)
        return str(tmp_path / name)

    return make_run_dir


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """`draw("runs/a", "--metrics", ...)` calls the script; returns the panels of its picture."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, out, **_: figures.append((figure, out)))

    def draw(*arguments: str) -> dict:
        out = str(tmp_path / "picture.png")
        monkeypatch.setattr(sys, "argv", ["plot.py", *arguments, "--out", out])
        plot.main()
        figure, path = figures[-1]
        assert path == out
        return {axis.get_title(): axis for axis in figure.axes if axis.get_title()}

    return draw


def curves(axis) -> list[tuple[list, list]]:
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines]


def legend(axis) -> list[str]:
    return [text.get_text() for text in axis.get_legend().get_texts()]


TWO_SETS = [
    {"step": 0, "val/easy/avg@4": 0.5, "val/hard/avg@4": 0.1},
    {"step": 1, "actor/entropy": 0.9},
    {"step": 2, "actor/entropy": 0.8, "val/easy/avg@4": 0.7, "val/hard/avg@4": 0.2},
]


def test_each_validation_set_is_a_line_of_its_own_with_a_legend_entry(make_run_dir, draw):
    axis = draw(make_run_dir("a", TWO_SETS))["validation"]
    assert curves(axis) == [([0, 2], [0.5, 0.7]), ([0, 2], [0.1, 0.2])]
    assert legend(axis) == ["val/easy/avg@4", "val/hard/avg@4"]
    assert len({line.get_color() for line in axis.lines}) == 2


def test_several_runs_differ_by_colour_and_their_metrics_by_style(make_run_dir, draw):
    runs = [make_run_dir(name, TWO_SETS) for name in ("a", "b")]
    lines = draw(*runs)["validation"].lines
    assert [line.get_color() for line in lines] == ["C0", "C0", "C1", "C1"]
    styles = [line.get_linestyle() for line in lines]
    assert styles[:2] == styles[2:] and styles[0] != styles[1]
    assert legend(draw(*runs)["validation"]) == [
        "val/easy/avg@4",
        "val/hard/avg@4",
    ]  # once, not for each run


def test_the_default_panels_show_the_curves_of_the_paper(make_run_dir, draw):
    """And the score, if the reward function states no accuracy."""
    names = [
        "val/x/avg@4",
        "val/x/maj@4",
        "val/x/score@4",
        "acc/before_filter",
        "acc/after_filter",
        "reward/mean",
        "response_length/mean",
        "groups/kept",
        "groups/all_correct",
        "groups/all_wrong",
        "actor/entropy",
        "actor/token_prob",
        "actor/clip_frac_high",
        "actor/clip_frac_low",
        "actor/grad_norm",
    ]
    row = {"step": 1, **{name: float(i) for i, name in enumerate(names)}}
    panels = draw(make_run_dir("a", [row]))
    drawn = [value for axis in panels.values() for _, (value,) in curves(axis)]
    assert len(panels) == 9 and drawn == list(range(len(names)))


def test_metrics_that_a_run_lacks_are_not_drawn(make_run_dir, draw):
    full, old = (
        make_run_dir("full", TWO_SETS),
        make_run_dir("old", [{"step": 1, "reward/mean": 1.0}]),
    )
    panels = draw(full, old)
    assert curves(panels["reward"]) == [([], []), ([1], [1.0])]
    assert "gradient norm" not in panels
    draw(make_run_dir("no_step_yet", []))


def test_metrics_of_ones_choice_have_a_panel_for_each_pattern(make_run_dir, draw):
    run = make_run_dir("a", TWO_SETS)
    panels = draw(run, "--metrics", "actor/entropy", "val/*/avg@*")
    assert list(panels) == ["actor/entropy", "val/*/avg@*"]
    assert curves(panels["actor/entropy"]) == [([1, 2], [0.9, 0.8])]
    assert len(panels["val/*/avg@*"].lines) == 2


def test_an_unknown_metric_is_one_line_with_the_nearest_names(make_run_dir, draw):
    run = make_run_dir("a", TWO_SETS)
    with pytest.raises(SystemExit) as error:
        draw(run, "--metrics", "actor/entropy", "entropie")
    message = str(error.value)
    assert message.startswith(
        f"error: --metrics 'entropie' matches no metric of {run}; nearest: actor/entropy"
    )
    assert "\n" not in message
    with pytest.raises(SystemExit, match="nearest: none was recorded"):
        draw(make_run_dir("empty", []), "--metrics", "reward/mean")


def test_a_directory_that_is_no_run_and_a_broken_line_are_named_and_a_half_written_last_line_is_not(
    make_run_dir, draw, tmp_path, capsys
):
    with pytest.raises(SystemExit, match="nothing/metrics.jsonl: no such file: name the directory of"):
        draw(str(tmp_path / "nothing"))
    run = make_run_dir("a", TWO_SETS)
    with open(f"{run}/metrics.jsonl", "a") as file:
        file.write('{"step": 3,')
    assert len(draw(run)["entropy"].lines[0].get_xdata()) == 2
    with open(f"{run}/metrics.jsonl", "a") as file:
        file.write("\n{}")
    assert "warning" not in capsys.readouterr().out
    assert len(draw(run)["entropy"].lines[0].get_xdata()) == 2
    assert "a/metrics.jsonl: left out what cannot be read in line 4" in capsys.readouterr().out


def test_a_picture_that_cannot_be_written_is_one_line(make_run_dir, monkeypatch):
    run = make_run_dir("a", TWO_SETS)
    for out, problem in (("/no/such/x.png", "No such file"), ("x.unknown", "not supported")):
        monkeypatch.setattr(sys, "argv", ["plot.py", run, "--out", out])
        with pytest.raises(SystemExit, match=f"error: .*{problem}"):
            plot.main()


def test_plot_runs_writes_a_png(make_run_dir, tmp_path):
    plot.plot_runs([make_run_dir("a", TWO_SETS)], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
