"""Adaptive clipping at the client level: the clipping norm follows a quantile of the updates' norms, privately.

Andrew, Thakkar, McMahan and Ramaswamy 2021, "Differentially private learning with adaptive clipping", algorithm 1. In
a round with clipping norm C each client sends its clipped update and its vote b = 1 if the update's norm is at most C
(it was *not* clipped), else 0. From the noisy share of unclipped updates, b', the next round has
C · exp(-learning_rate · (b' - quantile)): when too many fit, C shrinks.

Sensitivity: the server sums b - 1/2, which is 1/2 or -1/2, over the clients of the round; one client more, or in place
of one that contributes nothing, moves that sum by at most 1/2 (summing b would move it by up to 1), one in place of any
other by at most 1. A client whose update is zero has no vote, so that one without records contributes nothing at all.
With noise of deviation s on the votes and z_u C on the updates, one client moves the pair (update sum / (z_u C), vote
sum / s) by at most sqrt(1 / z_u² + 1 / (2 s)²), in units of a deviation of 1: the pair is one Gaussian mechanism of
noise multiplier z, where z^-2 = z_u^-2 + (2 s)^-2 (their theorem 1). A round therefore costs what z costs, sampled
clients included, and C is post-processing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ..core.errors import InputError, RunError
from ..core.keys import Stream
from .discrete_gaussian import sample

LEAST_NORM, LARGEST_NORM = 1e-6, 1e6

_UNITS = 2**32


@dataclass(frozen=True, kw_only=True)
class AdaptiveClippingPlan:
    """How the clipping norm moves, and the noise that its votes and the updates get.

    `noise_multiplier` is that of the whole round, which the accountant takes. `expected_cohort` is the fixed
    denominator of the votes, whoever replied. `vote_deviation` is the noise on the sum of b - 1/2 (None: a twentieth of
    the expected cohort, as in the paper). Errors: ValueError for values out of range, InputError for more noise than
    the votes leave over: at noise_multiplier >= 2 · vote_deviation they alone cost more than the round may.
    """

    initial_clipping_norm: float
    noise_multiplier: float
    expected_cohort: float
    quantile: float = 0.5
    learning_rate: float = 0.2
    vote_deviation: float | None = None

    def __post_init__(self) -> None:
        for name in ("initial_clipping_norm", "expected_cohort", "learning_rate"):
            _check_positive(name, getattr(self, name))
        if not LEAST_NORM <= self.initial_clipping_norm <= LARGEST_NORM:
            raise ValueError(
                f"initial_clipping_norm = {self.initial_clipping_norm}: must lie in [{LEAST_NORM:g}, {LARGEST_NORM:g}]"
            )
        if not 0 < self.quantile < 1:
            raise ValueError(f"quantile = {self.quantile}: must lie between 0 and 1")
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise ValueError(f"noise_multiplier = {self.noise_multiplier}: must be finite and at least 0")
        if self.vote_deviation is not None:
            _check_positive("vote_deviation", self.vote_deviation)
        if self.noise_multiplier >= 2 * self.votes_deviation:
            raise InputError(
                "experiment-conflict",
                f"privacy.noise_multiplier = {self.noise_multiplier:g}: adaptive clipping with "
                f"{self.expected_cohort:g} expected clients a round needs less than {2 * self.votes_deviation:g}; "
                "raise clients.per_round, or set privacy.adaptive_clipping = false",
            )

    @property
    def votes_deviation(self) -> float:
        """Standard deviation of the noise on the sum of b - 1/2; it is drawn only where the round has noise at all."""
        return self.expected_cohort / 20 if self.vote_deviation is None else self.vote_deviation

    @property
    def votes_units(self) -> float:
        """The votes' deviation in units of the grid that their noise lies on."""
        return 2 * _UNITS * self.votes_deviation

    @property
    def update_noise_multiplier(self) -> float:
        """Return z_u = (z^-2 - (2 s)^-2)^(-1/2): the updates get a little more noise than z, to pay for the votes."""
        if self.noise_multiplier == 0:
            return 0.0
        return 1 / math.sqrt(self.noise_multiplier**-2 - (2 * self.votes_deviation) ** -2)

    def start(self) -> ClippingState:
        """Return the state of the first round."""
        return ClippingState(plan=self, clipping_norm=self.initial_clipping_norm)


@dataclass(frozen=True, kw_only=True)
class ClippingState:
    """The clipping norm of one round: what clips, votes and scales that round's noise."""

    plan: AdaptiveClippingPlan
    clipping_norm: float

    @property
    def noise_deviation(self) -> float:
        """Standard deviation of the noise on each coordinate of this round's sum, from the norm that clipped it."""
        return self.plan.update_noise_multiplier * self.clipping_norm

    def vote(self, norm: float) -> int:
        """Return 1 for an update of a norm within this round's clipping norm, else -1: twice b - 1/2, an integer.

        A norm of zero has no vote, 0.
        Errors: RunError `value-out-of-range` for a norm that is not finite: such an update is neither clipped nor
        summed, and its client has no vote.
        """
        if not math.isfinite(norm):
            raise RunError("value-out-of-range", "the norm of a client's update is not finite")
        return 0 if norm == 0 else 1 if norm <= self.clipping_norm else -1

    def following(self, votes: Iterable[int], stream: Stream) -> ClippingState:
        """Return the state of the next round from the votes (or their sums, in any grouping) of all that were summed.

        The noise is a discrete Gaussian on a grid of 2^-33, so no digit of it tells the exact count. No client is fine:
        then the share is 1/2 and noise. The noise is drawn whatever the votes, so it is one per round.
        """
        # In units of 2^-33: a vote of 1 is half a client, 2^32 units.
        total = sum(int(vote) for vote in votes) * _UNITS
        plan = self.plan
        if plan.noise_multiplier > 0:
            total += int(sample(stream, plan.votes_units, 1)[0])
        unclipped = 0.5 + total / (2 * _UNITS) / plan.expected_cohort
        # A draw far out in the tail must not overflow exp.
        exponent = min(max(-plan.learning_rate * (unclipped - plan.quantile), -50.0), 50.0)
        moved = self.clipping_norm * math.exp(exponent)
        return ClippingState(plan=plan, clipping_norm=min(max(moved, LEAST_NORM), LARGEST_NORM))


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} = {value}: must be finite and above 0")
