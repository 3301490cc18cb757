"""Rows of a CSV or Parquet file as text, each read without a look at any other row.

No type is inferred from a column, and no bad row fails the file: what one record holds cannot change how another is
read, or whether the file is read at all. A record of a CSV is one line; a line with another number of cells than the
header is no record (so a quoted cell may not hold a line break).
"""

from __future__ import annotations

import csv
import difflib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..core.errors import InputError

PARQUET = (".parquet", ".pq")
MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "?"})


def canonical(value: object) -> str:
    """Return a cell's text: stripped, numbers and booleans written one way (`1.0` as `1`, `TRUE` as `true`)."""
    text = "" if value is None else str(value).strip()
    if text.lower() in ("true", "false"):
        return text.lower()
    number = number_of(text)
    if number is None:
        return text
    return str(int(number)) if number.is_integer() and abs(number) < 2**53 else repr(number)


def number_of(text: str) -> float | None:
    """Return the finite number that a cell holds, or None."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def is_missing(text: str) -> bool:
    """Return whether a cell says that nothing is known: empty, NA, N/A, NaN, null, None or `?`, in any case."""
    return text.lower() in MISSING


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the words `the nearest is "x"`, or the list of what there is."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6) or [
        other for other in names if other.lower() == name.lower()
    ]
    if close:
        return f'the nearest is "{close[0]}"'
    return "there is " + ", ".join(f'"{other}"' for other in names[:20]) + (", …" if len(names) > 20 else "")


class Table:
    """A file's header and, as often as they are asked for, its rows."""

    def __init__(self, path: Path, *, key: str, separator: str = ",") -> None:
        self.path, self.key, self._separator = path, key, separator
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "no such file"
            raise self._error("data-missing", f"{what}; give the path of a CSV or Parquet file")
        self.columns: tuple[str, ...] = self._parquet_columns() if self._is_parquet else self._csv_columns()
        twice = sorted({column for column in self.columns if self.columns.count(column) > 1})
        if twice:
            raise self._error("data-invalid", f'the header names "{twice[0]}" twice; give each column its own name')

    def require(self, column: str, *, key: str) -> None:
        """Raise InputError unless the file has the column that `key` names."""
        if column not in self.columns:
            raise InputError(
                "data-invalid", f'{key} = "{column}": no such column in {self.path}; {nearest(column, self.columns)}'
            )

    def rows(self, columns: Iterable[str]) -> Iterator[tuple[str, ...]]:
        """Yield the stripped text of `columns` for each row."""
        positions = [self.columns.index(column) for column in columns]
        for cells in self._parquet_rows() if self._is_parquet else self._csv_rows():
            yield tuple(cells[position].strip() for position in positions)

    @property
    def _is_parquet(self) -> bool:
        return self.path.suffix.lower() in PARQUET

    def _error(self, code: str, problem: str) -> InputError:
        return InputError(code, f'{self.key} = "{self.path}": {problem}')

    def _csv_columns(self) -> tuple[str, ...]:
        header = next(self._lines(), None)
        if header is None:
            raise self._error("data-invalid", "the file is empty; its first line must name the columns")
        return tuple(cell.strip() for cell in header)

    def _csv_rows(self) -> Iterator[list[str]]:
        lines = self._lines()
        next(lines, None)
        for cells in lines:
            if len(cells) == len(self.columns):
                yield cells

    def _lines(self) -> Iterator[list[str]]:
        try:
            # Bytes that are no UTF-8 become a replacement character: a strict reader would fail the file for one row.
            with self.path.open(encoding="utf-8-sig", errors="replace", newline=None) as file:
                for line in file:
                    # One reader for each line, so that a stray quote ends with its own line.
                    cells = _cells(line.rstrip("\n"), self._separator)
                    if cells:
                        yield cells
        except OSError as error:
            raise self._error("data-missing", f"cannot be read ({error.strerror})") from error

    def _parquet_columns(self) -> tuple[str, ...]:
        import pyarrow
        from pyarrow import parquet

        try:
            return tuple(str(name) for name in parquet.read_schema(self.path).names)
        except (OSError, pyarrow.ArrowException) as error:
            raise self._error("data-invalid", "is no Parquet file that can be read") from error

    def _parquet_rows(self) -> Iterator[list[str]]:
        from pyarrow import parquet

        # Through pyarrow, since pandas would turn a column of integers into floats when one of them is missing.
        with parquet.ParquetFile(self.path) as file:
            for batch in file.iter_batches(batch_size=4096):
                for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                    yield ["" if cell is None else str(cell) for cell in row]


def _cells(line: str, separator: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=separator), [])
    except csv.Error:
        return []
