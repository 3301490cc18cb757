"""DP-FTRL by banded matrix factorization: correlated noise on every round's sum, privacy without a sampling assumption.

The server releases G_t + (C^-1 Z)_t, where G_t is the sum of clipped updates of round t, Z_t independent Gaussian noise
and C a lower triangular Toeplitz matrix with `bands` non-zero diagonals. What a round adds too much later rounds take
back, so the prefix sums, which are what training follows, carry far less noise than independent draws would leave.
(Kairouz et al. 2021; Denisov et al. 2022; Choquette-Choo et al. 2023, "(Amplified) Banded Matrix Factorization";
McKenna 2024 for Toeplitz matrices.) Since C G + Z determines the release, the guarantee is that of the Gaussian
mechanism on C G, also where a round's sum depends on what was released before (Denisov et al. 2022).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ..core.errors import InputError
from . import accounting
from .accounting import Relation


@dataclass(frozen=True, kw_only=True)
class MatrixFactorizationPlan:
    """What the noise of a whole run is; `noise_multiplier` is in units of the sensitivity of C G.

    Formal guarantee: all releases of the first r rounds together are (epsilon(r), delta)-DP for neighbours that differ
    in one client (`relation`), if a client takes part in at most `participations` rounds, any two of them
    `minimum_separation` or more apart (round 0 and round 3 are 3 apart), each with an update of norm at most
    `clipping_norm`, and the noise is secret. Who takes part may be anyone's choice. The noise is of float64: what
    floating-point noise leaks (Mironov 2012) is not covered.

    Errors: ValueError for values out of range, InputError for bands that reach further than the separation.
    """

    rounds: int
    bands: int
    participations: int
    minimum_separation: int
    clipping_norm: float
    noise_multiplier: float
    delta: float
    relation: Relation = "zero-out"

    def __post_init__(self) -> None:
        for name in ("rounds", "bands", "participations", "minimum_separation"):
            _check_count(name, getattr(self, name))
        for name in ("clipping_norm", "noise_multiplier"):
            _check_size(name, getattr(self, name), least_is_zero=name == "noise_multiplier")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta = {self.delta}: must lie between 0 and 1")
        if self.bands > self.rounds:
            raise ValueError(f"bands = {self.bands}: must be at most rounds = {self.rounds}")
        if self.participations > 1 and self.bands > self.minimum_separation:
            # Columns would overlap, and the sensitivity would be no sum of squares.
            raise InputError(
                "experiment-conflict",
                f"bands = {self.bands}: must be at most the separation of a client's rounds "
                f"({self.minimum_separation}); give fewer bands or a larger minimum_separation",
            )

    @classmethod
    def calibrate(
        cls,
        *,
        epsilon: float,
        rounds: int,
        bands: int,
        participations: int,
        minimum_separation: int,
        clipping_norm: float,
        delta: float,
        relation: Relation = "zero-out",
    ) -> Self:
        """Return the plan with the least noise that keeps the epsilon of all rounds within `epsilon`."""
        silent = cls(
            rounds=rounds,
            bands=bands,
            participations=participations,
            minimum_separation=minimum_separation,
            clipping_norm=clipping_norm,
            noise_multiplier=0.0,
            delta=delta,
            relation=relation,
        )
        noise = accounting.noise_multiplier(sampling_rate=1.0, steps=1, epsilon=epsilon, delta=delta)
        return replace(silent, noise_multiplier=noise * (2 if relation == "replace-one" else 1))

    @property
    def coefficients(self) -> tuple[float, ...]:
        """The diagonals c_0 = 1, c_1, … of C [bands]: C[i, j] = c_(i-j)."""
        return _coefficients(self.rounds, self.bands, _columns(self))

    def sensitivity(self, rounds: int | None = None) -> float:
        """Return the largest norm of what one client adds to C G in so many rounds, for updates of norm at most 1.

        Exact. Proof: a client with updates x_t in rounds t of a set T adds the rows sum over t of C[:, t] x_t. Column t
        is zero outside rows t to t + bands - 1; rounds of T are `bands` or more apart, so no two columns share a row,
        and the squared norm is the sum over T of |C[:, t]|² |x_t|², largest for |x_t| = 1. Column t holds the first
        min(bands, rounds - t) coefficients, so its norm never grows with t; the i-th round of any T is at least
        i · minimum_separation, so no T beats 0, s, 2 s, … (after Choquette-Choo et al. 2023).
        """
        return math.sqrt(sum(_column_square(self.coefficients, column) for column in _columns(self, rounds)))

    @property
    def noise_deviation(self) -> float:
        """Standard deviation of each coordinate of Z_t."""
        return self.noise_multiplier * self.clipping_norm * self.sensitivity()

    def epsilon(self, rounds: int | None = None) -> float:
        """Return epsilon after so many rounds (the whole run by default); 0 after none, infinite without noise."""
        if rounds == 0:
            return 0.0
        share = self.sensitivity(rounds) / self.sensitivity()
        return accounting.epsilon(
            sampling_rate=1.0,
            noise_multiplier=self.noise_multiplier / share,
            steps=1,
            delta=self.delta,
            relation=self.relation,
        )

    @property
    def prefix_error(self) -> float:
        """Root of the mean, over all prefixes of the rounds, of the variance of a prefix sum's noise per coordinate."""
        noise, _ = _errors(np.array(self.coefficients), self.rounds)
        remaining = np.arange(self.rounds, 0, -1)
        return self.noise_deviation * math.sqrt(float(remaining @ noise**2) / self.rounds)


@dataclass(kw_only=True)
class CorrelatedNoise:
    """The running noise of one plan on vectors [size]: C^-1 Z row by row, float64.

    It keeps the last bands - 1 released noises, (bands - 1) · size numbers. Whoever sees them can take the noise off
    what was released: `state` belongs among the private files of a run.
    """

    plan: MatrixFactorizationPlan
    size: int
    next_round: int = 0
    recent: list[NDArray[np.float64]] = field(default_factory=list)

    def noise(self, round: int, draw: Callable[[int], NDArray[np.float64]]) -> NDArray[np.float64]:
        """Return the noise [size] of a round; `draw(round)` gives fresh standard normals [size] of a secret stream.

        From C Y = Z: Y_t = (Z_t - c_1 Y_(t-1) - … - c_(bands-1) Y_(t-bands+1)) / c_0. Errors: ValueError for a round
        out of turn, since skipping or repeating one would break the correlation that the guarantee rests on.
        """
        if round != self.next_round or round >= self.plan.rounds:
            raise ValueError(f"round = {round}: the next one is {self.next_round}, of {self.plan.rounds}")
        independent = np.asarray(draw(round), np.float64)
        if independent.shape != (self.size,):
            raise ValueError(f"draw({round}) has shape {independent.shape}: must be ({self.size},)")
        released = independent * self.plan.noise_deviation
        for coefficient, earlier in zip(self.plan.coefficients[1:], self.recent, strict=False):
            released -= coefficient * earlier
        # c_0 is 1.
        self.recent = [released.copy(), *self.recent][: self.plan.bands - 1]
        self.next_round += 1
        return released

    def state(self) -> dict[str, NDArray[Any]]:
        """Return what `restore` needs: secret arrays."""
        return {
            "next_round": np.array(self.next_round),
            "coefficients": np.array(self.plan.coefficients),
            "noise_deviation": np.array(self.plan.noise_deviation),
            "recent": np.array(self.recent).reshape(len(self.recent), self.size),
        }

    @classmethod
    def restore(cls, plan: MatrixFactorizationPlan, state: dict[str, NDArray[Any]]) -> Self:
        """Return the noise as it was; InputError `run-changed` if it was another plan's.

        Another version of the optimiser may find other coefficients for the same plan, and then C^-1 Z is no longer
        what was accounted.
        """
        same = np.array_equal(state["coefficients"], plan.coefficients)
        if not same or float(state["noise_deviation"]) != plan.noise_deviation:
            raise InputError(
                "run-changed",
                "the saved noise of the run was made with another matrix or another noise than this plan has; "
                "resume it with the plan and the software that started it",
            )
        recent = [row.copy() for row in state["recent"]]
        return cls(plan=plan, size=state["recent"].shape[1], next_round=int(state["next_round"]), recent=recent)


def _columns(plan: MatrixFactorizationPlan, rounds: int | None = None) -> tuple[int, ...]:
    """Return the lengths of the columns of C that the worst client uses within the first rounds."""
    count = plan.rounds if rounds is None else min(rounds, plan.rounds)
    starts = range(0, count, plan.minimum_separation)[: plan.participations]
    return tuple(min(plan.bands, count - start) for start in starts)


def _column_square(coefficients: tuple[float, ...], length: int) -> float:
    return math.fsum(coefficient**2 for coefficient in coefficients[:length])


@lru_cache(maxsize=64)
def _coefficients(rounds: int, bands: int, columns: tuple[int, ...]) -> tuple[float, ...]:
    """Return the coefficients with the least sensitivity² · (squared error of all prefix sums), rounded to 1e-6.

    The error is |A C^-1|² (Frobenius) for A the lower triangle of ones (McKenna 2024), minimised by L-BFGS
    from those of A's square root, binom(2j, j) / 4^j (Fichtenberger, Henzinger and Upadhyay 2023), cut off.
    """
    from scipy.optimize import minimize

    if bands == 1:
        return (1.0,)
    start = np.cumprod([1.0, *(1 - 1 / (2 * np.arange(1, bands)))])
    # How many of the columns hold coefficient j: the squared sensitivity is the weighted sum of squares.
    held = np.array([sum(length > j for length in columns) for j in range(bands)], float)
    remaining = np.arange(rounds, 0, -1.0)

    def objective(free: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        coefficients = np.concatenate([[1.0], free])
        noise, slopes = _errors(coefficients, rounds)
        error, sensitivity = float(remaining @ noise**2), float(held @ coefficients**2)
        # The derivative of noise_i by c_j is -slopes_(i-j).
        weighted = remaining * noise
        by_error = np.array([-2 * float(weighted[j:] @ slopes[: rounds - j]) for j in range(1, bands)])
        return math.log(error * sensitivity), by_error / error + 2 * held[1:] * free / sensitivity

    found = minimize(objective, start[1:], jac=True, method="L-BFGS-B", options={"maxiter": 2000, "ftol": 1e-14})
    return (1.0, *(round(float(value), 6) for value in found.x))


def _errors(coefficients: NDArray[np.float64], rounds: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the first columns [rounds] of A C^-1 and of A C^-2, Toeplitz matrices."""
    from scipy.signal import lfilter

    noise = lfilter([1.0], coefficients, np.ones(rounds))
    return noise, lfilter([1.0], coefficients, noise)


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} = {value}: must be a whole number, at least 1")


def _check_size(name: str, value: float, *, least_is_zero: bool) -> None:
    if not (math.isfinite(value) and (value > 0 or (least_is_zero and value == 0))):
        raise ValueError(f"{name} = {value}: must be finite and {'at least' if least_is_zero else 'above'} 0")
