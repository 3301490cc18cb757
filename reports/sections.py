"""What the report page says in each of its sections, as plain values for the template."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..privacy.guarantee import rounded_up
from . import words
from .run import RunView

LISTED = 40
"""Above this many sites a table shows how their figures are spread instead of one row for each."""

_VERSIONS = {
    "bract": "bract",
    "python": "Python",
    "torch": "PyTorch",
    "flwr": "Flower",
    "opacus": "Opacus",
    "dp_accounting": "dp-accounting",
    "numpy": "NumPy",
    "platform": "Platform",
    "processor": "Processor",
    "device": "Device",
    "kernel": "Kernel",
    "threads": "Threads",
    "seed": "Seed (public)",
    "created": "Created",
}
_RANDOMNESS = {
    "secret": "from a secret key",
    "seed": "from a published seed: not private towards anyone who knows the seed",
}
_QUANTILES = ("min", "p25", "median", "p75", "max")


def facts(run: RunView) -> list[str]:
    """The line below the title: when, how long, how many."""
    created = str(run.manifest.get("created", ""))
    done = words.plural(run.rounds_run, "round")
    if run.rounds_run != run.rounds_planned:
        done = f"{words.count(run.rounds_run)} of {words.plural(run.rounds_planned, 'round')}"
    clients, parameters = run.manifest.get("clients"), run.manifest.get("parameters")
    model = run.manifest.get("model")
    seconds = run.result.get("seconds")
    found = [
        f"{created[:10]}, {created[11:16]} UTC" if len(created) >= 16 else created,
        done,
        words.plural(int(clients), "site") if clients is not None else "",
        words.printable(str(model)) + " model" if model else "",
        words.plural(int(parameters), "parameter") if parameters is not None else "",
        words.duration(float(seconds)) if seconds is not None else "",
    ]
    return [fact for fact in found if fact]


def figures(run: RunView) -> list[dict[str, Any]]:
    """The large figures: every released metric, and epsilon with what it must never be shown without."""
    found = [
        {
            "label": words.metric(name),
            "value": words.number(value),
            "note": _metric_note(run, name, value),
            "words": False,
        }
        for name, value in run.metrics.items()
    ]
    if run.guarantee is None:
        return found
    if run.guarantee.epsilon is None:
        return [
            *found,
            {
                "label": "Privacy",
                "value": "no guarantee",
                "note": "nothing bounds what the model reveals",
                "words": True,
            },
        ]
    return [
        *found,
        {
            "label": "Epsilon of the whole run",
            "value": rounded_up(run.guarantee.epsilon),
            "note": f"delta {words.delta(run.guarantee.delta)}, for any one {run.guarantee.unit}; "
            "the whole statement is below",
            "words": False,
        },
    ]


def released_lead(run: RunView) -> str:
    """One sentence on how the metrics came out."""
    if not run.metrics and run.released is None:
        return "No metric was released in this run." if run.result else "Nothing has been released yet."
    if run.released is None:
        return ""
    how = "Each site released one histogram of its test records, and every metric here follows from their sum."
    if run.guarantee is not None and run.guarantee.epsilon is None:
        return how + " The counts are exact: no noise was added to them."
    return how


def site_table(run: RunView) -> dict[str, Any] | None:
    """What each site released; the spread where the sites are many."""
    if run.released is None or not run.released.per_site:
        return None
    sites = run.released.per_site
    areas = len(run.classes) == 2 or any(site.scores.auc is not None for site in sites.values())
    columns = ["Site", "Test records", "Accuracy", *(["AUC"] if areas else [])]
    note = ""
    if areas and any(site.scores.auc is None for site in sites.values()):
        note = f"{words.DASH}: fewer than 5 released records of one class, too few for an AUC. "
    if len(sites) > LISTED:
        rows = _spread(
            {
                "Test records": [run.sites[name].test_records for name in sites if name in run.sites],
                "Accuracy": [site.scores.accuracy for site in sites.values()],
                **({"AUC": [site.scores.auc for site in sites.values()]} if areas else {}),
            }
        )
        return {"title": f"Spread over {words.count(len(sites))} sites", "columns": columns, "rows": rows, "note": note}
    rows = [
        [
            words.printable(name),
            _test_records(run, name),
            words.number(site.scores.accuracy),
            *([words.number(site.scores.auc)] if areas else []),
        ]
        for name, site in sites.items()
    ]
    note += "The noise is the same at every site, so it weighs more where the records are few."
    if run.guarantee is None or run.guarantee.epsilon is None:
        note = note.removesuffix("The noise is the same at every site, so it weighs more where the records are few.")
    return {"title": "Released by each site", "columns": columns, "rows": rows, "note": note}


def guarantee(run: RunView) -> dict[str, Any] | None:
    """The guarantee in words: its sentence, its terms, and what it leaves out."""
    given = run.guarantee
    if given is None:
        return None
    terms: list[tuple[str, str | None]] = []
    if given.epsilon is not None:
        replaced = given.replace_one_epsilon
        terms = [
            ("Epsilon", f"{rounded_up(given.epsilon)} over the whole run"),
            ("Delta", words.delta(given.delta)),
            ("Unit", f"one {given.unit}"),
            ("Neighbouring", given.neighbouring),
            (
                "Replace-one",
                None if replaced is None else f"epsilon {rounded_up(replaced)} if any other may take its place",
            ),
            ("Sampler", given.sampler),
            ("Randomness", _RANDOMNESS.get(given.randomness, given.randomness)),
        ]
    terms.append(("Trust", given.trust))
    return {
        "sentence": words.printable(given.sentence),
        "terms": [{"name": name, "value": words.printable(value)} for name, value in terms if value],
        "excludes": [words.printable(item) for item in given.excludes],
    }


def plan_table(run: RunView) -> dict[str, Any] | None:
    """The plan of each site and the epsilon of its records; quantiles where the clients are many."""
    given = run.guarantee
    if given is None or given.epsilon is None:
        return None
    spent = {words.printable(name): value for name, value in given.per_client.items()}
    if spent and set(spent) <= set(_QUANTILES):
        clients = run.manifest.get("clients")
        rows = [
            [{"p25": "25 %", "p75": "75 %"}.get(name, name), words.epsilon(spent[name])]
            for name in _QUANTILES
            if name in spent
        ]
        title = (
            f"Epsilon over {words.plural(int(clients), 'client')}"
            if clients is not None
            else "Epsilon over all clients"
        )
        return {"title": title, "columns": ["", "Epsilon"], "rows": rows, "note": "The largest counts for the run."}
    if not spent:
        return None
    rows = []
    for name in given.per_client:
        site = run.sites.get(name)
        rows.append(
            [
                words.printable(name),
                words.count(site.train_records) if site and site.train_records is not None else words.DASH,
                words.number(site.sampling_rate if site else None, 4),
                words.count(site.steps_per_round) if site and site.steps_per_round is not None else words.DASH,
                words.number(site.noise_multiplier if site else None),
                words.epsilon(given.per_client[name]),
            ]
        )
    return {
        "title": "Each client",
        "columns": ["Client", "Training records", "Sampling rate", "Steps a round", "Noise multiplier", "Epsilon"],
        "rows": rows,
        "note": "No record is at two clients, so the largest epsilon counts for the run.",
    }


def configuration(run: RunView) -> list[dict[str, Any]]:
    """The resolved experiment, table by table, values as TOML writes them."""
    return [
        {"name": name, "entries": [(key, words.printable(_literal(value))) for key, value in table.items()]}
        for name, table in run.experiment.items()
        if table
    ]


def versions(run: RunView) -> list[tuple[str, str]]:
    """Software, machine and seed of the manifest."""
    return [
        (label, words.printable(str(run.manifest[key])))
        for key, label in _VERSIONS.items()
        if run.manifest.get(key) not in (None, "")
    ]


def _metric_note(run: RunView, name: str, value: float | None) -> str:
    if value is None:
        return "fewer than 5 records of a class" if name == "auc" else "no records"
    if run.guarantee is not None and run.guarantee.epsilon is None:
        return "on all test records"
    return "on all test records, as released"


def _literal(value: Any) -> str:
    if isinstance(value, Mapping):
        return (
            "{}" if not value else "{ " + ", ".join(f"{key} = {_literal(item)}" for key, item in value.items()) + " }"
        )
    return json.dumps(value, ensure_ascii=False, default=str)


def _test_records(run: RunView, name: str) -> str:
    """Return how many test records a site has; a real one does not say."""
    site = run.sites.get(name)
    return words.DASH if site is None or site.test_records is None else words.count(site.test_records)


def _spread(columns: Mapping[str, Sequence[float | None]]) -> list[list[str]]:
    rows = []
    for label, pick in (("lowest", min), ("median", statistics.median), ("highest", max)):
        row = [label]
        for name, values in columns.items():
            there = [value for value in values if value is not None]
            digits = 0 if name == "Test records" else 3
            row.append(words.number(float(pick(there)), digits) if there else words.DASH)
        rows.append(row)
    return rows
