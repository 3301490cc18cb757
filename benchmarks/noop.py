"""What bract itself costs in a round: virtual clients that send back what they got, with a model of 0.8 MB.

    python benchmarks/noop.py [--clients 20] [--values 200000] [--rounds 50]

Prints one line of JSON: the median milliseconds of a round, from a strategy's configure to its aggregate, by bract's
FedAvg, whose replies are folded as they come, and by Flower's, which gets whole replies, over the same grid.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg

from bract.core import flower
from bract.core.parameters import record_of
from bract.simulations.executors.executor import InlineExecutor
from bract.simulations.grid import VirtualGrid
from bract.strategies.fedavg import FedAvg

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Send the model back."""
    metrics = MetricRecord({"num-examples": 1})
    return Message(RecordDict({"arrays": message.content["arrays"], "metrics": metrics}), reply_to=message)


def measure(strategy: Any, *, clients: int, values: int, rounds: int) -> float:
    """Return the median seconds of a round."""
    grid = VirtualGrid(InlineExecutor(app, log=print), [f"client-{number}" for number in range(clients)])
    arrays: ArrayRecord = record_of({"w": np.linspace(-1, 1, values, dtype=np.float32)})
    seconds = []
    for number in range(1, rounds + 1):
        begun = time.perf_counter()
        messages = strategy.configure_train(number, arrays, ConfigRecord(), grid)
        if hasattr(strategy, "fold"):
            exchange = grid.exchange(messages, fold=strategy.fold())
            assert len(list(exchange)) == clients and exchange.total is not None
            arrays, _ = strategy.aggregate_total(number, exchange.total)
        else:
            arrays, _ = strategy.aggregate_train(number, grid.exchange(messages))
        seconds.append(time.perf_counter() - begun)
    return median(seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--clients", type=int, default=20, help="how many clients (default 20)")
    parser.add_argument("--values", type=int, default=200_000, help="float32 values of the model (default 200,000)")
    parser.add_argument("--rounds", type=int, default=50, help="how many rounds (default 50)")
    options = parser.parse_args(arguments)
    size: dict[str, int] = {"clients": options.clients, "values": options.values, "rounds": options.rounds}
    flower.identify_process(run_id=1)
    with flower.quiet():
        theirs = FlowerFedAvg(min_train_nodes=2, min_available_nodes=2)
        found = {"bract_ms": measure(FedAvg(), **size) * 1e3, "flower_ms": measure(theirs, **size) * 1e3}
    machine = {"cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}
    print(json.dumps({**{name: round(value, 2) for name, value in found.items()}, **size, "machine": machine}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
