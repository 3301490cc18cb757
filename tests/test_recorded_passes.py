"""clients/kernels/recorded_passes.py: a pass of DP-SGD that is repeated is the engine's own, to the last bit."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bract
from bract.clients.kernels import program, recorded_passes, sequential, traced
from bract.clients.local_model import LocalModel
from bract.clients.training import LocalTraining, reproducible
from bract.core.errors import InputError
from bract.core.keys import Key
from bract.privacy.dpsgd.bookkeeping import BookKeeping
from bract.privacy.mechanism import RecordLevelPlan
from bract.tasks.task import Examples

PLAN = RecordLevelPlan(
    records=60, batch_size=10, epochs=2, rounds=3, clipping_norm=0.5, noise_multiplier=1.0, delta=1e-5
)
PRIVATE = {"privacy.unit": "record", "privacy.noise_multiplier": 1.0}


def loss(outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="none")


def vectors():
    generator = torch.Generator().manual_seed(2)
    return Examples(torch.randn(60, 12, generator=generator), torch.randint(0, 3, (60,), generator=generator))


def images():
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(60, 1, 12, 12, generator=generator)
    return Examples(pixels, torch.randint(0, 3, (60,), generator=generator))


def words():
    generator = torch.Generator().manual_seed(2)
    return Examples(torch.randint(0, 20, (60, 7), generator=generator), torch.randint(0, 3, (60,), generator=generator))


class Sentences(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.norm, self.out = nn.Embedding(20, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, inputs):
        return self.out(torch.tanh(self.norm(self.embedding(inputs))).mean(1))


class Looking(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(12, 3)

    def forward(self, inputs):
        return self.out(inputs if self.out.bias.sum() < 1e9 else -inputs)


MODELS = {
    "logistic": (lambda: nn.Linear(12, 3), vectors),
    "mlp": (lambda: nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16, bias=False), nn.ReLU(),
                                  nn.Linear(16, 3)), vectors),
    "images": (lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.GroupNorm(2, 4),
                                     nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(54, 3)), images),
    "words": (Sentences, words),
}  # fmt: skip


def resident(make, kernel):
    torch.manual_seed(0)
    training = LocalTraining(batch_size=10, learning_rate=0.2, kernel=kernel)
    return LocalModel(make(), training), training


def ends(make, data, plans, *, hide=None, rounds=3):
    """Return what both kernels make of a model in some rounds, and the model that was trained by recorded passes."""
    found, traced_model = [], None
    with reproducible():
        for kernel, train in (("sequential", sequential.train), ("traced", traced.train)):
            model, training = resident(make, kernel)
            for round in range(rounds):
                for client, plan in enumerate(plans):
                    key = Key.from_seed(client).child(round)
                    train(model, loss, data, training, plan=plan, key=key, hide=hide)
            found.append([parameter.detach().clone() for parameter in model.module.parameters()])
            traced_model = model
    return found, traced_model


def assert_equal(found):
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert all(bool(tensor.isfinite().all()) for tensor in found[0])


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_round_ends_with_the_same_bits(name, per_layer):
    make, data = MODELS[name]
    found, model = ends(make, data(), [replace(PLAN, per_layer=per_layer)])
    assert_equal(found)
    assert len(model.passes) > 2 and None not in model.passes.values()
    torch.manual_seed(0)
    start = make()
    assert max((p - q).abs().max() for p, q in zip(found[1], start.parameters(), strict=True)) > 0.01


def test_only_small_batches_that_come_up_again_are_recorded(monkeypatch):
    make, data = MODELS["mlp"]
    monkeypatch.setattr(recorded_passes, "_MOST", 10)
    found, model = ends(make, data(), [PLAN])
    assert_equal(found)
    sizes = {form[0][0] for form in model.passes}
    often = {form[0][0] for form, count in model.passes_seen.items() if count >= recorded_passes._TIMES}
    assert sizes == {size for size in often if size <= 10} and sizes < often
    assert len(often) < len(model.passes_seen)


def test_plans_that_clip_otherwise_have_passes_of_their_own():
    make, data = MODELS["mlp"]
    found, model = ends(make, data(), [PLAN, replace(PLAN, clipping_norm=0.01), replace(PLAN, noise_multiplier=0.5)])
    assert_equal(found)
    assert {form[-1] for form in model.passes} == {(0.5, False), (0.01, False)}


def test_a_batch_of_several_passes_is_the_engine_s(monkeypatch):
    make, data = MODELS["mlp"]
    found, model = ends(make, data(), [replace(PLAN, microbatch_size=9)])
    assert_equal(found)
    assert model.passes and all(form[0][0] <= 9 for form in model.passes)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 3e38])
def test_a_record_that_is_no_number_counts_as_zero_as_ever(bad):
    make, data = MODELS["mlp"]
    records = data()
    records.inputs[5, 3] = bad
    found, model = ends(make, records, [PLAN])
    assert_equal(found)
    assert any(model.passes.values())


def test_a_record_on_which_the_loss_raises_is_left_out_as_ever():
    make, data = MODELS["mlp"]
    records, hidden = data(), []
    records.targets[5] = 7
    found, model = ends(make, records, [PLAN], hide=hidden.append)
    assert_equal(found)
    assert any(model.passes.values())
    assert len(hidden) % 2 == 0 and isinstance(hidden[0], IndexError)


@pytest.mark.parametrize(
    "make", [lambda: nn.Sequential(nn.Linear(12, 9), nn.Dropout(0.5), nn.Linear(9, 3)), Looking], ids=["draws", "looks"]
)
def test_what_cannot_be_repeated_is_tried_once_for_each_size(make, monkeypatch):
    tried = []
    original = recorded_passes._prepared
    monkeypatch.setattr(recorded_passes, "_prepared", lambda *known: tried.append(known[2].shape) or original(*known))
    found, model = ends(make, vectors(), [PLAN])
    assert_equal(found)
    assert set(model.passes.values()) == {None} and len(tried) == len(set(tried)) == len(model.passes)


def test_a_pass_that_comes_to_something_else_is_found_out(monkeypatch):
    class Other(program.RecordedCall):
        def __init__(self, recording):
            super().__init__(recording)
            call = self.call
            self.call = lambda inputs, targets: call(inputs * (1 + 1e-6), targets)

    monkeypatch.setattr(program, "RecordedCall", Other)
    found, model = ends(*[MODELS["mlp"][0], vectors()], [PLAN])
    assert_equal(found)
    assert set(model.passes.values()) == {None}


def test_a_recorded_pass_is_repeated_and_not_taken_anew(monkeypatch):
    make, data = MODELS["mlp"]
    taken = []
    original = BookKeeping.add_clipped
    monkeypatch.setattr(BookKeeping, "add_clipped", lambda *known, **more: taken.append(1) or original(*known, **more))
    with reproducible():
        model, training = resident(make, "traced")
        for _ in range(5):
            taken.clear()
            traced.train(model, loss, data(), training, plan=PLAN, key=Key.from_seed(1))
    assert not taken


def test_a_private_run_names_its_kernel_and_either_gives_the_same_bytes(tiny, tmp_path):
    results = {}
    for wanted, name in (("auto", "traced"), ("sequential", "sequential")):
        experiment = tiny(**PRIVATE, **{"simulation.kernel": wanted, "experiment.rounds": 2})
        results[name] = bract.simulate(experiment, out=tmp_path / name)
        assert json.loads((tmp_path / name / "manifest.json").read_text())["kernel"] == name
    assert results["traced"].model_sha256 == results["sequential"].model_sha256


@pytest.mark.parametrize(
    ("keys", "why"),
    [({"train.dp_engine": "opacus", "simulation.kernel": "traced"}, "book-keeping"),
     ({"train.momentum": 0.9, "simulation.kernel": "stacked"}, "plain SGD")],
)  # fmt: skip
def test_a_kernel_that_takes_no_private_steps_is_refused(tiny, tmp_path, keys, why):
    with pytest.raises(InputError, match=why):
        bract.simulate(tiny(**PRIVATE, **keys), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
