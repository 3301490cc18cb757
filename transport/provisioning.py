"""How an identity comes to be: the steps at a site and at a server; `Authority` has those of the federation's keeper.

A site's key is made at the site and stays there. What travels is public: the request out, the certificate back. Two
fingerprints are told by another way, as by telephone: the site's key's before the keeper approves, and the authority's
before the site installs.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from ..core.errors import InputError, Refusal
from . import pem
from .authority import Authority
from .certificates import CERTIFICATE_DAYS, Hosts, Role, check_name, is_authority, new_request
from .identities import (
    AUTHORITY,
    Identity,
    check_certificate,
    read_authority,
    refuse_other_authority,
    role_in,
)
from .issued import Issued
from .revocation import FILE as REVOKED
from .revocation import read_list

Answer = tuple[x509.Certificate, x509.Certificate]


@dataclass(frozen=True, kw_only=True)
class Request:
    """A site's request: the file to send, and the fingerprint of its key to tell the keeper."""

    name: str
    file: Path
    key_fingerprint: str


def request(name: str, folder: Path) -> Request:
    """Make a site's key and its request; asked again before the certificate came, the same key requests again."""
    check_name(name, of="NAME")
    pem.make_folder(folder)
    with pem.locked(folder):
        key = _key_for(folder, "client")
        file = folder / f"{name}.request.pem"
        pem.write(file, new_request(name, key).public_bytes(Encoding.PEM))
    return Request(name=name, file=file, key_fingerprint=pem.key_fingerprint(key.public_key()))


def serve(authority: Authority, folder: Path, hosts: Hosts, *, now: datetime, days: int = CERTIFICATE_DAYS) -> Identity:
    """Make a server's identity where its authority is at hand; ended by the same call if it was killed."""
    pem.make_folder(folder)
    with pem.locked(folder):
        key = _key_for(folder, "server")
        issued = authority.serve(hosts, key.public_key(), folder=folder, now=now, days=days)
        pem.write(folder / REVOKED, authority.revocation_list())
        pem.write(folder / AUTHORITY, pem.certificate_bytes(authority.certificate))
        pem.write(folder / "server.pem", authority.certificate_of(issued))
    return Identity.load(folder, role="server", now=now)


def install(file: Path, folder: Path, *, fingerprint: str | None, now: datetime) -> Identity:
    """Put what the authority answered, first or renewed, beside the key that it was issued for.

    The first time `fingerprint` has to be that of the authority, told by another way: it pins the authority for good.
    Refusal `identity-unpinned` without it, and `identity-mismatch` for another authority or another key's certificate.
    """
    role = role_in(folder)
    content = pem.read(file, what="the authority's answer", mend="`bract provision approve` or `renew` writes it")
    certificate, authority = read_answer(content, file)
    path = folder / f"{role}.pem"
    with pem.locked(folder):
        if (folder / AUTHORITY).exists():
            refuse_other_authority(file, read_authority(folder, role=role), authority)
        elif fingerprint is None:
            raise Refusal(
                "identity-unpinned",
                f"{file}: nothing yet says that its authority is the right one; give --fingerprint as whoever runs the "
                "federation told it, and not by the way that this file came",
            )
        if fingerprint is not None and not pem.same_fingerprint(fingerprint, pem.fingerprint(authority)):
            raise Refusal(
                "identity-mismatch",
                f"{file}: comes from an authority with fingerprint {pem.fingerprint(authority)}, which is not the one "
                "that you gave; do not install it, and ask who runs the federation",
            )
        key = pem.read_key(folder / f"{role}.key", what="the key", mend="restore it, or request a new identity")
        if certificate.public_key() != key.public_key():
            raise Refusal(
                "identity-mismatch",
                f"{file}: its certificate was issued for another key than {folder / role}.key; install it where its "
                "request was made",
            )
        check_certificate(certificate, file, role=role, authority=authority, authority_path=file, now=now)
        pem.write(folder / AUTHORITY, pem.certificate_bytes(authority))
        pem.write(path, pem.certificate_bytes(certificate))
    return Identity.load(folder, role=role, now=now)


def read_answer(content: bytes, file: Path) -> Answer:
    """Return the certificate and the authority's certificate of an answer; InputError if it holds anything else."""
    mend = "`bract provision approve` or `renew` writes it anew"
    found = pem.parse_certificates(content, file, what="the authority's answer", mend=mend)
    authorities = [each for each in found if is_authority(each)]
    if len(found) != 2 or len(authorities) != 1:
        raise InputError(
            "identity-unreadable", f"{file}: has to hold a certificate and its authority's, and nothing else; {mend}"
        )
    return next(each for each in found if each is not authorities[0]), authorities[0]


def hand_over(authority: Authority, issued: Issued, *, now: datetime) -> bool:
    """Install a server's renewed certificate in its folder, if that is on this machine; say whether it was."""
    folder = _server_folder(authority, issued)
    if folder is None or role_in(folder) != "server":
        return False
    with pem.locked(folder):
        key = pem.read_key(folder / "server.key", what="the server's key", mend="make a new server identity")
        if pem.key_fingerprint(key.public_key()) != issued.key_fingerprint:
            return False
        pem.write(folder / "server.pem", authority.certificate_of(issued))
    Identity.load(folder, role="server", now=now)
    return True


def publish(authority: Authority) -> tuple[list[Path], list[Path]]:
    """Copy the list of revoked certificates to all server folders; return those that have it, and those not here."""
    reached: list[Path] = []
    elsewhere: list[Path] = []
    for folder, here in _server_folders(authority).items():
        if here:
            # Another command may have been faster, with a later list.
            _put_list(authority.revocation_list(), authority.folder / REVOKED, folder)
        (reached if here else elsewhere).append(folder)
    return reached, elsewhere


def install_list(file: Path, folder: Path) -> None:
    """Put a list of revoked certificates into a server's folder; Refusal for an older one."""
    content = pem.read(file, what="the list of revoked certificates", mend=f"copy {REVOKED} from the authority")
    if role_in(folder) != "server":
        raise InputError(
            "identity-mismatch", f"{file}: a site reads no list of revoked certificates; install it at the server"
        )
    if not _put_list(content, file, folder):
        raise Refusal("identity-mismatch", f"{file}: is older than {folder / REVOKED}; copy it from the authority anew")


def _put_list(content: bytes, file: Path, folder: Path) -> bool:
    pinned = read_authority(folder, role="server")
    number, _ = read_list(content, file, authority=pinned)
    target = folder / REVOKED
    with pem.locked(folder):
        with contextlib.suppress(OSError, InputError):
            if number < read_list(target.read_bytes(), target, authority=pinned)[0]:
                return False
        pem.write(target, content)
    return True


def _server_folders(authority: Authority) -> dict[Path, bool]:
    found = {}
    for issued in authority.index():
        if issued.folder is not None:
            found[Path(issued.folder)] = _server_folder(authority, issued) is not None
    return found


def _server_folder(authority: Authority, issued: Issued) -> Path | None:
    """Return the folder of a server that is on this machine and trusts this authority."""
    if issued.folder is None:
        return None
    folder = Path(issued.folder)
    try:
        here = read_authority(folder, role="server") == authority.certificate
    except InputError:
        return None
    return folder if here else None


def _key_for(folder: Path, role: Role) -> pem.PrivateKey:
    """Return the key of an identity that has no certificate yet, made if need be."""
    for other in ("server", "client"):
        if (folder / f"{other}.pem").exists() or (other != role and (folder / f"{other}.key").exists()):
            raise InputError(
                "identity-exists",
                f"DIR = {folder}: already is the identity of a {other}; renew that one, or choose another folder",
            )
    path = folder / f"{role}.key"
    if path.exists():
        return pem.read_key(path, what="the key", mend="delete it if no certificate was made for it")
    key = pem.new_key()
    pem.write(path, pem.key_bytes(key), mode=0o600)
    return key


def is_list(file: Path) -> bool:
    """Say whether a file is a list of revoked certificates, and not a certificate."""
    mend = "`bract provision approve`, `renew` or `revoke` writes it"
    return b"BEGIN X509 CRL" in pem.read(file, what="the file", mend=mend)
