"""A site's ledger: charged once and before, committed before it leaves, and no change of it goes unnoticed."""

from __future__ import annotations

import os
import random
import resource
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from bract.core.errors import BractError, InputError, Refusal
from bract.privacy.ledger.book import DataSetBudget, Request
from bract.privacy.ledger.chain import Head
from bract.privacy.ledger.events import Claimed, DiscreteLaplace, Event, Gaussian, Planned, RunPlan, SampledGaussian
from bract.privacy.ledger.ledger import Ledger

BUDGET = DataSetBudget(name="heart", unit="record", relation="zero-out", epsilon=1.0, delta=1e-5)
PURE = DiscreteLaplace(epsilon=0.125, relation="zero-out")


def plan_of(event: Event, times: int, *, phase: str = "train", digest: str = "plan") -> RunPlan:
    return RunPlan(digest=digest, events=(Planned(phase=phase, event=event, times=times),))


def request(number: int = 1, **changed: object) -> Request:
    """Return the request of round `number`; a pure event of an eighth of the budget, planned eight times."""
    asked = Request(
        data_set="heart",
        data_digest="data",
        run="run",
        plan=plan_of(PURE, 8),
        round=number,
        model_version=f"model {number}",
        phase="train",
        message_id=f"message {number}",
        message_digest=f"content {number}",
        event=PURE,
    )
    return replace(asked, **changed)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "site"


@pytest.fixture
def ledger(state: Path) -> Ledger:
    made = Ledger.create(state)
    made.declare(BUDGET)
    return made


def refused(code: str, call: Callable[[], object]) -> str:
    with pytest.raises(BractError) as raised:
        call()
    assert raised.value.code == code
    return raised.value.sentence


def answer(ledger: Ledger, asked: Request) -> bytes:
    """Answer a request as a client does: draw from the reservation's bytes, commit, and return what may leave."""
    reservation = ledger.reserve(asked)
    if reservation.reply is not None:
        return reservation.reply
    assert reservation.secret is not None
    return ledger.commit(reservation, b"noise " + reservation.key.stream().bytes(64))


# What exists, and who may read it.


def test_a_missing_ledger_is_a_refusal_and_never_a_fresh_budget(state: Path) -> None:
    with pytest.raises(Refusal) as raised:
        Ledger.open(state)
    assert (raised.value.code, raised.value.exit_status) == ("ledger-missing", 3)
    assert not state.exists()


def test_a_ledger_is_made_once_for_its_owner_alone(ledger: Ledger, state: Path) -> None:
    ledger.close()
    for name in ("ledger.key", "ledger.sqlite"):
        assert (state / name).stat().st_mode & 0o777 == 0o600
    before = (state / "ledger.key").read_bytes()
    with pytest.raises(InputError, match="already holds"):
        Ledger.create(state)
    (state / "ledger.sqlite").unlink()
    with pytest.raises(InputError, match=r"already holds ledger\.key"):
        Ledger.create(state)
    assert (state / "ledger.key").read_bytes() == before


def test_files_beside_the_ledger_are_for_its_owner_alone(ledger: Ledger, state: Path) -> None:
    ledger.reserve(request())
    assert {path.name: path.stat().st_mode & 0o077 for path in state.iterdir() if path.stat().st_mode & 0o077} == {}
    assert (state / "ledger.sqlite-wal").exists()


def test_a_key_that_others_may_read_or_that_is_gone_is_refused(ledger: Ledger, state: Path) -> None:
    (state / "ledger.key").chmod(0o640)
    assert "chmod 600" in refused("ledger-unreadable", lambda: Ledger.open(state))
    (state / "ledger.key").unlink()
    refused("ledger-unreadable", lambda: Ledger.open(state))
    (state / "ledger.key").write_bytes(b"short")
    refused("ledger-unreadable", lambda: Ledger.open(state))


# Reserve before, commit after.


def test_a_retry_after_a_crash_draws_the_same_bytes_and_is_charged_once(ledger: Ledger, state: Path) -> None:
    first = ledger.reserve(request())
    with Ledger.open(state) as again:
        second = again.reserve(request())
        assert (second.sequence, second.secret) == (first.sequence, first.secret)
        assert again.spending("heart").spent == 0.125
    assert first.secret is not None and len(first.secret) == 32


@pytest.mark.parametrize(
    "changed",
    [
        {"data_digest": "other data"},
        {"message_digest": "other content", "message_id": "another"},
        {"model_version": "another", "message_id": "another"},
        {"run": "another run"},
    ],
    ids=lambda each: next(iter(each)),
)
def test_any_other_request_draws_other_bytes_and_is_charged(ledger: Ledger, changed: dict[str, str]) -> None:
    ledger.declare(replace(BUDGET, epsilon=2.0))
    first, second = ledger.reserve(request()), ledger.reserve(request(**changed))
    assert first.sequence != second.sequence
    assert first.secret != second.secret
    assert ledger.spending("heart").spent == 0.25


def test_a_message_seen_twice_gets_its_stored_reply(ledger: Ledger, state: Path) -> None:
    reply = answer(ledger, request())
    head = ledger.head()
    assert answer(ledger, request()) == reply
    # Also where the data changed since: what left, left.
    assert answer(ledger, request(data_digest="other data")) == reply
    # And where the server sends the same content under a new id.
    assert answer(ledger, request(message_id="again")) == reply
    with Ledger.open(state) as opened:
        reservation = opened.reserve(request())
        assert (reservation.reply, reservation.secret) == (reply, None)
        with pytest.raises(ValueError, match="committed"):
            _ = reservation.key
    assert ledger.head() == head
    assert ledger.spending("heart").spent == 0.125


def test_the_same_message_id_with_other_content_is_refused(ledger: Ledger) -> None:
    ledger.reserve(request())
    refused("message-changed", lambda: ledger.reserve(request(message_digest="other content")))
    assert ledger.spending("heart").spent == 0.125


def test_only_the_first_reply_to_a_reservation_leaves(ledger: Ledger, state: Path) -> None:
    reservation = ledger.reserve(request())
    with Ledger.open(state) as other:
        same = other.reserve(request())
        assert ledger.commit(reservation, b"first") == b"first"
        assert other.commit(same, b"second") == b"first"
    assert [path.read_bytes() for path in (state / "replies").iterdir()] == [b"first"]
    assert ledger.verify() == []


def test_a_reservation_of_no_ledger_is_not_committed(ledger: Ledger) -> None:
    reservation = ledger.reserve(request())
    with pytest.raises(ValueError, match="none of this ledger"):
        ledger.commit(replace(reservation, sequence=99), b"reply")


def test_replies_are_kept_until_the_server_has_them(ledger: Ledger, state: Path) -> None:
    replies = [answer(ledger, request(number)) for number in (1, 2, 3)]
    abandoned = ledger.reserve(request(2, data_digest="other", message_id="other"))
    assert abandoned.secret is not None or abandoned.reply == replies[1]
    ledger.forget_replies("heart", "run", 2)
    assert [path.read_bytes() for path in (state / "replies").iterdir()] == [replies[2]]
    head = ledger.head()
    refused("reply-forgotten", lambda: ledger.reserve(request(1)))
    # Another message of such a round would be charged for a reply that nobody waits for.
    refused("reply-forgotten", lambda: ledger.reserve(request(2, message_id="new", message_digest="new")))
    assert ledger.head() == head
    assert answer(ledger, request(3)) == replies[2]
    assert ledger.verify() == []
    head = ledger.head()
    ledger.forget_replies("heart", "run", 1)
    assert ledger.head() == head


def test_a_server_can_have_forgotten_what_it_asked_and_nothing_else(ledger: Ledger, state: Path) -> None:
    ledger.declare(replace(BUDGET, name="lung"))
    of_lung = request(data_set="lung", run="other", message_id="l")
    heart, lung = answer(ledger, request()), answer(ledger, of_lung)
    head = ledger.head()
    for run in ("other", "none"):
        ledger.forget_replies("heart", run, 10**30)
    assert ledger.head() == head and len(list((state / "replies").iterdir())) == 2
    ledger.forget_replies("heart", "run", 10**30)
    refused("reply-forgotten", lambda: ledger.reserve(request()))
    assert answer(ledger, of_lung) == lung != heart
    # Rounds to come are none that the server can have.
    assert answer(ledger, request(2, message_id="next")) and ledger.verify() == []


def test_an_answered_message_that_asks_for_other_noise_gets_no_reply(ledger: Ledger) -> None:
    answer(ledger, request())
    refused("run-plan-changed", lambda: ledger.reserve(request(plan=plan_of(PURE, 9))))
    refused("run-plan-changed", lambda: ledger.reserve(request(event=replace(PURE, epsilon=5.0))))


def test_a_reply_that_is_late_for_the_server_does_not_leave(ledger: Ledger, state: Path) -> None:
    reservation = ledger.reserve(request())
    ledger.forget_replies("heart", "run", 1)
    refused("reply-forgotten", lambda: ledger.commit(reservation, b"late"))
    assert list((state / "replies").iterdir()) == []
    assert ledger.verify() == []


def test_a_lost_reply_is_refused_and_found(ledger: Ledger, state: Path) -> None:
    answer(ledger, request())
    (path,) = (state / "replies").iterdir()
    path.write_bytes(b"another")
    refused("ledger-unreadable", lambda: ledger.reserve(request()))
    assert [finding.what for finding in ledger.verify()] == ["its reply is lost or changed"]


def held(state: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(state.rglob("*")) if path.is_file())


def test_committed_secrets_are_in_no_file(ledger: Ledger, state: Path) -> None:
    ledger.declare(replace(BUDGET, epsilon=1000.0))
    plan = plan_of(PURE, 400)
    waiting = [ledger.reserve(request(number, plan=plan)) for number in range(200)]
    assert all(each.secret is not None and each.secret in held(state) for each in waiting)
    # In an order that makes SQLite move the rows that stay.
    random.Random(5).shuffle(waiting)
    for done, each in enumerate(waiting):
        ledger.commit(each, b"reply")
        if done % 50 == 0:
            everything = held(state)
            assert not any(gone.secret in everything for gone in waiting[: done + 1] if gone.secret)
            assert all(kept.secret in everything for kept in waiting[done + 1 :] if kept.secret)
    everything = held(state)
    assert not any(each.secret in everything for each in waiting if each.secret)


def test_what_a_killed_process_left_in_the_log_is_wiped_when_the_ledger_is_opened(state: Path) -> None:
    Ledger.create(state).close()
    program = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from bract.privacy.ledger import store
from bract.privacy.ledger.ledger import Ledger
from pathlib import Path
from test_ledger import BUDGET, request
ledger = Ledger.open(Path({str(state)!r}))
ledger.declare(BUDGET)
reservation = ledger.reserve(request())
store.checkpoint = lambda connection: None
ledger.commit(reservation, b"reply")
sys.stdout.buffer.write(reservation.secret)
sys.stdout.flush()
os.kill(os.getpid(), 9)
"""
    secret = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60).stdout
    assert len(secret) == 32
    assert secret in held(state)
    opened = Ledger.open(state)
    assert secret not in held(state)
    assert opened.verify() == []


# Budgets and plans.


def test_a_changed_data_digest_goes_on_spending_the_same_budget(ledger: Ledger) -> None:
    for number in range(8):
        answer(ledger, request(number, data_digest=f"version {number}"))
    said = refused("budget-exhausted", lambda: ledger.reserve(request(8, data_digest="fresh")))
    assert said.startswith("heart: the next round of run run would exceed its budget of epsilon 1 ")
    refused("budget-exhausted", lambda: ledger.reserve(request(8, run="fresh", plan=plan_of(PURE, 1))))
    assert ledger.spending("heart").left < 0.01


def test_a_run_that_could_not_end_does_not_start_and_charges_nothing(ledger: Ledger) -> None:
    head = ledger.head()
    refused("budget-exhausted", lambda: ledger.reserve(request(plan=plan_of(PURE, 9))))
    assert ledger.spending("heart").spent == 0
    assert ledger.head() == head


def test_an_abandoned_run_costs_what_it_drew(ledger: Ledger) -> None:
    answer(ledger, request())
    answer(ledger, request(run="second", plan=plan_of(PURE, 7)))
    assert ledger.spending("heart").spent == 0.25


@pytest.mark.parametrize(
    "changed",
    [
        {"plan": plan_of(PURE, 7)},
        {"plan": plan_of(PURE, 8, digest="another clip")},
        {"plan": plan_of(replace(PURE, epsilon=0.1), 8), "event": replace(PURE, epsilon=0.1)},
        {"event": replace(PURE, epsilon=0.1)},
        {"phase": "evaluate"},
    ],
    ids=["rounds", "clip", "noise", "another event", "another phase"],
)
def test_a_plan_is_fixed_at_the_first_reservation(ledger: Ledger, changed: dict[str, object]) -> None:
    ledger.reserve(request(1))
    refused("run-plan-changed", lambda: ledger.reserve(request(2, **changed)))
    assert ledger.spending("heart").spent == 0.125
    ledger.reserve(request(2))


def test_a_data_set_without_a_budget_is_refused(ledger: Ledger) -> None:
    refused("ledger-budget", lambda: ledger.reserve(request(data_set="lungs")))
    refused("ledger-budget", lambda: ledger.spending("lungs"))


def test_a_budget_has_one_neighbouring_relation(ledger: Ledger) -> None:
    other = replace(PURE, relation="replace-one")
    refused("ledger-budget", lambda: ledger.reserve(request(event=other, plan=plan_of(other, 1))))
    # Before anything is drawn the owner may think again.
    ledger.declare(replace(BUDGET, relation="replace-one"))
    ledger.reserve(request(event=other, plan=plan_of(other, 1)))
    for changed in (BUDGET, replace(BUDGET, relation="replace-one", unit="client")):
        refused("ledger-budget", lambda changed=changed: ledger.declare(changed))


def test_a_budget_may_fall_and_rise_and_each_change_is_an_entry(ledger: Ledger) -> None:
    first = ledger.head().sequence
    ledger.declare(BUDGET)
    assert ledger.head().sequence == first
    answer(ledger, request(1))
    answer(ledger, request(2))
    before = ledger.head().sequence
    ledger.declare(replace(BUDGET, epsilon=0.25))
    refused("budget-exhausted", lambda: ledger.reserve(request(3)))
    ledger.declare(replace(BUDGET, epsilon=0.1))
    assert (ledger.spending("heart").spent, ledger.spending("heart").left) == (0.25, 0)
    ledger.declare(BUDGET)
    assert ledger.head().sequence == before + 3
    ledger.reserve(request(3))


def test_train_and_test_records_are_counted_apart_and_the_largest_counts(ledger: Ledger) -> None:
    train = replace(PURE, epsilon=0.25, part="train")
    plan = RunPlan(
        digest="both",
        events=(Planned(phase="train", event=train, times=4), Planned(phase="evaluate", event=PURE, times=8)),
    )
    for number in range(4):
        answer(ledger, request(number, plan=plan, event=train))
        answer(ledger, request(100 + number, plan=plan, event=PURE, phase="evaluate"))
    spending = ledger.spending("heart")
    assert {part: figure.epsilon for part, figure in spending.parts.items()} == {"train": 1.0, "test": 0.5}
    assert spending.spent == 1.0
    assert spending.counted == "test: sum; train: sum"


def test_once_the_data_or_their_split_changed_train_and_test_count_together(ledger: Ledger) -> None:
    train = replace(PURE, epsilon=0.25, part="train")
    plan = RunPlan(digest="train", events=(Planned(phase="train", event=train, times=2),))
    for number in range(2):
        answer(ledger, request(number, plan=plan, event=train))
    # A record of the training may now be one of the test: a fold that moved, say.
    changed = {"run": "later", "phase": "evaluate", "event": PURE, "data_digest": "another split"}
    longer = RunPlan(digest="longer", events=(Planned(phase="evaluate", event=PURE, times=5),))
    later = RunPlan(digest="later", events=(Planned(phase="evaluate", event=PURE, times=4),))
    refused("budget-exhausted", lambda: ledger.reserve(request(100, plan=longer, **changed)))
    assert ledger.spending("heart").spent == 0.5
    for number in range(4):
        answer(ledger, request(101 + number, plan=later, **changed))
    assert ledger.spending("heart").spent == 1.0
    assert ledger.spending("heart").counted.startswith("train and test together")


def test_what_a_server_claims_is_counted_once_a_run_and_marked(ledger: Ledger) -> None:
    claim = Claimed(epsilon=0.4, delta=1e-6, relation="zero-out")
    for number in range(5):
        answer(ledger, request(number, event=claim, plan=plan_of(claim, 5)))
    assert ledger.spending("heart").spent == 0.4
    answer(ledger, request(run="second", event=claim, plan=plan_of(claim, 5)))
    spending = ledger.spending("heart")
    assert spending.spent == 0.8
    assert spending.claimed and spending.to_dict()["claimed"]
    assert spending.shown["spent"] == "0.8 (claimed)"
    assert spending.counted.startswith("claimed by the server")
    refused("budget-exhausted", lambda: ledger.reserve(request(run="third", event=claim, plan=plan_of(claim, 5))))
    refused("ledger-budget", lambda: ledger.reserve(request(run="own noise")))


def test_sampled_and_plain_gaussian_runs_share_one_budget(ledger: Ledger) -> None:
    ledger.declare(replace(BUDGET, epsilon=3.0))
    sampled = SampledGaussian(sampling_rate=0.1, noise_multiplier=4.0, steps=10, relation="zero-out", delta=1e-5)
    plain = Gaussian(noise_multiplier=20.0, steps=1, relation="zero-out", delta=1e-5)
    for number in range(3):
        answer(ledger, request(number, event=sampled, plan=plan_of(sampled, 20)))
    alone = ledger.spending("heart")
    assert alone.counted == "train: PLD"
    answer(ledger, request(run="second", event=plain, plan=plan_of(plain, 2)))
    both = ledger.spending("heart")
    assert both.counted == "train: RDP filter"
    assert alone.spent < both.spent < 3.0
    nothing = replace(plain, noise_multiplier=0.0)
    refused("budget-exhausted", lambda: ledger.reserve(request(run="bare", event=nothing, plan=plan_of(nothing, 1))))


RACER = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from bract.core.errors import Refusal
from bract.privacy.ledger.ledger import Ledger
from test_ledger import request
name, count = sys.argv[2], 0
with Ledger.open(Path(sys.argv[1])) as ledger:
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        while True:
            ledger.commit(ledger.reserve(request(count, run=name)), name.encode())
            count += 1
            # So that the other has a turn on any machine.
            time.sleep(0.001)
    except Refusal as refusal:
        print(refusal.code, count)
"""


def test_two_processes_cannot_overspend_together(ledger: Ledger, state: Path) -> None:
    ledger.declare(replace(BUDGET, epsilon=12.5, delta=1e-300))
    racers = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                RACER.replace("request(count", "request(count, plan=PLAN").replace(
                    "import request", "import request, plan_of, PURE\nPLAN = plan_of(PURE, 60)"
                ),
                state,
                name,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two")
    ]
    for racer in racers:
        assert racer.stdout is not None and racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("\n")
        racer.stdin.flush()
    ended = [racer.communicate(timeout=60)[0].split() for racer in racers]
    assert [code for code, _ in ended] == ["budget-exhausted"] * 2
    counts = [int(count) for _, count in ended]
    assert sum(counts) == 100
    assert min(counts) > 0
    assert ledger.spending("heart").spent == 12.5
    assert ledger.verify() == []


def test_threads_of_one_process_share_a_ledger(ledger: Ledger) -> None:
    replies: list[bytes] = []
    threads = [
        threading.Thread(target=lambda number=number: replies.append(answer(ledger, request(number % 4))))
        for number in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(replies) == 12
    assert len(set(replies)) == 4
    assert ledger.spending("heart").spent == 0.5
    assert ledger.verify() == []


# What was changed is found.


def changed_event(rows: sqlite3.Connection) -> None:
    rows.execute("UPDATE entries SET body = replace(body, '0.125', '0.025') WHERE sequence = 4")


def removed_row(rows: sqlite3.Connection) -> None:
    rows.execute("DELETE FROM entries WHERE sequence = 4")


def removed_and_renumbered(rows: sqlite3.Connection) -> None:
    rows.execute("DELETE FROM entries WHERE sequence = 4")
    for sequence in range(5, 9):
        rows.execute("UPDATE entries SET sequence = ? WHERE sequence = ?", (sequence - 1, sequence))
    rows.execute("UPDATE seal SET sequence = 7")


def swapped_rows(rows: sqlite3.Connection) -> None:
    for old, new in ((4, 99), (6, 4), (99, 6)):
        rows.execute("UPDATE entries SET sequence = ? WHERE sequence = ?", (new, old))


def cut_tail(rows: sqlite3.Connection) -> None:
    rows.execute("DELETE FROM entries WHERE sequence > 6")


def cut_tail_and_number(rows: sqlite3.Connection) -> None:
    rows.execute("DELETE FROM entries WHERE sequence > 6")
    rows.execute("UPDATE seal SET sequence = 6")


def cut_tail_with_its_mac(rows: sqlite3.Connection) -> None:
    rows.execute("DELETE FROM entries WHERE sequence > 6")
    rows.execute("UPDATE seal SET sequence = 6, mac = (SELECT mac FROM entries WHERE sequence = 6)")


def emptied(rows: sqlite3.Connection) -> None:
    rows.execute("DELETE FROM entries")


def inserted_row(rows: sqlite3.Connection) -> None:
    rows.execute("INSERT INTO entries SELECT 9, kind, body, mac FROM entries WHERE sequence = 4")


def inserted_row_and_number(rows: sqlite3.Connection) -> None:
    inserted_row(rows)
    rows.execute("UPDATE seal SET sequence = 9")


def changed_budget(rows: sqlite3.Connection) -> None:
    rows.execute("UPDATE entries SET body = replace(body, '\"epsilon\":1.0', '\"epsilon\":9.0') WHERE sequence = 2")


def changed_kind(rows: sqlite3.Connection) -> None:
    # An entry that charges becomes one that says nothing.
    rows.execute("UPDATE entries SET kind = 'init' WHERE sequence = 8")


def changed_mac(rows: sqlite3.Connection) -> None:
    rows.execute("UPDATE entries SET mac = zeroblob(32) WHERE sequence = 8")


def removed_seal(rows: sqlite3.Connection) -> None:
    rows.execute("DELETE FROM seal")


CHANGES = (
    changed_event,
    removed_row,
    removed_and_renumbered,
    swapped_rows,
    cut_tail,
    cut_tail_and_number,
    cut_tail_with_its_mac,
    emptied,
    inserted_row,
    inserted_row_and_number,
    changed_budget,
    changed_kind,
    changed_mac,
    removed_seal,
)


@pytest.mark.parametrize("running", [False, True], ids=["reopened", "running"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda each: each.__name__)
def test_every_change_is_found_and_stops_the_site(
    change: Callable[[sqlite3.Connection], None], running: bool, ledger: Ledger, state: Path
) -> None:
    # Entries: 1 init, 2 budget, 3 plan, then 4, 6, 8 reserve and 5, 7 commit.
    for number in (1, 2):
        answer(ledger, request(number))
    ledger.reserve(request(3))
    assert ledger.head().sequence == 8
    assert ledger.verify() == []
    if not running:
        ledger.close()
    with sqlite3.connect(state / "ledger.sqlite") as rows:
        change(rows)
        assert rows.total_changes
    rows.close()
    opened = ledger if running else Ledger.open(state)
    assert opened.verify()
    # A process that has read the entries needs only the latest to be as it knew them: what it decides on is in memory.
    if not running or change in (cut_tail, cut_tail_and_number, cut_tail_with_its_mac, emptied, changed_mac):
        refused("ledger-tampered", lambda: opened.reserve(request(4)))
        refused("ledger-tampered", opened.head)
        refused("ledger-tampered", lambda: opened.spending("heart"))


def test_an_entry_of_a_copy_does_not_fit_into_another_chain(ledger: Ledger, state: Path, tmp_path: Path) -> None:
    shutil.copytree(state, tmp_path / "copy")
    with Ledger.open(tmp_path / "copy") as copy:
        cheap = replace(PURE, epsilon=0.001)
        copy.declare(replace(BUDGET, epsilon=0.5))
        copy.reserve(request(1, event=cheap, plan=plan_of(cheap, 8)))
    ledger.declare(replace(BUDGET, epsilon=2.0))
    ledger.reserve(request(1))
    assert ledger.head().sequence == 5
    ledger.reserve(request(2))
    ledger.close()
    # Number, key and MAC are genuine; only the predecessor differs.
    with sqlite3.connect(state / "ledger.sqlite") as rows:
        rows.execute("ATTACH ? AS copy", (str(tmp_path / "copy" / "ledger.sqlite"),))
        rows.execute("INSERT OR REPLACE INTO entries SELECT * FROM copy.entries WHERE sequence = 5")
    rows.close()
    with Ledger.open(state) as opened:
        assert 5 in [finding.sequence for finding in opened.verify()]
        refused("ledger-tampered", opened.head)


def test_a_replaced_secret_is_found_and_not_drawn_from(ledger: Ledger, state: Path) -> None:
    ledger.reserve(request())
    with sqlite3.connect(state / "ledger.sqlite") as rows:
        rows.execute("UPDATE secrets SET secret = zeroblob(32)")
    rows.close()
    refused("ledger-tampered", lambda: ledger.reserve(request()))
    assert [finding.what for finding in ledger.verify()] == ["its secret bytes are lost or changed"]


def test_a_ledger_under_another_key_does_not_fit(ledger: Ledger, state: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    Ledger.create(other).close()
    ledger.close()
    shutil.copy(other / "ledger.key", state / "ledger.key")
    with Ledger.open(state) as opened:
        assert opened.verify()
        refused("ledger-tampered", opened.head)


def test_an_older_copy_is_refused_by_what_the_server_has_seen(ledger: Ledger, state: Path, tmp_path: Path) -> None:
    answer(ledger, request(1))
    seen = [ledger.head()]
    ledger.close()
    shutil.copytree(state, tmp_path / "backup")
    with Ledger.open(state) as opened:
        answer(opened, request(2))
        seen.append(opened.head())
        for head in seen:
            opened.refuse_rollback(head)
            opened.refuse_rollback(Head.from_dict(head.to_dict()))
    # The copy by itself is whole; only the server's memory tells that it is old.
    with Ledger.open(tmp_path / "backup") as restored:
        assert restored.verify() == []
        restored.refuse_rollback(seen[0])
        assert "has seen entry" in refused("ledger-rolled-back", lambda: restored.refuse_rollback(seen[1]))
        # Gone on from the copy, it has as many entries, but others.
        answer(restored, request(3))
        assert restored.head().sequence == seen[1].sequence
        refused("ledger-rolled-back", lambda: restored.refuse_rollback(seen[1]))
    fresh = Ledger.create(tmp_path / "fresh")
    refused("ledger-rolled-back", lambda: fresh.refuse_rollback(seen[0]))
    refused("ledger-rolled-back", lambda: fresh.refuse_rollback(Head(sequence=1, mac=seen[0].mac)))
    for number in (2**63, 2**200, -(2**63) - 1):
        refused("ledger-rolled-back", lambda number=number: fresh.refuse_rollback(Head(sequence=number, mac="00")))


# Where it cannot write, nothing is trained.


@pytest.mark.parametrize(
    "content", [b"", b"no database at all, but a text\n" * 400, None], ids=["empty", "text", "sqlite"]
)
def test_a_file_that_is_no_ledger_is_refused_and_left_alone(content: bytes | None, ledger: Ledger, state: Path) -> None:
    ledger.close()
    path = state / "ledger.sqlite"
    path.unlink()
    if content is None:
        with sqlite3.connect(path) as other:
            other.execute("CREATE TABLE accounts (name)")
        other.close()
    else:
        path.write_bytes(content)
    before = path.read_bytes()
    refused("ledger-unreadable", lambda: Ledger.open(state))
    assert path.read_bytes() == before


def test_a_torn_page_is_refused(ledger: Ledger, state: Path) -> None:
    for number in range(8):
        answer(ledger, request(number))
    ledger.close()
    raw = bytearray((state / "ledger.sqlite").read_bytes())
    raw[4096:] = os.urandom(len(raw) - 4096)
    (state / "ledger.sqlite").write_bytes(raw)

    def use() -> None:
        with Ledger.open(state) as opened:
            opened.reserve(request(9))

    with pytest.raises(Refusal) as raised:
        use()
    assert raised.value.code in ("ledger-unreadable", "ledger-tampered")


def test_a_full_database_refuses_and_charges_nothing(ledger: Ledger) -> None:
    ledger.declare(replace(BUDGET, epsilon=1000.0))
    plan = plan_of(PURE, 1000)
    ((pages,),) = ledger._connection.execute("PRAGMA page_count").fetchall()
    ledger._connection.execute(f"PRAGMA max_page_count = {pages + 3}")
    left = 0
    with pytest.raises(Refusal) as raised:
        while True:
            answer(ledger, request(left, plan=plan))
            left += 1
    assert raised.value.code == "ledger-unwritable"
    assert left > 3
    assert ledger.verify() == []
    assert left <= ledger.spending("heart").reservations <= left + 1
    ledger._connection.execute("PRAGMA max_page_count = 100000")
    answer(ledger, request(left, plan=plan))
    assert ledger.spending("heart").reservations == left + 1


def in_a_child(work: Callable[[], None]) -> str:
    """Run in a forked child what limits its process, and return the code of the Refusal that it ended with."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work()
            os.write(write, b"nothing was refused")
        except BractError as error:
            os.write(write, error.code.encode())
        except BaseException as error:
            os.write(write, repr(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as said:
        code = said.read()
    os.waitpid(child, 0)
    return code


def test_a_disk_that_takes_no_more_refuses_and_charges_nothing(ledger: Ledger, state: Path) -> None:
    answer(ledger, request(1))
    before, largest = ledger.head(), (state / "ledger.sqlite").stat().st_size
    ledger.close()

    def reserve_without_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        Ledger.open(state).reserve(request(2))

    def commit_without_room() -> None:
        opened = Ledger.open(state)
        reservation = opened.reserve(request(2))
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        opened.commit(reservation, bytes(10_000))

    assert largest > 4096
    assert in_a_child(reserve_without_room) == "ledger-unwritable"
    with Ledger.open(state) as opened:
        assert opened.head() == before
    assert in_a_child(commit_without_room) == "ledger-unwritable"
    with Ledger.open(state) as opened:
        # Charged, but not committed: nothing left the site, and no half-written reply stays behind.
        assert opened.head().sequence == before.sequence + 1
        assert opened.verify() == []
        assert len(list((state / "replies").iterdir())) == 1
        assert len(answer(opened, request(2))) == 70


def test_a_file_that_may_not_be_written_refuses(ledger: Ledger, tmp_path: Path) -> None:
    ledger.close()
    state = tmp_path / "site"
    nobody = 65534

    def reserve_as_nobody() -> None:
        if os.getuid() == 0:
            os.setgid(nobody)
            os.setuid(nobody)
        # Relative: the folders above belong to someone else.
        Ledger.open(Path(".")).reserve(request())

    if os.getuid() == 0:
        for path in (state, *state.iterdir()):
            os.chown(path, nobody, nobody)
    (state / "ledger.sqlite").chmod(0o400)
    here = os.getcwd()
    os.chdir(state)
    try:
        assert in_a_child(reserve_as_nobody) == "ledger-unwritable"
        state.chmod(0o500)
        assert in_a_child(reserve_as_nobody) == "ledger-unwritable"
    finally:
        os.chdir(here)
        state.chmod(0o700)


def test_a_ledger_imports_nothing_heavy_for_pure_events(state: Path) -> None:
    Ledger.create(state).close()
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from bract.privacy.ledger.book import DataSetBudget, Request
from bract.privacy.ledger.events import DiscreteLaplace, Planned, RunPlan
from bract.privacy.ledger.ledger import Ledger
event = DiscreteLaplace(epsilon=0.1, relation="zero-out")
plan = RunPlan(digest="", events=(Planned(phase="train", event=event, times=5),))
with Ledger.open(Path({str(state)!r})) as ledger:
    ledger.declare(DataSetBudget(name="a", unit="record", relation="zero-out", epsilon=1.0, delta=1e-5))
    ledger.commit(ledger.reserve(Request(data_set="a", data_digest="", run="", plan=plan, round=1, model_version="",
        phase="train", message_id="", message_digest="", event=event)), b"")
    assert ledger.spending("a").spent == 0.1
print(*sorted({{name.partition(".")[0] for name in sys.modules}}))
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    imported = set(ended.stdout.split())
    assert "sqlite3" in imported
    assert not imported & {"numpy", "scipy", "dp_accounting", "torch", "flwr", "opacus", "cryptography", "pydantic"}


def test_the_clock_of_entries_is_an_argument(state: Path) -> None:
    ledger = Ledger.create(state, clock=lambda: 1_000_000_000.0)
    with sqlite3.connect(state / "ledger.sqlite") as rows:
        ((body,),) = rows.execute("SELECT body FROM entries").fetchall()
    rows.close()
    assert '"time":"2001-09-09T01:46:40+00:00"' in body
    ledger.close()
