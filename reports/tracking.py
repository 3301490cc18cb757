"""Trackers: TensorBoard and MLflow as listeners to a run's events.

They are told what a run gives away: the lines of metrics.jsonl, the released metrics, the guarantee. What lies in
`private/` never comes here, since a tracking server keeps what it is sent.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from ..core.errors import InputError
from ..server.events import Evaluated, Event, Listener, RoundFinished, RunFinished, RunStarted

# The package that each tracker needs, by the name of the tracker and of bract's extra.
PACKAGES: Mapping[str, str] = {"tensorboard": "tensorboard", "mlflow": "mlflow"}
# Where a key of metrics.jsonl is shown; what is not listed is a metric.
_GROUPS = {"epsilon": "privacy"} | dict.fromkeys(("clients", "failed", "seconds", "bytes_up", "bytes_down"), "round")
# How MLflow says that a run ended; whatever else bract's status is, the run did what it was asked to.
_ENDINGS = {"failed": "FAILED", "interrupted": "KILLED"}


class Tracker(Protocol):
    """Keeps a run's numbers."""

    def start(self, event: RunStarted) -> None:
        """Take note of a run that begins or goes on."""

    def record(self, round: int, values: Mapping[str, float]) -> None:
        """Keep the numbers of a round, by `group/name`."""

    def finish(self, status: str) -> None:
        """Take note of the end: a status of result.json, or "failed"."""


@contextmanager
def tracking(trackers: Sequence[str | Tracker], *, warn: Callable[[str], None]) -> Iterator[list[Listener]]:
    """Yield a listener for each tracker, "tensorboard", "mlflow" or an object.

    Raises InputError for a name that is unknown or not installed. One that fails later is left out of the rest of the
    run, which goes on, and `warn` gets a sentence.
    """
    listeners = [
        _Listener(each, _make(each), warn) if isinstance(each, str) else _Listener(type(each).__name__, each, warn)
        for each in dict.fromkeys(trackers)
    ]
    try:
        yield list(listeners)
    finally:
        for listener in listeners:
            listener.close()


def _make(name: str) -> Tracker:
    if name not in PACKAGES:
        raise InputError("plugin-missing", f"--track {name}: unknown; there is {' and '.join(PACKAGES)}")
    if find_spec(PACKAGES[name]) is None:
        raise InputError("plugin-missing", f"--track {name}: it is not installed; run pip install 'bract[{name}]'")
    return TensorBoard() if name == "tensorboard" else MLflow()


class _Listener:
    """Turns events into a tracker's calls, and its errors into one sentence."""

    def __init__(self, name: str, tracker: Tracker, warn: Callable[[str], None]) -> None:
        self._name, self._tracker, self._warn = name, tracker, warn
        self._running = False
        self._evaluated: set[tuple[int, str]] = set()

    def __call__(self, event: Event) -> None:
        """Take an event."""
        match event:
            case RunStarted():
                self._running = True
                self._try(lambda: self._tracker.start(event))
            case RoundFinished():
                # Released metrics stand in the round's record too.
                self._record(event.round, event.record)
            case Evaluated():
                self._evaluated |= {(event.round, name) for name in event.metrics}
                self._record(event.round, event.metrics, again=True)
            case RunFinished():
                self._finish(str(event.result["status"]))
            case _:
                pass

    def close(self) -> None:
        """End what no RunFinished has ended: the run broke off."""
        self._finish("failed")

    def _record(self, round: int, record: Mapping[str, Any], *, again: bool = False) -> None:
        values = {
            f"{_GROUPS.get(name, 'metrics')}/{name}": float(value)
            for name, value in record.items()
            if isinstance(value, int | float) and name != "round" and (again or (round, name) not in self._evaluated)
        }
        if values:
            self._try(lambda: self._tracker.record(round, values))

    def _finish(self, status: str) -> None:
        self._try(lambda: self._tracker.finish(status))
        self._running = False

    def _try(self, call: Callable[[], None]) -> None:
        if not self._running:
            return
        try:
            call()
        except Exception as error:  # a tracker is a convenience: a full disk or a lost server must not end the run
            self._running = False
            said = " ".join(f"{type(error).__name__}: {error}".split())
            self._warn(f"tracking by {self._name} stopped, and the run goes on without it ({said[:300]})")


class TensorBoard:
    """Scalars in `tensorboard/` of the run directory: `tensorboard --logdir RUN`."""

    def __init__(self) -> None:
        self._writer: Any = None

    def start(self, event: RunStarted) -> None:
        """Open the log; rounds that a resumed run trains again replace what was logged of them."""
        module = importlib.import_module("torch.utils.tensorboard")
        folder = str(event.run_dir / "tensorboard")
        self._writer = module.SummaryWriter(log_dir=folder, purge_step=event.first_round)
        self._writer.add_text("guarantee", event.guarantee.sentence, event.first_round - 1)

    def record(self, round: int, values: Mapping[str, float]) -> None:
        """Write scalars."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, round)

    def finish(self, status: str) -> None:
        """Close the log."""
        self._writer.close()


class MLflow:
    """A run of the experiment's name, in `mlflow.db` of the run directory, or where MLFLOW_TRACKING_URI says.

    A resumed run goes on with the run of MLflow that it began.
    """

    def __init__(self) -> None:
        self._client: Any = None
        self._run = ""

    def start(self, event: RunStarted) -> None:
        """Find or begin the run, and note what is public about it."""
        # MLflow tells its makers what it is used for, unless this is set before it is imported.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        client = importlib.import_module("mlflow.tracking").MlflowClient
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        folder = event.run_dir.resolve()
        chosen = os.environ.get("MLFLOW_TRACKING_URI")
        self._client = client(tracking_uri=chosen or f"sqlite:///{folder / 'mlflow.db'}")
        note = folder / "mlflow.json"
        begun = _read(note)
        if event.first_round > 1 and begun.get("uri") == chosen and "run" in begun:
            self._run = begun["run"]
            self._client.set_terminated(self._run, "RUNNING")
            return
        found = self._client.get_experiment_by_name(event.name)
        location = None if chosen else (folder / "mlflow").as_uri()
        experiment = found.experiment_id if found else self._client.create_experiment(event.name, location)
        self._run = self._client.create_run(experiment, run_name=folder.name).info.run_id
        note.write_text(json.dumps({"uri": chosen, "run": self._run}) + "\n", encoding="utf-8")
        given = event.guarantee
        known: dict[str, Any] = {"rounds": event.rounds, "clients": event.clients, "unit": given.unit}
        known |= {"epsilon": given.epsilon, "delta": given.delta} if given.epsilon is not None else {}
        for name, value in known.items():
            self._client.log_param(self._run, name, value)
        self._client.set_tag(self._run, "mlflow.note.content", given.sentence)

    def record(self, round: int, values: Mapping[str, float]) -> None:
        """Log metrics."""
        for name, value in values.items():
            self._client.log_metric(self._run, name, value, step=round)

    def finish(self, status: str) -> None:
        """End the run."""
        self._client.set_terminated(self._run, _ENDINGS.get(status, "FINISHED"))


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
