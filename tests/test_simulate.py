"""The main job: one call trains over four hospitals, and leaves a run directory that says what it gives away."""

from __future__ import annotations

import hashlib
import json
import stat

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import bract
from bract.server import evaluation
from bract.server.events import ClientFailed, Evaluated, Notice, RoundFinished, RunFinished, RunStarted


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_it_learns_and_keeps_its_epsilon(heart_run):
    result, _ = heart_run
    assert result.status == "completed" and result.exit_status == 0
    assert result.guarantee.epsilon is not None and 1.9 < result.guarantee.epsilon <= 2.0
    assert result.guarantee.delta == 1e-5 and result.guarantee.unit == "record"
    # 197 test records and noise on eight cells a site: far below what is learnt, far above what a broken run gives.
    assert result.metrics["accuracy"] > 0.65 and result.metrics["auc"] > 0.7


def test_the_run_directory_has_what_the_design_says(heart_run):
    result, _ = heart_run
    run = result.run_dir
    for name in (
        "experiment.toml",
        "manifest.json",
        "metrics.jsonl",
        "model.safetensors",
        "result.json",
        "report.html",
    ):
        assert (run / name).stat().st_size > 0
    assert list((run / "plots").glob("*.png"))
    assert json.loads((run / "result.json").read_text()) == result.record
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["clients"] == 4 and manifest["parameters"] == 18
    assert set(manifest["sites"]) == {"Cleveland", "Hungary", "Switzerland", "VA Long Beach"}


def test_private_files_are_the_owners_alone(heart_run):
    run = heart_run[0].run_dir
    assert stat.S_IMODE((run / "private").stat().st_mode) == 0o700
    assert stat.S_IMODE((run / "checkpoint").stat().st_mode) == 0o700
    for path in (run / "private").glob("*"):
        if path.is_file():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_metrics_have_a_line_a_round_and_epsilon_never_falls(heart_run):
    records = lines(heart_run[0].run_dir / "metrics.jsonl")
    assert [record["round"] for record in records] == list(range(1, 21))
    epsilons = [record["epsilon"] for record in records]
    assert epsilons == sorted(epsilons) and epsilons[-1] <= 2.0


def test_exact_figures_stay_in_private(heart_run):
    """No exact curve or comparison may stand in the files that are meant to be shared."""
    run = heart_run[0].run_dir
    curves = lines(run / "private" / "curves.jsonl")
    assert len(curves) == 20
    shared = "".join((run / name).read_text() for name in ("metrics.jsonl", "result.json", "manifest.json"))
    for curve in curves:
        for value in (curve["accuracy"], curve["auc"], curve["loss"]):
            assert str(value) not in shared
    key = (run / "private" / "key").read_text().strip()
    origin = json.loads((run / "private" / "origin.json").read_text())
    for secret in (key, origin["data"], origin["folder"]):
        assert not any(secret in path.read_text() for path in run.glob("*.*") if path.suffix != ".safetensors")


def test_the_guarantee_names_every_unaccounted_number(heart_run):
    excludes = " ".join(heart_run[0].guarantee.excludes)
    for words in ("curves", "comparison", "this run alone", "timing", "hyper-parameters"):
        assert words in excludes


def test_the_comparison_scores_every_model_on_every_hospital(heart_run):
    table = json.loads((heart_run[0].run_dir / "private" / "comparison.json").read_text())
    kinds = [row["kind"] for row in table["rows"]]
    assert kinds == ["federated", "reference", "lone", "lone", "lone", "lone"]
    for row in table["rows"]:
        assert set(row["sites"]) == set(table["sites"])
        assert 0.3 < row["all"]["accuracy"] < 1
    federated, reference = table["rows"][0], table["rows"][1]
    assert reference["all"]["auc"] > 0.8
    assert federated["all"]["auc"] > 0.75


def test_the_model_comes_back(heart_run):
    result, _ = heart_run
    path = result.run_dir / "model.safetensors"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == result.model_sha256
    again = bract.load(result.run_dir)
    for name, tensor in load_file(path).items():
        assert torch.equal(again.state_dict()[name], tensor)
        assert torch.equal(result.model.state_dict()[name], tensor)


def test_events_tell_the_run(heart_run):
    _, events = heart_run
    kinds = [type(event) for event in events if isinstance(event, RunStarted | RoundFinished | Evaluated | RunFinished)]
    assert kinds == [RunStarted, *[RoundFinished] * 20, Evaluated, RunFinished]
    assert events[-1].result["status"] == "completed"


def test_a_published_seed_repeats_a_run_and_a_secret_does_not(tiny, tmp_path):
    def sha(name, randomness):
        experiment = tiny(
            **{"privacy.unit": "record", "privacy.noise_multiplier": 4.0, "privacy.randomness": randomness}
        )
        return bract.simulate(experiment, out=tmp_path / name).model_sha256

    assert sha("a", "seed") == sha("b", "seed")
    assert sha("c", "secret") != sha("d", "secret")


def test_a_seeded_run_says_so(tiny, tmp_path):
    experiment = tiny(**{"privacy.unit": "record", "privacy.noise_multiplier": 4.0})
    result = bract.simulate(experiment, out=tmp_path / "run")
    assert "anyone who knows the seed" in result.guarantee.sentence


def test_without_privacy_the_result_says_so(tiny, tmp_path):
    result = bract.simulate(tiny(), out=tmp_path / "run")
    assert result.guarantee.epsilon is None
    assert "no differential privacy" in result.guarantee.sentence
    assert "epsilon" not in lines(tmp_path / "run" / "metrics.jsonl")[0]


def test_the_same_seed_and_another_order_of_clients_give_the_same_sum(tiny, tmp_path):
    """An exact sum does not hang on the order in which replies come: the counts do not either."""
    counted = bract.simulate(tiny(**{"strategy.weights": "counted"}), out=tmp_path / "a")
    equal = bract.simulate(tiny(**{"strategy.weights": "equal"}), out=tmp_path / "b")
    assert counted.status == equal.status == "completed"
    assert counted.model_sha256 != equal.model_sha256


@pytest.mark.parametrize("sampling", ["fixed", "poisson"])
def test_cohorts_spend_for_those_who_train(tiny, tmp_path, sampling):
    experiment = tiny(
        **{
            "privacy.unit": "record",
            "privacy.noise_multiplier": 4.0,
            "experiment.rounds": 8,
            "clients.sampling": sampling,
            "clients.per_round": 1,
        }
    )
    bract.simulate(experiment, out=tmp_path / "run")
    records = lines(tmp_path / "run" / "metrics.jsonl")
    sizes = [record["clients"] for record in records]
    assert sizes == [1] * 8 if sampling == "fixed" else 0 in sizes
    keys = {"privacy.unit": "record", "privacy.noise_multiplier": 4.0, "experiment.rounds": 8}
    bract.simulate(tiny(**keys), out=tmp_path / "whole")
    whole = lines(tmp_path / "whole" / "metrics.jsonl")
    assert 0 < records[-1]["epsilon"] < whole[-1]["epsilon"]


def test_a_model_that_cannot_be_private_is_fixed_aloud(tiny, tmp_path):
    (tmp_path / "normed.py").write_text(
        "from torch import nn\n"
        "from bract.tasks.synthetic import Synthetic\n"
        "class Normed(Synthetic):\n"
        "    def model(self):\n"
        "        return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))\n"
    )
    keys = {"task.name": "normed:Normed", "privacy.unit": "record", "privacy.noise_multiplier": 4.0}
    events = []
    result = bract.simulate(tiny(tmp_path, **keys), out=tmp_path / "run", listeners=[events.append])
    notes = [event.text for event in events if isinstance(event, Notice)]
    assert any("BatchNorm1d" in note and "GroupNorm" in note for note in notes)
    assert not any("running" in name for name in load_file(tmp_path / "run" / "model.safetensors"))
    assert result.status == "completed"
    assert not any(isinstance(event, ClientFailed) for event in events)
    assert isinstance(bract.load(tmp_path / "run")[1], torch.nn.GroupNorm)


def test_of_a_large_population_the_sum_of_the_metrics_is_released(tiny, tmp_path, monkeypatch):
    """Whoever asks in parts, or lists the clients, comes to the same sum."""
    known = {"task.clients": 120, "experiment.rounds": 1, "server.evaluate_every": 1}
    plain = bract.simulate(tiny(**known), out=tmp_path / "plain").record["released"]
    monkeypatch.setattr(evaluation, "_ASKED", 50)
    assert bract.simulate(tiny(**known), out=tmp_path / "parts").record["released"] == plain
    monkeypatch.setattr(evaluation, "LISTED_SITES", 120)
    listed = bract.simulate(tiny(**known), out=tmp_path / "listed").record["released"]
    assert "per_site" not in plain and len(listed["per_site"]) == 120
    assert plain["histogram"] == listed["histogram"]
    assert np.sum([each["histogram"] for each in listed["per_site"].values()], axis=0).tolist() == plain["histogram"]
