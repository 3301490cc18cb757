"""clients/group.py: many clients answered in one call are answered as by their messages, to the last bit."""

from __future__ import annotations

import pytest

import bract
from bract.clients.group import ClientGroup
from bract.server.events import ClientFailed, ClientReplied, RoundFinished
from bract.simulations import federation
from bract.tasks.synthetic import Synthetic

CLIENT_LEVEL = {"privacy.unit": "client", "privacy.noise_multiplier": 1.0, "privacy.clipping_norm": 0.05}
RECORD_LEVEL = {"privacy.unit": "record", "privacy.noise_multiplier": 1.0}
CASES = {
    "traced": {},
    "sequential": {"simulation.kernel": "sequential"},
    "counted": {"strategy.weights": "counted"},
    "sampled": {"clients.sampling": "poisson", "clients.per_round": 2, "train.epochs": 3},
    "record level": RECORD_LEVEL,
    "client level": CLIENT_LEVEL,
    "record level, opacus": {**RECORD_LEVEL, "train.dp_engine": "opacus"},
    "adaptive server": {"strategy.name": "fedadam"},
    "flower strategy": {"strategy.name": "flwr.serverapp.strategy:FedMedian"},
    "too large to sum": {"train.learning_rate": 1e30},
    "too large to clip": {"train.learning_rate": 1e30, **CLIENT_LEVEL},
    "not finite": {"train.learning_rate": 1e39},
}
FAILING = ("too large to sum", "not finite")


class Flawed(Synthetic):
    """The second client's first record has a class that is none."""

    def partitions(self, source):
        pool = super().partitions(source)
        pool.train.targets[pool.train_ends[1]] = 7
        pool.test.targets[pool.test_ends[1]] = 7
        return pool


def ended(experiment, out, task=None):
    """Return what a run came to, and what is told of its clients."""
    events = []
    try:
        result = bract.simulate(experiment, task=task, out=out, listeners=[events.append])
    except bract.BractError as error:
        return error.code, _told(events)
    return (result.model_sha256, result.metrics), _told(events)


def _told(events):
    failures = [
        (each.round, each.client, each.code, each.sentence) for each in events if isinstance(each, ClientFailed)
    ]
    replied = [(each.round, each.client) for each in events if isinstance(each, ClientReplied)]
    sent = [
        {key: each.record.get(key) for key in ("clients", "failed", "bytes_down", "bytes_up")}
        for each in events
        if isinstance(each, RoundFinished)
    ]
    return failures, replied, sent


def without_groups(monkeypatch):
    monkeypatch.setattr(federation, "ClientGroup", lambda *arguments, **keywords: None)


@pytest.mark.parametrize("case", CASES)
def test_it_comes_to_the_same_as_messages(tiny, tmp_path, monkeypatch, case):
    answered = []
    original = ClientGroup.answers
    monkeypatch.setattr(
        ClientGroup, "answers", lambda *known, **more: answered.append(known[1]) or original(*known, **more)
    )
    experiment = tiny(**{"experiment.rounds": 3, **CASES[case]})
    grouped = ended(experiment, tmp_path / "grouped")
    assert "train" in answered
    answered.clear()
    without_groups(monkeypatch)
    assert ended(experiment, tmp_path / "messages") == grouped
    assert not answered
    assert bool(grouped[1][0]) == (case in FAILING)


@pytest.mark.parametrize("kernel", ["traced", "sequential"])
def test_a_client_that_fails_fails_alone_and_as_by_its_message(tiny, tmp_path, monkeypatch, kernel):
    experiment = tiny(**{"experiment.rounds": 2, "simulation.kernel": kernel})
    task = Flawed(clients=4, records=30, features=5, classes=3)
    grouped = ended(experiment, tmp_path / "grouped", task)
    assert {(client, code) for _, client, code, _ in grouped[1][0]} == {("client-0002", "client-failed")}
    without_groups(monkeypatch)
    assert ended(experiment, tmp_path / "messages", task) == grouped


@pytest.mark.parametrize(
    "keys",
    [
        {"train.personal": ["*bias*"]},
        {"strategy.name": "scaffold"},
        {"strategy.name": "fednova"},
        {"compression.top_k": 0.5},
        {**CLIENT_LEVEL, "privacy.trust": "nobody"},
    ],
    ids=["personal", "scaffold", "fednova", "compressed", "local noise"],
)
def test_who_keeps_or_sends_something_of_its_own_is_sent_its_message(tiny, tmp_path, monkeypatch, keys):
    def refuse(*known, **more):
        raise AssertionError

    monkeypatch.setattr(ClientGroup, "answers", refuse)
    _, (failures, replied, _) = ended(tiny(**keys), tmp_path / "run")
    assert replied and not failures
