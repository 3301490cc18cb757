"""`bract client`: real client processes against a listener in this one, and what a hostile server may announce."""

from __future__ import annotations

import io
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import safetensors.torch
import torch
from flwr.app import ConfigRecord, Message, RecordDict

from bract.cli.main import main
from bract.clients.connection.patience import Backoff, Patience
from bract.clients.connection.proposal import (
    pinned,
    proposed,
    refuse_another,
    refuse_foreign_options,
    refuse_unlisted,
)
from bract.clients.connection.screen import Screen
from bract.clients.connection.service import Client, Wishes
from bract.clients.site.request import RunRequest
from bract.core import flower
from bract.core.errors import BractError, InputError, Refusal, RunError
from bract.core.parameters import arrays_of, record_of
from bract.experiment import Experiment
from bract.privacy.ledger.ledger import Ledger
from bract.privacy.policy import Policy
from bract.server.connections.errands import Deadlines
from bract.server.connections.federation_grid import FederationGrid
from bract.server.connections.listener import Listener
from bract.tasks.prepared import load_site, save_site
from bract.tasks.registry import find_task
from bract.tasks.task import Examples, SiteData
from bract.transport import provisioning
from bract.transport.announcement import Announcement
from bract.transport.authority import Authority
from bract.transport.certificates import Hosts
from bract.transport.credentials import server_credentials
from bract.transport.identities import Identity
from bract.transport.peers import peer_name

from .serving import until

NOW = datetime.now(UTC)
DAY = timedelta(days=1)
QUICK = Backoff(first=0.05, longest=0.3)
DEADLINES = Deadlines(round_deadline=60, stall_after=10, connect_for=60)
POLICY = """
[data.lines]
records = 20
epsilon = 8.0
delta = 1e-5
[allow]
tasks = ["own:Lines", "synthetic"]
strategies = ["fedavg"]
apps = ["own:app", "own:net"]
epochs = 5
message_bytes = 100_000
updates = ["dp-sgd"]
"""
EXPERIMENT = """
[experiment]
rounds = 3
[task]
name = "own:Lines"
[train]
batch_size = 10
[privacy]
unit = "record"
noise_multiplier = 1.5
"""
RUN = RunRequest(
    run="first",
    task="own:Lines",
    strategy="fedavg",
    update="dp-sgd",
    rounds=3,
    batch_size=10,
    clipping_norm=1.0,
    noise_multiplier=1.5,
    delta=1e-5,
)
# Code of the owner's own. It trains for as long as there is a file named hold, and says so by another.
OWN = """
import time
from pathlib import Path
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn
from bract.tasks.classification import Classification
from bract.tasks.task import Examples, SiteData

HERE = Path(__file__).parent
(HERE / "imported").touch()


class Lines(Classification):
    classes = ("a", "b")

    def __init__(self, words: str = "", depth: int = 1) -> None:
        self.words = words

    def model(self):
        return nn.Linear(3, 1)

    def partitions(self, source):
        return {"all": self.site(source)}

    def site(self, path):
        rows = torch.tensor([[float(cell) for cell in line.split(",")] for line in path.read_text().split()])
        train = Examples(rows, torch.zeros(len(rows), dtype=torch.int64))
        return SiteData(train=train, test=train.select([]))

    def loss(self, outputs, targets):
        while (HERE / "hold").exists():
            (HERE / "training").touch()
            time.sleep(0.01)
        return outputs[:, 0]


def net():
    return nn.Linear(3, 1)


app = ClientApp()


@app.train()
def train(message, context):
    state = message.content["arrays"].to_torch_state_dict()
    moved = {name: tensor + float(context.run_config["step"]) for name, tensor in state.items()}
    content = {"arrays": ArrayRecord(moved), "metrics": MetricRecord({"num-examples": 1})}
    return Message(RecordDict(content), reply_to=message)
"""


class Owner:
    """An owner's folder: data, code, policy, ledger."""

    def __init__(self, folder: Path, policy: str = POLICY) -> None:
        self.folder, self.state, self.policy = folder, folder / "state", folder / "policy.toml"
        folder.mkdir(exist_ok=True)
        self.data = folder / "a-secret-name.csv"
        self.data.write_text("\n".join(f"{i % 5 - 2},{i / 50},{1 - i / 100}" for i in range(20)))
        (folder / "own.py").write_text(OWN)
        self.policy.write_text(policy)
        Ledger.create(self.state).close()
        self.said = io.StringIO()

    def client(self, port: int, **changes: Any) -> Client:
        """Return a client in this process, without certificates."""
        policy = Policy.load(self.policy)
        policy = policy.at("lines", changes.pop("data", self.data))
        given: dict[str, Any] = {
            "server": f"127.0.0.1:{port}",
            "policy": policy,
            "state": self.state,
            "name": "berlin",
            "backoff": QUICK,
            "connect_for": 20.0,
            "device": "cpu",
        }
        clock = changes.pop("clock", lambda: datetime.now(UTC))
        return Client(Wishes(**{**given, **changes}), Screen(stream=self.said), clock=clock)

    def command(self, port: int, *more: str, insecure: bool = True) -> list[str]:
        known = ["--server", f"localhost:{port}", "--policy", str(self.policy), "--state", str(self.state)]
        who = ["--insecure", "--name", "berlin"] if insecure else []
        return [sys.executable, "-m", "bract", "client", *known, "--data", str(self.data), *who, *more]

    def start(self, port: int, *more: str, **how: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(port, *more, **how), cwd=self.folder.parent, stderr=subprocess.PIPE, text=True
        )

    def spending(self):
        with Ledger.open(self.state) as ledger:
            return ledger.spending("lines")


@pytest.fixture
def owner(tmp_path: Path) -> Owner:
    return Owner(tmp_path / "site")


class Server:
    """A listener that announces an experiment, and a grid over it."""

    def __init__(
        self, experiment: str | None = EXPERIMENT, *, run: str = "first", port: int = 0, credentials=None, **more: Any
    ) -> None:
        said = None if experiment is None else Announcement(run=run, experiment=experiment)
        self.told: list[tuple[str, ...]] = []
        self.listener = Listener(
            f"127.0.0.1:{port}",
            credentials,
            deadlines=DEADLINES,
            announcement=said,
            notice=lambda *each: self.told.append(each),
            **more,
        ).start()
        self.port = self.listener.port
        self.grid = FederationGrid(self.listener, run_name=run)

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.stop()

    def train(self, number: int = 1, run: RunRequest = RUN, name: str = "berlin", model=None):
        """Return the exchange with one client of one round."""
        arrays = model or {"weight": np.zeros((1, 3), np.float32), "bias": np.zeros(1, np.float32)}
        config = run.to_config() | {"server-round": number, "model-version": f"v{number}"}
        content = RecordDict({"arrays": record_of(arrays), "config": ConfigRecord(config)})
        return self.grid.exchange([Message(content, flower.node_id(name), "train")])

    def state(self, name: str = "berlin") -> str | None:
        return {each.name: each.state for each in self.listener.status()}.get(name)


class Serving:
    """A client that runs in a thread."""

    def __init__(self, client: Client) -> None:
        self.client, self.ended = client, []
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.ended.append(self.client.run())
        except BaseException as error:
            self.ended.append(error)

    def end(self, seconds: float = 20.0):
        self.thread.join(seconds)
        assert self.ended, "the client still runs"
        return self.ended[0]


def one(exchange) -> Message:
    (reply,) = exchange
    return reply


def weights(reply: Message) -> bytes:
    assert reply.has_content(), reply.error
    return b"".join(array.tobytes() for array in arrays_of(reply.content["arrays"]).values())


def said_by(process: subprocess.Popen[str], seconds: float = 20.0) -> tuple[int, str]:
    try:
        _, text = process.communicate(timeout=seconds)
    finally:
        process.kill()
    assert "Traceback" not in text
    return process.returncode, text


# Real processes


def identities(folder: Path, *, now: datetime = NOW, days: int = 365, host: str = "localhost"):
    """Return a federation's server identity and the folder of berlin's."""
    authority = Authority.create(folder / "ca", name="hospitals", now=now - DAY)
    hosts = Hosts.of([host], [])
    server = provisioning.serve(authority, folder / "server", hosts, now=now)
    asked = provisioning.request("berlin", folder / "berlin")
    issued = authority.approve(asked.file.read_bytes(), where="request", now=now, days=days)
    (folder / "answer.pem").write_bytes(authority.answer(issued))
    provisioning.install(folder / "answer.pem", folder / "berlin", fingerprint=authority.fingerprint, now=now)
    return server


def secured(folder: Path, **how: Any):
    server = identities(folder, **how)
    credentials = server_credentials(server, clock=lambda: datetime.now(UTC), problem=print)
    return {"credentials": credentials, "gatekeeper": peer_name}


def test_a_process_joins_by_its_certificate_trains_and_is_stopped(owner: Owner, tmp_path: Path) -> None:
    with Server(**secured(tmp_path, days=20)) as server:
        here = ["--identity", str(tmp_path / "berlin"), "--log-format", "json", "--device", "cpu"]
        process = owner.start(server.port, *here, insecure=False)
        server.listener.wait_for_clients(1, seconds=60)
        assert weights(one(server.train(1)))
        process.send_signal(signal.SIGTERM)
        status, text = said_by(process)
    assert status == 130
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["event"] for line in lines] == ["identity", "building", "connected", "working", "answered", "stopped"]
    assert "expires on" in lines[0]["text"] and lines[0]["level"] == "warning"
    assert (lines[2]["name"], lines[2]["run"]) == ("berlin", "first")
    assert (lines[3]["round"], lines[3]["rounds"]) == (1, 3)
    # A log is collected; it names neither the data nor where they lie, nor how many there are.
    said = "".join(line["text"] for line in lines[1:]).replace(str(server.port), "")
    assert "secret" not in text and "20" not in said
    assert owner.spending().reservations == 1


@pytest.mark.soak
def test_a_client_that_is_killed_in_training_goes_on_and_is_charged_once(owner: Owner) -> None:
    hold, training = owner.folder / "hold", owner.folder / "training"
    with Server() as server:
        first = owner.start(server.port)
        server.listener.wait_for_clients(1, seconds=60)
        hold.touch()
        exchange = server.train(1)
        until(training.exists)
        first.kill()
        first.communicate(timeout=20)
        before = owner.spending()
        hold.unlink()
        second = owner.start(server.port)
        reply = weights(one(exchange))
        after = owner.spending()
        assert (before.reservations, after.reservations, after.spent) == (1, 1, before.spent)
        # Killed again: the reply is on the disk, and is sent again without training.
        second.kill()
        second.communicate(timeout=20)
        until(lambda: server.state() == "away")
        third = owner.start(server.port)
        server.listener.wait_for_clients(1, seconds=60)
        hold.touch()
        assert weights(one(server.train(1))) == reply
        assert owner.spending().reservations == 1
        # Stopped in training, it does not wait for the end of it.
        training.unlink()
        exchange = server.train(2)
        until(training.exists)
        third.send_signal(signal.SIGINT)
        status, text = said_by(third)
        assert status == 130 and "stopped" in text


# The command in this process: a process takes seconds to import torch


def command(owner: Owner, port: int, *more: str, insecure: bool = True) -> int:
    with pytest.raises(SystemExit) as ended:
        main(owner.command(port, *more, insecure=insecure)[3:])
    return int(ended.value.code)


@pytest.mark.parametrize(
    ("line", "changed", "says"),
    [
        ("tasks", "tasks = []", 'allow.tasks: "own:Lines" is not listed (nothing is); to allow it, write tasks = '),
        ("strategies", "strategies = []", 'write strategies = ["fedavg"] (policy.toml, line '),
        ("updates", 'updates = ["noised"]', 'allow.updates: "dp-sgd" is not listed'),
    ],
)
def test_what_the_policy_does_not_allow_ends_with_3_and_the_mend(owner, capsys, line, changed, says) -> None:
    text = "\n".join(changed if each.startswith(line) else each for each in POLICY.splitlines())
    owner.policy.write_text(text)
    with Server() as server:
        assert command(owner, server.port) == 3
        assert server.state() is None
    said = capsys.readouterr()
    assert says in said.err and "bract explain policy-refused" in said.err and said.out == ""
    assert not (owner.folder / "imported").exists()


def test_without_a_ledger_the_command_that_makes_one_is_named(owner: Owner, capsys) -> None:
    owner.state.rename(owner.folder / "elsewhere")
    assert command(owner, 1, "--connect-for", "0") == 3
    assert f"`bract ledger init {owner.state}`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--server", "h.example.org:1", "--connect-for", "0"), "insecure-refused"),
        (("--server", "nowhere"), "address-unusable"),
        (("--identity", "berlin"), "usage"),
        (("--data-set", "other"), "policy-refused"),
        (("--experiment", "nowhere.toml"), "experiment-missing"),
        (("--device", "cuda:99"), "device-missing"),
        (("--name", "paris"), "policy-value"),
    ],
)
def test_what_is_wrong_on_this_side_is_said_before_a_server_is_asked(owner, capsys, arguments, code) -> None:
    owner.policy.write_text('[site]\nname = "berlin"\n' + POLICY)
    assert command(owner, 1, *arguments) == (3 if code == "policy-refused" else 2)
    said = capsys.readouterr().err
    assert f"bract explain {code}" in said and "Traceback" not in said


def test_seeded_is_for_the_loopback_alone(owner: Owner, tmp_path: Path, capsys) -> None:
    identities(tmp_path)
    here = ("--identity", str(tmp_path / "berlin"), "--seeded", "--server", "h.example.org:1", "--connect-for", "0")
    assert command(owner, 1, *here, insecure=False) == 2
    assert "insecure-refused" in capsys.readouterr().err


def test_the_path_comes_from_the_policy_or_from_the_command(owner: Owner) -> None:
    with pytest.raises(InputError, match=r"data.lines.path: missing; write it, or give --data PATH \(policy.toml"):
        Policy.load(owner.policy).path_of("lines")
    written = Policy.of({"data": {"lines": {"records": 9, "path": "here.csv"}}}, source=owner.policy)
    assert written.path_of("lines") == owner.folder / "here.csv"
    assert written.at("lines", Path("there.csv")).path_of("lines") == Path.cwd() / "there.csv"
    two = Policy.of({"data": {"a": {"records": 9, "path": "a.csv"}, "b": {"records": 9}}}, source=owner.policy)
    with pytest.raises(InputError, match="two names has two budgets"):
        two.at("b", owner.folder / "a.csv")


# What a hostile server may announce


def announced(text: str, policy: str = POLICY, folder: Path = Path("nowhere")) -> Experiment:
    experiment = proposed(text, folder=folder, device="cpu")
    refuse_unlisted(experiment, Policy.of(tomllib.loads(policy)))
    return experiment


def test_what_is_the_owners_or_the_servers_is_left_out() -> None:
    experiment = announced(
        EXPERIMENT.replace("[train]", '[train]\ndevice = "cuda:7"')
        .replace('"own:Lines"', '"synthetic"\ndata = "/etc/passwd"')
        .replace("[experiment]", '[clients]\npartitioner = "os:abort"\nminimum = 4\n[experiment]')
        + "[simulation]\nworkers = 4000\n[server]\nquorum = 7\n"
    )
    assert (experiment.task.own, experiment.train.device, experiment.server.quorum) == ({}, "cpu", 0.5)
    assert (experiment.clients.partitioner, experiment.simulation.workers) == ("natural", "auto")


TABULAR = """
[task]
name = "tabular"
target = "{target}"
positive = "yes"
[task.features]
age = {{ range = [18, 100] }}
"""
OWNERS_TABLE = """
[data.lines]
records = 20
[data.lines.task]
target = "readmitted"
positive = "yes"
[data.lines.task.features]
age = { range = [18, 100] }
[allow]
tasks = ["tabular"]
strategies = ["fedavg"]
"""


def test_how_the_data_are_read_is_the_owners_to_say() -> None:
    policy = Policy.of(tomllib.loads(OWNERS_TABLE))
    agreed = announced(TABULAR.format(target="readmitted"), OWNERS_TABLE)
    refuse_foreign_options(agreed, policy, "lines")
    # Whether a site opens with this target depends on who is in its table, and nothing would be charged.
    probing = announced(TABULAR.format(target="name"), OWNERS_TABLE)
    with pytest.raises(Refusal, match=r'task.target the server says "name".*\[data.lines.task\]'):
        refuse_foreign_options(probing, policy, "lines")
    for text in (TABULAR.format(target="readmitted") + "[task.more]\nfold = 1\n", '[task]\nname = "tabular"\n'):
        with pytest.raises(Refusal, match="is the owner's to say"):
            refuse_foreign_options(announced(text, OWNERS_TABLE), policy, "lines")
    with pytest.raises(Refusal, match=r"task\.features"):
        refuse_foreign_options(agreed, Policy.of(tomllib.loads(POLICY)), "lines")


APP = '[task]\nmodel = "own:net"\n[clients]\napp = "own:app"\ncount = 1\n'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (EXPERIMENT.replace("own:Lines", "os:abort"), "allow.tasks"),
        (EXPERIMENT.replace("own:Lines", "own:os.abort"), "allow.tasks"),
        (EXPERIMENT + '[strategy]\nname = "os:abort"\n', "allow.strategies"),
        (APP.replace("own:app", "os:abort"), "allow.apps"),
        (APP.replace("own:net", "os:abort"), "allow.apps"),
        (APP.replace("own:net", "own:Path.home"), "allow.apps"),
        (APP + 'run_config = { file = "/etc/passwd" }\n', "allow.options: clients.run_config.file"),
        (EXPERIMENT.replace("[train]", 'words = "/etc/passwd"\n[train]'), "allow.options: task.words"),
        (EXPERIMENT.replace("[train]", 'words = [[1], ["/etc/passwd"]]\n[train]'), "allow.options: task.words"),
        (EXPERIMENT.replace("[train]", "words = { path = 1 }\n[train]"), "allow.options: task.words"),
        (EXPERIMENT.replace("[train]", '[train]\nmodel = "/etc/passwd"'), "allow.options: train.model"),
    ],
)
def test_names_and_texts_that_the_policy_does_not_list_are_refused(text: str, says: str) -> None:
    with pytest.raises(Refusal, match="to allow it, write") as refused:
        announced(text)
    assert refused.value.code == "policy-refused" and refused.value.sentence.startswith(says)


def test_what_would_reach_own_code_is_refused_before_that_is_imported(owner: Owner) -> None:
    with Server(EXPERIMENT.replace("[train]", 'words = "/etc/passwd"\n[train]')) as server:
        ended = Serving(owner.client(server.port)).end()
        assert isinstance(ended, Refusal) and "allow.options" in ended.sentence and server.state() is None
    assert not (owner.folder / "imported").exists()


def test_a_strategy_of_another_gets_no_texts_either() -> None:
    text = EXPERIMENT + '[strategy]\nname = "own:Best"\nlog = "/etc/crontab"\n'
    allowing = POLICY.replace('["fedavg"]', '["fedavg", "own:Best"]')
    with pytest.raises(Refusal, match=r'write options = \["log"\]'):
        announced(text, allowing)
    assert announced(text, allowing + 'options = ["log"]\n').strategy.own == {"log": "/etc/crontab"}
    assert announced(text.replace('"/etc/crontab"', "[1, 2.5, true]"), allowing)


@pytest.mark.parametrize(
    "text",
    [
        # Python's parser takes gigabytes for a hundred thousand of them.
        "a." * 5_000 + "b = 1",
        "x = {" + "a." * 5_000 + "b = 1}",
        "[" + '"a".' * 5_000 + "b]",
        '"\u2028".' * 5_000 + "b = 1",
        "a = " + "[" * 400_000,
        "a = " + "{a = " * 100_000,
        "a = " + "9" * 900_000,
        "[task]\na = 0x" + "9" * 900_000,
        "[task]\na = nan",
        "[task]\na = 2001-01-01",
        "[task.options" + ".a" * 60 + "]",
        "\0",
        "experiment = 3",
        "[train]\nepochs = 0",
        "[train]\nno_such_key = 1",
        "[surprise]\n",
        '[privacy]\nunit = "' + "\\u001b[2J" * 900 + '"',
    ],
    ids=range(17),
)
def test_a_malformed_announcement_is_one_sentence_soon(text: str) -> None:
    start = time.monotonic()
    with pytest.raises(RunError) as refused:
        announced(text)
    assert refused.value.code == "announcement-invalid" and len(refused.value.sentence) < 600
    assert refused.value.sentence.isprintable() and time.monotonic() - start < 5
    assert ("more than 200 dots" in refused.value.sentence) == (text.count(".") > 200)


def test_huge_numbers_cost_nothing_before_the_policy_bounds_them(owner: Owner) -> None:
    text = EXPERIMENT.replace("rounds = 3", f"rounds = {2**62}").replace("batch_size = 10", f"batch_size = {2**62}")
    with Server(text) as server:
        here = Serving(owner.client(server.port))
        server.listener.wait_for_clients(1, seconds=20)
        assert weights(one(server.train(1)))
    assert here.end() == "finished"


def test_an_announcement_cannot_write_to_the_screen_as_it_likes(owner: Owner, capsys) -> None:
    with Server(EXPERIMENT.replace("own:Lines", "\\u001b[2J\\nfake line"), run="one\x1b[2J") as server:
        assert command(owner, server.port) == 3
    said = capsys.readouterr().err
    assert "\x1b" not in said and "\nfake" not in said and "?[2J?fake line" in said


def test_an_experiment_that_the_owner_pinned_is_the_only_one(owner: Owner) -> None:
    mine = owner.folder / "agreed.toml"
    # Comments, order, and what says nothing to a site may differ.
    mine.write_text(
        "# as agreed\n[privacy]\nnoise_multiplier = 1.5\nunit = 'record'\n" + EXPERIMENT.split("[privacy]")[0]
    )
    expected = pinned(mine, folder=owner.folder)
    refuse_another(proposed(EXPERIMENT + "[server]\nquorum = 0.7\n", folder=owner.folder), expected)
    with pytest.raises(Refusal, match=r"^train.batch_size = 11: is announced by the server, and 10 is what agreed"):
        refuse_another(proposed(EXPERIMENT.replace("10", "11"), folder=owner.folder), expected)
    with Server(EXPERIMENT.replace("1.5", "1.4")) as server:
        ended = Serving(owner.client(server.port, expected=mine)).end()
        assert isinstance(ended, Refusal) and ended.code == "experiment-unexpected" and server.state() is None
    assert not (owner.folder / "imported").exists()


def test_an_error_of_the_owners_code_leaves_its_trace_in_the_log_alone(owner: Owner) -> None:
    (owner.folder / "own.py").write_text(OWN.replace("return nn.Linear(3, 1)", 'raise KeyError("patient 17")'))
    with Server() as server:
        ended = Serving(owner.client(server.port)).end()
    assert isinstance(ended, RunError) and ended.code == "internal"
    assert "patient 17" not in ended.sentence + owner.said.getvalue()
    assert "KeyError: 'patient 17'" in (owner.state / "site.log").read_text()


# Servers that come, go and change


def test_the_end_of_a_federation_is_the_end(owner: Owner) -> None:
    with Server() as server:
        here = Serving(owner.client(server.port))
        server.listener.wait_for_clients(1, seconds=20)
    assert here.end() == "finished"


def test_a_message_that_the_policy_refused_is_said_and_is_the_exit_status(owner: Owner) -> None:
    with Server() as server:
        here = Serving(owner.client(server.port))
        server.listener.wait_for_clients(1, seconds=20)
        greedy = RunRequest(**{**vars(RUN), "epochs": 50})
        reply = one(server.train(2, greedy))
        assert flower.code_and_sentence(reply.error)[0] == "policy-refused"
    ended = here.end()
    assert isinstance(ended, Refusal) and ended.exit_status == 3
    assert "refused, round 2 of 3: allow.epochs: 50 epochs a round are asked for" in owner.said.getvalue()


def test_a_server_that_restarts_is_served_again_by_the_same_site(owner: Owner) -> None:
    first = Server()
    here = Serving(owner.client(first.port))
    first.listener.wait_for_clients(1, seconds=20)
    reply = weights(one(first.train(1)))
    first.listener.stop("interrupted", "killed", final=False)
    with Server(port=first.port) as second:
        second.listener.wait_for_clients(1, seconds=20)
        assert weights(one(second.train(1))) == reply
    assert here.end() == "finished"
    assert owner.said.getvalue().count("building the site") == 1 and owner.spending().reservations == 1


def test_a_server_with_another_run_is_asked_again_and_the_site_built_anew(owner: Owner) -> None:
    first = Server()
    here = Serving(owner.client(first.port, keep=True))
    first.listener.wait_for_clients(1, seconds=20)
    assert weights(one(first.train(1)))
    # The end of the federation, which a client that keeps on waits beyond.
    first.listener.stop()
    other = EXPERIMENT.replace("batch_size = 10", "batch_size = 5")
    with Server(other, run="second", port=first.port) as second:
        second.listener.wait_for_clients(1, seconds=20)
        asked = RunRequest(**{**vars(RUN), "run": "second", "batch_size": 5})
        assert weights(one(second.train(1, asked)))
        until(lambda: second.state() == "idle")
        here.client.stop()
        assert here.end() == "stopped"
    assert owner.said.getvalue().count("building the site") == 2
    assert "run second" in owner.said.getvalue() and owner.spending().runs == 2


def test_a_server_that_numbers_its_runs_otherwise_is_served_after_a_second_question(owner: Owner) -> None:
    with Server() as server:
        server.listener.run = 7
        here = Serving(owner.client(server.port))
        server.listener.wait_for_clients(1, seconds=20)
        assert weights(one(server.train(1)))
    assert here.end() == "finished"


def test_a_client_waits_for_a_server_that_is_not_there_yet_and_not_for_ever(owner: Owner) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    here = Serving(owner.client(port))
    until(lambda: "trying again" in owner.said.getvalue(), 15)
    with Server(port=port) as server:
        server.listener.wait_for_clients(1, seconds=20)
    assert here.end() == "finished"
    ended = Serving(owner.client(port, connect_for=0.3)).end()
    assert isinstance(ended, RunError) and ended.code == "server-unreachable" and "given up" in ended.sentence
    here = Serving(owner.client(port, connect_for=0.1, keep=True))
    time.sleep(1)
    assert not here.ended
    here.client.stop()
    assert here.end() == "stopped"


def test_a_server_without_an_announcement_is_named(owner: Owner) -> None:
    with Server(None) as server:
        ended = Serving(owner.client(server.port)).end()
    assert isinstance(ended, RunError) and ended.code == "protocol-unsupported"


# Certificates


def test_what_does_not_fit_in_the_handshake_is_said_in_words_and_ends_the_client(owner: Owner, tmp_path: Path) -> None:
    mine, theirs, elsewhere = tmp_path / "mine", tmp_path / "theirs", tmp_path / "elsewhere"
    for each in (mine, theirs):
        each.mkdir()
    ours, others = secured(mine), secured(theirs)
    elsewhere.mkdir()
    known = {"identity": mine / "berlin", "name": None}

    def ended(server: Server) -> BractError:
        found = Serving(owner.client(server.port, server=f"localhost:{server.port}", **known)).end()
        assert isinstance(found, BractError)
        assert server.state() is None
        return found

    with Server(**others) as server:
        found = ended(server)
        assert found.code == "server-untrusted" and "not issued by the authority that this site" in found.sentence
    with Server(**secured(elsewhere, host="coordinator.example.org")) as server:
        known["identity"] = elsewhere / "berlin"
        found = ended(server)
        assert found.code == "server-untrusted"
        assert "is for coordinator.example.org, not for localhost" in found.sentence
    known["identity"] = mine / "berlin"
    with Server() as server:
        assert "does not speak TLS" in ended(server).sentence
    # A server whose certificate is the site's authority's, and which itself trusts another one.
    identity = Identity.load(mine / "server", role="server", now=NOW)
    pair, root = [(identity.key, identity.certificate)], (theirs / "ca" / "ca.pem").read_bytes()
    credentials = grpc.ssl_server_credentials(pair, root, require_client_auth=True)
    with Server(credentials=credentials) as server:
        found = ended(server)
        assert found.code == "identity-rejected" and "berlin" in found.sentence

    def gone(context) -> str:
        raise Refusal("identity-revoked", "the certificate of site berlin was revoked")

    with Server(**{**ours, "gatekeeper": gone}) as server:
        found = ended(server)
        assert found.code == "identity-revoked" and found.exit_status == 3
        assert server.told[0][2] == "identity-revoked"
        # Refused when it asked: such a one is not told the experiment either.
        assert "building" not in owner.said.getvalue()


def test_the_name_of_a_certificate_is_the_name(owner: Owner, tmp_path: Path) -> None:
    identities(tmp_path)
    known = {"identity": tmp_path / "berlin", "server": "localhost:1"}
    assert owner.client(1, **known, **{"name": None}).name == "berlin"
    with pytest.raises(InputError, match='--name = "paris": --identity is that of berlin'):
        owner.client(1, **known, name="paris")


def test_a_site_that_stays_connected_is_warned_of_its_certificate_each_day(owner: Owner, tmp_path: Path) -> None:
    clock = [datetime.now(UTC)]
    with Server(**secured(tmp_path, days=20)) as server:
        how = {"identity": tmp_path / "berlin", "server": f"localhost:{server.port}", "name": None}
        client = owner.client(server.port, clock=lambda: clock[0], **how)
        thread = threading.Thread(target=client.run)
        thread.start()
        server.listener.wait_for_clients(1, seconds=60)
        for number, days in ((1, 0), (2, 1), (3, 0)):
            clock[0] += timedelta(days=days)
            assert weights(one(server.train(number)))
    thread.join(20)
    assert owner.said.getvalue().count("expires on") == 2
    assert "in 19 days" in owner.said.getvalue() and "in 18 days" in owner.said.getvalue()


def test_patience_believes_a_bad_certificate_at_the_third_sight() -> None:
    said: list[str] = []
    patience = Patience("h:1", seconds=60.0, notice=said.append, backoff=QUICK)
    verdict = RunError("identity-rejected", "the server closed the connection")
    for _ in range(3):
        patience.failed("x", verdict)
        patience.failed("x", verdict)
        # A server that was killed in its handshake, and is gone now.
        patience.failed("x", RunError("server-unreachable", "refused"))
    patience.failed("x", verdict)
    patience.failed("x", verdict)
    with pytest.raises(RunError, match="closed the connection"):
        patience.failed("x", verdict)
    forever = Patience("h:1", seconds=None, backoff=QUICK)
    assert all(forever.failed("x", verdict) <= 0.3 for _ in range(10))
    # The same thing is said once.
    closed, refused = "the server closed the connection; trying again", "refused; trying again"
    assert said == [closed, refused] * 3 + [closed]


# Data, apps, seeds


def test_prepared_data_come_back_and_any_task_takes_them(owner: Owner, tmp_path: Path) -> None:
    own = tmp_path / "part.safetensors"
    inputs = torch.linspace(-1, 1, 60).reshape(20, 3)
    made = SiteData(
        train=Examples(inputs[:14], torch.arange(14) % 2), test=Examples(inputs[14:], torch.zeros(6, dtype=torch.int64))
    )
    save_site(own, made)
    back = load_site(own)
    for part in ("train", "test"):
        for kind in ("inputs", "targets"):
            assert torch.equal(getattr(getattr(back, part), kind), getattr(getattr(made, part), kind))
    assert own.stat().st_mode & 0o777 == 0o600 and [own] == list(tmp_path.glob("*part*"))
    with Server(EXPERIMENT) as server:
        here = Serving(owner.client(server.port, data=own))
        server.listener.wait_for_clients(1, seconds=20)
        assert weights(one(server.train(1)))
    assert here.end() == "finished"


def test_prepared_images_keep_their_bytes(tmp_path: Path) -> None:
    task = find_task(Experiment.of({"task": {"name": "digits"}}))
    (whole,) = task.partitions(None).values()
    save_site(tmp_path / "d.safetensors", whole)
    back = load_site(tmp_path / "d.safetensors")
    assert back.train.inputs.dtype == whole.train.inputs.dtype and torch.equal(back.train.inputs, whole.train.inputs)
    assert torch.equal(back.test.targets, whole.test.targets)


TENSORS = {
    "train.inputs": torch.zeros(3, 2),
    "train.targets": torch.zeros(3, dtype=torch.int64),
    "test.inputs": torch.zeros(0, 2),
    "test.targets": torch.zeros(0, dtype=torch.int64),
}
COMPLEX = torch.zeros(3, 2, dtype=torch.complex64)
FORM = {"format": "bract prepared data 1"}


@pytest.mark.parametrize(
    ("tensors", "form"),
    [
        ({}, None),
        ({"train.targets": torch.zeros(3)}, FORM),
        ({"train.targets": torch.zeros(4, dtype=torch.int64)}, FORM),
        ({"test.inputs": torch.zeros(0, 3)}, FORM),
        ({"test.inputs": torch.zeros(0, 2, dtype=torch.uint8)}, FORM),
        ({"more": torch.zeros(1)}, FORM),
        (
            {
                "train.inputs": torch.zeros(3, 2, dtype=torch.complex64),
                "test.inputs": torch.zeros(0, 2, dtype=torch.complex64),
            },
            FORM,
        ),
    ],
)
def test_other_files_are_no_prepared_data(tmp_path: Path, tensors, form) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({**TENSORS, **tensors}, path, metadata=form)
    with pytest.raises(InputError, match="--data = ") as refused:
        load_site(path)
    assert refused.value.code == "data-invalid"
    safetensors.torch.save_file(TENSORS, path, metadata=FORM)
    assert len(load_site(path).train) == 3
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(InputError, match="no safetensors file"):
        load_site(path)


def test_a_flower_app_of_the_owners_runs_noised(owner: Owner) -> None:
    owner.policy.write_text(POLICY.replace("[allow]", 'unit = "client"\n[allow]').replace('["dp-sgd"]', '["noised"]'))
    run = RunRequest(**{**vars(RUN), "task": "own:app", "update": "noised", "noise_multiplier": 10.0, "rounds": 1})
    with Server(APP + "run_config = { step = 2.0 }\n") as server:
        here = Serving(owner.client(server.port))
        server.listener.wait_for_clients(1, seconds=20)
        first = one(server.train(1, run))
        assert weights(first) and set(first.content) == {"arrays", "metrics"}
    assert here.end() == "finished"
    assert owner.spending().reservations == 1


def test_a_seeded_client_follows_from_the_seed_and_says_what_that_is_worth(tmp_path: Path) -> None:
    replies = []
    for number, (name, seeded) in enumerate([("berlin", True), ("berlin", True), ("paris", True), ("berlin", False)]):
        owner = Owner(tmp_path / str(number))
        with Server() as server:
            here = Serving(owner.client(server.port, name=name, seeded=seeded))
            server.listener.wait_for_clients(1, seconds=20)
            replies.append(weights(one(server.train(1, name=name))))
        assert here.end() == "finished"
        assert ("this protects nobody" in owner.said.getvalue()) == seeded
    assert replies[0] == replies[1] and len(set(replies)) == 3


def test_a_screen_of_json_holds_one_object_a_line() -> None:
    stream = io.StringIO()
    screen = Screen("json", stream=stream, clock=lambda: NOW)
    screen("connected", "to\x1b[31m\nyou", fields={"name": "b\nc", "round": 2})
    screen.fail("internal", "what")
    first, second = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert first == {
        "time": NOW.isoformat(),
        "level": "info",
        "event": "connected",
        "text": "to?[31m?you",
        "name": "b?c",
        "round": 2,
    }
    assert (second["level"], second["code"]) == ("error", "internal")
    # Whoever read it may go.
    stream.close()
    screen("connected", "still")
