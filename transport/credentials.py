"""gRPC's credentials from an identity: mutual TLS, and nothing weaker by default."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import datetime

import grpc

from ..core.errors import InputError
from .identities import Identity


def channel_credentials(identity: Identity) -> grpc.ChannelCredentials:
    """Return what a client dials with: its certificate, and the federation's authority as the only one it trusts."""
    return grpc.ssl_channel_credentials(identity.authority, identity.key, identity.certificate)


def server_credentials(
    identity: Identity, *, clock: Callable[[], datetime], problem: Callable[[str], None]
) -> grpc.ServerCredentials:
    """Return what a server listens with: only clients with a certificate of the federation's authority get in.

    The identity's folder is looked at for each handshake, so that a renewed certificate is shown from the next one on,
    without a restart; if what lies there is no good, `problem` gets the sentence and the last good one goes on.
    """
    fetcher = _Fetcher(identity, clock=clock, problem=problem)
    return grpc.dynamic_ssl_server_credentials(_configuration(identity), fetcher, require_client_authentication=True)


class _Fetcher:
    """Gives gRPC a new configuration when the certificate on the disk has changed, else None."""

    def __init__(self, identity: Identity, *, clock: Callable[[], datetime], problem: Callable[[str], None]) -> None:
        self._identity, self._clock, self._problem = identity, clock, problem
        self._seen = self._stamp()
        # gRPC asks from threads of its own.
        self._lock = threading.Lock()

    def __call__(self) -> grpc.ServerCertificateConfiguration | None:
        with self._lock:
            stamp = self._stamp()
            if stamp == self._seen:
                return None
            self._seen = stamp
            try:
                self._identity = Identity.load(self._identity.folder, role="server", now=self._clock())
            except InputError as error:
                self._problem(error.sentence)
                return None
            return _configuration(self._identity)

    def _stamp(self) -> tuple[int, ...]:
        try:
            found = (self._identity.folder / "server.pem").stat()
        except OSError:
            return ()
        return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _configuration(identity: Identity) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(identity.key, identity.certificate)], identity.authority)
