"""simulation.executor: the same model wherever virtual clients run, on a Ray cluster too."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys

import pytest

import bract
from bract.core.errors import InputError, RunError
from bract.server.events import ClientReplied

has_ray = importlib.util.find_spec("ray") is not None
PRIVATE = {"privacy.unit": "record", "privacy.noise_multiplier": 4.0}


@pytest.mark.skipif(not has_ray, reason="needs Ray")
@pytest.mark.parametrize("keys", [PRIVATE, {"strategy.name": "flwr.serverapp.strategy:FedMedian"}])
def test_a_ray_cluster_gives_the_bytes_of_one_process(tiny, tmp_path, keys):
    keys = {"task.clients": 7, "experiment.rounds": 3, "privacy.randomness": "seed", **keys}
    sums = {
        where: bract.simulate(
            tiny(**keys, **{"simulation.executor": where, "simulation.workers": 2}), out=tmp_path / where
        ).model_sha256
        for where in ("inline", "ray")
    }
    assert sums["inline"] == sums["ray"]


def test_processes_can_be_asked_for_where_they_would_not_pay(tiny, tmp_path):
    keys = {"task.clients": 4, "experiment.rounds": 2}
    sums = {}
    for where in ("inline", "processes"):
        sums[where] = bract.simulate(tiny(**keys, **{"simulation.executor": where}), out=tmp_path / where).model_sha256
    assert sums["inline"] == sums["processes"]


def test_ray_is_asked_for_in_words(tiny, tmp_path, monkeypatch):
    # None in its place is what Python takes for a package that is not there.
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match="pip install ray"):
        bract.simulate(tiny(**{"simulation.executor": "ray"}), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_objects_of_a_program_train_in_it(tiny, tmp_path):
    from bract.strategies.fedavg import FedAvg

    with pytest.raises(InputError, match="object of this program"):
        bract.simulate(tiny(**{"simulation.executor": "processes"}), strategy=FedAvg(), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not has_ray, reason="needs Ray")
def test_a_run_that_lost_an_actor_goes_on_to_the_same_bytes(tiny, tmp_path):
    """The checkpoint of the round before is there, and what the lost round drew is drawn again."""
    keys = {"task.clients": 6, "experiment.rounds": 5, "server.checkpoint_every": 0.0, "simulation.workers": 2}
    quiet = bract.simulate(tiny(**keys, **{"simulation.executor": "inline"}), out=tmp_path / "quiet")

    def kill(event):
        if isinstance(event, ClientReplied) and event.round == 3:
            table = subprocess.run(["ps", "-wweo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
            rows = [line.split(None, 2) for line in table.splitlines()[1:]]
            mine = {os.getpid()}
            for _ in range(4):
                mine |= {int(pid) for pid, parent, _ in rows if int(parent) in mine}
            for actor in [int(pid) for pid, _, args in rows if int(pid) in mine and args.startswith("ray::Actor")]:
                os.kill(actor, signal.SIGKILL)

    run = tmp_path / "run"
    with pytest.raises(RunError, match=r"a Ray worker was lost .* go on with --resume"):
        bract.simulate(tiny(**keys, **{"simulation.executor": "ray"}), out=run, listeners=[kill])
    assert 2 <= len((run / "metrics.jsonl").read_text().splitlines()) < 5
    resumed = bract.simulate(resume=run)
    assert resumed.record["rounds"] == 5
    assert resumed.model_sha256 == quiet.model_sha256
