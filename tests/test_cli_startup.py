"""The command line starts at once, imports what it needs alone, and ends in one sentence and an exit status."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

# Each takes from 0.4 to 3 seconds to import.
HEAVY = {
    "datasets",
    "dp_accounting",
    "flwr",
    "flwr_datasets",
    "matplotlib",
    "numpy",
    "opacus",
    "pandas",
    "scipy",
    "sklearn",
    "torch",
    "torchmetrics",
}

LISTED = """
import sys
from bract.cli.main import main
try:
    main(sys.argv[1:])
finally:
    print("\\nimported:", *sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""


def bract(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bract", *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def imported_by(*arguments: str, cwd: Path) -> tuple[int, str, set[str]]:
    """Return exit status, what was said on stderr, and the top-level modules that a command imported."""
    ended = subprocess.run(
        [sys.executable, "-c", LISTED, *arguments], cwd=cwd, capture_output=True, text=True, timeout=60
    )
    said, _, imported = ended.stderr.rpartition("imported:")
    return ended.returncode, said, set(imported.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("--version",),
        ("explain",),
        ("explain", "budget-exhausted"),
        ("tasks",),
        ("strategies", "--json"),
        ("doctor", "--help"),
        ("simulate", "--help"),
        ("plan", "--help"),
        ("report", "--help"),
        ("doctor",),
    ],
    ids=" ".join,
)
def test_light_commands_import_nothing_heavy(arguments: tuple[str, ...], tmp_path: Path) -> None:
    exit_status, said, imported = imported_by(*arguments, cwd=tmp_path)
    assert exit_status == 0, said
    assert "bract" in imported
    assert not imported & HEAVY


@pytest.mark.parametrize("command", ["simulate", "plan"])
@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('[task]\nname = "heart-disease"\n[train]\nepoch = 1\n', "train.epoch"),
        ("[experiment]\nrounds = = 3\n", "line 2"),
        ('[task]\nname = "heart-disease"\n[privacy]\nunit = "record"\nepsilon = -1\n', "privacy.epsilon = -1"),
    ],
)
def test_a_refused_file_imports_nothing_heavy(command: str, text: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "heart.toml").write_text(text)
    exit_status, said, imported = imported_by(command, "heart.toml", cwd=tmp_path)
    assert exit_status == 2
    assert complaint in said
    assert "heart.toml" in said
    assert not imported & HEAVY
    assert list(tmp_path.iterdir()) == [tmp_path / "heart.toml"]


def test_help_takes_less_than_0_3_seconds(tmp_path: Path) -> None:
    def once() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert bract("--help", cwd=tmp_path).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # Processor time, and the best of several: other processes of this machine are not what is measured.
    assert min(once() for _ in range(8)) < 0.3


def test_no_arguments_print_the_help(tmp_path: Path) -> None:
    alone, asked = bract(cwd=tmp_path), bract("--help", cwd=tmp_path)
    assert alone.returncode == 0
    assert alone.stdout == asked.stdout
    assert "bract [OPTIONS] COMMAND" in alone.stdout


def test_help_lists_every_command_and_each_has_help_of_its_own(tmp_path: Path) -> None:
    from bract.cli.main import COMMANDS

    listed = bract("--help", cwd=tmp_path).stdout
    for name in COMMANDS:
        assert f"\n  {name} " in listed
        shown = bract(name, "--help", cwd=tmp_path)
        assert shown.returncode == 0, shown.stderr
        assert shown.stdout.startswith(f"Usage: bract {name} ")
        assert shown.stdout.count("rguments:") <= 1
        assert "\\[" not in shown.stdout


def test_the_help_of_arguments_is_shown(tmp_path: Path) -> None:
    assert "the one that holds manifest.json" in bract("report", "--help", cwd=tmp_path).stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("fly",), "error: No such command 'fly'; see `bract --help`"),
        (("tasks", "--fly"), "error: No such option '--fly'; see `bract tasks --help`"),
        (("report",), "error: Missing argument 'RUN'; see `bract report --help`"),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_2(arguments: tuple[str, ...], sentence: str, tmp_path: Path) -> None:
    ended = bract(*arguments, cwd=tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", sentence + "\n")


def test_wrong_input_is_one_sentence_with_its_code(tmp_path: Path) -> None:
    ended = bract("report", "nowhere", cwd=tmp_path)
    assert ended.returncode == 2
    assert ended.stdout == ""
    first, second = ended.stderr.splitlines()
    assert first == "error: RUN = nowhere: holds no manifest.json; give the run directory itself"
    assert second.split() == ["more:", "bract", "explain", "run-missing"]


@pytest.mark.parametrize(
    ("arguments", "code"), [(("report", "nowhere", "--json"), "run-missing"), (("report", "--json"), "usage")]
)
def test_json_is_one_object_for_errors_too(arguments: tuple[str, ...], code: str, tmp_path: Path) -> None:
    ended = bract(*arguments, cwd=tmp_path)
    assert ended.returncode == 2
    told = json.loads(ended.stdout)
    assert told["status"] == "refused"
    assert told["error"]["code"] == code
    assert f"error: {told['error']['sentence']}\n" in ended.stderr


@pytest.mark.parametrize(
    ("raised", "exit_status", "kind", "code"),
    [
        ("KeyError('nothing foresaw this')", 1, "failed", "internal"),
        ("KeyboardInterrupt()", 130, "interrupted", "interrupted"),
        ("InputError('data-missing', 'no such file')", 2, "refused", "data-missing"),
        ("Refusal('budget-exhausted', 'spent')", 3, "budget-exhausted", "budget-exhausted"),
        ("RunError('quorum-missed', 'too few')", 1, "failed", "quorum-missed"),
    ],
)
@pytest.mark.parametrize("debug", ["0", "1"])
def test_what_a_command_raises_becomes_a_sentence_and_a_status(
    raised: str, exit_status: int, kind: str, code: str, debug: str, tmp_path: Path
) -> None:
    # A command that fails in a chosen way, put into the table of commands as a later one would be.
    program = f"""
import sys, types
from bract.cli import main
from bract.core.errors import InputError, Refusal, RunError
def fail(json: bool = False) -> None:
    raise {raised}
sys.modules["bract.cli.fail"] = types.SimpleNamespace(fail=fail)
main.COMMANDS["fail"] = "Fails."
main.main(["fail", "--json"])
"""
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "BRACT_DEBUG": debug},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == exit_status
    told = json.loads(ended.stdout)
    assert (told["status"], told["error"]["code"]) == (kind, code)
    assert ("Traceback" in ended.stderr) == (debug == "1")
    assert f"error: {told['error']['sentence']}\n" in ended.stderr


def test_an_exit_status_that_a_command_asks_for_is_kept(tmp_path: Path) -> None:
    program = """
import sys, types
from bract.cli import main, output
def end() -> None:
    output.finish(3)
sys.modules["bract.cli.end"] = types.SimpleNamespace(end=end)
main.COMMANDS["end"] = "Ends."
main.main(["end"])
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=tmp_path, timeout=60).returncode == 3


def test_tasks_and_strategies_are_listed_as_a_table_and_as_json(tmp_path: Path) -> None:
    for command, expected in (("tasks", "heart-disease"), ("strategies", "fedavg")):
        entries = json.loads(bract(command, "--json", cwd=tmp_path).stdout)[command]
        assert expected in [entry["name"] for entry in entries]
        lines = bract(command, cwd=tmp_path).stdout.splitlines()
        assert lines[0].split()[0] == "NAME"
        for entry in entries:
            assert any(line.startswith(f"{entry['name']} ") for line in lines)
            assert entry["summary"]
            assert entry["origin"] == "bract"


def test_a_plug_in_is_listed_with_the_package_that_brings_it(tmp_path: Path) -> None:
    info = tmp_path / "garden-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: garden\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[bract.tasks]\nroses = garden:Roses\n[bract.strategies]\npruning = garden:Pruning\n"
    )
    for command, name in (("tasks", "roses"), ("strategies", "pruning")):
        ended = bract(command, "--json", cwd=tmp_path, PYTHONPATH=str(tmp_path))
        entries = {entry["name"]: entry for entry in json.loads(ended.stdout)[command]}
        assert entries[name]["origin"] == "garden"
        assert not (tmp_path / "garden.py").exists(), "listing imports no plug-in"


def test_flower_is_told_to_phone_nobody_unless_its_user_says_so(tmp_path: Path) -> None:
    program = (
        "import bract, flwr.supercore.telemetry as t, os; "
        "print(t.FLWR_TELEMETRY_ENABLED, os.environ['FLWR_DISABLE_UPDATE_CHECK'])"
    )

    def told(**environment: str) -> list[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("FLWR_")}
        return subprocess.run(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            env=kept | environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout.split()

    assert told() == ["0", "1"]
    assert told(FLWR_TELEMETRY_ENABLED="1", FLWR_DISABLE_UPDATE_CHECK="0") == ["1", "0"]
