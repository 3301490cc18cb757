"""A federation on this machine: owners with data, policy and ledger, their clients, and a server."""

from __future__ import annotations

import csv
import io
import json
import random
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

from bract.clients.connection.patience import Backoff
from bract.clients.connection.screen import Screen
from bract.clients.connection.service import Client, Wishes
from bract.experiment import Experiment
from bract.privacy.ledger.ledger import Ledger
from bract.privacy.policy import Policy
from bract.server.events import Listening
from bract.server.federation.endpoint import open_endpoint
from bract.server.federation.federation import serve
from bract.tasks.registry import find_task
from bract.transport import provisioning
from bract.transport.authority import Authority
from bract.transport.certificates import Hosts

QUICK = Backoff(first=0.05, longest=0.3)
COORDINATOR = "localhost"
ANYWHERE = "127.0.0.1:0"
TABLES = {
    "experiment": {"name": "hearts", "rounds": 3, "seed": 7},
    "task": {
        "name": "tabular",
        "target": "sick",
        "positive": [1],
        "client_column": "site",
        "features": {"age": {"range": [20, 80]}, "ward": {"values": ["w0", "w1", "w2"]}},
    },
    "clients": {"minimum": 2},
    "train": {"device": "cpu", "learning_rate": 0.5, "batch_size": 16},
    "privacy": {"unit": "record", "noise_multiplier": 1.5},
    "server": {"connect_for": 20, "stall_after": 5},
    "simulation": {"curves": False, "baselines": False, "workers": 1},
}


def tables(**changes):
    """Return the experiment's tables with keys such as `train__epochs=2`."""
    made = {name: dict(table) for name, table in TABLES.items()}
    for path, value in changes.items():
        table, _, key = path.partition("__")
        made.setdefault(table, {})[key] = value
    return made


def now():
    return datetime.now(UTC)


class Owner:
    """One owner's folder: a table, a policy, a state directory with a ledger, and perhaps an identity."""

    def __init__(self, folder: Path, name: str, *, records: int = 61, **changes) -> None:
        self.folder, self.name = folder / name, name
        self.folder.mkdir(parents=True)
        chance = random.Random(name)
        self.rows = [
            {"age": f"{chance.uniform(20, 80):.4f}", "ward": f"w{i % 3}", "sick": chance.randint(0, 1), "site": name}
            for i in range(records)
        ]
        write_table(self.folder / "d.csv", self.rows)
        # By the default split a part of them is kept for testing.
        trained = find_task(Experiment.of(tables())).site(self.folder / "d.csv").train
        read = {key: value for key, value in TABLES["task"].items() if key != "name"}
        self.data = {"path": "d.csv", "records": len(trained), "epsilon": 50.0, "delta": 1e-5, "task": read}
        self.allow = {
            "tasks": ["tabular"],
            "strategies": ["fedavg"],
            "epochs": 5,
            "message_bytes": 100_000,
            "updates": ["dp-sgd"],
            "metrics": "noised",
        }
        self.site: dict[str, str] = {}
        self.change(**changes)
        Ledger.create(self.state).close()
        self.identity: Path | None = None
        self.failure: BaseException | None = None
        self.screen = io.StringIO()

    def change(self, *, data=None, allow=None, site=None) -> None:
        self.data |= data or {}
        self.allow |= allow or {}
        self.site |= site or {}
        lines = ["[site]", *_lines(self.site), "[data.heart]", *_lines(self.data), "[allow]", *_lines(self.allow)]
        self.policy.write_text("\n".join(lines) + "\n")

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def policy(self) -> Path:
        return self.folder / "policy.toml"

    def spending(self):
        with Ledger.open(self.state) as ledger:
            return ledger.spending("heart")

    def client(self, address: str, **wishes) -> Client:
        known = {"connect_for": 300.0, "backoff": QUICK, "identity": self.identity} | wishes
        if self.identity is None:
            known["name"] = self.name
        return Client(
            Wishes(server=address, policy=Policy.load(self.policy), state=self.state, **known),
            Screen(stream=self.screen),
        )

    def join(self, address: str, **wishes) -> threading.Thread:
        """Run a client in a thread; what it raised is in `failure`."""
        client = self.client(address, **wishes)

        def run() -> None:
            try:
                client.run()
            except BaseException as error:
                self.failure = error

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    def process(self, address: str, *options: str) -> subprocess.Popen[bytes]:
        """Run `bract client`."""
        how = ["--insecure", "--name", self.name] if self.identity is None else ["--identity", str(self.identity)]
        command = ["client", "--server", address, "--policy", str(self.policy), "--state", str(self.state)]
        return bract(*command, *how, *options)


def bract(*arguments: str, **how) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "bract", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how)


class Served:
    """A server in a thread of this process."""

    def __init__(
        self,
        experiment: Experiment,
        out: Path | None,
        *,
        identity=None,
        existing=None,
        listeners=(),
        address="127.0.0.1:0",
    ) -> None:
        self.events, self.result, self.failure = [], None, None
        self.told = threading.Event()
        endpoint = open_endpoint(address, identity, clock=now, problem=print)

        def run() -> None:
            try:
                self.result = serve(
                    experiment, endpoint, out=out, existing=existing, listeners=[self._take, *listeners]
                )
            except BaseException as error:
                self.failure = error
            finally:
                self.told.set()

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()
        assert self.told.wait(60)
        if self.failure is not None:
            raise self.failure
        self.address = next(each.address for each in self.events if isinstance(each, Listening))
        if identity is not None:
            self.address = self.address.replace("127.0.0.1", COORDINATOR)

    def _take(self, event) -> None:
        self.events.append(event)
        if isinstance(event, Listening):
            self.told.set()

    def seen(self, kind):
        return [each for each in self.events if isinstance(each, kind)]

    def until(self, condition, seconds=60):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end and self.failure is None, (self.failure, self.events[-5:])
            time.sleep(0.01)

    def end(self, seconds=60):
        self.thread.join(seconds)
        assert not self.thread.is_alive(), self.events[-5:]
        if self.failure is not None:
            raise self.failure
        return self.result


class Provisioned:
    """A federation's authority, with the identity of its server."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority.create(folder / "ca", name="hospitals", now=now())
        self.server = folder / "server"
        provisioning.serve(self.authority, self.server, Hosts.of([COORDINATOR], ["127.0.0.1"]), now=now())

    def certify(self, owner: Owner) -> Owner:
        folder = owner.folder / "identity"
        asked = provisioning.request(owner.name, folder)
        issued = self.authority.approve(asked.file.read_bytes(), where=str(asked.file), now=now(), days=365)
        answer = folder / "answer.pem"
        answer.write_bytes(self.authority.answer(issued))
        provisioning.install(answer, folder, fingerprint=self.authority.fingerprint, now=now())
        owner.identity = folder
        return owner


def write_table(path: Path, rows) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def until(condition, seconds: float = 40.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def address_in(run: Path, seconds: float = 60) -> str:
    """Return where a server that was just started listens, once it says so."""
    end, path = time.monotonic() + seconds, run / "private" / "federation.json"
    while time.monotonic() < end:
        try:
            found = json.loads(path.read_text()).get("listen")
        except (OSError, ValueError):
            found = None
        if found:
            return str(found)
        time.sleep(0.02)
    raise AssertionError(f"{path} names no address")


def _lines(table) -> list[str]:
    return [f"{key} = {_value(value)}" for key, value in table.items()]


def _value(value) -> str:
    return "{" + ", ".join(_lines(value)) + "}" if isinstance(value, dict) else json.dumps(value)
