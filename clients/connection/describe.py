"""Describe: what a client asks a server before it joins."""

from __future__ import annotations

import grpc

from ...core.errors import CATALOGUE, Refusal, RunError
from ...transport.announcement import Announcement, question
from ...transport.channel import CLIENT_OPTIONS, Credentials
from ...transport.wire import DESCRIBE, shown
from .stream import Shown


def describe(address: str, credentials: Shown, *, seconds: float = 10.0) -> Announcement | str:
    """Return what the server announces, or, where it was not reached, why: to be asked again.

    Blocks for at most `seconds`. Raises Refusal with the server's own code, or RunError for an answer that this side
    cannot read.
    """
    if credentials is None:
        channel = grpc.insecure_channel(address, options=CLIENT_OPTIONS)
    elif isinstance(credentials, Credentials):
        named = credentials.server_name
        options = (*CLIENT_OPTIONS, ("grpc.ssl_target_name_override", named)) if named else CLIENT_OPTIONS
        channel = grpc.secure_channel(address, credentials.for_client(), options=options)
    else:
        channel = grpc.secure_channel(address, credentials(), options=CLIENT_OPTIONS)
    try:
        raw: bytes = channel.unary_unary(DESCRIBE)(question(), timeout=seconds)
    except grpc.RpcError as error:
        return _why(error)
    finally:
        channel.close()
    return Announcement.read(raw)


def _why(error: grpc.RpcError) -> str:
    status, details = error.code(), str(error.details() or "")
    if status is grpc.StatusCode.UNIMPLEMENTED:
        raise RunError(
            "protocol-unsupported", "the server announces no experiment; it is no `bract server`, or an older one"
        )
    code, separator, sentence = details.partition(": ")
    if separator and code in CATALOGUE and status is not grpc.StatusCode.UNAVAILABLE:
        raise Refusal(code, f"the server refused: {shown(sentence, 500)}")
    return details or str(status.name)
