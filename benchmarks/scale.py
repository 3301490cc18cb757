"""What a large population costs: logistic regression over many small clients, a cohort of them a round.

    python benchmarks/scale.py [--clients 100000] [--cohort 1000] [--rounds 5] [--workers 2] [--private]

Prints one line of JSON: clients a second after the first round, seconds until it began, the peak of this process's
memory, and its bytes a client beyond the records. A round should cost by its cohort, not by the population.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import bract
import bract.simulations.run  # else its imports would count as the population's memory
from bract.experiment import Experiment
from bract.server.events import Event, RoundFinished, RoundStarted

RECORDS, FEATURES = 20, 8


def peak() -> int:
    """Return the most bytes that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--clients", type=int, default=100_000, help="the population (default 100,000)")
    parser.add_argument("--cohort", type=int, default=1_000, help="clients of a round (default 1,000)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default 5)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="worker processes")
    parser.add_argument("--private", action="store_true", help="with record-level privacy")
    options = parser.parse_args(arguments)
    privacy = {"unit": "record", "noise_multiplier": 4.0} if options.private else {}
    experiment = Experiment.of(
        {
            "experiment": {"name": "scale", "rounds": options.rounds + 1},
            "task": {"name": "synthetic", "clients": options.clients, "records": RECORDS, "features": FEATURES},
            "clients": {"sampling": "fixed", "per_round": options.cohort},
            "train": {"batch_size": 10, "learning_rate": 0.1},
            "privacy": privacy,
            "simulation": {"workers": options.workers, "curves": False, "baselines": False},
        }
    )
    begun, before, marks = time.perf_counter(), peak(), list[float]()

    def mark(event: Event) -> None:
        if isinstance(event, RoundFinished) or (isinstance(event, RoundStarted) and not marks):
            marks.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        bract.simulate(experiment, out=Path(folder) / "run", listeners=[mark])
    data = options.clients * RECORDS * (FEATURES * 4 + 8)
    found = {
        "clients_per_s": options.rounds * options.cohort / (marks[-1] - marks[1]),
        "seconds_to_begin": marks[0] - begun,
        "peak_mib": peak() / 2**20,
        "bytes_a_client_beyond_records": (peak() - before - data) / options.clients,
    }
    machine = {"cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}
    about = {"clients": options.clients, "cohort": options.cohort, "private": options.private, "machine": machine}
    print(json.dumps({**{name: round(value, 1) for name, value in found.items()}, **about}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
