"""A Flower ClientApp runs unchanged: its handlers, its context's state across rounds and across a resumed run."""

from __future__ import annotations

import json
import os
import signal

import pytest

import bract
from bract.core.errors import InputError
from bract.experiment import Experiment
from bract.server.events import RoundFinished

APP = """
import torch
from flwr.app import ArrayRecord, MetricRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

def net():
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))

app = ClientApp()

@app.train()
def train(message, context):
    model = net()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    seen = int(context.state["count"]["rounds"]) if "count" in context.state else 0
    context.state["count"] = MetricRecord({"rounds": seen + 1})
    torch.manual_seed(context.node_config["partition-id"])
    x = torch.randn(20, 2)
    model(x).mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= context.run_config["step"] * (seen + 1) * parameter.grad
    metrics = MetricRecord({"num-examples": 20, "seen": seen + 1})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)

@app.evaluate()
def evaluate(message, context):
    nodes = context.node_config["num-partitions"]
    return Message(RecordDict({"m": MetricRecord({"num-examples": 1, "nodes": nodes})}), reply_to=message)
"""


@pytest.fixture
def experiment(tmp_path):
    (tmp_path / "app.py").write_text(APP)

    def make(**clients):
        tables = {
            "experiment": {"name": "stock", "rounds": 4},
            "task": {"model": "app:net"},
            "clients": {"app": "app:app", "count": 3, "run_config": {"step": 0.5}} | clients,
            "strategy": {"name": "flwr.serverapp.strategy:FedAvg"},
        }
        return Experiment.of(tables, folder=tmp_path)

    return make


def test_it_trains_and_evaluates(experiment, tmp_path):
    result = bract.simulate(experiment(), out=tmp_path / "run")
    assert result.status == "completed" and result.guarantee.epsilon is None
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["seen"] for line in lines] == [1, 2, 3, 4]
    assert {line["nodes"] for line in lines} == {3}
    assert bract.load(tmp_path / "run")[0].weight.equal(result.model[0].weight)
    assert result.model.state_dict()["1.num_batches_tracked"] == 4


def test_its_state_survives_an_interruption(experiment, tmp_path):
    def interrupt(event):
        if isinstance(event, RoundFinished) and event.round == 2:
            os.kill(os.getpid(), signal.SIGINT)

    whole = bract.simulate(experiment(), out=tmp_path / "whole")
    assert bract.simulate(experiment(), out=tmp_path / "run", listeners=[interrupt]).status == "interrupted"
    assert bract.simulate(resume=tmp_path / "run").model_sha256 == whole.model_sha256


@pytest.mark.parametrize(
    ("clients", "says"), [({"app": "app:net"}, "not a flwr.clientapp.ClientApp"), ({"app": "app:nobody"}, "nobody")]
)
def test_what_is_no_app_is_refused(experiment, tmp_path, clients, says):
    with pytest.raises(InputError) as caught:
        bract.simulate(experiment(**clients), out=tmp_path / "run")
    assert says in caught.value.sentence
