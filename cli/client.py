"""`bract client`: a data owner's end of a federation."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from .output import status


def client(
    server: Annotated[str, typer.Option("--server", metavar="HOST:PORT", help="Where the server listens.")],
    policy: Annotated[Path, typer.Option(metavar="FILE", help="The owner's policy: what a server may ask.")],
    state: Annotated[Path, typer.Option(metavar="DIR", help="The state directory, made by `bract ledger init DIR`.")],
    identity: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The site's identity (`bract provision request`, `install`).")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Where the data set lies, instead of data.NAME.path.")
    ] = None,
    data_set: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which data set of the policy; by default its only one.")
    ] = None,
    code: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where own code lies; by default beside the policy.")
    ] = None,
    experiment: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Take part in this experiment alone, and refuse any other.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Wait for the next federation when one ends, for ever.")] = False,
    device: Annotated[
        str, typer.Option(metavar="auto|cpu|cuda:0", help="What to train on; auto: a GPU if any.")
    ] = "auto",
    connect_for: Annotated[
        float,
        typer.Option(metavar="SECONDS", min=0, help="How long the server may be out of reach; no end with --keep."),
    ] = 300.0,
    log_format: Annotated[
        Literal["text", "json"], typer.Option(help="One line an event on stderr, as text or as JSON.")
    ] = "text",
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="The site's name; a certificate has it already.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Without certificates; on this machine's loopback alone.")
    ] = False,
    seeded: Annotated[
        bool, typer.Option("--seeded", help="Repeat a simulation bit for bit; loopback alone, protects nobody.")
    ] = False,
) -> int:
    """Take part in a federation with this machine's data, within the owner's policy and ledger."""
    from ..clients.connection.screen import Screen
    from ..core.errors import BractError, InputError
    from ..privacy.policy import Policy

    # gRPC would write of each failed handshake between the lines of the screen, which say what was wrong.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    screen = Screen(log_format)
    found: Any = None

    def stop(number: int, frame: object) -> None:
        if found is None or not found.linked:
            raise KeyboardInterrupt
        found.stop()

    before = {each: signal.signal(each, stop) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        if (identity is None) != insecure:
            raise InputError(
                "usage", "--identity DIR: is how a site is known; or give --insecure, on the loopback alone"
            )
        owners = Policy.load(policy)
        name_of_data = owners.choose(data_set)
        if data is not None:
            owners = owners.at(name_of_data, data)
        with status("loading torch, opacus and flwr"):
            from ..clients.connection.service import Client, Wishes
        found = Client(
            Wishes(
                server=server,
                policy=owners,
                state=state,
                identity=identity,
                name=name,
                data_set=name_of_data,
                code=code,
                expected=experiment,
                keep=keep,
                seeded=seeded,
                device=device,
                connect_for=connect_for,
            ),
            screen,
        )
        ended = found.run()
        if ended == "stopped":
            raise KeyboardInterrupt
        screen("finished", "the federation has ended")
        ended_with = 0
    except BractError as error:
        screen.fail(error.code, error.sentence)
        ended_with = error.exit_status
    except KeyboardInterrupt:
        screen("stopped", "stopped; what was under way is begun again by the next start")
        ended_with = 130
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    if found is not None and found.busy:
        _leave(ended_with)
    return ended_with


def _leave(exit_status: int) -> NoReturn:
    """End the process at once: Python would wait for the training, which is begun again with the same noise anyway."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_status)
