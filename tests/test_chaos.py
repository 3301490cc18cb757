"""Disks that fill up, connections that are cut or fall silent: a federation says so and goes on."""

from __future__ import annotations

import os
import selectors
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bract.experiment import Experiment
from bract.server.events import ClientFailed, ClientReplied, RoundFinished
from bract.server.run_directory import RunDirectory

from .serving import ANYWHERE, Owner, Served, address_in, tables, until

# A disk of its own for one process, which the test reaches through /proc.
SMALL_DISK = 'mount -t tmpfs -o size="$1" small "$2" && cp -a "$3"/. "$2" && shift 3 && exec "$@"'


def has_mounts() -> bool:
    command = ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "small", "/mnt"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


needs_mounts = pytest.mark.skipif(not has_mounts(), reason="needs mount namespaces for users")


class SmallDisk:
    """A process that sees a small disk at `folder`, which holds what lay there."""

    def __init__(self, folder: Path, size: str, *command: str) -> None:
        self.folder, aside = folder, folder.with_name(f"{folder.name}-before")
        shutil.copytree(folder, aside, copy_function=shutil.copy2)
        self.process = subprocess.Popen(
            [
                *("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", SMALL_DISK, "sh", size, folder, aside),
                *(sys.executable, "-m", "bract", *command),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    @property
    def seen(self) -> Path:
        return Path(f"/proc/{self.process.pid}/root{self.folder}")

    def fill(self) -> None:
        """Leave no byte, whatever the process removes meanwhile."""
        deadline = time.monotonic() + 30
        with (self.seen / "filler").open("wb", buffering=0) as file:
            while shutil.disk_usage(self.seen).free:
                assert time.monotonic() < deadline
                for size in (1 << 16, 1 << 10, 1):
                    try:
                        while file.write(bytes(size)) == size:
                            pass
                    except OSError:
                        continue

    def free(self) -> None:
        (self.seen / "filler").unlink()

    def end(self) -> tuple[int, str]:
        try:
            _, said = self.process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return self.process.returncode, said.decode()


@needs_mounts
def test_a_site_with_a_full_disk_trains_nothing_says_so_and_goes_on_once_there_is_room(tmp_path):
    rounds = 60
    paris, rome = Owner(tmp_path, "paris"), Owner(tmp_path, "rome")
    served = Served(
        Experiment.of(tables(experiment__rounds=rounds, server__quorum=0.5, privacy__noise_multiplier=20.0)),
        tmp_path / "run",
    )
    paris.join(served.address)
    how = ["--server", served.address, "--policy", str(rome.policy), "--state", str(rome.state)]
    site = SmallDisk(rome.state, "1m", "client", *how, "--insecure", "--name", "rome")

    def replies() -> int:
        return sum(each.client == "rome" for each in served.seen(ClientReplied))

    served.until(lambda: replies() >= 2)
    site.fill()
    served.until(lambda: len(served.seen(ClientFailed)) >= 2)
    failed = len(served.seen(ClientFailed))
    site.free()
    before = replies()
    served.until(lambda: replies() >= before + 2)
    result = served.end()
    status, said = site.end()
    # A message that was refused is also what the client's status says in the end.
    assert result.status == "completed" and status == 3, said
    codes = {(each.client, each.code) for each in served.seen(ClientFailed)}
    assert codes == {("rome", "ledger-unwritable")}, said
    assert "Traceback" not in said and "nothing was trained" in said
    # The federation never stopped for it, and who was refused has not trained.
    assert [each.record["clients"] for each in served.seen(RoundFinished)].count(1) >= failed
    assert len(served.seen(RoundFinished)) == rounds


@needs_mounts
def test_a_server_with_a_full_disk_ends_in_words_and_goes_on_once_there_is_room(tmp_path):
    owners = [Owner(tmp_path, "paris"), Owner(tmp_path, "rome")]
    path, parent = tmp_path / "experiment.toml", tmp_path / "disk"
    path.write_text(Experiment.of(tables(experiment__rounds=40, privacy__noise_multiplier=20.0)).to_toml())
    parent.mkdir()
    run = parent / "run"
    server = SmallDisk(parent, "2m", "server", str(path), "--listen", ANYWHERE, "--insecure", "--out", str(run))
    address = address_in(server.seen / "run")
    joined = [owner.join(address) for owner in owners]
    lines = server.seen / "run" / "metrics.jsonl"
    until(lambda: lines.exists() and len(lines.read_text().splitlines()) >= 2)
    kept = os.open(server.seen, os.O_RDONLY)
    server.fill()
    status, said = server.end()
    assert status == 1, said
    assert "Traceback" not in said and "cannot be written" in said, said
    # The disk outlives the process as long as somebody holds it: what was written is whole.
    rescued = tmp_path / "rescued"
    shutil.copytree(f"/proc/self/fd/{kept}/run", rescued)
    os.close(kept)
    again = Served(Experiment.load(path), None, existing=RunDirectory.open(rescued), address=address)
    result = again.end(120)
    for thread in joined:
        thread.join(30)
    assert result.status == "completed" and all(owner.failure is None for owner in owners)
    # No round was charged twice.
    assert {owner.spending().reservations for owner in owners} == {41}


class Proxy:
    """A TCP proxy in front of a server that can cut connections, or let nothing through without a word."""

    def __init__(self, port: int) -> None:
        self._target, self._open = port, []
        self.silent, self.refuses = threading.Event(), threading.Event()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """End all connections at once, as a reset does."""
        for each in self._open:
            each.close()
        self._open.clear()

    def close(self) -> None:
        self._listening.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                taken, _ = self._listening.accept()
            except OSError:
                return
            if self.refuses.is_set():
                taken.close()
                continue
            try:
                onward = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                taken.close()
                continue
            self._open += [taken, onward]
            threading.Thread(target=self._carry, args=(taken, onward), daemon=True).start()

    def _carry(self, one: socket.socket, other: socket.socket) -> None:
        try:
            with selectors.DefaultSelector() as ready:
                ready.register(one, selectors.EVENT_READ, other)
                ready.register(other, selectors.EVENT_READ, one)
                while True:
                    for key, _ in ready.select(0.2):
                        content = key.fileobj.recv(1 << 16)
                        if not content:
                            return
                        if not self.silent.is_set():
                            key.data.sendall(content)
        except (OSError, ValueError):
            pass
        finally:
            one.close()
            other.close()


@pytest.mark.parametrize("how", ["cut", "silent"])
def test_a_network_that_is_cut_or_falls_silent_heals(tmp_path, how):
    """Nobody's reply is lost, nobody trains twice, and nobody waits for ever."""
    rounds = 12
    owners = [Owner(tmp_path, "paris"), Owner(tmp_path, "rome")]
    changed = tables(experiment__rounds=rounds, privacy__noise_multiplier=20.0, server__stall_after=1, train__epochs=3)
    served = Served(Experiment.of(changed), tmp_path / "run")
    proxy = Proxy(int(served.address.rpartition(":")[2]))
    joined = [owners[0].join(served.address), owners[1].join(proxy.address)]

    def finished() -> int:
        return len(served.seen(RoundFinished))

    # A connection that is opened while nothing gets through is given up after 10 s.
    for number in (2, 5, 8) if how == "cut" else (2,):
        served.until(lambda number=number: finished() >= number)
        if how == "cut":
            proxy.refuses.set()
            proxy.cut()
        else:
            proxy.silent.set()
        time.sleep(1.5)
        proxy.refuses.clear()
        proxy.silent.clear()
    result = served.end(120)
    for thread in joined:
        thread.join(30)
    proxy.close()
    assert result.status == "completed" and [owner.failure for owner in owners] == [None, None]
    assert finished() == rounds
    # Whatever was cut off: each round's reply of the site behind the proxy arrived, and was charged once.
    assert served.seen(ClientFailed) == []
    assert [each.record["clients"] for each in served.seen(RoundFinished)] == [2] * rounds
    assert [owner.spending().reservations for owner in owners] == [rounds + 1] * 2
