"""Who is at the other end of a stream: what a server takes from the TLS session of a client, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from cryptography import x509

from ..core.errors import Refusal
from .certificates import name_of, role_of
from .pem import MALFORMED, serial_text
from .revocation import Revocations


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A client as its certificate names it; TLS has checked the authority's signature and the dates."""

    name: str
    serial: int
    expires: datetime


def peer(auth_context: Mapping[str, Iterable[bytes]]) -> Peer:
    """Return the client of a stream from gRPC's `context.auth_context()`; Refusal `peer-unnamed` if it shows none.

    What TLS verified is the certificate, so that is what is read: never metadata, which the client writes itself.
    """
    given = [*auth_context.get("x509_pem_cert", ())]
    if len(given) != 1:
        raise Refusal("peer-unnamed", "the client showed no certificate; it connects with --identity DIR")
    try:
        certificate = x509.load_pem_x509_certificate(given[0])
    except MALFORMED as error:
        raise Refusal("peer-unnamed", "the client's certificate cannot be read; provision the site anew") from error
    name = name_of(certificate)
    if name is None or role_of(certificate) != "client":
        raise Refusal(
            "peer-unnamed",
            f"the client's certificate (serial {serial_text(certificate.serial_number)}) is not that of a site; "
            "it connects with what `bract provision request` and `install` made",
        )
    return Peer(name=name, serial=certificate.serial_number, expires=certificate.not_valid_after_utc)


def peer_name(auth_context: Mapping[str, Iterable[bytes]]) -> str:
    """Return the name of the client of a stream; Refusal `peer-unnamed`."""
    return peer(auth_context).name


def admit(client: Peer, revocations: Revocations, *, now: datetime) -> None:
    """Refuse a client whose certificate was revoked, or has expired while its stream was open.

    To be asked when a client says hello, and on a timer for open streams: TLS asks for neither after its handshake.
    """
    which = f"the certificate of site {client.name} (serial {serial_text(client.serial)})"
    if revocations.is_revoked(client.serial):
        raise Refusal(
            "identity-revoked",
            f"{which} was revoked by the federation's authority; a site that is to come back makes a new key by "
            "`bract provision request`",
        )
    if now > client.expires:
        raise Refusal(
            "identity-expired",
            f"{which} expired on {client.expires:%Y-%m-%d}; the authority makes a new one by "
            f"`bract provision renew {client.name}`, and the site installs it",
        )
