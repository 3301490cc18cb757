"""A site answers a server within its policy and ledger, whatever the server sends, and nothing else leaves it."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from bract.clients.site.building import build
from bract.clients.site.request import MessageRequest, RunRequest
from bract.clients.site.site import Progress, Site
from bract.core import flower
from bract.core.errors import CATALOGUE, InputError, Refusal
from bract.core.keys import Key
from bract.core.parameters import arrays_of, record_of
from bract.core.trees import pack, unpack
from bract.experiment import Experiment
from bract.privacy import accounting
from bract.privacy.ledger.chain import Head
from bract.privacy.ledger.ledger import Ledger
from bract.privacy.local import LocalPlan
from bract.privacy.policy import Policy

SERVER = "coordinator.example.org"
RUN = RunRequest(
    run="first",
    task="tabular",
    strategy="fedavg",
    update="dp-sgd",
    rounds=3,
    batch_size=16,
    clipping_norm=1.0,
    noise_multiplier=1.2,
    delta=1e-5,
    metrics="noised",
    metrics_epsilon=1.0,
    releases=2,
)
RAW = dict(
    update="raw", clipping_norm=None, noise_multiplier=None, delta=None, metrics="withheld", metrics_epsilon=None
)
NOISED = RAW | dict(update="noised", clipping_norm=1.0, noise_multiplier=2.0, delta=1e-5)

# Tasks and an app of the owner's own, beside the data.
OWN = '''
import os, signal
from pathlib import Path
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn
from bract.tasks.classification import Classification
from bract.tasks.task import Examples, SiteData

HERE = Path(__file__).parent


class Lines(Classification):
    """A record x gives the loss w · x + b, whose gradient is (x, 1), whatever w and b are."""

    classes = ("a", "b")

    def model(self):
        return nn.Linear(3, 1)

    def partitions(self, source):
        return {"all": self.site(source)}

    def site(self, path):
        rows = torch.tensor([[float(cell) for cell in line.split(",")] for line in path.read_text().split()])
        train = Examples(rows, torch.zeros(len(rows), dtype=torch.int64))
        return SiteData(train=train, test=train.select([]))

    def loss(self, outputs, targets):
        if (HERE / "raise").exists():
            raise ValueError(f"the records 0.123456789 of {HERE} make this fail")
        if (HERE / "die").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return outputs[:, 0]


class Strict(Lines):
    """Its loss and its probabilities raise at what is not finite, as torch.distributions' do."""

    def partitions(self, source):
        return {"all": self.site(source)}

    def site(self, path):
        train = super().site(path).train
        return SiteData(train=train, test=train)

    def loss(self, outputs, targets):
        if not torch.isfinite(outputs).all():
            raise ValueError("expected finite logits")
        return outputs[:, 0]

    def probabilities(self, outputs):
        if not torch.isfinite(outputs).all():
            raise ValueError("expected finite logits")
        return super().probabilities(outputs)


class Picky(Lines):
    """Its model raises for records whose first number is 7."""

    def model(self):
        class Look(nn.Module):
            def forward(self, inputs):
                if (inputs[:, 0] == 7.0).any():
                    raise IndexError("out of range: 7")
                return inputs

        return nn.Sequential(Look(), nn.Linear(3, 1))


def net():
    return nn.Sequential(nn.Linear(20, 20), nn.BatchNorm1d(20))


app = ClientApp()


@app.train()
def train(message, context):
    if (HERE / "raise").exists():
        raise ValueError("the records 0.123456789")
    assert Path(context.node_config["data"]).exists()
    state = message.content["arrays"].to_torch_state_dict()
    for name, tensor in state.items():
        state[name] = tensor + 10
    if (HERE / "nan").exists():
        state["0.weight"][0, 0] = float("nan")
    if (HERE / "shape").exists():
        state["0.weight"] = state["0.weight"][:3]
    metrics = MetricRecord({"num-examples": 977, "loss": 0.123456789})
    content = RecordDict({"arrays": ArrayRecord(state), "metrics": metrics, "more": ArrayRecord([])})
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message, context):
    metrics = MetricRecord({"num-examples": 977, "accuracy": 0.75, "curve": [0.1, 0.2], "bad": float("nan")})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
'''


class Owner:
    """An owner's folder: data, code, policy and state, and the experiment that the server proposes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.state = folder, folder / "state"
        chance = random.Random(5)
        rows = [f"{chance.uniform(20, 80):.6f},w{i % 200},{chance.randint(0, 1)}" for i in range(61)]
        (folder / "heart-of-the-matter.csv").write_text("\n".join(["age,ward,sick", *rows]))
        (folder / "lines.csv").write_text("\n".join(f"{i % 5 - 2},{i / 50},{1 - i / 100}" for i in range(50)))
        (folder / "own.py").write_text(OWN)
        self.data = {"path": "heart-of-the-matter.csv", "records": 60, "epsilon": 8.0, "delta": 1e-5}
        self.allow = {
            "tasks": ["tabular", "own:Lines", "own:Picky", "own:Strict"],
            "strategies": ["fedavg", "scaffold", "qfedavg"],
            "apps": ["own:app"],
            "epochs": 5,
            "message_bytes": 100_000,
            "updates": ["dp-sgd"],
            "metrics": "noised",
        }
        self.server: str | None = None
        self.experiment = {
            "task": {
                "name": "tabular",
                "target": "sick",
                "positive": [1],
                "features": {"age": {"range": [20, 80]}, "ward": {"values": [f"w{i}" for i in range(200)]}},
            },
            "train": {"device": "cpu", "learning_rate": 0.1},
            "privacy": {"unit": "record", "noise_multiplier": 1.0},
        }

    def runs_the_app(self, **privacy: object) -> None:
        self.data |= {"unit": "client"}
        self.allow |= {"updates": ["noised", "raw"]}
        self.experiment = {
            "task": {"model": "own:net"},
            "clients": {"app": "own:app", "count": 1},
            "privacy": privacy or {"unit": "none"},
        }

    def has_lines(self, task: str = "own:Lines") -> None:
        self.data |= {"path": "lines.csv", "records": 50}
        self.experiment["task"] = {"name": task}

    def policy(self) -> Policy:
        site = {"server": self.server} if self.server else {}
        return Policy.of({"site": site, "data": {"heart-9": self.data}, "allow": self.allow}, source=self.folder / "p")

    def open(self, **how: object) -> Site:
        if not self.state.exists():
            Ledger.create(self.state).close()
        experiment = Experiment.of(self.experiment, folder=self.folder)
        return Site.open(self.state, self.policy(), experiment, server=self.server, **how)  # type: ignore[arg-type]

    def spending(self):
        with Ledger.open(self.state) as ledger:
            return ledger.spending("heart-9")


@pytest.fixture
def owner(tmp_path: Path) -> Owner:
    flower.identify_process(1)
    return Owner(tmp_path)


@pytest.fixture
def next_to_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a site take noise that gives no epsilon, so that what lies under it can be seen."""
    monkeypatch.setattr(LocalPlan, "epsilon", lambda plan, participations=None, *, relation="zero-out": 1.0)


def asked(**changes: object) -> RunRequest:
    return RunRequest(**{**vars(RUN), **changes})  # type: ignore[arg-type]


def model_of(site: Site, value: float = 0.0) -> dict[str, np.ndarray]:
    layout = site._built.work.layout
    rows = zip(layout.names, layout.shapes, layout.dtypes, strict=True)
    return {name: np.full(shape, value, dtype=dtype) for name, shape, dtype in rows}


def message_of(
    model, message_id="m1", *, phase="train", number=1, run=RUN, config=None, records=None, version="v1"
) -> Message:
    keys = run.to_config() | {"server-round": number, "model-version": version} | (config or {})
    content = {"arrays": record_of(model), "config": ConfigRecord(keys)} | (records or {})
    message = Message(RecordDict(content), 7, phase)
    flower.set_message_id(message, message_id)
    return message


def code_of(reply: Message) -> str:
    assert reply.has_error()
    code, sentence = flower.code_and_sentence(reply.error)
    assert sentence == CATALOGUE[code].meaning.rstrip(".")
    return code


def update_of(reply: Message) -> dict[str, np.ndarray]:
    assert reply.has_content(), reply.error
    return arrays_of(reply.content["arrays"])  # type: ignore[arg-type]


def test_a_site_trains_and_evaluates_and_releases_what_its_mechanisms_cover(owner: Owner) -> None:
    with owner.open() as site:
        told: list[Progress] = []
        model = model_of(site)
        reply = site.handle(message_of(model), progress=told.append)
        assert set(reply.content) == {"arrays", "metrics"}
        assert dict(reply.content["metrics"]) == {"num-examples": 1}
        assert {name: array.shape for name, array in update_of(reply).items()} == {"weight": (1, 201), "bias": (1,)}
        assert told == [Progress(stage="reserved", steps=4), Progress(stage="committed", steps=4)]
        measured = site.handle(message_of(model, "e1", phase="evaluate"))
        assert set(measured.content) == {"metrics"} and set(measured.content["metrics"]) == {"histogram"}
        spending = owner.spending()
        assert spending.parts["train"].epsilon == pytest.approx(
            accounting.epsilon(sampling_rate=16 / 60, noise_multiplier=1.2, steps=4, delta=1e-5), abs=1e-3
        )
        assert spending.parts["test"].epsilon == 0.5 and spending.reservations == 2


def test_a_message_seen_twice_gets_its_stored_reply(owner: Owner) -> None:
    with owner.open() as site:
        first = site.handle(message_of(model_of(site)))
    with owner.open() as site:
        told: list[Progress] = []
        again = site.handle(message_of(model_of(site)), progress=told.append)
        # A new id for the same content is the same message, sent again.
        other = site.handle(message_of(model_of(site), "m2"))
        assert told == []
        site.forget_replies("first", 1)
        assert code_of(site.handle(message_of(model_of(site)))) == "reply-forgotten"
    for each in (again, other):
        assert flower.state_to_tree(each.content)["metrics"] == flower.state_to_tree(first.content)["metrics"]
        assert all(np.array_equal(update_of(each)[name], update_of(first)[name]) for name in update_of(first))
    assert owner.spending().reservations == 1


def test_two_models_in_one_round_get_noises_that_have_nothing_to_do_with_each_other(owner: Owner) -> None:
    run = asked(noise_multiplier=50.0, metrics="withheld", metrics_epsilon=None)
    with owner.open() as site:
        noises = []
        for number, value in enumerate((0.0, 1e-3)):
            model = model_of(site, value)
            update = update_of(site.handle(message_of(model, f"m{number}", run=run)))
            noises.append((update["weight"] - model["weight"]).ravel().astype(float))
    # 201 coordinates: a correlation of 0.45 is more than six standard deviations, chance 1e-9.
    assert abs(np.corrcoef(*noises)[0, 1]) < 0.45
    # Each of 4 steps adds noise of deviation 50 · 1 / 16, times the learning rate; within six deviations of 5 %.
    expected = 0.1 * 50 / 16 * 2
    assert all(0.7 * expected < noise.std() < 1.3 * expected for noise in noises)
    assert owner.spending().reservations == 2


def foreign(shape, dtype="<f4", *, data=b"", stype="numpy.ndarray"):
    """Return an array whose header claims a shape and a type, over the given bytes."""
    header = str({"descr": dtype, "fortran_order": False, "shape": shape}).encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    whole = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data
    return Array(dtype="float32", shape=(1, 201), stype=stype, data=whole)


def with_weight(array):
    return {"arrays": ArrayRecord({"weight": array, "bias": Array(np.zeros(1, dtype="f4"))})}


NAN = np.full((1, 201), np.nan, dtype="f4")
HOSTILE = {
    "NaN in the model": (dict(records=with_weight(Array(NAN))), "value-out-of-range"),
    "infinity in the model": (dict(records=with_weight(Array(NAN * 0 + np.inf))), "value-out-of-range"),
    "another shape": (dict(records=with_weight(Array(np.zeros((201, 1), dtype="f4")))), "reply-invalid"),
    "another type": (dict(records=with_weight(Array(np.zeros((1, 201))))), "reply-invalid"),
    "a header that claims 8 TB": (dict(records=with_weight(foreign((10**12, 2)))), "reply-invalid"),
    "a header that lies about its bytes": (dict(records=with_weight(foreign((1, 201), data=b"1"))), "reply-invalid"),
    "objects to unpickle": (dict(records=with_weight(foreign((1, 201), "|O", data=b"x" * 1608))), "reply-invalid"),
    "no numpy file": (dict(records=with_weight(Array("float32", (1, 201), "numpy.ndarray", b"PK"))), "reply-invalid"),
    "another serialisation": (dict(records=with_weight(foreign((1, 201), stype="pickle"))), "reply-invalid"),
    "a tensor more": (dict(records={"arrays": ArrayRecord({"extra": Array(np.zeros(1))})}), "reply-invalid"),
    "no model": (dict(records={"arrays": MetricRecord({"a": 1})}), "reply-invalid"),
    "a record more": (dict(records={"more": record_of({"a": np.zeros(1)})}), "request-invalid"),
    "metrics": (dict(records={"metrics": MetricRecord({"a": 1.0})}), "request-invalid"),
    "no config": (dict(records={"config": MetricRecord({"a": 1.0})}), "request-invalid"),
    "a huge message": (dict(config={"padding": "x" * 100_001}), "policy-refused"),
    "a huge model": (dict(records=with_weight(Array(np.zeros((1, 20100))))), "policy-refused"),
    "NaN in the config": (dict(config={"proximal-mu": float("nan")}), "request-invalid"),
    "a million epochs": (dict(run=asked(epochs=10**6)), "policy-refused"),
    "a tiny clipping norm": (dict(run=asked(clipping_norm=1e-9)), "policy-refused"),
    "no noise": (dict(config={"bract-noise-multiplier": 0.0}), "request-invalid"),
    "hardly any noise": (dict(config={"bract-noise-multiplier": 1e-3}), "budget-exhausted"),
    "a larger delta": (dict(run=asked(delta=0.1)), "policy-refused"),
    "an unlisted strategy": (dict(run=asked(strategy="krum")), "policy-refused"),
    "another listed strategy": (dict(run=asked(strategy="scaffold")), "request-invalid"),
    "an unlisted task": (dict(run=asked(task="digits")), "policy-refused"),
    "raw updates": (dict(run=asked(**RAW)), "policy-refused"),
    "raw metrics": (dict(run=asked(metrics="raw", metrics_epsilon=None)), "policy-refused"),
    "metrics that were not planned": (
        dict(run=asked(metrics="withheld", metrics_epsilon=None), phase="evaluate"),
        "metrics-withheld",
    ),
    "a round after the last": (dict(number=4), "request-invalid"),
    "a text for a round": (dict(config={"server-round": "1"}), "request-invalid"),
    "no id": (dict(message_id=""), "request-invalid"),
    "a query": (dict(phase="query"), "request-invalid"),
    "a train message of another action": (dict(phase="train.all"), "request-invalid"),
}


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory):
    flower.identify_process(1)
    owner = Owner(tmp_path_factory.mktemp("owner"))
    with owner.open() as site:
        yield owner, site


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_message_is_answered_by_a_code_and_charges_nothing(opened, name) -> None:
    owner, site = opened
    how, code = HOSTILE[name]
    reply = site.handle(message_of(model_of(site), **{"message_id": "h"} | how))
    assert code_of(reply) == code
    assert owner.spending().reservations == 0


def test_an_error_is_no_request(opened) -> None:
    _, site = opened
    error = flower.error_reply(message_of(model_of(site)), "internal", "go on")
    assert code_of(site.handle(error)) == "request-invalid"


@pytest.mark.parametrize(
    ("how", "code"),
    [
        (dict(model=0.5), "message-changed"),
        (dict(config={"proximal-mu": 1.0}), "message-changed"),
        (dict(message_id="m2", number=2, run=asked(noise_multiplier=1.1)), "run-plan-changed"),
        (dict(message_id="m2", number=2, run=asked(noise_multiplier=1.3)), "run-plan-changed"),
        (dict(message_id="m2", number=2, run=asked(clipping_norm=0.5)), "run-plan-changed"),
        (dict(message_id="m2", number=2, run=asked(batch_size=8)), "run-plan-changed"),
        (dict(message_id="m2", number=2, run=asked(rounds=4)), "run-plan-changed"),
        (dict(message_id="m2", number=2, run=asked(metrics_epsilon=1.5)), "run-plan-changed"),
    ],
    ids=str,
)
def test_a_run_stays_what_its_first_message_asked(owner: Owner, how, code) -> None:
    with owner.open() as site:
        assert site.handle(message_of(model_of(site))).has_content()
        value = how.pop("model", 0.0)
        assert code_of(site.handle(message_of(model_of(site, value), **how))) == code
    assert owner.spending().reservations == 1


def test_nothing_that_leaves_holds_the_data_their_number_their_path_or_a_digest(owner: Owner) -> None:
    owner.data |= {"records": 977}
    (owner.folder / "lines.csv").write_text("\n".join(["0.123456789,0.5,0.25"] * 613))
    owner.has_lines()
    owner.data |= {"records": 977}
    out: list[str] = []
    run = asked(task="own:Lines")
    with owner.open() as site:
        assert "364 are fewer" in site.remark
        out.append(json.dumps(site.hello()))
        model = model_of(site)
        (owner.folder / "raise").touch()
        failed = site.handle(message_of(model, run=run))
        (owner.folder / "raise").unlink()
        replies = [site.handle(message_of(model, "again", run=run, version="v2"))]
        replies += [site.handle(message_of(model, "e", phase="evaluate", run=run))]
        assert all(reply.has_content() for reply in [failed, *replies])
        replies += [site.handle(message_of(model, **{"message_id": "h"} | how)) for how, _ in HOSTILE.values()]
        digest = site._built.data_digest
        for reply in [failed, *replies]:
            out.append(str({name: value for name, value in vars(reply.metadata).items() if name != "_created_at"}))
            if reply.has_error():
                out.append(str(reply.error.reason))
            else:
                tree = flower.state_to_tree(reply.content)
                out.append(json.dumps({name: sorted(part["value"]) for name, part in tree.items()}))
                out.append(json.dumps(tree["metrics"]["value"]))
                assert set(reply.content) <= {"arrays", "metrics"}
    file = owner.folder / "lines.csv"
    private = ["0.123456789", "lines.csv", owner.folder.name, "heart-9", "613", digest, "ValueError"]
    private += [hashlib.new(kind, file.read_bytes()).hexdigest() for kind in ("sha256", "sha1", "md5")]
    everything = "\n".join(out)
    assert "977" in everything
    assert [word for word in private if re.search(rf"\b{re.escape(word)}\b", everything)] == []
    log = (owner.state / "site.log").read_text()
    assert "0.123456789" in log and "Traceback" in log


def test_what_the_site_keeps_is_for_its_owner_alone(owner: Owner) -> None:
    owner.experiment |= {"strategy": {"name": "scaffold"}}
    with owner.open() as site:
        model = model_of(site)
        message = message_of(model, run=asked(strategy="scaffold"), records={"variate": record_of(model)})
        assert site.handle(message).has_content()
    for path in owner.state.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert {"site.log", "data-sets.json", "contexts"} <= {path.name for path in owner.state.iterdir()}


def test_a_data_set_has_a_random_id_that_stays(owner: Owner, tmp_path_factory) -> None:
    ids = []
    for _ in range(2):
        with owner.open() as site:
            ids.append(site.hello()["data"])
    other = Owner(tmp_path_factory.mktemp("other"))
    with other.open() as site:
        ids.append(site.hello()["data"])
    assert ids[0] == ids[1] != ids[2] and len(ids[0]) == 32


def test_more_records_than_declared_are_refused_on_the_owners_screen(owner: Owner) -> None:
    owner.has_lines()
    owner.data |= {"records": 49}
    with pytest.raises(Refusal, match="records = 49: the data set holds 50 training records") as caught:
        owner.open()
    assert (caught.value.code, caught.value.exit_status) == ("data-undeclared", 3)


def trained(owner: Owner, key: Key, *, run: RunRequest, noise: float = 0.0) -> np.ndarray:
    """Return the change of (w, b) after one round of the owner's Lines with a fixed key, and noise that may be none."""
    from bract.clients.site.admission import Mechanisms
    from bract.privacy.mechanism import RecordLevelPlan

    experiment = Experiment.of(owner.experiment, folder=owner.folder)
    built = build(experiment, owner.policy(), "heart-9", server=None, log=print)
    plan = RecordLevelPlan(
        records=owner.data["records"],  # type: ignore[arg-type]
        batch_size=run.batch_size,
        epochs=run.epochs,
        rounds=1,
        clipping_norm=1.0,
        noise_multiplier=noise,
        delta=1e-5,
    )
    layout = built.work.layout
    message = message_of(layout.unflatten(np.zeros(layout.size)), run=run)
    request = MessageRequest.parse(dict(message.content["config"]), phase="train", message_id="m")  # type: ignore[arg-type]
    from flwr.app import Context

    context = Context(run_id=1, node_id=1, node_config={"name": "heart-9"}, state=RecordDict(), run_config={})
    mechanisms = Mechanisms(training=plan, local=None, evaluation=None, events={}, plan=None)
    reply = built.work.answer(message, context, request, mechanisms, key)
    assert dict(reply.content["metrics"]) == {"num-examples": 1}
    return layout.flatten(update_of(reply))


def rows_of(owner: Owner) -> list[str]:
    return (owner.folder / "lines.csv").read_text().split()


@pytest.mark.parametrize("bad", ["nan,0,0", "inf,1,1", "7,1,1"])
def test_a_bad_row_changes_nothing_but_its_own_contribution(owner: Owner, bad) -> None:
    """In the middle of the file and under sampling: all others are drawn and clipped as before."""
    owner.has_lines("own:Picky")
    key, run = Key.from_seed(3), asked(task="own:Picky", batch_size=20, epochs=3)
    rows = rows_of(owner)
    whole = trained(owner, key, run=run)
    place = 20
    (owner.folder / "lines.csv").write_text("\n".join([*rows[:place], bad, *rows[place + 1 :]]))
    without = trained(owner, key, run=run)
    record = np.array([float(cell) for cell in rows[place].split(",")] + [1.0])
    own = 0.1 / 20 * record / max(1.0, float(np.linalg.norm(record)))
    times = float((without - whole) @ own / (own @ own))
    assert times == pytest.approx(round(times), abs=1e-3) and 1 <= round(times) <= 9
    assert np.allclose(without - whole, round(times) * own, atol=1e-6)


@pytest.mark.parametrize("phase", ["train", "evaluate"])
def test_whether_the_code_fails_on_a_record_is_seen_by_nobody(owner: Owner, phase: str) -> None:
    """The model is finite, and overflows for the one record whose first number is 3."""
    owner.has_lines("own:Strict")
    (owner.folder / "lines.csv").write_text("\n".join([*rows_of(owner)[:-1], "3,0,0"]))
    run = asked(task="own:Strict", batch_size=50)
    with owner.open() as site:
        model = model_of(site)
        model["weight"][0, 0] = 1.5e38
        reply = site.handle(message_of(model, phase=phase, run=run))
        assert reply.has_content(), reply.error
    log = (owner.state / "site.log").read_text()
    assert ("code failed" in log, "expected finite logits" in log) == (True, True)


@pytest.mark.parametrize("dropped", [1, 7, 49])
def test_missing_rows_are_records_without_contribution(owner: Owner, dropped: int) -> None:
    """With every record in each step the update is the sum of the records that are there, over the declared number."""
    owner.has_lines()
    rows = rows_of(owner)[: 50 - dropped]
    (owner.folder / "lines.csv").write_text("\n".join(rows))
    records = np.array([[float(cell) for cell in row.split(",")] + [1.0] for row in rows])
    clipped = records / np.maximum(1.0, np.linalg.norm(records, axis=1, keepdims=True))
    update = trained(owner, Key.from_seed(3), run=asked(task="own:Lines", batch_size=64))
    assert np.allclose(update, -0.1 * clipped.sum(axis=0) / 50, atol=1e-5)


def test_a_row_without_a_target_is_neither_an_error_nor_a_count(owner: Owner) -> None:
    with owner.open() as site:
        hello = site.hello()
    path = owner.folder / "heart-of-the-matter.csv"
    path.write_text(path.read_text() + "\n33.3,w1\nbroken,w2,,,,\n44,w3,\n")
    with owner.open() as site:
        assert site.hello() | {"ledger": None} == hello | {"ledger": None}
        assert dict(site.handle(message_of(model_of(site))).content["metrics"]) == {"num-examples": 1}


def test_a_spent_budget_ends_the_run_with_a_sentence_and_exit_status_3(owner: Owner) -> None:
    owner.data |= {"epsilon": 4.0}
    run = asked(rounds=2, noise_multiplier=2.0, metrics="withheld", metrics_epsilon=None)
    with owner.open() as site:
        for number in (1, 2):
            assert site.handle(message_of(model_of(site, number), f"m{number}", number=number, run=run)).has_content()
        replies = []
        for extra in range(9):
            # A server that goes on within the run, with ever other models.
            replies.append(site.handle(message_of(model_of(site, 3 + extra), f"x{extra}", number=2, run=run)))
        assert code_of(replies[-1]) == "budget-exhausted"
        spent = owner.spending().spent
        assert spent <= 4.0
        assert site.refusal is not None and site.refusal.exit_status == 3
        assert site.refusal.sentence.startswith("heart-9: the next round of run first would exceed its budget")
        # A new run that could not end is refused before its first round.
        new = asked(run="second", rounds=50, metrics="withheld", metrics_epsilon=None)
        assert code_of(site.handle(message_of(model_of(site), "n", run=new))) == "budget-exhausted"
        assert "the rounds of run second" in site.refusal.sentence
        assert owner.spending().spent == spent


NURSERY = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import pytest
import importlib.util
spec = importlib.util.spec_from_file_location("test_site", sys.argv[2])
tests = importlib.util.module_from_spec(spec)
sys.modules["test_site"] = tests
spec.loader.exec_module(tests)
tests.flower.identify_process(1)
# What a site imports only when it needs it, once for all.
import dp_accounting.pld.privacy_loss_distribution, dp_accounting.rdp, safetensors.numpy

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

for moment in ("reserved", "training", "committed"):
    folder = Path(sys.argv[3]) / moment
    folder.mkdir()
    owner = tests.Owner(folder)
    owner.has_lines()
    tests.Ledger.create(owner.state).close()
    child = os.fork()
    if child == 0:
        site = owner.open()
        message = tests.message_of(tests.model_of(site), run=tests.asked(task="own:Lines"))
        if moment == "training":
            (folder / "die").touch()
        site.handle(message, progress=lambda at: kill() if at.stage == moment else None)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    (folder / "die").unlink(missing_ok=True)
    print(moment, os.WTERMSIG(status) if os.WIFSIGNALED(status) else "ended by itself")
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return folders of owners whose site was killed after it reserved, while it trained, and after it committed."""
    folder = tmp_path_factory.mktemp("killed")
    here = Path(__file__)
    said = subprocess.run(
        [sys.executable, "-c", NURSERY, str(here.parent), str(here), str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert said.returncode == 0, said.stderr
    assert said.stdout.split() == ["reserved", "9", "training", "9", "committed", "9"], said.stderr
    return folder


@pytest.mark.parametrize("moment", ["reserved", "training", "committed"])
def test_after_a_kill_the_message_is_answered_with_the_same_bytes_and_charged_once(killed: Path, moment: str) -> None:
    flower.identify_process(1)
    answers = []
    for copy in ("one", "two"):
        owner = Owner.__new__(Owner)
        shutil.copytree(killed / moment, killed / f"{moment}-{copy}")
        owner.__dict__ |= vars(Owner(killed / f"{moment}-{copy}"))
        owner.has_lines()
        before = owner.spending()
        assert (before.reservations, before.spent > 0) == (1, True)
        committed = list((owner.state / "replies").glob("*.reply"))
        assert len(committed) == (moment == "committed")
        with owner.open() as site:
            reply = site.handle(message_of(model_of(site), run=asked(task="own:Lines")))
            answers.append(update_of(reply)["weight"].tobytes())
        (stored,) = (owner.state / "replies").glob("*.reply")
        assert update_of_bytes(stored.read_bytes()) == answers[-1]
        assert not committed or committed == [stored]
        after = owner.spending()
        assert (after.reservations, after.spent) == (1, before.spent)
    # Two copies of the site that was killed go on to the same bytes: the noise is that of the reservation.
    assert answers[0] == answers[1]


def update_of_bytes(packed: bytes) -> bytes:
    return unpack(packed)["reply"]["arrays"]["value"]["weight"].tobytes()


def test_without_a_kill_two_sites_draw_different_noise(owner: Owner, tmp_path_factory) -> None:
    answers = []
    for each in (owner, Owner(tmp_path_factory.mktemp("other"))):
        with each.open() as site:
            answers.append(update_of(site.handle(message_of(model_of(site))))["weight"].tobytes())
    assert answers[0] != answers[1]


def test_an_older_copy_of_the_ledger_is_refused(owner: Owner) -> None:
    with owner.open() as site:
        site.handle(message_of(model_of(site)))
    shutil.copytree(owner.state, owner.folder / "backup")
    with owner.open() as site:
        site.handle(message_of(model_of(site, 1.0), "m2", number=2))
        seen = site.hello()["ledger"]
        assert Head(**seen) == site.head()
        site.refuse_rollback(Head(**seen))
    shutil.rmtree(owner.state)
    (owner.folder / "backup").rename(owner.state)
    with owner.open() as site, pytest.raises(Refusal) as caught:
        site.refuse_rollback(Head(**seen))
    assert caught.value.code == "ledger-rolled-back"


def test_a_site_without_a_ledger_does_not_open(owner: Owner) -> None:
    owner.state.mkdir()
    with pytest.raises(Refusal) as caught:
        owner.open()
    assert caught.value.code == "ledger-missing"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(tasks=[]), "allow.tasks"),
        (dict(strategies=[]), "allow.strategies"),
        (dict(updates=["noised"]), "allow.updates"),
    ],
    ids=str,
)
def test_an_experiment_that_the_policy_does_not_allow_is_refused_before_the_data_are_read(owner, change, says) -> None:
    owner.allow |= change
    owner.data |= {"path": "not-there.csv"}
    with pytest.raises(Refusal, match="to allow it, write") as caught:
        owner.open()
    assert caught.value.sentence.startswith(says)


def test_a_strategy_that_needs_metrics_says_so_at_the_start(owner: Owner) -> None:
    owner.experiment |= {"strategy": {"name": "qfedavg"}, "privacy": {"unit": "none"}}
    owner.allow |= {"updates": ["raw"]}
    with pytest.raises(Refusal, match=r"allow.metrics: QFedAvg needs the clients' own metrics"):
        owner.open()
    owner.allow |= {"metrics": "raw"}
    with pytest.raises(Refusal, match=r"site.server"):
        owner.open()


def test_what_a_client_keeps_survives_a_restart_and_is_restored_from_a_stored_reply(owner: Owner) -> None:
    owner.experiment |= {"strategy": {"name": "scaffold"}}
    run = asked(strategy="scaffold")

    def send(site: Site, number: int):
        model = model_of(site)
        beside = {"variate": record_of(model)}
        return site.handle(message_of(model, f"m{number}", number=number, run=run, records=beside))

    with owner.open() as site:
        first = send(site, 1)
        kept = site._kept.load("first")[1]
        assert set(first.content) == {"arrays", "variate", "metrics"} and set(kept) == {"variate"}
        # Option II: what is sent beside is the change of what is kept, which was zero.
        sent = arrays_of(first.content["variate"])["weight"]
        assert np.array_equal(sent, arrays_of(kept["variate"])["weight"]) and sent.any()
    shutil.rmtree(owner.state / "contexts")
    with owner.open() as site:
        send(site, 1)
        assert np.array_equal(arrays_of(site._kept.load("first")[1]["variate"])["weight"], sent)
        second = arrays_of(send(site, 2).content["variate"])["weight"]
        later = arrays_of(site._kept.load("first")[1]["variate"])["weight"]
        assert np.allclose(later, sent + second, atol=1e-6) and not np.array_equal(later, sent)
        # An earlier message, seen again, does not put an earlier state back.
        send(site, 1)
        assert np.array_equal(arrays_of(site._kept.load("first")[1]["variate"])["weight"], later)


# A Flower ClientApp: noised by the site, or raw to the server that the policy names.
APP = dict(task="own:app")


def test_an_apps_update_is_clipped_and_noised_once_a_message(owner: Owner) -> None:
    owner.runs_the_app()
    run = asked(**NOISED, **APP)
    with owner.open() as site:
        model = model_of(site)
        reply = site.handle(message_of(model, run=run))
        assert set(reply.content) == {"arrays", "metrics"}
        assert dict(reply.content["metrics"]) == {"num-examples": 1}
        assert code_of(site.handle(message_of(model, "e", phase="evaluate", run=run))) == "metrics-withheld"
    update = update_of(reply)
    # Ten was added everywhere: a counter of batches is no number that noise covers, and stays as it came.
    assert int(update["1.num_batches_tracked"]) == 0
    values = np.concatenate([array.ravel() for name, array in update.items() if "tracked" not in name]).astype(float)
    # 500 values, deviation 2 · C, and a clipped change of norm C: six standard errors of the deviation are 19 %.
    assert len(values) == 500 and 0.8 * 2 < values.std() < 1.2 * 2
    # Along the app's direction lies the norm C = 1, with noise of deviation 2.
    assert abs(values.sum() / np.sqrt(500) - 1) < 12
    closed = accounting.epsilon(sampling_rate=1.0, noise_multiplier=2.0, steps=1, delta=1e-5)
    assert owner.spending().spent == pytest.approx(closed, rel=1e-6)


@pytest.mark.usefixtures("next_to_no_noise")
def test_an_apps_update_has_the_clipping_norm_and_no_more(owner: Owner) -> None:
    owner.runs_the_app()
    owner.data |= {"epsilon": 1e7}
    run = asked(**NOISED | dict(noise_multiplier=1e-3, rounds=1), **APP)
    with owner.open() as site:
        update = update_of(site.handle(message_of(model_of(site), run=run)))
    values = np.concatenate([array.ravel() for name, array in update.items() if "tracked" not in name]).astype(float)
    # The noise's norm is 0.001 · √500, some 0.022.
    assert abs(np.linalg.norm(values) - 1) < 0.01 and abs(values.mean() * np.sqrt(500) - 1) < 0.01


@pytest.mark.usefixtures("next_to_no_noise")
@pytest.mark.parametrize("fault", ["raise", "nan", "shape"])
def test_an_app_that_fails_is_seen_by_nobody(owner: Owner, fault: str) -> None:
    owner.runs_the_app()
    owner.data |= {"epsilon": 1e7}
    run = asked(**NOISED | dict(noise_multiplier=1e-3, rounds=1), **APP)
    (owner.folder / fault).touch()
    with owner.open() as site:
        reply = site.handle(message_of(model_of(site, 2.0), run=run))
    values = np.concatenate([a.ravel() for name, a in update_of(reply).items() if "tracked" not in name]) - 2.0
    # Noise alone, of norm 0.022.
    assert 0.015 < np.linalg.norm(values) < 0.03
    if fault == "raise":
        assert "0.123456789" in (owner.state / "site.log").read_text()


def test_a_raw_app_runs_for_the_named_server_alone(owner: Owner) -> None:
    owner.runs_the_app()
    del owner.data["epsilon"], owner.data["delta"]
    run = asked(**RAW, **APP)
    with owner.open() as site:
        model = model_of(site)
        assert code_of(site.handle(message_of(model, run=run))) == "policy-refused"
        assert site.refusal is not None and "site.server" in site.refusal.sentence
    owner.server = SERVER
    with owner.open() as site:
        reply = site.handle(message_of(model, run=run))
        assert all((array == 10).all() for array in update_of(reply).values())
        assert set(reply.content) == {"arrays", "metrics"}
        assert dict(reply.content["metrics"]) == {"num-examples": 60}
        assert site.hello()["updates"] == ["noised", "raw"]
        measured = asked(**RAW | dict(metrics="raw"), **APP)
        message = message_of(model, "e", phase="evaluate", run=measured)
        assert code_of(site.handle(message)) == "policy-refused"
    owner.allow |= {"metrics": "raw"}
    with owner.open() as site:
        answer = site.handle(message_of(model, "e", phase="evaluate", run=measured))
        assert dict(answer.content["metrics"]) == {"num-examples": 60, "accuracy": 0.75}
    owner.allow |= {"updates": ["noised"]}
    with owner.open() as site:
        assert code_of(site.handle(message_of(model, run=run))) == "policy-refused"
        assert "allow.updates" in str(site.refusal)


def test_what_a_trusted_server_claims_is_marked_claimed(owner: Owner) -> None:
    owner.data |= {"unit": "client"}
    owner.allow |= {"updates": ["raw"]}
    owner.server = SERVER
    owner.experiment["privacy"] = {"unit": "client", "noise_multiplier": 1.0}
    run = asked(**RAW | dict(claimed_epsilon=3.0, delta=1e-6))
    with owner.open() as site:
        model = model_of(site)
        for number in (1, 2):
            assert site.handle(message_of(model_of(site, number), f"m{number}", number=number, run=run)).has_content()
        assert code_of(site.handle(message_of(model, "m3", run=asked(**RAW)))) == "policy-refused"
        dearer = asked(**RAW | dict(claimed_epsilon=6.0, delta=1e-6, run="second"))
        assert code_of(site.handle(message_of(model, "m4", run=dearer))) == "budget-exhausted"
    spending = owner.spending()
    assert spending.claimed and spending.spent == 3.0


def test_a_budget_that_the_ledger_knows_cannot_be_dropped(owner: Owner) -> None:
    with owner.open():
        pass
    del owner.data["epsilon"], owner.data["delta"]
    with pytest.raises(Refusal, match="the ledger holds a budget") as caught:
        owner.open()
    assert caught.value.code == "ledger-budget"


@pytest.mark.usefixtures("next_to_no_noise")
def test_local_privacy_of_bracts_own_client_hides_that_it_failed(owner: Owner) -> None:
    owner.has_lines()
    owner.data |= {"unit": "client", "epsilon": 1e7}
    owner.allow |= {"updates": ["noised"]}
    owner.experiment["privacy"] = {"unit": "client", "trust": "nobody", "noise_multiplier": 1.0}
    # A recorded step would not see that the loss begins to raise.
    owner.experiment["simulation"] = {"kernel": "sequential"}
    run = asked(**NOISED | dict(noise_multiplier=1e-3, rounds=1, clipping_norm=1e-2), task="own:Lines")
    with owner.open() as site:
        layout = site._built.work.layout
        moved = layout.flatten(update_of(site.handle(message_of(model_of(site), run=run))))
        (owner.folder / "raise").touch()
        failed = layout.flatten(update_of(site.handle(message_of(model_of(site, 1.0), "m2", run=run)))) - 1
    assert abs(np.linalg.norm(moved) - 1e-2) < 1e-3 and np.linalg.norm(failed) < 1e-3
    assert owner.spending().reservations == 2


@pytest.mark.usefixtures("next_to_no_noise")
def test_compression_goes_through_the_gate_also_where_training_failed(owner: Owner) -> None:
    owner.has_lines()
    owner.data |= {"unit": "client", "epsilon": 1e7}
    owner.allow |= {"updates": ["noised"]}
    owner.experiment |= {
        "privacy": {"unit": "client", "trust": "nobody", "noise_multiplier": 1.0},
        "compression": {"top_k": 0.4},
    }
    run = asked(**NOISED | dict(noise_multiplier=1e-3), task="own:Lines")
    with owner.open() as site:
        replies = []
        for number, fails in ((1, False), (2, True)):
            if fails:
                (owner.folder / "raise").touch()
            replies.append(site.handle(message_of(model_of(site), f"m{number}", number=number, run=run)))
            assert set(site._kept.load("first")[1]) == {"error-memory"}
    sent = [{name: array.shape for name, array in _all_arrays(reply).items()} for reply in replies]
    assert sent[0] == sent[1] and "arrays" not in replies[0].content


def _all_arrays(reply: Message) -> dict[str, np.ndarray]:
    assert reply.has_content(), reply.error
    records = {name: part for name, part in reply.content.items() if isinstance(part, ArrayRecord)}
    return {f"{name}/{key}": array for name, part in records.items() for key, array in arrays_of(part).items()}


def test_packed_trees_come_back_and_run_nothing() -> None:
    tree = {
        "a": {"x": np.arange(6, dtype="f4").reshape(2, 3), "scalar": np.array(3, dtype="i8"), "none": np.zeros((0, 2))},
        "b": [1, 2.5, "text", None, True, [1.5]],
    }
    packed = pack(tree)
    assert packed == pack(tree)
    back = unpack(packed)
    assert back["b"] == tree["b"]
    for name, array in tree["a"].items():
        assert back["a"][name].dtype == array.dtype and np.array_equal(back["a"][name], array)
    for broken in (b"", packed[:-1], b"\x80\x04K\x01.", pack({})[:20]):
        with pytest.raises(ValueError):
            unpack(broken)


def test_torch_is_left_as_it_was(owner: Owner) -> None:
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with owner.open() as site:
        site.handle(message_of(model_of(site)))
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before


def test_a_model_that_takes_no_record_of_zeros_is_refused(owner: Owner) -> None:
    owner.has_lines("own:Picky")
    (owner.folder / "own.py").write_text(OWN.replace("== 7.0", "== 0.0"))
    with pytest.raises(InputError, match="cannot take a record of zeros"):
        owner.open()


# One process at a time on a state directory.


def opened_elsewhere(owner: Owner, then: str) -> subprocess.Popen[str]:
    """Start a process that opens the owner's site, says so, and goes on with `then`."""
    program = f"""
import os, signal, sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from bract.core import flower
from bract.core.errors import Refusal
from test_site import Owner
flower.identify_process(1)
owner = Owner.__new__(Owner)
owner.__dict__ |= {owner.__dict__!r}
try:
    site = owner.open()
    print("open", flush=True)
except Refusal as error:
    print(error.code, error.sentence, flush=True)
{then}
"""
    program = program.replace(repr(owner.folder), f"Path({str(owner.folder)!r})")
    program = program.replace(repr(owner.state), f"Path({str(owner.state)!r})")
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stdout=pipe, text=True)


def test_two_processes_are_not_at_work_in_one_state_directory(owner: Owner) -> None:
    with owner.open() as site:
        second = opened_elsewhere(owner, "")
        said = second.communicate(timeout=60)[0]
        assert said.startswith("ledger-unwritable STATE = ") and "another bract client is at work in it" in said
        # Nor two in one process; and reading what is spent needs no lock.
        with pytest.raises(Refusal, match="another bract client"):
            owner.open()
        assert owner.spending().reservations == 0
        assert site.handle(message_of(model_of(site))).has_content()
    assert stat.S_IMODE((owner.state / "site.lock").stat().st_mode) == 0o600
    owner.open().close()


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "os._exit(1)"])
def test_a_process_that_dies_lets_the_next_one_in(owner: Owner, end: str) -> None:
    owner.open().close()
    # A program that it started, and that goes on after it, does not hold the lock.
    program = f"""
import subprocess
left = subprocess.Popen(["sleep", "30"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
print(left.pid, flush=True)
sys.stdin.readline()
{end}
"""
    first = opened_elsewhere(owner, program)
    assert first.stdout is not None and first.stdin is not None
    assert first.stdout.readline() == "open\n"
    left = int(first.stdout.readline())
    with pytest.raises(Refusal, match="another bract client"):
        owner.open()
    first.stdin.write("die\n")
    first.stdin.close()
    first.wait(20)
    os.kill(left, 0)
    with owner.open() as site:
        assert site.handle(message_of(model_of(site))).has_content()
    os.kill(left, signal.SIGKILL)


def test_a_site_that_could_not_be_opened_holds_nothing(owner: Owner) -> None:
    records, owner.data["records"] = owner.data["records"], 3
    with pytest.raises(Refusal, match="records = 3"):
        owner.open()
    owner.data["records"] = records
    owner.open().close()
