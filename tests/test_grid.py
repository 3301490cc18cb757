"""server/grid.py and simulations/grid.py: exchange hands over replies as they come, or only their total."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from bract.core import flower
from bract.core.errors import CATALOGUE
from bract.core.parameters import Layout, arrays_of, record_of
from bract.core.ring import Ring
from bract.server.cohort_grid import CohortGrid
from bract.server.grid import FlowerGrid
from bract.simulations.executors.executor import InlineExecutor
from bract.simulations.grid import VirtualGrid
from bract.strategies.fold import WeightedSum

NAMES = ["ann", "bob", "cid", "dan"]


@pytest.fixture(autouse=True)
def identity():
    flower.identify_process(1)


@pytest.fixture
def log():
    return []


@pytest.fixture
def grid(log):
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        name = context.node_config["name"]
        if name == "bob" and message.content["config"].get("fail"):
            raise KeyError("patient 17 has no cholesterol")
        context.state["seen"] = MetricRecord({"times": 1 + int(context.state.get("seen", {"times": 0})["times"])})
        value = float(NAMES.index(name)) if name != "dan" or not message.content["config"].get("nan") else np.nan
        arrays = record_of({"w": np.full(2, value, np.float32)})
        return Message(
            RecordDict({"a": arrays, "m": MetricRecord({"num-examples": 1 + NAMES.index(name)})}), reply_to=message
        )

    return VirtualGrid(InlineExecutor(app, log=log.append, isolate=True), NAMES)


def messages(grid, **config):
    content = RecordDict({"config": ConfigRecord(config)})
    return [Message(content, node, "train") for node in grid.get_node_ids()]


def fold(**options):
    return WeightedSum(layout=Layout.of({"w": np.zeros(2, np.float32)}), ring=Ring(capacity=100), **options)


def test_replies_come_one_by_one(grid):
    exchange = grid.exchange(messages(grid))
    first = next(exchange)
    assert grid.names[first.metadata.src_node_id] == "ann"
    assert len(grid.client_states()) == 1, "the others must not have run yet"
    assert len(list(exchange)) == 3


def test_send_and_receive_is_a_list(grid):
    assert len(grid.send_and_receive(messages(grid), timeout=3)) == 4


def test_push_and_pull(grid):
    ids = list(grid.push_messages(messages(grid)))
    assert len({reply.metadata.reply_to_message_id for reply in grid.pull_messages(ids)}) == 4
    assert grid.pull_messages(ids) == []


def test_a_fold_leaves_totals_only(grid):
    exchange = grid.exchange(messages(grid), fold=fold(weighted_by="num-examples"))
    replies = list(exchange)
    assert not any(reply.content.array_records for reply in replies)
    assert exchange.total.count == 4 and exchange.total.weight == 10
    np.testing.assert_allclose(exchange.total.mean(), [(0 * 1 + 1 * 2 + 2 * 3 + 3 * 4) / 10] * 2, atol=1e-9)


def test_until_ends_after_so_many(grid):
    exchange = grid.exchange(messages(grid), fold=fold(), until=2)
    assert len(list(exchange)) == 2 and exchange.total.count == 2
    assert len(grid.client_states()) == 2


def test_a_clients_failure_is_its_own_and_its_text_stays(grid, log):
    replies = list(grid.exchange(messages(grid, fail=True)))
    failed = [reply for reply in replies if reply.has_error()]
    assert len(failed) == 1 and len(replies) == 4
    assert flower.code_and_sentence(failed[0].error) == (
        "client-failed",
        CATALOGUE["client-failed"].meaning.rstrip("."),
    )
    assert "patient" not in str(failed[0].error.reason)
    assert "bob" in log[0] and "patient 17" in log[0]


def test_a_value_that_is_not_finite_fails_that_client_alone(grid):
    exchange = grid.exchange(messages(grid, nan=True), fold=fold())
    replies = list(exchange)
    assert [reply.has_error() for reply in replies] == [False, False, False, True]
    assert flower.code_and_sentence(replies[3].error)[0] == "value-out-of-range"
    assert exchange.total.count == 3


def test_states_come_back(grid, log):
    list(grid.exchange(messages(grid)))
    states = grid.client_states()
    assert set(states) == set(NAMES)
    grid.load_client_states({"ann": {"seen": {"kind": "metric", "value": {"times": 41}}}})
    next(grid.exchange(messages(grid)))
    assert grid.client_states()["ann"]["seen"]["value"]["times"] == 42


def test_a_cohort_sees_itself_only(grid):
    some = list(grid.get_node_ids())[1:3]
    view = CohortGrid(grid, some)
    assert view.get_node_ids() == some
    assert len(view.send_and_receive(messages(view))) == 2


def test_any_other_grid_exchanges(grid):
    exchange = FlowerGrid(grid).exchange(messages(grid), fold=fold())
    assert len(list(exchange)) == 4 and exchange.total.count == 4


def test_an_isolated_app_that_changes_its_message_changes_nobody_elses():
    app = ClientApp()
    seen = []

    @app.train()
    def train(message: Message, context: Context) -> Message:
        record = message.content["arrays"]
        seen.append(arrays_of(record)["w"][0])
        record["w"] = record_of({"w": np.full(1, 9.0, np.float32)})["w"]
        return Message(RecordDict({"arrays": record}), reply_to=message)

    grid = VirtualGrid(InlineExecutor(app, log=print, isolate=True), NAMES)
    content = RecordDict({"arrays": record_of({"w": np.zeros(1, np.float32)})})
    replies = grid.send_and_receive([Message(content, node, "train") for node in grid.get_node_ids()])
    assert seen == [0, 0, 0, 0]
    records = [next(iter(reply.content.array_records.values())) for reply in replies]
    assert all(isinstance(record, ArrayRecord) for record in records)
    assert len({id(record) for record in records}) == 4, "each reply must own its arrays"


@pytest.mark.parametrize("fold_of", [None, fold], ids=["whole", "folded"])
def test_bytes_are_counted_as_they_came_and_nothing_is_put_into_a_reply(fold_of):
    """Also not for a while: a client may call a record of its own what it likes."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        own = {"folded": ConfigRecord({"bytes": 10**9}), "metrics": MetricRecord({"loss": 0.5})}
        return Message(RecordDict({"a": record_of({"w": np.ones(2, np.float32)}), **own}), reply_to=message)

    grid = VirtualGrid(InlineExecutor(app, log=print, isolate=True), NAMES)
    exchange = grid.exchange(messages(grid), fold=fold_of() if fold_of else None)
    replies = list(exchange)
    assert exchange.bytes_up == 4 * 8
    for reply in replies:
        assert set(reply.content) == {"folded", "metrics"} | (set() if fold_of else {"a"})
        assert reply.content["folded"]["bytes"] == 10**9
