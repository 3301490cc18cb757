"""privacy/canary.py: planted records tell sound noise from halved noise, through the real step of DP-SGD."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from scipy import stats

from bract.core.keys import Key
from bract.privacy.canary import BLOCK, CANARIES, SIGNIFICANCE, canary_test, steps_by
from bract.privacy.dpsgd import bookkeeping, clipping, stream_optimizer
from bract.privacy.dpsgd.stream_optimizer import StreamOptimizer
from bract.privacy.mechanism import RecordLevelPlan

KEY = Key.from_seed(23)
PLAN = RecordLevelPlan(
    records=240, batch_size=32, epochs=2, rounds=20, clipping_norm=0.7, noise_multiplier=1.0, delta=1e-5
)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def halve(monkeypatch):
    monkeypatch.setattr(
        RecordLevelPlan, "noise_deviation", property(lambda plan: plan.noise_multiplier * plan.clipping_norm / 2)
    )


def passes(runs, plan=PLAN):
    return sum(canary_test(plan, KEY.child(number)).passed for number in range(runs))


def test_it_is_the_test_that_was_promised():
    found = canary_test(PLAN, KEY)
    assert found.canaries == CANARIES == 1000 and BLOCK == 5 and SIGNIFICANCE == 1e-6
    # Nothing of these hangs on a draw.
    assert (found.threshold, found.mu, found.steps) == (0.5, 1.0, 1)
    assert stats.binom.sf(found.most, 1000, stats.norm.cdf(0.5)) <= 1e-6
    assert stats.binom.sf(found.most - 1, 1000, stats.norm.cdf(0.5)) > 1e-6


@pytest.mark.parametrize(
    "noise", [1.0, pytest.param(0.5, marks=pytest.mark.soak), pytest.param(2.0, marks=pytest.mark.soak)]
)
def test_two_hundred_sound_builds_pass_and_halved_noise_is_rejected(noise, monkeypatch):
    plan = replace(PLAN, noise_multiplier=noise)
    assert passes(200, plan) == 200
    halve(monkeypatch)
    # At most one in a hundred.
    assert passes(200, plan) <= 2


def test_the_guesses_of_a_sound_build_are_as_many_as_the_theory_says():
    plan = replace(PLAN, noise_multiplier=0.8)
    right = sum(canary_test(plan, KEY.child("many", number)).right for number in range(20))
    chance = stats.norm.cdf(1 / 0.8 / 2)
    # So the test is as sharp as the claim: an outcome outside has a chance of 1e-6.
    assert stats.binom.ppf(5e-7, 20_000, chance) <= right <= stats.binom.isf(5e-7, 20_000, chance)


@pytest.mark.parametrize("noise", [0.1, 0.4, 0.9, 1.7, 6.0, 15.0])
def test_it_is_sharp_for_much_noise_and_for_little(noise, monkeypatch):
    plan = replace(PLAN, noise_multiplier=noise)
    sound = canary_test(plan, KEY)
    assert sound.passed and 1 <= sound.mu <= 1.5 + 1e-9 and sound.power > 0.99
    halve(monkeypatch)
    assert not canary_test(plan, KEY).passed


def test_its_power_is_what_it_says():
    weak = canary_test(replace(PLAN, noise_multiplier=60.0), KEY)
    assert weak.steps == 400 and weak.power < 0.5 and weak.passed


def test_clipping_that_does_not_clip_is_rejected(monkeypatch):
    monkeypatch.setattr(clipping, "_factors", lambda samples, norm: torch.ones(len(samples[0])))
    assert not canary_test(PLAN, KEY).passed


@pytest.mark.parametrize("engine", ["bookkeeping", "opacus"])
def test_noise_on_a_part_of_the_values_is_rejected(engine, monkeypatch):
    add = StreamOptimizer.add_noise
    assert canary_test(PLAN, KEY, steps=steps_by(engine)).passed

    def forgetful(self):
        # The engine may add the noise in place.
        sums = [p.summed_grad.clone() for p in self._parameters]
        add(self)
        for p, clean in zip(self._parameters, sums, strict=True):
            p.grad.view(-1)[::2] = clean.view(-1)[::2] / self.expected_batch_size

    monkeypatch.setattr(StreamOptimizer, "add_noise", forgetful)
    assert not canary_test(PLAN, KEY, steps=steps_by(engine)).passed


@pytest.mark.parametrize("engine", ["bookkeeping", "opacus"])
def test_each_engine_is_tested_by_itself(engine, monkeypatch):
    def no_clipping(layers, norm):
        return [torch.ones(len(rows[0])) if rows else None for rows in layers]

    monkeypatch.setattr(bookkeeping if engine == "bookkeeping" else stream_optimizer, "clip_factors", no_clipping)
    passed = {each: canary_test(PLAN, KEY, steps=steps_by(each)).passed for each in ("bookkeeping", "opacus")}
    assert passed == {each: each != engine for each in passed}


@pytest.mark.parametrize("change", [{"microbatch_size": 100}, {"per_layer": True}, {"clipping_norm": 1e-3}])
def test_it_follows_the_plan(change, monkeypatch):
    plan = replace(PLAN, **change)
    assert canary_test(plan, KEY).passed
    halve(monkeypatch)
    assert not canary_test(plan, KEY).passed


def test_it_is_a_function_of_its_key():
    assert canary_test(PLAN, KEY) == canary_test(PLAN, KEY)
    assert len({canary_test(PLAN, KEY.child(number)).right for number in range(6)}) > 1


def test_torch_is_left_as_it_was():
    before = torch.random.get_rng_state()
    canary_test(PLAN, KEY)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_plan_without_noise_claims_nothing():
    with pytest.raises(ValueError, match="claims nothing"):
        canary_test(replace(PLAN, noise_multiplier=0.0), KEY)
    assert math.isinf(replace(PLAN, noise_multiplier=0.0).epsilon())
