"""The stacked kernel under record-level privacy: every client's own mechanism, whoever else is in the stack."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import bract
from bract.clients import group, owner
from bract.clients.group import ClientGroup
from bract.clients.kernels import private_stack, sequential, stack_form
from bract.clients.kernels.recording import NotRecordable
from bract.clients.kernels.stack_form import Form
from bract.clients.owner import plain_key
from bract.clients.training import reproducible
from bract.core.keys import Key
from bract.privacy.dpsgd import clipping, together
from bract.privacy.dpsgd.passes import poisson_batches
from bract.privacy.dpsgd.together import batches_together
from bract.server.events import ClientFailed

from .stacks import BEGINS, MODELS, PLAN, SIZES, TRAINING, loss, records, resident

PLACES = [place for place, size in enumerate(SIZES) if size]
PLANS = {place: replace(PLAN, records=int(SIZES[place])) for place in PLACES}


def form_of(model, data, longest=30):
    return Form.of(model, TRAINING, data, longest, private=True)


def train(model, data, places, plans=PLANS, form=None):
    keys = [Key.from_seed(place) for place in places]
    return private_stack.train(
        model,
        loss,
        data,
        BEGINS[list(places)],
        TRAINING,
        form or form_of(model, data),
        keys=keys,
        plans=[plans[place] for place in places],
    )


def by_reference(model, data, place, plan):
    start = model.shared_arrays()
    own = data.select(range(BEGINS[place], BEGINS[place] + SIZES[place]))
    sequential.train(model, loss, own, TRAINING, plan=plan, key=Key.from_seed(place))
    found = np.concatenate(model.shared_pieces(), dtype=np.float32)
    model.load(start)
    return found


@pytest.mark.parametrize("per_layer", [False, True], ids=["flat", "per layer"])
@pytest.mark.parametrize("name", MODELS)
def test_each_client_takes_its_own_noise_and_batches(name, per_layer):
    make, shape = MODELS[name]
    model, data = resident(make), records(shape)
    plans = {place: replace(plan, per_layer=per_layer) for place, plan in PLANS.items()}
    # Clients of one run differ in their noise where they differ in size.
    plans[4] = replace(plans[4], noise_multiplier=0.3)
    plans[5] = replace(plans[5], noise_multiplier=0.0)
    with reproducible():
        start = np.concatenate(model.shared_pieces())
        rows = train(model, data, PLACES, plans)
        for row, place in zip(rows, PLACES, strict=True):
            expected = by_reference(model, data, place, plans[place])
            assert np.abs(expected - start).max() > 1e-3
            np.testing.assert_allclose(row, expected, atol=1e-6)
        np.testing.assert_array_equal(np.concatenate(model.shared_pieces()), start)


def test_it_does_not_matter_who_else_is_in_the_stack():
    make, shape = MODELS["mlp"]
    model, data = resident(make), records(shape)
    with reproducible():
        together = dict(zip(PLACES, train(model, data, PLACES), strict=True))
        for places in ([3], [8, 0], [6, 5, 4, 3, 2, 1, 0], [2, 8, 1]):
            for row, place in zip(train(model, data, places), places, strict=True):
                np.testing.assert_array_equal(row, together[place])


def test_a_batch_larger_than_a_pass_is_not_cut():
    make, shape = MODELS["mlp"]
    model, data = resident(make), records(shape)
    form = form_of(model, data)
    with reproducible():
        whole = train(model, data, PLACES)
        for batch in (1, 3):
            np.testing.assert_allclose(train(model, data, PLACES, form=replace(form, batch=batch)), whole, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_a_bad_example_moves_its_client_by_no_more_than_the_bound_and_no_other_at_all(bad):
    make, shape = MODELS["mlp"]
    model, data = resident(make), records(shape)
    quiet = {place: replace(plan, noise_multiplier=0.0) for place, plan in PLANS.items()}
    with reproducible():
        good = train(model, data, PLACES, quiet)
        data.inputs[BEGINS[5]] = bad
        rows = train(model, data, PLACES, quiet)
    place = PLACES.index(5)
    others = [each for each in range(len(PLACES)) if each != place]
    np.testing.assert_array_equal(rows[others], good[others])
    assert np.isfinite(rows).all()
    # Once an epoch it is drawn, on average; each time it moves the model by lr · C / expected batch, and its followers.
    assert 0 < np.linalg.norm(rows[place] - good[place]) < 0.05 * 0.7 / 10 * 2 * 6


@pytest.mark.parametrize("draws", [1, 500, 2**20])
@pytest.mark.parametrize("epochs", [1, 3])
def test_batches_are_those_of_each_client_alone(epochs, draws, monkeypatch):
    monkeypatch.setattr(together, "_DRAWS", draws)
    plans = [replace(PLAN, records=size, epochs=epochs, batch_size=7) for size in (1, 6, 7, 8, 30, 100)]
    keys = [Key.from_seed(number) for number in range(len(plans))]
    found = list(batches_together(plans, [key.stream() for key in keys]))
    alone = [list(poisson_batches(plan, key.stream())) for plan, key in zip(plans, keys, strict=True)]
    assert len(found) == max(map(len, alone))
    for step, (rows, counts) in enumerate(found):
        for row, count, own in zip(rows, counts, alone, strict=True):
            assert row[:count].tolist() == (own[step].tolist() if step < len(own) else [])


def test_factors_of_another_kind_are_found_out(monkeypatch):
    factors = clipping._factors
    model, data = resident(MODELS["mlp"][0]), records()
    with monkeypatch.context() as patch:
        # Only what is recorded clips otherwise, as a rewritten pass might.
        patch.setattr(private_stack, "clip_factors", lambda layers, norm: [1.01 * factors(list(layers[0]), norm)])
        with pytest.raises(NotRecordable, match="differ"):
            private_stack.prepare(model, loss, TRAINING, data, form_of(model, data), PLAN)
    with pytest.raises(NotRecordable, match="tried before"):
        private_stack.prepare(model, loss, TRAINING, data, form_of(model, data), PLAN)


@pytest.mark.parametrize(
    ("make", "loss_of"),
    [
        (lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3)), loss),
        (MODELS["mlp"][0], lambda outputs, targets: loss(outputs - outputs.mean(dim=0), targets)),
        (MODELS["mlp"][0], lambda outputs, targets: loss(outputs, targets).mean()),
    ],
    ids=["draws", "mixes", "no losses"],
)
def test_what_cannot_be_stacked_is_found_out(make, loss_of):
    model, data = resident(make), records()
    with pytest.raises(NotRecordable):
        private_stack.prepare(model, loss_of, TRAINING, data, form_of(model, data), PLAN)


@pytest.mark.parametrize("norm", [1e-3, 1e6])
def test_a_stack_that_is_wrong_is_found_out_whatever_the_norm(norm, monkeypatch):
    model, data = resident(MODELS["mlp"][0]), records()
    monkeypatch.setattr(private_stack, "clip_factors", lambda layers, c: [1.01 * clipping._factors(list(layers[0]), c)])
    with pytest.raises(NotRecordable, match="differ"):
        private_stack.prepare(model, loss, TRAINING, data, form_of(model, data), replace(PLAN, clipping_norm=norm))


def test_what_trains_does_not_follow_from_anybody_s_records():
    model, data = resident(MODELS["mlp"][0]), records()
    data.targets[:] = 99
    data.inputs[:] = math.nan
    private_stack.prepare(model, loss, TRAINING, data, form_of(model, data), PLAN)


PRIVATE = {
    "privacy.unit": "record",
    "privacy.noise_multiplier": 1.0,
    "simulation.workers": 1,
    "task.clients": 20,
    "experiment.rounds": 5,
}


def test_a_run_ends_where_the_reference_does_and_promises_the_same(tiny, tmp_path, monkeypatch):
    # Batches and noise follow from the model to its last bit, which kernels round each in their own way.
    for module in (owner, group):
        monkeypatch.setattr(module, "private_key", lambda key, purpose, config, *_: plain_key(key, purpose, config))
    found = {}
    for kernel in ("stacked", "sequential"):
        out = tmp_path / kernel
        result = bract.simulate(tiny(**PRIVATE, **{"simulation.kernel": kernel}), out=out)
        assert json.loads((out / "manifest.json").read_text())["kernel"] == kernel
        found[kernel] = result
    one, other = found["stacked"], found["sequential"]
    reference = other.model.state_dict()
    for name, tensor in one.model.state_dict().items():
        torch.testing.assert_close(tensor, reference[name], rtol=0, atol=1e-5)
    assert one.guarantee == other.guarantee
    # The noise of the released metrics is each client's own, however it is asked.
    assert one.metrics == other.metrics


def test_large_cohorts_of_small_models_take_it(tiny, tmp_path):
    keys = {**PRIVATE, "task.clients": 70, "experiment.rounds": 1}
    bract.simulate(tiny(**keys), out=tmp_path / "run")
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["kernel"] == "stacked"


def test_no_two_stacks_of_a_run_share_noise(tiny, tmp_path, monkeypatch):
    """Every stream of noise that is opened in a run has a key of its own."""
    monkeypatch.setattr(stack_form, "_MOST", 4)
    opened, original = [], private_stack.train

    def seen(*arguments, keys, plans):
        opened.extend(key.secret for key in keys)
        return original(*arguments, keys=keys, plans=plans)

    monkeypatch.setattr(private_stack, "train", seen)
    bract.simulate(tiny(**PRIVATE, **{"simulation.kernel": "stacked"}), out=tmp_path / "run")
    assert len(opened) == len(set(opened)) == 20 * 5


def test_a_stack_that_fails_leaves_each_client_to_itself(tiny, tmp_path, monkeypatch):
    failed, events = [], []

    def fails(*_, **__):
        failed.append(1)
        raise IndexError("as an embedding does")

    monkeypatch.setattr(private_stack, "train", fails)
    settings = tiny(**PRIVATE, **{"simulation.kernel": "stacked"})
    found = bract.simulate(settings, out=tmp_path / "one", listeners=[events.append])
    assert failed and not [each for each in events if isinstance(each, ClientFailed)]
    other = bract.simulate(tiny(**PRIVATE, **{"simulation.kernel": "traced"}), out=tmp_path / "other")
    assert found.model_sha256 == other.model_sha256


def test_released_metrics_are_those_of_each_client_by_itself(tiny, tmp_path, monkeypatch):
    settings = tiny(**PRIVATE, **{"simulation.kernel": "stacked", "server.evaluate_every": 1})
    together = bract.simulate(settings, out=tmp_path / "together")
    monkeypatch.setattr(ClientGroup, "_evaluates_together", False)
    assert bract.simulate(settings, out=tmp_path / "each").metrics == together.metrics
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("together", "each")]
    told = [[{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in each] for each in lines]
    assert told[0] == told[1]
