"""Over mutual TLS the server knows a client by its certificate, and lets nobody else in."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta

import grpc
import pytest

from bract.clients.connection.link import Link
from bract.core import flower
from bract.core.errors import BractError, Refusal, RunError
from bract.server.connections.federation_grid import FederationGrid
from bract.server.connections.listener import Listener
from bract.transport import provisioning
from bract.transport.authority import Authority
from bract.transport.certificates import Hosts
from bract.transport.channel import Credentials
from bract.transport.credentials import channel_credentials, server_credentials
from bract.transport.peers import admit, peer
from bract.transport.revocation import FILE, Revocations

from .federation import DEADLINES, QUICK, Counter, messages

NOW = datetime.now(UTC)


class Federation:
    """An authority, a server's identity, and sites'."""

    def __init__(self, folder):
        self.folder = folder
        self.authority = Authority.create(folder / "ca", name="test", now=NOW - timedelta(days=50))
        self.server = provisioning.serve(self.authority, folder / "server", Hosts.of(["127.0.0.1"]), now=NOW)

    def site(self, name, now=NOW, days=30):
        asked = provisioning.request(name, self.folder / name)
        issued = self.authority.approve(asked.file.read_bytes(), where="", now=now, days=days)
        answer = self.folder / f"{name}.answer"
        answer.write_bytes(self.authority.answer(issued))
        return provisioning.install(answer, self.folder / name, fingerprint=self.authority.fingerprint, now=now)


def pem_of(identity, authority=None):
    return Credentials(certificate=identity.certificate, key=identity.key, authority=(authority or identity).authority)


@pytest.fixture
def federation(tmp_path):
    return Federation(tmp_path / "ours")


@pytest.fixture
def listener(federation):
    with Listener("127.0.0.1:0", pem_of(federation.server), deadlines=DEADLINES) as listening:
        yield listening


def link(listener, credentials, *, name="", connect_for=1.5):
    return Link(
        Counter("site-0"), f"127.0.0.1:{listener.port}", credentials, name=name, backoff=QUICK, connect_for=connect_for
    )


def test_the_name_is_the_certificates_whatever_the_client_says(federation, listener):
    made = link(listener, pem_of(federation.site("site-0")), name="site-9")
    thread = threading.Thread(target=made.run)
    thread.start()
    (there,) = listener.wait_for_clients(1, seconds=20)
    assert (there.name, there.node) == ("site-0", flower.node_id("site-0"))
    grid = FederationGrid(listener, run_name="r")
    assert [reply.has_content() for reply in grid.exchange(messages(grid.get_node_ids()))] == [True]
    listener.stop()
    thread.join(10)
    assert not thread.is_alive()


def test_who_has_no_certificate_of_the_authority_does_not_get_in(federation, listener, tmp_path):
    other = Federation(tmp_path / "other")
    expired = federation.site("site-7", now=NOW - timedelta(days=40), days=30)
    strangers = {
        "another authority's": pem_of(other.site("site-0"), federation.server),
        "expired": pem_of(expired),
        "none": lambda: grpc.ssl_channel_credentials(federation.server.authority),
    }
    for credentials in strangers.values():
        with pytest.raises(RunError) as caught:
            link(listener, credentials).run()
        assert caught.value.code == "server-unreachable"
    # A server of another authority is not spoken to, and a server's certificate is no client's.
    with pytest.raises(RunError):
        link(listener, pem_of(federation.site("site-1"), other.server)).run()
    with pytest.raises(BractError):
        link(listener, pem_of(federation.server)).run()
    assert listener.status() == []


def test_without_tls_nobody_gets_in(listener):
    with pytest.raises(RunError) as caught:
        link(listener, None, name="site-0").run()
    assert caught.value.code == "server-unreachable" and listener.status() == []


def test_a_revoked_client_is_out_at_once_and_for_good(federation):
    revocations = Revocations(federation.server.folder / FILE, federation.server.authority)

    def gatekeeper(context):
        client = peer(context)
        admit(client, revocations, now=datetime.now(UTC))
        return client.name

    shown = server_credentials(federation.server, clock=lambda: NOW, problem=print)
    with Listener("127.0.0.1:0", shown, deadlines=DEADLINES, gatekeeper=gatekeeper) as listener:
        site = federation.site("site-0")
        errors = []

        def serve():
            try:
                link(listener, lambda: channel_credentials(site)).run()
            except BractError as error:
                errors.append(error)

        thread = threading.Thread(target=serve)
        thread.start()
        listener.wait_for_clients(1, seconds=20)
        federation.authority.revoke("site-0", now=NOW)
        provisioning.publish(federation.authority)
        listener.call(listener.recheck)
        thread.join(10)
        assert [type(error) for error in errors] == [Refusal] and errors[0].code == "identity-revoked"
        with pytest.raises(Refusal):
            link(listener, pem_of(site)).run()
