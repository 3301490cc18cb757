"""Noise and weights of a cohort's sum, asked of bract and of the defects of other servers."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp.mod import LocalDpMod

from bract.clients.noised import noised_update
from bract.core import flower
from bract.core.keys import Key
from bract.core.parameters import Layout, arrays_of, record_of
from bract.privacy.local import LocalPlan

from .faulty_servers import Arrays, BractServer, Change, FlowerServer, Make, Terms, content_of, moved, norm, zeros

SOUND: list[Make] = [BractServer, partial(BractServer, cap=10)]
WIDE = zeros(w=5000)
# No change, but for those who divide by its norm.
STILL = Change(arrays={"w": np.full(5000, 1e-9)}, count=10)


@pytest.fixture(autouse=True)
def _global_generators() -> Iterator[None]:
    """The properties seed what an app may seed; it is put back."""
    kept = np.random.get_state(), random.getstate()
    with torch.random.fork_rng():
        yield
    np.random.set_state(kept[0])
    random.setstate(kept[1])


def as_an_app_seeds() -> None:
    """Do what many a training script does in its first lines."""
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)


def no_app_can_seed_the_noise(make: Make) -> None:
    """Who seeds every global generator before each round gets other noise each round, and cannot draw it alone."""
    server, guess = (make(WIDE, Terms(noise_multiplier=1.0, secret=secret)) for secret in (1, 2))
    noises = []
    for each in (server, server, guess):
        as_an_app_seeds()
        noises.append(each.release([STILL])["w"])
    # The correlations of 5,000 pairs are below 0.1, seven standard errors, but for a chance of 1e-11.
    for other in noises[1:]:
        assert abs(np.corrcoef(noises[0], other)[0, 1]) < 0.1, "the noise follows from a global seed"


@pytest.mark.parametrize("make", SOUND)
def test_no_app_can_seed_the_noise(make: Make) -> None:
    no_app_can_seed_the_noise(make)


def test_flower_noise_follows_a_global_seed() -> None:
    """Flower 1.41: `np.random.normal`."""
    with pytest.raises(AssertionError, match="global seed"):
        no_app_can_seed_the_noise(FlowerServer)


Noised = Callable[[Arrays, Arrays, int], Arrays]
MIXED = {**zeros(w=8), "seen": np.zeros(4, np.int64)}


def local(model: Arrays, change: Arrays, round: int) -> Arrays:
    """One client's update as bract's own client releases it where nobody is trusted; deviation 0.2."""
    layout = Layout.of(model)
    plan = LocalPlan(participations=1, clipping_norm=10.0, noise_multiplier=0.02, delta=1e-5, coordinates=layout.size)
    after = arrays_of(content_of(model, Change(arrays=change))["arrays"])
    stream = Key.from_seed(1).child(round).stream()
    return moved(noised_update(model, after, layout=layout, plan=plan, stream=stream), model)


def central(model: Arrays, change: Arrays, round: int) -> Arrays:
    """The same as a cohort of one, noised by the server."""
    terms = Terms(clipping_norm=10.0, noise_multiplier=0.02, cohort=1, secret=round)
    return BractServer(model, terms).release([Change(arrays=change)])


def flower_local(model: Arrays, change: Arrays, round: int) -> Arrays:
    """The same by Flower 1.41's LocalDpMod."""
    flower.identify_process(1)
    np.random.seed(round)
    asked = Message(RecordDict({"arrays": record_of(model), "config": ConfigRecord({})}), 7, "train")
    flower.set_message_id(asked, f"asked {round}")
    # Its formula: deviation = sensitivity · sqrt(2 ln(1.25 / delta)) / epsilon.
    epsilon = 10.0 * math.sqrt(2 * math.log(1.25 / 1e-5)) / 0.2
    mod = LocalDpMod(clipping_norm=10.0, sensitivity=10.0, epsilon=epsilon, delta=1e-5)
    context = Context(run_id=1, node_id=7, node_config={}, state=RecordDict(), run_config={})

    def app(message: Message, context: Context) -> Message:
        return Message(content_of(model, Change(arrays=change)), reply_to=message)

    with flower.quiet():
        reply = mod(asked, context, app)
    return moved(arrays_of(reply.content["arrays"]), model)


def whole_numbers_carry_nothing_that_noise_does_not_cover(release: Noised) -> None:
    """A tensor of whole numbers tells the same whatever the client did to it, or something else in each of 20 draws."""
    change = {"w": np.full(8, 0.01), "seen": np.array([3, 1, 0, 2])}
    still = {"w": np.full(8, 0.01), "seen": np.zeros(4, np.int64)}
    with_it = [release(MIXED, change, round)["seen"] for round in range(20)]
    without = [release(MIXED, still, round)["seen"] for round in range(20)]
    covered = len({array.tobytes() for array in with_it}) > 1
    unmoved = np.array_equal(with_it, without)
    assert covered or unmoved, f"every draw shows {with_it[0]}"
    assert len({release(MIXED, change, round)["w"].tobytes() for round in range(3)}) == 3, "the others are noised"


@pytest.mark.parametrize("release", [local, central])
def test_whole_numbers_carry_nothing_that_noise_does_not_cover(release: Noised) -> None:
    whole_numbers_carry_nothing_that_noise_does_not_cover(release)


def test_flower_noise_on_whole_numbers_is_truncated_to_zero() -> None:
    """Flower 1.41: `noise.astype(array.dtype)` makes 0 of every draw below 1."""
    with pytest.raises(AssertionError, match="every draw shows"):
        whole_numbers_carry_nothing_that_noise_does_not_cover(flower_local)


COHORT = 10


def of_client(number: int, count: int = 1) -> Change:
    """Return an update far beyond C, each client's in 200 coordinates of its own."""
    return Change(arrays={"w": 100.0 * (np.arange(5000) // 200 == number)}, count=count)


def influence(make: Make, others: int, count: int) -> float:
    """Return by how much one client moves a mean without noise, `others` clients beside it."""
    beside = [of_client(number, 10) for number in range(1, 1 + others)]
    with_it = make(WIDE, Terms(cohort=COHORT)).release([of_client(0, count), *beside])
    without = make(WIDE, Terms(cohort=COHORT)).release(beside or [STILL])
    return norm(moved(with_it, without))


def deviation(make: Make, others: int) -> float:
    """Return the standard deviation of the noise on a round's mean, z = 1, for so many replies."""
    as_an_app_seeds()
    replies = [STILL] * (1 + others)
    return float(make(WIDE, Terms(cohort=COHORT, noise_multiplier=1.0)).release(replies)["w"].std())


def noise_covers_one_client(make: Make, *, others: int, count: int) -> None:
    """With z = 1 no client moves the mean by more than a deviation, whoever replied and whatever count it sends.

    The deviation of 5,000 normals is known to 1 %; 10 % is ten standard errors.
    """
    ratio = influence(make, others, count) / deviation(make, others)
    assert ratio < 1.1, f"one client moves the mean by {ratio:.2f} deviations"


@pytest.mark.parametrize("make", SOUND)
@pytest.mark.parametrize("others", [0, 1, COHORT - 1, 2 * COHORT])
@pytest.mark.parametrize("count", [0, 1, 10, 10**6])
def test_noise_covers_one_client(make: Make, others: int, count: int) -> None:
    noise_covers_one_client(make, others=others, count=count)


def test_flower_noise_takes_weights_for_equal() -> None:
    """Flower 1.41: FedAvg weighs by `num-examples`, and the noise is that of equal weights."""
    with pytest.raises(AssertionError, match="deviations"):
        noise_covers_one_client(FlowerServer, others=COHORT - 1, count=10**6)
    noise_covers_one_client(FlowerServer, others=COHORT - 1, count=10)


@pytest.mark.parametrize("others", [0, 1])
def test_flower_noise_takes_every_client_for_there(others: int) -> None:
    """Flower 1.41: the noise is divided by the planned cohort, the sum by the replies that came; only a line warns."""
    with pytest.raises(AssertionError, match="deviations"):
        noise_covers_one_client(FlowerServer, others=others, count=10)
