"""A real site with a seed gives the very replies of the simulated client of its name, and unlike it keeps a ledger."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from torch import nn

from bract.clients.app import client_app
from bract.clients.gate import Gate
from bract.clients.local_model import build_module
from bract.clients.owner import Site as Owner
from bract.clients.parts import local_model, local_rule, strategy_of, withholds_counts
from bract.clients.site.request import RunRequest
from bract.clients.site.site import Site
from bract.clients.training import reproducible
from bract.core import flower
from bract.core.keys import Key
from bract.core.parameters import arrays_of, digest, record_of
from bract.experiment import Experiment
from bract.privacy.ledger.ledger import Ledger
from bract.privacy.policy import Policy
from bract.server.accounts import Accounts
from bract.server.cohort import CohortSampler
from bract.server.grid import Arrival, Exchange, RoundGrid
from bract.server.plan import make_plan
from bract.server.progress import Progress, Rules
from bract.server.rounds import RoundLoop
from bract.simulations.executors.executor import InlineExecutor
from bract.simulations.federation import virtual_federation
from bract.simulations.grid import VirtualGrid
from bract.strategies.compression import Compression
from bract.tasks.classification import Classification
from bract.tasks.task import Examples, SiteData

SEED, ROUNDS = 11, 2
SIZES = {"ward-1": 50, "ward-2": 37}


class Wards(Classification):
    """Records that follow from the name of a ward, and a model with a hidden layer and dropout."""

    classes = ("well", "sick")

    def model(self):
        return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 2))

    def partitions(self, source=None):
        return {name: self.site(Path(name)) for name in SIZES}

    def site(self, path):
        size = SIZES[path.name] + 10
        stream = Key.from_seed(3).child(path.name).stream()
        inputs = torch.from_numpy(stream.normals(3 * size).reshape(size, 3).astype(np.float32))
        every = Examples(inputs, (inputs.sum(1) > 0).long())
        return SiteData(train=every.select(range(SIZES[path.name])), test=every.select(range(size - 10, size)))


class Recorded:
    """A ClientApp that remembers what it replied."""

    def __init__(self, app: Any) -> None:
        self.app, self.replies = app, []

    def __call__(self, message: Message, context: Context) -> Message:
        reply = self.app(message, context)
        self.replies.append(bytes_of(reply))
        return reply


class Sites(RoundGrid):
    """Real sites as a grid: each message says what the run asks, as a server's would."""

    def __init__(self, sites: dict[int, Site], asked: RunRequest) -> None:
        self.sites, self.asked, self.replies = sites, asked, []

    def get_node_ids(self):
        return list(self.sites)

    def exchange(self, messages, *, fold=None, until=None):
        return Exchange(self._answered(messages), fold=fold, until=until)

    def _answered(self, messages):
        for message in messages:
            config = ConfigRecord({**message.content["config"], **self.asked.to_config()})
            content = RecordDict({**message.content, "config": config})
            node = message.metadata.dst_node_id
            sent = Message(content, node, message.metadata.message_type)
            round = config["server-round"]
            flower.set_message_id(sent, f"{sent.metadata.message_type}-{round}-{node}")
            reply = self.sites[node].handle(sent)
            assert not reply.has_error(), reply.error
            self.replies.append(bytes_of(reply))
            yield Arrival(instruction=message, reply=reply)


def bytes_of(reply: Message) -> dict[str, Any]:
    """Return all that a reply tells: the bytes of its arrays, and its metrics."""
    found: dict[str, Any] = {}
    for name, record in reply.content.items():
        arrays = arrays_of(record) if isinstance(record, ArrayRecord) else {}
        found |= {f"{name}/{key}": (array.dtype.str, array.tobytes()) for key, array in arrays.items()}
        if not isinstance(record, ArrayRecord):
            found |= {f"{name}/{key}": value for key, value in record.items()}
    return found


def experiment_of(tables: dict[str, dict[str, Any]]) -> Experiment:
    known: dict[str, dict[str, Any]] = {
        "experiment": {"seed": SEED, "rounds": ROUNDS},
        "task": {"name": "wards"},
        "train": {"device": "cpu", "batch_size": 16, "learning_rate": 0.5, "epochs": 2},
        "privacy": {"unit": "record", "delta": 1e-5, "noise_multiplier": 1.5, "randomness": "seed"},
        "server": {"evaluate_every": 1},
    }
    return Experiment.of({name: known.get(name, {}) | tables.get(name, {}) for name in {*known, *tables}})


def rounds_of(experiment: Experiment, grid: RoundGrid, names: dict[int, str], initial: Any, plan: Any) -> Progress:
    loop = RoundLoop(
        strategy=strategy_of(experiment),  # type: ignore[arg-type]
        grid=grid,
        clients=names,
        sampler=CohortSampler(sampling="all", per_round=None, key=Key.from_seed(SEED)),
        budget=Accounts(plan.mechanisms),
        rules=Rules(rounds=ROUNDS, quorum=1.0, evaluate_every=1 if plan.evaluation else 0),
        evaluation=plan.evaluation,
        emit=lambda event: None,
        compression=Compression.of(experiment.compression),
    )
    progress = Progress(round=0, arrays=dict(initial))
    loop.run(progress)
    return progress


def simulated(experiment: Experiment) -> tuple[Progress, list[Any], Any]:
    task = Wards()
    plan = make_plan(experiment, SIZES, 2, lambda event: None, coordinates=50)
    federation = virtual_federation(experiment, task, task.partitions(), plan, key=Key.from_seed(SEED))
    app = Recorded(federation.app)
    grid = VirtualGrid(InlineExecutor(app, log=print), federation.names)  # type: ignore[arg-type]
    return rounds_of(experiment, grid, dict(grid.names), federation.initial, plan), app.replies, (federation, plan)


def opened(folder: Path, experiment: Experiment, name: str, *, seeded: Key | None, **data: Any) -> Site:
    unit = "client" if experiment.privacy.trust == "nobody" else "record"
    table = {"path": name, "records": SIZES[name], "unit": unit, "epsilon": 1e4, "delta": 1e-5} | data
    allow = {
        "tasks": ["wards"],
        "strategies": [experiment.strategy.name],
        "epochs": 2,
        "message_bytes": 100_000,
        "updates": ["dp-sgd", "noised"],
        "metrics": "noised",
    }
    policy = Policy.of({"data": {"records": table}, "allow": allow}, source=folder / "policy.toml")
    state = folder / name
    if not state.exists():
        Ledger.create(state).close()
    return Site.open(state, policy, experiment, task=Wards(), seeded=seeded)


def asked_by(experiment: Experiment, plan: Any) -> RunRequest:
    privacy, noised = experiment.privacy, experiment.privacy.trust == "nobody"
    return RunRequest(
        run="run",
        task="wards",
        strategy=experiment.strategy.name,
        update="noised" if noised else "dp-sgd",
        rounds=ROUNDS,
        epochs=experiment.train.epochs,
        batch_size=experiment.train.batch_size,
        clipping_norm=privacy.clipping_norm,
        noise_multiplier=privacy.noise_multiplier,
        epsilon=privacy.epsilon,
        delta=privacy.delta,
        metrics="noised" if plan.evaluation else "withheld",
        metrics_epsilon=plan.evaluation.epsilon if plan.evaluation else None,
        releases=plan.evaluation.releases if plan.evaluation else 1,
    )


CASES = {
    "noise": {},
    "calibrated": {"privacy": {"noise_multiplier": None, "epsilon": 3.0}},
    "counted": {"strategy": {"name": "fedavg", "weights": "counted"}},
    "scaffold": {"strategy": {"name": "scaffold"}},
    "compressed": {"compression": {"top_k": 0.5, "bits": 8}},
    "opacus": {"train": {"dp_engine": "opacus"}},
    "per-layer": {"privacy": {"clipping": "per-layer"}},
    "noised updates": {"privacy": {"unit": "client", "trust": "nobody"}, "server": {"evaluate_every": 0}},
}


@pytest.mark.parametrize("case", CASES)
def test_seeded_sites_give_the_replies_and_the_model_of_the_simulation(tmp_path: Path, case: str) -> None:
    flower.identify_process(1)
    tables = {name: dict(table) for name, table in CASES[case].items()}
    experiment = experiment_of(tables)
    with reproducible():
        progress, replies, (federation, plan) = simulated(experiment)
    key = Key.from_seed(SEED)
    sites = {flower.node_id(name): opened(tmp_path, experiment, name, seeded=key.child("site", name)) for name in SIZES}
    names = {flower.node_id(name): name for name in SIZES}
    grid = Sites(sites, asked_by(experiment, plan))
    real = rounds_of(experiment, grid, names, federation.initial, plan)
    assert len(grid.replies) == len(replies) == ROUNDS * len(SIZES) * (2 if plan.evaluation else 1)
    for one, other in zip(replies, grid.replies, strict=True):
        assert one == other
    assert {name: array.tobytes() for name, array in real.arrays.items()} == {
        name: array.tobytes() for name, array in progress.arrays.items()
    }
    assert real.histograms.keys() == progress.histograms.keys()
    for site in sites.values():
        assert site.hello()["seeded"] is True
        # Nothing of it is free: the ledger charged each round.
        spending = site._ledger.spending("records")
        assert spending.reservations == len(grid.replies) / len(SIZES) and spending.spent > 0
        site.close()


def test_without_a_seed_a_reply_follows_from_the_bytes_that_the_ledger_drew_for_it(tmp_path: Path) -> None:
    """The simulated client with the reservation's bytes for a key replies the same; two reservations share no bytes."""
    flower.identify_process(1)
    experiment, task, name = experiment_of({}), Wards(), "ward-1"
    plan = make_plan(experiment, SIZES, 2, lambda event: None)
    rule = local_rule(experiment, strategy_of(experiment))
    model, training = local_model(experiment, build_module(task, seed=SEED, private=True)[0], rule)
    initial, secrets = model.shared_arrays(), []
    gate = Gate(layout=model.layout, withhold_counts=withholds_counts(experiment), rule=rule)
    owner = Owner(
        name=name,
        data=task.partitions()[name],
        key=Key.fresh(),
        plan=plan.mechanisms[name],
        evaluation=plan.evaluation,
    )

    def seen(progress: Any) -> None:
        if progress.stage == "reserved":
            with sqlite3.connect(tmp_path / name / "ledger.sqlite") as connection:
                secrets.extend(secret for (secret,) in connection.execute("SELECT secret FROM secrets"))

    with opened(tmp_path, experiment, name, seeded=None) as site:
        assert site.hello()["seeded"] is False
        for number, phase in ((1, "train"), (1, "evaluate"), (2, "train")):
            known = {"server-round": number, "model-version": digest(initial)}
            config = ConfigRecord({**known, **asked_by(experiment, plan).to_config()})
            message = Message(RecordDict({"arrays": record_of(initial), "config": config}), 7, phase)
            flower.set_message_id(message, f"{phase}-{number}")
            reply = site.handle(message, progress=seen)
            app = client_app({name: replace(owner, key=Key(secrets[-1]))}, task, training, model, gate)
            context = Context(run_id=1, node_id=7, node_config={"name": name}, state=RecordDict(), run_config={})
            with reproducible(threads=None):
                assert bytes_of(reply) == bytes_of(app(message, context))
    assert len(set(secrets)) == len(secrets) == 3
