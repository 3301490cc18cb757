"""Personal layers and personal models: better than one model where clients disagree, and never sent."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import torch
from torch import nn

import bract
from bract.clients.kernels import sequential
from bract.clients.local_model import LocalModel
from bract.clients.training import LocalTraining
from bract.core.errors import InputError
from bract.core.keys import Key
from bract.privacy.dpsgd.layers import make_private
from bract.server import checkpoint
from bract.server.events import ClientReplied
from bract.simulations.description import describe
from bract.strategies.ditto import OWN_MODEL, Ditto
from bract.strategies.fedavg import FedAvg
from bract.strategies.local_rule import LocalRound
from bract.strategies.personal import FedBN, FedRep, head_of, normalization_of
from bract.strategies.registry import load_strategy
from bract.tasks.classification import Classification
from bract.tasks.task import Examples, SiteData

from .federated import train, train_under_flower

PERSONAL = ["fedper", "fedrep", "fedbn", "ditto"]


class Labels(Classification):
    """Four clients see the same two blobs a class, and each calls the classes by other names."""

    classes = ("a", "b", "c", "d")

    def model(self):
        return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4))

    def partitions(self, source=None):
        sites = {}
        generator = torch.Generator().manual_seed(3)
        for number in range(4):
            kinds = torch.arange(60) % 4
            inputs = 2 * nn.functional.one_hot(kinds, 4) + torch.randn(60, 4, generator=generator) / 2
            every = Examples(inputs.float(), (kinds + number) % 4)
            sites[f"client-{number}"] = SiteData(train=every.select(range(40)), test=every.select(range(40, 60)))
        return sites


class Scales(Classification):
    """Four clients measure the same three features in units of their own."""

    classes = ("no", "yes")

    def model(self):
        return nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))

    def partitions(self, source=None):
        sites = {}
        generator = torch.Generator().manual_seed(5)
        for number, (scale, shift) in enumerate(((1.0, 0.0), (5.0, 20.0), (0.2, -10.0), (-1.0, 5.0))):
            features = torch.randn(80, 3, generator=generator)
            every = Examples(features * scale + shift, (features[:, 0] * scale > 0).long())
            sites[f"client-{number}"] = SiteData(train=every.select(range(60)), test=every.select(range(60, 80)))
        return sites


BRISK = {"train.learning_rate": 0.5, "train.batch_size": 10, "train.epochs": 2, "rounds": 10}


@pytest.fixture(scope="module")
def one_model():
    return train(Labels(), FedAvg(), **BRISK)


@pytest.mark.parametrize(("name", "own"), [("fedper", {}), ("fedrep", {}), ("ditto", {"regularization": 0.05})])
def test_clients_that_disagree_are_served_better(one_model, name, own):
    found = train(Labels(), load_strategy(name, own), **BRISK)
    assert not found.failures
    assert one_model.accuracy < 0.5
    assert found.accuracy > 0.9


def test_fedbn_serves_clients_that_measure_otherwise():
    plain, found = (train(Scales(), strategy, **BRISK) for strategy in (FedAvg(), FedBN()))
    assert plain.accuracy < 0.7
    assert found.accuracy > 0.85


@pytest.mark.parametrize("name", PERSONAL)
def test_personal_tensors_do_not_travel(name):
    task = Scales() if name == "fedbn" else Labels()
    found = train(task, load_strategy(name, {}), **BRISK | {"rounds": 2})
    assert not found.failures
    sent = set(found.arrays)
    everything = {key for key, value in task.model().state_dict().items() if value.is_floating_point()}
    expected = {
        "fedper": {"0.weight", "0.bias"},
        "fedrep": {"0.weight", "0.bias"},
        "fedbn": {"1.weight", "1.bias", "3.weight", "3.bias"},
        "ditto": everything,
    }[name]
    assert sent == set(found.federation.initial) == expected
    kept = [state[OWN_MODEL if name == "ditto" else "personal"] for state in found.states.values()]
    assert len(kept) == 4
    for tensor in kept[0]:
        assert len({state[tensor].tobytes() for state in kept}) == (1 if tensor.endswith("num_batches_tracked") else 4)
    assert set(kept[0]) == (everything if name == "ditto" else set(task.model().state_dict()) - expected)


@pytest.mark.parametrize("name", PERSONAL)
def test_flowers_own_loop_gets_the_same_model(name):
    task = Scales() if name == "fedbn" else Labels()
    mine = train(task, load_strategy(name, {}), **BRISK | {"rounds": 2})
    other = train_under_flower(task, load_strategy(name, {}), **BRISK | {"rounds": 2})
    for tensor, array in mine.arrays.items():
        assert array.tobytes() == other[tensor].tobytes()


def test_ditto_lies_between_the_lone_and_the_global_model():
    """With a huge weight the personal model stays at the received one; without any it is FedAvg's blind neighbour."""
    keys = BRISK | {"train.learning_rate": 0.02}
    distances = []
    for weight in (0.0, 1.0, 40.0):
        found = train(Labels(), Ditto(regularization=weight), **keys)
        own = found.states["client-0"][OWN_MODEL]
        distances.append(sum(np.square(own[name] - found.arrays[name]).sum() for name in own))
    assert distances[0] > 2 * distances[1] > 4 * distances[2]
    # The global model is FedAvg's, but for the rounding of the kernel that trains it there.
    plain = train(Labels(), FedAvg(), **keys)
    for name, array in plain.arrays.items():
        np.testing.assert_allclose(found.arrays[name], array, rtol=0, atol=1e-5)


def test_fedrep_trains_the_head_first_with_the_body_fixed():
    """After so many epochs the head is what training with a frozen body gives; then it does not move any more."""
    data = Labels().partitions()["client-0"].train
    strategy = FedRep(personal=["2.*"], head_epochs=2)

    def trained(epochs, *, rule=None, **patterns):
        torch.manual_seed(0)
        training = LocalTraining(epochs=epochs, batch_size=10, learning_rate=0.1, **patterns)
        model = LocalModel(Labels().model(), training)
        session = rule.session(round_of(model, epochs, len(data))) if rule else None
        sequential.train(model, Labels().loss, data, training, plan=None, key=Key.from_seed(2), session=session)
        return model.module.state_dict()

    found = trained(3, rule=strategy.local_rule, personal=("2.*",))
    two, three = (trained(epochs, frozen=("0.*",)) for epochs in (2, 3))
    for name in ("2.weight", "2.bias"):
        assert torch.equal(found[name], two[name])
        assert not torch.equal(found[name], three[name])
    # The third epoch moved the body alone.
    assert not torch.equal(found["0.weight"], two["0.weight"])


def round_of(model, epochs, records):
    return LocalRound(
        shared=model.shared,
        parameters=model.trained,
        personal=model.personal,
        received={},
        state={},
        steps=epochs * -(-records // 10),
        epochs=epochs,
        learning_rate=0.1,
        momentum=0.0,
        loss=lambda: 0.0,
        train=lambda session: None,
    )


def test_the_plan_counts_what_stays_and_what_travels(tiny):
    keys = {"train.model": "mlp"}
    plain, personal, variates = (
        describe(tiny(**keys, **{"strategy.name": name})) for name in ("fedavg", "fedper", "scaffold")
    )
    assert plain["parameters"]["personal"] == 0 < personal["parameters"]["personal"]
    assert sum(personal["parameters"].values()) == plain["parameters"]["shared"]
    assert variates["bytes"]["run"] == 2 * plain["bytes"]["run"] > 2 * personal["bytes"]["run"]


def test_which_tensors_are_a_head():
    module = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 4), nn.ReLU())
    assert head_of(module, chosen=()) == ("2.weight", "2.bias")
    assert head_of(module, chosen=("0.*",)) == ("0.*",)
    with pytest.raises(InputError, match="matches no tensor"):
        head_of(module, chosen=("head.*",))
    with pytest.raises(InputError, match="one layer"):
        head_of(nn.Linear(2, 3), chosen=())


def test_which_tensors_are_normalization():
    module = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.LayerNorm(4), nn.GroupNorm(2, 4))
    parameters = {f"{layer}.{name}" for layer in (1, 2, 3) for name in ("weight", "bias")}
    statistics = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert set(normalization_of(module)) == parameters | statistics
    for poor in (nn.Linear(2, 3), nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4, affine=False))):
        with pytest.raises(InputError, match="FedBN"):
            normalization_of(poor)


def test_under_privacy_no_buffer_stays_with_a_client():
    """A statistic of raw records, kept and used for metrics, would be a release that no plan accounts for."""
    module = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4))
    kept = LocalModel(module, LocalTraining(personal=("1.*",)))
    assert "1.running_mean" in kept.personal and "1.running_mean" not in kept.shared
    private = LocalModel(module, LocalTraining(personal=("1.*",), buffers=()), keep_buffers=False)
    assert set(private.personal) == {"1.weight", "1.bias"}
    with torch.no_grad():
        module[1].running_mean.fill_(7.0)
    private.load(private.shared_arrays(), private.personal_arrays())
    assert module[1].running_mean.abs().max() == 0
    replaced, _ = make_private(module)
    assert set(normalization_of(replaced)) == {"1.weight", "1.bias"}


def interrupt(event):
    if isinstance(event, ClientReplied) and event.round == 3 and event.client == "client-0002":
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    "keys",
    [
        {"strategy.name": "fedper", "privacy.unit": "record", "privacy.noise_multiplier": 4.0},
        {"strategy.name": "fedrep", "train.epochs": 2},
        {"strategy.name": "ditto"},
    ],
    ids=["fedper, private", "fedrep", "ditto"],
)
def test_personal_state_survives_an_interrupt_within_a_round(tiny, tmp_path, keys):
    keys = keys | {"train.model": "mlp", "task.heterogeneity": 3.0}
    whole = bract.simulate(tiny(**keys), out=tmp_path / "whole")
    first = bract.simulate(tiny(**keys), out=tmp_path / "run", listeners=[interrupt])
    assert (first.status, first.record["rounds"]) == ("interrupted", 2)
    second = bract.simulate(resume=tmp_path / "run")
    assert second.model_sha256 == whole.model_sha256
    assert (second.metrics, second.guarantee) == (whole.metrics, whole.guarantee)
    kept = [checkpoint.load(tmp_path / run / "checkpoint").clients["states"] for run in ("whole", "run")]
    assert len(kept[0]) == 4
    np.testing.assert_equal(*kept)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"strategy.name": "fedper"}, "nothing to share in a model of one layer"),
        ({"strategy.name": "fedper", "strategy.personal": ["top.*"]}, 'strategy.personal = "top.*": matches no tensor'),
        ({"strategy.name": "fedper", "strategy.personal": "top"}, "must be a list of patterns"),
        ({"strategy.name": "fedrep", "train.model": "mlp"}, "train.epochs = 1: FedRep trains the head"),
        ({"strategy.name": "fedrep", "strategy.head_epochs": 0}, "at least 1"),
        ({"strategy.name": "fedbn"}, "has none with weights"),
        ({"strategy.name": "ditto", "train.personal": ["bias"]}, "Ditto keeps a whole model"),
        ({"strategy.name": "ditto", "strategy.regularization": "much"}, "finite number"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(tiny, tmp_path, keys, says):
    with pytest.raises(InputError) as caught:
        bract.simulate(tiny(**keys), out=tmp_path / "run")
    assert says in caught.value.sentence and "\n" not in caught.value.sentence
