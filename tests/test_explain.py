"""`bract explain` knows every error code, and every code that bract raises is one of them."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

import bract
from bract.cli.main import main
from bract.core.errors import CATALOGUE

ROOT = Path(bract.__file__).parent


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    shown = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, shown.out, shown.err


@pytest.mark.parametrize("code", CATALOGUE)
def test_every_code_is_explained(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    exit_status, shown, _ = run(capsys, "explain", code)
    assert exit_status == 0
    words = " ".join(shown.split())
    assert words == f"{code} meaning {CATALOGUE[code].meaning} mend {CATALOGUE[code].mend}"


def test_without_a_code_all_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    exit_status, shown, _ = run(capsys, "explain")
    assert exit_status == 0
    assert [line.split()[0] for line in shown.splitlines()[1:] if not line.startswith(" ")] == list(CATALOGUE)


def test_json_holds_what_the_table_says(capsys: pytest.CaptureFixture[str]) -> None:
    _, shown, _ = run(capsys, "explain", "--json")
    assert set(json.loads(shown)["codes"]) == set(CATALOGUE)
    _, shown, _ = run(capsys, "explain", "--json", "internal")
    assert json.loads(shown)["mend"] == CATALOGUE["internal"].mend


def test_a_misspelt_code_is_told_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    exit_status, shown, said = run(capsys, "explain", "run-mising")
    assert (exit_status, shown) == (2, "")
    assert "did you mean run-missing?" in said


def raised_codes(source: str) -> set[str]:
    """Return the codes that a module gives to InputError, Refusal and RunError."""
    return {
        call.args[0].value
        for call in ast.walk(ast.parse(source))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Name)
        and call.func.id in ("InputError", "Refusal", "RunError", "BractError")
        and call.args
        and isinstance(call.args[0], ast.Constant)
        and isinstance(call.args[0].value, str)
    }


def test_every_code_that_is_raised_can_be_explained() -> None:
    packages = [place.parent for place in ROOT.glob("*/__init__.py")]
    modules = [ROOT / "experiment.py", *(module for package in packages for module in package.rglob("*.py"))]
    found = {str(module.relative_to(ROOT)): raised_codes(module.read_text()) for module in modules}
    assert "experiment-conflict" in found["experiment.py"]
    assert {name: codes - set(CATALOGUE) for name, codes in found.items() if codes - set(CATALOGUE)} == {}
