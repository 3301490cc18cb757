"""The plan, the sampler, the optimizer and the accountant say the same."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from torch import nn

from bract.core.keys import Key
from bract.privacy import accounting
from bract.privacy.dpsgd.passes import poisson_batches
from bract.privacy.dpsgd.stream_optimizer import StreamOptimizer
from bract.privacy.mechanism import RecordLevelPlan

PLAN = RecordLevelPlan(
    records=98, batch_size=32, epochs=2, rounds=5, clipping_norm=0.7, noise_multiplier=1.9, delta=1e-5
)


def test_plan_sampler_optimizer_and_accountant_agree() -> None:
    batches = list(poisson_batches(PLAN, Key.from_seed(1).stream()))
    optimizer = StreamOptimizer(
        torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.1), plan=PLAN, noise=Key.from_seed(2).stream()
    )
    event = PLAN.event()
    assert isinstance(event, SelfComposedDpEvent)
    assert isinstance(event.event, PoissonSampledDpEvent)
    assert isinstance(event.event.event, GaussianDpEvent)

    assert PLAN.sampling_rate == event.event.sampling_probability == 32 / 98
    assert PLAN.steps_per_round == len(batches) == 8
    assert PLAN.steps() == event.count == 40
    assert PLAN.steps(3) == 24
    assert PLAN.noise_multiplier == event.event.event.noise_multiplier == optimizer.noise_multiplier
    assert PLAN.clipping_norm == optimizer.max_grad_norm
    assert PLAN.expected_batch == optimizer.expected_batch_size == pytest.approx(32)
    assert PLAN.noise_deviation == pytest.approx(1.9 * 0.7)


@pytest.mark.parametrize("relation", ["zero-out", "replace-one", "add-remove"])
def test_the_figure_is_that_of_the_event(relation: accounting.Relation) -> None:
    relations = {
        "zero-out": NeighboringRelation.REPLACE_SPECIAL,
        "replace-one": NeighboringRelation.REPLACE_ONE,
        "add-remove": NeighboringRelation.ADD_OR_REMOVE_ONE,
    }
    direct = PLDAccountant(relations[relation], value_discretization_interval=1e-4)
    direct.compose(PLAN.event(3))
    assert PLAN.epsilon(3, relation=relation) == pytest.approx(direct.get_epsilon(PLAN.delta), rel=1e-3)


def test_calibration_uses_the_plans_own_rate_and_steps() -> None:
    plan = RecordLevelPlan.calibrate(
        epsilon=3.0, records=98, batch_size=32, epochs=2, rounds=5, clipping_norm=0.7, delta=1e-5
    )
    assert plan == replace(PLAN, noise_multiplier=plan.noise_multiplier)
    direct = PLDAccountant(NeighboringRelation.REPLACE_SPECIAL, value_discretization_interval=1e-4)
    direct.compose(plan.event())
    assert 2.99 < direct.get_epsilon(1e-5) <= 3.0


@pytest.mark.parametrize(
    ("records", "batch_size", "rate", "steps"),
    [(98, 32, 32 / 98, 4), (96, 32, 1 / 3, 3), (160, 32, 0.2, 5), (10, 32, 1.0, 1), (32, 32, 1.0, 1), (9, 1, 1 / 9, 9)],
)
def test_rate_and_steps(records: int, batch_size: int, rate: float, steps: int) -> None:
    plan = replace(PLAN, records=records, batch_size=batch_size, epochs=1)
    assert plan.sampling_rate == rate
    assert plan.steps_per_round == steps
    assert plan.expected_batch == pytest.approx(min(records, batch_size))


def test_epsilon_edges() -> None:
    assert PLAN.epsilon(0) == 0
    assert PLAN.epsilon() == PLAN.epsilon(5) > PLAN.epsilon(4) > 0
    assert replace(PLAN, noise_multiplier=0.0).epsilon() == math.inf
    assert replace(PLAN, clipping_norm=9.0).epsilon() == PLAN.epsilon()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("records", 0),
        ("records", 2.5),
        ("batch_size", 0),
        ("epochs", -1),
        ("rounds", True),
        ("clipping_norm", 0.0),
        ("clipping_norm", math.inf),
        ("clipping_norm", math.nan),
        ("noise_multiplier", -0.1),
        ("noise_multiplier", math.inf),
        ("noise_multiplier", math.nan),
        ("delta", 0.0),
        ("delta", 1.0),
        ("delta", math.nan),
    ],
)
def test_values_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} = "):
        replace(PLAN, **{name: value})
