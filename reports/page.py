"""The report page: one HTML file that loads nothing, for the screen, the phone and paper."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..server.checkpoint import write_atomically
from . import sections, words
from .comparison import Table, table_of
from .drawing import Plot, inline_svg, save_png
from .plots import plots_of
from .run import RunView, read_run

STATE_KINDS = {
    "completed": "good",
    "stopped-early": "warn",
    "budget-exhausted": "warn",
    "interrupted": "warn",
    "unfinished": "warn",
}


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A plot as the template takes it."""

    name: str
    title: str
    caption: str
    svg: Markup


def write_report(run_dir: Path, *, released_only: bool = False) -> Path:
    """Write `report.html` and the plots of a run and return its path.

    With `released_only` the page is `report-released.html`, for others: nothing of private/ is read. Plots of private
    figures go to private/plots/. Raises InputError for what is no whole run directory, RunError if it is not writable.
    """
    run = read_run(run_dir, released_only=released_only)
    plots = plots_of(run)
    page = html_of(run, plots, released_only=released_only)
    path = run_dir / ("report-released.html" if released_only else "report.html")
    # With its private block the page is the experimenter's alone.
    write_atomically(path, page.encode("utf-8", "replace"), mode=0o644 if released_only else 0o600)
    for plot in plots:
        save_png(plot, run_dir / ("private/plots" if plot.private else "plots") / f"{plot.name}.png")
    return path


def html_of(run: RunView, plots: Sequence[Plot], *, released_only: bool = False) -> str:
    """Return the page of a run with its plots; it is private if the view is."""
    drawings = {plot.name: _drawing(plot) for plot in plots}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def drawn(prefix: str, *, private: bool) -> list[Drawing]:
        return [drawings[plot.name] for plot in plots if plot.name.startswith(prefix) and plot.private == private]

    private_run = run.guarantee is None or run.guarantee.epsilon is not None
    tables = [table for metric in ("accuracy", "auc") if (table := _compared(run, metric))]
    return environment.get_template("report.html").render(
        title=words.printable(run.name),
        released_only=released_only,
        state=_state(run),
        error=_error(run.result.get("error")),
        facts=sections.facts(run),
        figures=sections.figures(run),
        released_lead=sections.released_lead(run),
        released_plots=drawn("released-", private=False),
        site_table=sections.site_table(run),
        private_run=private_run,
        guarantee=sections.guarantee(run),
        epsilon_plot=drawings.get("epsilon"),
        plan_table=sections.plan_table(run),
        private_plots=[plot for plot in plots if plot.private],
        comparisons=[_compared_for_page(run, table) for table in tables],
        comparison_note=_comparison_note(run, tables),
        comparison_plots=drawn("comparison-", private=True),
        curve_plots=drawn("curve-", private=True),
        configuration=sections.configuration(run),
        versions=sections.versions(run),
        model_sha256=run.result.get("model_sha256"),
        bract_version=str(run.manifest.get("bract", "")),
    )


def _drawing(plot: Plot) -> Drawing:
    # The one place where markup enters unescaped: matplotlib has escaped every text in it.
    return Drawing(name=plot.name, title=plot.title, caption=plot.caption, svg=Markup(inline_svg(plot)))


def _state(run: RunView) -> dict[str, str]:
    title, sentence = words.state(run.status)
    sentence = "" if run.status == "completed" else sentence
    if sentence and run.status != "unfinished":
        sentence += f" The model is that of round {run.rounds_run} of {run.rounds_planned}."
    return {"title": title, "sentence": sentence, "kind": STATE_KINDS.get(run.status, "bad")}


def _error(error: Any) -> str:
    if not error:
        return ""
    if isinstance(error, Mapping):
        return words.printable(f"{error.get('code', 'error')}: {error.get('sentence', '')}")
    return words.printable(str(error))


def _compared(run: RunView, metric: str) -> Table | None:
    return None if run.comparison is None else table_of(run.comparison, metric)


def _compared_for_page(run: RunView, table: Table) -> dict[str, Any]:
    def note(column: str) -> str:
        if column == "all sites":
            return _records(sum(site.test_records or 0 for site in run.sites.values()))
        site = run.sites.get(column) if table.by_site else None
        return "" if site is None else _records(site.test_records or 0)

    return {
        "title": f"{words.metric(table.metric)} of each model on each site's test records",
        "columns": [
            {
                "name": words.shortened(name, 40).capitalize() if name == "all sites" else words.shortened(name, 40),
                "note": note(name),
            }
            for name in table.columns
        ],
        "rows": [{"model": words.printable(row.model), "kind": row.kind, "cells": row.cells} for row in table.rows],
    }


def _records(count: int) -> str:
    return f"n = {words.count(count)}" if count else ""


def _comparison_note(run: RunView, tables: Sequence[Table]) -> str:
    """Return how to read the tables, and how little a small test set can tell apart."""
    if not tables or run.comparison is None:
        return ""
    note = "Bold: the best of its column."
    if any(row.kind in ("lone", "median") for row in tables[0].rows):
        note += " A lone model was trained without privacy on the records of one site alone."
        if tables[0].by_site:
            note += " Dotted underline: a lone model on its own site."
    sizes = {name: site.test_records for name, site in run.sites.items() if site.test_records}
    if sizes:
        name, least = min(sizes.items(), key=lambda item: item[1])
        total = sum(sizes.values())
        note += (
            f" Test sets are finite: the standard error of an accuracy of 0.8 is {_standard_error(least):.2f} with the "
            f"{words.plural(least, 'record')} of {words.shortened(name, 40)}, and {_standard_error(total):.2f} with "
            f"all {words.count(total)}; smaller differences mean little."
        )
    return note


def _standard_error(records: int) -> float:
    return math.sqrt(0.8 * 0.2 / records)
