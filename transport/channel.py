"""How both sides open their ends: certificates as PEM, or none on this machine's loopback; gRPC's options."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

import grpc

from ..core.errors import InputError
from .wire import FRAME

OPTIONS = (
    ("grpc.max_receive_message_length", FRAME),
    ("grpc.max_send_message_length", FRAME),
    # TCP connections that are cut without a word are given up by these, besides the protocol's own heartbeats.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
)
SERVER_OPTIONS = (
    *OPTIONS,
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    # A second server on the same port must fail, not share it.
    ("grpc.so_reuseport", 0),
    # A client needs one, and a health check another.
    ("grpc.max_concurrent_streams", 8),
)
CLIENT_OPTIONS = (
    *OPTIONS,
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
)


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """One side's certificate chain and key, and the authority that it trusts, as PEM.

    `server_name` is the name that a client expects in the server's certificate, where that is not the address.
    """

    certificate: bytes
    key: bytes
    authority: bytes
    server_name: str | None = None

    def __repr__(self) -> str:
        return "Credentials(…)"

    def for_server(self) -> grpc.ServerCredentials:
        """Return what a server shows; it asks each client for a certificate of the authority."""
        return grpc.ssl_server_credentials(
            [(self.key, self.certificate)], root_certificates=self.authority, require_client_auth=True
        )

    def for_client(self) -> grpc.ChannelCredentials:
        """Return what a client shows."""
        return grpc.ssl_channel_credentials(self.authority, self.key, self.certificate)


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of `host:port` or `[host]:port`; InputError `address-unusable`."""
    host, _, port = address.rpartition(":")
    plain = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    plain = "" if plain.strip("[]") != plain else plain
    if not plain or not port.isascii() or not port.isdigit() or int(port) > 65535 or (":" in plain) != (plain != host):
        raise InputError("address-unusable", f"address = {address!r}: must be host:port, such as 127.0.0.1:9092")
    return plain, int(port)


def refuse_insecure(address: str) -> None:
    """Raise InputError `insecure-refused` unless the address is this machine's loopback."""
    host, _ = split_address(address)
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise InputError(
            "insecure-refused",
            f"address = {address!r}: without certificates only 127.0.0.1, [::1] or localhost; make identities with "
            "`bract provision`",
        )
