"""A federated run: an experiment over the real clients that connect to this server, from its start to its result."""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.serverapp.strategy import Strategy

from ...clients.training import reproducible
from ...core import flower
from ...core.errors import BractError, InputError
from ...core.keys import Key
from ...experiment import Experiment
from ...transport.announcement import Announcement
from ...transport.wire import Limits
from .. import checkpoint as checkpoints
from ..connections.errands import Deadlines
from ..connections.federation_grid import FederationGrid
from ..connections.listener import Listener as Connections
from ..events import ClientNoticed, Listener, Listening
from ..interrupt import graceful_interrupt
from ..manifest import SiteRecords, manifest, origin_of, refuse_changed
from ..progress import Progress
from ..result import Result
from ..run import TrainingRun
from ..run_directory import RunDirectory
from ..setting import Setting
from .announcing import announced
from .endpoint import Endpoint
from .membership import Membership
from .model import ServerModel
from .population import Population
from .request_grid import RequestGrid
from .terms import has_secret_cohorts, minimum_of, refuse_finished, refuse_what_no_federation_offers

RUN = "private/federation.json"
STOPPED = "the server was stopped and goes on later; come back"


def serve(
    experiment: Experiment,
    endpoint: Endpoint,
    *,
    out: Path | None = None,
    existing: RunDirectory | None = None,
    strategy: Strategy | None = None,
    limits: Limits | None = None,
    report: Callable[[Path], object] = lambda path: None,
    listeners: Iterable[Listener] = (),
) -> Result:
    """Run an experiment over the clients that connect, to its end or to an interruption.

    `out` is the run directory, or `existing` one to go on with. `report` writes a run directory's report. Raises
    BractError: InputError before anything listens, RunError if the run fails, KeyboardInterrupt if it was stopped
    before anybody had joined.
    """
    run = FederatedRun(experiment, strategy=strategy, listeners=listeners)
    with reproducible(), flower.quiet():
        return run.run(endpoint, out=out, existing=existing, limits=limits or Limits(), report=report)


@dataclass(frozen=True, kw_only=True)
class _Parts:
    directory: RunDirectory
    name: str
    membership: Membership
    connections: Connections
    population: Population
    grid: FederationGrid
    report: Callable[[Path], object]


class FederatedRun:
    """One run of one experiment over real clients. Raises InputError for what does not go together."""

    def __init__(
        self, experiment: Experiment, *, strategy: Strategy | None = None, listeners: Iterable[Listener] = ()
    ) -> None:
        self._experiment = experiment
        self._run = TrainingRun(experiment, strategy=strategy, listeners=listeners)
        refuse_what_no_federation_offers(experiment, self._run.strategy)
        self._model = ServerModel.of(experiment, self._run.strategy)
        self.minimum = minimum_of(experiment)

    def run(
        self,
        endpoint: Endpoint,
        *,
        out: Path | None,
        existing: RunDirectory | None,
        limits: Limits,
        report: Callable[[Path], object],
    ) -> Result:
        """Listen, wait for clients, and go through the rounds; what fails is on disk before it is raised."""
        started, experiment = time.monotonic(), self._experiment
        if existing is not None:
            refuse_finished(existing)
        directory = existing or RunDirectory.create(
            RunDirectory.free(out, experiment.experiment.name), experiment, Key.fresh()
        )
        name = self._named(directory, resumed=existing is not None)
        membership = Membership(
            experiment,
            self._model,
            run=name,
            needs_metrics=getattr(self._run.strategy, "needs_metrics", False),
        )
        connections = self._connections(endpoint, membership, name, limits)
        code, sentence, final = "interrupted", STOPPED, False
        with graceful_interrupt() as should_stop, directory.locked():
            # Who may join has to be known before anybody does.
            population = Population(
                membership,
                connections,
                directory,
                minimum=self.minimum,
                emit=self._run.emit,
                should_stop=should_stop,
                warning=endpoint.warning,
            )
            if existing is not None:
                population.load()
                _load_checkpoint(existing, connections, name)
            try:
                connections.start()
            except InputError:
                if existing is None:
                    # What is refused leaves no folder behind.
                    shutil.rmtree(directory.path)
                raise
            try:
                grid = FederationGrid(connections, run_name=name, should_stop=should_stop)
                parts = _Parts(
                    directory=directory,
                    name=name,
                    membership=membership,
                    connections=connections,
                    population=population,
                    grid=grid,
                    report=report,
                )
                self._listening(parts, endpoint)
                result, error = self._train(parts, should_stop, resumed=existing is not None, started=started)
                if error is not None:
                    code = error.code
                    raise error
                if result.status != "interrupted":
                    grid.forget_replies(int(result.record["rounds"]))
                    code, sentence, final = "", "", True
                return result
            finally:
                connections.stop(code, sentence, final=final)

    def _train(
        self, parts: _Parts, should_stop: Callable[[], bool], *, resumed: bool, started: float
    ) -> tuple[Result, BractError | None]:
        parts.population.wait()
        self._describe(parts)
        return self._run.execute(self._setting(parts), resumed=resumed, should_stop=should_stop, started=started)

    def _named(self, directory: RunDirectory, *, resumed: bool) -> str:
        """Return the run's name, by which sites and their ledgers know it: drawn once, and kept."""
        experiment = self._experiment
        origin, description = origin_of(experiment, self._model.initial), self._manifest(None)
        if resumed:
            refuse_changed(directory, description, origin)
            return str(directory.read_json(RUN)["run"])
        name = f"{experiment.experiment.name}-{secrets.token_hex(8)}"
        directory.write_json("private/origin.json", origin)
        directory.write_json(RUN, {"run": name})
        directory.write_json("manifest.json", description)
        return name

    def _connections(self, endpoint: Endpoint, membership: Membership, name: str, limits: Limits) -> Connections:
        server = self._experiment.server
        known: dict[str, Any] = {} if endpoint.gatekeeper is None else {"gatekeeper": endpoint.gatekeeper}

        def noticed(what: str, client: str, code: str, sentence: str) -> None:
            self._run.emit(ClientNoticed(what=what, client=client, code=code, sentence=sentence))

        return Connections(
            endpoint.address,
            endpoint.credentials,
            deadlines=Deadlines(
                round_deadline=server.round_deadline, stall_after=server.stall_after, connect_for=server.connect_for
            ),
            limits=limits,
            admit=membership.admit,
            announcement=Announcement(run=name, experiment=announced(self._experiment)),
            notice=noticed,
            **known,
        )

    def _listening(self, parts: _Parts, endpoint: Endpoint) -> None:
        host = endpoint.address.rpartition(":")[0]
        address = f"{host}:{parts.connections.port}"
        parts.directory.write_json(RUN, {"run": parts.name, "listen": address})
        self._run.emit(
            Listening(
                name=self._experiment.experiment.name,
                run=parts.name,
                address=address,
                run_dir=parts.directory.path,
                status=parts.connections.status,
                secret_cohorts=has_secret_cohorts(self._experiment),
            )
        )

    def _describe(self, parts: _Parts) -> None:
        parts.directory.write_json("manifest.json", self._manifest(parts.membership))

    def _manifest(self, membership: Membership | None) -> dict[str, Any]:
        """Return what the run is made of; under client-level privacy nothing that is passed on names a client."""
        named = membership is not None and not has_secret_cohorts(self._experiment)
        members = membership.members if membership is not None else []
        return manifest(
            self._experiment,
            # What each site trains with follows from this by the same rule as in a simulation.
            kernel=self._experiment.simulation.kernel,
            device="cpu",
            parameters=self._model.size,
            clients=len(members),
            classes=self._model.classes,
            sites={member.name: SiteRecords(train=member.records) for member in members} if named else {},
            mechanisms=membership.plan.mechanisms if membership is not None else {},
        )

    def _setting(self, parts: _Parts) -> Setting:
        membership, grid, directory = parts.membership, parts.grid, parts.directory
        model, experiment = self._model, self._experiment
        private = experiment.privacy.unit != "none"
        secret = experiment.privacy.randomness == "secret"
        key = directory.key() if secret else Key.from_seed(experiment.experiment.seed)

        def population(round: int) -> Any:
            known = len(membership.names)
            drawn = parts.population.draw_from(round)
            if len(membership.names) > known:
                self._describe(parts)
            return drawn

        def saved(progress: Progress) -> None:
            # Only once the checkpoint is on the disk: from then on nobody asks for these replies again. Those of the
            # last round stay, since its model may still be evaluated.
            grid.forget_replies(progress.round - 1)

        return Setting(
            directory=directory,
            key=key,
            grid=RequestGrid(grid, membership.request),
            clients=membership.names,
            accounts=membership.accounts,
            guarantee=membership.guarantee,
            initial=model.initial,
            module=model.module,
            report=parts.report,
            traffic=model.traffic,
            aggregate=membership.plan.aggregate,
            evaluation=membership.plan.evaluation,
            strategy_evaluates=not model.classes and not private,
            compression=model.compression,
            notes=model.notes,
            population=population,
            connected=parts.population.connected,
            # They are put back before anybody joins.
            client_states=lambda: {"heads": grid.heads()},
            saved=saved,
        )


def _load_checkpoint(directory: RunDirectory, connections: Connections, name: str) -> None:
    """Have the first welcome hold what was last seen of a client's ledger; nobody is there yet."""
    found = checkpoints.load(directory.checkpoints)
    if found is None:
        return
    for client, heads in found.clients["heads"].items():
        connections.roster.heads.update({(client, data): head for data, head in heads.items()})
    connections.roster.tell_to_forget(name, found.round - 1)
