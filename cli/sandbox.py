"""`bract sandbox`: a server and its clients as processes on this machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..experiment import Experiment
from ..simulations.experiments import DEFAULT_EXPERIMENT
from .output import JsonOption, status


def sandbox(
    file: Annotated[
        Path | None, typer.Argument(help="Experiment file (TOML); without it: four hospitals, heart disease.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Set a key of the file.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The run directory; by default runs/<time>-<name>.")
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep the sites' identities, policies, ledgers and logs in this folder."),
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Run an experiment as a federation on this machine: a server, a process for each client, mutual TLS, ledgers."""
    path = file or DEFAULT_EXPERIMENT
    experiment = Experiment.load(path, overrides=overrides or ())
    with status("loading torch and flwr"):
        from ..simulations.sandbox.sandbox import sandbox as run
    return run(
        experiment,
        file=path,
        overrides=overrides or (),
        out=out,
        as_json=as_json,
        keep=keep,
        notice=lambda text: print(text, file=sys.stderr, flush=True),
    )
