"""A Flower ClientApp's mods and query handlers run, and its metrics reach the result."""

from __future__ import annotations

import json

import pytest

import bract
from bract.cli.main import main
from bract.core.errors import InputError, RunError
from bract.experiment import Experiment
from bract.reports.summary import print_summary
from bract.server.trained_model import make_module
from bract.simulations.description import describe

APP = """
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import fixedclipping_mod, message_size_mod
from torch import nn


def net():
    return nn.Linear(2, 1)


def visits(message, context, call_next):
    \"\"\"Count what passes, in the context, and write it into the reply.\"\"\"
    kind = message.metadata.message_type
    record = context.state.get("visits", ConfigRecord())
    record[kind] = int(record.get(kind, 0)) + 1
    context.state["visits"] = record
    reply = call_next(message, context)
    reply.content["metrics"][f"visits-{kind}"] = record[kind]
    return reply


def order(name):
    def mod(message, context, call_next):
        message.content["config"]["order"] = str(message.content["config"].get("order", "")) + name
        return call_next(message, context)
    return mod


app = ClientApp(mods=[visits, message_size_mod])


@app.train(mods=[order("a"), order("b"), fixedclipping_mod])
def train(message, context):
    arrays = message.content["arrays"].to_torch_state_dict()
    index = context.node_config["partition-id"]
    arrays = {name: tensor + 3 * (index + 1) for name, tensor in arrays.items()}
    metrics = MetricRecord({"num-examples": 10, "seen": len(str(message.content["config"].get("order", "")))})
    return Message(RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message, context):
    weight = message.content["arrays"].to_torch_state_dict()["weight"]
    numbers = MetricRecord({"num-examples": 10, "mean_weight": float(weight.mean()), "partition": 1.0})
    return Message(RecordDict({"metrics": numbers}), reply_to=message)


@app.query()
def query(message, context):
    answer = MetricRecord({"records": 10 * (context.node_config["partition-id"] + 1)})
    return Message(RecordDict({"metrics": answer}), reply_to=message)


@app.query("name")
def name(message, context):
    context.state["asked"] = ConfigRecord({"by": str(message.content["config"]["who"])})
    index, count = (context.node_config[key] for key in ("partition-id", "num-partitions"))
    answer = ConfigRecord({"name": f"client {index} of {count}"})
    return Message(RecordDict({"answer": answer, "metrics": MetricRecord({"x": 1})}), reply_to=message)
"""

STRATEGY = """
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp.strategy import FedAvg


class Asking(FedAvg):
    \"\"\"Ask every client for its number of records, and one for its name, before it sends them the model.\"\"\"

    asked = 0
    told = ""

    def configure_train(self, server_round, arrays, config, grid):
        config["clipping_norm"] = 0.5
        nodes = list(grid.get_node_ids())
        questions = [
            Message(RecordDict({"config": ConfigRecord({"ask": 1})}), node, MessageType.QUERY) for node in nodes
        ]
        replies = list(grid.send_and_receive(questions))
        assert [reply.metadata.src_node_id for reply in replies] == nodes
        self.asked = sum(reply.content["metrics"]["records"] for reply in replies)
        (named,) = grid.send_and_receive(
            [Message(RecordDict({"config": ConfigRecord({"who": "me"})}), nodes[-1], "query.name")]
        )
        self.told = named.content["answer"]["name"]
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        metrics["asked"] = self.asked
        metrics["told"] = len(self.told)
        return arrays, metrics
"""


@pytest.fixture
def experiment(tmp_path):
    (tmp_path / "modded.py").write_text(APP)
    (tmp_path / "asking.py").write_text(STRATEGY)

    def make(**keys):
        tables = {
            "experiment": {"name": "modded", "rounds": 3},
            "task": {"model": "modded:net"},
            "clients": {"app": "modded:app", "count": 3},
            "strategy": {"name": "asking:Asking"},
        }
        for path, value in keys.items():
            table, _, key = path.partition(".")
            tables.setdefault(table, {})[key] = value
        return Experiment.of(tables, folder=tmp_path)

    return make


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("workers", [1, 2])
def test_mods_and_queries_run_and_their_state_is_kept(experiment, tmp_path, workers):
    result = bract.simulate(experiment(**{"simulation.workers": workers}), out=tmp_path / "run")
    assert result.status == "completed"
    found = lines(tmp_path / "run")
    # Two queries reach the last client in each round and one the others; mods wrap train and evaluate alike.
    assert [line["visits-train"] for line in found] == [1, 2, 3]
    assert [line["visits-evaluate"] for line in found] == [1, 2, 3]
    # A handler's own mods run, one after the other.
    assert [line["seen"] for line in found] == [2, 2, 2]
    assert [line["asked"] for line in found] == [60, 60, 60]
    assert {line["told"] for line in found} == {len("client 2 of 3")}
    # Each client moves every weight by at least 3; Flower's clipping mod leaves an update of norm 0.5 of it.
    start, end = make_module(experiment()).state_dict(), result.model.state_dict()
    distance = sum(float((end[name] - start[name]).square().sum()) for name in start) ** 0.5
    assert distance == pytest.approx(3 * 0.5, rel=1e-4)


def test_messages_that_are_not_training_count_among_the_bytes_only_with_tensors(experiment, tmp_path):
    bract.simulate(experiment(), out=tmp_path / "run")
    for line in lines(tmp_path / "run"):
        assert line["bytes_up"] == line["bytes_down"] == 3 * 4 * 3


def test_its_metrics_are_the_results(experiment, tmp_path, capsys):
    result = bract.simulate(experiment(), out=tmp_path / "run")
    weight = float(result.model.weight.detach().mean())
    assert result.metrics["mean_weight"] == pytest.approx(weight, rel=1e-6)
    assert result.metrics["partition"] == 1.0
    written = json.loads((tmp_path / "run" / "result.json").read_text())
    assert written["metrics"] == result.metrics
    assert result.guarantee.epsilon is None and result.guarantee.unit == "none"
    print_summary(tmp_path / "run")
    out = capsys.readouterr().out
    assert "mean_weight" in out and "traffic    108 bytes up, 108 bytes down" in out
    assert "There is no differential privacy" in out
    assert "mean weight" in (tmp_path / "run" / "report.html").read_text().lower()


def test_metrics_survive_a_resume_that_has_nothing_left_to_do(experiment, tmp_path):
    result = bract.simulate(experiment(), out=tmp_path / "run")
    assert bract.simulate(resume=tmp_path / "run").metrics == result.metrics


def test_a_plan_of_an_app_is_printed(experiment, tmp_path, capsys):
    described = describe(experiment())
    assert described["bytes"] == {"client_round": 24, "run": 24 * 3 * 3, "down": 12, "up": 12, "saved": 0}
    assert (described["clients"], described["cohort"], described["rounds"]) == (3, 3, 3)
    assert described["guarantee"]["epsilon"] is None
    path = tmp_path / "app.toml"
    path.write_text(experiment().to_toml())
    out = printed(capsys, "plan", str(path))
    assert "modded:app, 3 rounds, 3 clients" in out and "24 bytes a client and round, 216 in all" in out
    assert "There is no differential privacy" in out
    assert json.loads(printed(capsys, "plan", str(path), "--json"))["bytes"]["run"] == 216


def printed(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_a_plan_of_what_is_no_app_is_refused(experiment):
    with pytest.raises(InputError, match=r"not a flwr.clientapp.ClientApp"):
        describe(experiment(**{"clients.app": "modded:net"}))


def test_an_app_without_a_query_handler_answers_with_an_error(experiment, tmp_path):
    source = (tmp_path / "modded.py").read_text()
    (tmp_path / "mute.py").write_text(source.replace('@app.query("name")\n', "").replace("@app.query()\n", ""))
    tables = {"clients.app": "mute:app", "task.model": "mute:net", "experiment.rounds": 1}
    with pytest.raises(RunError) as caught:
        bract.simulate(experiment(**tables), out=tmp_path / "run")
    assert caught.value.code == "strategy-failed"
