"""What a client spends, tells and lets others decide, asked of a site of bract's and of the defects of others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from opacus.accountants import PRVAccountant

from bract.privacy import accounting

from .faulty_clients import (
    BATCH,
    DECLARED,
    DELTA,
    EPSILON,
    BractSite,
    Client,
    EnginePerMessage,
    FlowerLocalDp,
    ResearchersSigma,
    Table,
)

Make = Callable[[Table], Client]
Open = Callable[[Callable[[Table, Path], Client]], Make]


@pytest.fixture(autouse=True)
def _global_generators() -> Iterator[None]:
    kept = np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        np.random.seed(5)
        yield
    np.random.set_state(kept)


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Open]:
    """Return what makes clients of a kind, each in a folder of its own."""
    clients: list[Client] = []

    def of(kind: Callable[[Table, Path], Client]) -> Make:
        def make(table: Table) -> Client:
            folder = tmp_path / f"client {len(clients)}"
            folder.mkdir()
            clients.append(kind(table, folder))
            return clients[-1]

        return make

    yield of
    for client in clients:
        if isinstance(client, BractSite):
            client.close()


TABLE = Table.of(DECLARED, seed=1)


def true_epsilon(rounds: int, noise_multiplier: float) -> float:
    """Return the epsilon of so many rounds over DECLARED records, by an accountant that bract does not use."""
    accountant = PRVAccountant()
    accountant.history = [(noise_multiplier, BATCH / DECLARED, rounds * DECLARED // BATCH)]
    return float(accountant.get_epsilon(DELTA, eps_error=5e-3, delta_error=1e-8))


def what_is_shown_covers_all_rounds(make: Make, *, restart: bool) -> None:
    """After each round the epsilon that a client shows is that of all rounds until then, restarts or not."""
    client = make(TABLE)
    for round in (1, 2, 3):
        assert client.train(round, 1.0) is not None
        if restart:
            client.restart()
        true = true_epsilon(round, 1.0)
        # The reference is an upper bound, by 0.005.
        assert client.epsilon() >= true - 6e-3, f"round {round}: {client.epsilon():.2f} is shown for {true:.2f}"


@pytest.mark.parametrize("restart", [False, True])
def test_what_is_shown_covers_all_rounds(made: Open, restart: bool) -> None:
    what_is_shown_covers_all_rounds(made(BractSite), restart=restart)


def test_an_engine_for_each_message_shows_one_round(made: Open) -> None:
    """Flower's example of Opacus: 0.62 after each round; with sigma 1, q 0.008 the truth is 0.93 after three."""
    with pytest.raises(AssertionError, match=r"round 2: 0\.6"):
        what_is_shown_covers_all_rounds(made(EnginePerMessage), restart=False)


def a_restart_does_not_end_the_noise(make: Make) -> None:
    """An update of noise fifty times the clipping norm stays one, whenever the client's process was restarted."""
    client = make(TABLE)
    deviations = []
    for round in (1, 2, 3):
        reply = client.train(round, 50.0)
        assert reply is not None
        deviations.append(float(reply.update.std()))
        client.restart()
    # 125 gradients of norm 1, times 0.1, have a deviation of at most 0.9 in 200 numbers; the noise has 56.
    assert min(deviations) > 20, f"deviations {deviations}"


def test_a_restart_does_not_end_the_noise(made: Open) -> None:
    a_restart_does_not_end_the_noise(made(BractSite))


@pytest.mark.filterwarnings("ignore:Optimal order")
def test_an_engine_attached_in_the_first_round_is_lost_by_a_restart(made: Open) -> None:
    """NVFLARE's hello-dp: the client trains on without privacy, and says nothing."""
    with pytest.raises(AssertionError, match="deviations"):
        a_restart_does_not_end_the_noise(made(partial(EnginePerMessage, first_round_only=True)))


def nobody_outside_lowers_the_noise(make: Make) -> None:
    """Whatever noise is asked for, what leaves costs no more than the owner allows: else the client refuses."""
    client = make(TABLE)
    for noise_multiplier in (0.0, 1e-3, 0.05, 0.3):
        reply = client.train(1, noise_multiplier)
        spent = true_epsilon(1, noise_multiplier) if noise_multiplier >= 0.3 else math.inf
        assert reply is None or spent <= EPSILON, f"sigma {noise_multiplier}: epsilon {spent} left, {EPSILON} allowed"
    assert client.train(1, 2.0) is not None, "what the owner allows is done"


def test_nobody_outside_lowers_the_noise(made: Open) -> None:
    nobody_outside_lowers_the_noise(made(BractSite))


def test_a_researchers_sigma_is_whatever_a_researcher_says(made: Open) -> None:
    """Fed-BioMed: sigma and clip stand in the training plan, not with the node."""
    with pytest.raises(AssertionError, match="left"):
        nobody_outside_lowers_the_noise(made(ResearchersSigma))


# Two tables of one declared number: other rows, other labels, and fewer of them.
OTHERS = [Table.of(DECLARED, seed=2), Table.of(DECLARED - 30, seed=1)]


def what_stands_beside_an_update_is_not_of_the_records(make: Make) -> None:
    """Counts and numbers in a reply are the same for any records whose number was declared alike."""
    first, *others = (make(table).train(1, 2.0) for table in (TABLE, *OTHERS))
    for other in others:
        assert first is not None and other is not None and first.told == other.told, f"{first} and {other}"


def a_measurement_is_noised_or_withheld(make: Make) -> None:
    """The same model measured twice gives two figures or none: an exact one would come again.

    Two noised histograms of eight cells are equal with a chance of 1e-7.
    """
    client = make(TABLE)
    first, second = client.measure(1), client.measure(2)
    assert first is None or first != second, f"{first} is exact"


def test_what_stands_beside_an_update_is_not_of_the_records(made: Open) -> None:
    what_stands_beside_an_update_is_not_of_the_records(made(BractSite))


def test_a_measurement_is_noised_or_withheld(made: Open) -> None:
    make = made(BractSite)
    a_measurement_is_noised_or_withheld(make)
    assert make(TABLE).measure(1) is not None, "it is noised here, not withheld"


def test_flower_sends_counts_and_metrics_beside_a_noised_update(made: Open) -> None:
    """Flower 1.41: the mod noises the arrays; `num-examples`, loss and accuracy pass it."""
    with pytest.raises(AssertionError, match="num-examples"):
        what_stands_beside_an_update_is_not_of_the_records(made(FlowerLocalDp))
    with pytest.raises(AssertionError, match="accuracy"):
        a_measurement_is_noised_or_withheld(made(FlowerLocalDp))


@pytest.mark.parametrize(("rounds", "shown"), [(3, 0.92), (100, 5.41)])
def test_the_reference_is_that_of_the_accountant_of_record(rounds: int, shown: float) -> None:
    """Two accountants agree on what an engine for each message hides: 0.61 is shown after any number of rounds."""
    steps = rounds * DECLARED // BATCH
    ours = accounting.epsilon(sampling_rate=BATCH / DECLARED, noise_multiplier=1.0, steps=steps, delta=DELTA)
    assert abs(ours - true_epsilon(rounds, 1.0)) < 6e-3
    assert math.floor(100 * ours) / 100 == shown
