"""What a site spends: never under the truth, never falling, whoever chooses the next run after seeing results."""

from __future__ import annotations

import json
import math
from collections import Counter
from functools import cache
from time import process_time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bract.privacy import accounting
from bract.privacy.ledger.composition import DISTINCT, composed
from bract.privacy.ledger.events import (
    Claimed,
    DiscreteLaplace,
    Event,
    Gaussian,
    Planned,
    RunPlan,
    SampledGaussian,
    canonical,
    event_from_dict,
    event_to_dict,
    round_of,
)
from bract.privacy.ledger.renyi import ORDERS, renyi_costs
from bract.privacy.ledger.spending import SHARES, fits, spent
from bract.privacy.mechanism import RecordLevelPlan

DELTA = 1e-5


def sampled(q: float, sigma: float, steps: int, relation: accounting.Relation = "zero-out") -> SampledGaussian:
    return SampledGaussian(sampling_rate=q, noise_multiplier=sigma, steps=steps, relation=relation, delta=DELTA)


def gaussian(sigma: float, steps: int = 1, relation: accounting.Relation = "zero-out") -> Gaussian:
    return Gaussian(noise_multiplier=sigma, steps=steps, relation=relation, delta=DELTA)


def laplace(epsilon: float, relation: accounting.Relation = "zero-out") -> DiscreteLaplace:
    return DiscreteLaplace(epsilon=epsilon, relation=relation)


def claimed(epsilon: float, delta: float = 1e-6) -> Claimed:
    return Claimed(epsilon=epsilon, delta=delta, relation="zero-out")


EVENTS: tuple[Event, ...] = (
    sampled(0.1, 3.0, 10),
    sampled(0.02, 1.2, 25),
    gaussian(20.0),
    gaussian(35.0, 2),
    laplace(0.05),
    laplace(0.3),
)
counts = st.dictionaries(st.sampled_from(EVENTS), st.integers(1, 12), max_size=4)


@pytest.mark.parametrize("event", [*EVENTS, claimed(1.5)], ids=lambda each: type(each).__name__)
def test_an_event_reads_back_from_its_one_json_text(event: Event) -> None:
    text = canonical(event_to_dict(event))
    again = event_from_dict(json.loads(text))
    assert again == event
    assert canonical(event_to_dict(again)) == text


@pytest.mark.parametrize(
    "wrong", [{"kind": "gaussian"}, {"kind": "exact"}, {**event_to_dict(laplace(0.1)), "epsilons": 3}]
)
def test_what_is_not_exactly_an_event_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="unknown"):
        event_from_dict(wrong)


def test_the_rounds_of_a_calibrated_plan_cost_what_the_plan_says_and_fill_its_budget() -> None:
    plan = RecordLevelPlan.calibrate(
        epsilon=2.0, records=100, batch_size=10, epochs=1, rounds=20, clipping_norm=1.0, delta=DELTA
    )
    event = round_of(plan)
    first = {event: 20}
    for rounds in (1, 7, 20):
        figure = spent({event: rounds}, first, epsilon=2.0, delta=DELTA)
        assert (figure.epsilon, figure.method) == (plan.epsilon(rounds), "PLD")
    assert fits({event: 20}, first, epsilon=2.0, delta=DELTA)
    # Nothing is left: neither for a repeated round, nor for another run.
    assert not fits({event: 21}, first, epsilon=2.0, delta=DELTA)
    assert not fits({event: 1, gaussian(1e4): 1}, first, epsilon=2.0, delta=DELTA)
    assert fits({event: 21}, first, epsilon=3.2, delta=DELTA)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(first=counts, drawn=st.lists(st.sampled_from(EVENTS), max_size=14), epsilon=st.sampled_from([0.5, 2.0, 8.0]))
def test_epsilon_never_falls(first: dict[Event, int], drawn: list[Event], epsilon: float) -> None:
    charged: Counter[Event] = Counter()
    before = 0.0
    for event in drawn:
        charged[event] += 1
        now = spent(charged, first, epsilon=epsilon, delta=DELTA).epsilon
        assert now >= before
        before = now


@settings(max_examples=20, deadline=None, derandomize=True)
@given(first=counts, charged=counts, epsilon=st.sampled_from([0.5, 2.0, 8.0]))
def test_spent_is_never_under_what_the_same_events_cost_if_fixed_in_advance(
    first: dict[Event, int], charged: dict[Event, int], epsilon: float
) -> None:
    figure = spent(charged, first, epsilon=epsilon, delta=DELTA)
    # Both are bounds, so a coarser interval may differ by what it rounds away.
    assert figure.epsilon >= composed(charged, DELTA).epsilon * (1 - 1e-3)
    assert fits(charged, first, epsilon=epsilon, delta=DELTA) == figure.within(epsilon) or (
        # The first plan as a whole is the one thing that `fits` knows without asking for its parts.
        composed(first, DELTA).within(epsilon)
    )


def worst_delta(first: dict[Event, int], moves: tuple[Event, ...], epsilon: float, delta: float) -> float:
    """Return the exact delta of the best adversary who sees each answer before it chooses the next event, or stops.

    Each event is randomized response, the worst of all mechanisms with its epsilon: the loss moves up or down by it.
    """

    @cache
    def allowed(drawn: tuple[int, ...]) -> bool:
        return fits(dict(zip(moves, drawn, strict=True)), first, epsilon=epsilon, delta=delta)

    @cache
    def value(drawn: tuple[int, ...], ups: tuple[int, ...]) -> float:
        loss = sum((2 * up - n) * event.cost for event, n, up in zip(moves, drawn, ups, strict=True))
        best = max(0.0, -math.expm1(epsilon - loss))
        for place, event in enumerate(moves):
            after = tuple(n + (place == each) for each, n in enumerate(drawn))
            if sum(after) <= 40 and allowed(after):
                up = tuple(n + (place == each) for each, n in enumerate(ups))
                p = 1 / (1 + math.exp(-event.cost))
                best = max(best, p * value(after, up) + (1 - p) * value(after, ups))
        return best

    start = (0,) * len(moves)
    return value(start, start)


@pytest.mark.parametrize(
    ("first", "epsilon", "delta"),
    [
        ({laplace(0.5): 6}, 2.5, 0.05),
        ({laplace(0.5): 9}, 2.5, 0.05),
        ({laplace(0.25): 20}, 2.0, 0.05),
        ({laplace(0.25): 12, laplace(0.5): 3}, 2.0, 0.1),
        ({laplace(0.25): 16}, 3.0, 0.2),
        ({}, 3.0, 0.2),
    ],
)
def test_no_adversary_who_chooses_after_seeing_results_gets_beyond_delta(
    first: dict[Event, int], epsilon: float, delta: float
) -> None:
    moves = (laplace(0.5), laplace(0.25))
    reached = worst_delta(first, moves, epsilon, delta)
    assert 0 < reached <= delta


def test_gaussians_compose_in_closed_form() -> None:
    figure = composed({gaussian(20.0): 9, gaussian(35.0, 2): 5}, DELTA)
    sigma = (9 / 20**2 + 10 / 35**2) ** -0.5
    assert figure.method == "closed form"
    expected = accounting.epsilon(sampling_rate=1.0, noise_multiplier=sigma, steps=1, delta=DELTA)
    assert figure.epsilon == pytest.approx(expected, rel=1e-9)
    everything = SampledGaussian(sampling_rate=1.0, noise_multiplier=20.0, steps=9, relation="zero-out", delta=DELTA)
    assert composed({everything: 1}, DELTA).epsilon == composed({gaussian(20.0): 9}, DELTA).epsilon


def test_a_mixed_plan_is_the_distribution_of_dp_accounting() -> None:
    from dp_accounting import (
        ComposedDpEvent,
        GaussianDpEvent,
        NeighboringRelation,
        PoissonSampledDpEvent,
        SelfComposedDpEvent,
    )
    from dp_accounting.pld import PLDAccountant

    figure = composed({sampled(0.1, 3.0, 10): 5, gaussian(20.0): 8}, DELTA)
    reference = PLDAccountant(NeighboringRelation.REPLACE_SPECIAL)
    reference.compose(
        ComposedDpEvent(
            [
                SelfComposedDpEvent(PoissonSampledDpEvent(0.1, GaussianDpEvent(3.0)), 50),
                SelfComposedDpEvent(GaussianDpEvent(20.0), 8),
            ]
        )
    )
    truth = reference.get_epsilon(DELTA)
    assert figure.method == "PLD"
    assert truth * (1 - 1e-3) <= figure.epsilon <= truth * 1.01
    with_pure = composed({sampled(0.1, 3.0, 10): 5, gaussian(20.0): 8, laplace(0.1): 2}, DELTA).epsilon
    assert figure.epsilon < with_pure <= figure.epsilon + 0.2 + 2e-3


@pytest.mark.parametrize("relation", ["zero-out", "add-remove"])
def test_renyi_costs_are_those_of_dp_accounting(relation: accounting.Relation) -> None:
    from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    reference = RdpAccountant(orders=list(ORDERS), neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)
    reference.compose(PoissonSampledDpEvent(0.1, GaussianDpEvent(3.0)), 70)
    reference.compose(GaussianDpEvent(20.0), 4)
    mine = renyi_costs({sampled(0.1, 3.0, 10, relation): 7, gaussian(20.0, relation=relation): 4})
    assert mine == pytest.approx(list(reference.rdp), rel=1e-9)


@pytest.mark.parametrize("epsilon", [1e-3, 0.1, 1.0, 30.0])
def test_the_renyi_cost_of_a_pure_event_is_that_of_randomized_response(epsilon: float) -> None:
    p, q = math.exp(epsilon) / (1 + math.exp(epsilon)), 1 / (1 + math.exp(epsilon))
    for order, cost in zip(ORDERS, renyi_costs({laplace(epsilon): 1}), strict=True):
        logs = [order * math.log(p) + (1 - order) * math.log(q), order * math.log(q) + (1 - order) * math.log(p)]
        largest = max(logs)
        expected = (largest + math.log(sum(math.exp(each - largest) for each in logs))) / (order - 1)
        assert cost == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_pure_events_add_up_to_the_whole_and_no_further() -> None:
    # Some of these sums lie a rounding above the whole.
    for releases in range(1, 100):
        for epsilon in (0.1, 0.3, 1.7):
            event = laplace(epsilon / releases)
            assert fits({event: releases}, {event: releases}, epsilon=epsilon, delta=1e-300)
    for releases in (3, 7, 20):
        event = laplace(0.3 / releases)
        assert not fits({event: releases + 1}, {event: releases}, epsilon=0.3, delta=1e-12)


def test_replacing_a_record_costs_twice_the_laplace_and_more_than_the_zero_out_gaussian() -> None:
    assert composed({laplace(0.2, "replace-one"): 1}, DELTA).epsilon == pytest.approx(0.4)
    for make in (lambda relation: gaussian(10.0, 3, relation), lambda relation: sampled(0.1, 3.0, 5, relation)):
        replaced, zeroed = make("replace-one"), make("zero-out")
        for first in ({}, None):
            before = spent({zeroed: 4}, first if first is not None else {zeroed: 4}, epsilon=9.0, delta=DELTA)
            after = spent({replaced: 4}, first if first is not None else {replaced: 4}, epsilon=9.0, delta=DELTA)
            assert after.method == before.method
            assert after.epsilon > 1.5 * before.epsilon


def test_without_noise_nothing_fits() -> None:
    for event in (gaussian(0.0), sampled(0.1, 0.0, 1)):
        for first in ({event: 1}, {}):
            assert spent({event: 1}, first, epsilon=1e6, delta=DELTA).epsilon == math.inf
            assert not fits({event: 1}, first, epsilon=1e6, delta=DELTA)
    assert composed({sampled(0.0, 1.0, 5): 3, sampled(0.1, 3.0, 10): 1}, DELTA).epsilon < 1


def test_claims_add_up_with_their_deltas() -> None:
    assert spent({claimed(1.5): 2}, {claimed(1.5): 1}, epsilon=4.0, delta=DELTA).epsilon == 3.0
    assert spent({claimed(1.5): 2}, {}, epsilon=4.0, delta=DELTA).method == "claimed"
    assert not fits({claimed(0.1): 11}, {}, epsilon=4.0, delta=DELTA)


def test_the_first_plan_gets_the_least_share_that_admits_it() -> None:
    event = sampled(0.1, 3.0, 10)
    first = {event: 20}
    whole = composed(first, DELTA).epsilon
    second = {event: 20, gaussian(400.0): 1}
    # A budget that is a little larger than the first plan leaves room; one that is the first plan leaves none.
    assert not fits(second, first, epsilon=whole, delta=DELTA)
    room = [
        epsilon
        for epsilon in (1.1 * whole, 1.5 * whole, 2 * whole)
        if fits(second, first, epsilon=epsilon, delta=DELTA)
    ]
    assert room
    # What the second run leaves does not hang on rounds of the first that were planned but never drawn.
    assert fits({event: 1, gaussian(10.0): 1}, first, epsilon=2 * whole, delta=DELTA)
    assert tuple(sorted(SHARES)) == SHARES and SHARES[-1] < 1


def test_ten_thousand_entries_of_ten_events_are_composed_whole() -> None:
    """How long that takes is measured by benchmarks/ledger.py."""
    events = [sampled(0.01 * (place + 1), 20.0 + place, 1) for place in range(DISTINCT)]
    many = dict.fromkeys(events, 10_000 // DISTINCT)
    for first, method in ((many, "PLD"), ({events[0]: 1}, "RDP filter")):
        figure = spent(many, first, epsilon=8.0, delta=DELTA)
        assert figure.method == method
        assert 0 < figure.epsilon < 20


def test_more_distinct_events_fall_back_to_renyi_accounting_and_say_so() -> None:
    events = {sampled(0.01, 2.0 + place, 1): 5 for place in range(DISTINCT + 1)}
    figure = composed(events, DELTA)
    assert figure.method == "RDP"
    fewer = dict(list(events.items())[:-1])
    assert composed(fewer, DELTA).epsilon < figure.epsilon


def test_a_plan_holds_only_its_own_events_and_reads_back() -> None:
    plan = RunPlan(digest="d", events=(Planned(phase="train", event=EVENTS[0], times=3),))
    assert plan.holds("train", EVENTS[0])
    assert not plan.holds("evaluate", EVENTS[0])
    assert not plan.holds("train", EVENTS[1])
    assert RunPlan.from_dict(json.loads(canonical(plan.to_dict()))) == plan


EXTREMES: tuple[Event, ...] = (
    *(gaussian(sigma, steps) for sigma in (0.0, 5e-324, 1e-300, 1e-5, 1e300) for steps in (1, 2**40)),
    *(
        sampled(q, sigma, steps, relation)
        for q, sigma in ((1e-300, 1e-300), (1e-300, 1e300), (1e-9, 1e-300), (0.5, 1e-300), (0.5, 1e300), (1.0, 1e-300))
        for steps, relation in ((1, "zero-out"), (2**40, "zero-out"), (2**40, "replace-one"))
    ),
    laplace(1e308, "replace-one"),
    claimed(1e308),
)


@pytest.mark.parametrize("event", EXTREMES, ids=str)
@pytest.mark.parametrize("delta", [DELTA, 5e-324])
def test_no_event_is_too_extreme_to_be_counted(event: Event, delta: float) -> None:
    """A small or a large number that floats cannot square is no way past the ledger, nor to end it."""
    few, many = {event: 1}, {event: 2**40}
    figures = [spent(each, first, epsilon=3.0, delta=delta).epsilon for each in (few, many) for first in (each, {})]
    assert not any(math.isnan(each) or each < 0 for each in figures)
    assert figures[0] <= figures[2]
    for each in (few, many):
        assert fits(each, each, epsilon=3.0, delta=delta) == (spent(each, each, epsilon=3.0, delta=delta).epsilon <= 3)
    if not isinstance(event, DiscreteLaplace | Claimed) and event.noise_multiplier < 1e-3:
        assert min(figures) > 1e3


SLOW = ((1e-9, 1.0), (1e-4, 5.0), (1e-4, 1e6), (1e-3, 20.0), (0.01, 20.0), (0.5, 1e3), (0.99, 1e3))


@pytest.mark.parametrize(("q", "sigma"), SLOW)
def test_ten_million_steps_are_counted_in_a_second_and_the_figure_says_how(q: float, sigma: float) -> None:
    accounting.epsilon(sampling_rate=0.5, noise_multiplier=5.0, steps=1, delta=DELTA)
    started = process_time()
    event = sampled(q, sigma, 10)
    found = spent({event: 10**6}, {event: 10**6}, epsilon=3.0, delta=DELTA)
    fits({event: 10**6 + 1}, {event: 10**6}, epsilon=3.0, delta=DELTA)
    assert process_time() - started < 2
    assert found.method in ("RDP", "closed form")
    # Fewer steps, counted by their distribution, cost less.
    assert composed({event: 10**4}, DELTA).epsilon <= found.epsilon


def test_what_a_plan_can_ask_at_most_is_counted_in_seconds() -> None:
    """The longest distributions, several of them, where the filter decides and shares of delta are tried."""
    events = {sampled(0.5, 50.0 + place, 1): 90_000 for place in range(DISTINCT)}
    started = process_time()
    spent(Counter(events) + Counter({gaussian(30.0): 1}), events, epsilon=3.0, delta=DELTA)
    spent(events, events, epsilon=30.0, delta=DELTA)
    assert process_time() - started < 10


@pytest.mark.parametrize("sigma", [1e2, 1e4, 1e5, 1e6, 1e7])
@pytest.mark.parametrize("q", [1e-9, 1e-3, 0.1, 0.5, 0.999])
def test_no_cost_of_a_step_is_rounded_below_the_truth(q: float, sigma: float) -> None:
    """At order 2 it is log(1 + q² (exp(1/σ²) − 1)), here without a sum of numbers near 1; many steps would tell."""
    exact = 2**40 * math.log1p(q**2 * math.expm1(sigma**-2))
    assert renyi_costs({sampled(q, sigma, 1): 2**40})[0] >= exact * (1 - 1e-12)
    assert renyi_costs({sampled(q, sigma, 2**40): 1})[0] >= exact * (1 - 1e-12)


def test_sums_beyond_the_largest_float_are_infinite() -> None:
    for events in ({claimed(1e308): 1, claimed(1.1e308): 1}, {laplace(1e308): 1, laplace(1.1e308): 1}):
        assert spent(events, events, epsilon=3.0, delta=DELTA).epsilon == math.inf
        assert not fits(events, events, epsilon=3.0, delta=DELTA)
