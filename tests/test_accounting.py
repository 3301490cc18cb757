"""Epsilon and noise: reference values, bounds, monotonicity, another accountant's figures."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bract.core.errors import InputError
from bract.privacy import accounting
from bract.privacy.mechanism import RecordLevelPlan

REFERENCE = [
    # sampling rate, noise multiplier, steps, delta, epsilon zero-out, epsilon replace-one
    (0.01, 1.0, 1000, 1e-5, 1.828, 2.843),
    (256 / 60000, 1.1, 14100, 1e-5, 2.385, 4.228),
    (0.1, 4.0, 500, 1e-6, 2.648, 5.537),
]
COARSE = {"delta": 1e-5, "interval": accounting.CALIBRATING}


def heart(records: int, epsilon: float = 5.0) -> RecordLevelPlan:
    return RecordLevelPlan.calibrate(
        epsilon=epsilon, records=records, batch_size=32, epochs=1, rounds=20, clipping_norm=1.0, delta=1e-5
    )


@pytest.mark.parametrize(("q", "sigma", "steps", "delta", "zero_out", "replace_one"), REFERENCE)
def test_epsilon_agrees_with_the_reference(
    q: float, sigma: float, steps: int, delta: float, zero_out: float, replace_one: float
) -> None:
    given_ = {"sampling_rate": q, "noise_multiplier": sigma, "steps": steps, "delta": delta}
    assert accounting.epsilon(**given_) == pytest.approx(zero_out, rel=5e-3)
    assert accounting.epsilon(**given_, relation="add-remove") == pytest.approx(zero_out, rel=5e-3)
    assert accounting.epsilon(**given_, relation="replace-one") == pytest.approx(replace_one, rel=5e-3)


@pytest.mark.parametrize(("q", "sigma", "steps", "delta"), [row[:4] for row in REFERENCE] + [(32 / 98, 5.98, 80, 1e-5)])
def test_epsilon_agrees_with_opacus_prv(q: float, sigma: float, steps: int, delta: float) -> None:
    from opacus.accountants import PRVAccountant

    prv = PRVAccountant()
    prv.history = [(sigma, q, steps)]
    other = prv.get_epsilon(delta=delta)
    ours = accounting.epsilon(sampling_rate=q, noise_multiplier=sigma, steps=steps, delta=delta)
    assert abs(ours - other) <= max(0.01 * other, 0.012)


@pytest.mark.parametrize(("records", "sigma"), [(243, 1.72), (234, 1.77), (160, 2.01), (98, 2.78)])
def test_noise_for_epsilon_five_agrees_with_the_reference(records: int, sigma: float) -> None:
    assert heart(records).noise_multiplier == pytest.approx(sigma, abs=0.006)


@pytest.mark.parametrize("epsilon", [0.05, 2.0, 20.0])
@pytest.mark.parametrize("records", [20, 243])
def test_calibration_never_exceeds_its_target_nor_wastes_noise(records: int, epsilon: float) -> None:
    plan = heart(records, epsilon)
    assert epsilon * 0.995 <= plan.epsilon() <= epsilon


def test_equal_sites_cost_one_calibration() -> None:
    heart(151, 2.0)
    hits = accounting.noise_multiplier.cache_info().hits
    heart(151, 2.0)
    assert accounting.noise_multiplier.cache_info().hits == hits + 1


def test_an_epsilon_that_no_noise_reaches_is_an_input_error() -> None:
    with pytest.raises(InputError, match="no noise reaches it"):
        accounting.noise_multiplier(sampling_rate=1.0, steps=10**9, epsilon=1e-9, delta=1e-12)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0, 20.0])
@pytest.mark.parametrize("steps", [1, 7, 100])
def test_the_closed_form_is_the_definition_of_approximate_privacy(sigma: float, steps: int) -> None:
    def cdf(value: float) -> float:
        return math.erfc(-value / math.sqrt(2)) / 2

    epsilon = accounting.epsilon(sampling_rate=1.0, noise_multiplier=sigma, steps=steps, delta=1e-5)
    mu = math.sqrt(steps) / sigma
    if epsilon < 300:  # beyond it the definition itself overflows
        delta = cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * cdf(-mu / 2 - epsilon / mu)
        assert delta == pytest.approx(1e-5, rel=1e-3)
    doubled = accounting.epsilon(
        sampling_rate=1.0, noise_multiplier=sigma, steps=steps, delta=1e-5, relation="replace-one"
    )
    assert doubled == accounting.epsilon(sampling_rate=1.0, noise_multiplier=sigma / 2, steps=steps, delta=1e-5)


def test_without_amplification_the_closed_form_continues_the_distribution() -> None:
    almost = accounting.epsilon(sampling_rate=1 - 1e-9, noise_multiplier=10.0, steps=50, **COARSE)
    exact = accounting.epsilon(sampling_rate=1.0, noise_multiplier=10.0, steps=50, **COARSE)
    assert almost == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("relation", ["zero-out", "replace-one"])
def test_where_the_distribution_would_be_too_long_a_bound_stands_at_once(relation: accounting.Relation) -> None:
    little = {"sampling_rate": 0.1, "noise_multiplier": 0.05, "steps": 10_000}
    assert accounting.accountant(**little) == "RDP"
    assert 1000 < accounting.epsilon(**little, delta=1e-5, relation=relation) < math.inf


def test_edges() -> None:
    assert accounting.epsilon(sampling_rate=0.1, noise_multiplier=1.0, steps=0, delta=1e-5) == 0
    assert accounting.epsilon(sampling_rate=0.0, noise_multiplier=1.0, steps=5, delta=1e-5) == 0
    assert accounting.epsilon(sampling_rate=0.1, noise_multiplier=0.0, steps=5, delta=1e-5) == math.inf
    assert accounting.epsilon(sampling_rate=0.1, noise_multiplier=0.0, steps=0, delta=1e-5) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"sampling_rate": 1.1},
        {"sampling_rate": math.nan},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": math.inf},
        {"steps": -1},
        {"delta": 0.0},
        {"delta": 1.0},
        {"relation": "neighbours"},
    ],
)
def test_arguments_out_of_range_are_named(wrong: dict[str, object]) -> None:
    right = {"sampling_rate": 0.1, "noise_multiplier": 1.0, "steps": 5, "delta": 1e-5}
    with pytest.raises(ValueError, match=next(iter(wrong))):
        accounting.epsilon(**right | wrong)  # type: ignore[arg-type]


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    q=st.floats(0.01, 0.9),
    sigma=st.floats(0.8, 8),
    steps=st.integers(1, 200),
    more=st.floats(1.05, 3),
    relation=st.sampled_from(["zero-out", "replace-one"]),
)
def test_epsilon_grows_with_steps_and_rate_and_falls_with_noise(
    q: float, sigma: float, steps: int, more: float, relation: accounting.Relation
) -> None:
    def spent(rate: float, noise: float, count: int) -> float:
        return accounting.epsilon(sampling_rate=rate, noise_multiplier=noise, steps=count, relation=relation, **COARSE)

    here = spent(q, sigma, steps)
    slack = 1e-3 * here + 1e-4  # each figure is rounded up on a grid of its own
    assert spent(q, sigma, math.ceil(steps * more)) >= here - slack
    assert spent(q, sigma * more, steps) <= here + slack
    assert spent(min(q * more, 1.0), sigma, steps) >= here - slack
    replaced = {"sampling_rate": q, "noise_multiplier": sigma, "steps": steps, "relation": "replace-one"}
    assert accounting.epsilon(**replaced, **COARSE) >= here - slack  # type: ignore[arg-type]


def test_the_curve_never_falls_never_lies_below_and_ends_exactly() -> None:
    plan = heart(243, 2.0)
    rounds = list(range(1, 21))
    curve = accounting.epsilons(plan, rounds)
    assert curve == sorted(curve)
    assert curve[-1] == plan.epsilon()
    for count in (1, 5, 10, 19):
        exact = plan.epsilon(count)
        assert exact - 1e-12 <= curve[count - 1] <= exact * 1.004 + 1e-3
    assert accounting.epsilons(plan, [20, 0, 5]) == [curve[19], 0.0, accounting.epsilons(plan, [5, 20])[0]]
    assert accounting.epsilons(plan, []) == []
