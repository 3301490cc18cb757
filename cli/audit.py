"""`bract audit`: hold what the program does against what it claims."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..experiment import Experiment
from ..simulations.experiments import DEFAULT_EXPERIMENT
from .output import JsonOption, finish, print_error, print_json, status, wrapped


class Depth(StrEnum):
    """How thorough an audit is."""

    quick = "quick"


def audit(
    depth: Annotated[Depth, typer.Argument(help="How thorough: quick takes less than a minute.")],
    file: Annotated[
        Path | None, typer.Argument(help="Experiment file (TOML); without it: four hospitals, heart disease.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Set a key of the file.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run the plan of an experiment and check sensitivity, noise, batches, what leaves and what is charged."""
    experiment = Experiment.load(file or DEFAULT_EXPERIMENT, overrides=overrides or ())
    started = time.monotonic()
    found = []
    with status("putting the experiment together"):
        from ..simulations.audit.run import checks_of, quick

        findings = quick(experiment)
        finding = next(findings, None)
    names = checks_of(experiment)
    width = max(13, *map(len, names))
    while finding is not None:
        found.append(finding)
        if not as_json:
            first = f"{finding.verdict:<12} {finding.name:<{width}} "
            print("\n".join(wrapped(finding.sentence, first=first)), flush=True)
        with status(f"checking {names[len(found)]}" if len(found) < len(names) else "ending"):
            finding = next(findings, None)
    failed = [each for each in found if each.passed is False]
    sentence = f"{experiment.experiment.name}: {len(failed)} of {len(found)} checks failed: " + ", ".join(
        each.name for each in failed
    )
    if as_json:
        error = {"error": {"code": "audit-failed", "sentence": sentence}} if failed else {}
        print_json(
            {
                "schema": 1,
                "status": "failed" if failed else "completed",
                "experiment": experiment.experiment.name,
                "unit": experiment.privacy.unit,
                "checks": [each.to_dict() for each in found],
                "seconds": round(time.monotonic() - started, 3),
                **error,
            }
        )
    if failed:
        print_error(sentence, code="audit-failed")
        finish(1)
