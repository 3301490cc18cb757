"""The files of certificates and keys: written whole and durably, read with a sentence for whatever is wrong."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from ..core.errors import InputError

PrivateKey = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey

# A certificate takes less than 1 KiB, a list of a thousand revoked ones 40 KiB.
LARGEST = 4 << 20
# What cryptography raises for bytes that are not what they should be.
MALFORMED = (ValueError, TypeError, UnsupportedAlgorithm)


def new_key() -> PrivateKey:
    """Return a fresh ECDSA P-256 key from the operating system's randomness.

    Not Ed25519: gRPC's TLS offers no Ed25519 signatures, so a handshake with such a certificate fails.
    """
    return ec.generate_private_key(ec.SECP256R1())


def key_bytes(key: PrivateKey) -> bytes:
    """Return a private key as unencrypted PKCS #8 PEM; for a file of mode 0600 and for gRPC, nothing else."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def certificate_bytes(certificate: x509.Certificate) -> bytes:
    """Return a certificate as PEM."""
    return certificate.public_bytes(Encoding.PEM)


def fingerprint(certificate: x509.Certificate) -> str:
    """Return the SHA-256 of a certificate as `openssl x509 -fingerprint -sha256` prints it: 32 pairs of digits."""
    return certificate.fingerprint(hashes.SHA256()).hex(":").upper()


def key_fingerprint(key: PublicKey) -> str:
    """Return the SHA-256 of a public key (its SubjectPublicKeyInfo), written as a certificate's fingerprint is."""
    digest = hashes.Hash(hashes.SHA256())
    digest.update(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))
    return digest.finalize().hex(":").upper()


def same_fingerprint(given: str, actual: str) -> bool:
    """Compare a fingerprint that a person typed, with or without colons, to the whole of the actual one."""
    return "".join(given.split()).replace(":", "").upper() == actual.replace(":", "")


def serial_text(serial: int) -> str:
    """Return a serial number as 40 hexadecimal digits."""
    return f"{serial:040x}"


def is_p256(key: object) -> bool:
    """Say whether a public or private key is ECDSA on P-256, the only kind that bract certifies."""
    return isinstance(key, PublicKey | PrivateKey) and isinstance(key.curve, ec.SECP256R1)


def read(path: Path, *, what: str, mend: str) -> bytes:
    """Return a file; InputError `identity-missing` or `identity-unreadable` that says what it should hold."""
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST + 1)
    except FileNotFoundError:
        raise InputError("identity-missing", f"{path}: {what} is not there; {mend}") from None
    except OSError as error:
        raise InputError("identity-unreadable", f"{path}: {what} cannot be read ({error.strerror}); {mend}") from error
    if len(content) > LARGEST:
        raise InputError(
            "identity-unreadable", f"{path}: is larger than {LARGEST >> 20} MiB, so it is not {what}; {mend}"
        )
    return content


def parse_certificate(content: bytes, path: Path, *, what: str, mend: str) -> x509.Certificate:
    """Return the one certificate of a PEM file; InputError `identity-unreadable`."""
    found = parse_certificates(content, path, what=what, mend=mend)
    if len(found) != 1:
        raise InputError("identity-unreadable", f"{path}: holds {len(found)} certificates, not {what} alone; {mend}")
    return found[0]


def parse_certificates(content: bytes, path: Path, *, what: str, mend: str) -> list[x509.Certificate]:
    """Return the certificates of a PEM file in their order; InputError `identity-unreadable`."""
    try:
        return x509.load_pem_x509_certificates(content)
    except MALFORMED as error:
        raise InputError("identity-unreadable", f"{path}: is not {what} (no PEM certificate); {mend}") from error


def read_key(path: Path, *, what: str, mend: str) -> PrivateKey:
    """Return a private key; InputError if it is missing, open to other users, or no P-256 key."""
    content = read(path, what=what, mend=mend)
    if path.stat().st_mode & 0o077:
        raise InputError(
            "identity-unreadable",
            f"{path}: other users may read {what}; run `chmod 600 {path}`, and replace the key if one of them did",
        )
    try:
        key = load_pem_private_key(content, password=None)
    except MALFORMED:
        # The cause may quote what it could not parse.
        raise InputError("identity-unreadable", f"{path}: is not {what} (no plain PEM key); {mend}") from None
    if not isinstance(key, PrivateKey) or not is_p256(key):
        raise InputError("identity-unreadable", f"{path}: {what} has to be an ECDSA P-256 key; {mend}")
    return key


def write(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Write a file whole, so that a kill leaves the old content or the new; on the disk when this returns."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    with writing(path):
        try:
            # Born with the mode it keeps, whatever the umask: a key is at no moment readable by others.
            handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "wb") as file:
                os.fchmod(file.fileno(), mode)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        _sync(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder for its owner alone, if it is not there."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _sync(folder.parent)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder against other processes that change it; waits for its turn."""
    with writing(folder):
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        with writing(folder):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the file system refuses into InputError `provision-unwritable`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InputError(
            "provision-unwritable",
            f"{path}: cannot be written ({reason}); check the disk's space and the folder's permissions",
        ) from error


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
