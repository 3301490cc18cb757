"""`sandbox`: the experiment as a federation of processes on this machine, with real identities, policies and ledgers.

It is not faster than a simulation, and it protects no more: all data are on one machine. It shows that the parts work
together, and lets an experiment be tried as it will run between machines.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from ...core.errors import InputError
from ...experiment import Experiment
from ...server.interrupt import graceful_interrupt
from ...server.run_directory import RunDirectory
from ...tasks.registry import find_task
from .premises import HOST, Premises, furnish
from .processes import Supervised, end_all

_PAUSE = 0.1
_FAREWELL_SECONDS = 30.0


def sandbox(
    experiment: Experiment,
    *,
    file: Path,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    as_json: bool = False,
    keep: Path | None = None,
    notice: Callable[[str], None] = lambda text: None,
) -> int:
    """Run an experiment's server and clients as processes; return the server's exit status, or a refused client's.

    `file` and `overrides` are what the experiment was read from, which the server reads again. `keep` is a folder for
    the sites' files, which are otherwise deleted at the end. A process that is killed is started again. Raises
    InputError before anything is started.
    """
    if keep is not None and keep.exists() and any(keep.iterdir()):
        raise InputError("usage", f"--keep {keep}: is not empty; a sandbox makes its identities and ledgers anew")
    task = None if experiment.clients.app else find_task(experiment)
    directory = RunDirectory.free(out, experiment.experiment.name)
    folder = Path(tempfile.mkdtemp(prefix="bract-sandbox-")) if keep is None else keep
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        premises = furnish(folder, experiment, task, now=datetime.now(UTC))
        server, clients = _processes(premises, experiment, file, overrides, directory, as_json=as_json)
        with graceful_interrupt() as should_stop:
            try:
                return _watch(server, clients, should_stop, notice)
            finally:
                end_all([server])
                end_all(clients)
    finally:
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)


def _processes(
    premises: Premises, experiment: Experiment, file: Path, overrides: Sequence[str], out: Path, *, as_json: bool
) -> tuple[Supervised, list[Supervised]]:
    address = f"{HOST}:{_free_port()}"
    bract = (sys.executable, "-m", "bract")
    shown = ("--json",) if as_json else ()
    reach = ("--listen", address, "--identity", str(premises.server), *shown)
    wanted = [*overrides, f"clients.minimum={len(premises.sites)}"]
    given = [part for each in wanted for part in ("--set", each)]
    begin = (*bract, "server", str(file), *given, *reach, "--out", str(out))

    def again() -> Sequence[str]:
        if (out / "manifest.json").exists():
            return (*bract, "server", *reach, "--resume", str(out))
        # Killed before there was anything to go on with.
        shutil.rmtree(out, ignore_errors=True)
        return begin

    server = Supervised(name="server", command=begin, again=again)
    threads = str(max(1, (os.cpu_count() or 1) // len(premises.sites)))
    seeded = experiment.privacy.randomness == "seed"
    folder = str((experiment.folder or Path()).absolute())
    clients = []
    for site in premises.sites:
        command = [*bract, "client", "--server", address, "--identity", str(site.identity), "--policy"]
        command += [str(site.policy), "--state", str(site.state), "--code", folder]
        command += ["--device", experiment.train.device, *(["--seeded"] if seeded else [])]
        clients.append(
            Supervised(
                name=site.name,
                command=command,
                log=site.log,
                environment={"OMP_NUM_THREADS": threads},
            )
        )
    return server, clients


def _watch(
    server: Supervised, clients: Sequence[Supervised], should_stop: Callable[[], bool], notice: Callable[[str], None]
) -> int:
    """Return the exit status of the whole, once it has ended."""
    for each in (server, *clients):
        each.start()
    asked = False
    while True:
        if should_stop() and not asked:
            asked = True
            server.signal(signal.SIGTERM)
        if not asked and server.restart_if_killed():
            notice("the server was killed; it goes on from its last checkpoint")
        status = server.ended()
        if status is not None:
            _await_farewell(clients)
            return status if status >= 0 else 1
        for client in clients:
            if client.restart_if_killed():
                notice(f"client {client.name} was killed; it was started again")
            found = client.ended()
            # It has said why in its log: its server will wait for it in vain.
            if found is not None and found > 0 and not asked:
                notice(f"client {client.name} ended with status {found}: {client.last_words()}")
                server.signal(signal.SIGTERM)
                server.process.wait() if server.process else None
                return found
        time.sleep(_PAUSE)


def _await_farewell(clients: Sequence[Supervised]) -> None:
    """Give clients the time to end by themselves: their server said farewell."""
    until = time.monotonic() + _FAREWELL_SECONDS
    while time.monotonic() < until and any(each.ended() is None for each in clients):
        time.sleep(_PAUSE)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
