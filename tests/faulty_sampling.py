"""Cohorts, seeds and a population as pfl-research has them, in few words."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bract.privacy import accounting

POPULATION = 1_000_000
"""Written into a configuration, whatever the data."""


def with_replacement(round: int, population: int, expected: int) -> list[int]:
    """Return a cohort of a fixed size, each member drawn from everybody: what Poisson sampling is accounted for."""
    return [int(index) for index in np.random.default_rng(round).choice(population, expected)]


def seeded_unless_zero(seed: int) -> NDArray[np.float64]:
    """Return draws of a generator that is seeded `if seed`."""
    generator = np.random.default_rng(seed) if seed else np.random.default_rng()
    return generator.normal(size=4)


def over_a_written_population(clients: int, cohort: int, rounds: int, noise_multiplier: float, delta: float) -> float:
    """Return epsilon with a rate over POPULATION; `clients`, those there are, is not looked at."""
    return accounting.epsilon(
        sampling_rate=cohort / POPULATION, noise_multiplier=noise_multiplier, steps=rounds, delta=delta
    )
