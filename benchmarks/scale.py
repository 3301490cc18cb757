"""What a large population costs: logistic regression over many small clients, a cohort of them a round.

    python benchmarks/scale.py [--clients 100000] [--cohort 1000] [--rounds 5] [--workers 2] [--private]

Prints one line of JSON: clients a second after the first round, seconds until it began, the peak of this process's
memory, and its bytes a client beyond the records: what each client takes that a fifth of them, in a process of its own,
do not. A round should cost by its cohort, not by the population.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
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


def peak_of_fewer(options: argparse.Namespace, clients: int) -> float:
    """Return the MiB that a process with so many clients takes; before this one has grown, which it would count."""
    asked = {"clients": clients, "cohort": options.cohort, "workers": options.workers, "rounds": 1}
    flags = ["--alone", *(["--private"] if options.private else []), *(f"--{key}={asked[key]}" for key in asked)]
    line = subprocess.run([sys.executable, __file__, *flags], check=True, capture_output=True).stdout
    return float(json.loads(line)["peak_mib"])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--clients", type=int, default=100_000, help="the population (default 100,000)")
    parser.add_argument("--cohort", type=int, default=1_000, help="clients of a round (default 1,000)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default 5)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="worker processes")
    parser.add_argument("--private", action="store_true", help="with record-level privacy")
    parser.add_argument("--alone", action="store_true", help="without the run of a fifth of the clients")
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
    few = max(options.cohort, options.clients // 5)
    fewer = None if options.alone else peak_of_fewer(options, few)
    begun, marks = time.perf_counter(), list[float]()

    def mark(event: Event) -> None:
        if isinstance(event, RoundFinished) or (isinstance(event, RoundStarted) and not marks):
            marks.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        bract.simulate(experiment, out=Path(folder) / "run", listeners=[mark])
    found = {
        "clients_per_s": options.rounds * options.cohort / (marks[-1] - marks[1]),
        "seconds_to_begin": marks[0] - begun,
        "peak_mib": peak() / 2**20,
    }
    if fewer is not None:
        more = (found["peak_mib"] - fewer) * 2**20 / max(1, options.clients - few)
        found["bytes_a_client_beyond_records"] = more - RECORDS * (FEATURES * 4 + 8)
    machine = {"cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}
    about = {"clients": options.clients, "cohort": options.cohort, "private": options.private, "machine": machine}
    print(json.dumps({**{name: round(value, 1) for name, value in found.items()}, **about}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
