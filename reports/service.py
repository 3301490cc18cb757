"""A federated run with all that watches it: the screen or the log, the metrics, and the report at its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Protocol

from ..core.errors import InputError
from ..experiment import Experiment
from ..server.events import Listener, Notice
from ..server.federation.endpoint import open_endpoint
from ..server.federation.federation import RUN, serve
from ..server.result import Result
from ..server.run_directory import RunDirectory
from .federation import FederationProgress
from .log import EventLog
from .prometheus import Exporter


class Serve(Protocol):
    """Runs an experiment, or goes on with a run, and returns its result."""

    def __call__(self, experiment: Experiment | None, *, out: Path | None, resume: Path | None) -> Result:
        """Run it."""


@contextmanager
def service(
    *,
    listen: str | None,
    identity: Path | None,
    metrics: str | None = None,
    log_format: Literal["text", "json"] = "text",
) -> Iterator[Serve]:
    """Yield what runs a federation that is watched; `listen` None is where the run listened before."""
    with ExitStack() as stack:
        listeners: list[Listener] = [
            EventLog() if log_format == "json" else stack.enter_context(FederationProgress()),
        ]
        if metrics is not None:
            listeners.append(stack.enter_context(Exporter(metrics)))

        def warn(text: str) -> None:
            for listener in listeners:
                listener(Notice(text=text))

        def run(experiment: Experiment | None, *, out: Path | None, resume: Path | None) -> Result:
            existing, address = None, listen
            if resume is not None:
                existing = RunDirectory.open(resume)
                if not (existing.path / RUN).is_file():
                    sentence = f"{resume}: is no run of bract server; a simulation goes on by bract simulate --resume"
                    raise InputError("run-missing", sentence)
                experiment = existing.experiment()
                address = address or existing.read_json(RUN).get("listen")
            if address is None or experiment is None:
                raise InputError("usage", "--listen HOST:PORT: missing; say where clients connect")
            endpoint = open_endpoint(address, identity, clock=lambda: datetime.now(UTC), problem=warn)
            return serve(experiment, endpoint, out=out, existing=existing, report=_report, listeners=listeners)

        yield run


def _report(run: Path) -> None:
    # Needs matplotlib, which a server that starts need not wait for.
    from .page import write_report

    write_report(run)
