"""server/plan.py: mechanisms for a handful of sites exactly, for many by classes that bound them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bract.core.errors import InputError
from bract.privacy.mechanism import RecordLevelPlan
from bract.server.plan import MOST_SIZES, make_plan, planned_releases, size_classes


@given(st.sets(st.integers(1, 5000), min_size=1, max_size=200), st.integers(1, 256))
def test_every_size_lies_in_its_class_and_there_are_few(sizes, batch_size):
    classes = size_classes(sizes, batch_size)
    if len(sizes) <= MOST_SIZES:
        assert classes == {}
        return
    assert set(classes) == sizes
    assert all(fewest <= size <= most for size, (fewest, most) in classes.items())
    assert len(set(classes.values())) <= MOST_SIZES


@pytest.mark.parametrize("records", [100, 110, 131])
def test_a_class_bounds_the_epsilon_of_each_of_its_sites(records):
    common = {"batch_size": 10, "epochs": 1, "rounds": 5, "clipping_norm": 1.0, "delta": 1e-5, "records": records}
    bounded = RecordLevelPlan(**common, noise_multiplier=2.0, accounted_records=(100, 131))
    exact = RecordLevelPlan(**common, noise_multiplier=2.0)
    assert exact.epsilon() <= bounded.epsilon() <= 1.6 * exact.epsilon()
    assert bounded.sampling_rate == exact.sampling_rate and bounded.steps() == exact.steps()
    calibrated = RecordLevelPlan.calibrate(**common, epsilon=1.0, accounted_records=(100, 131))
    own = RecordLevelPlan(**common, noise_multiplier=calibrated.noise_multiplier)
    assert own.epsilon() <= calibrated.epsilon() <= 1.0


def test_a_class_must_enclose_its_site():
    with pytest.raises(ValueError, match="enclose"):
        RecordLevelPlan(
            records=50,
            batch_size=10,
            epochs=1,
            rounds=1,
            clipping_norm=1.0,
            noise_multiplier=1.0,
            delta=1e-5,
            accounted_records=(51, 60),
        )


def test_many_sites_are_calibrated_within_the_target(tiny, monkeypatch):
    monkeypatch.setattr("bract.server.plan.MOST_SIZES", 5)
    sizes = np.random.default_rng(0).integers(20, 120, 60)
    experiment = tiny(**{"privacy.unit": "record", "privacy.epsilon": 3.0, "train.batch_size": 20})
    planned = make_plan(experiment, {f"c{index}": int(size) for index, size in enumerate(sizes)}, 2, lambda event: None)
    epsilons = [mechanism.epsilon() for mechanism in planned.mechanisms.values()]
    assert max(epsilons) <= 3.0 and min(epsilons) > 2.9
    assert len({mechanism.noise_multiplier for mechanism in planned.mechanisms.values()}) <= 5
    assert planned.guarantee(experiment).epsilon <= 3.0


@pytest.mark.parametrize(("rounds", "every", "releases"), [(10, 0, 1), (10, 1, 10), (10, 3, 4), (9, 3, 3), (2, 5, 1)])
def test_releases_are_counted(rounds, every, releases):
    assert planned_releases(rounds, every) == releases


def test_a_strategy_that_needs_what_is_withheld_is_refused(tiny, tmp_path):
    import bract
    from bract.strategies.fedavg import FedAvg

    class Nosy(FedAvg):
        needs_metrics = True

    class Picky(FedAvg):
        allowed_units = frozenset({"none"})

    keys = {"privacy.unit": "record", "privacy.noise_multiplier": 4.0}
    for strategy, says in ((Nosy(), "clients' metrics, which are withheld"), (Picky(), "goes with none only")):
        with pytest.raises(InputError) as caught:
            bract.simulate(tiny(**keys), strategy=strategy, out=tmp_path / "run")
        assert says in caught.value.sentence
        assert bract.simulate(tiny(), strategy=strategy, out=tmp_path / says[:5]).status == "completed"
