"""The identity of a server or a site: a folder with its key, its certificate, and the authority that it trusts.

A site's folder holds `client.key` (made there, 0600, never leaving it), `client.pem` and `ca.pem`; a server's the same
as `server.…`, and `revoked.pem`. Whatever is wrong is one sentence: which side, which certificate, what to do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from cryptography import x509

from ..core.errors import InputError, Refusal
from . import pem
from .certificates import Role, is_authority, issued_by, name_of, role_of

AUTHORITY = "ca.pem"
WARNING = timedelta(days=30)
_DAY = timedelta(days=1)
SIDES = {"server": "the server", "client": "this site"}


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A checked identity; certificate, key and authority are PEM, as gRPC takes them."""

    role: Role
    name: str
    certificate: bytes
    key: bytes = field(repr=False)
    authority: bytes
    serial: int
    expires: datetime
    authority_expires: datetime
    folder: Path

    @classmethod
    def load(cls, folder: Path, *, role: Role, now: datetime) -> Identity:
        """Read and check a folder; InputError that names the side, the certificate and the mend.

        Refused: what is missing or cannot be read, a key that others may read or that does not fit the certificate, a
        certificate of another authority, for another use, expired, or not yet valid at `now`.
        """
        side = SIDES[role]
        path = folder / f"{role}.pem"
        what, mend = f"{side}'s certificate", _anew(role)
        if role == "client" and not path.exists() and (folder / "client.key").exists():
            mend = "it comes from the authority (`bract provision approve`); then run `bract provision install` here"
            raise InputError("identity-missing", f"{path}: {what} is not there; {mend}")
        authority = read_authority(folder, role=role)
        certificate = pem.parse_certificate(pem.read(path, what=what, mend=mend), path, what=what, mend=mend)
        key = pem.read_key(folder / f"{role}.key", what=f"{side}'s key", mend=_anew(role))
        if key.public_key() != certificate.public_key():
            raise InputError(
                "identity-mismatch",
                f"{path}: {side}'s certificate does not fit its key {role}.key; put back the pair, or {_anew(role)}",
            )
        name = check_certificate(
            certificate, path, role=role, authority=authority, authority_path=folder / AUTHORITY, now=now
        )
        return cls(
            role=role,
            name=name,
            certificate=pem.certificate_bytes(certificate),
            key=pem.key_bytes(key),
            authority=pem.certificate_bytes(authority),
            serial=certificate.serial_number,
            expires=certificate.not_valid_after_utc,
            authority_expires=authority.not_valid_after_utc,
            folder=folder,
        )

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the authority's certificate, by which it is pinned."""
        return pem.fingerprint(x509.load_pem_x509_certificate(self.authority))


def warn(identity: Identity, now: datetime) -> str | None:
    """Return a sentence if the certificate, or its authority, expires within 30 days; None before."""
    end = identity.authority_expires
    if end - now <= WARNING:
        return (
            f"{identity.folder / AUTHORITY}: the federation's authority expires on {end:%Y-%m-%d} "
            f"({_days(end - now)}); its keeper makes a new one and provisions all sides from it"
        )
    if identity.expires - now <= WARNING:
        return (
            f"{identity.folder / identity.role}.pem: {SIDES[identity.role]}'s certificate expires on "
            f"{identity.expires:%Y-%m-%d} ({_days(identity.expires - now)}); the authority's keeper runs "
            f"`bract provision renew {identity.name}`, and what that writes is installed here"
        )
    return None


class Reminder:
    """Says of an identity's folder what a running process should be told, at most once a day.

    The folder is read each time: it may have been renewed.
    """

    def __init__(self, folder: Path, *, role: Role, clock: Callable[[], datetime]) -> None:
        self._folder, self._role, self._clock = folder, role, clock
        self._asked: datetime | None = None

    def __call__(self) -> str | None:
        """Return the warning of an end that is near, or what is wrong with the folder by now; else None."""
        now = self._clock()
        if self._asked is not None and now - self._asked < _DAY:
            return None
        self._asked = now
        try:
            return warn(Identity.load(self._folder, role=self._role, now=now), now)
        except InputError as error:
            return error.sentence


def read_authority(folder: Path, *, role: Role) -> x509.Certificate:
    """Return the authority that an identity trusts; InputError if it is missing or no authority's certificate."""
    path = folder / AUTHORITY
    what = f"the authority that {SIDES[role]} trusts"
    mend = f"copy {AUTHORITY} from the authority's folder, or {_anew(role)}"
    content = pem.read(path, what=what, mend=mend)
    authority = pem.parse_certificate(content, path, what=what, mend=mend)
    if not is_authority(authority):
        raise InputError("identity-mismatch", f"{path}: is not the certificate of an authority; {_anew(role)}")
    return authority


def check_certificate(
    certificate: x509.Certificate,
    path: Path,
    *,
    role: Role,
    authority: x509.Certificate,
    authority_path: Path,
    now: datetime,
) -> str:
    """Return the name in a certificate that this authority issued, for this role, and that is valid at `now`."""
    which = f"{path}: {SIDES[role]}'s certificate (serial {pem.serial_text(certificate.serial_number)})"
    if not issued_by(certificate, authority):
        raise InputError(
            "identity-mismatch",
            f"{which} was not issued by the authority in {AUTHORITY} ({pem.fingerprint(authority)[:11]}…); put in the "
            "one of this federation",
        )
    found, name = role_of(certificate), name_of(certificate)
    if found != role or name is None:
        actual = f"that of a {found}" if found and found != role else "for another use"
        raise InputError("identity-mismatch", f"{which} is {actual}, and a {role}'s is needed; {_anew(role)}")
    renew = f"the authority's keeper runs `bract provision renew {name}`, and what that writes is installed here"
    other = "its keeper makes a new one and provisions all sides from it"
    for each, whose, mend in (
        (authority, f"{authority_path}: the federation's authority", other),
        (certificate, which, renew),
    ):
        if now > each.not_valid_after_utc:
            end = f"{each.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
            raise InputError("identity-expired", f"{whose} expired on {end}; {mend}")
        if now < each.not_valid_before_utc:
            start = f"{each.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
            clock = f"{now.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
            raise InputError(
                "identity-expired",
                f"{whose} is valid from {start} on, and this machine's clock shows {clock}; set the clock",
            )
    return name


def role_in(folder: Path) -> Role:
    """Return which side a folder is the identity of, by its key; InputError if it is none, or both."""
    roles: tuple[Literal["server"], Literal["client"]] = ("server", "client")
    found: list[Role] = [role for role in roles if (folder / f"{role}.key").exists()]
    if len(found) != 1:
        holds = "both server.key and client.key" if found else "neither server.key nor client.key"
        raise InputError(
            "identity-missing",
            f"DIR = {folder}: holds {holds}; `bract provision request` or `bract provision server` makes an identity",
        )
    return found[0]


def refuse_other_authority(path: Path, pinned: x509.Certificate, given: x509.Certificate) -> None:
    """Refuse to put another authority in the place of the one that an identity trusts."""
    if pinned != given:
        raise Refusal(
            "identity-mismatch",
            f"{path}: comes from an authority with fingerprint {pem.fingerprint(given)}, and this identity trusts "
            f"{pem.fingerprint(pinned)}; ask who runs the federation, and request a new identity if it was replaced",
        )


def _anew(role: Role) -> str:
    return {
        "server": "`bract provision server DIR` makes it anew",
        "client": "`bract provision request NAME --out DIR` begins anew in another folder",
    }[role]


def _days(left: timedelta) -> str:
    return "today" if left < timedelta(days=1) else f"in {left.days} day{'' if left.days == 1 else 's'}"
