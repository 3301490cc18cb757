"""The mechanism of record-level DP-SGD as one frozen object: sampler, clipping, noise and accounting cannot disagree.

g = (Σ clip(g_i, C) + N(0, z²C²)) / (q·n) over a Poisson sample of rate q = min(1, B / n) (Abadi et al. 2016).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from . import accounting
from .accounting import Relation

if TYPE_CHECKING:
    from dp_accounting import DpEvent


@dataclass(frozen=True, kw_only=True)
class RecordLevelPlan:
    """What one site does in a whole run; `noise_multiplier` 0 gives no privacy (epsilon is infinite).

    Formal guarantee: after r rounds the noised sums are (epsilon(r), delta)-DP towards whoever sees all of them, for
    neighbours that differ in one record replaced by one without any contribution (zero-out, `records` public), given
    that batches and noise are secret and drawn as `privacy.dpsgd` draws them from this plan.

    `accounted_records` (fewest, most) accounts the site with the sampling rate of the fewest and the steps of the most
    records: an upper bound that many sites of nearly equal size share. None accounts for exactly what is done.

    `per_layer` clips each of L layers to C / √L instead of the whole gradient to C: the same sensitivity. A batch of
    more than `microbatch_size` examples takes several passes for one step: how, not what, is computed.
    """

    records: int
    batch_size: int
    epochs: int
    rounds: int
    clipping_norm: float
    noise_multiplier: float
    delta: float
    accounted_records: tuple[int, int] | None = None
    per_layer: bool = False
    microbatch_size: int | None = None

    def __post_init__(self) -> None:
        _check_count("records", self.records)
        _check_count("batch_size", self.batch_size)
        _check_count("epochs", self.epochs)
        _check_count("rounds", self.rounds)
        _check_positive("clipping_norm", self.clipping_norm)
        _check_not_negative("noise_multiplier", self.noise_multiplier)
        _check_probability("delta", self.delta)
        _check_covers(self.records, self.accounted_records)
        if self.microbatch_size is not None:
            _check_count("microbatch_size", self.microbatch_size)

    @classmethod
    def calibrate(
        cls,
        *,
        epsilon: float,
        records: int,
        batch_size: int,
        epochs: int,
        rounds: int,
        clipping_norm: float,
        delta: float,
        accounted_records: tuple[int, int] | None = None,
        per_layer: bool = False,
        microbatch_size: int | None = None,
    ) -> Self:
        """Return the plan with the least noise that keeps the zero-out epsilon of all rounds within `epsilon`."""
        silent = cls(
            records=records,
            batch_size=batch_size,
            epochs=epochs,
            rounds=rounds,
            clipping_norm=clipping_norm,
            noise_multiplier=0.0,
            delta=delta,
            accounted_records=accounted_records,
            per_layer=per_layer,
            microbatch_size=microbatch_size,
        )
        noise_multiplier = accounting.noise_multiplier(
            sampling_rate=silent.accounted_rate, steps=silent.accounted_steps(), epsilon=epsilon, delta=delta
        )
        return replace(silent, noise_multiplier=noise_multiplier)

    @property
    def sampling_rate(self) -> float:
        """Probability q with which each record is in a step's batch, independently of all others."""
        return min(1.0, self.batch_size / self.records)

    @property
    def steps_per_round(self) -> int:
        """Return epochs · ceil(1 / q), in whole numbers: ceil of a float quotient may be one too many."""
        return self.epochs * max(1, -(-self.records // self.batch_size))

    @property
    def expected_batch(self) -> float:
        """The fixed denominator q · records of every step, whatever the batch held."""
        return self.sampling_rate * self.records

    @property
    def noise_deviation(self) -> float:
        """Standard deviation of the noise on each coordinate of a step's clipped sum."""
        return self.noise_multiplier * self.clipping_norm

    def steps(self, rounds: int | None = None) -> int:
        """Return the number of steps of so many rounds (of the whole run by default)."""
        return self.steps_per_round * (self.rounds if rounds is None else rounds)

    @property
    def accounted_rate(self) -> float:
        """The sampling rate that the accountant takes: `sampling_rate`, or that of the fewest accounted records."""
        fewest = self.accounted_records[0] if self.accounted_records else self.records
        return min(1.0, self.batch_size / fewest)

    def accounted_steps(self, rounds: int | None = None) -> int:
        """Return the steps that the accountant takes: `steps`, or those of the most accounted records."""
        most = self.accounted_records[1] if self.accounted_records else self.records
        return self.epochs * max(1, -(-most // self.batch_size)) * (self.rounds if rounds is None else rounds)

    def event(self, rounds: int | None = None) -> DpEvent:
        """Return what dp-accounting needs to know of so many rounds (of the whole run by default)."""
        from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent

        step = PoissonSampledDpEvent(self.accounted_rate, GaussianDpEvent(self.noise_multiplier))
        return SelfComposedDpEvent(step, self.accounted_steps(rounds))

    def epsilon(
        self,
        rounds: int | None = None,
        *,
        relation: Relation = "zero-out",
        interval: float = accounting.SHOWN,
    ) -> float:
        """Return epsilon after so many rounds (the whole run by default); 0 after none, infinite without noise."""
        return accounting.epsilon(
            sampling_rate=self.accounted_rate,
            noise_multiplier=self.noise_multiplier,
            steps=self.accounted_steps(rounds),
            delta=self.delta,
            relation=relation,
            interval=interval,
        )


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} = {value}: must be a whole number, at least 1")


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} = {value}: must be finite and above 0")


def _check_not_negative(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} = {value}: must be finite and at least 0")


def _check_covers(records: int, covered: tuple[int, int] | None) -> None:
    if covered is not None and not 1 <= covered[0] <= records <= covered[1]:
        raise ValueError(f"accounted_records = {covered}: must enclose records = {records}")


def _check_probability(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name} = {value}: must lie between 0 and 1")
