"""`bract plan`: epsilon, noise, bytes and steps before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..experiment import Experiment
from ..simulations.experiments import DEFAULT_EXPERIMENT
from .output import JsonOption, print_json, status

SHOWN_SITES = 20


def plan(
    file: Annotated[
        Path | None, typer.Argument(help="Experiment file (TOML); without it: four hospitals, heart disease.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Set a key of the file.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what an experiment will do and what it will cost, before it runs."""
    experiment = Experiment.load(file or DEFAULT_EXPERIMENT, overrides=overrides or ())
    with status("calibrating noise"):
        from ..simulations.description import describe

        described = describe(experiment)
    if as_json:
        print_json(described)
    else:
        _print(described)


def _print(described: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    parameters, sent, sites = described["parameters"], described["bytes"], described["sites"]
    console.print(f"[bold]{described['experiment']}[/]: {described['task']}, {described['rounds']} rounds")
    console.print(
        f"{described['clients']} clients, {described['cohort']} a round; {parameters['shared']:,} parameters travel, "
        f"{sent['client_round']:,} bytes a client and round, {sent['run']:,} in all"
    )
    for note in described["notes"]:
        console.print(note)
    private = any("epsilon" in site for site in sites.values())
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("client")
    for heading in ("train", "test", *described["classes"][:4]):
        table.add_column(heading, justify="right")
    if private:
        for heading in ("q", "steps", "noise", "epsilon", "replace-one"):
            table.add_column(heading, justify="right")
    for name, site in list(sites.items())[:SHOWN_SITES]:
        row = [name, str(site["train_records"]), str(site["test_records"]), *map(str, site["labels"][:4])]
        if private:
            row += [f"{site['sampling_rate']:.4f}", str(site["steps"]), f"{site['noise_multiplier']:.3f}"]
            row += [f"{site['epsilon']:.3f}", f"{site['epsilon_replace_one']:.3f}"]
        table.add_row(*row)
    console.print(table)
    if len(sites) > SHOWN_SITES:
        console.print(f"… and {len(sites) - SHOWN_SITES} more clients; --json lists all")
    evaluation = described["evaluation"]
    if evaluation["epsilon"] is not None:
        console.print(
            f"metrics: released {evaluation['releases']} time(s) from test records, "
            f"epsilon {evaluation['epsilon']:.3g} in all"
        )
    console.print(described["guarantee"]["sentence"])
