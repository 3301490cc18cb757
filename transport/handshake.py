"""Why a site and a server do not come together: one handshake by hand, and the sentence that gRPC does not give.

gRPC says "failed to connect" to a client and, as a server, closes the connection without a TLS alert. So a client that
gets no connection dials once more, with the standard library's TLS and the same files, and sees what was wrong.
"""

from __future__ import annotations

import socket
import ssl
from datetime import datetime

from cryptography import x509

from ..core.errors import InputError, RunError
from . import pem
from .identities import SIDES, Identity

# X509_V_ERR_… of OpenSSL's x509_vfy.h.
_NOT_YET_VALID, _EXPIRED, _PURPOSE, _HOST, _ADDRESS = 9, 10, 26, 62, 64


def diagnose(
    host: str, port: int, identity: Identity, *, now: datetime, server_name: str | None = None, timeout: float = 5.0
) -> InputError | RunError | None:
    """Dial a server as this identity would, and return what is wrong in one sentence; None if TLS is not to blame.

    Blocks for up to `timeout` seconds a step; sends nothing but the handshake. `server_name` is the name that the
    server's certificate has to hold, by default the host.
    """
    where, expected = f"{host}:{port}", server_name or host
    trusting = _context(identity, check=True)
    trusting.load_cert_chain(identity.folder / f"{identity.role}.pem", identity.folder / f"{identity.role}.key")
    try:
        answered = _shake(trusting, host, port, expected, timeout)
    except ssl.SSLCertVerificationError as error:
        return _server_side(error, where, expected, _shown(identity, host, port, expected, timeout), now)
    except ssl.SSLError as error:
        reason = error.reason or "no handshake"
        if reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "UNEXPECTED_EOF_WHILE_READING"):
            reason = "it does not speak TLS; was it started with --insecure, or is this another service?"
        return RunError("server-untrusted", f"--server = {where}: {reason}")
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        return RunError(
            "server-unreachable",
            f"--server = {where}: cannot be reached ({reason}); check host and port, and that the server runs",
        )
    if answered:
        return None
    return RunError(
        "identity-rejected",
        f"the server at {where} closed the connection when it saw {SIDES[identity.role]}'s certificate "
        f"{identity.folder / identity.role}.pem ({identity.name}, serial {pem.serial_text(identity.serial)}), which is "
        "valid here; it trusts another authority, or its clock is wrong: compare authority and clock with its keeper",
    )


def _server_side(
    error: ssl.SSLCertVerificationError, where: str, expected: str, shown: x509.Certificate | None, now: datetime
) -> RunError:
    which = f"the server's certificate at {where}"
    if shown is not None:
        which += f" (serial {pem.serial_text(shown.serial_number)})"
    if error.verify_code in (_HOST, _ADDRESS):
        listed = ", ".join(_hosts(shown)) or "other names"
        return RunError(
            "server-untrusted",
            f"{which} is for {listed}, not for {expected}; dial one of these, or have the server provisioned for "
            f"--name {expected}",
        )
    if error.verify_code == _EXPIRED:
        end = "" if shown is None else f" on {shown.not_valid_after_utc:%Y-%m-%d}"
        return RunError(
            "server-untrusted",
            f"{which} expired{end} (this clock: {now:%Y-%m-%d}); who runs it renews it by `bract provision renew`",
        )
    if error.verify_code == _NOT_YET_VALID:
        return RunError(
            "server-untrusted", f"{which} is not valid yet at {now:%Y-%m-%d %H:%M}; set this machine's clock"
        )
    if error.verify_code == _PURPOSE:
        return RunError("server-untrusted", f"{which} is not that of a server; do not go on, and ask who runs it")
    return RunError(
        "server-untrusted",
        f"{which} was not issued by the authority that this site trusts ({error.verify_message}); do not go on: is it "
        "the right address, and the identity of this federation?",
    )


def _context(identity: Identity, *, check: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    if check:
        context.load_verify_locations(cadata=identity.authority.decode("ascii"))
    else:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _shake(context: ssl.SSLContext, host: str, port: int, expected: str, timeout: float) -> bool:
    """Return whether the server still talks after the handshake: with TLS 1.3 it looks at the client's only then."""
    with (
        socket.create_connection((host, port), timeout) as raw,
        context.wrap_socket(raw, server_hostname=expected) as stream,
    ):
        try:
            # HTTP/2 servers speak first.
            return bool(stream.recv(1))
        except TimeoutError:
            return True
        except OSError:
            return False


def _shown(identity: Identity, host: str, port: int, expected: str, timeout: float) -> x509.Certificate | None:
    """Return the certificate that a server shows, trusted or not: only to name it."""
    try:
        with (
            socket.create_connection((host, port), timeout) as raw,
            _context(identity, check=False).wrap_socket(raw, server_hostname=expected) as stream,
        ):
            shown = stream.getpeercert(binary_form=True)
            return None if shown is None else x509.load_der_x509_certificate(shown)
    except (OSError, *pem.MALFORMED):
        return None


def _hosts(shown: x509.Certificate | None) -> list[str]:
    if shown is None:
        return []
    try:
        names = shown.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (*pem.MALFORMED, x509.ExtensionNotFound):
        return []
    texts = [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]
    # What a stranger wrote into a certificate goes to a terminal.
    return [text for text in texts[:8] if text.isascii() and text.isprintable()]
