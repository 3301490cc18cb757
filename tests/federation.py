"""A party that counts, and clients of a federation in processes of their own."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from bract.clients.connection.link import Backoff, Link
from bract.core import flower
from bract.core.parameters import Layout, arrays_of, record_of
from bract.core.ring import Ring
from bract.privacy.ledger.chain import Head
from bract.server.connections.errands import Deadlines
from bract.server.connections.federation_grid import FederationGrid
from bract.server.connections.listener import Listener
from bract.strategies.fold import WeightedSum
from bract.transport.channel import Credentials
from bract.transport.wire import Limits

QUICK = Backoff(first=0.05, longest=0.3)


def value_of(name: str) -> float:
    return int(name.rpartition("-")[2]) / 8 + 0.1


class Counter:
    """Replies with the model that it got plus a number of its own; asked to, it is slow, fails, or answers nonsense."""

    def __init__(self, name: str, log: Path | None = None) -> None:
        self.name, self.log, self.seen, self.forgot = name, log, [], []

    def hello(self) -> dict[str, Any]:
        return {
            "protocol": 1,
            "bract": "0",
            "task": "counting",
            "data": f"id-{self.name}",
            "epochs": 1,
            "updates": ["a"],
        }

    def handle(self, message: Message, *, progress=lambda each: None) -> Message:
        asked = message.content["config"]
        self.seen.append(message.metadata.message_id)
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(json.dumps([self.name, message.metadata.message_id]) + "\n")
        if asked.get("seconds"):
            time.sleep(asked["seconds"])
        if asked.get("fail") == self.name:
            raise KeyError("patient 17 has no cholesterol")
        found = {
            name: array + np.float32(value_of(self.name))
            for name, array in arrays_of(message.content["arrays"]).items()
        }
        records = {"arrays": record_of(found), "metrics": MetricRecord({"num-examples": 3, "big": [1.5, 2.5]})}
        return Message(RecordDict(records), reply_to=message)

    def head(self) -> Head | None:
        return Head(sequence=len(self.seen), mac="ab")

    def refuse_rollback(self, head: Head) -> None:
        pass

    def forget_replies(self, run: str, up_to_round: int) -> None:
        self.forgot.append((run, up_to_round))


def links(
    names: list[str], address: str, credentials: dict[str, Credentials] | None = None, **options: Any
) -> list[str]:
    """Serve several clients in one loop, until all have ended."""

    async def serve() -> list[Any]:
        made = [
            Link(Counter(name, options.get("log")), address, (credentials or {}).get(name), name=name, backoff=QUICK,
                 limits=options.get("limits"), connect_for=options.get("connect_for", 30), notice=print)
            for name in names
        ]  # fmt: skip
        return await asyncio.gather(*(link.serve() for link in made))

    return asyncio.run(serve())


def start(names: list[str], address: str, **options: Any) -> subprocess.Popen[bytes]:
    """Start a process with these clients."""
    return subprocess.Popen([sys.executable, __file__, json.dumps([names, address, options])])


def model(size: int = 1000) -> dict[str, np.ndarray]:
    return {"w": np.linspace(-1, 1, size, dtype=np.float32), "b": np.float32(0.25).reshape(())}


def messages(nodes, arrays=None, **config: Any) -> list[Message]:
    content = RecordDict(
        {"arrays": record_of(arrays or model()), "config": ConfigRecord({"server-round": 1, **config})}
    )
    return [Message(content, node, "train") for node in nodes]


NAMES = [f"site-{number}" for number in range(4)]
DEADLINES = Deadlines(round_deadline=30, stall_after=5, connect_for=10)


def fold_of(arrays, capacity=100):
    return WeightedSum(layout=Layout.of(arrays), ring=Ring(capacity=capacity))


def inline(names, arrays, capacity=100):
    fold = fold_of(arrays, capacity)
    total = fold.start()
    for name in names:
        replied = {key: array + np.float32(value_of(name)) for key, array in arrays.items()}
        fold.add(total, RecordDict({"a": record_of(replied)}))
    return total.total


class Running:
    """A listener, its grid, and the processes of its clients."""

    def __init__(self, **options):
        self.told, self.processes, self.threads = [], [], []
        options = {"deadlines": DEADLINES, "run": 7, **options}
        address = options.pop("address", "127.0.0.1:0")
        self.listener = Listener(
            address, options.pop("credentials", None), notice=lambda *each: self.told.append(each), **options
        ).start()
        self.address = f"127.0.0.1:{self.listener.port}"
        self.grid = FederationGrid(self.listener, run_name="run")

    def clients(self, *groups, process=False, wait=True, **options):
        """Start clients, each group in a process or thread of its own, and wait until they are there."""
        if process:
            self.processes += [start(group, self.address, **options) for group in groups]
        else:
            for group in groups:
                thread = threading.Thread(target=links, args=(group, self.address), kwargs=options, daemon=True)
                thread.start()
                self.threads.append(thread)
        if wait:
            names = {name for group in groups for name in group}
            self.until(lambda: names <= {each.name for each in self.listener.status() if each.state != "away"}, 30)
        return self.processes[-len(groups) :]

    def exchange(self, arrays=None, nodes=None, fold=None, until=None, **config):
        nodes = list(self.grid.get_node_ids()) if nodes is None else [flower.node_id(name) for name in nodes]
        return self.grid.exchange(messages(nodes, arrays, **config), fold=fold, until=until)

    def codes(self, exchange):
        return sorted(flower.code_and_sentence(each.error)[0] if each.has_error() else "" for each in exchange)

    def state(self, name):
        return {each.name: each.state for each in self.listener.status()}.get(name)

    def until(self, condition, seconds=20):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, (self.told, self.listener.status())
            time.sleep(0.01)

    def close(self):
        self.listener.stop()
        for thread in self.threads:
            thread.join(10)
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    if given[2].get("log"):
        given[2]["log"] = Path(given[2]["log"])
    if given[2].get("limits"):
        given[2]["limits"] = Limits(**given[2]["limits"])
    links(given[0], given[1], **given[2])
