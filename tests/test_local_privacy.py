"""Local privacy and two levels at once: what leaves a client, and guarantees that name both."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bract
from bract.core.errors import InputError
from bract.core.keys import Key
from bract.privacy import accounting, discrete_gaussian
from bract.privacy.guarantee import Guarantee
from bract.privacy.local import LocalPlan
from bract.server.events import RoundFinished

KEY = Key.from_seed(8)
SIZE = 30


def plan(**changes):
    known = {"participations": 4, "clipping_norm": 0.7, "noise_multiplier": 2.0, "delta": 1e-5, "coordinates": SIZE}
    return LocalPlan(**known | changes)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([math.nan, math.inf, 1e308, 0.0]) | st.floats(-3, 3), min_size=SIZE, max_size=SIZE),
    st.floats(1e-6, 1e6),
)
def test_without_the_noise_no_update_is_longer_than_the_clipping_norm(values, clipping_norm):
    silent = plan(noise_multiplier=0.0, clipping_norm=clipping_norm)
    released = silent.release(np.array(values), KEY.stream())
    assert np.isfinite(released).all() and np.linalg.norm(released) <= clipping_norm


def test_the_noise_is_that_of_the_plan_whatever_the_update():
    for update in (np.zeros(40_000), np.full(40_000, math.nan), np.full(40_000, 1e9)):
        noise = plan(coordinates=40_000).release(update, KEY.stream()) / (2.0 * 0.7)
        # 0.7 / 200 of the clipped update is below what the test sees.
        assert abs(noise.var() - 1) < 6 * math.sqrt(2 / noise.size)


def test_what_leaves_is_an_integer_of_the_ring():
    """Floating-point noise would leave digits that tell of the update (Mironov 2012)."""
    each = plan()
    units = each.release(np.linspace(-1, 1, SIZE), KEY.stream()) / each.ring.step
    np.testing.assert_array_equal(units, np.rint(units))


@pytest.mark.parametrize("noise_multiplier", [0.1, 2.0, 5000.0])
def test_update_and_noise_fit_the_ring(noise_multiplier):
    each = plan(noise_multiplier=noise_multiplier)
    assert each.clipping_norm / each.ring.step + discrete_gaussian.largest(each.sigma_units) < 2**63


def test_epsilon_is_that_of_the_gaussian_composed_over_all_updates():
    expected = accounting.epsilon(sampling_rate=1.0, noise_multiplier=2.0, steps=4, delta=1e-5)
    assert plan().epsilon() == pytest.approx(expected, rel=1e-6)
    assert plan().epsilon(1) < plan().epsilon(2) < plan().epsilon()
    calibrated = LocalPlan.calibrate(epsilon=3.0, participations=7, clipping_norm=1.0, delta=1e-6, coordinates=10)
    assert 2.99 < calibrated.epsilon() <= 3.0


LOCAL = {
    "task.clients": 6,
    "privacy.unit": "client",
    "privacy.trust": "nobody",
    "privacy.noise_multiplier": 2.0,
    "privacy.clipping_norm": 0.5,
    "experiment.rounds": 3,
}


def test_what_a_client_sends_is_noised_before_the_server_sees_it(tiny, tmp_path, monkeypatch):
    """With noise that drowns all else, the mean of six clients' models moves by the noise's mean alone."""
    keys = LOCAL | {"privacy.noise_multiplier": 1e3, "experiment.rounds": 1, "task.features": 300}
    result = bract.simulate(tiny(**keys), out=tmp_path / "run")
    moved = np.concatenate([tensor.numpy().ravel() for tensor in result.model.state_dict().values()])
    expected = 1e3 * 0.5 / math.sqrt(6)
    # 301 coordinates and more: within 6 standard errors, but once in 1e8.
    assert abs(moved.std() / expected - 1) < 6 / math.sqrt(2 * moved.size)


def test_two_rounds_and_two_clients_draw_unrelated_noise(tiny, tmp_path):
    keys = LOCAL | {"privacy.noise_multiplier": 1e3, "task.features": 300, "task.clients": 2}
    first = bract.simulate(tiny(**keys | {"experiment.rounds": 1}), out=tmp_path / "one").model.state_dict()
    second = bract.simulate(tiny(**keys | {"experiment.rounds": 2}), out=tmp_path / "two").model.state_dict()
    one = np.concatenate([tensor.numpy().ravel() for tensor in first.values()])
    two = np.concatenate([tensor.numpy().ravel() for tensor in second.values()])
    assert abs(np.corrcoef(one, two - one)[0, 1]) < 6 / math.sqrt(one.size)
    # Were both clients' noise the same, the mean would be as noisy as one of them.
    assert abs(one.std() / (1e3 * 0.5 / math.sqrt(2)) - 1) < 6 / math.sqrt(2 * one.size)


def test_local_runs_do_not_depend_on_workers_and_say_whom_one_must_trust(tiny, tmp_path):
    one = bract.simulate(tiny(**LOCAL), out=tmp_path / "one")
    two = bract.simulate(tiny(**LOCAL, **{"simulation.workers": 2}), out=tmp_path / "two")
    assert one.model_sha256 == two.model_sha256
    assert one.guarantee.unit == "client" and "updates" in one.guarantee.sentence
    assert one.metrics == {}


def test_cyclic_cohorts_spare_the_clients(tiny, tmp_path):
    seen = []
    keys = LOCAL | {"clients.sampling": "cyclic", "clients.per_round": 3, "experiment.rounds": 4}
    result = bract.simulate(tiny(**keys), out=tmp_path / "run", listeners=[seen.append])
    assert result.guarantee.epsilon == pytest.approx(plan(clipping_norm=0.5).epsilon(2), rel=1e-6)
    epsilons = [event.record["epsilon"] for event in seen if isinstance(event, RoundFinished)]
    assert epsilons == sorted(epsilons) and epsilons[-1] == result.guarantee.epsilon


def test_both_levels_give_both_guarantees(tiny, tmp_path):
    keys = LOCAL | {
        "privacy.trust": "server",
        "privacy.record": {"noise_multiplier": 1.5, "clipping_norm": 0.3},
        "clients.sampling": "poisson",
        "clients.per_round": 3,
    }
    result = bract.simulate(tiny(**keys), out=tmp_path / "run")
    guarantee = result.guarantee
    assert guarantee.unit == "client" and guarantee.record.unit == "record"
    assert guarantee.epsilon != guarantee.record.epsilon
    assert "any one client" in guarantee.sentence and "any one record" in guarantee.sentence
    written = json.loads((tmp_path / "run" / "result.json").read_text())["guarantee"]
    assert Guarantee.from_dict(written) == guarantee
    # Less noise in the steps is another record's epsilon, and the same client's.
    louder = bract.simulate(tiny(**keys | {"privacy.record": {"noise_multiplier": 3.0}}), out=tmp_path / "other")
    assert louder.guarantee.epsilon == guarantee.epsilon
    assert louder.guarantee.record.epsilon < guarantee.record.epsilon
    assert louder.model_sha256 != result.model_sha256


def test_capped_weights_keep_the_bound(tiny, tmp_path):
    keys = LOCAL | {"privacy.trust": "server", "strategy.weights": "counted"}
    with pytest.raises(InputError, match="weight_cap"):
        bract.simulate(tiny(**keys), out=tmp_path / "none")
    with pytest.raises(InputError, match="trusted"):
        bract.simulate(tiny(**LOCAL, **{"strategy.weights": "counted", "strategy.weight_cap": 5}), out=tmp_path / "no")
    small = bract.simulate(tiny(**keys, **{"strategy.weight_cap": 1}), out=tmp_path / "one")
    equal = bract.simulate(tiny(**keys | {"strategy.weights": "equal"}), out=tmp_path / "equal")
    large = bract.simulate(tiny(**keys, **{"strategy.weight_cap": 1000}), out=tmp_path / "many")
    assert small.model_sha256 == equal.model_sha256 != large.model_sha256


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"privacy.adaptive_clipping": True}, "server"),
        ({"privacy.bands": 2, "clients.sampling": "cyclic", "clients.per_round": 2}, "server"),
        ({"privacy.unit": "record"}, "client"),
        ({"privacy.record": {"clipping_norm": 2.0}}, r"\[privacy.record\]: needs"),
        ({"privacy.record": {"clipping_nrm": 2.0}}, "did you mean clipping_norm"),
        ({"privacy.record": {"epsilon": 2.0, "noise_multiplier": 1.0}}, "privacy.record.epsilon"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(tiny, keys, words):
    with pytest.raises(InputError, match=words):
        tiny(**LOCAL | keys)
