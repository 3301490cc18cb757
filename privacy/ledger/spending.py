"""How the events of one data set compose: within the plan that came first, and across runs chosen after seeing results.

The owner fixes (epsilon, delta). Each part of a data set ("train", "test") is counted on its own and the largest
counts, since a record is in one part only (McSherry 2009, theorem 4; under replace-one the record keeps its part). Once
the digest of a data set has changed, a record may have been in both: the book then counts the parts as one, with no
first plan. What a part has drawn, C, is admitted by any one of three rules:

1. C lies within P, the plan of the run that touched the part first (event by event, whichever run drew it). P was fixed
   before anything was seen, so the privacy loss distribution of this multiset counts, in whatever order and under
   whatever stops it is drawn (Vadhan and Zhang 2023: concurrent composition costs what ordinary composition costs).
2. For some order alpha the Rényi costs of C sum to no more than what keeps alpha within (epsilon, delta_alpha): the
   filter of Feldman and Zrnic 2021, section 4, sound for events that are chosen after seeing results.
3. All events of C are pure, and their epsilons sum to no more than epsilon (Rogers et al. 2016: the basic filter).

Which rule holds in the end depends on results, so their deltas add up. For each rule let M_r halt where r would fail:
on the transcripts that end within r, the site behaves as M_r; cut any set of transcripts by the first rule that they
end within, and the excess over e^epsilon is at most the sum of delta_r. Rule 3 has none. Rule 1 gets s · delta, where s
is the least of SHARES at which P alone keeps within epsilon (0 where rule 2 admits all of P); the orders share the rest
equally. So the first plan may use the whole delta, and rule 1 takes a thousandth or nothing of a budget that is larger
than its first plan. A first plan that takes the whole budget leaves room for nothing but its own remaining events.

Rounds are charged one by one, when they are reserved: of an abandoned run only what was drawn counts. That the whole
plan of a run would fit is tested before its first round, so no run starts that could not end (unless a second one
starts meanwhile); that test charges nothing.

The figure is the least epsilon at which the rules, with s as the budget fixed it, still admit C; it never falls as
events are added. It is what the filter counts: the proven statement is (epsilon, delta) of the budget, at all times.
"""

from __future__ import annotations

from .. import accounting
from .composition import Figure, composed, positive, summed
from .renyi import ORDERS, Counts, converted, renyi_costs

SHARES = (0.001, 0.1, 0.5, 0.9, 0.99)


def spent(charged: Counts, first: Counts, *, epsilon: float, delta: float) -> Figure:
    """Return what one part has spent: `charged` events, of which `first` were planned first, under a budget.

    Claimed events are counted once a run by the caller and simply add up.
    """
    charged, first = positive(charged), positive(first)
    if _within(charged, first):
        return composed(charged, delta)
    share = _share_of_first(first, epsilon, delta)
    filtered = _filtered(charged, (1 - share) * delta)
    if share == SHARES[-1]:
        # Only larger than the budget where not even the largest share admits the first plan: then all is refused.
        filtered = max(filtered, composed(first, share * delta).epsilon)
    return min(summed(charged, delta), Figure(epsilon=filtered, method="RDP filter"), key=lambda each: each.epsilon)


def fits(charged: Counts, first: Counts, *, epsilon: float, delta: float) -> bool:
    """Return whether `spent` keeps within the budget, cheaply where the whole first plan does."""
    charged, first = positive(charged), positive(first)
    if _within(charged, first) and composed(first, delta).within(epsilon):
        return True
    return spent(charged, first, epsilon=epsilon, delta=delta).within(epsilon)


def _share_of_first(first: Counts, epsilon: float, delta: float) -> float:
    """Return the share s of delta that rule 1 takes: a function of the first plan and the budget alone."""
    if _filtered(first, delta) <= epsilon:
        return 0.0
    # The wider interval costs a hair of epsilon, and saves seconds: there are several figures to compute.
    wide = accounting.CALIBRATING
    shares = (each for each in SHARES if composed(first, each * delta, interval=wide).within(epsilon))
    return next(shares, SHARES[-1])


def _filtered(counts: Counts, delta: float) -> float:
    """Rule 2: each order gets an equal share of delta."""
    return converted(renyi_costs(counts), delta / len(ORDERS))


def _within(counts: Counts, planned: Counts) -> bool:
    return all(times <= planned.get(event, 0) for event, times in counts.items())
