"""Read TOML so that every complaint can name file, line, key and value."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from .errors import InputError

_TABLE = re.compile(r"^\s*\[\s*([^\[\]]+?)\s*\]\s*(#.*)?$")
_KEY = re.compile(r"^\s*([A-Za-z0-9_.\-\"' ]+?)\s*=")


def read(path: Path, *, kind: str = "experiment") -> tuple[dict[str, Any], str]:
    """Return the tables of a TOML file and its text; raises InputError for a missing or a broken file.

    `kind` is the file's, which its codes begin with: `experiment-missing`, `experiment-syntax`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError(f"{kind}-missing", f"{path}: there is no such file") from error
    except IsADirectoryError as error:
        raise InputError(f"{kind}-missing", f"{path}: this is a folder; give the {kind} file in it") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{kind}-missing", f"{path}: cannot be read as text ({error})") from error
    try:
        return tomllib.loads(text), text
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{kind}-syntax", f"{path}: not valid TOML: {error}") from error


def write(tables: Mapping[str, Any]) -> str:
    """Return tables as TOML text; keys whose value is None are left out."""
    return tomli_w.dumps(_without_none(tables))


def line_of(text: str, path: tuple[str, ...]) -> int | None:
    """Return the line (from 1) where a key stands, given its tables and name; its table's line if the key has none."""
    table: tuple[str, ...] = ()
    table_line = None
    for number, line in enumerate(text.splitlines(), start=1):
        if match := _TABLE.match(line):
            table = _split(match[1])
            if table == path[: len(table)]:
                table_line = number
        elif match := _KEY.match(line):
            full = (*table, *_split(match[1]))
            # An inline table or a dotted key ends before the whole path does.
            if full == path[: len(full)]:
                return number
    return table_line


def parse_override(text: str) -> tuple[tuple[str, ...], Any]:
    """Return path and value of `table.key=value`; a value that is no TOML is taken as a string."""
    name, separator, value = text.partition("=")
    path = _split(name)
    if not separator or len(path) < 2 or not all(path):
        raise InputError("experiment-key", f"--set {text}: write it as table.key=value, like train.epochs=2")
    try:
        return path, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return path, value.strip()


def apply_override(tables: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Set the value at a path of nested tables."""
    for part in path[:-1]:
        tables = tables.setdefault(part, {})
        if not isinstance(tables, dict):
            raise InputError("experiment-key", f"--set {'.'.join(path)}: {part} is not a table")
    tables[path[-1]] = value


def _split(dotted: str) -> tuple[str, ...]:
    return tuple(part.strip().strip("\"'") for part in dotted.split("."))


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, tuple | list):
        return [_without_none(item) for item in value]
    return value
