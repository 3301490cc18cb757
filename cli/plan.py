"""`bract plan`: epsilon, noise, bytes and steps before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..experiment import Experiment
from ..simulations.experiments import DEFAULT_EXPERIMENT
from .output import JsonOption, print_json, status


def plan(
    file: Annotated[
        Path | None, typer.Argument(help="Experiment file (TOML); without it: four hospitals, heart disease.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Set a key of the file.")
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(min=2, max=1_000_000, metavar="N", help="Show what N runs cost, all or only the best released."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what an experiment will do and what it will cost, before it runs."""
    experiment = Experiment.load(file or DEFAULT_EXPERIMENT, overrides=overrides or ())
    with status("calibrating noise"):
        from ..reports.plan import print_plan
        from ..simulations.description import describe

        described = describe(experiment, trials=trials)
    if as_json:
        print_json(described)
    else:
        print_plan(described)
