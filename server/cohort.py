"""The cohort of a round: which clients train, as a function of a key and the round alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..core.keys import Key


@dataclass(frozen=True, kw_only=True)
class CohortSampler:
    """Draws the round's clients: all, a fixed number without replacement, each on its own (Poisson), or in turn.

    Cyclic cohorts go through one random order of the population, so that a client is in one of every
    ceil(population / per_round) rounds.
    """

    sampling: Literal["all", "fixed", "poisson", "cyclic"]
    per_round: int | None
    key: Key

    def draw(self, round: int, population: Sequence[int]) -> list[int]:
        """Return the cohort in the population's order; a Poisson cohort may be empty."""
        if self.sampling == "all" or self.per_round is None:
            return list(population)
        if self.sampling == "cyclic":
            order = self.key.child("cohort").stream().permutation(len(population))
            period = -(-len(population) // self.per_round)
            first = (round - 1) % period * self.per_round
            return [population[int(index)] for index in np.sort(order[first : first + self.per_round])]
        stream = self.key.child("cohort", round).stream()
        if self.sampling == "fixed":
            chosen = np.sort(stream.sample(len(population), self.per_round))
        else:
            chosen = np.flatnonzero(stream.bernoulli(len(population), self.per_round / len(population)))
        return [population[int(index)] for index in chosen]
