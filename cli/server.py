"""`bract server`: the coordinator of a federation."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..core.errors import InputError
from ..experiment import Experiment
from .output import JsonOption, print_json, status


def server(
    file: Annotated[Path | None, typer.Argument(help="Experiment file (TOML), the same that simulates.")] = None,
    listen: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where clients connect; with --resume by default as before.")
    ] = None,
    identity: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The server's identity (`bract provision server`).")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Without certificates; on this machine's loopback alone.")
    ] = False,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Set a key of the file.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The run directory; by default runs/<time>-<name>.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Go on with a run that was stopped or killed.")
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Serve /metrics in Prometheus' format there.")
    ] = None,
    log_format: Annotated[
        Literal["text", "json"], typer.Option(help="What stderr gets: a display, or a JSON object an event.")
    ] = "text",
    as_json: JsonOption = False,
) -> int:
    """Wait for clients, train with them round by round, and leave a run directory with model, guarantee and report."""
    if resume is not None and (file is not None or overrides or out is not None):
        raise InputError("experiment-conflict", "--resume RUN: goes without FILE, --set and --out; a run keeps them")
    if resume is None and file is None:
        raise InputError("usage", "FILE: missing; give an experiment file, or --resume RUN")
    if (identity is None) != insecure:
        raise InputError(
            "usage", "--identity DIR: is how a server is known; or give --insecure, on the loopback alone, not both"
        )
    # Read before torch and flwr are imported, so that a wrong file is refused at once.
    experiment = None if file is None else Experiment.load(file, overrides=overrides or ())

    with status("loading torch, opacus and flwr"):
        from ..reports.service import service
    with service(listen=listen, identity=identity, metrics=metrics, log_format=log_format) as run:
        result = run(experiment, out=out, resume=resume)
    if as_json:
        print_json(result.record)
    elif log_format == "text":
        from ..reports.summary import print_summary

        print_summary(result.run_dir)
    if result.status == "interrupted":
        print(f"to go on: bract server --resume {result.run_dir} …", file=sys.stderr)
    return result.exit_status
