"""The plots of a run: what was released, epsilon by round, and in a simulation the exact curves and the comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..privacy.guarantee import rounded_up
from . import words
from .drawing import BLUE, GREY, GRID, INK, MUTED, ORANGE, PAPER, Plot, canvas, style
from .run import Comparison, CurvePoint, Released, RunView, Scores

LISTED = 24
"""Above this many classes or sites a plot shows their distribution instead of one row for each."""


def plots_of(run: RunView) -> list[Plot]:
    """Return every plot for which the run has the numbers; the private ones only where the view holds them."""
    found: list[Plot | None] = []
    if run.released is not None and run.released.histogram:
        found += [released_histogram(run.released, run.classes), released_roc(run.released, run.metrics.get("auc"))]
    found.append(epsilon_by_round(run))
    found += [curve(run.curves, metric) for metric in ("loss", "accuracy", "auc")]
    if run.comparison is not None:
        found += [compared(run.comparison, metric) for metric in ("accuracy", "auc")]
    return [plot for plot in found if plot is not None]


@style()
def released_histogram(released: Released, classes: Sequence[str]) -> Plot | None:
    """Two classes: counts by label and score quarter. More: each class's share of records that were told right."""
    counts = np.array(released.histogram, dtype=float)
    if counts.ndim != 2 or counts.size == 0:
        return None
    names = [words.shortened(name, 22) for name in classes]
    names += [f"class {index}" for index in range(len(names), len(counts))]
    if counts.shape[1] == 4 and len(counts) == 2:
        return _by_score(counts, names)
    return _by_class(counts, names)


@style()
def released_roc(released: Released, auc: float | None) -> Plot | None:
    """The ROC curve that follows from the released histogram."""
    if len(released.roc) < 2:
        return None
    points = np.array(sorted(released.roc))
    figure, axes = canvas()
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.fill_between(points[:, 0], points[:, 1], color=BLUE, alpha=0.10, linewidth=0)
    axes.plot(points[:, 0], points[:, 1], color=BLUE, linewidth=1.8, marker="o", markersize=4, clip_on=False, zorder=3)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="False positive rate", ylabel="True positive rate")
    if auc is not None:
        axes.text(0.96, 0.07, f"AUC {words.number(auc)}", ha="right", color=INK, fontsize=10)
    return Plot(
        name="released-roc",
        title="ROC curve of the released histogram",
        caption="The four quarters of the score give it its corners, and scores within a quarter count as ties; "
        "the dashed line is a coin toss.",
        figure=figure,
    )


@style()
def epsilon_by_round(run: RunView) -> Plot | None:
    """Epsilon spent by training after each round, the largest over the clients."""
    spent = [(record["round"], record["epsilon"]) for record in run.rounds if record.get("epsilon") is not None]
    if not spent or run.guarantee is None or run.guarantee.epsilon is None:
        return None
    rounds, epsilons = [0, *(number for number, _ in spent)], [0.0, *(value for _, value in spent)]
    figure, axes = canvas()
    target = run.experiment.get("privacy", {}).get("epsilon")
    if isinstance(target, int | float):
        axes.axhline(target, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.annotate(
            f"planned for the whole run: {rounded_up(target)}",
            (0, target), xytext=(2, 3), textcoords="offset points", color=MUTED,
        )  # fmt: skip
    axes.fill_between(rounds, epsilons, color=BLUE, alpha=0.10, linewidth=0)
    axes.plot(rounds, epsilons, color=BLUE, linewidth=1.8)
    axes.plot(rounds[-1:], epsilons[-1:], color=BLUE, marker="o", markersize=5, clip_on=False, zorder=4)
    axes.annotate(
        rounded_up(epsilons[-1]), (rounds[-1], epsilons[-1]), xytext=(3, 6), textcoords="offset points",
        ha="right", color=INK, fontsize=10,
    )  # fmt: skip
    axes.set(xlabel="Round", ylabel="Epsilon so far", xlim=(0, max(run.rounds_planned, rounds[-1])))
    axes.set_ylim(0, 1.15 * max(epsilons[-1], target if isinstance(target, int | float) else 0) or 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return Plot(
        name="epsilon",
        title="Epsilon by round",
        caption="Every point is the whole privacy loss of training from the first round to this one, "
        "never that of one round.",
        figure=figure,
    )


@style()
def curve(points: Sequence[CurvePoint], metric: str) -> Plot | None:
    """An exact metric over the rounds of a simulation: a thin line for each site, a strong one for all records."""
    total = [(point.round, point.loss if metric == "loss" else point.scores.of(metric)) for point in points]
    total = [(number, value) for number, value in total if value is not None]
    if not total:
        return None
    figure, axes = canvas(2.9, 2.3)
    sites = list(dict.fromkeys(name for point in points for name in point.sites)) if metric != "loss" else []
    lines = {name: _series(points, name, metric) for name in sites}
    lines = {name: line for name, line in lines.items() if line}
    few = len(lines) <= LISTED
    if few:
        for line in lines.values():
            axes.plot(*zip(*line, strict=True), color=GREY, linewidth=0.7)
    elif lines:
        _band(axes, list(lines.values()))
    axes.plot(*zip(*total, strict=True), color=BLUE, linewidth=1.8, marker="o" if len(total) == 1 else "", zorder=3)
    last, value = total[-1]
    axes.annotate(
        words.number(value), (last, value), xytext=(5, 0), textcoords="offset points",
        ha="left", va="center", color=INK, annotation_clip=False,
    )  # fmt: skip
    axes.set_xlabel("Round")
    axes.margins(x=0.02, y=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    thin = "thin: each site" if few else "shaded: the middle 80 % of the sites"
    return Plot(
        name=f"curve-{metric}",
        title=f"{words.metric(metric)} by round",
        caption="All test records." if not lines else f"Bold: all test records; {thin}.",
        figure=figure,
        private=True,
    )


@style()
def compared(comparison: Comparison, metric: str) -> Plot | None:
    """Every model on every site's test records, one row a site."""
    sites = list(comparison.sites)
    rows: list[tuple[str, list[Scores | None]]] = [
        (words.shortened(site, 18), [model.sites.get(site) for model in comparison.rows]) for site in sites
    ]
    if len(sites) > LISTED:
        rows = []
    rows.append(("All sites", [model.all for model in comparison.rows]))
    if all(entry is None or entry.of(metric) is None for _, entries in rows for entry in entries):
        return None
    figure, axes = canvas(4.4, 0.95 + 0.34 * len(rows))
    for height, (label, entries) in enumerate(rows):
        for model, entry in zip(comparison.rows, entries, strict=True):
            value = None if entry is None else entry.of(metric)
            if value is None:
                continue
            home = model.home is not None and words.shortened(model.home, 18) == label
            axes.plot([value], [height], linestyle="", clip_on=False, **_mark(model.kind, home))
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    axes.set_ylim(len(rows) - 0.45, -0.55)
    if len(rows) > 1:
        axes.axhline(len(rows) - 1.5, color=GREY, linewidth=0.6)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_xlabel(words.metric(metric))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7))
    by_site = len(rows) > 1
    _legend_of_models(figure, comparison, by_site=by_site)
    alone = any(model.kind == "lone" for model in comparison.rows)
    return Plot(
        name=f"comparison-{metric}",
        title=f"{words.metric(metric)} on each site's test records",
        caption="Marks right of the square: the site gains from the federation."
        if by_site and alone
        else "All test records together."
        if not by_site
        else "One row a site.",
        figure=figure,
        private=True,
    )


def _by_score(counts: np.ndarray[tuple[int, ...], np.dtype[np.float64]], names: Sequence[str]) -> Plot:
    figure, axes = canvas()
    positions = np.arange(4)
    for offset, row, name, colour in zip((-0.2, 0.2), counts, names, (GREY, BLUE), strict=False):
        bars = axes.bar(positions + offset, row, 0.38, color=colour, label=name)
        axes.bar_label(bars, [words.count(int(value)) for value in row], padding=2, color=MUTED, fontsize=7)
    axes.axvline(1.5, color=INK, linewidth=0.7, linestyle=(0, (2, 2)))
    axes.axhline(0, color=GREY, linewidth=0.6)
    axes.set_xticks(positions, ["0 to ¼", "¼ to ½", "½ to ¾", "¾ to 1"])
    axes.set_ylabel("Test records")
    axes.set_xlabel(f"Predicted probability of \N{LEFT DOUBLE QUOTATION MARK}{names[1]}\N{RIGHT DOUBLE QUOTATION MARK}")
    axes.grid(axis="x", visible=False)
    axes.margins(y=0.12)
    figure.legend(loc="outside upper left", ncols=2, handlelength=0.9, handleheight=0.9, columnspacing=1.4)
    below = ", below zero where the noise outweighs them" if counts.min() < 0 else ""
    return Plot(
        name="released-histogram",
        title="Released histogram: label by score",
        caption=f"Counts of test records as released{below}; right of the dotted line the model says "
        f"\N{LEFT DOUBLE QUOTATION MARK}{names[1]}\N{RIGHT DOUBLE QUOTATION MARK}.",
        figure=figure,
    )


def _by_class(counts: np.ndarray[tuple[int, ...], np.dtype[np.float64]], names: Sequence[str]) -> Plot:
    right, total = np.maximum(counts[:, 0], 0), np.maximum(counts, 0).sum(axis=1)
    share = np.clip(np.divide(right, total, out=np.zeros_like(right), where=total > 0), 0, 1)
    if len(share) > LISTED:
        figure, axes = canvas()
        axes.hist(share, bins=20, range=(0, 1), color=BLUE)
        axes.set(xlabel="Share of the class's test records told right", ylabel="Classes", xlim=(0, 1))
        caption = f"From the released counts of {words.plural(len(share), 'class', 'classes')}."
    else:
        figure, axes = canvas(4.4, 0.9 + 0.2 * len(share))
        positions = np.arange(len(share))
        axes.barh(positions, np.ones(len(share)), 0.66, color=GRID)
        axes.barh(positions, share, 0.66, color=BLUE)
        for position, value, records in zip(positions, share, total, strict=True):
            shown = words.number(float(value), 2) if records > 0 else words.DASH
            axes.annotate(
                f"{shown}  of {words.count(int(records))}", (1, position), xytext=(4, 0),
                textcoords="offset points", va="center", color=MUTED, annotation_clip=False,
            )  # fmt: skip
        axes.set_yticks(positions, names)
        axes.set(xlim=(0, 1), xlabel="Share told right", ylim=(len(share) - 0.4, -0.6))
        axes.grid(visible=False)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", labelcolor=INK)
        caption = "From the released counts of right and wrong answers."
    return Plot(
        name="released-histogram", title="Released counts: right answers by class", caption=caption, figure=figure
    )


def _series(points: Sequence[CurvePoint], site: str, metric: str) -> list[tuple[int, float]]:
    found = ((point.round, point.sites[site].of(metric)) for point in points if site in point.sites)
    return [(number, value) for number, value in found if value is not None]


def _band(axes: Axes, lines: Sequence[Sequence[tuple[int, float]]]) -> None:
    by_round: dict[int, list[float]] = {}
    for number, value in (pair for line in lines for pair in line):
        by_round.setdefault(number, []).append(value)
    rounds = sorted(by_round)
    low, high = np.array([np.quantile(by_round[number], (0.1, 0.9)) for number in rounds]).T
    axes.fill_between(rounds, low, high, color=GREY, alpha=0.35, linewidth=0)


def _mark(kind: str, home: bool) -> dict[str, Any]:
    if kind == "federated":
        return {
            "marker": "o",
            "markersize": 7,
            "color": BLUE,
            "markeredgecolor": PAPER,
            "markeredgewidth": 0.6,
            "zorder": 5,
        }
    if kind == "reference":
        face = {"markerfacecolor": "none", "markeredgewidth": 1.4}
        return {"marker": "D", "markersize": 6.5, "markeredgecolor": ORANGE, "zorder": 6, **face}
    if home:
        return {"marker": "s", "markersize": 5.5, "color": INK, "markeredgewidth": 0, "zorder": 3}
    return {"marker": "|", "markersize": 8, "color": GREY, "markeredgewidth": 1.3, "zorder": 2}


def _legend_of_models(figure: Figure, comparison: Comparison, *, by_site: bool) -> None:
    axes = figure.axes[0]
    handles, labels = [], []
    for model in comparison.rows:
        if model.kind != "lone":
            handles += axes.plot([], [], linestyle="", **_mark(model.kind, False))
            labels.append(words.shortened(model.model, 30))
    if any(model.kind == "lone" for model in comparison.rows):
        if by_site:
            handles += axes.plot([], [], linestyle="", **_mark("lone", True))
            labels.append("the site's own lone model")
        handles += axes.plot([], [], linestyle="", **_mark("lone", False))
        labels.append("another site's lone model" if by_site else "a lone model")
    figure.legend(
        handles, labels, loc="outside upper left", ncols=2, handlelength=1, columnspacing=1.2, handletextpad=0.5
    )
