"""The task of a table: a classifier over a CSV or Parquet file, by configuration alone.

    [task]
    name = "tabular"
    data = "patients.csv"                    # CSV (UTF-8, a header line) or Parquet
    target = "outcome"                       # the column to predict
    positive = ["died", "readmitted"]        # its values that are the positive class; all other values the negative
    client_column = "hospital"               # who holds a record; without it one client named "all"
    id_column = "patient"                    # what the train/test split hashes

    [task.features]                          # each column's published encoding: see features.py
    age = { range = [18, 100] }
    smoker = { flag = true, missing = true }
    ward = { values = ["surgery", "medicine", "intensive care"] }

Instead of `positive`, `classes` names two or more classes: a list of the target's values, or a table from a class's
name to its values. Then a record with any other target is left out. With either, a record without target, and with
`client_column` one without a client, is left out: by its own content alone. Further keys: `fold` and `folds` (which
fold of the split is the test part; 0 of 5), `separator` (of a CSV; a comma).

Without `id_column`, or where a record's id is empty, the id is the content of its own target and features, never its
row number, which changes for all rows below one that is removed; so equal records stand on the same side.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from ..core.errors import InputError
from .classification import Classification
from .features import Feature, parse_features, scalars
from .models import check_model, logistic, mlp
from .tables import Table, canonical, is_missing
from .task import Examples, SiteData, check_folds

CACHED_CELLS = 65_536


class Tabular(Classification):
    """A classifier over the rows of a table; inputs [n, width] in [-1, 1]."""

    models: ClassVar[tuple[str, ...]] = ("logistic", "mlp")

    def __init__(
        self,
        *,
        target: str,
        features: Mapping[str, object],
        positive: object = None,
        classes: object = None,
        client_column: str | None = None,
        id_column: str | None = None,
        separator: str = ",",
        fold: int = 0,
        folds: int = 5,
        model: str = "logistic",
    ) -> None:
        for key, name in (("target", target), ("client_column", client_column), ("id_column", id_column)):
            if name is not None and (not isinstance(name, str) or not name):
                raise InputError("experiment-value", f"task.{key} = {name!r}: must be the name of a column")
        if not isinstance(separator, str) or len(separator) != 1:
            raise InputError("experiment-value", f"task.separator = {separator!r}: must be one character")
        check_folds(fold, folds)
        check_model(model, self.models)
        self.features: tuple[Feature, ...] = parse_features(features)
        self.classes, self._class_of, self._other = _parse_classes(positive, classes)
        self._target, self._client, self._id = target, client_column, id_column
        self._separator, self._fold, self._folds, self._model = separator, fold, folds, model
        for feature in self.features:
            if feature.column in (target, client_column, id_column):
                raise InputError(
                    "experiment-conflict",
                    f"task.features.{feature.column}: the column is also the target, the client or the id; drop one",
                )

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The name of each input."""
        return tuple(name for feature in self.features for name in feature.names)

    def model(self) -> nn.Module:
        """Return the model that `train.model` names."""
        build = logistic if self._model == "logistic" else mlp
        return build(sum(feature.width for feature in self.features), self.outputs)

    def partitions(self, source: Path | None) -> dict[str, SiteData]:
        """Return the clients of `client_column` by sorted name, or one client "all"."""
        if source is None:
            raise InputError("experiment-value", "task.data: missing; give the path of a CSV or Parquet file")
        return self._read(source, key="task.data", client_column=self._client)

    def site(self, path: Path) -> SiteData:
        """Return the records of one client's own file, which needs no client column."""
        return self._read(path, key="--data", client_column=None)["all"]

    def _read(self, path: Path, *, key: str, client_column: str | None) -> dict[str, SiteData]:
        table = Table(path, key=key, separator=self._separator)
        columns = self._columns(table, client_column)
        position = {column: index for index, column in enumerate(columns)}
        encoders = [
            (position[feature.column], functools.lru_cache(CACHED_CELLS)(feature.encode)) for feature in self.features
        ]
        # What identifies a record without an id: the cells that the task declares, so that a client column, which a
        # site's own file may lack, changes nothing.
        content = [position[self._target], *(index for index, _ in encoders)]
        found: dict[str, tuple[list[tuple[float, ...]], list[int], list[str]]] = {}
        for cells in table.rows(columns):
            label = self._label(cells[position[self._target]])
            client = cells[position[client_column]] if client_column else "all"
            if label is None or not client:
                continue
            name = cells[position[self._id]] if self._id else ""
            inputs, targets, ids = found.setdefault(client, ([], [], []))
            inputs.append(tuple(number for index, encode in encoders for number in encode(cells[index])))
            targets.append(label)
            ids.append(f"id {name}" if name else _content(cells[index] for index in content))
        if not found:
            raise InputError(
                "data-empty",
                f'{key} = "{path}": no row has a known "{self._target}"; check task.target, '
                f"task.{'classes' if self._other is None else 'positive'} and task.separator",
            )
        return {client: self._site(*found[client]) for client in sorted(found)}

    def _columns(self, table: Table, client_column: str | None) -> list[str]:
        table.require(self._target, key="task.target")
        for feature in self.features:
            table.require(feature.column, key="task.features")
        columns = [self._target, *(feature.column for feature in self.features)]
        for key, column in (("task.id_column", self._id), ("task.client_column", client_column)):
            if column is not None:
                table.require(column, key=key)
                columns.append(column)
        return columns

    def _label(self, cell: str) -> int | None:
        text = canonical(cell)
        label = self._class_of.get(text)
        return self._other if label is None and not is_missing(text) else label

    def _site(self, inputs: Sequence[tuple[float, ...]], targets: Sequence[int], ids: Sequence[str]) -> SiteData:
        examples = Examples(torch.tensor(inputs, dtype=torch.float32), torch.tensor(targets, dtype=torch.int64))
        return SiteData.split(examples, ids, fold=self._fold, folds=self._folds)


def _content(cells: Iterable[str]) -> str:
    # Written one way, so that a record has the same id in a CSV and in a Parquet file.
    texts = map(canonical, cells)
    return json.dumps(["" if is_missing(text) else text for text in texts])


def _parse_classes(positive: object, classes: object) -> tuple[tuple[str, ...], dict[str, int], int | None]:
    """Return the names, the class of each target value, and the class of any other value (None: left out)."""
    if (positive is None) == (classes is None):
        raise InputError(
            "experiment-conflict",
            'task.positive, task.classes: give exactly one, like positive = [1] or classes = ["red", "green"]',
        )
    if positive is not None:
        chosen = scalars("task.positive", positive if isinstance(positive, list | tuple) else [positive])
        pair = (f"not {chosen[0]}", chosen[0]) if len(chosen) == 1 else ("negative", "positive")
        return pair, dict.fromkeys(chosen, 1), 0
    if isinstance(classes, Mapping):
        names = tuple(str(name) for name in classes)
        groups = [
            scalars(f"task.classes.{name}", values if isinstance(values, list | tuple) else [values])
            for name, values in classes.items()
        ]
    else:
        names = scalars("task.classes", classes)
        groups = [(name,) for name in names]
    if len(names) < 2:
        raise InputError("experiment-value", f"task.classes = {classes!r}: must name at least two classes")
    class_of: dict[str, int] = {}
    for index, group in enumerate(groups):
        for value in group:
            if value in class_of:
                raise InputError("experiment-value", f'task.classes = {classes!r}: lists "{value}" twice')
            class_of[value] = index
    return names, class_of, None
