"""`bract explain`: what an error code means and what to do."""

from __future__ import annotations

from dataclasses import asdict
from difflib import get_close_matches
from typing import Annotated

import typer

from ..core.errors import CATALOGUE
from .output import JsonOption, print_json, print_table, wrapped


def explain(
    code: Annotated[str | None, typer.Argument(metavar="[CODE]", help="An error code; none lists all.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what an error code means and what to do; without a code, list all."""
    if code is None:
        if as_json:
            print_json({"schema": 1, "codes": {name: asdict(entry) for name, entry in CATALOGUE.items()}})
        else:
            print_table(("code", "meaning"), [(name, entry.meaning) for name, entry in CATALOGUE.items()])
        return
    if code not in CATALOGUE:
        near = get_close_matches(code, CATALOGUE, n=1)
        hint = f"did you mean {near[0]}?" if near else "`bract explain` lists all"
        raise typer.BadParameter(f"there is no error code {code!r}; {hint}")
    entry = CATALOGUE[code]
    if as_json:
        print_json({"schema": 1, "code": code, **asdict(entry)})
        return
    print(code)
    for title, text in (("meaning", entry.meaning), ("mend", entry.mend)):
        print("\n".join(wrapped(text, first=f"  {title:<9}")))
