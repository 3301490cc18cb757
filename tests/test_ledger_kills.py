"""A site that is killed at any moment has spent no less than what left it; a message has one noise and one reply."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from bract.privacy.ledger.composition import composed
from bract.privacy.ledger.events import DiscreteLaplace
from bract.privacy.ledger.ledger import Ledger

KILLS = 200

# One process that imports the ledger once, and forks a site again and again to kill it after a moment. What a site
# draws is logged before it commits, and what leaves it is logged after: a line each, by one write.
NURSERY = """
import hashlib, json, os, random, signal, sys, time
from pathlib import Path
from bract.core.errors import Refusal
from bract.privacy.ledger.book import DataSetBudget, Request
from bract.privacy.ledger.events import DiscreteLaplace, Planned, RunPlan
from bract.privacy.ledger.ledger import Ledger

state, kills = Path(sys.argv[1]), int(sys.argv[2])
event = DiscreteLaplace(epsilon=0.01, relation="zero-out")
plan = RunPlan(digest="plan", events=(Planned(phase="train", event=event, times=100_000),))
chance = random.Random(11)


def log(state, name, value):
    handle = os.open(state / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(handle, (json.dumps(value) + "\\n").encode())
    os.close(handle)


def live(turn, state, ready, messages=10**9):
    ledger = Ledger.open(state)
    ready()
    # A restarted site hears the message again that it did not answer, or one whose data changed meanwhile.
    number = sum(1 for _ in open(state / "left")) if (state / "left").exists() else 0
    for number in range(number, number + messages):
        data = "data" if turn % 5 else f"data {turn}"
        asked = Request(
            data_set="heart", data_digest=data, run="run", plan=plan, round=number, model_version=str(number),
            phase="train", message_id=f"m{number}", message_digest=f"content {number}", event=event,
        )
        reservation = ledger.reserve(asked)
        if reservation.reply is None:
            secret = hashlib.sha256(reservation.secret).hexdigest()
            log(state, "drawn", [number, data, reservation.sequence, secret])
            reply = ledger.commit(reservation, f"{number} {data} {secret}".encode())
        else:
            reply = reservation.reply
        log(state, "left", [number, reservation.sequence, reply.decode()])
        if number % 40 == 39:
            ledger.forget_replies("heart", "run", number - 20)


def create(state):
    with Ledger.create(state) as made:
        made.declare(DataSetBudget(name="heart", unit="record", relation="zero-out", epsilon=10_000.0, delta=1e-300))


# What one message takes here, so that kills come within the first few on any machine.
probe = state.with_name("probe")
create(probe)
start = time.perf_counter()
live(1, probe, lambda: None, messages=10)
message = (time.perf_counter() - start) / 10
create(state)
for turn in range(kills):
    heard, told = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            live(turn, state, lambda: os.write(told, b"!"))
        except BaseException as error:
            log(state, "failed", repr(error))
        os._exit(1)
    os.close(told)
    os.read(heard, 1)
    os.close(heard)
    time.sleep(chance.uniform(0, 5 * message))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    log(state, "ended", os.WTERMSIG(status) if os.WIFSIGNALED(status) else "by itself")
print(*sorted({name.partition(".")[0] for name in sys.modules} & {"numpy", "torch", "dp_accounting", "scipy"}))
"""


def lines(path: Path) -> list[list[object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the state of a site that was killed 200 times."""
    state = tmp_path_factory.mktemp("kills") / "site"
    ended = subprocess.run(
        [sys.executable, "-c", NURSERY, str(state), str(KILLS)], capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == []
    assert not (state / "failed").exists(), (state / "failed").read_text()
    assert lines(state / "ended") == [9] * KILLS
    return state


def test_the_kills_came_at_every_moment(killed: Path) -> None:
    with Ledger.open(killed) as ledger:
        book = ledger._book if ledger.head() else None
        assert book is not None
        drawn, left = lines(killed / "drawn"), lines(killed / "left")
        retried = [sequence for _, _, sequence, _ in drawn]
        # Some died between reservation and commit and went on, some never answered, some after the commit.
        assert len(retried) > len(set(retried))
        assert set(book.reserved) - set(book.replies)
        assert len(left) > 50


def test_spent_is_never_under_what_left_and_every_reply_that_left_is_committed(killed: Path) -> None:
    with Ledger.open(killed) as ledger:
        assert ledger.verify() == []
        book = ledger._book if ledger.head() else None
        assert book is not None
        left = lines(killed / "left")
        answered = {sequence for _, sequence, _ in left}
        assert answered <= set(book.replies)
        for _, sequence, reply in left:
            assert hashlib.sha256(str(reply).encode()).hexdigest() == book.replies[int(str(sequence))]
        spending = ledger.spending("heart")
        event = DiscreteLaplace(epsilon=0.01, relation="zero-out")
        assert spending.reservations >= len(answered)
        assert spending.spent >= composed({event: len(answered)}, 1e-300).epsilon > 0
        # And no more than one charge for each message and each content of the data.
        drawn = lines(killed / "drawn")
        assert spending.reservations <= len({(number, data) for number, data, _, _ in drawn}) + KILLS


def test_a_message_draws_one_noise_and_gets_one_reply(killed: Path) -> None:
    noises, replies = defaultdict(set), defaultdict(set)
    owners = defaultdict(set)
    for number, data, sequence, secret in lines(killed / "drawn"):
        noises[number, data].add((sequence, secret))
        owners[secret].add((number, data))
    assert {len(each) for each in noises.values()} == {1}
    assert {len(each) for each in owners.values()} == {1}
    for number, _, reply in lines(killed / "left"):
        replies[number].add(reply)
    assert {len(each) for each in replies.values()} == {1}
