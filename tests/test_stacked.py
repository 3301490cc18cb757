"""The stacked kernel: many clients' steps at once are the reference's, whoever else is in the stack."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

import bract
from bract.clients.kernels import kernel, sequential, stack_form, stacked
from bract.clients.kernels.recording import NotRecordable
from bract.clients.kernels.stack_form import Form
from bract.clients.training import LocalTraining, reproducible
from bract.core.errors import InputError
from bract.core.keys import Key
from bract.server.events import ClientFailed
from bract.strategies.fedprox import FedProx
from bract.strategies.local_rule import PLAIN

from .stacks import BEGINS, MODELS, PLAN, SIZES, TRAINING, loss, records, resident

STACKED = {"simulation.kernel": "stacked", "task.clients": 20}


def form_of(model, data, longest=30):
    return Form.of(model, TRAINING, data, longest)


def train(model, data, places, round=0, training=TRAINING):
    keys = [Key.from_seed(place).child(round) for place in places]
    chosen = np.array(places)
    return stacked.train(model, loss, data, BEGINS[chosen], SIZES[chosen], training, form_of(model, data), keys=keys)


def by_reference(model, data, place, round=0):
    """Return what the sequential kernel makes of the module as it is, which is then put back."""
    before = [parameter.detach().clone() for parameter in model.module.parameters()]
    mine = slice(BEGINS[place], BEGINS[place] + SIZES[place])
    sequential.train(
        model,
        loss,
        data.select(range(mine.start, mine.stop)),
        TRAINING,
        plan=None,
        key=Key.from_seed(place).child(round),
    )
    found = np.concatenate([array.reshape(-1) for array in model.shared_arrays().values()])
    with torch.no_grad():
        for parameter, value in zip(model.module.parameters(), before, strict=True):
            parameter.copy_(value)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_each_client_trains_as_the_reference_does(name):
    """Clients with few records, whole batches, a short last batch and none; five rounds, each from the last's mean."""
    make, shape = MODELS[name]
    model, data = resident(make), records(shape)
    with reproducible():
        for round in range(5):
            rows = train(model, data, range(len(SIZES)), round)
            expected = np.stack([by_reference(model, data, place, round) for place in range(len(SIZES))])
            np.testing.assert_allclose(rows, expected, rtol=0, atol=1e-5)
            start = np.concatenate([array.reshape(-1) for array in model.shared_arrays().values()])
            assert np.abs(rows - start).max() > 0.01 and (rows[7] == start).all(), "who has nothing stays"
            model.load(model.layout.unflatten(rows.mean(axis=0).astype(np.float64)))


@pytest.mark.parametrize("name", MODELS)
def test_it_does_not_matter_who_else_is_in_the_stack(name):
    make, shape = MODELS[name]
    model, data = resident(make), records(shape)
    with reproducible():
        together = train(model, data, range(len(SIZES)))
        for places in ([3], [8, 0], [6, 5, 4, 3, 2, 1, 0], [2, 7, 1]):
            np.testing.assert_array_equal(train(model, data, places), together[places])


def test_a_client_whose_records_are_no_numbers_spoils_no_other():
    make, shape = MODELS["mlp"]
    model, data = resident(make), records(shape)
    with reproducible():
        good = train(model, data, range(len(SIZES)))
        data.inputs[0] = torch.nan
        rows = train(model, data, range(len(SIZES)))
    assert np.isnan(rows[0]).any()
    np.testing.assert_array_equal(rows[1:], good[1:])


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(6), nn.Dropout(0.5)])
def test_what_cannot_be_stacked_is_tried_once(layer):
    model, data = resident(lambda: nn.Sequential(layer, nn.Linear(6, 3))), records()
    with pytest.raises(NotRecordable, match=r"buffers|stack"):
        stacked.prepare(model, loss, TRAINING, data, form_of(model, data))
    with pytest.raises(NotRecordable, match="tried before"):
        stacked.prepare(model, loss, TRAINING, data, form_of(model, data))


def test_steps_that_differ_from_autograd_s_are_found_out(monkeypatch):
    class Other(stacked.Program):
        def __init__(self, recording, parameters, *, rate):
            super().__init__(recording, parameters, rate=1.001 * rate)

    monkeypatch.setattr(stacked, "Program", Other)
    model, data = resident(MODELS["mlp"][0]), records()
    with pytest.raises(NotRecordable, match="differ"):
        stacked.prepare(model, loss, TRAINING, data, form_of(model, data))


def test_an_example_that_counts_otherwise_in_a_stack_is_found_out():
    """A loss over the whole batch, which is none for each example."""

    def mixing(outputs, targets):
        return loss(outputs - outputs.mean(dim=0), targets)

    model, data = resident(MODELS["mlp"][0]), records()
    with pytest.raises(NotRecordable, match="differ"):
        stacked.prepare(model, mixing, TRAINING, data, form_of(model, data))


def test_a_stack_is_as_wide_as_fits():
    data = records()
    assert form_of(resident(MODELS["logistic"][0]), data) == Form(width=128, batch=10)
    assert form_of(resident(MODELS["logistic"][0]), data, longest=4).batch == 4
    assert form_of(resident(lambda: nn.Linear(6, 200_000)), data).width == 2
    large = LocalTraining(batch_size=10**9)
    assert Form.of(resident(MODELS["logistic"][0]), large, data, 10**6).width == 2


def choose(wanted="auto", *, cohort=64, rule=PLAIN, make=MODELS["mlp"][0], private=False, **options):
    training = LocalTraining(batch_size=10, **options)
    together = kernel.Together(cohort=cohort, longest=30, plan=PLAN if private else None) if cohort else None
    return kernel.choose_kernel(
        wanted, resident(make), loss, records(), training, rule, private=private, together=together
    )


def test_auto_takes_it_for_small_models_in_large_cohorts_alone():
    assert choose() == "stacked"
    assert choose(cohort=63) == "traced"
    assert choose(cohort=None) == choose("stacked", cohort=None) == "traced", "a real client is by itself"
    assert choose("stacked", cohort=2) == choose("stacked", cohort=2, private=True) == "stacked"
    assert choose(private=True) == "stacked"
    assert choose(private=True, cohort=63) == choose(private=True, cohort=None) == "traced"
    assert choose(private=True, dp_engine="bookkeeping") == "traced"
    wide = lambda: nn.Linear(6, 200)  # noqa: E731
    assert choose(make=wide) == "stacked"
    assert choose(make=wide, private=True) == "traced", "each example's gradient is written out"
    large = nn.Sequential(nn.Linear(6, 1000), nn.ReLU(), nn.Linear(1000, 100))
    assert choose(make=lambda: large) == "traced"
    assert choose(make=lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3))) == "traced"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"momentum": 0.9}, "plain SGD"),
        ({"private": True, "momentum": 0.9}, "plain SGD"),
        ({"private": True, "dp_engine": "bookkeeping"}, "names what computes"),
        ({"private": True, "make": lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3))}, "stack"),
        ({"rule": FedProx(mu=0.1).local_rule}, "corrects the gradients"),
        ({"make": lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3))}, "stack"),
    ],
)
def test_it_is_refused_where_it_is_asked_for_and_cannot_train(options, why):
    with pytest.raises(InputError, match=why):
        choose("stacked", **options)


@pytest.mark.parametrize(
    "keys",
    [
        {"strategy.weights": "counted"},
        {"privacy.unit": "client", "privacy.noise_multiplier": 1.0},
        {"strategy.name": "flwr.serverapp.strategy:FedMedian"},
        {"clients.sampling": "poisson", "clients.per_round": 9, "train.epochs": 2},
        {
            "privacy.unit": "record",
            "privacy.noise_multiplier": 1.0,
            "clients.per_round": 9,
            "clients.sampling": "fixed",
        },
    ],
    ids=["counted", "client level", "flower strategy", "cohorts", "record level"],
)
def test_one_two_and_three_processes_give_the_same_bytes(tiny, tmp_path, keys, monkeypatch):
    monkeypatch.setattr(stack_form, "_MOST", 4)
    keys = {**STACKED, **keys, "experiment.rounds": 2}
    results = [
        bract.simulate(tiny(**keys, **{"simulation.workers": count}), out=tmp_path / str(count)) for count in (1, 2, 3)
    ]
    assert len({result.model_sha256 for result in results}) == 1
    assert all(result.metrics == results[0].metrics for result in results)


# Noise that follows from the key alone; independent noise follows from the sum, to its last bit.
SAME_NOISE = {
    "privacy.unit": "client",
    "privacy.noise_multiplier": 1.0,
    "privacy.bands": 2,
    "clients.sampling": "cyclic",
    "clients.per_round": 10,
}


@pytest.mark.parametrize("keys", [{"strategy.weights": "equal"}, SAME_NOISE], ids=["mean", "client level"])
def test_a_run_ends_where_the_reference_does(tiny, tmp_path, keys):
    ends = {}
    for name in ("stacked", "sequential"):
        known = {**STACKED, **keys, "experiment.rounds": 5, "simulation.kernel": name}
        result = bract.simulate(tiny(**known), out=tmp_path / name)
        assert json.loads((result.run_dir / "manifest.json").read_text())["kernel"] == name
        ends[name] = result
    assert ends["stacked"].model_sha256 != ends["sequential"].model_sha256
    reference = ends["sequential"].model.state_dict()
    for name, tensor in ends["stacked"].model.state_dict().items():
        torch.testing.assert_close(tensor, reference[name], rtol=0, atol=1e-5)
    assert ends["stacked"].metrics == ends["sequential"].metrics


def picky_task():
    from bract.tasks.synthetic import Synthetic

    class Task(Synthetic):
        """The third client's first record has a class that is none; only it may suffer."""

        def partitions(self, source):
            pool = super().partitions(source)
            pool.train.targets[pool.train_ends[2]] = 7
            return pool

    return Task(clients=9, records=30, features=5, classes=3)


def test_a_client_that_fails_takes_no_other_with_it(tiny, tmp_path):
    ends, failed = {}, []
    for name in ("stacked", "sequential"):
        told = []
        keys = {"simulation.kernel": name, "experiment.rounds": 2}
        experiment = tiny(**keys)
        result = bract.simulate(experiment, task=picky_task(), out=tmp_path / name, listeners=[told.append])
        failed.append([(each.round, each.client, each.code) for each in told if isinstance(each, ClientFailed)])
        ends[name] = result
    assert failed[0] == failed[1] == [(1, "client-0003", "client-failed"), (2, "client-0003", "client-failed")]
    reference = ends["sequential"].model.state_dict()
    for name, tensor in ends["stacked"].model.state_dict().items():
        torch.testing.assert_close(tensor, reference[name], rtol=0, atol=1e-5)


def test_what_keeps_something_is_refused(tiny, tmp_path):
    keys = {**STACKED, "train.personal": ["*bias*"]}
    with pytest.raises(InputError, match="of its own"):
        bract.simulate(tiny(**keys), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
