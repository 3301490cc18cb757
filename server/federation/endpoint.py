"""Where a server listens, what it shows there, and whom it lets in: mutual TLS, or nothing on the loopback."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import grpc

from ...core.errors import InputError
from ...transport.channel import refuse_insecure, split_address
from ...transport.credentials import server_credentials
from ...transport.identities import Identity, Reminder
from ...transport.peers import admit, peer
from ...transport.revocation import FILE, Revocations
from ..connections.session import Gatekeeper


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """An address with credentials and a gatekeeper, or on the loopback with neither.

    `warning` returns what the screen should say of the certificate, at most once a day while the server runs.
    """

    address: str
    credentials: grpc.ServerCredentials | None
    gatekeeper: Gatekeeper | None
    warning: Callable[[], str | None] = lambda: None


def open_endpoint(
    address: str, identity: Path | None, *, clock: Callable[[], datetime], problem: Callable[[str], None]
) -> Endpoint:
    """Return the end that a server listens on; InputError for an identity or an address that is no good.

    The certificate and the list of revoked ones are read again whenever they change; `problem`, which may be called in
    any thread, is told of what is wrong with them then. Without identity only the loopback will do.
    """
    split_address(address)
    if identity is None:
        refuse_insecure(address)
        return Endpoint(address=address, credentials=None, gatekeeper=None)
    if not identity.is_dir():
        raise InputError(
            "identity-missing",
            f"--identity {identity}: there is no such folder; `bract provision server DIR` makes a server's identity",
        )
    shown = Identity.load(identity, role="server", now=clock())
    revocations = Revocations(identity / FILE, shown.authority)
    told: list[str | None] = [None]

    def gatekeeper(context: Mapping[str, Iterable[bytes]]) -> str:
        client = peer(context)
        admit(client, revocations, now=clock())
        if revocations.problem != told[0]:
            told[0] = revocations.problem
            if told[0] is not None:
                problem(told[0])
        return client.name

    credentials = server_credentials(shown, clock=clock, problem=problem)
    warning = Reminder(identity, role="server", clock=clock)
    return Endpoint(address=address, credentials=credentials, gatekeeper=gatekeeper, warning=warning)
