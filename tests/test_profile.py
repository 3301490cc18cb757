"""`bract simulate --profile`: a table that adds up, and a trace that a viewer can read."""

from __future__ import annotations

import json
import os
import re

import pytest

import bract
from bract.cli.main import main

KEYS = {"task.clients": 6, "experiment.rounds": 3, "server.evaluate_every": 1, "privacy.unit": "record"}


@pytest.mark.parametrize("workers", [1, 2])
def test_the_table_adds_up_and_every_call_is_in_the_trace(tiny, tmp_path, workers):
    experiment = tiny(**KEYS, **{"privacy.noise_multiplier": 2.0, "simulation.workers": workers})
    result = bract.simulate(experiment, out=tmp_path / "run", profile=True)
    table = (tmp_path / "run" / "private" / "profile.txt").read_text()
    rows = dict(re.findall(r"^(\S.*?) {2,}([\d.]+) {2,}[\d.]+%$", table, re.MULTILINE))
    assert {"plan", "clients", "aggregate", "evaluate", "checkpoint", "drawing the report", "all"} <= rows.keys()
    total = float(rows.pop("all"))
    assert sum(map(float, rows.values())) == pytest.approx(total, abs=0.001 * len(rows))
    # The clock starts before the data are loaded, and stops when the run is over.
    assert result.record["seconds"] <= total + 0.5
    events = json.loads((tmp_path / "run" / "private" / "profile.json").read_text())["traceEvents"]
    calls = [event for event in events if event["ph"] == "X" and event["tid"] == 1]
    assert sorted({event["args"]["client"] for event in calls}) == [f"client-{i:04}" for i in range(1, 7)]
    assert [sum(event["name"] == kind for event in calls) for kind in ("train", "evaluate")] == [18, 18]
    processes = {event["pid"] for event in calls}
    assert (processes == {os.getpid()}) == (workers == 1) and len(processes) <= workers
    waits = [(e["ts"], e["ts"] + e["dur"]) for e in events if e["ph"] == "X" and e["name"] in ("clients", "evaluate")]
    for call in calls:
        if call["name"] in ("train", "evaluate"):
            assert any(began <= call["ts"] <= ended for began, ended in waits), call


def test_it_is_for_the_experimenter_alone_and_only_on_request(tiny, tmp_path, capsys):
    experiment, run = tmp_path / "tiny.toml", tmp_path / "run"
    experiment.write_text(tiny().to_toml())
    with pytest.raises(SystemExit, match="0"):
        main(["simulate", str(experiment), "--out", str(run), "--profile", "--json"])
    said = capsys.readouterr()
    assert json.loads(said.out)["status"] == "completed"
    assert "within clients" in said.err and "profile.json" in said.err
    for name in ("profile.txt", "profile.json"):
        assert (run / "private" / name).stat().st_mode & 0o777 == 0o600
    with pytest.raises(SystemExit, match="0"):
        main(["simulate", str(experiment), "--out", str(tmp_path / "plain")])
    assert not (tmp_path / "plain" / "private" / "profile.txt").exists()
