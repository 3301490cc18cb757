"""Features with published ranges: how a table's cell becomes numbers in [-1, 1], by that cell alone.

In the experiment file a feature is a line of `[task.features]`, named by its column:

    age  = { range = [20, 80] }                                     a number: clamped, then scaled to [-1, 1]
    chol = { range = [100, 400], missing = true, missing_values = [0] }
    sex  = { flag = "Male" }                                        1 for this value (or one of a list), else 0
    fbs  = { flag = true }                                          1 for true, yes, y, t, 1; 0 for false, no, n, f, 0
    cp   = { values = ["typical", "atypical", "none"] }             one number for each value, 1 for the cell's own

A missing cell (empty, NA, N/A, NaN, null, None, `?`, one of `missing_values`, or no number where one is due) gives 0
everywhere, and `missing = true` adds a number that is 1 where the cell is missing. A value that `values` does not
list gives zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..core.errors import InputError
from .tables import canonical, is_missing, nearest, number_of

KINDS = ("range", "flag", "values")
KEYS = (*KINDS, "missing", "missing_values")
TRUE = frozenset({"true", "yes", "y", "t", "1"})
FALSE = frozenset({"false", "no", "n", "f", "0"})


@dataclass(frozen=True, kw_only=True)
class Feature:
    """A column's published encoding; exactly one of `bounds`, `flag`, `values` says which kind it is."""

    column: str
    bounds: tuple[float, float] | None = None
    flag: frozenset[str] | None = None
    boolean: bool = False
    values: tuple[str, ...] | None = None
    indicator: bool = False
    missing_values: frozenset[str] = frozenset()

    @property
    def width(self) -> int:
        """How many numbers a cell becomes."""
        return (len(self.values) if self.values is not None else 1) + self.indicator

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each number."""
        names = (self.column,) if self.values is None else tuple(f"{self.column}={value}" for value in self.values)
        return (*names, f"{self.column} missing") if self.indicator else names

    def encode(self, cell: str) -> tuple[float, ...]:
        """Return the numbers of a cell, each in [-1, 1]."""
        text = canonical(cell)
        numbers = None if text in self.missing_values else self._numbers(text)
        if numbers is None:
            numbers = (0.0,) * (self.width - self.indicator)
            return (*numbers, 1.0) if self.indicator else numbers
        return (*numbers, 0.0) if self.indicator else numbers

    def _numbers(self, text: str) -> tuple[float, ...] | None:
        if self.bounds is not None:
            number = number_of(text)
            if number is None:
                return None
            low, high = self.bounds
            return (2.0 * (min(max(number, low), high) - low) / (high - low) - 1.0,)
        if self.boolean:
            return (1.0,) if text.lower() in TRUE else (0.0,) if text.lower() in FALSE else None
        # A published value such as "none" is that value, though the word alone would mean missing.
        published = self.flag if self.flag is not None else self.values or ()
        if text not in published and is_missing(text):
            return None
        if self.flag is not None:
            return (1.0 if text in self.flag else 0.0,)
        return tuple(1.0 if text == value else 0.0 for value in self.values or ())


def parse_features(features: object) -> tuple[Feature, ...]:
    """Return the features of `[task.features]`; InputError names the key that is wrong."""
    if not isinstance(features, Mapping) or not features:
        raise InputError(
            "experiment-value",
            "task.features: must be a table with a line for each column, like age = {range = [0, 100]}",
        )
    return tuple(_parse(str(column), spec) for column, spec in features.items())


def _parse(column: str, spec: object) -> Feature:
    key = f"task.features.{column}"
    if isinstance(spec, Feature):
        return spec
    if not isinstance(spec, Mapping):
        raise _wrong(key, spec, 'must be a table: {range = [0, 100]}, {flag = true} or {values = ["a", "b"]}')
    for name in spec:
        if name not in KEYS:
            raise InputError("experiment-key", f"{key}.{name}: unknown key; {nearest(str(name), KEYS)}")
    kinds = [kind for kind in KINDS if kind in spec]
    if len(kinds) != 1:
        raise _wrong(key, dict(spec), "must have exactly one of range, flag and values")
    indicator = spec.get("missing", False)
    if not isinstance(indicator, bool):
        raise _wrong(f"{key}.missing", indicator, "must be true or false")
    missing_values = frozenset(scalars(f"{key}.missing_values", spec.get("missing_values", []), empty=True))
    kind = kinds[0]
    value = spec[kind]
    options: dict[str, Any] = {}
    if kind == "range":
        options["bounds"] = _bounds(f"{key}.range", value)
    elif kind == "values":
        options["values"] = scalars(f"{key}.values", value)
    elif value is True:
        options["boolean"] = True
    else:
        options["flag"] = frozenset(scalars(f"{key}.flag", value if isinstance(value, list | tuple) else [value]))
    return Feature(column=column, indicator=indicator, missing_values=missing_values, **options)


def scalars(key: str, value: object, *, empty: bool = False) -> tuple[str, ...]:
    """Return the canonical text of a list of distinct strings, numbers or booleans; else raise InputError."""
    if not isinstance(value, list | tuple) or not all(isinstance(item, str | int | float | bool) for item in value):
        raise _wrong(key, value, 'must be a list of values, like ["a", "b"] or [1, 2]')
    texts = tuple(canonical(item) for item in value)
    if not texts and not empty:
        raise _wrong(key, value, "must list at least one value")
    for text in texts:
        if texts.count(text) > 1:
            raise _wrong(key, value, f'lists "{text}" twice')
    return texts


def _bounds(key: str, value: object) -> tuple[float, float]:
    numbers = [number_of(str(item)) for item in value] if isinstance(value, list | tuple) else []
    if len(numbers) != 2 or numbers[0] is None or numbers[1] is None or not numbers[0] < numbers[1]:
        raise _wrong(key, value, "must be two finite numbers, the lower first, like [0, 100]")
    return numbers[0], numbers[1]


def _wrong(key: str, value: object, problem: str) -> InputError:
    return InputError("experiment-value", f"{key} = {value!r}: {problem}")
