"""What a run writes down, and what is charged for it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from ....server.accounts import accounts_of
from ..finding import Finding, failed
from .subject import ClientSubject
from .whole_run import MARKS

_LISTED = ("metrics.jsonl", "result.json", "manifest.json")


def release(subject: ClientSubject) -> Finding:
    """What a run writes down tells nothing of its cohorts: no name, count, metric or failure of a client.

    Of two runs with the same sums, one has a cohort of one client, the other several with other counts, numbers and
    failures. But for times, nothing that may be passed on may differ by a byte, and nothing else may be open to others.
    """
    one, other = subject.whole.files
    # The report of the first run is not drawn: a page of what is compared here.
    for name in sorted(
        name for name in set(one) ^ set(other) if name != "report.html" and not name.startswith("plots")
    ):
        return failed("release", f"{name} is written for some cohorts and not for others", {"file": name})
    for name in sorted(set(one) & set(other)):
        if name.endswith((".json", ".jsonl", ".safetensors", ".toml")) and one[name] != other[name]:
            what = "the model" if name.endswith(".safetensors") else _differing(one[name], other[name])
            return failed("release", f"{name}: {what} depends on the cohort", {"file": name})
    for name in sorted(other):
        if name == "experiment.toml" or name.endswith((".png", ".safetensors")):
            continue
        text = other[name].decode(errors="replace")
        for mark in MARKS:
            if str(mark) in text or f"{mark:,}" in text:
                return failed("release", f"{name} holds a number that a client sent", {"file": name})
        for client in subject.federation.names if name in _LISTED else ():
            if re.search(rf"(?<![\w.-]){re.escape(client)}(?![\w.-])", text) and not _said_by_the_user(subject, client):
                return failed("release", f"{name} names the client {client}", {"file": name, "client": client})
    if subject.whole.open:
        return failed("release", f"{subject.whole.open[0]} may be read by others", {"open": subject.whole.open})
    return Finding(
        name="release",
        passed=True,
        sentence=f"nothing of a cohort is in the {len(other)} files that may be passed on: no name, count, metric or "
        "failure",
        figures={"files": sorted(other)},
    )


def ledger(subject: ClientSubject) -> Finding:
    """Every round that ran is charged to everybody, and no round past the planned ones is allowed."""
    ran, charged = subject.whole.ran, max(subject.whole.charged.values(), default=0)
    if subject.sites is not None:
        # A client is in no more rounds than its plan has updates for.
        ran = max(ran, subject.whole.asked)
    if charged != ran:
        return failed("ledger", f"{ran} rounds ran, and {charged} were charged", {"ran": ran, "charged": charged})
    accounts = accounts_of(subject.plan, rounds=subject.planned, epsilon_budget=None)
    names = list(subject.federation.names)
    for _ in range(subject.planned):
        accounts.charge(names[:1])
    if accounts.allows(names[:1]):
        return failed(
            "ledger", f"more rounds than the planned {subject.planned} are allowed", {"planned": subject.planned}
        )
    return Finding(
        name="ledger",
        passed=True,
        sentence=f"{ran} rounds ran and {charged} were charged; no more than the planned {subject.planned} are allowed",
        figures={"ran": ran, "charged": charged, "planned": subject.planned},
    )


def counts_in(files: Mapping[str, bytes], names: Sequence[str]) -> str | None:
    """Return the client whose number of records manifest.json tells."""
    sites = json.loads(files["manifest.json"]).get("sites", {})
    return next((name for name in names if name in sites), None)


def _said_by_the_user(subject: ClientSubject, client: str) -> bool:
    """Return whether the experiment file itself has a word, such as the task's name, that is also a client's."""
    return re.search(rf"(?<![\w.-]){re.escape(client)}(?![\w.-])", subject.experiment.to_toml()) is not None


def _differing(one: bytes, other: bytes) -> str:
    """Return the first key in which two JSON objects differ, line by line."""
    for left, right in zip(one.splitlines(), other.splitlines(), strict=False):
        try:
            ours, theirs = json.loads(left), json.loads(right)
        except ValueError:
            break
        for key in sorted(set(ours) | set(theirs)):
            if ours.get(key) != theirs.get(key):
                return str(key)
    return "its content"
