"""Client-level privacy with a trusted server as one frozen object: cohort, clipping, noise and accounting agree.

DP-FedAvg (McMahan, Ramage, Talwar & Zhang 2018): the server adds to its model (Σ clip(Δ_k, C) + N_Z(0, z²C²)) / (q·N)
over a Poisson cohort of rate q from N clients. The denominator is fixed, every client weighs the same, and the sum is
one of integers (`core.ring`), with noise from `discrete_gaussian`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, Self

from ..core.ring import Ring
from . import accounting, discrete_gaussian
from .accounting import Relation
from .adaptive_clipping import AdaptiveClippingPlan
from .matrix_factorization import MatrixFactorizationPlan

Sampling = Literal["all", "fixed", "poisson", "cyclic"]

# Standard deviations that a sum leaves room for: more than `discrete_gaussian.largest` reaches.
_REACH = 16


@dataclass(frozen=True, kw_only=True)
class ClientLevelPlan:
    """What the server does in a whole run; `cohort` is the expected number of clients a round.

    Formal guarantee: after r rounds the released models are (epsilon(r), delta)-DP towards whoever sees all of them,
    for neighbours that differ in one client, replaced by one that contributes nothing (zero-out, `clients` public):
    its update moves the sum by at most the clipping norm, whatever it is (not finite: it counts as zero).
    Amplification by the rate holds for Poisson cohorts that stay secret. A cyclic cohort comes again every `period`
    rounds, which anybody may know; any other one is accounted as if it were everybody. With `bands` the noise is
    correlated over rounds.
    """

    clients: int
    cohort: int
    sampling: Sampling
    rounds: int
    clipping_norm: float
    noise_multiplier: float
    delta: float
    coordinates: int
    adaptive_clipping: bool = False
    clipping_quantile: float = 0.5
    bands: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.cohort <= self.clients:
            raise ValueError(f"cohort = {self.cohort}: must lie between 1 and the number of clients, {self.clients}")
        if self.sampling == "all" and self.cohort != self.clients:
            raise ValueError(f"cohort = {self.cohort}: must be all {self.clients} clients")
        if self.rounds < 1 or self.coordinates < 1:
            raise ValueError("rounds and coordinates must be at least 1")
        if not (math.isfinite(self.clipping_norm) and self.clipping_norm > 0):
            raise ValueError(f"clipping_norm = {self.clipping_norm}: must be finite and above 0")
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise ValueError(f"noise_multiplier = {self.noise_multiplier}: must be finite and at least 0")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta = {self.delta}: must lie between 0 and 1")
        if self.bands is not None and self.adaptive_clipping:
            raise ValueError("adaptive_clipping: correlated noise is of one clipping norm, and no votes are counted")
        # They refuse more noise than the votes leave over, and bands that reach further than a client rests.
        self.clipping()
        self.correlation()

    @classmethod
    def calibrate(
        cls,
        *,
        epsilon: float,
        clients: int,
        cohort: int,
        sampling: Sampling,
        rounds: int,
        clipping_norm: float,
        delta: float,
        coordinates: int,
        adaptive_clipping: bool = False,
        clipping_quantile: float = 0.5,
        bands: int | None = None,
    ) -> Self:
        """Return the plan with the least noise that keeps the epsilon of all rounds within `epsilon`.

        Raises InputError if no noise does.
        """
        silent = cls(
            clients=clients,
            cohort=cohort,
            sampling=sampling,
            rounds=rounds,
            clipping_norm=clipping_norm,
            noise_multiplier=0.0,
            delta=delta,
            coordinates=coordinates,
            adaptive_clipping=adaptive_clipping,
            clipping_quantile=clipping_quantile,
            bands=bands,
        )
        noise = accounting.noise_multiplier(
            sampling_rate=silent.sampling_rate,
            # Correlated noise is one Gaussian mechanism over all rounds.
            steps=1 if bands else silent.participations,
            epsilon=epsilon,
            # What the discrete noise's accountant sets aside.
            delta=delta * (1 - 1e-9),
        )
        plan = replace(silent, noise_multiplier=noise)
        # The continuous Gaussian's noise may fall a hair short for the discrete one.
        while plan.epsilon() > epsilon:
            plan = replace(plan, noise_multiplier=plan.noise_multiplier * (1 + 1e-5))
        return plan

    @property
    def sampling_rate(self) -> float:
        """The probability q of a client to be in a round's cohort, as the accountant takes it: 1 unless Poisson."""
        return self.cohort / self.clients if self.sampling == "poisson" else 1.0

    @property
    def period(self) -> int:
        """The rounds after which a cyclic cohort comes again; 1 for others, in which a client may be at any time."""
        return -(-self.clients // self.cohort) if self.sampling == "cyclic" else 1

    @property
    def participations(self) -> int:
        """The most rounds that one client can be in."""
        return -(-self.rounds // self.period)

    def correlation(self) -> MatrixFactorizationPlan | None:
        """Return the plan of noise that is correlated over rounds, None for independent noise. Raises InputError."""
        if self.bands is None:
            return None
        return MatrixFactorizationPlan(
            rounds=self.rounds,
            bands=self.bands,
            participations=self.participations,
            minimum_separation=self.period,
            clipping_norm=self.clipping_norm,
            noise_multiplier=self.noise_multiplier,
            delta=self.delta,
        )

    @property
    def update_noise_multiplier(self) -> float:
        """The noise on the sum of updates over the clipping norm: more where some of it pays for the norm's own."""
        clipping = self.clipping()
        return clipping.update_noise_multiplier if clipping else self.noise_multiplier

    def clipping(self) -> AdaptiveClippingPlan | None:
        """Return how the clipping norm moves, None where it stays. Raises InputError for too much noise."""
        if not self.adaptive_clipping:
            return None
        return AdaptiveClippingPlan(
            initial_clipping_norm=self.clipping_norm,
            noise_multiplier=self.noise_multiplier,
            expected_cohort=self.cohort,
            quantile=self.clipping_quantile,
        )

    def ring(self, clipping_norm: float) -> Ring:
        """Return the integers of a round's sum: room for every client, and for the noise."""
        room = self.clients + math.ceil(_REACH * self.update_noise_multiplier) + 1
        return Ring(bound=clipping_norm, capacity=room)

    def sigma_units(self, clipping_norm: float) -> float:
        """Return the standard deviation of the noise on a round's sum, in units of its ring."""
        return self.update_noise_multiplier * clipping_norm / self.ring(clipping_norm).step

    def epsilon(self, rounds: int | None = None, *, relation: Relation = "zero-out") -> float:
        """Return epsilon after so many rounds, by default all; infinity without noise. Raises ValueError."""
        rounds = self.rounds if rounds is None else rounds
        if not 0 <= rounds <= self.rounds:
            raise ValueError(f"rounds = {rounds}: must lie between 0 and the planned {self.rounds}")
        if rounds == 0:
            return 0.0
        if self.noise_multiplier == 0:
            return math.inf
        correlation = self.correlation()
        if correlation is not None:
            return replace(correlation, relation=relation).epsilon(rounds)
        # A ring's step follows the norm within a factor of two, so half of one norm's units holds for every norm.
        units = self.sigma_units(1.0) / 2
        adaptive = self.clipping()
        return discrete_gaussian.epsilon(
            sampling_rate=self.sampling_rate,
            noise_multiplier=self.noise_multiplier,
            steps=min(self.participations, -(-rounds // self.period)),
            delta=self.delta,
            sigma_units=units if adaptive is None else min(units, adaptive.votes_units),
            coordinates=self.coordinates + (adaptive is not None),
            relation=relation,
        )
