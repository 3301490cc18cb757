"""Clipping of clients' updates, asked of bract and of the defects of other servers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest

from bract.clients.noised import noised_update
from bract.core.keys import Key
from bract.core.parameters import Layout, arrays_of
from bract.privacy.local import LocalPlan

from .faulty_servers import (
    Arrays,
    BractServer,
    Change,
    FlowerServer,
    Make,
    Server,
    Terms,
    content_of,
    moved,
    norm,
    zeros,
)

MODEL = zeros(w=8, b=())
SMALL = Change(arrays={"w": np.full(8, 0.01), "b": np.array(0.01)})


class LocalNoise(Server):
    """The client's half where nobody is trusted: one update, clipped at its origin, with all but no noise."""

    def __init__(self, model: Arrays, terms: Terms) -> None:
        self.model, self.layout, self.clipping_norm = model, Layout.of(model), terms.clipping_norm

    def release(self, changes):
        (change,) = changes
        plan = LocalPlan(
            participations=1, clipping_norm=self.clipping_norm, noise_multiplier=0.0, delta=1e-5, coordinates=9
        )
        after = arrays_of(content_of(self.model, change)["arrays"])
        stream = Key.from_seed(1).stream()
        return moved(noised_update(self.model, after, layout=self.layout, plan=plan, stream=stream), self.model)


SOUND: list[Make] = [BractServer, partial(BractServer, cap=10), LocalNoise]


@pytest.fixture(autouse=True)
def _global_generator() -> Iterator[None]:
    """Flower draws from NumPy's global generator: here with a fixed seed, and put back."""
    before = np.random.get_state()
    np.random.seed(5)
    yield
    np.random.set_state(before)


def a_bad_number_does_not_switch_clipping_off(make: Make, bad: float) -> None:
    """Whatever one number of an update is, the released model is finite and within C / cohort of what it was."""
    change = {"w": np.array([bad, *[1e6] * 7]), "b": np.array(1e6)}
    found = make(MODEL, Terms(cohort=1)).release([Change(arrays=change)])
    assert all(np.isfinite(array).all() for array in found.values()), "the released model is not finite"
    assert norm(found) <= 1.0


def a_client_that_changed_nothing_is_no_error(make: Make) -> None:
    """An update of zeros is released as no change."""
    nothing = Change(arrays={name: np.zeros_like(array) for name, array in MODEL.items()})
    try:
        found = make(MODEL, Terms(cohort=1)).release([nothing])
    except ArithmeticError as error:
        raise AssertionError(f"an update of zeros ends the round: {error!r}") from error
    assert norm(found) == 0.0


def a_scalar_is_clipped_like_any_tensor(make: Make) -> None:
    """A parameter without dimensions, such as a temperature, cannot move further than C / cohort."""
    change = {"w": np.zeros(8), "b": np.array(1e6)}
    assert norm(make(MODEL, Terms(cohort=1)).release([Change(arrays=change)])) <= 1.0


def a_counter_does_not_crush_the_update(make: Make) -> None:
    """An update within C keeps its length, however far a whole number beside it (a count of batches) has moved."""
    model = {**MODEL, "batches": np.array(3, np.int64)}
    change = Change(arrays={**SMALL.arrays, "batches": np.array(1000)})
    found = make(model, Terms(cohort=1)).release([change])
    without = make(MODEL, Terms(cohort=1)).release([SMALL])
    np.testing.assert_allclose(found["w"], without["w"], rtol=1e-6)
    np.testing.assert_allclose(found["b"], without["b"], rtol=1e-6)


@pytest.mark.parametrize("make", SOUND)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
def test_a_bad_number_does_not_switch_clipping_off(make: Make, bad: float) -> None:
    a_bad_number_does_not_switch_clipping_off(make, bad)


def test_flower_clipping_ends_at_a_nan() -> None:
    """Flower 1.41: min(1, C / NaN) is 1."""
    with pytest.raises(AssertionError, match="not finite"):
        a_bad_number_does_not_switch_clipping_off(FlowerServer, math.nan)
    # The clipped rest of the update went through, too: it is the factor that is gone, not the one number.
    found = FlowerServer(MODEL, Terms(cohort=1)).release(
        [Change(arrays={"w": np.array([math.nan, *[1e6] * 7]), "b": np.array(0.0)})]
    )
    assert found["w"][1] == 1e6


@pytest.mark.parametrize("make", SOUND)
def test_a_client_that_changed_nothing_is_no_error(make: Make) -> None:
    a_client_that_changed_nothing_is_no_error(make)


def test_flower_clipping_divides_by_a_norm_of_zero() -> None:
    """Flower 1.41: C / 0.0 raises."""
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        a_client_that_changed_nothing_is_no_error(FlowerServer)


@pytest.mark.parametrize("make", SOUND)
def test_a_scalar_is_clipped_like_any_tensor(make: Make) -> None:
    a_scalar_is_clipped_like_any_tensor(make)


def test_flower_clipping_passes_scalars() -> None:
    """Flower 1.41: `array *= factor` on what NumPy makes of a 0-d difference changes a name, not the update."""
    with pytest.raises(AssertionError):
        a_scalar_is_clipped_like_any_tensor(FlowerServer)


@pytest.mark.parametrize("make", SOUND)
def test_a_counter_does_not_crush_the_update(make: Make) -> None:
    a_counter_does_not_crush_the_update(make)


def test_flower_clipping_counts_a_counter_into_the_norm() -> None:
    """Flower 1.41: `num_batches_tracked` of a batch normalization is part of the norm."""
    with pytest.raises(AssertionError):
        a_counter_does_not_crush_the_update(FlowerServer)


CLIENTS = 40
NORMS = np.exp(0.3 * Key.from_seed(11).stream().normals(CLIENTS))
NORMS /= np.median(NORMS)


def the_norm_finds_the_median(make: Make, start: float) -> None:
    """Adaptive clipping ends within a tenth of the updates' median norm, 1, wherever it starts."""
    server = make(zeros(w=1), Terms(clipping_norm=start, noise_multiplier=1.0, cohort=CLIENTS, adaptive=True))
    for _ in range(30):
        server.release([Change(arrays={"w": np.array([norm])}) for norm in NORMS])
    assert abs(math.log(server.clipping_norm)) < 0.1, f"from {start} it went to {server.clipping_norm}"


def the_noise_is_that_of_the_norm_that_clipped(make: Make) -> None:
    """The noise on a round's mean has the deviation z_u C / cohort, for the C that clipped this round's updates.

    20,000 normals: the deviation is known to 0.5 %, and 3 % is six of that (chance 2e-9); C moves by 10 % a round.
    """
    terms = Terms(clipping_norm=0.01, noise_multiplier=1.0, cohort=40, adaptive=True)
    server = make(zeros(w=20_000), terms)
    found = server.release([Change(arrays={"w": np.full(20_000, 1.0)})] * 40)
    # The votes' deviation is cohort / 20 = 2 (Andrew et al. 2021, theorem 1).
    deviation = (1 - (2 * 2.0) ** -2) ** -0.5 * 0.01 / 40
    assert abs(server.clipping_norm / 0.01 - 1) > 0.05, "the norm has to move for the test to tell"
    assert abs(float(found["w"].std()) / deviation - 1) < 0.03


@pytest.mark.parametrize("start", [0.9, 1.1])
def test_the_norm_finds_the_median(start: float) -> None:
    the_norm_finds_the_median(BractServer, start)


@pytest.mark.parametrize("start", [0.9, 1.1])
def test_flower_adaptive_clipping_runs_away(start: float) -> None:
    """Flower 1.41: the share of clipped updates stands where Andrew et al. (2021) have that of unclipped ones."""
    with pytest.raises(AssertionError, match=f"from {start} it went to"):
        the_norm_finds_the_median(FlowerServer, start)


def test_the_noise_is_that_of_the_norm_that_clipped() -> None:
    the_noise_is_that_of_the_norm_that_clipped(BractServer)


def test_flower_adaptive_noise_is_that_of_the_next_norm() -> None:
    """Flower 1.41: C moves before the noise is scaled by it."""
    with pytest.raises(AssertionError):
        the_noise_is_that_of_the_norm_that_clipped(FlowerServer)
