"""Correlated noise: the matrix, its sensitivity, its noise and its epsilon belong together, and it is worth it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations, pairwise, product
from typing import Any

import numpy as np
import pytest
from scipy.linalg import solve_triangular, toeplitz
from scipy.stats import norm

from bract.core.errors import InputError
from bract.core.keys import Key
from bract.privacy import accounting
from bract.privacy.matrix_factorization import CorrelatedNoise, MatrixFactorizationPlan

KEY = Key.from_seed(3)


def plan(**changes: Any) -> MatrixFactorizationPlan:
    given = {
        "rounds": 10,
        "bands": 3,
        "participations": 3,
        "minimum_separation": 3,
        "clipping_norm": 0.7,
        "noise_multiplier": 1.3,
        "delta": 1e-6,
    }
    return MatrixFactorizationPlan(**(given | changes))


def matrix(of: MatrixFactorizationPlan) -> np.ndarray:
    column = np.zeros(of.rounds)
    column[: of.bands] = of.coefficients
    return toeplitz(column, np.zeros(of.rounds))


def patterns(rounds: int, participations: int, separation: int) -> Iterator[tuple[int, ...]]:
    for count in range(1, participations + 1):
        for chosen in combinations(range(rounds), count):
            if all(b - a >= separation for a, b in pairwise(chosen)):
                yield chosen


def draw(size: int) -> Any:
    return lambda round: KEY.child("noise", round).stream().normals(size)


CASES = [
    (rounds, bands, participations, separation)
    for rounds, bands, participations, separation in product((5, 8, 10), (1, 2, 3, 5), (1, 2, 3, 10), (1, 2, 3, 4, 5))
    if participations == 1 or bands <= separation
]


@pytest.mark.parametrize("rounds", [5, 8, 10])
def test_the_sensitivity_is_the_largest_over_all_patterns_and_updates(rounds: int) -> None:
    generator = np.random.default_rng(0)
    for _, bands, participations, separation in (case for case in CASES if case[0] == rounds):
        of = plan(rounds=rounds, bands=bands, participations=participations, minimum_separation=separation)
        for seen in range(1, rounds + 1):
            strategy = matrix(of)[:seen, :seen]
            found = 0.0
            for chosen in patterns(seen, participations, separation):
                for signs in product((1, -1), repeat=len(chosen) - 1):
                    found = max(found, np.linalg.norm(strategy[:, chosen] @ np.array([1, *signs])))
                # Updates of several coordinates, none longer than 1.
                updates = generator.normal(size=(len(chosen), 3))
                updates /= np.linalg.norm(updates, axis=1, keepdims=True)
                assert np.linalg.norm(strategy[:, chosen] @ updates) <= of.sensitivity(seen) * (1 + 1e-12)
            assert of.sensitivity(seen) == pytest.approx(found, rel=1e-12)
        assert of.sensitivity() == of.sensitivity(rounds)


def test_the_noise_is_the_inverse_matrix_times_independent_noise() -> None:
    of, size = plan(rounds=40, bands=7, minimum_separation=9), 5
    noise = CorrelatedNoise(plan=of, size=size)
    found = np.array([noise.noise(round, draw(size)) for round in range(40)])
    independent = np.array([draw(size)(round) for round in range(40)]) * of.noise_deviation
    np.testing.assert_allclose(found, solve_triangular(matrix(of), independent, lower=True), rtol=1e-10)
    assert len(noise.recent) == 6
    assert of.noise_deviation == of.noise_multiplier * of.clipping_norm * of.sensitivity()


def test_what_is_released_costs_what_is_stated() -> None:
    """The worst client, seen through the covariance of the noise that is really added, is at the Gaussian's epsilon."""
    of = plan(rounds=9, bands=3, minimum_separation=4)
    noise = CorrelatedNoise(plan=of, size=9)
    # Fed with one impulse a round and coordinate, it returns the matrix that makes noise of independent draws.
    mixing = np.array([noise.noise(round, lambda round: np.eye(9)[round]) for round in range(9)])
    for seen in (2, 5, 9):
        inverse = np.linalg.inv(mixing[:seen, :seen])
        distance = max(
            np.linalg.norm(inverse[:, chosen] @ np.full(len(chosen), of.clipping_norm))
            for chosen in patterns(seen, 3, 4)
        )
        spent = of.epsilon(seen)
        # Balle and Wang 2018, theorem 8.
        delta = norm.cdf(distance / 2 - spent / distance) - math.exp(spent) * norm.cdf(-distance / 2 - spent / distance)
        assert delta == pytest.approx(of.delta, rel=1e-5)
    assert distance == pytest.approx(1 / of.noise_multiplier)


def test_epsilon_never_falls_and_calibration_meets_it() -> None:
    common = {
        "rounds": 30,
        "bands": 5,
        "participations": 4,
        "minimum_separation": 6,
        "clipping_norm": 1.0,
        "delta": 1e-5,
    }
    of = MatrixFactorizationPlan.calibrate(epsilon=2.0, **common)
    spent = [of.epsilon(rounds) for rounds in range(31)]
    assert spent == sorted(spent)
    assert spent[0] == 0
    assert 1.999 < spent[-1] == of.epsilon() <= 2.0
    assert of.epsilon() == accounting.epsilon(
        sampling_rate=1.0, noise_multiplier=of.noise_multiplier, steps=1, delta=1e-5
    )
    # No client may take part again after round 18, so nothing more is spent on the worst one but its last columns.
    assert spent[4] < spent[6] < spent[23] == spent[30]
    double = MatrixFactorizationPlan.calibrate(epsilon=2.0, **common, relation="replace-one")
    assert double.noise_multiplier == 2 * of.noise_multiplier
    assert 1.999 < double.epsilon() <= 2.0
    assert plan(noise_multiplier=0.0).epsilon() == math.inf


@pytest.mark.parametrize(
    ("rounds", "bands", "loss", "second"),
    # `toeplitz.optimize_banded_toeplitz` and `toeplitz.loss` of jax-privacy 2.0.0, in float64.
    [
        (16, 4, 3.75402356636153, 0.5515746),
        (64, 8, 7.09676191688255, 0.5877443),
        (256, 32, 9.528398447376954, 0.5394286),
        (500, 500, 8.00220903678496, 0.5020961),
    ],
)
def test_the_matrix_is_that_of_jax_privacy(rounds: int, bands: int, loss: float, second: float) -> None:
    of = plan(rounds=rounds, bands=bands, participations=1, noise_multiplier=1.0, clipping_norm=1.0)
    assert of.prefix_error**2 == pytest.approx(loss, rel=1e-8)
    assert of.coefficients[0] == 1
    assert of.coefficients[1] == pytest.approx(second, abs=1e-5)


@pytest.mark.parametrize("rounds", [2, 10, 100, 1000])
def test_with_all_bands_the_error_lies_between_the_known_bounds(rounds: int) -> None:
    of = plan(rounds=rounds, bands=rounds, participations=1, noise_multiplier=1.0, clipping_norm=1.0)
    # |BC|_* <= |B|_F |C|_F, and the singular values of the triangle of ones are 1 / (2 sin((2 i - 1) pi / (4 n + 2))).
    singular = 1 / (2 * np.sin((2 * np.arange(1, rounds + 1) - 1) * math.pi / (4 * rounds + 2)))
    if rounds <= 100:
        np.testing.assert_allclose(np.linalg.svd(np.tril(np.ones((rounds, rounds))))[1], singular)
    # The square root factorization (Fichtenberger, Henzinger and Upadhyay 2023) in the same measure.
    root = np.cumprod([1.0, *(1 - 1 / (2 * np.arange(1, rounds)))])
    square_root = math.sqrt(root @ root * (np.arange(rounds, 0, -1) @ root**2) / rounds)
    assert singular.sum() / rounds <= of.prefix_error < square_root


def test_it_beats_independent_noise_at_the_same_epsilon() -> None:
    common = {"epsilon": 2.0, "rounds": 200, "clipping_norm": 1.0, "delta": 1e-5}
    errors = {}
    for participations, separation in ((1, 200), (4, 50), (20, 10)):
        for bands in (1, separation):
            of = MatrixFactorizationPlan.calibrate(
                **common, bands=bands, participations=participations, minimum_separation=separation
            )
            errors[separation, bands] = of.prefix_error
            # One band is plain independent noise: a random walk.
            if bands == 1:
                assert of.coefficients == (1.0,)
                expected = of.noise_multiplier * math.sqrt(participations * (200 + 1) / 2)
                assert of.prefix_error == pytest.approx(expected)
    assert errors[200, 1] > 3 * errors[200, 200]
    assert errors[50, 1] > 2.5 * errors[50, 50]
    assert errors[10, 1] > 1.5 * errors[10, 10]


def test_the_prefix_error_is_that_of_drawn_noise() -> None:
    of, size = plan(rounds=50, bands=10, minimum_separation=10), 20_000
    noise = CorrelatedNoise(plan=of, size=size)
    drawn = np.cumsum([noise.noise(round, draw(size)) for round in range(50)], axis=0)
    # 20,000 independent walks: a standard deviation of about 0.4 %.
    assert math.sqrt((drawn**2).mean()) == pytest.approx(of.prefix_error, rel=0.025)


def test_a_restored_noise_goes_on_with_the_same_bits() -> None:
    of = plan()
    straight, killed = (CorrelatedNoise(plan=of, size=4) for _ in range(2))
    whole = [straight.noise(round, draw(4)) for round in range(10)]
    for stop in range(10):
        copy = {name: array.copy() for name, array in killed.state().items()}
        killed = CorrelatedNoise.restore(of, copy)
        released = killed.noise(stop, draw(4))
        assert released.tobytes() == whole[stop].tobytes()
        # What the caller does with it touches no later round.
        released[:] = math.nan


@pytest.mark.parametrize("change", [{"bands": 2}, {"noise_multiplier": 1.4}, {"clipping_norm": 1.0}, {"rounds": 11}])
def test_the_noise_of_another_plan_is_refused(change: dict[str, Any]) -> None:
    state = CorrelatedNoise(plan=plan(), size=4).state()
    with pytest.raises(InputError, match="another matrix") as caught:
        CorrelatedNoise.restore(plan(**change), state)
    assert caught.value.code == "run-changed"


def test_rounds_go_in_turn_once_each() -> None:
    noise = CorrelatedNoise(plan=plan(), size=4)
    for wrong in (1, -1):
        with pytest.raises(ValueError, match="the next one is 0"):
            noise.noise(wrong, draw(4))
    with pytest.raises(ValueError, match="shape"):
        noise.noise(0, draw(5))
    for round in range(10):
        noise.noise(round, draw(4))
        with pytest.raises(ValueError, match="the next one"):
            noise.noise(round, draw(4))
    with pytest.raises(ValueError, match="of 10"):
        noise.noise(10, draw(4))


def test_overlapping_columns_are_refused() -> None:
    with pytest.raises(InputError, match=r"bands = 4: must be at most the separation .*\(3\)"):
        plan(bands=4)
    assert plan(bands=4, participations=1).sensitivity() > 1


@pytest.mark.parametrize(
    "change",
    [
        {"rounds": 0},
        {"bands": 0},
        {"bands": 11, "participations": 1},
        {"participations": 0},
        {"minimum_separation": 2.5},
        {"clipping_norm": 0.0},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": math.nan},
        {"delta": 0.0},
    ],
)
def test_values_out_of_range_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        plan(**change)
