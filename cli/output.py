"""What commands print: one JSON object, a plain table, or one sentence about what went wrong."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]


def print_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object on stdout; a number that is not finite is an error of bract, never invalid JSON."""
    indent = 2 if sys.stdout.isatty() else None
    print(json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent), flush=True)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print aligned columns; the last one wraps at the width of the terminal."""
    lines = [[column.upper() for column in columns], *rows]
    widths = [max(len(line[place]) for line in lines) for place in range(len(columns) - 1)]
    for line in lines:
        head = "".join(f"{cell:<{width}}  " for cell, width in zip(line, widths, strict=False))
        print("\n".join(wrapped(line[-1], first=head)).rstrip())


def wrapped(text: str, *, first: str) -> list[str]:
    """Return a text as lines that stand beside `first`, within the terminal's width."""
    room = max(24, shutil.get_terminal_size((100, 24)).columns - len(first))
    lines = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False) or [""]
    return [first + lines[0], *(" " * len(first) + line for line in lines[1:])]


def print_error(sentence: str, *, code: str | None = None) -> None:
    """Print one sentence on stderr, and where to read more about its code."""
    print(f"error: {sentence}", file=sys.stderr)
    if code is not None:
        print(f"       more: bract explain {code}", file=sys.stderr)
    sys.stderr.flush()


def finish(exit_status: int) -> NoReturn:
    """End the command with an exit status."""
    raise typer.Exit(exit_status)


@contextmanager
def status(text: str) -> Iterator[None]:
    """Show on a terminal's stderr what is being waited for, and wipe it afterwards."""
    shown = sys.stderr.isatty()
    if shown:
        print(f"{text} …", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if shown:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
