"""A site's policy denies what it does not name, and says in one sentence what the owner would have to write."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import bract
from bract.clients.site.admission import admit
from bract.clients.site.request import MessageRequest, RunRequest
from bract.core.errors import InputError, Refusal, RunError
from bract.privacy.ledger.events import Claimed, DiscreteLaplace, Gaussian, SampledGaussian
from bract.privacy.policy import DataTable, Policy

PAGE = Path(bract.__file__).parent / "docs" / "policy.md"
TEXT = """
[site]
server = "coordinator.example.org"
[data.heart]
path = "heart.csv"
records = 243
epsilon = 8.0
delta = 1e-5
[data.wards]
path = "wards.csv"
records = 100
unit = "client"
epsilon = 4.0
delta = 1e-5
[data.open]
path = "open.csv"
records = 10
[allow]
tasks = ["heart-disease"]
strategies = ["fedavg"]
apps = ["app:app"]
epochs = 5
message_bytes = 1_000_000
updates = ["dp-sgd", "noised", "raw"]
metrics = "raw"
"""
RUN = RunRequest(
    run="first",
    task="heart-disease",
    strategy="fedavg",
    update="dp-sgd",
    rounds=20,
    clipping_norm=1.0,
    noise_multiplier=1.5,
    delta=1e-5,
)


def policy(tmp_path: Path, *changes: tuple[str, str], text: str = TEXT) -> Policy:
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    (tmp_path / "policy.toml").write_text(text)
    return Policy.load(tmp_path / "policy.toml")


def asked(run: RunRequest = RUN, **changes: object) -> RunRequest:
    return RunRequest(**{**vars(run), **changes})  # type: ignore[arg-type]


def admitted(rules: Policy, run: RunRequest, *, data: str = "heart", phase: str = "train", server: str | None = None):
    config = run.to_config() | {"server-round": 1, "model-version": "v"}
    return admit(
        MessageRequest.parse(config, phase=phase, message_id="m"),
        policy=rules,
        data=data,
        server=server,
        is_app=run.task == "app:app",
        classes=2,
        coordinates=18,
        options={},
        settings={},
    )


RAW = dict(update="raw", clipping_norm=None, noise_multiplier=None, delta=None)
NOISED = dict(update="noised", task="app:app")


def test_an_empty_policy_denies_each_thing_in_one_sentence(tmp_path):
    empty = policy(tmp_path, text="")
    denied = [lambda: empty.choose(), lambda: empty.refuse_untrusted("me.org", "an update without noise")]
    keys = {"tasks": "t", "strategies": "s", "apps": "a:b", "updates": "raw"}
    denied += [lambda key=key, name=name: empty.refuse_unlisted(key, name) for key, name in keys.items()]
    names = ["data", "site.server", *(f"allow.{key}" for key in keys)]
    for name, ask in zip(names, denied, strict=True):
        with pytest.raises(Refusal) as caught:
            ask()
        assert caught.value.exit_status == 3 and caught.value.code == "policy-refused"
        sentence = caught.value.sentence
        assert sentence.startswith(f"{name}: ") and "to allow it, write " in sentence and "(policy.toml" in sentence
        assert "\n" not in sentence


def test_what_the_refusal_says_to_write_allows_it(tmp_path):
    denied = policy(tmp_path, ('strategies = ["fedavg"]', 'strategies = ["fedprox"]'))
    with pytest.raises(Refusal) as caught:
        admitted(denied, RUN)
    assert "line 20" in caught.value.sentence
    written = re.search(r"write (.*) \(", caught.value.sentence)
    assert written and tomllib.loads(written[1]) == {"strategies": ["fedprox", "fedavg"]}
    admitted(policy(tmp_path, ('strategies = ["fedavg"]', written[1])), RUN)


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ("[site]", "[sight]", "sight: unknown table; did you mean site?"),
        (
            "records = 243",
            "record = 243",
            "data.heart.record: unknown key; did you mean records? (policy.toml, line 6)",
        ),
        ("records = 243", "", "data.heart.records: missing"),
        ("records = 243", "records = 0", "data.heart.records = 0: must be at least 1 (policy.toml, line 6)"),
        ("epsilon = 8.0", "", "data.heart.delta = 1e-05: goes with epsilon"),
        ("epsilon = 8.0", "epsilon = inf", "data.heart.epsilon = inf: must be a finite number"),
        ("delta = 1e-5\n[data.wards]", "delta = 0.01\n[data.wards]", "must be below one in the number of records"),
        ("epochs = 5", "epochs = -1", "allow.epochs = -1: must be at least 0"),
        ('metrics = "raw"', 'metrics = "clear"', "allow.metrics = \"clear\": must be one of 'withheld'"),
        ('"dp-sgd",', '"dpsgd",', 'allow.updates = "dpsgd": must be one of'),
        ('path = "wards.csv"', 'path = "./heart.csv"', "data.wards.path"),
        ("[site]", "[site", "not valid TOML"),
    ],
)
def test_a_file_that_is_wrong_is_refused_with_key_value_and_place(tmp_path, before, after, says):
    with pytest.raises(InputError) as caught:
        policy(tmp_path, (before, after))
    assert says in caught.value.sentence and "policy.toml" in caught.value.sentence
    assert caught.value.code in ("policy-key", "policy-value", "policy-syntax")


def test_a_policy_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match="there is no such file") as caught:
        Policy.load(tmp_path / "policy.toml")
    assert caught.value.code == "policy-missing"


@pytest.mark.parametrize(
    ("changes", "how", "key"),
    [
        (dict(task="digits"), {}, "allow.tasks"),
        (dict(strategy="scaffold"), {}, "allow.strategies"),
        (dict(epochs=6), {}, "allow.epochs"),
        (dict(epochs=10**6), {}, "allow.epochs"),
        (dict(clipping_norm=1e-9), {}, "clipping norm"),
        (dict(clipping_norm=1e7), {}, "clipping norm"),
        (dict(clipping_norm=-1.0), {}, "clipping norm"),
        (dict(delta=1e-4), {}, "data.heart.delta"),
        ({}, dict(data="wards"), "data.wards.unit"),
        ({}, dict(data="open"), "data.open.epsilon"),
        (NOISED, {}, "data.heart.unit"),
        (RAW, {}, "site.server"),
        (RAW, dict(server="elsewhere.org"), "site.server"),
        (RAW, dict(server="coordinator.example.org"), "data.heart.epsilon"),
        (RAW | dict(claimed_epsilon=1.0, delta=1e-5), dict(server="coordinator.example.org"), "data.heart.unit"),
        (
            RAW | dict(claimed_epsilon=1.0, delta=1e-5),
            dict(server="coordinator.example.org", data="open"),
            "data.open.epsilon",
        ),
        (dict(metrics="raw"), {}, "site.server"),
        (dict(metrics="raw"), dict(server="coordinator.example.org"), "data.heart.epsilon"),
    ],
)
def test_what_the_policy_does_not_allow_is_refused_by_key(tmp_path, changes, how, key):
    with pytest.raises(Refusal) as caught:
        admitted(policy(tmp_path), asked(**changes), **how)
    assert caught.value.code == "policy-refused" and caught.value.sentence.startswith(key)


def test_metrics_are_withheld_unless_the_policy_says_how(tmp_path):
    noised = asked(metrics="noised", metrics_epsilon=1.0)
    for allowed in ("", 'metrics = "withheld"'):
        with pytest.raises(Refusal, match=r"allow\.metrics: noised metrics are asked for"):
            admitted(policy(tmp_path, ('metrics = "raw"', allowed)), noised)
    with pytest.raises(Refusal, match="raw metrics are asked for, and noised is what is allowed"):
        admitted(policy(tmp_path, ('"raw"\n', '"noised"\n')), asked(metrics="raw"))
    with pytest.raises(RunError, match="planned none"):
        admitted(policy(tmp_path), RUN, phase="evaluate")
    assert admitted(policy(tmp_path, ('"raw"\n', '"noised"\n')), noised, phase="evaluate").events["evaluate"] == (
        DiscreteLaplace(epsilon=1.0, relation="zero-out")
    )


def test_the_mechanism_follows_the_declared_number_of_records(tmp_path):
    found = admitted(policy(tmp_path), RUN)
    assert found.training is not None and found.training.records == 243
    assert found.events["train"] == SampledGaussian(
        sampling_rate=32 / 243, noise_multiplier=1.5, steps=8, relation="zero-out", delta=1e-5
    )
    assert found.plan is not None and found.plan.events[0].times == 20


def test_the_site_calibrates_noise_itself(tmp_path):
    found = admitted(policy(tmp_path), asked(epsilon=5.0, noise_multiplier=None))
    assert found.training is not None and found.training.epsilon() <= 5.0
    assert found.training.noise_multiplier == pytest.approx(1.72, abs=0.01)
    with pytest.raises(Refusal, match="calibrated under zero-out"):
        replaced = policy(tmp_path, ("records = 243", 'records = 243\nrelation = "replace-one"'))
        admitted(replaced, asked(epsilon=5.0, noise_multiplier=None))


def test_an_apps_noised_update_counts_as_an_unamplified_gaussian_on_the_whole_data_set(tmp_path):
    found = admitted(policy(tmp_path), asked(**NOISED), data="wards")
    event = found.events["train"]
    assert isinstance(event, Gaussian) and event.steps == 1 and event.noise_multiplier == pytest.approx(1.5)
    assert event.noise_multiplier < 1.5
    assert found.local is not None and found.training is None


def test_noise_that_gives_no_epsilon_is_refused(tmp_path):
    rules = policy(tmp_path, ('unit = "client"', 'unit = "client"\nrelation = "replace-one"'))
    with pytest.raises(RunError, match="gives no epsilon at all"):
        admitted(rules, asked(**NOISED | {"noise_multiplier": 0.3, "rounds": 3}), data="wards")


def test_a_trusted_servers_claim_is_charged_as_a_claim(tmp_path):
    claim = asked(**RAW | dict(claimed_epsilon=1.0, delta=1e-6))
    found = admitted(policy(tmp_path), claim, data="wards", server="coordinator.example.org")
    assert found.events["train"] == Claimed(epsilon=1.0, delta=1e-6, relation="zero-out")
    assert found.training is None and found.local is None


def test_raw_updates_of_data_without_a_budget_are_charged_to_nothing(tmp_path):
    found = admitted(policy(tmp_path), asked(**RAW), data="open", server="coordinator.example.org")
    assert found.plan is None and not found.events


@pytest.mark.parametrize(
    "changes",
    [
        {"bract-noise-multiplier": 0.0},
        {"bract-noise-multiplier": 1e-300},
        {"bract-noise-multiplier": float("nan")},
        {"bract-noise-multiplier": "1.5"},
        {"bract-epsilon": 3.0},
        {"bract-delta": 0.0},
        {"bract-delta": 1.0},
        {"bract-epochs": True},
        {"bract-epochs": 0},
        {"bract-epochs": 1.5},
        {"bract-rounds": 2**41},
        {"bract-batch-size": -1},
        {"bract-run": "../../etc/passwd\n"},
        {"bract-run": "x" * 201},
        {"bract-run": b"first"},
        {"bract-update": "clear"},
        {"bract-update": ["dp-sgd"]},
        {"bract-metrics": "noised"},
        {"bract-metrics-epsilon": 1.0},
        {"bract-claimed-epsilon": 1.0},
        {"bract-claimed-epsilon": -1.0},
        {"bract-trust-me": 1},
        {"server-round": 21},
        {"server-round": 0},
        {"server-round": None},
        {"model-version": ""},
    ],
    ids=str,
)
def test_a_request_of_another_form_is_refused(changes):
    config = RUN.to_config() | {"server-round": 1, "model-version": "v", "proximal-mu": 0.1}
    assert MessageRequest.parse(config, phase="train", message_id="m").run == RUN
    with pytest.raises(RunError) as caught:
        MessageRequest.parse(config | changes, phase="train", message_id="m")
    assert caught.value.code == "request-invalid" and len(caught.value.sentence) < 250


@pytest.mark.parametrize("missing", ["run", "task", "strategy", "update", "rounds", "clipping-norm", "delta"])
def test_a_request_that_lacks_a_key_is_refused(missing):
    config = RUN.to_config() | {"server-round": 1, "model-version": "v"}
    del config[f"bract-{missing}"]
    with pytest.raises(RunError):
        MessageRequest.parse(config, phase="train", message_id="m")


@pytest.mark.parametrize(("phase", "message_id"), [("query", "m"), ("train", ""), ("train", "x" * 201)])
def test_a_message_of_another_kind_or_without_an_id_is_refused(phase, message_id):
    config = RUN.to_config() | {"server-round": 1, "model-version": "v"}
    with pytest.raises(RunError):
        MessageRequest.parse(config, phase=phase, message_id=message_id)


def test_a_request_survives_its_config():
    full = asked(metrics="noised", metrics_epsilon=0.5, releases=3, epsilon=2.0, noise_multiplier=None)
    config = full.to_config() | {"server-round": 0, "model-version": "v"}
    assert MessageRequest.parse(config, phase="evaluate", message_id="m").run == full


@pytest.mark.parametrize("noise", [dict(), dict(epsilon=1.0, noise_multiplier=None)])
def test_a_plan_that_no_accountant_could_count_is_refused_at_once(tmp_path, noise):
    with pytest.raises(RunError, match="more than 100000 in a run"):
        admitted(policy(tmp_path), asked(rounds=10**6, batch_size=1, **noise))


def test_a_policy_is_read_without_anything_heavy(tmp_path):
    (tmp_path / "policy.toml").write_text(TEXT)
    code = (
        "import sys; from bract.privacy.policy import Policy; Policy.load(sys.argv[1]);"
        "print(sorted({'numpy', 'torch', 'flwr', 'opacus', 'dp_accounting'} & set(sys.modules)))"
    )
    said = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "policy.toml")], capture_output=True, text=True, check=True
    )
    assert said.stdout.strip() == "[]"


def test_the_page_shows_policies_that_parse_and_every_key(tmp_path):
    shown = re.findall(r"^```TOML\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert shown
    for text in shown:
        policy(tmp_path, text=text)
    documented = set(re.findall(r"^\| `(\w+\.[\w.]+)`", PAGE.read_text(), re.MULTILINE))
    tables = {"site": Policy.model_fields["site"].annotation, "allow": Policy.model_fields["allow"].annotation}
    known = {f"{name}.{key}" for name, table in tables.items() for key in table.model_fields}  # type: ignore[union-attr]
    assert documented == known | {f"data.NAME.{key}" for key in DataTable.model_fields}
