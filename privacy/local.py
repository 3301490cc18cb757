"""Local privacy as one frozen object: each client bounds and noises its own update, and trusts nobody.

An update leaves a client as clip(Δ, C) + N_Z(0, z²C²), an integer vector (`core.ring`) with exact discrete Gaussian
noise: the Gaussian mechanism on the whole of a client's records (Balle and Wang 2018 for its epsilon), composed over
the rounds that the client is in. Nothing amplifies it: whoever sees an update knows whose it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ..core.keys import Stream
from ..core.ring import Ring
from . import accounting, discrete_gaussian
from .accounting import Relation

_MARGIN = 1e-9
# Standard deviations that the integers leave room for: more than `discrete_gaussian.largest` reaches.
_REACH = 16


@dataclass(frozen=True, kw_only=True)
class LocalPlan:
    """What each client does to its updates in a whole run; `participations` is the most rounds that one is in.

    Formal guarantee: all updates that a client sends in so many rounds are (epsilon, delta)-DP towards whoever sees
    them, for neighbours in which the client's change is replaced by none (zero-out) or by any other (replace-one).
    """

    participations: int
    clipping_norm: float
    noise_multiplier: float
    delta: float
    coordinates: int

    def __post_init__(self) -> None:
        if self.participations < 1 or self.coordinates < 1:
            raise ValueError("participations and coordinates must be at least 1")
        if not (math.isfinite(self.clipping_norm) and self.clipping_norm > 0):
            raise ValueError(f"clipping_norm = {self.clipping_norm}: must be finite and above 0")
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise ValueError(f"noise_multiplier = {self.noise_multiplier}: must be finite and at least 0")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta = {self.delta}: must lie between 0 and 1")

    @classmethod
    def calibrate(
        cls, *, epsilon: float, participations: int, clipping_norm: float, delta: float, coordinates: int
    ) -> Self:
        """Return the plan with the least noise that keeps the epsilon of all a client's updates within `epsilon`."""
        noise = accounting.noise_multiplier(
            # What the discrete noise's accountant sets aside.
            sampling_rate=1.0,
            steps=participations,
            epsilon=epsilon,
            delta=delta * (1 - 1e-9),
        )
        plan = cls(
            participations=participations,
            clipping_norm=clipping_norm,
            noise_multiplier=noise,
            delta=delta,
            coordinates=coordinates,
        )
        while plan.epsilon() > epsilon:
            plan = replace(plan, noise_multiplier=plan.noise_multiplier * (1 + 1e-5))
        return plan

    @property
    def ring(self) -> Ring:
        """The integers of one noised update."""
        return Ring(bound=self.clipping_norm, capacity=2 + math.ceil(_REACH * self.noise_multiplier))

    @property
    def sigma_units(self) -> float:
        """The standard deviation of the noise, in units of the ring."""
        return self.noise_multiplier * self.clipping_norm / self.ring.step

    def epsilon(self, participations: int | None = None, *, relation: Relation = "zero-out") -> float:
        """Return epsilon after so many updates, by default all; infinity without noise."""
        count = self.participations if participations is None else participations
        if count == 0:
            return 0.0
        if self.noise_multiplier == 0:
            return math.inf
        return discrete_gaussian.epsilon(
            sampling_rate=1.0,
            noise_multiplier=self.noise_multiplier,
            steps=count,
            delta=self.delta,
            sigma_units=self.sigma_units,
            coordinates=self.coordinates,
            relation=relation,
        )

    def release(self, update: NDArray[np.float64], stream: Stream) -> NDArray[np.float64]:
        """Return the noised update [size], which may be sent; one that is not finite counts as zero."""
        with np.errstate(over="ignore"):
            norm = float(np.linalg.norm(update))
        if not math.isfinite(norm):
            update = np.zeros_like(update)
        elif norm > self.clipping_norm:
            update = update * (self.clipping_norm / norm)
        # Rounded down, so that no rounding makes it longer than the bound.
        total = self.ring.encode(update * (1 - _MARGIN))
        if self.noise_multiplier:
            total = total + discrete_gaussian.sample(stream, self.sigma_units, len(total))
        return self.ring.decode(total)
