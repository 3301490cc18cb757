"""`bract report`: the page of a run, written again from its directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import InputError
from .output import JsonOption, print_json, status


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory: the one that holds manifest.json.")],
    released: Annotated[
        bool, typer.Option("--released", help="Leave out what is not private: a page that may be passed on.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write report.html and the plots of a run again, and print where the page lies."""
    if not (run / "manifest.json").is_file():
        raise InputError("run-missing", f"RUN = {run}: holds no manifest.json; give the run directory itself")
    with status("drawing the report"):
        from ..reports.page import write_report

        page = write_report(run, released_only=released)
    if as_json:
        print_json({"schema": 1, "report": str(page)})
    else:
        print(page)
