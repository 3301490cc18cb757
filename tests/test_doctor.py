"""`bract doctor` says what is wrong with a machine, and only then."""

from __future__ import annotations

import json
import os
import socket
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import pytest

from bract.cli import doctor as doctor_module
from bract.cli.doctor import (
    GIGABYTE,
    check_clock,
    check_packages,
    check_permissions,
    check_port,
    check_python,
    check_torch,
    judge_size,
)
from bract.cli.main import main


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", *arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code, capsys.readouterr().out


def test_a_fit_machine_is_called_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exit_status, shown = run(capsys, "--folder", str(tmp_path), "--json")
    told = json.loads(shown)
    assert [check for check in told["checks"] if check["state"] == "fail"] == []
    assert (exit_status, told["fit"]) == (0, True)
    assert {check["part"] for check in told["checks"]} == {
        "Python",
        "packages",
        "torch",
        "processors",
        "memory",
        "disk",
        "permissions",
        "ports",
        "clock",
        "randomness",
    }
    assert list(tmp_path.iterdir()) == []


def test_an_unfit_one_ends_with_1_and_says_the_mend(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        exit_status, shown = run(capsys, "--folder", str(tmp_path / "nowhere"), "--port", str(port))
    assert exit_status == 1
    failed = [line.split()[1] for line in shown.splitlines() if line.startswith("fail ")]
    assert failed == ["disk", "permissions", "ports"]
    assert "choose another port" in shown
    assert "--folder DIR" in shown
    assert "3 to mend" in shown


@pytest.mark.parametrize(
    ("version", "state"), [((3, 10), "fail"), ((3, 11), "ok"), ((3, 12), "ok"), ((3, 13), "ok"), ((3, 14), "fail")]
)
def test_python_from_3_11_to_3_13(version: tuple[int, int], state: str) -> None:
    assert check_python(version).state == state


def test_pythons_of_the_doctor_are_those_of_the_package() -> None:
    from packaging.specifiers import SpecifierSet

    allowed = SpecifierSet(metadata.metadata("bract")["Requires-Python"])
    for minor in range(9, 17):
        assert (f"3.{minor}.1" in allowed) == (check_python((3, minor)).state == "ok")


def test_packages_are_held_against_their_ranges() -> None:
    rich = metadata.version("rich")
    checks = check_packages(
        [f"rich=={rich}", "typer>=99", "no-such-package-of-bract>=1", "no-such-tool; extra == 'test'"]
    )
    assert [(check.state, check.mend) for check in checks] == [
        ("ok", None),
        ("warn", "pip install 'typer>=99'"),
        ("fail", "pip install 'no-such-package-of-bract>=1'"),
    ]
    assert "1 in their tested ranges" in checks[0].seen
    assert metadata.version("typer") in checks[1].seen


def test_a_torch_that_crashes_is_told_and_does_not_take_the_doctor_along(tmp_path: Path) -> None:
    crashing = tmp_path / "python"
    crashing.write_text("#!/bin/sh\nkill -ILL $$\n")
    crashing.chmod(0o755)
    check = check_torch(str(crashing))
    assert check.state == "fail"
    assert "-4" in check.seen
    assert check_torch(str(tmp_path / "nowhere")).state == "fail"
    assert check_torch(sys.executable).state in ("ok", "warn")


def test_little_memory_is_a_warning_and_too_little_a_failure() -> None:
    states = [
        judge_size("memory", size * GIGABYTE, least=1, enough=4 * GIGABYTE, mend="").state for size in (4, 3.9, 0)
    ]
    assert states == ["ok", "warn", "fail"]


def test_a_folder_that_cannot_keep_a_secret_fails(tmp_path: Path) -> None:
    assert check_permissions(tmp_path).state == "ok"
    file = tmp_path / "file"
    file.touch()
    assert check_permissions(file).state == "fail"


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a file system that takes no files")
def test_a_folder_that_takes_no_files_fails() -> None:
    assert check_permissions(Path("/proc/self")).state == "fail"


def test_a_taken_port_fails_and_a_free_one_does_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert check_port(port).state == "fail"
    assert check_port(0).state == "ok"


def test_a_clock_before_the_installation_is_a_warning() -> None:
    assert check_clock().state == "ok"
    installed = Path(doctor_module.__file__).stat().st_mtime
    assert check_clock(datetime.fromtimestamp(installed - 86_400, UTC)).state == "warn"
