"""Clients in a few lines of numpy, honest or not, on the virtual grid and under Flower's own `strategy.start`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from bract.core import flower
from bract.core.parameters import arrays_of, record_of
from bract.simulations.executors.executor import InlineExecutor
from bract.simulations.grid import VirtualGrid

# What a client makes of the model it received, in the round of this number.
Client = Callable[[dict[str, np.ndarray], int], dict[str, np.ndarray]]


def grid_of(clients: Mapping[str, Client], counts: Mapping[str, int] | None = None) -> VirtualGrid:
    """Return the grid of these clients; `counts` are the examples that they report, by default 1 each."""
    flower.identify_process(1)
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        name = str(context.node_config["name"])
        number = int(message.content["config"]["server-round"])
        new = clients[name](arrays_of(message.content["arrays"]), number)
        count = MetricRecord({"num-examples": (counts or {}).get(name, 1)})
        return Message(RecordDict({"arrays": record_of(new), "metrics": count}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1})}), reply_to=message)

    return VirtualGrid(InlineExecutor(app, log=lambda trace: None), list(clients))


def start(strategy: Any, grid: VirtualGrid, initial: Mapping[str, np.ndarray], rounds: int) -> dict[str, np.ndarray]:
    """Return the model that Flower's own loop ends with: the initial one where the strategy never gave another."""
    with flower.quiet():
        result = strategy.start(grid=grid, initial_arrays=record_of(initial), num_rounds=rounds)
    return arrays_of(result.arrays) or dict(initial)


def descent(target: Any, curvature: Any = 1.0, rate: float = 1.0) -> Client:
    """Return the client that takes one gradient step of Σ curvature/2 · (w − target)², on the tensor "w"."""

    def train(model: dict[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
        w = model["w"].astype(np.float64)
        return model | {"w": (w - rate * curvature * (w - target)).astype(model["w"].dtype)}

    return train
