"""The certificate authority of a federation: a folder of its own, that only whoever runs the federation can read.

It holds `ca.pem` and `ca.key`, `index.jsonl` (a line for each certificate ever issued), `issued/` (the certificates),
and `revoked.pem`. A command holds the folder's lock from its first look to its last write, and writes in an order that
a kill leaves whole: certificate, index, list of the revoked, then what goes to others. The same command ends the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Self

from cryptography import x509

from ..core.errors import InputError, Refusal
from . import pem
from .certificates import (
    AUTHORITY_DAYS,
    CERTIFICATE_DAYS,
    Hosts,
    Role,
    authority_certificate,
    end_certificate,
    is_authority,
    read_request,
)
from .issued import INDEX, Issued, read_index, write_index
from .revocation import FILE as REVOKED
from .revocation import read_list, sign_list

CERTIFICATE = "ca.pem"
KEY = "ca.key"
ISSUED = "issued"


class Authority:
    """A federation's authority in its folder; safe for several processes."""

    def __init__(self, folder: Path, certificate: x509.Certificate, key: pem.PrivateKey) -> None:
        self.folder, self.certificate, self._key = folder, certificate, key

    @classmethod
    def create(cls, folder: Path, *, name: str, now: datetime, days: int = AUTHORITY_DAYS) -> Self:
        """Make an authority; InputError `authority-exists` where one is, or where a part of one lies."""
        key = pem.new_key()
        certificate = authority_certificate(key, name=name, now=now, days=days)
        pem.make_folder(folder)
        with pem.locked(folder):
            for file in (CERTIFICATE, KEY, INDEX):
                if (folder / file).exists():
                    raise InputError(
                        "authority-exists",
                        f"DIR = {folder}: already holds {file}; go on with that authority, or choose another folder",
                    )
            made = cls(folder, certificate, key)
            pem.make_folder(folder / ISSUED)
            pem.write(folder / KEY, pem.key_bytes(key), mode=0o600)
            write_index(folder, [])
            made._write_list([], now=now)
            # Last: what has a certificate is whole.
            pem.write(folder / CERTIFICATE, pem.certificate_bytes(certificate))
        return made

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open an authority; InputError if it is missing, damaged, or its key is open to other users."""
        mend = "`bract provision authority DIR` makes one; a lost one is restored from its backup"
        what = "the authority's certificate"
        path = folder / CERTIFICATE
        content = pem.read(path, what=what, mend=mend)
        certificate = pem.parse_certificate(content, path, what=what, mend=mend)
        key = pem.read_key(folder / KEY, what="the authority's key", mend=mend)
        if key.public_key() != certificate.public_key() or not is_authority(certificate):
            raise InputError("identity-mismatch", f"{path}: does not fit {KEY}; restore the two from one backup")
        return cls(folder, certificate, key)

    @property
    def fingerprint(self) -> str:
        """What a site has to be told by another way than the certificate itself."""
        return pem.fingerprint(self.certificate)

    def index(self) -> list[Issued]:
        """Return all certificates that were ever issued, oldest first."""
        return read_index(self.folder)

    def certificate_of(self, issued: Issued) -> bytes:
        """Return the PEM of a certificate that was issued."""
        path = self.folder / ISSUED / f"{issued.serial}.pem"
        return pem.read(path, what=f"the certificate of {issued.name}", mend="restore it from the authority's backup")

    def answer(self, issued: Issued) -> bytes:
        """Return what goes back to whom a certificate was issued: it, and the authority's. Nothing of it is secret."""
        return self.certificate_of(issued) + pem.certificate_bytes(self.certificate)

    def approve(
        self,
        request: bytes,
        *,
        where: str,
        now: datetime,
        name: str | None = None,
        fingerprint: str | None = None,
        days: int = CERTIFICATE_DAYS,
    ) -> Issued:
        """Issue a client's certificate for a request: for its public key and its name, whatever else it asks for.

        With `name` and `fingerprint` (of the site's key, as the site told it) the request has to be the one that is
        meant. The same request again gets the same certificate, as long as that is valid. Refusal `identity-taken` if
        the name, or the key, is another's; `identity-revoked` if the key was revoked.
        """
        wanted, key = read_request(request, where=where)
        shown = pem.key_fingerprint(key)
        if name is not None and wanted != name:
            raise Refusal("identity-mismatch", f"{where}: asks for the name {wanted}, not {name}; do not approve it")
        if fingerprint is not None and not pem.same_fingerprint(fingerprint, shown):
            raise Refusal(
                "identity-mismatch",
                f"{where}: its key has the fingerprint {shown}, not the one that you were told; do not approve it",
            )
        with self._changing(now) as index:
            again = self._free(index, name=wanted, key_fingerprint=shown, now=now)
            return again or self._issue(index, role="client", name=wanted, hosts=None, key=key, now=now, days=days)

    def serve(
        self, hosts: Hosts, key: pem.PublicKey, *, folder: Path, now: datetime, days: int = CERTIFICATE_DAYS
    ) -> Issued:
        """Issue a server's certificate for its hosts; `folder` is where lists of the revoked will be copied to."""
        with self._changing(now) as index:
            again = self._free(index, name=hosts.first, key_fingerprint=pem.key_fingerprint(key), now=now)
            if again and again.hosts == hosts.listed:
                return again
            return self._issue(
                index, role="server", name=hosts.first, hosts=hosts, key=key, now=now, days=days, folder=folder
            )

    def renew(self, name: str, *, now: datetime, days: int = CERTIFICATE_DAYS) -> Issued:
        """Issue the next certificate for the key that a name has; the one before stays valid until it expires."""
        with self._changing(now) as index:
            latest = next((each for each in reversed(index) if each.name.casefold() == name.casefold()), None)
            if latest is None:
                raise InputError("identity-unknown", f"{name}: no certificate has this name; {self._list()}")
            if any(each.revoked for each in index if each.key_fingerprint == latest.key_fingerprint):
                raise Refusal(
                    "identity-revoked",
                    f"{name}: its key was revoked, and is not certified again; make a new one, and approve its request",
                )
            before = x509.load_pem_x509_certificate(self.certificate_of(latest)).public_key()
            assert isinstance(before, pem.PublicKey)
            return self._issue(
                index,
                role=latest.role,
                name=latest.name,
                hosts=Hosts.of(latest.hosts) if latest.role == "server" else None,
                key=before,
                now=now,
                days=days,
                folder=None if latest.folder is None else Path(latest.folder),
            )

    def revoke(self, which: str, *, now: datetime) -> list[Issued]:
        """Revoke all certificates of a name, or the one of a serial number; return them. Again is no error."""
        serial = which.replace(":", "").lower().zfill(40)
        with self._changing(now) as index:
            meant = {each.serial for each in index if each.name.casefold() == which.casefold()}
            meant = meant or {each.serial for each in index if each.serial == serial}
            if not meant:
                raise InputError("identity-unknown", f"{which}: no certificate has this name or serial; {self._list()}")
            stamp = now.isoformat(timespec="seconds")
            for place, each in enumerate(index):
                if each.serial in meant and not each.revoked:
                    index[place] = replace(each, revoked=stamp)
            write_index(self.folder, index)
            self._write_list(index, now=now)
            return [each for each in index if each.serial in meant]

    def revocation_list(self) -> bytes:
        """Return the list of revoked certificates as it stands."""
        return pem.read(self.folder / REVOKED, what="the list of revoked certificates", mend="revoke again, or restore")

    @contextmanager
    def _changing(self, now: datetime) -> Iterator[list[Issued]]:
        with pem.locked(self.folder):
            end = self.certificate.not_valid_after_utc
            if now > end:
                raise InputError(
                    "identity-expired",
                    f"{self.folder / CERTIFICATE}: the authority expired on {end:%Y-%m-%d}; "
                    "make a new one, and provision the server and all sites from it",
                )
            index = self.index()
            self._mend_list(index, now=now)
            yield index

    def _mend_list(self, index: list[Issued], *, now: datetime) -> None:
        # A kill between the index and the list: the index is what counts.
        path = self.folder / REVOKED
        try:
            _, listed = read_list(path.read_bytes(), path, authority=self.certificate)
        except (OSError, InputError):
            listed = frozenset({-1})
        if listed != {int(each.serial, 16) for each in index if each.revoked}:
            self._write_list(index, now=now)

    def _free(self, index: list[Issued], *, name: str, key_fingerprint: str, now: datetime) -> Issued | None:
        """Return the valid certificate of just this name and key, or None; Refusal if name or key is another's."""
        for each in reversed(index):
            same_key, same_name = each.key_fingerprint == key_fingerprint, each.name.casefold() == name.casefold()
            if same_key and each.revoked:
                raise Refusal(
                    "identity-revoked",
                    f"{name}: its key was revoked with certificate {each.serial}, and is not certified again; "
                    "the site makes a new key in another folder",
                )
            if each.state(now) != "valid" or not (same_key or same_name):
                continue
            if same_key and each.name == name:
                return each
            held = (
                f"the key of {name} is that of {each.name}" if same_key else f"the name {name} is held by another key"
            )
            raise Refusal(
                "identity-taken",
                f"{held} (serial {each.serial}, until {each.expires[:10]}); if that key was lost, run "
                f"`bract provision revoke {each.name} --authority {self.folder}` first, else choose another name",
            )
        return None

    def _issue(
        self,
        index: list[Issued],
        *,
        role: Role,
        name: str,
        hosts: Hosts | None,
        key: pem.PublicKey,
        now: datetime,
        days: int,
        folder: Path | None = None,
    ) -> Issued:
        made = end_certificate(
            role=role,
            name=name,
            hosts=hosts,
            key=key,
            authority=self.certificate,
            authority_key=self._key,
            now=now,
            days=days,
        )
        issued = Issued(
            serial=pem.serial_text(made.serial_number),
            name=name,
            role=role,
            hosts=() if hosts is None else hosts.listed,
            issued=now.isoformat(timespec="seconds"),
            expires=made.not_valid_after_utc.isoformat(timespec="seconds"),
            key_fingerprint=pem.key_fingerprint(key),
            folder=None if folder is None else str(folder.absolute()),
        )
        # In the index before it leaves: what is not in the index could never be revoked.
        pem.write(self.folder / ISSUED / f"{issued.serial}.pem", pem.certificate_bytes(made))
        write_index(self.folder, [*index, issued])
        return issued

    def _write_list(self, index: list[Issued], *, now: datetime) -> None:
        revoked = {int(each.serial, 16): datetime.fromisoformat(each.revoked) for each in index if each.revoked}
        made = sign_list(revoked, number=len(revoked) + 1, authority=self.certificate, key=self._key, now=now)
        pem.write(self.folder / REVOKED, made)

    def _list(self) -> str:
        return f"`bract provision list {self.folder}` shows what was issued"
