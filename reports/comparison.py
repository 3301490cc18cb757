"""The comparison of a simulation as a table that fits: models in rows, sites in columns, the best of each marked."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from . import words
from .run import ComparedModel, Comparison, Scores


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A metric of one model at one site; `best` of its column as shown; `home` where a lone model was trained."""

    value: float | None
    text: str
    best: bool
    home: bool


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model, or the median over many lone models."""

    model: str
    kind: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True, kw_only=True)
class Table:
    """One metric of every model. `columns` are sites, or the spread over many sites, and at last all records."""

    metric: str
    columns: tuple[str, ...]
    by_site: bool
    rows: tuple[Row, ...]


def table_of(comparison: Comparison, metric: str, *, sites: int = 8, lone: int = 12, digits: int = 3) -> Table | None:
    """Return the table of a metric with at most `sites` columns and `lone` lone models; None if no model has it.

    More sites become their lowest, median and highest value, more lone models one row of medians.
    """
    by_site = len(comparison.sites) <= sites
    columns = comparison.sites if by_site else ("lowest site", "median site", "highest site")
    models = [
        (model.model, model.kind, model.home, _values(model, comparison.sites, metric, by_site))
        for model in _at_most(comparison.rows, lone, comparison.sites)
    ]
    if all(value is None for *_, values in models for value in values):
        return None
    best = [
        max((words.number(value, digits) for value in column if value is not None), default=None)
        for column in zip(*(values for *_, values in models), strict=True)
    ]
    return Table(
        metric=metric,
        columns=(*columns, "all sites"),
        by_site=by_site,
        rows=tuple(
            Row(
                model=name,
                kind=kind,
                cells=tuple(
                    Cell(
                        value=value,
                        text=words.number(value, digits),
                        best=value is not None and words.number(value, digits) == top and len(models) > 1,
                        home=by_site and home is not None and home == column,
                    )
                    for value, top, column in zip(values, best, (*columns, None), strict=True)
                ),
            )
            for name, kind, home, values in models
        ),
    )


def _values(model: ComparedModel, sites: Sequence[str], metric: str, by_site: bool) -> list[float | None]:
    found = [model.sites[site].of(metric) if site in model.sites else None for site in sites]
    if not by_site:
        there = [value for value in found if value is not None]
        found = [min(there), statistics.median(there), max(there)] if there else [None, None, None]
    return [*found, model.all.of(metric)]


def _at_most(models: Iterable[ComparedModel], lone: int, sites: Sequence[str]) -> list[ComparedModel]:
    models = list(models)
    alone = [model for model in models if model.kind == "lone"]
    if len(alone) <= lone:
        return models
    median = ComparedModel(
        model=f"lone models, median of {words.count(len(alone))}",
        kind="median",
        sites={site: _median([model.sites[site] for model in alone if site in model.sites]) for site in sites},
        all=_median([model.all for model in alone]),
    )
    return [model for model in models if model.kind != "lone"] + [median]


def _median(scores: Sequence[Scores]) -> Scores:
    def of(metric: str) -> float | None:
        there = [value for value in (score.of(metric) for score in scores) if value is not None]
        return statistics.median(there) if there else None

    return Scores(accuracy=of("accuracy"), auc=of("auc"))
