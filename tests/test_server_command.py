"""`bract server`: an experiment over real clients, which no kill of either side ends and nothing unsuited joins."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import tomllib
import urllib.request
from dataclasses import replace
from datetime import UTC, datetime

import grpc
import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from bract.clients.connection.link import Link
from bract.clients.site.request import MessageRequest
from bract.clients.site.site import Site
from bract.core import flower, toml
from bract.core.errors import InputError, Refusal, RunError
from bract.core.keys import Key
from bract.core.parameters import digest, record_of
from bract.experiment import Experiment
from bract.privacy.policy import Policy
from bract.reports.federation import FederationProgress
from bract.reports.log import EventLog
from bract.reports.prometheus import Exporter
from bract.server import checkpoint as checkpoints
from bract.server.connections.errands import ClientStatus, Deadlines
from bract.server.connections.listener import Listener
from bract.server.events import (
    ClientFailed,
    ClientNoticed,
    ClientReplied,
    Listening,
    RoundFinished,
    RoundStarted,
    WaitingForClients,
)
from bract.server.federation.announcing import announced
from bract.server.federation.membership import Membership
from bract.server.federation.model import ServerModel
from bract.server.federation.population import Population, places
from bract.server.federation.request_grid import RequestGrid
from bract.server.federation.terms import minimum_of
from bract.server.grid import Exchange, RoundGrid
from bract.server.plan import make_plan
from bract.server.run_directory import RunDirectory
from bract.strategies.fedavg import FedAvg
from bract.transport import federation_pb2 as pb
from bract.transport.greeting import Hello
from bract.transport.wire import DESCRIBE

from .serving import COORDINATOR, QUICK, Owner, Provisioned, Served, address_in, bract, tables, write_table


@pytest.fixture
def provisioned(tmp_path) -> Provisioned:
    return Provisioned(tmp_path / "federation")


def silent(event) -> None:
    pass


@pytest.fixture
def owners(tmp_path):
    return [Owner(tmp_path, "berlin"), Owner(tmp_path, "paris", records=97)]


def simulated(folder, owners, **changes):
    """Run the same experiment over virtual clients that hold the owners' records."""
    import bract as package

    data = write_table(folder / "all.csv", [row for owner in owners for row in owner.rows])
    made = tables(task__data=str(data), privacy__randomness="seed", **changes)
    return package.simulate(Experiment.of(made), out=folder / "simulated")


def test_two_sites_train_over_mutual_tls_and_the_result_says_what_it_gives_away(tmp_path, provisioned, owners):
    log, metrics = io.StringIO(), Exporter("127.0.0.1:0")
    secrets = {"task__data": "/srv/secret/records.csv", "server__evaluate_every": 2}
    with metrics:
        served = Served(
            Experiment.of(tables(**secrets)),
            tmp_path / "run",
            identity=provisioned.server,
            listeners=[EventLog(log), metrics],
        )
        for owner in owners:
            provisioned.certify(owner).join(served.address)
        result = served.end()
        page = urllib.request.urlopen(f"http://127.0.0.1:{metrics.port}/metrics").read().decode()
    assert result.status == "completed" and result.record["rounds"] == 3
    guarantee = result.guarantee
    assert guarantee.trust.startswith("each site adds the noise to its own updates")
    assert not any(each.startswith("other runs") for each in guarantee.excludes)
    assert any("ledger of each site" in each for each in guarantee.excludes)
    assert set(guarantee.per_client) == {"berlin", "paris"} and guarantee.randomness == "secret"
    # Rounds 2 and 3 are evaluated; each message is charged once.
    assert [owner.spending().reservations for owner in owners] == [3 + 2] * 2
    planned = make_plan(Experiment.of(tables()), {each.name: each.data["records"] for each in owners}, 2, silent)
    epsilon = planned.guarantee(Experiment.of(tables())).epsilon
    assert max(guarantee.per_client.values()) == pytest.approx(epsilon)
    for owner in owners:
        expected = planned.mechanisms[owner.name].epsilon()
        assert owner.spending().parts["train"].epsilon == pytest.approx(expected, abs=1e-2)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["sites"]["paris"]["train_records"] == owners[1].data["records"]
    assert "bract_rounds_done 3.0" in page and 'bract_tensor_bytes_total{way="up"}' in page
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    assert {"listening", "client-joined", "round-finished", "checkpoint", "run-finished"} <= {
        line["event"] for line in lines
    }
    for text in (log.getvalue(), page, announced(Experiment.of(tables(**secrets)))):
        assert "/srv" not in text and str(tmp_path) not in text
    for path in (tmp_path / "run" / "private").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_seeded_clients_make_the_model_that_a_simulation_makes_and_protect_nobody(tmp_path, owners):
    served = Served(Experiment.of(tables(clients__per_round=2)), tmp_path / "run")
    for owner in owners:
        owner.join(served.address, seeded=True)
    result = served.end()
    expected = simulated(tmp_path, owners)
    assert result.model_sha256 == expected.model_sha256
    assert result.metrics == expected.metrics
    assert result.guarantee.epsilon == expected.guarantee.epsilon
    assert result.guarantee.randomness == "seed" and "protects nobody" in result.guarantee.excludes[0]


@pytest.mark.soak
def test_a_server_that_is_killed_and_stopped_goes_on_and_nobody_trains_twice(tmp_path, owners):
    slow = tables(experiment__rounds=30, server__evaluate_every=10)
    quiet = Served(Experiment.of(slow), tmp_path / "quiet")
    for name, records in (("berlin", 61), ("paris", 97)):
        Owner(tmp_path / "others", name, records=records).join(quiet.address, seeded=True)
    expected = quiet.end()
    (tmp_path / "e.toml").write_text(toml.write(slow))
    run = tmp_path / "run"
    server = bract("server", str(tmp_path / "e.toml"), "--insecure", "--listen", "127.0.0.1:0", "--out", str(run))
    address = address_in(run)
    threads = [owner.join(address, seeded=True) for owner in owners]
    _until(lambda: _rounds(run) >= 2, server)
    server.send_signal(signal.SIGKILL)
    server.communicate()
    killed = _rounds(run)
    assert 2 <= killed < 30
    # Each round's state was on the disk before the next one began.
    assert killed - 1 <= checkpoints.load(run / "checkpoint").round <= killed

    server = bract("server", "--resume", str(run), "--insecure", "--json")
    _until(lambda: _rounds(run) > killed, server)
    server.send_signal(signal.SIGTERM)
    out, err = server.communicate(timeout=120)
    assert server.returncode == 130 and b"bract server --resume" in err, err
    stopped = json.loads(out)
    assert stopped["status"] == "interrupted"
    assert killed < stopped["rounds"] == checkpoints.load(run / "checkpoint").round < 30
    assert all(thread.is_alive() for thread in threads)

    existing = RunDirectory.open(run)
    result = Served(existing.experiment(), None, address=address, existing=existing).end(120)
    assert result.model_sha256 == expected.model_sha256 and result.record["rounds"] == 30
    assert result.metrics == expected.metrics
    assert [json.loads(line)["round"] for line in (run / "metrics.jsonl").open()] == list(range(1, 31))
    assert [owner.spending().reservations for owner in owners] == [30 + 3] * 2
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads) and not any(owner.failure for owner in owners)
    with pytest.raises(InputError, match="completed"):
        Served(existing.experiment(), None, existing=existing)


HOLDS = """
import sys, time
from bract.clients.connection.link import Link

class Rome:
    def hello(self):
        return {"protocol": 1, "bract": "0", "task": "tabular", "strategy": "fedavg", "data": "d", "records": 50,
                "unit": "record", "relation": "zero-out", "updates": ["dp-sgd"], "metrics": "noised", "epochs": 1,
                "message_bytes": 10**6, "ledger": {"sequence": 1, "mac": "ab"}}
    def handle(self, message, *, progress):
        time.sleep(999)
    def head(self):
        return None

Link(Rome(), sys.argv[1], None, name="rome").run()
"""


def test_a_client_that_dies_in_a_round_is_counted_and_never_stops_it(tmp_path, owners):
    quick = tables(experiment__rounds=3, server__connect_for=1, server__stall_after=2, clients__minimum=2)
    served = Served(Experiment.of(quick), tmp_path / "run")
    # It joins, takes the message and is killed before it answers.
    process = subprocess.Popen([sys.executable, "-c", HOLDS, served.address], stderr=subprocess.DEVNULL)
    served.until(lambda: any(each.client == "rome" for each in served.seen(ClientNoticed)))
    for owner in owners[:1]:
        owner.join(served.address)
    served.until(lambda: served.seen(ClientReplied))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    served.until(lambda: served.seen(RoundFinished))
    # Below the minimum a round waits, and says so; a site that comes later takes part from then on.
    served.until(lambda: any(each.present == 1 for each in served.seen(WaitingForClients)[1:]))
    owners[1].join(served.address)
    result = served.end()
    lost = served.seen(ClientFailed)
    assert [(each.round, each.client, each.code) for each in lost] == [(1, "rome", "client-lost")]
    records = [each.record for each in served.seen(RoundFinished)]
    assert [(each["clients"], each["failed"]) for each in records] == [(1, 1), (2, 0), (2, 0)]
    assert result.status == "completed"
    assert set(result.guarantee.per_client) == {"berlin", "paris", "rome"}
    assert owners[1].spending().reservations == 2 + 1


def test_a_client_that_is_not_suited_is_refused_in_words_and_the_server_goes_on(tmp_path, owners):
    served = Served(Experiment.of(tables(train__epochs=3)), tmp_path / "run")
    frugal = Owner(tmp_path, "rome", allow={"epochs": 2})
    frugal.join(served.address).join(30)
    assert isinstance(frugal.failure, Refusal) and frugal.failure.code == "client-unsuited", frugal.failure
    assert "3 epochs" in frugal.failure.sentence
    assert served.seen(ClientNoticed)[-1].what == "refused"
    for owner in owners:
        owner.join(served.address)
    assert set(served.end().guarantee.per_client) == {"berlin", "paris"}


GOOD = {
    "strategy": "fedavg",
    "records": 200,
    "unit": "record",
    "relation": "zero-out",
    "updates": ["dp-sgd"],
    "metrics": "noised",
    "epochs": 5,
    "message_bytes": 10_000,
}


def hello(task="tabular", data="d", **changes):
    said = {key: value for key, value in (GOOD | changes).items() if value is not None}
    return Hello(bract="0", task=task, data=data, ledger={"sequence": 1, "mac": "ab"}, capabilities=said)


def membership(**changes):
    experiment = Experiment.of(tables(**changes))
    return Membership(experiment, ServerModel.of(experiment, FedAvg()), run="run-1")


UNSUITED = {
    "another task": dict(task="digits"),
    "another strategy": dict(strategy="krum"),
    "no updates that are asked for": dict(updates=["raw", "noised"]),
    "updates that are no list": dict(updates="dp-sgd"),
    "another unit": dict(unit="client"),
    "no unit": dict(unit=None),
    "too few epochs": dict(epochs=0),
    "epochs that are no number": dict(epochs="many"),
    "no records": dict(records=0),
    "records that are no number": dict(records="200"),
    "so many records that nobody could count their epsilon": dict(records=2**40),
    "small messages": dict(message_bytes=1),
    "an odd relation": dict(relation="none"),
    "an odd list": dict(relation=["zero-out"]),
    "odd metrics": dict(metrics="all"),
    "metrics in a list": dict(metrics=[1.5]),
}


@pytest.mark.parametrize("how", UNSUITED)
def test_a_hello_that_does_not_go_with_the_run_is_refused(how):
    members = membership()
    members.admit("berlin", hello())
    with pytest.raises(Refusal) as error:
        members.admit("paris", hello(**UNSUITED[how]))
    assert error.value.code == "client-unsuited" and "\n" not in error.value.sentence
    assert members.enrol(["berlin", "paris"], silent) and list(members.names.values()) == ["berlin"]


@pytest.mark.parametrize("change", [dict(data="other"), dict(records=199), dict(metrics="withheld"), dict(seeded=True)])
def test_a_member_stays_what_it_was_when_it_joined(change):
    members = membership()
    members.admit("berlin", hello())
    members.enrol(["berlin"], silent)
    asked = members.request(flower.node_id("berlin"))
    members.admit("berlin", hello())
    with pytest.raises(Refusal, match="joined this run with another"):
        members.admit("berlin", hello(**change))
    members.admit("paris", hello(records=50, metrics="withheld"))
    members.enrol(["berlin", "paris"], silent)
    assert members.request(flower.node_id("berlin")) == asked
    assert members.request(flower.node_id("paris")).metrics == "withheld"
    # A server that was killed asks for exactly the same.
    again = membership()
    again.load_state_dict(json.loads(json.dumps(members.state_dict())), silent)
    assert {node: again.request(node) for node in again.names} == {n: members.request(n) for n in members.names}
    assert again.guarantee() == members.guarantee()


def test_a_calibrated_site_that_joins_late_has_the_noise_of_a_simulation():
    target = dict(privacy__epsilon=2.0, privacy__noise_multiplier=None)
    members = membership(**target)
    members.admit("berlin", hello(records=100))
    members.enrol(["berlin"], silent)
    members.admit("paris", hello(records=300))
    members.enrol(["paris"], silent)
    planned = make_plan(Experiment.of(tables(**target)), {"berlin": 100, "paris": 300}, 2, silent)
    for name in ("berlin", "paris"):
        assert members.request(flower.node_id(name)).noise_multiplier == planned.mechanisms[name].noise_multiplier
    assert members.accounts.rounds == {"berlin": 0, "paris": 0}


CLIENTS = dict(privacy__unit="client", privacy__noise_multiplier=1.0, clients__count=4, clients__minimum=2)
CLIENT = dict(unit="client", updates=["raw", "noised"])


def test_under_client_level_privacy_the_number_of_clients_is_public_and_fixed():
    members = membership(**CLIENTS)
    for name in ("a", "b", "c", "d", "e"):
        members.admit(name, hello(**CLIENT | ({"relation": "replace-one"} if name == "b" else {})))
    members.enrol(["a", "b"], silent)
    members.admit("f", hello(**CLIENT))
    members.enrol(["d", "e", "f"], silent)
    assert list(members.names.values()) == ["a", "b", "d", "e"]
    with pytest.raises(Refusal, match="planned for 4 clients"):
        members.admit("g", hello(**CLIENT))
    plan = members.plan.aggregate
    first, second = (members.request(flower.node_id(name)) for name in ("a", "b"))
    assert first.update == "raw" and first.metrics == "withheld"
    assert first.claimed_epsilon == plan.epsilon() and plan.clients == 4
    # A budget that counts replaced clients is told what a replacement costs.
    assert second.claimed_epsilon == plan.epsilon(relation="replace-one") > first.claimed_epsilon
    # The site's ledger does not enforce what a server claims.
    assert any(each.startswith("other runs") for each in members.guarantee().excludes)
    nodes = list(members.names)
    assert places(members.names, {nodes[0]: "a", nodes[2]: "d"}, 4) == [nodes[0], -2, nodes[2], -4]
    assert places({nodes[0]: "a"}, {nodes[0]: "a"}, 3) == [nodes[0], -2, -3]
    assert places(members.names, {nodes[2]: "d"}, None) == [nodes[2]]


def test_a_ledger_bounds_other_runs_only_of_what_it_enforces():
    record = {"noise_multiplier": 1.0, "delta": 1e-5}
    members = membership(**CLIENTS, privacy__record=record)
    members.admit("a", hello())
    members.enrol(["a"], silent)
    asked, found = members.request(flower.node_id("a")), members.guarantee()
    assert asked.update == "dp-sgd" and asked.noise_multiplier == 1.0
    assert any(each.startswith("other runs") for each in found.excludes)
    assert not any(each.startswith("other runs") for each in found.record.excludes)
    no_ledger = membership()
    no_ledger.admit("a", replace(hello(), ledger=None))
    no_ledger.enrol(["a"], silent)
    assert any(each.startswith("other runs") for each in no_ledger.guarantee().excludes)


def test_where_nobody_is_trusted_each_client_noises_its_update():
    members = membership(**CLIENTS, privacy__trust="nobody")
    members.admit("a", hello(**CLIENT))
    members.enrol(["a"], silent)
    asked = members.request(flower.node_id("a"))
    assert asked.update == "noised" and asked.noise_multiplier == members.plan.local.noise_multiplier
    assert asked.claimed_epsilon is None and members.guarantee().trust.startswith("nobody is trusted")


def test_a_trusted_server_claims_its_epsilon_and_tells_nobody_who_was_drawn(tmp_path, provisioned, owners):
    log, metrics = io.StringIO(), Exporter("127.0.0.1:0")
    shown = io.StringIO()
    from rich.console import Console

    screen = FederationProgress(Console(file=shown))
    budget = {"unit": "client"}
    for owner in owners:
        owner.change(data=budget, allow={"updates": ["raw"], "metrics": "withheld"}, site={"server": COORDINATOR})
    with metrics, screen:
        served = Served(
            Experiment.of(tables(**CLIENTS)),
            tmp_path / "run",
            identity=provisioned.server,
            listeners=[EventLog(log), metrics, screen],
        )
        for owner in owners:
            provisioned.certify(owner).join(served.address)
        result = served.end()
        page = urllib.request.urlopen(f"http://127.0.0.1:{metrics.port}/metrics").read().decode()
    cohorts = [each.cohort for each in served.seen(RoundStarted)]
    # Two of the four places are nobody's.
    assert cohorts == [2, 2, 2]
    assert result.guarantee.unit == "client" and result.guarantee.trust.startswith("the server is trusted")
    for owner in owners:
        spending = owner.spending()
        # By chance one of them may never be drawn.
        assert spending.claimed == (spending.reservations > 0)
    for word in ("cohort", 'seconds"', "bytes", "failed"):
        assert word not in log.getvalue().replace('"event": "run-finished"', ""), word
    assert "bract_tensor_bytes" not in page and "bract_round_seconds" not in page
    assert 'state="connected"' in page and 'state="working"' not in page
    assert "a secret cohort" in shown.getvalue() and " of 2 clients" not in shown.getvalue()
    assert "berlin" not in json.dumps(json.loads((tmp_path / "run" / "manifest.json").read_text()))


APP = """
import torch
from flwr.app import ArrayRecord, MetricRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

def net():
    torch.manual_seed(1)
    return nn.Linear(2, 1)

app = ClientApp()

@app.train()
def train(message, context):
    state = message.content["arrays"].to_torch_state_dict()
    seen = int(context.state["count"]["rounds"]) if "count" in context.state else 0
    context.state["count"] = MetricRecord({"rounds": seen + 1})
    step = context.run_config["step"] * (seen + 1)
    arrays = ArrayRecord({name: tensor + step for name, tensor in state.items()})
    return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 20})}), reply_to=message)

@app.evaluate()
def evaluate(message, context):
    state = message.content["arrays"].to_torch_state_dict()
    metrics = MetricRecord({"num-examples": 20, "bias": float(state["bias"])})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
"""


def test_a_stock_flower_strategy_and_client_app_run_over_it(tmp_path, provisioned):
    owners = [Owner(tmp_path, name, site={"server": COORDINATOR}) for name in ("berlin", "paris")]
    for owner in owners:
        owner.data = {key: value for key, value in owner.data.items() if key in ("path", "records")}
        allowed = {"apps": ["own:app", "own:net"], "strategies": ["flwr.serverapp.strategy:FedAvg"], "metrics": "raw"}
        owner.change(allow=allowed | {"updates": ["raw"]})
        (owner.folder / "own.py").write_text(APP)
        provisioned.certify(owner)
    (tmp_path / "own.py").write_text(APP)
    experiment = Experiment.of(
        {
            "experiment": {"name": "stock", "rounds": 3},
            "task": {"model": "own:net"},
            "clients": {"app": "own:app", "count": 2, "run_config": {"step": 0.5}},
            "strategy": {"name": "flwr.serverapp.strategy:FedAvg"},
        },
        folder=tmp_path,
    )
    served = Served(experiment, tmp_path / "run", identity=provisioned.server)
    for number, owner in enumerate(owners, start=1):
        # One after the other: in this process both have a module of the same name.
        owner.join(served.address)
        served.until(lambda number=number: len(served.seen(ClientNoticed)) == number)
    result = served.end()
    assert not served.seen(ClientFailed)
    # Both clients add 0.5, 1.0 and 1.5: what they keep between rounds stays theirs.
    import torch

    torch.manual_seed(1)
    start = torch.nn.Linear(2, 1).bias.item()
    assert result.module.bias.item() == pytest.approx(start + 3.0, abs=1e-6)
    assert result.metrics["bias"] == pytest.approx(start + 3.0, abs=1e-6)
    assert "no differential privacy" in result.guarantee.sentence


class Party:
    """A client that joins and is never asked anything."""

    def hello(self):
        return {
            "protocol": 1,
            "bract": "0",
            "task": "tabular",
            "data": "d",
            "ledger": {"sequence": 1, "mac": "ab"},
        } | GOOD

    def head(self):
        return None


def test_a_resumed_round_waits_for_those_who_were_in_it_and_in_the_end_goes_on_without_them(tmp_path):
    experiment = Experiment.of(tables())
    directory = RunDirectory.create(tmp_path / "run", experiment, Key.fresh())
    stops = []

    def link(name, address):
        made = Link(Party(), address, None, name=name, backoff=QUICK)
        threading.Thread(target=made.run, daemon=True).start()
        stops.append(made)
        return made

    def opened():
        members = membership()
        listener = Listener("127.0.0.1:0", None, admit=members.admit, deadlines=Deadlines(connect_for=2)).start()
        found = Population(members, listener, directory, minimum=1, emit=told.append, should_stop=lambda: False)
        return listener, found

    told: list[WaitingForClients] = []
    first, population = opened()
    for name in ("a", "b"):
        link(name, f"127.0.0.1:{first.port}")
    _await(lambda: len(population.connected()) < 2 and len(first.status()) == 2)
    drawn = list(population.draw_from(5))
    assert drawn == [flower.node_id("a"), flower.node_id("b")]
    while stops:
        stops.pop().stop()
    first.stop("interrupted", final=False)

    second, resumed = opened()
    resumed.load()
    link("a", f"127.0.0.1:{second.port}")
    threading.Timer(0.5, link, ("b", f"127.0.0.1:{second.port}")).start()
    assert list(resumed.draw_from(5)) == drawn
    assert any(each.missing == ("b",) for each in told if isinstance(each, WaitingForClients))
    third, alone = opened()
    alone.load()
    link("a", f"127.0.0.1:{third.port}")
    began = time.monotonic()
    assert list(alone.draw_from(5)) == drawn[:1] and 1.5 < time.monotonic() - began < 10
    while stops:
        stops.pop().stop()
    for listener in (second, third):
        listener.stop()


def test_a_resumed_server_knows_an_older_copy_of_a_ledger(tmp_path, owners):
    with Site.open(owners[0].state, Policy.load(owners[0].policy), Experiment.of(tables())):
        pass
    shutil.copytree(owners[0].state, tmp_path / "older")
    run = tmp_path / "run"
    served = Served(Experiment.of(tables()), run)
    threads = [owner.join(served.address) for owner in owners]
    served.end()
    for thread in threads:
        thread.join(20)
    # As if it had been stopped before anybody was told of its end.
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(result | {"status": "interrupted"}))
    shutil.rmtree(owners[0].state)
    shutil.copytree(tmp_path / "older", owners[0].state)
    again = Served(Experiment.of(tables()), None, existing=RunDirectory.open(run))
    owners[0].join(again.address).join(30)
    assert isinstance(owners[0].failure, Refusal) and owners[0].failure.code == "ledger-rolled-back"


def test_a_revoked_site_is_told_so_and_learns_nothing_of_the_run(tmp_path, provisioned, owners):
    served = Served(Experiment.of(tables()), tmp_path / "run", identity=provisioned.server)
    for owner in owners:
        provisioned.certify(owner)
    owners[0].join(served.address)
    served.until(lambda: served.seen(ClientNoticed))
    provisioned.authority.revoke("paris", now=datetime.now(UTC))
    (provisioned.server / "revoked.pem").write_bytes(provisioned.authority.revocation_list())
    owners[1].join(served.address).join(30)
    assert isinstance(owners[1].failure, Refusal) and owners[1].failure.code == "identity-revoked"
    assert "hearts" not in owners[1].screen.getvalue()


def test_what_a_strategy_writes_into_a_message_changes_nothing_that_is_asked_of_a_site():
    sent = []

    class Keeps(RoundGrid):
        def get_node_ids(self):
            return []

        def exchange(self, messages, *, fold=None, until=None):
            sent.extend(messages)
            return Exchange(())

    flower.identify_process(1)
    members = membership()
    members.admit("berlin", hello())
    members.admit("paris", hello(metrics="withheld"))
    members.enrol(["berlin", "paris"], silent)
    written = {"server-round": 1, "own": 3, "bract-noise-multiplier": 0.001, "bract-claimed-epsilon": 9.0}
    content = RecordDict({"arrays": record_of({"w": np.ones(2)}), "config": ConfigRecord(written)})
    grid = RequestGrid(Keeps(), members.request)
    grid.exchange([Message(content, node, kind) for node in members.names for kind in ("train", "evaluate")])
    # Nobody whose policy withholds metrics is asked for any.
    assert [each.metadata.message_type for each in sent] == ["train", "evaluate", "train"]
    for message, node in zip(sent, [*members.names][:1] * 2 + [*members.names][1:], strict=True):
        said = dict(message.content["config"])
        parsed = MessageRequest.parse(said, phase=message.metadata.message_type, message_id="m")
        assert parsed.run == members.request(node) and said["own"] == 3
        assert parsed.run.noise_multiplier == 1.5
        assert parsed.model_version == digest({"w": np.ones(2)})


def test_two_servers_never_go_on_with_one_run(tmp_path, owners):
    served = Served(Experiment.of(tables()), tmp_path / "run")
    again = RunDirectory.open(tmp_path / "run")
    with pytest.raises(RunError, match="another process goes on with this run"):
        Served(again.experiment(), None, existing=again)
    for owner in owners:
        owner.join(served.address)
    assert served.end().status == "completed"


def test_a_question_of_another_version_is_answered_with_a_code(tmp_path, owners):
    served = Served(Experiment.of(tables()), tmp_path / "run")
    with grpc.insecure_channel(served.address) as channel:
        asked = pb.Question(protocol=99, bract="9.9").SerializeToString()
        with pytest.raises(grpc.RpcError) as error:
            channel.unary_unary(DESCRIBE)(asked, timeout=10)
    assert error.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert error.value.details().startswith("protocol-unsupported: ")
    for owner in owners:
        owner.join(served.address)
    served.end()


def test_what_is_announced_builds_the_same_experiment_without_the_servers_own():
    experiment = Experiment.of(tables(task__data="here.csv", compression__bits=4, clients__minimum=3))
    text = announced(experiment)
    found = tomllib.loads(text)
    assert "server" not in found and "simulation" not in found and "data" not in found["task"]
    assert "minimum" not in found["clients"] and "device" not in found["train"]
    again = Experiment.of(found)
    for table in ("experiment", "train", "strategy", "privacy", "compression"):
        there, here = getattr(again, table), getattr(experiment, table)
        assert there.model_dump(exclude={"device"}) == here.model_dump(exclude={"device"})


@pytest.mark.parametrize(
    ("clients", "minimum"),
    [({}, 2), ({"count": 5}, 5), ({"count": 5, "minimum": 3}, 3), ({"sampling": "fixed", "per_round": 9}, 9)],
)
def test_a_round_waits_for_the_minimum(clients, minimum):
    made = tables(privacy__unit="client")
    made["clients"] = clients
    assert minimum_of(Experiment.of(made)) == minimum


TWO_NOISES = [
    "--set",
    "privacy.unit=client",
    "--set",
    "privacy.trust=nobody",
    "--set",
    "privacy.record={noise_multiplier=1.0}",
]

REFUSED = {
    "no address": (["e.toml", "--insecure"], "--listen HOST:PORT: missing"),
    "neither identity nor --insecure": (["e.toml", "--listen", "127.0.0.1:0"], "--identity DIR"),
    "both": (["e.toml", "--insecure", "--identity", "here"], "not both"),
    "without certificates on the network": (["e.toml", "--insecure", "--listen", "0.0.0.0:0"], "insecure-refused"),
    "no identity": (["e.toml", "--identity", "nowhere", "--listen", "127.0.0.1:0"], "identity-missing"),
    "an asynchronous strategy": (
        ["e.toml", "--insecure", "--listen", "127.0.0.1:0", "--set", "strategy.name=fedbuff"],
        "waits for no cohort",
    ),
    "two local noises, of which a site adds one": (
        ["e.toml", "--insecure", "--listen", "127.0.0.1:0", *TWO_NOISES],
        "privacy.record",
    ),
    "no run": (["--resume", "nowhere", "--insecure"], "run-missing"),
    "a file beside --resume": (["e.toml", "--resume", "x", "--insecure"], "goes without FILE"),
    "no file": (["--insecure"], "FILE: missing"),
}


@pytest.mark.parametrize("how", REFUSED)
def test_wrong_use_is_refused_before_anything_listens(how, tmp_path, monkeypatch, capsys):
    from bract.cli.main import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "e.toml").write_text(toml.write(tables()))
    arguments, words = REFUSED[how]
    with pytest.raises(SystemExit) as ended:
        main(["server", *arguments])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
    assert sorted(each.name for each in tmp_path.iterdir()) == ["e.toml"]


def test_an_address_in_use_leaves_no_folder_behind(tmp_path, monkeypatch):
    first = Served(Experiment.of(tables()), tmp_path / "first")
    from bract.server.federation.endpoint import open_endpoint
    from bract.server.federation.federation import serve

    endpoint = open_endpoint(first.address, None, clock=time.time, problem=print)
    with pytest.raises(InputError) as error:
        serve(Experiment.of(tables()), endpoint, out=tmp_path / "second")
    assert error.value.code == "address-unusable" and not (tmp_path / "second").exists()


def test_the_live_table_shows_who_does_what_and_hides_it_where_cohorts_are_secret():
    from rich.console import Console

    status = [
        ClientStatus(name="berlin", node=1, state="working", seconds=3, stage="reserved", steps=12),
        ClientStatus(name="par\x1b[2Jis", node=2, state="away", seconds=90),
    ]

    def drawn(secret):
        out = io.StringIO()
        progress = FederationProgress(Console(file=out, width=100))
        listening = Listening(
            name="hearts", run="hearts-1", address="h:1", run_dir=None, status=lambda: status, secret_cohorts=secret
        )
        progress(listening)
        progress(ClientNoticed(what="refused", client="rome", code="client-unsuited", sentence="it is not suited"))
        progress(WaitingForClients(present=1, minimum=2))
        progress._console.print(progress._display())
        return out.getvalue()

    shown = drawn(False)
    for words in ("training, 12 steps a round", "away", "1 m", "refused rome (client-unsuited", "1 of 2 are there"):
        assert words in shown, words
    assert "\x1b" not in shown
    hidden = drawn(True)
    assert "training" not in hidden and "connected" in hidden and "away" in hidden


def test_a_code_that_a_client_made_up_is_no_label():
    log, exporter = io.StringIO(), Exporter("127.0.0.1:0")
    listening = Listening(name="n", run="r", address="a", run_dir=None, status=list, secret_cohorts=False)
    for listener in (EventLog(log), exporter):
        listener(listening)
        listener(ClientFailed(round=1, client="berlin", code="patient 17", sentence="has no cholesterol"))
    assert "patient" not in log.getvalue() and "cholesterol" not in log.getvalue()
    samples = {sample.labels.get("code") for metric in exporter.collect() for sample in metric.samples}
    assert "other" in samples and "patient 17" not in samples


def _rounds(run):
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def _await(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def _until(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.002)
