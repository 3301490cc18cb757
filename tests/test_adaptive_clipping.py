"""The clipping norm finds the quantile, and votes and updates together cost what one Gaussian mechanism costs."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent
from dp_accounting.rdp import RdpAccountant

from bract.core.errors import InputError, RunError
from bract.core.keys import Key
from bract.privacy.adaptive_clipping import LARGEST_NORM, LEAST_NORM, AdaptiveClippingPlan, ClippingState

KEY = Key.from_seed(11)
STARTS = (0.1, 0.9, 1.1, 100.0)
ROUNDS = 100
# The updates' norms of 200 clients, median 1.0.
NORMS = np.exp(0.3 * KEY.child("norms").stream().normals(200))
NORMS /= np.median(NORMS)


def ours(start: float, noise_multiplier: float = 1.0) -> float:
    """Return the clipping norm after the rounds."""
    state = AdaptiveClippingPlan(
        initial_clipping_norm=start, noise_multiplier=noise_multiplier, expected_cohort=200
    ).start()
    for round in range(ROUNDS):
        votes = [state.vote(float(norm)) for norm in NORMS]
        state = state.following(votes, KEY.child("votes", round).stream())
    return state.clipping_norm


def with_the_defect(start: float) -> float:
    """Return the same where the share of *clipped* updates moves the norm, as in Flower's adaptive clipping."""
    clipping_norm = start
    for _ in range(ROUNDS):
        clipped = (clipping_norm < NORMS).mean()
        clipping_norm *= math.exp(-0.2 * (clipped - 0.5))
    return clipping_norm


def finds_the_median(after_all_rounds: Callable[[float], float], start: float) -> bool:
    return abs(math.log(after_all_rounds(start))) < 0.1


@pytest.mark.parametrize("start", STARTS)
def test_the_norm_finds_the_median_from_anywhere(start: float) -> None:
    # Noise on the share: a deviation of 0.05, or 0.01 of the norm a round; the density draws it back.
    assert finds_the_median(ours, start)
    assert finds_the_median(lambda start: ours(start, noise_multiplier=0.0), start)


@pytest.mark.parametrize("start", STARTS)
def test_the_property_fails_for_the_clipped_share(start: float) -> None:
    assert not finds_the_median(with_the_defect, start)
    moved = with_the_defect(start) / start
    assert moved < 0.01 if start < 1 else moved > 100


@pytest.mark.parametrize("quantile", [0.2, 0.8])
def test_other_quantiles_are_found_too(quantile: float) -> None:
    state = AdaptiveClippingPlan(
        initial_clipping_norm=1.0, noise_multiplier=0.0, expected_cohort=200, quantile=quantile
    ).start()
    for _ in range(200):
        state = state.following([state.vote(float(norm)) for norm in NORMS], KEY.stream())
    assert (state.clipping_norm >= NORMS).mean() == pytest.approx(quantile, abs=0.02)


@pytest.mark.parametrize(("noise_multiplier", "cohort"), [(0.5, 20.0), (1.0, 100.0), (4.9, 50.0)])
def test_votes_and_updates_together_cost_the_planned_noise(noise_multiplier: float, cohort: float) -> None:
    plan = AdaptiveClippingPlan(initial_clipping_norm=0.3, noise_multiplier=noise_multiplier, expected_cohort=cohort)
    state = plan.start()
    # What one client moves, in deviations of the noise: an update of norm C, and a vote of one half.
    update = state.clipping_norm / state.noise_deviation
    vote = abs(state.vote(0.1)) / 2 / plan.votes_deviation
    assert math.hypot(update, vote) == pytest.approx(1 / noise_multiplier, rel=1e-12)
    assert plan.update_noise_multiplier > noise_multiplier
    assert plan.votes_deviation == cohort / 20
    orders = range(2, 64)
    pair, single = RdpAccountant(orders), RdpAccountant(orders)
    pair.compose(GaussianDpEvent(1 / update)).compose(GaussianDpEvent(1 / vote))
    single.compose(GaussianDpEvent(noise_multiplier))
    assert pair.get_epsilon(1e-5) == pytest.approx(single.get_epsilon(1e-5), rel=1e-12)


def test_a_sampled_pair_costs_no_more_than_the_sampled_single_mechanism() -> None:
    """By brute force: the moments of the sampled mixture of two coordinates, on a grid."""
    plan = AdaptiveClippingPlan(initial_clipping_norm=1.0, noise_multiplier=0.8, expected_cohort=20.0)
    rate, order = 0.2, 4
    shift = np.array([1 / plan.update_noise_multiplier, 0.5 / plan.votes_deviation])
    x, y = np.meshgrid(*(np.linspace(-12, 16, 1401),) * 2, indexing="ij")
    density = np.exp(-(x**2 + y**2) / 2) / (2 * math.pi) * 0.02**2
    ratio = np.exp(shift[0] * x + shift[1] * y - (shift**2).sum() / 2)
    moment = (density * (1 - rate + rate * ratio) ** order).sum()
    # Mironov, Talwar and Zhang 2019, for the single mechanism at a whole order.
    single = sum(
        math.comb(order, k) * (1 - rate) ** (order - k) * rate**k * math.exp(k * (k - 1) / 2 / plan.noise_multiplier**2)
        for k in range(order + 1)
    )
    assert moment == pytest.approx(single, rel=1e-6)


def test_the_noise_of_a_round_is_scaled_by_the_norm_that_clipped_it() -> None:
    plan = AdaptiveClippingPlan(initial_clipping_norm=2.0, noise_multiplier=1.0, expected_cohort=40.0)
    state = plan.start()
    following = state.following([1] * 40, KEY.stream())
    assert state.noise_deviation == 2.0 * plan.update_noise_multiplier
    assert following.noise_deviation == following.clipping_norm * plan.update_noise_multiplier != state.noise_deviation
    # Votes of the new round are on its own norm.
    assert (state.vote(1.95), following.vote(1.95)) == (1, -1)


def test_a_client_moves_the_votes_by_one_half_and_order_by_nothing() -> None:
    plan = AdaptiveClippingPlan(initial_clipping_norm=1.0, noise_multiplier=1.0, expected_cohort=50.0)
    votes = [1] * 20 + [-1] * 27

    def share(given: list[int]) -> float:
        moved = plan.start().following(given, KEY.stream()).clipping_norm
        return 0.5 - math.log(moved) / plan.learning_rate

    for added in (1, -1):
        assert share([*votes, added]) - share(votes) == pytest.approx(added / 2 / 50)
    reference = plan.start().following(votes, KEY.stream())
    assert plan.start().following(votes[::-1], KEY.stream()) == reference
    # Sums of workers will do.
    assert plan.start().following([5, sum(votes) - 5], KEY.stream()) == reference


def test_the_noise_on_the_votes_is_the_planned_one() -> None:
    plan = AdaptiveClippingPlan(initial_clipping_norm=1.0, noise_multiplier=1.0, expected_cohort=60.0)
    moved = [plan.start().following([1, 1], KEY.child(i).stream()).clipping_norm for i in range(4000)]
    sums = (0.5 - np.log(moved) / 0.2 - 0.5) * 60
    # Five standard deviations: fails for one key in a million.
    assert sums.mean() == pytest.approx(1.0, abs=5 * 3 / math.sqrt(4000))
    assert sums.std() == pytest.approx(3.0, rel=5 / math.sqrt(2 * 4000))
    assert len(set(moved)) == 4000


def test_a_round_without_clients_moves_by_noise_alone() -> None:
    plan = AdaptiveClippingPlan(initial_clipping_norm=1.0, noise_multiplier=0.0, expected_cohort=60.0)
    assert plan.start().following([], KEY.stream()).clipping_norm == 1.0
    noisy = AdaptiveClippingPlan(initial_clipping_norm=1.0, noise_multiplier=1.0, expected_cohort=60.0)
    assert 0.9 < noisy.start().following([], KEY.stream()).clipping_norm < 1.1


def test_the_norm_stays_in_its_bounds() -> None:
    plan = AdaptiveClippingPlan(initial_clipping_norm=1.0, noise_multiplier=0.0, expected_cohort=1.0)
    up = down = plan.start()
    for _ in range(30):
        up, down = up.following([-1000], KEY.stream()), down.following([1000], KEY.stream())
    assert (up.clipping_norm, down.clipping_norm) == (LARGEST_NORM, LEAST_NORM)


def test_a_norm_that_is_not_finite_has_no_vote() -> None:
    state = AdaptiveClippingPlan(initial_clipping_norm=1.0, noise_multiplier=1.0, expected_cohort=60.0).start()
    assert (state.vote(0.0), state.vote(1.0), state.vote(1.0000001)) == (0, 1, -1)
    for norm in (math.nan, math.inf):
        with pytest.raises(RunError, match="not finite") as caught:
            state.vote(norm)
        assert caught.value.code == "value-out-of-range"


def test_more_noise_than_the_votes_leave_over_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"privacy\.noise_multiplier = 1: .* 10 expected clients .* less than 1;"
    ) as caught:
        AdaptiveClippingPlan(initial_clipping_norm=1.0, noise_multiplier=1.0, expected_cohort=10.0)
    assert caught.value.code == "experiment-conflict"
    given = AdaptiveClippingPlan(
        initial_clipping_norm=1.0, noise_multiplier=1.0, expected_cohort=10.0, vote_deviation=1.0
    )
    assert given.update_noise_multiplier == pytest.approx(math.sqrt(4 / 3))
    assert isinstance(given.start(), ClippingState)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("initial_clipping_norm", 0.0),
        ("initial_clipping_norm", 1e7),
        ("noise_multiplier", math.nan),
        ("expected_cohort", 0.0),
        ("quantile", 1.0),
        ("learning_rate", -0.2),
        ("vote_deviation", 0.0),
    ],
)
def test_values_out_of_range_are_refused(name: str, value: float) -> None:
    given = {"initial_clipping_norm": 1.0, "noise_multiplier": 1.0, "expected_cohort": 60.0} | {name: value}
    with pytest.raises(ValueError, match=name):
        AdaptiveClippingPlan(**given)
