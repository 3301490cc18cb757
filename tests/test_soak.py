"""Long chaos and scale tests: `make soak`."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest

import bract

pytestmark = pytest.mark.soak

CHILD = """
import sys, bract
path, out = sys.argv[1:]
listeners = [lambda event: print(type(event).__name__, flush=True)]
from pathlib import Path
begun = (Path(out) / "manifest.json").exists()
where = {"resume": out} if begun else {"source": path, "out": out}
result = bract.simulate(**where, listeners=listeners)
print("sha", result.model_sha256, flush=True)
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_random_kills_end_in_the_same_model_as_a_quiet_run(tiny, tmp_path, workers):
    """SIGKILL after a random share of a second of training, again and again, until the run gets through."""
    keys = {
        "privacy.unit": "record",
        "privacy.noise_multiplier": 4.0,
        "experiment.rounds": 300,
        "task.records": 120,
        "server.checkpoint_every": 0.0,
        "simulation.workers": workers,
    }
    quiet = bract.simulate(tiny(**keys), out=tmp_path / "quiet")
    path, out = tmp_path / "chaos.toml", tmp_path / "run"
    path.write_text(tiny(**keys).to_toml())
    chance = random.Random(workers)
    kills = 0
    for _ in range(200):
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(path), str(out)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        last = ""
        for last in child.stdout:
            if last.startswith("RoundStarted") and kills < 15:
                time.sleep(chance.uniform(0.0, 1.0))
                os.kill(child.pid, signal.SIGKILL)
                kills += 1
                break
        child.stdout.close()
        child.wait()
        if last.startswith("sha"):
            break
    assert kills == 15
    assert last.split() == ["sha", quiet.model_sha256]
    rounds = [json.loads(line)["round"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rounds == list(range(1, 301))


def test_a_population_of_ten_thousand_clients(tiny, tmp_path):
    """A round costs by its cohort; the population costs its data and little more."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    keys = {
        "task.clients": 10_000,
        "task.records": 20,
        "clients.sampling": "fixed",
        "clients.per_round": 100,
        "experiment.rounds": 20,
        "privacy.unit": "record",
        "privacy.noise_multiplier": 4.0,
        "train.batch_size": 20,
    }
    result = bract.simulate(tiny(**keys), out=tmp_path / "run")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"\n10,000 clients: {result.record['clients_per_second']} clients a second, {grown:.0f} MiB more")
    assert result.status == "completed"
    assert set(result.guarantee.per_client) == {"min", "p25", "median", "p75", "max"}
    assert grown < 1500
