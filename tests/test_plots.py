"""Plots: text stays text, ids are apart, colours follow the page, and numbers that are not there are not drawn."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from bract.reports.drawing import VARIABLES, inline_svg, save_png
from bract.reports.plots import compared, curve, plots_of, released_histogram
from bract.reports.run import Released, RunView, read_run

from .sample_run import guarantee, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunView:
    return read_run(write_run(tmp_path_factory.mktemp("plots") / "run"))


def test_every_plot_is_drawn(run: RunView) -> None:
    assert [plot.name for plot in plots_of(run) if not plot.private] == [
        "released-histogram",
        "released-roc",
        "epsilon",
    ]
    private = [plot.name for plot in plots_of(run) if plot.private]
    assert private == ["curve-loss", "curve-accuracy", "curve-auc", "comparison-accuracy", "comparison-auc"]


def test_svg_takes_the_colours_of_the_page(run: RunView) -> None:
    style = (Path(__file__).parents[1] / "reports" / "templates" / "report.css").read_text()
    for plot in plots_of(run):
        svg = inline_svg(plot)
        assert not re.search(r"(fill|stroke): #(?!0{6}|f{6})", svg) and "var(--" in svg
        assert all(f"--{name}:" in style for name in re.findall(r"var\(--(\w+)\)", svg))
        assert "<text" in svg and "DOCTYPE" not in svg and "xmlns" not in svg
        assert all(value.startswith(plot.name) for value in re.findall(r'\bid="([^"]*)"', svg))
    assert set(VARIABLES.values()) == {"ink", "muted", "rule", "paper", "blue", "orange", "grey"}


def test_epsilon_is_that_of_the_whole_run_and_never_falls(run: RunView) -> None:
    figure = next(plot.figure for plot in plots_of(run) if plot.name == "epsilon")
    x, y = (np.asarray(values) for values in figure.axes[0].lines[1].get_data())
    assert x[0] == y[0] == 0 and x[-1] == 20 and y[-1] == guarantee().epsilon
    assert (np.diff(y) > 0).all()


def test_released_counts_are_drawn_as_they_are(run: RunView) -> None:
    assert run.released is not None
    plot = released_histogram(Released(histogram=((3, 0, -2, 1), (0, 0, 5, 9)), roc=(), per_site={}), ["a", "b"])
    assert plot is not None and "below zero" in plot.caption
    assert [bar.get_height() for bar in plot.figure.axes[0].patches] == [3, 0, -2, 1, 0, 0, 5, 9]
    assert released_histogram(Released(histogram=(), roc=(), per_site={}), ["a", "b"]) is None


def test_shares_of_classes_never_leave_their_range() -> None:
    plot = released_histogram(
        Released(histogram=((8, 2), (-3, 4), (0, 0), (5, -4)), roc=(), per_site={}), ["a", "b", "c"]
    )
    assert plot is not None
    bars = [bar.get_width() for bar in plot.figure.axes[0].containers[1]]
    assert bars == [0.8, 0, 0, 1]
    assert [text.get_text() for text in plot.figure.axes[0].texts] == [
        "0.80  of 10",
        "0.00  of 4",
        "–  of 0",
        "1.00  of 5",
    ]
    assert [label.get_text() for label in plot.figure.axes[0].get_yticklabels()] == ["a", "b", "c", "class 3"]


def test_a_dollar_is_no_formula() -> None:
    plot = released_histogram(Released(histogram=((8, 2), (3, 4)), roc=(), per_site={}), ["under $5_0$", "more"])
    assert plot is not None and ">under $5_0$<" in inline_svg(plot)


def test_what_is_missing_is_not_drawn(run: RunView) -> None:
    assert curve((), "auc") is None
    assert run.comparison is not None and compared(run.comparison, "accuracy") is not None
    empty = type(run.comparison)(sites=(), rows=())
    assert compared(empty, "accuracy") is None


def test_settings_of_the_caller_stay(run: RunView, tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    for plot in plots_of(run)[:2]:
        inline_svg(plot)
        save_png(plot, tmp_path / f"{plot.name}.png")
    assert dict(matplotlib.rcParams) == before
    assert (tmp_path / "released-roc.png").read_bytes().startswith(b"\x89PNG")


def test_names_in_any_script_warn_nobody(tmp_path: Path) -> None:
    name = "病院 ヘルスケア 🏥"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = read_run(write_run(tmp_path / "run", sites={name: (80, 20), "b": (70, 20)}))
        svg = "".join(inline_svg(plot) for plot in plots_of(run))
    assert "病院" in svg
