"""The virtual clock, and exchanges that reopen: the first replies of all in flight, and the rest later."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from bract.core import flower
from bract.core.parameters import Layout, arrays_of, record_of
from bract.core.ring import Ring
from bract.server import checkpoint as checkpoints
from bract.server.checkpoint import Checkpoint
from bract.simulations.executors.executor import InlineExecutor
from bract.simulations.grid import VirtualGrid
from bract.strategies.fold import WeightedSum

from .numpy_clients import grid_of
from .timed_clients import broken, clock, descents, targets, timed


def messages(grid, nodes, value, number=1):
    content = RecordDict(
        {"arrays": record_of({"w": np.full(1, value)}), "config": ConfigRecord({"server-round": number})}
    )
    return [Message(content, node, "train") for node in nodes]


class Counting(InlineExecutor):
    """An executor that keeps how many calls it got at once: what workers could share."""

    def run(self, calls, *, fold):
        calls = list(calls)
        self.__dict__.setdefault("sizes", []).append(len(calls))
        return super().run(calls, fold=fold)


def test_speeds_are_log_normal_with_median_one():
    logs = np.log([clock(0.7).duration(node) for node in range(4000)])
    assert abs(np.median(logs)) < 0.04 and logs.std() == pytest.approx(0.7, rel=0.05)
    assert clock(0.0).duration(3) == 1.0


def test_an_exchange_hands_over_the_first_and_reopens_for_the_rest():
    trained = []

    def client(name):
        return lambda model, number: trained.append((name, number, float(model["w"][0]))) or model

    names = [f"client-{k}" for k in range(5)]
    grid = timed({name: client(name) for name in names})
    order = sorted(grid.names, key=clock().duration)
    first = list(grid.exchange(messages(grid, grid.names, 1.0), until=2))
    assert [reply.metadata.src_node_id for reply in first] == order[:2]
    assert grid.virtual_time() == clock().duration(order[1])
    assert [name for name, *_ in trained] == [grid.names[node] for node in order[:2]], "the others are still at it"
    # In between, an exchange without `until` gets its own replies, and no others.
    own = list(grid.exchange(messages(grid, order[:1], 7.0, number=2)))
    assert [reply.metadata.src_node_id for reply in own] == order[:1]
    rest = list(grid.exchange([], until=9))
    assert [reply.metadata.src_node_id for reply in rest] == order[2:]
    assert trained[3:] == [(grid.names[node], 1, 1.0) for node in order[2:]], "on what they were sent"
    assert list(grid.exchange([], until=1)) == []


def test_arrivals_come_in_the_order_of_time_whatever_is_sent_meanwhile():
    grid = timed({f"client-{k}": (lambda model, number: model) for k in range(8)})
    due = {node: clock().duration(node) for node in grid.names}
    arrived, idle = [], list(grid.names)
    for number in range(40):
        (reply,) = grid.exchange(messages(grid, idle, 0.0, number), until=1)
        node = reply.metadata.src_node_id
        assert node == min(due, key=due.get)
        arrived.append(due[node])
        assert grid.virtual_time() == due[node]
        idle, due[node] = [node], due[node] + clock().duration(node)
    assert arrived == sorted(arrived) and len(set(arrived)) == 40


def test_equal_times_go_by_the_order_of_sending():
    grid = timed({f"client-{k}": (lambda model, number: model) for k in range(5)}, spread=0.0)
    nodes = list(grid.names)
    shuffled = [nodes[k] for k in (3, 0, 4, 1, 2)]
    first = [reply.metadata.src_node_id for reply in grid.exchange(messages(grid, shuffled, 0.0), until=3)]
    assert first == shuffled[:3] and grid.virtual_time() == 1.0
    again = [reply.metadata.src_node_id for reply in grid.exchange(messages(grid, first[::-1], 0.0), until=5)]
    assert again == shuffled[3:] + first[::-1] and grid.virtual_time() == 2.0


def test_a_round_that_waits_for_all_takes_as_long_as_the_slowest_and_evaluation_no_time():
    grid = timed(descents(6))
    list(grid.exchange(messages(grid, grid.names, 0.0)))
    slowest = max(clock().duration(node) for node in grid.names)
    assert grid.virtual_time() == slowest
    list(grid.exchange([Message(RecordDict(), node, "evaluate") for node in grid.names]))
    assert grid.virtual_time() == slowest
    assert grid_of(descents(6)).virtual_time() is None, "clients that are alike have no times worth telling"


def test_a_client_answers_one_message_after_the_other():
    """The second begins when the first is done, and finds what the first left."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        times = int(context.state["seen"]["times"]) if "seen" in context.state else 0
        context.state["seen"] = MetricRecord({"times": times + 1})
        number = int(message.content["config"]["server-round"])
        return Message(RecordDict({"m": MetricRecord({"times": times + 1, "number": number})}), reply_to=message)

    flower.identify_process(1)
    executor = Counting(app, log=print)
    grid = VirtualGrid(executor, ["ann", "bob"], clock=clock())
    node = flower.node_id("ann")
    three = [message for number in (7, 8, 9) for message in messages(grid, [node], 0.0, number)]
    replies = [reply.content["m"] for reply in grid.exchange(three, until=3)]
    assert [(reply["number"], reply["times"]) for reply in replies] == [(7, 1), (8, 2), (9, 3)]
    assert executor.sizes == [1, 1, 1], "a worker is given what the client kept when its call is made"
    assert grid.virtual_time() == pytest.approx(3 * clock().duration(node))


def test_a_failure_does_not_count_and_the_next_comes():
    clients = {f"client-{k}": (lambda model, number: model) for k in range(6)}
    quickest = min(clients, key=lambda name: clock().duration(flower.node_id(name)))
    grid = timed(clients | {quickest: broken})
    replies = list(grid.exchange(messages(grid, grid.names, 0.0), until=3))
    assert [reply.has_error() for reply in replies] == [True, False, False, False]
    assert len(list(grid.exchange([], until=9))) == 2


def test_what_a_fold_refuses_is_replaced_and_only_what_came_is_in_the_total():
    clients = {f"client-{k}": (lambda model, number: model) for k in range(6)}
    quickest = min(clients, key=lambda name: clock().duration(flower.node_id(name)))
    grid = timed(clients | {quickest: lambda model, number: {"w": np.full(1, np.nan)}})
    fold = WeightedSum(layout=Layout.of({"w": np.zeros(1)}), ring=Ring(capacity=10))
    exchange = grid.exchange(messages(grid, grid.names, 2.0), fold=fold, until=3)
    assert [reply.has_error() for reply in exchange] == [True, False, False, False]
    assert exchange.total.count == 3
    assert len(list(grid.exchange([], until=9))) == 2


def test_flights_go_through_a_checkpoint_and_their_content_is_in_it_once(tmp_path):
    def make():
        return timed({name: (lambda model, number: {"w": model["w"] * number}) for name in targets(7)})

    def replies(grid):
        return [
            (reply.metadata.src_node_id, arrays_of(reply.content["arrays"])["w"].tolist())
            for reply in grid.exchange(messages(grid, first, 5.0, number=3), until=9)
        ]

    grid = make()
    first = [reply.metadata.src_node_id for reply in grid.exchange(messages(grid, grid.names, 1.5, number=2), until=2)]
    state = grid.state_dict()
    assert len(state["clock"]["flights"]) == 5 and len(state["clock"]["contents"]) == 1
    checkpoints.save(tmp_path, Checkpoint(round=1, arrays={}, clients=state))
    again = make()
    again.load_state_dict(checkpoints.load(tmp_path).clients)
    assert again.state_dict()["clock"]["now"] == grid.virtual_time()
    assert replies(again) == replies(grid)
    assert again.virtual_time() == grid.virtual_time()


def test_a_round_that_is_repeated_finds_the_same_in_flight():
    grid = timed(descents(7))
    list(grid.exchange(messages(grid, grid.names, 1.0), until=2))
    put_back, before, order = grid.remember(), grid.state_dict(), []
    for stop in (2, None):
        exchange = grid.exchange(messages(grid, list(grid.names)[:1], 1.0), until=4)
        order.append([next(exchange).metadata.src_node_id for _ in range(stop or 4)])
        if stop:
            put_back()
            assert grid.state_dict()["clock"]["now"] == before["clock"]["now"]
            assert grid.state_dict()["clock"]["flights"] == before["clock"]["flights"]
    assert order[1][:2] == order[0]


def test_an_executor_gets_the_arrivals_of_a_step_at_once():
    flower.identify_process(1)
    app = ClientApp()
    app.train()(lambda message, context: Message(RecordDict(), reply_to=message))
    executor = Counting(app, log=print)
    grid = VirtualGrid(executor, list(targets()), clock=clock())
    for _ in range(3):
        assert len(list(grid.exchange(messages(grid, list(grid.names)[:4], 0.0), until=4))) == 4
    assert executor.sizes == [4, 4, 4]


def test_no_client_trains_before_its_reply_is_due():
    """Where some failed, an executor gets as many more as are lacking: a worker would train whatever it is given."""
    flower.identify_process(1)
    app = ClientApp()
    quickest = sorted((flower.node_id(name) for name in targets()), key=clock().duration)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if context.node_id in quickest[1:3]:
            raise ValueError("no such patient")
        return Message(RecordDict(), reply_to=message)

    executor = Counting(app, log=lambda trace: None)
    grid = VirtualGrid(executor, list(targets()), clock=clock())
    replies = list(grid.exchange(messages(grid, grid.names, 0.0), until=4))
    assert [reply.metadata.src_node_id for reply in replies] == quickest[:6]
    assert executor.sizes == [4, 2]
