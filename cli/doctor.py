"""`bract doctor`: is this machine fit for bract; each line says what to mend."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal

import typer

from .output import JsonOption, finish, print_json, status, wrapped

GIGABYTE = 1e9
# torch is tried in a process of its own: a build that this processor cannot run ends there, not here.
TORCH_PROBE = """
import json, torch
gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
assert torch.ones(3).sum() == 3, "it does not add up"
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda, "gpus": gpus}))
"""


@dataclass(frozen=True)
class Check:
    """One line of the doctor: a part of the machine, how it fares, what was seen, and the mend."""

    part: str
    state: Literal["ok", "warn", "fail"]
    seen: str
    mend: str | None = None


def doctor(
    folder: Annotated[
        Path, typer.Option(metavar="DIR", help="Where runs shall lie: its disk and permissions are tried.")
    ] = Path("."),
    port: Annotated[
        int, typer.Option(min=0, max=65535, metavar="PORT", help="A port to listen on; 0 tries any free one.")
    ] = 0,
    as_json: JsonOption = False,
) -> None:
    """Look whether this machine is fit for bract; exit status 1 if something must be mended first."""
    with status("looking at this machine"):
        checks = [
            check_python(),
            *check_packages(metadata.requires("bract") or ()),
            check_torch(),
            check_processors(),
            check_memory(),
            check_disk(folder),
            check_permissions(folder),
            check_port(port),
            check_clock(),
            check_entropy(),
        ]
    failed = [check for check in checks if check.state == "fail"]
    if as_json:
        print_json({"schema": 1, "fit": not failed, "checks": [asdict(check) for check in checks]})
    else:
        for check in checks:
            print("\n".join(wrapped(check.seen, first=f"{check.state:<5} {check.part:<12} ")))
            if check.mend is not None:
                print("\n".join(wrapped(check.mend, first=f"{'':<19}→ ")))
        print("This machine is fit." if not failed else f"{len(failed)} to mend before bract can be trusted here.")
    finish(1 if failed else 0)


def check_python(version: tuple[int, int] = sys.version_info[:2]) -> Check:
    """Look at the version of Python."""
    seen = ".".join(map(str, version))
    if (3, 11) <= version < (3, 14):
        return Check("Python", "ok", seen)
    return Check("Python", "fail", f"{seen} is not supported", "use Python 3.11, 3.12 or 3.13")


def check_packages(requirements: Iterable[str]) -> list[Check]:
    """Compare what is installed with the ranges that were tested; one line if all is well."""
    from packaging.requirements import Requirement

    checks, fine = [], 0
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        mend = f"pip install '{requirement}'"
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            checks.append(Check("packages", "fail", f"{requirement.name} is not installed", mend))
            continue
        if requirement.specifier.contains(version, prereleases=True):
            fine += 1
        else:
            seen = f"{requirement.name} {version} is outside of the tested range {requirement.specifier}"
            checks.append(Check("packages", "warn", seen, mend))
    return [Check("packages", "ok", f"{fine} in their tested ranges"), *checks] if fine else checks


def check_torch(python: str = sys.executable) -> Check:
    """Import torch in another process, and ask it for GPUs."""
    mend = "install torch anew: pip install --force-reinstall -c constraints.txt torch"
    try:
        probe = subprocess.run([python, "-c", TORCH_PROBE], capture_output=True, text=True, timeout=120)
        found = json.loads(probe.stdout) if probe.returncode == 0 else None
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        return Check("torch", "fail", f"could not be tried: {type(error).__name__}", mend)
    if found is None:
        lines = probe.stderr.strip().splitlines() or [f"its process ended with status {probe.returncode}"]
        return Check("torch", "fail", f"does not work here: {lines[-1]}", mend)
    if found["gpus"]:
        return Check("torch", "ok", f"{found['version']}, GPU: {', '.join(found['gpus'])}")
    if shutil.which("nvidia-smi") is not None:
        why = "is built without CUDA" if found["cuda"] is None else "cannot use the driver"
        seen = f"{found['version']} {why}, though this machine has an NVIDIA driver: training runs on the CPU"
        return Check("torch", "warn", seen, "install the CUDA build of torch that fits the driver")
    return Check("torch", "ok", f"{found['version']}, no GPU: training runs on the CPU")


def check_processors() -> Check:
    """Count the processors that this process may use."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if count > 1:
        return Check("processors", "ok", str(count))
    return Check("processors", "warn", "1: runs will be slow", "give this machine a second one")


def check_memory() -> Check:
    """Look at the memory that this process may use, the limit of its container included."""
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        size = min(size, int(text))
    return judge_size("memory", size, least=1.5 * GIGABYTE, enough=4 * GIGABYTE, mend="torch and Flower take 0.5 GB")


def check_disk(folder: Path) -> Check:
    """Look at the free space where runs shall lie."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return Check("disk", "fail", f"{folder}: {error.strerror}", "name a folder that is there: --folder DIR")
    return judge_size("disk", free, least=0.2 * GIGABYTE, enough=2 * GIGABYTE, mend="free some, or use --folder DIR")


def judge_size(part: str, size: float, *, least: float, enough: float, mend: str) -> Check:
    """Return ok from `enough` bytes on, fail below `least`."""
    seen = f"{size / GIGABYTE:.1f} GB"
    if size >= enough:
        return Check(part, "ok", seen)
    return Check(part, "fail" if size < least else "warn", f"{seen} is little", mend)


def check_permissions(folder: Path) -> Check:
    """Write a secret where runs shall lie, and see whether it stays its owner's alone."""
    mend = "use a folder of your own on a local disk: --folder DIR"
    try:
        with tempfile.TemporaryDirectory(prefix=".bract-doctor-", dir=folder) as place:
            secret = Path(place) / "key"
            secret.touch(mode=0o600)
            with secret.open("wb") as file:
                file.write(b"0" * 32)
                os.fsync(file.fileno())
            os.replace(secret, Path(place) / "kept")
            open_to_others = (Path(place) / "kept").stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    except OSError as error:
        return Check("permissions", "fail", f"{folder} cannot be written: {error.strerror}", mend)
    if open_to_others:
        return Check("permissions", "fail", f"{folder.resolve()} cannot keep a file from other users", mend)
    return Check("permissions", "ok", f"{folder.resolve()} is writable and can keep secrets")


def check_port(port: int) -> Check:
    """Listen on this machine's own address, and connect to it."""
    try:
        with socket.create_server(("127.0.0.1", port)) as server:
            address = server.getsockname()
            with socket.create_connection(address, timeout=5):
                server.settimeout(5)
                server.accept()[0].close()
    except OSError as error:
        mend = "choose another port" if port else "let processes of this machine talk over 127.0.0.1"
        return Check("ports", "fail", f"127.0.0.1:{port}: {error.strerror or error}", mend)
    return Check("ports", "ok", f"127.0.0.1:{address[1]} can be listened on")


def check_clock(now: datetime | None = None) -> Check:
    """Look whether the clock tells a possible time, and runs evenly: certificates and records need it."""
    now = now or datetime.now(UTC)
    seen, mend = f"{now:%Y-%m-%d %H:%M:%S} UTC", "set the clock, by NTP for example"
    installed = datetime.fromtimestamp(Path(__file__).stat().st_mtime, UTC)
    if now < installed:
        return Check("clock", "warn", f"{seen} is before bract was installed ({installed:%Y-%m-%d})", mend)
    wall, steady = time.time(), time.monotonic()
    time.sleep(0.05)
    if abs((time.time() - wall) - (time.monotonic() - steady)) > 0.02:
        return Check("clock", "warn", f"{seen}, but it jumps", mend)
    return Check("clock", "ok", seen)


def check_entropy() -> Check:
    """Look whether the operating system gives secret random bytes without waiting."""
    try:
        drawn = os.getrandom(32, os.GRND_NONBLOCK) if hasattr(os, "getrandom") else os.urandom(32)
    except BlockingIOError:
        return Check(
            "randomness", "fail", "the system's generator is not seeded yet", "wait, or add a source of entropy"
        )
    except OSError as error:
        return Check(
            "randomness", "fail", f"the system gives none: {error.strerror}", "allow the system call getrandom"
        )
    if drawn == os.urandom(32):
        return Check("randomness", "fail", "the system repeats itself", "do not train here: every key would be known")
    return Check("randomness", "ok", "from the operating system")
