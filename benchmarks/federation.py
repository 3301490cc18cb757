"""What a federation's rounds cost on this machine, held against Flower's own deployment and against bare gRPC.

    python benchmarks/federation.py [--turns 5] [--megabytes 100] [--clients 4] [--without-flower]

Prints one line of JSON. Server and clients are processes of their own, over loopback without TLS. A round that does
nothing goes from a strategy's configure to its aggregate, without a checkpoint, in bract and by Flower's SuperLink,
SuperNodes and apps. Rounds with a large model take turns with a bare gRPC stream of the same bytes; the share is the
median over the turns, since the machine's speed changes from minute to minute.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from peers import flower_federation

import transport


def server(pipe: Connection, clients: int, rounds: int) -> None:
    """Run rounds of FedAvg over clients that send back what they got, and send the seconds of each."""
    import numpy as np
    from flwr.app import ConfigRecord

    from bract.core.parameters import record_of
    from bract.server.connections.federation_grid import FederationGrid
    from bract.server.connections.listener import Listener
    from bract.strategies.fedavg import FedAvg

    with Listener("127.0.0.1:0", None) as listener:
        pipe.send(listener.port)
        listener.wait_for_clients(clients, seconds=60)
        grid = FederationGrid(listener, run_name="benchmark")
        strategy, arrays, seconds = FedAvg(), record_of({"w": np.zeros(10, np.float32)}), []
        for number in range(1, rounds + 1):
            begun = time.perf_counter()
            messages = strategy.configure_train(number, arrays, ConfigRecord(), grid)
            exchange = grid.exchange(messages, fold=strategy.fold())
            replies = list(exchange)
            assert len(replies) == clients and exchange.total is not None and exchange.total.count == clients
            arrays, _ = strategy.aggregate_total(number, exchange.total)
            seconds.append(time.perf_counter() - begun)
        pipe.send(seconds)


def noop(clients: int, rounds: int) -> float:
    """Return the median seconds of a round that does nothing."""
    with transport.federation(server, clients, rounds) as (pipe, _):
        # The first rounds import and connect.
        return median(pipe.recv()[10:])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--turns", type=int, default=5, help="turns of a large model and a bare stream (default 5)")
    parser.add_argument("--megabytes", type=int, default=100, help="size of the large model (default 100)")
    parser.add_argument("--clients", type=int, default=4, help="how many clients (default 4)")
    parser.add_argument("--rounds", type=int, default=200, help="rounds that do nothing (default 200)")
    parser.add_argument("--without-flower", action="store_true", help="leave Flower's own processes out")
    options = parser.parse_args(arguments)
    found: dict[str, Any] = {"noop_round_ms": noop(options.clients, options.rounds) * 1e3}
    if not options.without_flower:
        theirs = flower_federation.measure(clients=options.clients, rounds=3, port=19091)
        found["flower_noop_round_ms"] = median(theirs) * 1e3
        found["times_flower"] = found["flower_noop_round_ms"] / found["noop_round_ms"]
    turns = [transport.measure_beside_bare(options.clients, options.megabytes, rounds=3) for _ in range(options.turns)]
    for name in sorted({*(turns[0] if turns else ())} - {"ping_ms", "noop_round_ms"}):
        found[name] = median(turn[name] for turn in turns)
    shares = sorted(round(turn["share_of_bare"], 3) for turn in turns)
    rounded = {name: round(value, 3) for name, value in found.items()}
    machine = {"cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}
    about = {"clients": options.clients, "megabytes": options.megabytes, "machine": machine}
    print(json.dumps({**rounded, "shares": shares, **about}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
