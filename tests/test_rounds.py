"""The round loop under everything that goes wrong: failing clients, quorum, budget, early stop, foreign strategies."""

from __future__ import annotations

import json

import numpy as np
import pytest
from flwr.serverapp.strategy import FedMedian
from flwr.serverapp.strategy import FedProx as FlowerFedProx
from flwr.serverapp.strategy import QFedAvg as FlowerQFedAvg

import bract
from bract.core.errors import InputError, RunError
from bract.server.events import ClientFailed, Evaluated, Notice, RoundFinished

CLUMSY = """
import torch
from bract.tasks.synthetic import Synthetic

class Clumsy(Synthetic):
    # The first `bad` clients of the run meet a record that no code expected.
    def __init__(self, *, bad: int, nan: bool = False, seed: int = 0):
        super().__init__(clients=4, records=30, features=5, classes=2, seed=seed)
        self.bad, self.nan = bad, nan

    def partitions(self, source):
        sites = super().partitions(source)
        for name in list(sites)[: self.bad]:
            sites[name].train.inputs[0, 0] = 1e9 if not self.nan else float("nan")
        return sites

    def loss(self, outputs, targets):
        losses = super().loss(outputs, targets)
        if not self.nan and outputs.abs().max() > 1e6:
            raise ValueError("patient Miller has an impossible cholesterol")
        return losses
"""


@pytest.fixture
def clumsy(tiny, tmp_path):
    (tmp_path / "clumsy.py").write_text(CLUMSY)

    def make(bad, **keys):
        experiment = tiny(tmp_path, **{"task.name": "clumsy:Clumsy", "task.bad": bad}, **keys)
        tables = experiment.model_dump(exclude_none=True)
        for name in ("clients", "records", "features", "classes"):
            tables["task"].pop(name)
        return type(experiment).of(tables, folder=tmp_path)

    return make


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_failing_client_is_counted_shown_and_not_fatal(clumsy, tmp_path):
    events = []
    result = bract.simulate(clumsy(1), out=tmp_path / "run", listeners=[events.append])
    failures = [event for event in events if isinstance(event, ClientFailed)]
    assert result.status == "completed"
    assert [(event.client, event.code) for event in failures] == [("client-0001", "client-failed")] * 4
    assert [(line["clients"], line["failed"]) for line in records(tmp_path / "run")] == [(3, 1)] * 4
    assert not any("Miller" in event.sentence for event in failures)


def test_the_text_of_a_failure_stays_in_private(clumsy, tmp_path):
    bract.simulate(clumsy(1), out=tmp_path / "run")
    assert "Miller" in (tmp_path / "run" / "private" / "clients.log").read_text()
    public = [path for path in (tmp_path / "run").glob("*.*") if path.suffix != ".safetensors"]
    assert public and not any("Miller" in path.read_text() for path in public)


def test_below_the_quorum_the_model_stays_and_a_run_that_learnt_nothing_failed(clumsy, tmp_path):
    events = []
    with pytest.raises(RunError) as caught:
        bract.simulate(clumsy(3), out=tmp_path / "run", listeners=[events.append])
    assert caught.value.code == "quorum-missed"
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["status"], result["rounds"]) == ("failed", 4)
    assert sum("below the quorum" in event.text for event in events if isinstance(event, Notice)) == 4
    learnt = bract.simulate(clumsy(3, **{"server.quorum": 0.25}), out=tmp_path / "low")
    assert learnt.status == "completed" and learnt.model_sha256 != result["model_sha256"]


def test_early_stop_waits_for_a_second_release(tiny, tmp_path):
    keys = {"experiment.rounds": 12, "server.evaluate_every": 5, "server.patience": 4}
    result = bract.simulate(tiny(**keys), out=tmp_path / "run")
    assert result.record["rounds"] in (10, 12)
    assert "accuracy" in result.metrics


@pytest.mark.parametrize("strategy", [FlowerFedProx(proximal_mu=0.1), FlowerQFedAvg(client_learning_rate=0.1)])
def test_a_flower_strategy_with_a_client_half_is_refused(tiny, tmp_path, strategy):
    with pytest.raises(InputError) as caught:
        bract.simulate(tiny(), strategy=strategy, out=tmp_path / "run")
    assert type(strategy).__name__.lower() in caught.value.sentence


def test_a_flower_strategy_that_waits_for_two_clients_trains_one(tiny, tmp_path):
    """Flower's default is to wait until two are there: with a single client for ever."""
    result = bract.simulate(tiny(**{"task.clients": 1}), strategy=FedMedian(), out=tmp_path / "run")
    assert result.status == "completed"


def test_a_record_without_a_finite_gradient_counts_as_none_under_privacy(clumsy, tmp_path):
    keys = {"task.nan": True, "privacy.unit": "record", "privacy.noise_multiplier": 4.0}
    result = bract.simulate(clumsy(2, **keys), out=tmp_path / "run")
    assert [line["failed"] for line in records(tmp_path / "run")] == [0] * 4
    assert all(tensor.isfinite().all() for tensor in result.model.state_dict().values())


def test_without_privacy_an_update_that_is_not_finite_fails_its_client(clumsy, tmp_path):
    events = []
    bract.simulate(clumsy(1, **{"task.nan": True}), out=tmp_path / "run", listeners=[events.append])
    assert {event.code for event in events if isinstance(event, ClientFailed)} == {"value-out-of-range"}


def test_the_budget_stops_the_run_and_the_model_is_saved(tiny, tmp_path):
    keys = {"privacy.unit": "record", "privacy.noise_multiplier": 4.0, "experiment.rounds": 30}
    result = bract.simulate(tiny(**keys, **{"privacy.epsilon_budget": 1.5}), out=tmp_path / "run")
    spent = [line["epsilon"] for line in records(tmp_path / "run")]
    assert (result.status, result.exit_status) == ("budget-exhausted", 3)
    assert 0 < len(spent) < 30 and spent[-1] <= 1.5
    assert result.guarantee.epsilon <= 1.5
    assert bract.load(tmp_path / "run") is not None
    assert "accuracy" in result.metrics
    # One more round would have been too much.
    free = bract.simulate(tiny(**keys | {"experiment.rounds": len(spent) + 1}), out=tmp_path / "free")
    assert records(tmp_path / "free")[-1]["epsilon"] > 1.5
    assert free.status == "completed"


def test_early_stop_keeps_the_best_released_model(tiny, tmp_path):
    events = []
    keys = {"experiment.rounds": 40, "server.evaluate_every": 1, "server.patience": 3, "train.learning_rate": 0.01}
    result = bract.simulate(tiny(**keys), out=tmp_path / "run", listeners=[events.append])
    scores = [event.metrics["accuracy"] for event in events if isinstance(event, Evaluated)]
    assert result.status == "stopped-early" and result.exit_status == 0
    assert len(scores) < 40
    best = int(np.argmax(scores))
    assert len(scores) == best + 1 + 3
    assert result.metrics["accuracy"] == scores[best]
    short = bract.simulate(tiny(**keys | {"experiment.rounds": best + 1}), out=tmp_path / "short")
    assert short.model_sha256 == result.model_sha256


def test_each_release_of_metrics_is_paid_for(tiny, tmp_path):
    """Four releases share the evaluation's epsilon, so each of them is noisier."""
    keys = {"privacy.unit": "record", "privacy.epsilon": 4.0}
    once = bract.simulate(tiny(**keys), out=tmp_path / "once")
    often = bract.simulate(tiny(**keys, **{"server.evaluate_every": 1}), out=tmp_path / "often")
    assert once.guarantee.epsilon == often.guarantee.epsilon <= 4.0
    assert [("accuracy" in line) for line in records(tmp_path / "often")] == [True] * 4


def test_a_flower_strategy_runs_unchanged(tiny, tmp_path):
    named = bract.simulate(tiny(**{"strategy.name": "flwr.serverapp.strategy:FedMedian"}), out=tmp_path / "named")
    given = bract.simulate(tiny(), strategy=FedMedian(min_available_nodes=1, min_train_nodes=1), out=tmp_path / "given")
    plain = bract.simulate(tiny(), out=tmp_path / "plain")
    assert named.model_sha256 == given.model_sha256 != plain.model_sha256


def test_flowers_fedavg_gives_bracts_model(tiny, tmp_path):
    """Flower's weighs by counts, so does bract's with `counted`; under privacy both weigh equally."""
    # One private round: later ones draw their noise by the model, which differs in its last bits.
    private = {"privacy.unit": "record", "privacy.noise_multiplier": 4.0, "experiment.rounds": 1}
    for keys in ({"strategy.weights": "counted"}, private):
        ours = bract.simulate(tiny(**keys), out=tmp_path / f"ours{len(keys)}").model
        keys = {key: value for key, value in keys.items() if key != "strategy.weights"}
        theirs = bract.simulate(
            tiny(**keys, **{"strategy.name": "flwr.serverapp.strategy:FedAvg"}), out=tmp_path / f"theirs{len(keys)}"
        ).model
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            np.testing.assert_allclose(mine.detach(), other.detach(), atol=1e-6)


def test_a_poisson_cohort_of_nobody_does_not_hang_a_flower_strategy(tiny, tmp_path):
    keys = {"clients.sampling": "poisson", "clients.per_round": 1, "experiment.rounds": 10}
    keys["strategy.name"] = "flwr.serverapp.strategy:FedAvg"
    bract.simulate(tiny(**keys), out=tmp_path / "run")
    assert 0 in [line["clients"] for line in records(tmp_path / "run")]


def test_a_strategy_that_raises_ends_the_run_with_its_model(tiny, tmp_path):
    class Broken(FedMedian):
        def aggregate_train(self, server_round, replies):
            if server_round == 3:
                raise ZeroDivisionError("by nobody")
            return super().aggregate_train(server_round, replies)

    events = []
    with pytest.raises(RunError) as caught:
        bract.simulate(tiny(), strategy=Broken(min_available_nodes=1), out=tmp_path / "run", listeners=[events.append])
    assert caught.value.code == "strategy-failed" and "ZeroDivisionError" in caught.value.sentence
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["status"], result["rounds"]) == ("failed", 2)
    assert result["error"]["code"] == "strategy-failed"
    assert "by nobody" in (tmp_path / "run" / "private" / "strategy.log").read_text()
    assert (tmp_path / "run" / "model.safetensors").exists() and (tmp_path / "run" / "report.html").exists()
    assert [event.round for event in events if isinstance(event, RoundFinished)] == [1, 2]


def test_a_strategy_with_state_that_cannot_be_saved_is_refused_at_the_start(tiny, tmp_path):
    class Opaque(FedMedian):
        def __init__(self):
            super().__init__()
            self.handle = object()

    with pytest.raises(InputError) as caught:
        bract.simulate(tiny(), strategy=Opaque(), out=tmp_path / "run")
    assert "handle" in caught.value.sentence and "state_dict" in caught.value.sentence
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"strategy.name": "fedavgg"}, "did you mean fedavg?"),
        ({"strategy.name": "flwr.serverapp.strategy:FedMedia"}, "FedMedian"),
        ({"strategy.name": "no.such:Thing"}, "no module"),
        ({"strategy.wights": "counted"}, "did you mean 'weights'?"),
        ({"strategy.weights": "heavy"}, "heavy"),
        ({"strategy.name": "flwr.serverapp.strategy:FedAvg", "strategy.fraction_train": 0.5}, "clients.per_round"),
        ({"strategy.name": "collections:OrderedDict"}, "no class that bract can make"),
        ({"strategy.name": "fractions:Fraction"}, "configure_train"),
        ({"privacy.unit": "client", "privacy.noise_multiplier": 1.0, "strategy.weights": "counted"}, "equal"),
        (
            {
                "privacy.unit": "client",
                "privacy.noise_multiplier": 1.0,
                "strategy.name": "flwr.serverapp.strategy:FedMedian",
            },
            "linear strategy",
        ),
        ({"train.frozen": ["*"]}, "no parameter to share"),
        ({"train.personal": ["head.*"]}, "matches no tensor"),
        ({"train.device": "cuda:99"}, "no such device"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(tiny, tmp_path, keys, says):
    with pytest.raises(InputError) as caught:
        bract.simulate(tiny(**keys), out=tmp_path / "run")
    assert says in caught.value.sentence and "\n" not in caught.value.sentence
    assert not (tmp_path / "run").exists(), "what is refused leaves no folder behind"
