"""The list of revoked certificates: an X.509 CRL (RFC 5280, section 5) that the authority signs and a server reads.

gRPC's TLS looks at no such list. So a server asks `Revocations` when a client says hello, and on a timer for the
streams that are open; the list is read again whenever its file has changed, and a revocation takes effect by then.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from ..core.errors import InputError
from . import pem

FILE = "revoked.pem"
WHAT = "the list of revoked certificates"
MEND = f"copy {FILE} anew from the authority's folder"


def sign_list(
    revoked: Mapping[int, datetime], *, number: int, authority: x509.Certificate, key: pem.PrivateKey, now: datetime
) -> bytes:
    """Return the PEM of a list: serial numbers and when they were revoked, and a number that grows with every list."""
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.subject)
        .last_update(now)
        # Revoked is revoked: a list holds until the next one comes, or its authority expires.
        .next_update(max(authority.not_valid_after_utc, now))
        .add_extension(x509.CRLNumber(number), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
    )
    for serial, at in revoked.items():
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(at).build()
        builder = builder.add_revoked_certificate(entry)
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)


def read_list(content: bytes, path: Path, *, authority: x509.Certificate) -> tuple[int, frozenset[int]]:
    """Return a list's number and serials; InputError if it is damaged, or another authority's."""
    try:
        found = x509.load_pem_x509_crl(content)
        key = authority.public_key()
        signed = isinstance(key, pem.PublicKey) and found.is_signature_valid(key)
        number = found.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
        serials = frozenset(each.serial_number for each in found)
    except (*pem.MALFORMED, x509.ExtensionNotFound) as error:
        raise InputError("identity-unreadable", f"{path}: is not {WHAT}, or damaged; {MEND}") from error
    if not signed:
        raise InputError("identity-mismatch", f"{path}: {WHAT} was not signed by this federation's authority; {MEND}")
    return number, serials


class Revocations:
    """The revoked certificates as a running server sees them; safe for threads.

    Without a good list there is no server: the first read raises InputError. Later a damaged, missing or older file
    changes nothing that is known: the last good list goes on to hold, and `problem` says what to mend.
    """

    def __init__(self, file: Path, authority: bytes) -> None:
        self._path = file
        self._authority = x509.load_pem_x509_certificate(authority)
        self._lock = threading.Lock()
        self._seen = self._stamp()
        self._number, self._serials = self._read()
        self.problem: str | None = None

    def is_revoked(self, serial: int) -> bool:
        """Say whether a certificate was revoked, by the list as it lies on the disk now."""
        self.refresh()
        return serial in self._serials

    def refresh(self) -> None:
        """Read the list again if its file has changed."""
        with self._lock:
            stamp = self._stamp()
            if stamp == self._seen:
                return
            try:
                number, serials = self._read()
                if number < self._number:
                    raise InputError("identity-mismatch", f"{self._path}: an older list was put back; {MEND}")
            except InputError as error:
                self.problem = f"{error.sentence}; until then the last good list holds"
            else:
                self._number, self._serials, self.problem = number, serials, None
            self._seen = stamp

    def _read(self) -> tuple[int, frozenset[int]]:
        return read_list(pem.read(self._path, what=WHAT, mend=MEND), self._path, authority=self._authority)

    def _stamp(self) -> tuple[int, ...]:
        try:
            found = self._path.stat()
        except OSError:
            return ()
        return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
