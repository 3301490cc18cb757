"""Every example runs as its first line says."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

import bract

EXAMPLES = Path(__file__).parent.parent / "examples"
FILES = sorted([*EXAMPLES.glob("*.toml"), *EXAMPLES.glob("*/*.toml")])


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(EXAMPLES)) for path in FILES])
def test_experiment_files(path, tmp_path):
    overrides = ["experiment.rounds=2", "simulation.baselines=false", "simulation.curves=false"]
    result = bract.simulate(path, overrides=overrides, out=tmp_path / "run")
    assert result.status == "completed" and result.record["rounds"] == 2
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2
    if result.guarantee.epsilon is None:
        assert "eval_acc" in lines[0]
    else:
        assert result.guarantee.epsilon <= 3.0 and "accuracy" in result.metrics


def test_the_notebook(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / "notebook.py"), run_name="notebook")
    out = capsys.readouterr().out
    assert "completed" in out and "epsilon 4" in out and "report.html" in out


def test_every_example_is_covered():
    assert {path.name for path in EXAMPLES.rglob("*.py")} <= {
        "own_task.py",
        "own_strategy.py",
        "flower_app.py",
        "notebook.py",
    }
    assert len(FILES) == 4
