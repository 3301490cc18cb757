"""`bract ledger`: makes a ledger, shows what is spent and left, and finds what was changed."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from bract.cli.main import main
from bract.privacy.ledger.book import DataSetBudget, Request
from bract.privacy.ledger.events import Claimed, DiscreteLaplace, Event, Planned, RunPlan
from bract.privacy.ledger.ledger import Ledger


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(each) for each in arguments])
    shown = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, shown.out, shown.err


def draw(ledger: Ledger, data_set: str, event: Event, times: int) -> None:
    plan = RunPlan(digest="plan", events=(Planned(phase="train", event=event, times=times),))
    for number in range(times):
        reservation = ledger.reserve(
            Request(
                data_set=data_set,
                data_digest="data",
                run="run",
                plan=plan,
                round=number,
                model_version=str(number),
                phase="train",
                message_id=str(number),
                message_digest=str(number),
                event=event,
            )
        )
        ledger.commit(reservation, b"reply")


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """Return a ledger with an enforced, a claimed and an untouched data set."""
    made = tmp_path / "site"
    with Ledger.create(made) as ledger:
        for name in ("heart", "phones", "untouched"):
            unit = "client" if name == "phones" else "record"
            ledger.declare(DataSetBudget(name=name, unit=unit, relation="zero-out", epsilon=2.0, delta=1e-5))
        draw(ledger, "heart", DiscreteLaplace(epsilon=0.5, relation="zero-out"), 3)
        draw(ledger, "phones", Claimed(epsilon=1.25, delta=1e-6, relation="zero-out"), 2)
    return made


def test_init_makes_a_ledger_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, shown, _ = run(capsys, "ledger", "init", tmp_path / "site", "--json")
    assert status == 0
    assert json.loads(shown)["head"]["sequence"] == 1
    with Ledger.open(tmp_path / "site") as opened:
        assert opened.head().to_dict() == json.loads(shown)["head"]
    status, shown, said = run(capsys, "ledger", "init", tmp_path / "site")
    assert (status, shown) == (2, "")
    assert "ledger-exists" in said


@pytest.mark.parametrize("action", ["show", "verify"])
def test_a_missing_ledger_is_refused_with_status_3(
    action: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, shown, said = run(capsys, "ledger", action, tmp_path / "nowhere", "--json")
    assert status == 3
    assert json.loads(shown)["error"]["code"] == "ledger-missing"
    assert "bract ledger init" in said
    assert not (tmp_path / "nowhere").exists()


def test_show_prints_spent_and_left_of_each_data_set(
    state: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    status, shown, _ = run(capsys, "ledger", "show", state)
    assert status == 0
    head, heart, phones, untouched = [line.split("  ") for line in shown.splitlines()]
    cells = {row[0]: [cell.strip() for cell in row if cell.strip()] for row in (head, heart, phones, untouched)}
    assert cells["DATA SET"][:4] == ["DATA SET", "SPENT", "LEFT", "BUDGET"]
    assert cells["heart"] == ["heart", "1.5", "0.5", "2", "1e-05", "record", "zero-out", "1", "test: sum"]
    assert cells["phones"][1:3] == ["1.25 (claimed)", "0.75 (claimed)"]
    assert cells["phones"][-1] == "claimed by the server, not checked"
    assert cells["untouched"][1:3] == ["0", "2"]


def test_json_holds_what_the_table_says(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, shown, _ = run(capsys, "ledger", "show", state, "--json")
    told = json.loads(shown)
    sets = {each["data_set"]: each for each in told["data_sets"]}
    assert {name: (each["spent"], each["left"], each["claimed"]) for name, each in sets.items()} == {
        "heart": (1.5, 0.5, False),
        "phones": (1.25, 0.75, True),
        "untouched": (0.0, 2.0, False),
    }
    assert sets["heart"]["parts"] == {"test": {"epsilon": 1.5, "method": "sum"}}
    assert sets["heart"]["unit"] == "record"


def test_a_budget_that_fell_below_its_claims_is_still_shown(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Ledger.open(state) as ledger:
        ledger.declare(DataSetBudget(name="phones", unit="client", relation="zero-out", epsilon=2.0, delta=1e-9))
    status, shown, _ = run(capsys, "ledger", "show", state, "--json")
    assert status == 0
    (phones,) = [each for each in json.loads(shown)["data_sets"] if each["data_set"] == "phones"]
    assert (phones["spent"], phones["left"]) == (None, 0)
    assert "more than the budget (claimed)" in run(capsys, "ledger", "show", state)[1]


def test_verify_says_that_a_chain_is_whole_or_where_it_is_not(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, shown, _ = run(capsys, "ledger", "verify", state)
    assert status == 0
    assert "entries, and the chain is whole" in shown
    with sqlite3.connect(state / "ledger.sqlite") as rows:
        rows.execute("UPDATE entries SET body = replace(body, '0.5', '0.1') WHERE sequence = 6")
    rows.close()
    status, shown, said = run(capsys, "ledger", "verify", state)
    assert (status, shown) == (3, "")
    assert "entry 6: its MAC does not fit" in said
    status, shown, _ = run(capsys, "ledger", "verify", state, "--json")
    told = json.loads(shown)
    assert (status, told["status"]) == (3, "refused")
    assert [each["sequence"] for each in told["findings"]] == [6]
    status, _, said = run(capsys, "ledger", "show", state)
    assert status == 3
    assert "ledger-tampered" in said


@pytest.mark.parametrize("action", ["init", "show", "verify", "--help"])
def test_the_ledger_commands_import_nothing_heavy(action: str, state: Path, tmp_path: Path) -> None:
    program = """
import sys
from bract.cli.main import main
try:
    main(sys.argv[1:])
finally:
    print(*sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""
    where = [str(tmp_path / "new" if action == "init" else state)] if action != "--help" else []
    ended = subprocess.run(
        [sys.executable, "-c", program, "ledger", action, *where], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 0, ended.stderr
    imported = set(ended.stderr.split())
    assert "bract" in imported
    assert not imported & {"torch", "flwr", "opacus", "sklearn", "matplotlib", "numpy", "scipy", "dp_accounting"}


def test_a_copied_ledger_shows_the_same(state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(state, tmp_path / "copy")
    first = run(capsys, "ledger", "show", state)[1]
    assert run(capsys, "ledger", "show", tmp_path / "copy")[1] == first
