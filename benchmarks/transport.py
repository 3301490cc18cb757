"""What the transport costs on this machine, over loopback without TLS: time of a message, bytes a second, memory.

    python benchmarks/transport.py [--megabytes 200] [--clients 4] [--rounds 3] [--memory-only]

Prints one line of JSON. Server and clients are processes of their own. Memory is the peak above that of the same
process when idle, in models; a bare gRPC stream of the same pieces, in the same run, is what the speed is held against.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

PIECE = 1 << 20


def memory(field: str) -> int:
    """Return a figure of this process in bytes: VmRSS is what it holds now, VmHWM the most since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


class Echo:
    """Replies with a copy of the arrays that it got."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe, self.idle = pipe, 0

    def hello(self) -> Mapping[str, Any]:
        return {"protocol": 1, "bract": "0", "task": "echo", "data": "id"}

    def handle(self, message: Any, *, progress: Any = None) -> Any:
        from flwr.app import Message, RecordDict

        from bract.core.parameters import arrays_of, record_of

        found = {name: array.copy() for name, array in arrays_of(message.content["arrays"]).items()}
        return Message(RecordDict({"arrays": record_of(found)}), reply_to=message)

    def head(self) -> None:
        return None

    def refuse_rollback(self, head: Any) -> None:
        pass

    def forget_replies(self, run: str, up_to_round: int) -> None:
        # The server says by this when to begin to measure and when to tell.
        if up_to_round == 1:
            self.idle = memory("VmRSS")
            forget_peak()
        else:
            self.pipe.send(memory("VmHWM") - self.idle)


def client(name: str, port: int, pipe: Connection) -> None:
    from bract.clients.connection.link import Link

    Link(Echo(pipe), f"127.0.0.1:{port}", None, name=name, connect_for=30).run()


def server(pipe: Connection, clients: int, megabytes: int, rounds: int) -> None:
    import numpy as np
    from flwr.app import Message, RecordDict

    from bract.core.parameters import Layout, record_of
    from bract.core.ring import Ring
    from bract.server.connections.federation_grid import FederationGrid
    from bract.server.connections.listener import Listener
    from bract.strategies.fold import WeightedSum

    with Listener("127.0.0.1:0", None) as listener:
        pipe.send(listener.port)
        listener.wait_for_clients(clients, seconds=60)
        grid = FederationGrid(listener, run_name="benchmark")
        nodes = list(grid.get_node_ids())

        def exchange(nodes: Sequence[int], arrays: dict[str, Any], number: int) -> float:
            fold = WeightedSum(layout=Layout.of(arrays), ring=Ring(capacity=1000))
            content = RecordDict({"arrays": record_of(arrays)})
            messages = [Message(content, node, "train", group_id=str(number)) for node in nodes]
            begun = time.perf_counter()
            running = grid.exchange(messages, fold=fold)
            replies = list(running)
            seconds = time.perf_counter() - begun
            assert all(reply.has_content() for reply in replies) and running.total is not None
            assert running.total.count == len(nodes)
            assert fold.layout.unflatten_by(running.total.mean_between)
            return seconds

        small = {"w": np.zeros(10, np.float32)}
        ping = [exchange(nodes[:1], small, number) for number in range(200)]
        noop = [exchange(nodes, small, number) for number in range(200, 300)]
        grid.forget_replies(1)
        time.sleep(0.3)
        idle = memory("VmRSS")
        forget_peak()
        count = megabytes * 1_000_000 // 4
        large = {"w": np.random.default_rng(1).random(count // 2, np.float32), "v": np.ones(count // 2, np.float32)}
        seconds = [exchange(nodes, large, number) for number in range(300, 300 + rounds)]
        peak = memory("VmHWM") - idle
        grid.forget_replies(2)
        time.sleep(0.3)
        pipe.send({"ping": median(ping), "noop": median(noop), "seconds": seconds, "peak": peak})


async def bare_server(pipe: Connection, pieces: int) -> None:
    import grpc

    frame = bytes(PIECE)

    async def echo(_: Any, context: Any) -> None:
        for _piece in range(pieces):
            await context.write(frame)
        for _piece in range(pieces):
            await context.read()

    class Handlers(grpc.GenericRpcHandler):  # type: ignore[misc]
        def service(self, call: Any) -> Any:
            return grpc.stream_stream_rpc_method_handler(echo)

    running = grpc.aio.server(options=[("grpc.max_receive_message_length", 2 * PIECE)])
    running.add_generic_rpc_handlers((Handlers(),))
    pipe.send(running.add_insecure_port("127.0.0.1:0"))
    await running.start()
    await asyncio.get_running_loop().run_in_executor(None, pipe.recv)
    await running.stop(None)


async def bare_client(port: int, pieces: int) -> None:
    import grpc

    frame = bytes(PIECE)
    async with grpc.aio.insecure_channel(
        f"127.0.0.1:{port}", options=[("grpc.max_receive_message_length", 2 * PIECE)]
    ) as channel:
        call = channel.stream_stream("/bare/Echo")()
        for _ in range(pieces):
            await call.read()
        for _ in range(pieces):
            await call.write(frame)
        await call.done_writing()
        await call.code()


def serve_bare(pipe: Connection, pieces: int) -> None:
    asyncio.run(bare_server(pipe, pieces))


def fetch_bare(port: int, pieces: int, pipe: Connection) -> None:
    pipe.send(None)
    pipe.recv()
    asyncio.run(bare_client(port, pieces))


def measure_bare(clients: int, megabytes: int) -> float:
    """Return the seconds in which a bare stream takes the same bytes down and up to the same number of clients."""
    context = multiprocessing.get_context("spawn")
    pieces = max(1, megabytes * 1_000_000 // PIECE)
    pipe, theirs = context.Pipe()
    serving = context.Process(target=serve_bare, args=(theirs, pieces))
    serving.start()
    port = pipe.recv()
    ours, fetching = [], []
    for _ in range(clients):
        mine, other = context.Pipe()
        process = context.Process(target=fetch_bare, args=(port, pieces, other))
        process.start()
        mine.recv()
        ours.append(mine)
        fetching.append(process)
    begun = time.perf_counter()
    for mine in ours:
        mine.send(None)
    for process in fetching:
        process.join()
    seconds = time.perf_counter() - begun
    pipe.send(None)
    serving.join()
    return seconds


@contextmanager
def federation(
    target: Callable[..., None], clients: int, *arguments: int
) -> Iterator[tuple[Connection, list[Connection]]]:
    """Start a server, `target(pipe, clients, *arguments)`, and its clients; yield their pipes, and join them all."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    processes = [context.Process(target=target, args=(theirs, clients, *arguments))]
    processes[0].start()
    port = pipe.recv()
    ours = []
    for number in range(clients):
        mine, other = context.Pipe()
        processes.append(context.Process(target=client, args=(f"client-{number}", port, other)))
        processes[-1].start()
        ours.append(mine)
    yield pipe, ours
    for process in processes:
        process.join()


def measure(clients: int, megabytes: int, rounds: int) -> dict[str, float]:
    """Return the figures of one server with so many clients and a model of so many megabytes."""
    with federation(server, clients, megabytes, rounds) as (pipe, ours):
        found = pipe.recv()
        peaks = [mine.recv() for mine in ours]
    size = megabytes * 1_000_000
    return {
        "ping_ms": found["ping"] * 1e3,
        "noop_round_ms": found["noop"] * 1e3,
        "round_seconds": median(found["seconds"]),
        "megabytes_per_second": 2 * clients * size / median(found["seconds"]) / 1e6,
        "server_models": found["peak"] / size,
        "client_models": max(peaks) / size,
    }


def measure_beside_bare(clients: int, megabytes: int, rounds: int) -> dict[str, float]:
    """Return the same and, measured right after it, the speed of a bare stream and the share of it."""
    found = measure(clients, megabytes, rounds)
    found["bare_megabytes_per_second"] = 2 * clients * megabytes / measure_bare(clients, megabytes)
    found["share_of_bare"] = found["megabytes_per_second"] / found["bare_megabytes_per_second"]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=200, help="size of the model (default 200)")
    parser.add_argument("--clients", type=int, default=4, help="how many clients (default 4)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds with the model (default 3)")
    parser.add_argument("--memory-only", action="store_true", help="without the bare stream")
    options = parser.parse_args(arguments)
    taken = measure if options.memory_only else measure_beside_bare
    found = taken(options.clients, options.megabytes, options.rounds)
    machine = {"cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}
    rounded = {name: round(value, 3) for name, value in found.items()}
    print(json.dumps({"clients": options.clients, "megabytes": options.megabytes, **rounded, "machine": machine}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
