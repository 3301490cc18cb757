"""Who is drawn, from how many, and by which seed, asked of bract and of defects of others."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import bract
from bract.core.keys import Key
from bract.privacy import accounting
from bract.privacy.dpsgd.passes import poisson_batches
from bract.privacy.mechanism import RecordLevelPlan
from bract.server.cohort import CohortSampler

from .faulty_sampling import over_a_written_population, seeded_unless_zero, with_replacement

MEMBERS, EXPECTED, ROUNDS = 40, 10, 2000
KEY = Key.from_seed(3)

Draw = Callable[[int], list[int]]


def cohort(round: int) -> list[int]:
    """A cohort of clients."""
    sampler = CohortSampler(sampling="poisson", per_round=EXPECTED, key=KEY)
    return sampler.draw(round, range(MEMBERS))


def batch(round: int) -> list[int]:
    """A batch of a site's records."""
    plan = RecordLevelPlan(
        records=MEMBERS,
        batch_size=EXPECTED,
        epochs=1,
        rounds=ROUNDS,
        clipping_norm=1.0,
        noise_multiplier=1.0,
        delta=1e-5,
    )
    return [int(index) for index in next(poisson_batches(plan, KEY.child(round).stream()))]


def each_is_drawn_on_its_own(draw: Draw) -> None:
    """Members are drawn at most once, at the rate q that is accounted, and independently: sizes vary by n q (1 - q).

    Over 2,000 rounds rates and the variance lie within six standard errors, but for a chance of 1e-7.
    """
    drawn = [draw(round) for round in range(ROUNDS)]
    assert all(len(set(each)) == len(each) for each in drawn), "a member is drawn twice, and counts twice"
    rate = EXPECTED / MEMBERS
    times = np.bincount(np.concatenate([np.array(each, int) for each in drawn]), minlength=MEMBERS)
    assert np.abs(times / ROUNDS - rate).max() < 6 * math.sqrt(rate * (1 - rate) / ROUNDS)
    variance = np.var([len(each) for each in drawn]) / (MEMBERS * rate * (1 - rate))
    assert abs(variance - 1) < 6 * math.sqrt(2 / ROUNDS), "the sizes tell that draws hang together"


@pytest.mark.parametrize("draw", [cohort, batch])
def test_each_is_drawn_on_its_own(draw: Draw) -> None:
    each_is_drawn_on_its_own(draw)


def test_draws_with_replacement_take_a_user_twice() -> None:
    """pfl-research: accounted as Poisson sampling, drawn with replacement."""
    with pytest.raises(AssertionError, match="drawn twice"):
        each_is_drawn_on_its_own(lambda round: with_replacement(round, MEMBERS, EXPECTED))


def test_cohorts_of_a_fixed_size_are_seen_too() -> None:
    """The property sees what has no doubles and is no Poisson sample either; bract's own `fixed` is not amplified."""
    sampler = CohortSampler(sampling="fixed", per_round=EXPECTED, key=KEY)
    with pytest.raises(AssertionError, match="hang together"):
        each_is_drawn_on_its_own(lambda round: sampler.draw(round, range(MEMBERS)))


def every_seed_is_a_seed(run: Callable[[int], object]) -> None:
    """The same seed gives the same run, 0 included, and each seed another."""
    found = {seed: run(seed) for seed in (0, 1)}
    for seed, first in found.items():
        assert np.array_equal(first, run(seed)), f"seed {seed} gave two runs"
    assert not np.array_equal(found[0], found[1])


def test_every_seed_is_a_seed(tiny: Callable[..., bract.Experiment], tmp_path: Path) -> None:
    every_seed_is_a_seed(lambda seed: Key.from_seed(seed).stream().words(4))
    runs = iter(range(10))

    def simulated(seed: int) -> str:
        keys = {"experiment.seed": seed, "experiment.rounds": 1, "privacy.unit": "client"}
        experiment = tiny(**keys, **{"privacy.noise_multiplier": 1.0})
        return str(bract.simulate(experiment, out=tmp_path / str(next(runs))).model_sha256)

    every_seed_is_a_seed(simulated)


def test_a_seed_of_zero_is_none_elsewhere() -> None:
    """pfl-research: `if seed`."""
    with pytest.raises(AssertionError, match="seed 0 gave two runs"):
        every_seed_is_a_seed(seeded_unless_zero)


Claim = Callable[[int, int, int, float, float], float]


def the_rate_is_that_of_the_clients_there_are(claim: Claim) -> None:
    """Epsilon of a run is at least that of cohort / clients: a thousand users do not hide among a million."""
    clients, drawn, rounds, noise_multiplier, delta = 1000, 20, 2, 0.5, 1e-5
    true = accounting.epsilon(
        sampling_rate=drawn / clients, noise_multiplier=noise_multiplier, steps=rounds, delta=delta
    )
    claimed = claim(clients, drawn, rounds, noise_multiplier, delta)
    assert claimed >= true * 0.999, f"epsilon {claimed:.2f} is claimed for {true:.2f}"


def test_the_rate_is_that_of_the_clients_there_are(tiny: Callable[..., bract.Experiment], tmp_path: Path) -> None:
    def claim(clients: int, drawn: int, rounds: int, noise_multiplier: float, delta: float) -> float:
        keys = {
            "task.clients": clients,
            "task.records": 10,
            "experiment.rounds": rounds,
            "clients.sampling": "poisson",
            "clients.per_round": drawn,
            "privacy.unit": "client",
            "privacy.noise_multiplier": noise_multiplier,
            "privacy.delta": delta,
        }
        return float(bract.simulate(tiny(**keys), out=tmp_path / "run").guarantee.epsilon)

    the_rate_is_that_of_the_clients_there_are(claim)


def test_a_population_that_is_written_in_hides_nobody() -> None:
    """pfl-research: a population of a million in the configuration of data sets with a thousand users."""
    with pytest.raises(AssertionError, match="is claimed for"):
        the_rate_is_that_of_the_clients_there_are(over_a_written_population)


@pytest.mark.parametrize(
    ("rate", "noise_multiplier", "delta"), [(1e-3, 1.0, 1e-5), (2e-5, 0.5, 1e-5), (1e-6, 1.0, 1e-3)]
)
def test_the_epsilon_of_a_hardly_ever_drawn_client_is_found(rate: float, noise_multiplier: float, delta: float) -> None:
    """It is at most that of a client who is always drawn, amplified by the rate, but for what is rounded up."""
    known = {"noise_multiplier": noise_multiplier, "steps": 1}
    found = accounting.epsilon(sampling_rate=rate, delta=delta, **known)
    # Amplification by sampling: epsilon' = log(1 + q (e^epsilon - 1)) at delta' = q delta (Balle et al. 2018, thm. 9).
    always = accounting.epsilon(sampling_rate=1.0, delta=min(delta / rate, 0.5), **known)
    assert 0.0 <= found <= math.log1p(rate * math.expm1(always)) + 1e-3
