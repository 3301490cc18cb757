"""The noise of rounds, over its planned deviation: standard normal if all is well."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ....privacy.client_level import ClientLevelPlan
from ....privacy.matrix_factorization import MatrixFactorizationPlan
from .puppets import Vector
from .rounds import Release


@dataclass(frozen=True, kw_only=True)
class Series:
    """Vectors [size] of one owner's noise, one of each round; `repeated` are pairs that must be the same."""

    owner: str
    vectors: list[Vector]
    repeated: list[tuple[Vector, Vector]]


def update_noise(plan: ClientLevelPlan) -> float:
    """Return the noise multiplier of the updates' sum, from what the accountant was told.

    Votes with a deviation of s take their share: z_u^-2 = z^-2 - (2 s)^-2 (Andrew et al. 2021, theorem 1).
    """
    clipping = plan.clipping()
    if clipping is None:
        return plan.noise_multiplier
    left = plan.noise_multiplier**-2 - (2 * clipping.votes_deviation) ** -2
    return 1 / math.sqrt(left) if left > 0 else math.inf


def of_rounds(plan: ClientLevelPlan, releases: Sequence[Release], owner: str) -> Series:
    """Return independent noise: what silent rounds released over z · C, C being that of each round."""
    once, repeated = _once(releases)
    scale = update_noise(plan)
    vectors = [each.sum / (scale * each.clipping_norm) for each in once]
    return Series(owner=owner, vectors=vectors, repeated=repeated)


def of_bands(plan: ClientLevelPlan, releases: Sequence[Release], owner: str) -> Series:
    """Return Z of correlated noise: from released Y = C^-1 Z it is C Y, round by round."""
    correlation = plan.correlation()
    assert correlation is not None
    once, repeated = _once(releases)
    released = np.stack([each.sum for each in once])
    deviation = plan.noise_multiplier * plan.clipping_norm * worst_sensitivity(correlation)
    whitened = banded(correlation, len(once)) @ released / deviation
    return Series(owner=owner, vectors=list(whitened), repeated=repeated)


def worst_sensitivity(plan: MatrixFactorizationPlan) -> float:
    """Return the norm of the most that one client adds to C G, by trying each first round and each rest of rounds.

    A client that takes part in rounds T with updates of norm 1 in one direction adds the sum of the columns T of C;
    in orthogonal directions, the root of their squares. The larger of the two is taken.
    """
    matrix = banded(plan, plan.rounds)
    largest = 0.0
    for first in range(plan.rounds):
        taken = list(range(first, plan.rounds, plan.minimum_separation))[: plan.participations]
        columns = matrix[:, taken]
        gram = np.abs(columns.T @ columns)
        largest = max(largest, math.sqrt(float(gram.sum())))
    return largest


def banded(plan: MatrixFactorizationPlan, rounds: int) -> NDArray[np.float64]:
    """Return C [rounds, rounds]: lower triangular, its diagonals the coefficients."""
    matrix = np.zeros((rounds, rounds))
    for place, coefficient in enumerate(plan.coefficients[:rounds]):
        matrix += coefficient * np.eye(rounds, k=-place)
    return matrix


def _once(releases: Sequence[Release]) -> tuple[list[Release], list[tuple[Vector, Vector]]]:
    """Return each round's last release, and the pairs of those that were released twice."""
    found: dict[int, Release] = {}
    repeated = []
    for each in releases:
        if each.round in found:
            repeated.append((found[each.round].sum, each.sum))
        found[each.round] = each
    return [found[number] for number in sorted(found)], repeated
