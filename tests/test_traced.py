"""clients/kernels/traced.py: a recorded step moves a model as autograd's does, or the sequential kernel trains."""

from __future__ import annotations

import json
import random
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bract
from bract.clients.kernels import kernel, sequential, traced
from bract.clients.kernels.deferred import DeferredLinear, steps_together
from bract.clients.local_model import LocalModel
from bract.clients.training import LocalTraining, reproducible
from bract.core.errors import InputError
from bract.core.keys import Key
from bract.strategies.fedprox import FedProx
from bract.strategies.local_rule import PLAIN
from bract.tasks.task import Examples

KEY = Key.from_seed(5)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def loss(outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="none")


def vectors(n=57):
    generator = torch.Generator().manual_seed(2)
    return Examples(torch.randn(n, 12, generator=generator), torch.randint(0, 3, (n,), generator=generator))


def images(n=27):
    generator = torch.Generator().manual_seed(2)
    return Examples(torch.randn(n, 1, 12, 12, generator=generator), torch.randint(0, 3, (n,), generator=generator))


def words(n=27):
    generator = torch.Generator().manual_seed(2)
    return Examples(torch.randint(0, 20, (n, 7), generator=generator), torch.randint(0, 3, (n,), generator=generator))


class Residual(nn.Module):
    """Weights, inputs and activations used twice, an activation that is changed in place, and a literal tensor."""

    def __init__(self):
        super().__init__()
        self.first, self.tied, self.out = nn.Linear(12, 12), nn.Linear(12, 12, bias=False), nn.Linear(12, 3)

    def forward(self, inputs):
        before = self.first(inputs)
        hidden = torch.relu(before) + before
        hidden = torch.relu_(self.tied(hidden)) + inputs
        return self.out(torch.tanh(self.tied(hidden))) * torch.tensor([1.0, 0.5, 2.0], device=inputs.device)


class Sentences(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.mixing = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, inputs):
        return self.out(self.mixing(self.embedding(inputs)).mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.memory, self.out = nn.Embedding(20, 8), nn.GRU(8, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, inputs):
        return self.out(self.memory(self.embedding(inputs))[0][:, -1])


MODELS = {
    "logistic": (lambda: nn.Linear(12, 3), vectors),
    "mlp": (lambda: nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16, bias=False), nn.ReLU(),
                                  nn.Linear(16, 3)), vectors),
    "residual": (Residual, vectors),
    "batch norm": (lambda: nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)), vectors),
    "dropout": (lambda: nn.Sequential(nn.Linear(12, 30), nn.Dropout(0.4), nn.ReLU(), nn.Linear(30, 3)), vectors),
    "wide": (lambda: nn.Sequential(nn.Linear(12, 600), nn.ReLU(), nn.Linear(600, 512), nn.ReLU(),
                                   nn.Linear(512, 3)), vectors),
    "convolutions": (lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2),
                                           nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Flatten(),
                                           nn.Linear(150, 3)), images),
    "transformer": (Sentences, words),
    "recurrent": (Recurrent, words),
}  # fmt: skip


def resident(make, *, device="cpu", training=None):
    torch.manual_seed(0)
    return LocalModel(make(), training or LocalTraining(), device=torch.device(device))


def chosen(make, examples, *, wanted="auto", rule=PLAIN, private=False, **options):
    training = LocalTraining(batch_size=10, **options)
    return kernel.choose_kernel(
        wanted, resident(make, training=training), loss, examples, training, rule, private=private
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MODELS)
def test_it_trains_as_the_reference_does(name, device):
    """Five rounds of two epochs with a short last batch, each round from where the last ended."""
    make, data = MODELS[name]
    training = LocalTraining(epochs=2, batch_size=10, learning_rate=0.05)
    ours, theirs = (resident(make, device=device, training=training) for _ in range(2))
    initial = [p.detach().clone() for p in theirs.parameters]
    with reproducible():
        for round in range(5):
            state = torch.random.get_rng_state()
            traced.train(ours, loss, data(), training, plan=None, key=KEY.child(round))
            assert torch.equal(torch.random.get_rng_state(), state)
            sequential.train(theirs, loss, data(), training, plan=None, key=KEY.child(round))
    assert ours.programs and None not in ours.programs.values()
    for (place, mine), reference in zip(
        ours.module.state_dict().items(), theirs.module.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-5, msg=place)
    assert max((p - q).abs().max() for p, q in zip(theirs.parameters, initial, strict=True)) > 0.01


def test_large_layers_wait_and_settle_within_a_round(monkeypatch):
    """With room for four steps, ten take three settlements; what was trained is the same."""
    settled = []
    original = DeferredLinear.settle
    monkeypatch.setattr(DeferredLinear, "settle", lambda self: settled.append(self._rows) or original(self))
    make = MODELS["wide"][0]
    training = LocalTraining(epochs=1, batch_size=30, learning_rate=0.05)
    assert (steps_together(512, 600, 30), steps_together(600, 12, 30)) == (4, 0)
    ours, theirs = (resident(make, training=training) for _ in range(2))
    traced.train(ours, loss, vectors(300), training, plan=None, key=KEY)
    sequential.train(theirs, loss, vectors(300), training, plan=None, key=KEY)
    assert settled[-3:] == [120, 120, 60]
    for mine, reference in zip(ours.parameters, theirs.parameters, strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-5)


def test_a_client_begins_with_its_own_weights():
    """What one client's steps left behind is nothing to the next."""
    make, data = MODELS["wide"]
    training = LocalTraining(batch_size=10)
    model = resident(make, training=training)
    start = model.shared_arrays()
    ends = []
    for _ in range(2):
        model.load(start)
        traced.train(model, loss, data(), training, plan=None, key=KEY)
        ends.append(model.shared_arrays())
    assert all(np.array_equal(ends[0][name], ends[1][name]) for name in start)


def test_a_client_that_fails_on_its_way_leaves_nothing_to_the_next():
    make, data = MODELS["wide"]
    training = LocalTraining(batch_size=10)
    model, other = (resident(make, training=training) for _ in range(2))
    start, bad = model.shared_arrays(), data()
    # One record of a batch in the middle is of a class that there is not.
    bad.targets[torch.from_numpy(KEY.child("batches", 0).stream().permutation(57))[25]] = 7
    with pytest.raises(IndexError):
        traced.train(model, loss, bad, training, plan=None, key=KEY)
    for each in (model, other):
        each.load(start)
        traced.train(each, loss, data(), training, plan=None, key=KEY)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters, other.parameters, strict=True))


def test_preparing_leaves_model_data_and_random_numbers_as_they_were():
    class InPlace(nn.Sequential):
        def forward(self, inputs):
            return super().forward(inputs.mul_(2))

    model = resident(lambda: InPlace(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)))
    examples, before = vectors(10), vectors(10)
    tensors = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    model.module.eval()
    state = torch.random.get_rng_state()
    traced.prepare(model, loss, LocalTraining(batch_size=10), examples)
    assert torch.equal(torch.random.get_rng_state(), state) and not model.module.training
    assert torch.equal(examples.inputs, before.inputs)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.module.state_dict().items())
    assert all(p.grad is None for p in model.parameters)


class Odd(nn.Module):
    """A model with a layer, and something that a recording would freeze."""

    def __init__(self, odd):
        super().__init__()
        self.layer, self.odd, self.calls = nn.Linear(12, 3), odd, 0
        self.own = torch.Generator().manual_seed(1)

    def forward(self, inputs):
        return self.odd(self, self.layer(inputs), inputs)


def counts(model, outputs, inputs):
    model.calls += 1
    return outputs * model.calls


ODD = {
    "branches": (lambda model, outputs, inputs: outputs if inputs.sum() > 0 else -outputs, "follows from numbers"),
    "items": (lambda model, outputs, inputs: outputs * inputs.max().item(), "calls item"),
    "lists": (lambda model, outputs, inputs: outputs * len(inputs[0].tolist()), "calls tolist"),
    "arrays": (lambda model, outputs, inputs: outputs * float(np.sign(inputs.numpy()[0, 0])), "calls numpy"),
    "masks": (lambda model, outputs, inputs: outputs + inputs[inputs > 0].sum(), "follows from numbers"),
    "counts": (counts, "change from step to step"),
    "python": (lambda model, outputs, inputs: outputs * random.random(), "from Python or numpy"),
    "numpy": (lambda model, outputs, inputs: outputs * float(np.random.rand()), "from Python or numpy"),
    "generator": (
        lambda model, outputs, inputs: outputs + torch.rand(outputs.shape, generator=model.own),
        "generator of its own",
    ),
    "clock": (
        lambda model, outputs, inputs: outputs * torch.tensor(time.perf_counter_ns() % 10**6 / 1e6),
        "other things for other numbers",
    ),
    "nan": (lambda model, outputs, inputs: outputs * (inputs.sum() * 0).log(), "differ from those of autograd"),
    "raises": (lambda model, outputs, inputs: outputs @ inputs, "a step of it fails: RuntimeError"),
}


@pytest.mark.parametrize("odd", ODD)
def test_a_model_that_follows_from_more_than_its_tensors_is_not_recorded(odd):
    act, why = ODD[odd]
    assert chosen(lambda: Odd(act), vectors()) == "sequential"
    with pytest.raises(InputError, match=f'simulation.kernel = "traced": .*{why}'):
        chosen(lambda: Odd(act), vectors(), wanted="traced")


def test_steps_that_differ_from_autograd_s_are_found_out(monkeypatch):
    monkeypatch.setattr(DeferredLinear, "backward", lambda self, gradients: gradients @ self._weight * 1.01)
    assert chosen(MODELS["mlp"][0], vectors()) == "traced"
    with pytest.raises(InputError, match="differ from those of autograd"):
        chosen(MODELS["wide"][0], vectors(), wanted="traced")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"optimizer": "adam"}, "plain SGD"),
        ({"momentum": 0.9}, "plain SGD"),
        ({"l2": 0.1}, "plain SGD"),
        ({"private": True, "dp_engine": "opacus"}, "book-keeping"),
        ({"rule": FedProx(mu=0.1).local_rule}, "corrects the gradients"),
    ],
)
def test_what_it_does_not_do_is_left_to_the_reference(options, why):
    make, data = MODELS["mlp"]
    assert chosen(make, data()) == "traced"
    assert chosen(make, data(), **options) == "sequential"
    with pytest.raises(InputError, match=why):
        chosen(make, data(), wanted="traced", **options)


def test_the_choice_is_the_same_for_a_client_with_few_records():
    """A real site chooses by its own records, and must choose as the simulation does."""
    assert {chosen(*(MODELS["batch norm"][0], vectors(n))) for n in (1, 3, 10, 50)} == {"traced"}


def test_a_batch_size_beyond_all_records_is_not_tried_out_as_such(monkeypatch):
    sizes = []
    original = traced.prepare
    monkeypatch.setattr(
        traced,
        "prepare",
        lambda model, loss, training, batch: sizes.append(len(batch)) or original(model, loss, training, batch),
    )
    make, data = MODELS["logistic"]
    training = LocalTraining(batch_size=10**9, learning_rate=0.05)
    ours, theirs = (resident(make, training=training) for _ in range(2))
    assert kernel.choose_kernel("auto", ours, loss, data(), training, PLAIN, private=False) == "traced"
    traced.train(ours, loss, data(), training, plan=None, key=KEY)
    sequential.train(theirs, loss, data(), training, plan=None, key=KEY)
    assert sizes == [32, 57]
    for mine, reference in zip(ours.parameters, theirs.parameters, strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-5)


def test_a_run_names_its_kernel_and_both_end_in_nearly_the_same_model(tiny, tmp_path):
    ends = {}
    for name in ("auto", "traced", "sequential"):
        keys = {"simulation.kernel": name, "experiment.rounds": 5}
        result = bract.simulate(tiny(**keys), out=tmp_path / name)
        described = json.loads((result.run_dir / "manifest.json").read_text())
        ends[name] = described["kernel"], result.model_sha256, result.model.state_dict()
    assert [ends[name][0] for name in ends] == ["traced", "traced", "sequential"]
    assert ends["auto"][1] == ends["traced"][1] != ends["sequential"][1]
    for name, tensor in ends["auto"][2].items():
        torch.testing.assert_close(tensor, ends["sequential"][2][name], rtol=0, atol=1e-5)


def test_what_the_kernel_cannot_do_is_refused_before_there_is_a_folder(tiny, tmp_path):
    keys = {"simulation.kernel": "traced", "train.momentum": 0.9}
    with pytest.raises(InputError, match="plain SGD"):
        bract.simulate(tiny(**keys), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
