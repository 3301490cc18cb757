"""`bract sandbox`: real processes that end as one, and the same model as the simulation's, killed or not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import bract
from bract.cli.main import main
from bract.privacy.ledger.ledger import Ledger

EXPERIMENT = """
[experiment]
name = "two-sites"
rounds = {rounds}
seed = 5
[task]
name = "synthetic"
clients = 2
records = 120
[train]
learning_rate = 0.5
[privacy]
unit = "record"
epsilon = 4.0
randomness = "seed"
[simulation]
curves = false
baselines = false
"""


def experiment_file(folder: Path, *, rounds: int = 4, text: str = EXPERIMENT) -> Path:
    file = folder / "experiment.toml"
    file.write_text(text.format(rounds=rounds))
    return file


def start(file: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bract", "sandbox", str(file), "--out", str(out), "--json", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def below(pid: int) -> dict[int, list[str]]:
    """Return the living children of a process, by id, with their command lines."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                found[int(folder.name)] = (folder / "cmdline").read_bytes().decode().split("\0")
        except (OSError, ValueError, IndexError):
            continue
    return found


@pytest.fixture(scope="module")
def simulated(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("simulated")
    return dict(bract.simulate(experiment_file(folder), out=folder / "run").record)


def test_a_run_under_kills_ends_in_the_simulation_s_model_and_charges_each_ledger_once(tmp_path, simulated):
    _kill_at_random(tmp_path, simulated["model_sha256"], kills=10, rounds=4)
    sites = sorted((tmp_path / "sites" / "sites").iterdir())
    assert [site.name for site in sites] == ["client-0001", "client-0002"]
    for site in sites:
        with Ledger.open(site / "state") as ledger:
            spending = ledger.spending("records")
            assert 3.9 < spending.spent <= 4
            # Four rounds, and the release of metrics.
            assert (spending.runs, spending.reservations) == (1, 5)
            assert not ledger.verify()
    # A real site does not say how many test records it has.
    assert "client-0001</th><td>\N{EN DASH}</td>" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.soak
def test_a_long_run_under_a_hundred_kills_ends_in_the_same_model(tmp_path):
    quiet = bract.simulate(experiment_file(tmp_path, rounds=40), out=tmp_path / "quiet").record
    _kill_at_random(tmp_path, quiet["model_sha256"], kills=100, rounds=40)


def _kill_at_random(folder: Path, expected: str, *, kills: int, rounds: int) -> None:
    file, drawn = experiment_file(folder, rounds=rounds), random.Random(11)
    running = start(file, folder / "run", "--set", "server.stall_after=5", "--keep", str(folder / "sites"))
    killed = 0
    while killed < kills and running.poll() is None:
        time.sleep(drawn.uniform(0.1, 2.5))
        children = sorted(below(running.pid))
        if children:
            os.kill(drawn.choice(children), signal.SIGKILL)
            killed += 1
    out, err = running.communicate(timeout=600)
    assert running.returncode == 0, err + out
    assert killed == kills, "the run was over before all kills"
    record = json.loads(out)
    assert (record["status"], record["model_sha256"]) == ("completed", expected)
    assert "seed" in record["guarantee"]["randomness"]


def test_a_sandbox_that_is_killed_leaves_no_process_behind(tmp_path):
    running = start(experiment_file(tmp_path), tmp_path / "run")
    until = time.monotonic() + 60
    while len(children := below(running.pid)) < 3:
        assert time.monotonic() < until and running.poll() is None
        time.sleep(0.05)
    running.kill()
    running.communicate()
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < until + 30, [child for child in children if Path(f"/proc/{child}").exists()]
        time.sleep(0.05)


def test_too_many_clients_are_refused_before_anything_starts(tmp_path, capsys):
    text = '[experiment]\nrounds = {rounds}\n[task]\nname = "synthetic"\nclients = 65\nrecords = 650\n'
    with pytest.raises(SystemExit) as ended:
        main(["sandbox", str(experiment_file(tmp_path, text=text)), "--out", str(tmp_path / "run")])
    assert ended.value.code == 2
    assert "a sandbox starts a process for each client, at most 64" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
