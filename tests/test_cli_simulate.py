"""`bract simulate` and `bract plan` as a user runs them: what is printed where, and what the shell is told."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

FILE = """\
[experiment]
name = "tiny"
rounds = 3
seed = 3
[task]
name = "synthetic"
clients = 3
records = 30
features = 5
classes = 2
[train]
batch_size = 10
[privacy]
unit = "record"
noise_multiplier = 4.0
[simulation]
curves = false
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tiny.toml").write_text(FILE)
    return tmp_path


def bract(folder, *arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "bract", *arguments], cwd=folder, capture_output=True, text=True, check=False, **options
    )


def test_it_prints_what_was_released_and_where_the_report_lies(folder):
    out = bract(folder, "simulate", "tiny.toml")
    assert out.returncode == 0, out.stderr
    run = next((folder / "runs").iterdir())
    for words in ("released", "accuracy", "guarantee", "epsilon", "report.html", "not private, simulation only"):
        assert words in out.stdout
    assert "round 3/3" in out.stderr and "Traceback" not in out.stderr
    assert (run / "report.html").exists()


def test_json_is_one_object_and_nothing_else(folder):
    out = bract(folder, "simulate", "tiny.toml", "--json", "--out", "mine")
    record = json.loads(out.stdout)
    assert record["status"] == "completed" and record["run_dir"] == "mine"
    assert record == json.loads((folder / "mine" / "result.json").read_text())


def test_an_exhausted_budget_is_exit_3(folder):
    keys = ["privacy.epsilon_budget=1.0", "experiment.rounds=50"]
    out = bract(folder, "simulate", "tiny.toml", "--json", *(part for key in keys for part in ("--set", key)))
    record = json.loads(out.stdout)
    assert out.returncode == 3 and record["status"] == "budget-exhausted"
    assert 0 < record["rounds"] < 50 and record["guarantee"]["epsilon"] <= 1.0


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.soak)])
def test_a_signal_is_exit_130_with_a_checkpoint_and_says_how_to_go_on(folder, number):
    child = subprocess.Popen(
        [sys.executable, "-m", "bract", "simulate", "tiny.toml", "--out", "run", "--set", "experiment.rounds=3000"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stderr is not None
    seen = ""
    for line in child.stderr:
        seen += line
        if line.startswith("round "):
            break
    child.send_signal(number)
    stdout, stderr = child.communicate(timeout=120)
    assert child.returncode == 130, seen + stderr
    assert "Traceback" not in stderr
    record = json.loads((folder / "run" / "result.json").read_text())
    assert record["status"] == "interrupted" and 0 < record["rounds"] < 3000
    assert list((folder / "run" / "checkpoint").iterdir())
    assert "--resume" in stdout + stderr


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["simulate", "none.toml"], 2, "none.toml: there is no such file"),
        (["simulate", "tiny.toml", "--set", "privacy.epsilon=-1"], 2, "privacy.epsilon = -1: must be above 0"),
        (["simulate", "tiny.toml", "--set", "task.name=hart-disease"], 2, "heart-disease"),
        (["simulate", "tiny.toml", "--set", "task.recrods=3"], 2, "did you mean 'records'?"),
        (["simulate", "tiny.toml", "--resume", "x"], 2, "--resume RUN: goes alone"),
        (["simulate", "--resume", "nowhere"], 2, "no run of bract here"),
        (["plan", "tiny.toml", "--set", "privacy.delta=2"], 2, "delta = 2: must be below 1 (tiny.toml, line 13)"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(folder, arguments, code, says):
    out = bract(folder, *arguments)
    assert out.returncode == code
    assert out.stdout == "" and "Traceback" not in out.stderr
    assert says in out.stderr and out.stderr.startswith("error: ")
    assert not (folder / "runs").exists()


def test_plan_trains_nothing_and_agrees_with_the_run(folder):
    out = bract(folder, "plan", "tiny.toml", "--json")
    plan = json.loads(out.stdout)
    assert not (folder / "runs").exists()
    run = json.loads(bract(folder, "simulate", "tiny.toml", "--json", "--out", "run").stdout)
    assert plan["guarantee"] == run["guarantee"]
    manifest = json.loads((folder / "run" / "manifest.json").read_text())
    for name, site in manifest["sites"].items():
        assert plan["sites"][name]["noise_multiplier"] == site["noise_multiplier"]
        assert plan["sites"][name]["sampling_rate"] == site["sampling_rate"]
        assert plan["sites"][name]["steps"] == 3 * site["steps_per_round"]
