"""server/cohort.py: who trains is a function of key and round, with the distribution that its name promises."""

from __future__ import annotations

import numpy as np

from bract.core.keys import Key
from bract.server.cohort import CohortSampler

KEY = Key.from_seed(3)
PEOPLE = list(range(100, 150))


def test_all_is_everybody():
    assert CohortSampler(sampling="all", per_round=None, key=KEY).draw(1, PEOPLE) == PEOPLE


def test_fixed_draws_so_many_without_repetition_and_evenly():
    sampler = CohortSampler(sampling="fixed", per_round=10, key=KEY)
    cohorts = [sampler.draw(round, PEOPLE) for round in range(2000)]
    assert all(len(set(cohort)) == 10 == len(cohort) for cohort in cohorts)
    counts = np.bincount(np.concatenate(cohorts) - 100, minlength=50)
    # 400 expected for each; five standard deviations of a hypergeometric count.
    assert np.abs(counts - 400).max() < 5 * np.sqrt(400 * 0.8)


def test_poisson_draws_each_on_its_own():
    sampler = CohortSampler(sampling="poisson", per_round=10, key=KEY)
    sizes = np.array([len(sampler.draw(round, PEOPLE)) for round in range(4000)])
    assert abs(sizes.mean() - 10) < 5 * np.sqrt(8 / 4000)
    assert abs(sizes.var() - 8) < 1


def test_a_poisson_cohort_may_be_empty():
    sampler = CohortSampler(sampling="poisson", per_round=1, key=KEY)
    assert min(len(sampler.draw(round, PEOPLE[:2])) for round in range(50)) == 0


def test_rounds_differ_and_repeat_under_the_same_key():
    sampler = CohortSampler(sampling="fixed", per_round=10, key=KEY)
    assert sampler.draw(1, PEOPLE) == sampler.draw(1, PEOPLE)
    assert sampler.draw(1, PEOPLE) != sampler.draw(2, PEOPLE)
    other = CohortSampler(sampling="fixed", per_round=10, key=Key.from_seed(4))
    assert sampler.draw(1, PEOPLE) != other.draw(1, PEOPLE)
