"""The benchmarks run, and score what they say they score."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def heart_disease():
    spec = importlib.util.spec_from_file_location("benchmark_of_heart_disease", FOLDER / "heart_disease.py")
    module = importlib.util.module_from_spec(spec)
    # A dataclass looks its module up.
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[spec.name]


def test_one_fold_and_one_seed(heart_disease, capsys):
    assert heart_disease.main(["--folds", "1", "--seeds", "1", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    (fold,) = printed["folds"]
    assert fold["train_records"] + fold["test_records"] == 920
    assert 1.9 < fold["epsilon"] <= 2.0
    (private,), (released,) = fold["private"], fold["released"]
    for name, least in (("accuracy", 0.7), ("auc", 0.8)):
        assert abs(fold["pooled"][name] - fold["federated"][name]) < 0.03
        assert least < private[name] < 1
        # One of the two is of exact counts, the other of noisy ones: they cannot agree to the last digit.
        assert private[name] != released[name]
        assert printed["summary"][name]["private"] == private[name]
    # One fold and one seed say nothing about the targets.
    assert printed["targets"] == {}


def test_its_exact_figures_are_those_of_the_comparison(heart_disease, heart_run):
    result, _ = heart_run
    compared = json.loads((result.run_dir / "private" / "comparison.json").read_text())
    task = heart_disease.HeartDisease()
    found = heart_disease.model_scores(task, result.model, heart_disease.pooled(task.partitions(None)))
    assert found == {name: pytest.approx(compared["rows"][0]["all"][name], abs=1e-9) for name in ("accuracy", "auc")}


def test_a_missed_target_is_said(heart_disease):
    good = {"pooled": 0.9, "federated": 0.89, "private": 0.87}
    assert all(heart_disease.judge({"accuracy": good, "auc": good}).values())
    lost = heart_disease.judge({"accuracy": {**good, "federated": 0.87}, "auc": {**good, "private": 0.85}})
    assert [target for target, reached in lost.items() if not reached] == [
        "accuracy: federated within 0.02 of pooled",
        "auc: at least 0.86 at epsilon 2",
    ]


def test_it_trains_the_default_experiment_with_and_without_privacy(heart_disease):
    default = heart_disease.Experiment.load(heart_disease.DEFAULT_EXPERIMENT)
    private, plain = (heart_disease.experiment(3, 1, epsilon=epsilon, overrides=[]) for epsilon in (2.0, None))
    assert plain.privacy.unit == "none" and plain.privacy.epsilon is None
    assert private.privacy == default.privacy.model_copy(update={"randomness": "seed"})
    for each in (private, plain):
        assert each.task.own == {"fold": 3, "folds": 5} and each.experiment.seed == 1
        assert (each.train, each.strategy, each.clients) == (default.train, default.strategy, default.clients)
        assert each.experiment.rounds == default.experiment.rounds
