"""`bract simulate`: virtual clients on this machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import InputError
from ..experiment import Experiment
from ..simulations.experiments import DEFAULT_EXPERIMENT
from .output import JsonOption, print_json, status


def simulate(
    file: Annotated[
        Path | None, typer.Argument(help="Experiment file (TOML); without it: four hospitals, heart disease.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Set a key of the file.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The run directory; by default runs/<time>-<name>.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Go on with an interrupted run.")] = None,
    track: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Also write to tensorboard or mlflow; may be repeated.")
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Show where the time went, and leave a trace for Perfetto.")
    ] = False,
    as_json: JsonOption = False,
) -> int:
    """Train over virtual clients and leave a run directory with model, guarantee and report."""
    if resume is not None and (file is not None or overrides or out is not None):
        raise InputError("experiment-conflict", "--resume RUN: goes alone; a run keeps experiment and directory")
    # Read before torch and flwr are imported, so that a wrong file is refused at once.
    experiment = None if resume else Experiment.load(file or DEFAULT_EXPERIMENT, overrides=overrides or ())

    with status("loading torch, opacus and flwr"):
        from ..reports.progress import Progress
        from ..reports.summary import print_summary
        from ..reports.tracking import tracking
        from ..server.events import Notice
        from ..simulations.run import simulate as run
    with (
        Progress() as progress,
        tracking(track or (), warn=lambda text: progress(Notice(text=text))) as trackers,
    ):
        result = run(experiment, out=out, resume=resume, listeners=[progress, *trackers], profile=profile)
    if profile:
        print((result.run_dir / "private" / "profile.txt").read_text(), file=sys.stderr)
        print(f"trace, for ui.perfetto.dev: {result.run_dir / 'private' / 'profile.json'}\n", file=sys.stderr)
    if as_json:
        print_json(result.record)
    else:
        print_summary(result.run_dir)
    if result.status == "interrupted":
        print(f"to go on: bract simulate --resume {result.run_dir}", file=sys.stderr)
    return result.exit_status
