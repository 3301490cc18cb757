"""A run directory as one typed, frozen view. Reading it changes nothing and needs no part of the run to be complete."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import InputError
from ..privacy.guarantee import Guarantee


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Accuracy and area under the ROC curve; None where one could not be computed or was not released."""

    accuracy: float | None
    auc: float | None

    def of(self, metric: str) -> float | None:
        """Return the metric of that name."""
        return self.accuracy if metric == "accuracy" else self.auc


@dataclass(frozen=True, kw_only=True)
class Site:
    """What the manifest says of one client: public counts, and the part of the plan that follows from them."""

    train_records: int | None
    test_records: int | None
    sampling_rate: float | None
    steps_per_round: int | None
    noise_multiplier: float | None


@dataclass(frozen=True, kw_only=True)
class SiteRelease:
    """The released histogram of one site, and what follows from it."""

    histogram: tuple[tuple[int, ...], ...]
    scores: Scores


@dataclass(frozen=True, kw_only=True)
class Released:
    """What left the sites by an accounted release: the summed histogram, its ROC curve, and each site's part."""

    histogram: tuple[tuple[int, ...], ...]
    roc: tuple[tuple[float, float], ...]
    per_site: Mapping[str, SiteRelease]


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """Exact metrics after one round of a simulation. Not private."""

    round: int
    loss: float | None
    scores: Scores
    sites: Mapping[str, Scores]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Exact metrics of several models on every site's test records. Not private."""

    sites: tuple[str, ...]
    rows: tuple[ComparedModel, ...]


@dataclass(frozen=True, kw_only=True)
class ComparedModel:
    """One model of a comparison; `kind` is "federated", "reference" or "lone"."""

    model: str
    kind: str
    sites: Mapping[str, Scores]
    all: Scores

    @property
    def home(self) -> str | None:
        """The site whose records alone trained a lone model."""
        return self.model.removesuffix(" alone") if self.kind == "lone" else None


@dataclass(frozen=True, kw_only=True)
class RunView:
    """All that a person may want to see of a run."""

    folder: Path
    experiment: Mapping[str, Mapping[str, Any]]
    manifest: Mapping[str, Any]
    sites: Mapping[str, Site]
    rounds: tuple[Mapping[str, Any], ...]
    result: Mapping[str, Any]
    guarantee: Guarantee | None
    released: Released | None
    curves: tuple[CurvePoint, ...]
    comparison: Comparison | None

    @property
    def name(self) -> str:
        """The name of the experiment."""
        return str(self.experiment.get("experiment", {}).get("name", self.folder.name))

    @property
    def status(self) -> str:
        """The status of the result, "unfinished" before there is one."""
        return str(self.result.get("status", "unfinished"))

    @property
    def rounds_planned(self) -> int:
        """The rounds that the experiment asks for."""
        return int(self.experiment.get("experiment", {}).get("rounds", len(self.rounds)))

    @property
    def rounds_run(self) -> int:
        """The rounds behind the model."""
        return int(self.result.get("rounds", self.rounds[-1]["round"] if self.rounds else 0))

    @property
    def metrics(self) -> Mapping[str, float | None]:
        """The released metrics of the result."""
        return {str(name): _float(value) for name, value in (self.result.get("metrics") or {}).items()}

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes."""
        return tuple(str(name) for name in self.manifest.get("classes", ()))


def read_run(folder: Path, *, released_only: bool = False) -> RunView:
    """Return the view of a run directory; with `released_only` the files of private/ are not even opened.

    Raises InputError: run-missing without manifest.json or experiment.toml, run-unreadable for a damaged file.
    """
    for name in ("manifest.json", "experiment.toml"):
        if not (folder / name).is_file():
            raise InputError("run-missing", f"{folder}: no {name} in it; give the run directory that bract wrote")
    manifest = _object(folder / "manifest.json")
    result = _object(folder / "result.json") if (folder / "result.json").is_file() else {}
    comparison, curves = folder / "private" / "comparison.json", folder / "private" / "curves.jsonl"
    try:
        return RunView(
            folder=folder,
            experiment=_tables(folder / "experiment.toml"),
            manifest=manifest,
            sites={str(name): _site(entry) for name, entry in (manifest.get("sites") or {}).items()},
            rounds=tuple(_by_round(folder / "metrics.jsonl")),
            result=result,
            guarantee=Guarantee.from_dict(result["guarantee"]) if result.get("guarantee") else None,
            released=_released(result["released"]) if result.get("released") else None,
            curves=() if released_only else tuple(_curve(point) for point in _by_round(curves)),
            comparison=None if released_only or not comparison.is_file() else _comparison(_object(comparison)),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            "run-unreadable",
            f"{folder}: a file of the run lacks what its kind must hold ({type(error).__name__}: {error})",
        ) from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("run-unreadable", f"{path}: cannot be read ({error}); restore it from a backup") from error


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise InputError("run-unreadable", f"{path}: not valid JSON ({error}); restore it from a backup") from error
    if not isinstance(value, dict):
        raise InputError("run-unreadable", f"{path}: holds no JSON object; restore it from a backup")
    return value


def _tables(path: Path) -> dict[str, dict[str, Any]]:
    try:
        tables = tomllib.loads(_text(path))
    except tomllib.TOMLDecodeError as error:
        raise InputError("run-unreadable", f"{path}: not valid TOML ({error}); restore it from a backup") from error
    return {name: table for name, table in tables.items() if isinstance(table, dict)}


def _by_round(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file of lines in the order of their rounds; a resumed round's last record counts."""
    if not path.is_file():
        return []
    records: dict[int, dict[str, Any]] = {}
    lines = _text(path).split("\n")
    for index, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            records[int(record["round"])] = record
        except (ValueError, KeyError, TypeError) as error:
            if index == len(lines):  # the line that was being written when its process was killed
                break
            raise InputError(
                "run-unreadable", f"{path}, line {index}: no JSON object with a round; restore it from a backup"
            ) from error
    return [records[number] for number in sorted(records)]


def _float(value: Any) -> float | None:
    """Return a finite or infinite number; None for null and NaN."""
    if value is None or isinstance(value, bool):
        return None
    return None if math.isnan(float(value)) else float(value)


def _int(value: Any) -> int | None:
    return None if value is None else int(value)


def _scores(entry: Mapping[str, Any]) -> Scores:
    return Scores(accuracy=_float(entry.get("accuracy")), auc=_float(entry.get("auc")))


def _site(entry: Mapping[str, Any]) -> Site:
    return Site(
        train_records=_int(entry.get("train_records")),
        test_records=_int(entry.get("test_records")),
        sampling_rate=_float(entry.get("sampling_rate")),
        steps_per_round=_int(entry.get("steps_per_round")),
        noise_multiplier=_float(entry.get("noise_multiplier")),
    )


def _histogram(rows: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(value) for value in row) for row in rows)


def _released(entry: Mapping[str, Any]) -> Released:
    return Released(
        histogram=_histogram(entry.get("histogram") or ()),
        roc=tuple((float(x), float(y)) for x, y in entry.get("roc") or ()),
        per_site={
            str(name): SiteRelease(histogram=_histogram(site.get("histogram") or ()), scores=_scores(site))
            for name, site in (entry.get("per_site") or {}).items()
        },
    )


def _curve(entry: Mapping[str, Any]) -> CurvePoint:
    return CurvePoint(
        round=int(entry["round"]),
        loss=_float(entry.get("loss")),
        scores=_scores(entry),
        sites={str(name): _scores(site) for name, site in (entry.get("sites") or {}).items()},
    )


def _comparison(entry: Mapping[str, Any]) -> Comparison:
    return Comparison(
        sites=tuple(str(name) for name in entry["sites"]),
        rows=tuple(
            ComparedModel(
                model=str(row["model"]),
                kind=str(row["kind"]),
                sites={str(name): _scores(site) for name, site in row["sites"].items()},
                all=_scores(row["all"]),
            )
            for row in entry["rows"]
        ),
    )
