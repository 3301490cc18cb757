"""strategies/server_rules.py: the papers' algorithms, the same model as Flower's, better than FedAvg in its place."""

from __future__ import annotations

import os
import signal
from math import sqrt

import numpy as np
import pytest
from flwr.app import ConfigRecord
from flwr.serverapp import strategy as flowers
from hypothesis import given, settings
from hypothesis import strategies as st

import bract
from bract.core.errors import InputError
from bract.core.parameters import arrays_of, record_of
from bract.server.events import RoundFinished
from bract.strategies.fedavg import FedAvg
from bract.strategies.registry import load_strategy
from bract.strategies.server_rules import FedAdagrad, FedAdam, FedAvgM, FedYogi

from .numpy_clients import descent, grid_of, start

ADAM = {"beta_1": 0.8, "beta_2": 0.95, "tau": 0.01}
ALL = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1}
RULES = ["fedavgm", "fedadam", "fedyogi", "fedadagrad"]


class FlowersFedAdam(FedAdam):
    """Flower multiplies η by Kingma & Ba's bias correction with exponent t + 1; theirs has t, Algorithm 2 has none."""

    def aggregate_total(self, server_round, total):
        t = server_round + 1
        self.server_learning_rate = 0.1 * sqrt(1 - self.beta_2**t) / (1 - self.beta_1**t)
        return super().aggregate_total(server_round, total)


def clients():
    draws = np.random.default_rng(2)
    counts = {f"client-{k}": 3 * k + 1 for k in range(5)}
    return {name: descent(draws.normal(size=(2, 3)), draws.uniform(0.1, 1, (2, 3))) for name in counts}, counts


PAIRS = {
    "fedavgm": (
        FedAvgM(server_learning_rate=0.7, server_momentum=0.8, weights="counted"),
        flowers.FedAvgM(server_learning_rate=0.7, server_momentum=0.8, **ALL),
    ),
    "fedadagrad": (
        FedAdagrad(server_learning_rate=0.1, tau=0.01, weights="counted"),
        flowers.FedAdagrad(eta=0.1, tau=0.01, **ALL),
    ),
    "fedyogi": (
        FedYogi(server_learning_rate=0.1, weights="counted", **ADAM),
        flowers.FedYogi(eta=0.1, **ADAM, **ALL),
    ),
    "fedadam, but for the bias": (
        FlowersFedAdam(weights="counted", **ADAM),
        flowers.FedAdam(eta=0.1, **ADAM, **ALL),
    ),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_the_same_model_as_flowers(pair):
    ours, theirs = PAIRS[pair]
    initial = {"w": np.random.default_rng(1).normal(size=(2, 3)).astype(np.float32)}
    found = [start(each, grid_of(*clients()), initial, rounds=8)["w"] for each in (ours, theirs)]
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=1e-6)
    assert np.abs(found[0] - initial["w"]).min() > 0.01


def test_without_that_bias_flowers_fedadam_is_another():
    initial = {"w": np.ones((2, 3), np.float32)}
    ours = start(FedAdam(weights="counted", **ADAM), grid_of(*clients()), initial, rounds=3)
    theirs = start(flowers.FedAdam(eta=0.1, **ADAM, **ALL), grid_of(*clients()), initial, rounds=3)
    assert np.abs(ours["w"] - theirs["w"]).max() > 0.01


def reference(name, deltas, eta=0.1, beta_1=0.9, beta_2=0.99, tau=1e-3, momentum=0.9):
    """The scalars of Algorithm 2 (and of Hsu et al.), one coordinate after the other."""
    x, m, v = 0.0, 0.0, 0.0
    for delta in deltas:
        if name == "fedavgm":
            m = momentum * m + delta
            x += m
            continue
        b = 0.0 if name == "fedadagrad" else beta_1
        m = b * m + (1 - b) * delta
        if name == "fedadagrad":
            v = v + delta**2
        elif name == "fedadam":
            v = beta_2 * v + (1 - beta_2) * delta**2
        elif v > delta**2:
            v = v - (1 - beta_2) * delta**2
        elif v < delta**2:
            v = v + (1 - beta_2) * delta**2
        x += eta * m / (sqrt(v) + tau)
    return x


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=25, deadline=None)
@given(deltas=st.lists(st.lists(st.floats(-4, 4), min_size=2, max_size=2), min_size=1, max_size=6))
def test_the_paper_s_algorithm(name, deltas):
    strategy = load_strategy(name, {})

    def move(model, number):
        return {"w": model["w"] + np.array(deltas[number - 1])}

    found = start(strategy, grid_of({"only": move}), {"w": np.zeros(2)}, rounds=len(deltas))
    expected = [reference(name, [delta[i] for delta in deltas]) for i in range(2)]
    # The mean's grid is 2^-46; divided by sqrt(v) + tau near zero that shows a thousand times larger.
    np.testing.assert_allclose(found["w"], expected, atol=1e-8)


def narrow_valley():
    """One direction is a hundred times as flat as the other: FedAvg crawls along it."""
    curvature = np.array([1.0, 0.01])
    many = {f"client-{k}": descent(np.array([1.0, 1.0]) + 0.3 * (k - 1), curvature) for k in range(3)}
    return grid_of(many), lambda w: float(((w - 1) ** 2).sum()), 60


def unlike_scales():
    """Coordinates in unlike units: what is a long step in one is none in another."""
    curvature = np.array([1.0, 1e-2, 2e-3])
    many = {f"client-{k}": descent(np.full(3, 1.0) + 0.1 * (k - 1), curvature) for k in range(3)}
    return grid_of(many), lambda w: float(((w - 1) ** 2).sum()), 60


def unlike_scales_with_noise():
    """The same, and every client's change is noised as much as it is long."""
    curvature = np.array([1.0, 1e-2, 2e-3])
    noise = np.random.default_rng(4).normal(size=(61, 3, 3))

    def client(k):
        step = descent(np.ones(3), curvature)

        def train(model, number):
            return {"w": (step(model, number)["w"] + curvature * noise[number, k]).astype(np.float32)}

        return train

    return grid_of({f"client-{k}": client(k) for k in range(3)}), lambda w: float(((w - 1) ** 2).sum()), 60


def rare_words():
    """Each of 20 coordinates is known to one client alone, which meets it in few rounds: its mean change is small."""

    def knows(k):
        def train(model, number):
            w = model["w"].copy()
            if number % 5 == k % 5:
                w[k] += 0.5 * (1 - w[k])
            return {"w": w}

        return train

    return grid_of({f"client-{k}": knows(k) for k in range(20)}), lambda w: float(((w - 1) ** 2).mean()), 40


@pytest.mark.parametrize(
    ("rule", "problem"),
    [
        (FedAvgM(), narrow_valley),
        (FedAdam(server_learning_rate=0.05, tau=1e-4), unlike_scales),
        (FedAdagrad(server_learning_rate=0.5), rare_words),
        (FedYogi(server_learning_rate=0.05, tau=1e-4), unlike_scales_with_noise),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_better_than_fedavg_where_it_should_be(rule, problem):
    losses = []
    for strategy in (rule, FedAvg()):
        grid, loss, rounds = problem()
        size = {narrow_valley: 2, rare_words: 20}.get(problem, 3)
        losses.append(loss(start(strategy, grid, {"w": np.zeros(size, np.float32)}, rounds)["w"]))
    assert losses[0] < 0.2 * losses[1], losses


@pytest.mark.parametrize("name", RULES)
def test_a_fold_gives_the_bytes_of_whole_replies(name):
    """The round loop folds, Flower's own loop does not."""
    initial = {"w": np.ones((2, 3), np.float32)}
    whole = start(load_strategy(name, {}), grid_of(*clients()), initial, rounds=3)
    folding, grid, arrays = load_strategy(name, {}), grid_of(*clients()), record_of(initial)
    for number in range(1, 4):
        messages = list(folding.configure_train(number, arrays, ConfigRecord(), grid))
        exchange = grid.exchange(messages, fold=folding.fold())
        assert all(not reply.content.array_records for reply in exchange)
        arrays, _ = folding.aggregate_total(number, exchange.total)
    assert arrays_of(arrays)["w"].tobytes() == whole["w"].tobytes()


def test_running_statistics_and_whole_numbers_are_averaged():
    """A momentum would carry a variance below zero, and an adaptive step knows no units."""
    initial = {
        "w": np.zeros(2, np.float32),
        "bn.running_var": np.full(2, 4.0, np.float32),
        "bn.num_batches_tracked": np.array(0, np.int64),
    }

    def shrink(model, number):
        return {
            "w": model["w"] + 1,
            "bn.running_var": model["bn.running_var"] / 2,
            "bn.num_batches_tracked": model["bn.num_batches_tracked"] + 3,
        }

    for name in RULES:
        found = start(load_strategy(name, {}), grid_of({"a": shrink, "b": shrink}), initial, rounds=6)
        np.testing.assert_allclose(found["bn.running_var"], 4 / 2**6, err_msg=name)
        assert found["bn.num_batches_tracked"] == 18, name


def test_a_round_without_replies_changes_no_moment():
    strategy = FedAdam()
    grid = grid_of({"a": descent(1.0)})
    list(strategy.configure_train(1, record_of({"w": np.zeros(2)}), ConfigRecord(), grid))
    assert strategy.aggregate_train(1, []) == (None, None)
    assert strategy.state_dict() == {}


@pytest.mark.parametrize("name", RULES)
def test_an_interrupted_run_ends_with_the_same_bytes(tiny, tmp_path, name):
    keys = {"strategy.name": name, "experiment.rounds": 6, "privacy.unit": "record", "privacy.noise_multiplier": 4.0}

    def interrupt(event):
        if isinstance(event, RoundFinished) and event.round == 3:
            os.kill(os.getpid(), signal.SIGINT)

    whole = bract.simulate(tiny(**keys), out=tmp_path / "whole")
    first = bract.simulate(tiny(**keys), out=tmp_path / "run", listeners=[interrupt])
    assert (first.status, first.record["rounds"]) == ("interrupted", 3)
    assert bract.simulate(resume=tmp_path / "run").model_sha256 == whole.model_sha256


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("fedavgm", "server_momentum", 1),
        ("fedavgm", "server_learning_rate", 0),
        ("fedadam", "beta_1", -0.1),
        ("fedyogi", "beta_2", 1.0),
        ("fedadagrad", "tau", 0),
        ("fedadam", "tau", float("nan")),
    ],
)
def test_a_bad_key_is_named(name, key, value):
    with pytest.raises(InputError) as caught:
        load_strategy(name, {key: value})
    assert key in caught.value.sentence


def test_a_reply_that_does_not_fit_is_left_out():
    def other(model, number):
        return {"w": np.zeros(7, np.float32)}

    found = start(FedAvgM(), grid_of({"a": descent(1.0), "b": other}), {"w": np.zeros(2, np.float32)}, rounds=1)
    np.testing.assert_allclose(found["w"], 1.0)
