"""What the owner's ledger costs: a reservation and its commit, and composing ten thousand entries.

    python benchmarks/ledger.py

Prints one JSON line: milliseconds to reserve and commit one message (its reply fsynced), and seconds to compose 10,000
entries of ten distinct events by privacy loss distributions, and by the Rényi filter, in a process that has the
accountant's libraries loaded.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from statistics import median

from bract.privacy.ledger.composition import DISTINCT, composed
from bract.privacy.ledger.events import Planned, RunPlan, SampledGaussian
from bract.privacy.ledger.ledger import DataSetBudget, Ledger, Request
from bract.privacy.ledger.spending import spent

DELTA = 1e-5


def event(place: int) -> SampledGaussian:
    """Return one of several distinct events."""
    return SampledGaussian(
        sampling_rate=0.01 * (place + 1), noise_multiplier=20.0 + place, steps=1, relation="zero-out", delta=DELTA
    )


def round_trip(messages: int) -> float:
    """Return the median milliseconds of reserve and commit."""
    drawn = event(0)
    plan = RunPlan(digest="plan", events=(Planned(phase="train", event=drawn, times=messages),))
    seconds = []
    with tempfile.TemporaryDirectory() as folder, Ledger.create(Path(folder) / "state") as ledger:
        ledger.declare(DataSetBudget(name="data", unit="record", relation="zero-out", epsilon=8.0, delta=DELTA))
        for number in range(messages):
            asked = Request(
                data_set="data",
                data_digest="digest",
                run="run",
                plan=plan,
                round=number + 1,
                model_version=str(number),
                phase="train",
                message_id=str(number),
                message_digest=f"content {number}",
                event=drawn,
            )
            start = time.perf_counter()
            ledger.commit(ledger.reserve(asked), b"reply" * 1000)
            seconds.append(time.perf_counter() - start)
    return 1000 * median(seconds)


def main() -> None:
    """Print the line."""
    many = {event(place): 10_000 // DISTINCT for place in range(DISTINCT)}
    composed({event(99): 1}, DELTA)  # imports what is needed
    start = time.perf_counter()
    composed(many, DELTA)
    distributions = time.perf_counter() - start
    start = time.perf_counter()
    spent(many, {event(0): 1}, epsilon=8.0, delta=DELTA)
    filtered = time.perf_counter() - start
    found = {
        "reserve_and_commit_ms": round(round_trip(100), 2),
        "compose_10000_s": round(distributions, 2),
        "filter_10000_s": round(filtered, 4),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
