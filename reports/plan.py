"""What `bract plan` shows: who holds how much of what, under which noise, at which cost, in at most 100 columns."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import words

WIDTH = 100
LISTED = 20
"""Clients listed one by one where there are no more of them; of more, the first few and quantiles."""
FIRST = 5
COLUMNS = 4
"""Classes that get a column of counts each; more are drawn as bars, one character a class."""
DRAWN = 16
_BARS = "▁▂▃▄▅▆▇█"
_MECHANISM = ("q", "steps", "noise", "epsilon", "replace-one")


def print_plan(described: Mapping[str, Any], console: Console | None = None) -> None:
    """Print what `simulations.description.describe` found."""
    console = console or Console(highlight=False, width=min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns))
    parameters, sent, sites = described["parameters"], described["bytes"], described["sites"]
    console.print(
        f"[bold]{escape(described['experiment'])}[/]: {escape(described['task'])}, {described['rounds']} rounds, "
        f"{described['clients']:,} clients, {described['cohort']} a round"
    )
    console.print(
        f"{parameters['shared']:,} parameters travel: {sent['client_round']:,} bytes a client and round, "
        f"{sent['run']:,} in all"
    )
    if sent["saved"]:
        whole = sent["up"] + sent["saved"]
        console.print(f"updates are compressed: {sent['up']:,} bytes up instead of {whole:,}")
    for note in described["notes"]:
        console.print(escape(note))
    many = len(sites) > LISTED
    if many:
        console.print(_quantiles(described["distribution"]))
    if len(described["classes"]) > COLUMNS:
        console.print(_legend(described), style="dim")
    if sites:
        console.print(_sites(described, list(sites)[: FIRST if many else LISTED]))
    if many:
        console.print(f"… and {len(sites) - FIRST:,} more clients; --json lists all")
    evaluation, aggregate = described["evaluation"], described["aggregate"]
    if aggregate is not None:
        console.print(_mechanism(aggregate))
    if described["local"] is not None:
        console.print(_local(described["local"]))
    if evaluation is None:
        console.print("metrics: withheld")
    elif evaluation["epsilon"] is not None:
        console.print(
            f"metrics: released {words.plural(evaluation['releases'], 'time')} from test records, "
            f"epsilon {words.epsilon(evaluation['epsilon'])} in all"
        )
    console.print(escape(described["guarantee"]["sentence"]))
    trials = described["trials"]
    while trials is not None:
        console.print(_trials(trials))
        if trials["best"] is not None:
            console.print(_selection(trials["best"]), style="dim")
        trials = trials["record"]


def _mechanism(aggregate: Mapping[str, Any]) -> str:
    """The client-level mechanism in one line."""
    norm = f"{words.number(aggregate['clipping_norm'])}{' at first' if aggregate['adaptive_clipping'] else ''}"
    return (
        f"server: updates clipped to {norm}, noise multiplier {aggregate['update_noise_multiplier']:.3f}, cohorts of "
        f"{aggregate['cohort']:,} ({aggregate['sampling']}, q = {aggregate['sampling_rate']:.4g})"
    )


def _local(local: Mapping[str, Any]) -> str:
    """What each client does to its updates, in one line."""
    return (
        f"clients: each of at most {local['participations']} updates clipped to "
        f"{words.number(local['clipping_norm'])}, noise multiplier {local['noise_multiplier']:.3f}"
    )


def _trials(trials: Mapping[str, Any]) -> Table:
    """One run, all runs and the best run: epsilon, and what may be released for it."""
    table = _table(f"tuning, one {trials['unit']} (delta {words.delta(trials['delta'])})")
    table.add_column("epsilon", justify="right")
    table.add_column("what may be released")
    for heading, priced in (
        ("one run", trials["one"]),
        (f"{trials['runs']:,} runs, all released", trials["all"]),
        (f"best of about {trials['runs']:,}", trials["best"]),
    ):
        if priced is None:
            table.add_row(heading, words.DASH, "no choice hides a run whose updates a server has seen")
        else:
            table.add_row(heading, _bound(priced["epsilon"]), escape(priced["released"]))
    return table


def _selection(best: Mapping[str, Any]) -> str:
    """How the best run must be chosen for its epsilon to hold."""
    others = " and ".join(
        f"{each['distribution']} {_bound(each['epsilon'])} (at most {each['median']:,})" for each in best["others"]
    )
    return (
        f"To release the best alone, draw a secret number of runs beforehand: {best['distribution']} with parameter "
        f"{best['parameter']:.4g}, mean {best['mean']:,}, half of the time at most {best['median']:,}. Other numbers "
        f"cost more: {others}. Draw what each run tries from a list fixed in advance. Whoever sees other runs, too, "
        "counts all of them. See docs/tuning.md."
    )


def _bound(epsilon: float | None) -> str:
    return words.epsilon(math.inf if epsilon is None else epsilon)


def _quantiles(distribution: Mapping[str, Any]) -> Table:
    """Each property of the clients as five quantiles over them."""
    table = _table("over the clients")
    for heading in ("least", "5 %", "median", "95 %", "most"):
        table.add_column(heading, justify="right")
    for name, heading, write in (
        ("train_records", "training records", _whole),
        ("test_records", "test records", _whole),
        ("classes_present", "classes present", _whole),
        ("largest_class", "share of the largest class", _share),
        ("distance", "distance from the mix of all", _share),
        ("noise_multiplier", "noise multiplier", words.number),
        ("epsilon", "epsilon", words.epsilon),
    ):
        if name in distribution:
            table.add_row(heading, *(write(value) for value in distribution[name]))
    return table


def _legend(described: Mapping[str, Any]) -> str:
    classes = described["classes"]
    if len(classes) > DRAWN:
        return f"{len(classes)} classes"
    return escape(f"labels: {', '.join(words.shortened(name, 20) for name in classes)}")


def _sites(described: Mapping[str, Any], names: Sequence[str]) -> Table:
    """One client a row: records, labels, and the mechanism where there is one."""
    sites, classes = described["sites"], described["classes"]
    private = any("epsilon" in sites[name] for name in names)
    counted = len(classes) <= COLUMNS
    table = _table("client")
    for heading in ("train", "test", *(classes if counted else ())):
        table.add_column(escape(words.shortened(heading, 14)), justify="right")
    if not counted:
        table.add_column("labels")
        table.add_column("largest")
    for heading in _MECHANISM if private else ():
        table.add_column(heading, justify="right")
    for name in names:
        site = sites[name]
        labels = site["labels"]
        row = [escape(words.shortened(name, 16)), str(site["train_records"]), str(site["test_records"])]
        row += [str(count) for count in labels] if counted else _drawn(labels, classes, named=not private)
        if private:
            row += [f"{site['sampling_rate']:.4f}", str(site["steps"]), f"{site['noise_multiplier']:.3f}"]
            row += [words.epsilon(site["epsilon"]), words.epsilon(site["epsilon_replace_one"])]
        table.add_row(*row)
    return table


def _drawn(labels: Sequence[int], classes: Sequence[str], *, named: bool) -> list[str]:
    """A bar for each class, and the share of the largest one; many classes are counted instead."""
    most = max(labels)
    if len(classes) > DRAWN:
        bars = f"{sum(count > 0 for count in labels)} of {len(classes)}"
    else:
        # A class that is there at all gets a bar.
        bars = "".join(_BARS[-(-count * len(_BARS) // most) - 1] if count else "·" for count in labels)
    name = f" {escape(words.shortened(classes[labels.index(most)], 20))}" if named else ""
    return [bars, f"{_share(most / sum(labels))}{name}"]


def _table(first: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(first)
    return table


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _share(value: float) -> str:
    return f"{100 * value:.0f} %"
