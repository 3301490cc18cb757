"""Worker processes: the same bytes as in one process, whatever their number, and when one of them is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

import bract
from bract.core.errors import InputError
from bract.experiment import Experiment
from bract.server.events import ClientFailed, ClientReplied, RoundFinished
from bract.simulations.executors.orders import Dealing, Order
from bract.simulations.recipe import Recipe
from bract.simulations.sizing import cores, worker_count

PRIVATE = {"privacy.unit": "record", "privacy.noise_multiplier": 4.0, "experiment.rounds": 2}
OWN = """
from bract.tasks.synthetic import Synthetic

class Deadly(Synthetic):
    # The third client ends its process, as one that needs too much memory would.
    def loss(self, outputs, targets):
        import os, multiprocessing
        if self.deadly and len(targets) == self.deadly and multiprocessing.parent_process():
            os._exit(9)
        return super().loss(outputs, targets)

    def __init__(self, *, deadly: int = 0, seed: int = 0):
        super().__init__(clients=6, records=30, features=5, classes=2, seed=seed)
        self.deadly = deadly
"""


def children():
    """Return the ids of this process' children of the workers' kind, and of their children."""
    out = subprocess.run(["ps", "-wweo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    table = [line.split(None, 2) for line in out.splitlines()[1:]]
    mine, found = {os.getpid()}, set()
    for _ in range(3):
        found |= {int(pid) for pid, parent, args in table if int(parent) in mine and "forkserver" in args}
        mine |= found
    return found


@pytest.mark.parametrize(
    "keys",
    [
        {"strategy.weights": "counted"},
        PRIVATE,
        {"strategy.name": "flwr.serverapp.strategy:FedMedian"},
        {"train.model": "mlp", "clients.sampling": "poisson", "clients.per_round": 3},
    ],
    ids=["counted", "private", "flower strategy", "cohorts"],
)
def test_one_two_and_three_processes_give_the_same_bytes(tiny, tmp_path, keys):
    keys = keys | {"task.clients": 7}
    results = [
        bract.simulate(tiny(**keys, **{"simulation.workers": count}), out=tmp_path / str(count)) for count in (1, 2, 3)
    ]
    assert len({result.model_sha256 for result in results}) == 1
    assert len({json.dumps(result.record["released"]) for result in results}) == 1
    lines = [(tmp_path / str(count) / "metrics.jsonl").read_text().splitlines() for count in (1, 2, 3)]
    sent = [[(json.loads(line)["bytes_up"], json.loads(line)["bytes_down"]) for line in each] for each in lines]
    assert sent[0] == sent[1] == sent[2] and sum(up for up, _ in sent[0]) > 0
    assert results[0].guarantee == results[1].guarantee == results[2].guarantee


def test_replies_larger_than_a_pipe_are_read_while_more_is_asked_for(tiny, tmp_path):
    """Each client keeps and sends a megabyte: a worker's answer must not wait for a request that waits for it."""
    keys = {"task.clients": 8, "task.features": 2000, "train.model": "mlp", "train.personal": ("hidden.*",)}
    keys |= {"strategy.name": "flwr.serverapp.strategy:FedMedian", "experiment.rounds": 2, "task.records": 20}
    sums = [
        bract.simulate(tiny(**keys, **{"simulation.workers": count}), out=tmp_path / str(count)).model_sha256
        for count in (1, 2)
    ]
    assert sums[0] == sums[1]


def test_a_killed_worker_is_replaced_and_nothing_changes(tiny, tmp_path):
    killed = []

    def kill(event):
        if isinstance(event, ClientReplied) and event.round in (2, 3) and event.round not in killed:
            # The server of the workers, and other helpers, are those whose parent is this process.
            victims = [pid for pid in sorted(children()) if _is_worker(pid)]
            os.kill(victims[-1], signal.SIGKILL)
            killed.append(event.round)

    keys = {"task.clients": 12, "task.records": 300, "experiment.rounds": 5}
    quiet = bract.simulate(tiny(**keys), out=tmp_path / "quiet")
    result = bract.simulate(tiny(**keys, **{"simulation.workers": 2}), out=tmp_path / "run", listeners=[kill])
    assert killed == [2, 3]
    assert result.model_sha256 == quiet.model_sha256
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["failed"] for line in lines] == [0] * 5


def test_no_worker_is_left_behind(tiny, tmp_path):
    bract.simulate(tiny(**{"simulation.workers": 2}), out=tmp_path / "run")
    left = [pid for pid in children() if len(os.sched_getaffinity(pid)) and _is_worker(pid)]
    assert left == []


def _is_worker(pid):
    out = subprocess.run(["ps", "-o", "ppid=", "-p", str(pid)], capture_output=True, text=True).stdout
    return out.strip() != "" and int(out) != os.getpid()


@pytest.fixture
def own(tiny, tmp_path):
    (tmp_path / "own.py").write_text(OWN)

    def make(**keys):
        experiment = tiny(tmp_path, **{"task.name": "own:Deadly"}, **keys)
        tables = experiment.model_dump(exclude_none=True)
        for name in ("clients", "records", "features", "classes"):
            tables["task"].pop(name)
        return Experiment.of(tables, folder=tmp_path)

    return make


def test_a_client_that_ends_every_process_fails_alone(own, tmp_path):
    events = []
    plain = bract.simulate(own(), out=tmp_path / "plain")
    sizes = json.loads((tmp_path / "plain" / "manifest.json").read_text())["sites"]
    counts = [site["train_records"] % 10 for site in sizes.values()]
    odd = next(count for count in counts if count and counts.count(count) == 1)
    keys = {"task.deadly": odd, "experiment.rounds": 1, "simulation.workers": 2}
    result = bract.simulate(own(**keys), out=tmp_path / "run", listeners=[events.append])
    assert plain.status == result.status == "completed"
    failed = [event.client for event in events if isinstance(event, ClientFailed)]
    assert failed == [list(sizes)[counts.index(odd)]]


def test_a_task_that_a_worker_cannot_make_is_one_sentence(own, tmp_path):
    experiment = own(**{"simulation.workers": 2})
    path = tmp_path / "own.py"
    path.write_text(
        OWN + "\nimport multiprocessing\nif multiprocessing.parent_process():\n    raise ImportError('not here')\n"
    )
    sys.modules.pop("own", None)
    with pytest.raises(InputError) as caught:
        bract.simulate(experiment, out=tmp_path / "run")
    assert "not here" in caught.value.sentence


def test_a_script_without_a_guard_is_not_run_again(tmp_path):
    """Workers must not import the user's script: without `if __name__` it would simulate within each of them."""
    script = tmp_path / "script.py"
    script.write_text(
        "import bract\n"
        "from bract.experiment import Experiment\n"
        "print('once')\n"
        "tables = {'task': {'name': 'synthetic', 'clients': 4, 'records': 20}, 'experiment': {'rounds': 1},"
        " 'simulation': {'workers': 2, 'curves': False, 'baselines': False}}\n"
        "print(bract.simulate(Experiment.of(tables), out='run').status)\n"
    )
    out = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["once", "completed"]


def test_the_rule_is_a_function_of_sizes_alone(tiny):
    def count(**sizes):
        return worker_count(tiny(**{"experiment.rounds": 100}), device="cpu", **sizes)

    assert count(clients=4, records=120, parameters=18) == 1
    assert count(clients=1000, records=60_000, parameters=1_600_000) == min(cores(), 1000)
    assert worker_count(tiny(), clients=1000, records=10**6, parameters=10**6, device="cuda") == 1
    assert worker_count(tiny(**{"simulation.workers": 5}), clients=2, records=2, parameters=1, device="cpu") == 5


def _orders(count):
    return [Order(number, 1, f"client-{number}", number, "train", number, {}) for number in range(count)]


@pytest.mark.parametrize(("width", "workers"), [(1, 1), (1, 3), (4, 2)])
def test_orders_are_dealt_longest_first_in_shares_of_the_work(width, workers):
    records = np.random.default_rng(3).pareto(1.2, 200).astype(np.int64)
    chunks = list(Dealing(width=width, records=records).chunks(_orders(200), workers))
    dealt = [order.number for chunk in chunks for order in chunk]
    assert sorted(dealt) == list(range(200))
    assert [records[number] for number in dealt] == sorted(records, reverse=True)
    assert all(len(chunk) % width == 0 for chunk in chunks[:-1])
    work = [sum(records[order.number] + 1 for order in chunk) for chunk in chunks]
    # One order may be longer than a share.
    assert all(
        each <= sum(work[place:]) / (2 * workers) + max(records[chunk[0].number] + 1, 1) * width
        for place, (each, chunk) in enumerate(zip(work, chunks, strict=True))
    )


def test_without_lengths_orders_are_dealt_as_they_come():
    chunks = list(Dealing().chunks(_orders(20), 2))
    assert [order.number for chunk in chunks for order in chunk] == list(range(20))
    assert [len(chunk) for chunk in chunks][:3] == [5, 3, 3]
    assert list(Dealing().chunks([], 2)) == []


def test_workers_go_round_the_gpus_and_one_that_is_replaced_takes_its_place(tiny, tmp_path, monkeypatch):
    recipe = Recipe(tables=tiny().model_dump(), folder=None, data=None, plan=None, key=None, gpus=3)  # type: ignore[arg-type]
    devices = [recipe.placed(place).tables["train"]["device"] for place in range(4)]
    assert devices == ["cuda:0", "cuda:1", "cuda:2", "cuda:0"]
    assert replace(recipe, gpus=1).placed(1).tables == tiny().model_dump(), "one GPU is the one that is named"
    assert worker_count(tiny(), clients=9, records=9, parameters=9, device="cuda", gpus=4) == 4
    assert worker_count(tiny(), clients=3, records=9, parameters=9, device="cuda", gpus=4) == 3
    places, killed = [], []
    monkeypatch.setattr(Recipe, "placed", lambda self, place: places.append(place) or self)

    def kill(event):
        if isinstance(event, RoundFinished) and not killed:
            # The first that was started.
            killed.append(next(pid for pid in sorted(children()) if _is_worker(pid)))
            os.kill(killed[0], signal.SIGKILL)

    bract.simulate(tiny(**{"simulation.workers": 2}), out=tmp_path / "run", listeners=[kill])
    assert places == [0, 1, 0]
