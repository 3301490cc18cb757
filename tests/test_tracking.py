"""Trackers are told what a run releases, nothing else, and never end it."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

import bract
from bract.cli.main import main
from bract.core.errors import InputError
from bract.reports.tracking import PACKAGES, tracking
from bract.server.events import RoundFinished

PRIVATE = {
    "privacy.unit": "record",
    "privacy.noise_multiplier": 4.0,
    "server.evaluate_every": 2,
    "experiment.rounds": 3,
    "simulation.curves": True,
}


class Recorder:
    """A tracker that keeps what it is told."""

    def __init__(self, *, fails_at=None):
        self.started, self.rows, self.ended, self.fails_at = None, [], [], fails_at

    def start(self, event):
        self.started = event

    def record(self, round, values):
        if round == self.fails_at:
            raise ConnectionError("the server\nis gone")
        self.rows.append((round, dict(values)))

    def finish(self, status):
        self.ended.append(status)


def tracked(experiment, out, *trackers, **keywords):
    said = []
    with tracking(trackers, warn=said.append) as listeners:
        result = bract.simulate(experiment, out=out, listeners=listeners, **keywords)
    return result, said


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_tracker_gets_the_released_numbers_once_and_no_private_one(tiny, tmp_path):
    recorder = Recorder()
    result, said = tracked(tiny(**PRIVATE), tmp_path / "run", recorder)
    assert said == [] and recorder.ended == ["completed"]
    assert recorder.started.guarantee.epsilon == pytest.approx(result.guarantee.epsilon)
    told = {}
    for round, values in recorder.rows:
        for name, value in values.items():
            short = name.split("/")[1]
            assert (round, short) not in told
            told[round, short] = value
    # The last metrics are released after the last round, and stand in the result.
    released = {
        (record["round"], name): value
        for record in lines(tmp_path / "run" / "metrics.jsonl")
        for name, value in record.items()
        if name != "round" and value is not None
    } | {(3, name): value for name, value in result.metrics.items() if value is not None}
    assert told == released
    exact = {line["loss"] for line in lines(tmp_path / "run" / "private" / "curves.jsonl")}
    assert exact and not exact & set(told.values())
    groups = {name for _, values in recorder.rows for name in values}
    assert {"privacy/epsilon", "round/seconds", "round/clients", "metrics/accuracy"} <= groups


def test_a_tracker_that_fails_is_said_once_and_the_run_goes_on(tiny, tmp_path):
    broken, sound = Recorder(fails_at=2), Recorder()
    result, said = tracked(tiny(), tmp_path / "run", broken, sound)
    assert result.status == "completed" and sound.ended == ["completed"]
    assert [round for round, _ in broken.rows] == [1] and broken.ended == []
    (sentence,) = said
    assert "Recorder stopped" in sentence and "the server is gone" in sentence
    assert {round for round, _ in sound.rows} == {1, 2, 3, 4}


def test_a_run_that_breaks_off_is_ended(tiny, tmp_path):
    recorder = Recorder()

    def stop(event):
        if isinstance(event, RoundFinished):
            raise OSError("another listener failed")

    with pytest.raises(OSError), tracking([recorder], warn=print) as listeners:
        bract.simulate(tiny(), out=tmp_path / "run", listeners=[*listeners, stop])
    assert recorder.ended == ["failed"]


def test_no_run_no_ending(tmp_path):
    recorder = Recorder()
    with tracking([recorder], warn=print):
        pass
    assert recorder.started is None and recorder.ended == []


def test_an_unknown_tracker_is_refused():
    with (
        pytest.raises(InputError, match="--track wandb: unknown; there is tensorboard and mlflow"),
        tracking(["wandb"], warn=print),
    ):
        pass


@pytest.mark.parametrize("name", PACKAGES)
def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_made(name, tmp_path, capsys):
    if find_spec(PACKAGES[name]):
        pytest.skip(f"{name} is installed")
    with pytest.raises(SystemExit) as ended:
        main(["simulate", "--out", str(tmp_path / "run"), "--track", name])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert f"--track {name}: it is not installed; run pip install 'bract[{name}]'" in error
    assert not (tmp_path / "run").exists()


def test_tensorboard_has_the_rounds_and_a_resumed_run_replaces_them(tiny, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    interrupted_and_resumed(tiny(**PRIVATE), tmp_path / "run", "tensorboard")
    found = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    found.Reload()
    assert [point.step for point in found.Scalars("privacy/epsilon")] == [1, 2, 3]
    assert [point.step for point in found.Scalars("metrics/accuracy")] == [2, 3]
    assert "guarantee/text_summary" in found.Tags()["tensors"]


def test_mlflow_keeps_one_run_in_the_run_directory(tiny, tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    result = interrupted_and_resumed(tiny(**PRIVATE), tmp_path / "run", "mlflow")
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'run' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tiny")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == "run"
    assert run.data.metrics["metrics/accuracy"] == pytest.approx(result.metrics["accuracy"])
    assert float(run.data.params["epsilon"]) == pytest.approx(result.guarantee.epsilon)
    assert run.data.tags["mlflow.note.content"] == result.guarantee.sentence
    steps = [point.step for point in client.get_metric_history(run.info.run_id, "privacy/epsilon")]
    assert sorted(steps) == [1, 2, 3]
    # Nothing else is left where the user happens to be.
    assert [path.name for path in Path().iterdir()] == ["run"]


def interrupted_and_resumed(experiment, out, tracker):
    def stop(event):
        if isinstance(event, RoundFinished) and event.round == 1:
            raise KeyboardInterrupt

    said = []
    with tracking([tracker], warn=said.append) as listeners:
        assert bract.simulate(experiment, out=out, listeners=[*listeners, stop]).status == "interrupted"
    with tracking([tracker], warn=said.append) as listeners:
        result = bract.simulate(resume=out, listeners=listeners)
    assert (result.status, said) == ("completed", [])
    return result
