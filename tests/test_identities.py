"""The federation's identities: who gets in, who does not, and what each failure says."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import ssl
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from bract.core.errors import BractError, InputError, Refusal
from bract.server.federation.endpoint import open_endpoint
from bract.transport import pem, provisioning
from bract.transport.authority import Authority
from bract.transport.certificates import Hosts, end_certificate, name_of, role_of
from bract.transport.credentials import channel_credentials, server_credentials
from bract.transport.handshake import diagnose
from bract.transport.identities import Identity, warn
from bract.transport.peers import admit, peer, peer_name
from bract.transport.revocation import Revocations, sign_list

NOW = datetime.now(UTC)
DAY = timedelta(days=1)
LOCAL = Hosts.of(["localhost"], ["127.0.0.1"])


def site(authority: Authority, folder: Path, name: str = "berlin", *, now: datetime = NOW, days: int = 365) -> Identity:
    """Provision a site, with its files on their way out and back."""
    asked = provisioning.request(name, folder)
    issued = authority.approve(asked.file.read_bytes(), where=str(asked.file), now=now, days=days)
    answer = folder / "answer.pem"
    answer.write_bytes(authority.answer(issued))
    return provisioning.install(answer, folder, fingerprint=authority.fingerprint, now=now)


@pytest.fixture
def federation(tmp_path: Path) -> SimpleNamespace:
    authority = Authority.create(tmp_path / "ca", name="hospitals", now=NOW - 900 * DAY)
    server = provisioning.serve(authority, tmp_path / "server", LOCAL, now=NOW)
    return SimpleNamespace(
        path=tmp_path, authority=authority, server=server, berlin=site(authority, tmp_path / "berlin")
    )


def refused(code: str, call: Callable[[], object]) -> str:
    with pytest.raises(BractError) as raised:
        call()
    assert raised.value.code == code, raised.value.sentence
    assert "\n" not in raised.value.sentence and "PRIVATE" not in raised.value.sentence
    return raised.value.sentence


# A running server


@contextlib.asynccontextmanager
async def serving(server: Identity) -> AsyncIterator[SimpleNamespace]:
    """Run a server that answers each message with the client's name, and asks for revocations each time."""
    problems: list[str] = []
    revocations = Revocations(server.folder / "revoked.pem", server.authority)

    async def answer(messages, context):
        async for _ in messages:
            client = peer(context.auth_context())
            try:
                admit(client, revocations, now=datetime.now(UTC))
            except Refusal as refusal:
                await context.abort(grpc.StatusCode.UNAUTHENTICATED, refusal.sentence)
            yield client.name.encode()

    running = grpc.aio.server()
    handler = grpc.stream_stream_rpc_method_handler(answer)
    running.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bract", {"hello": handler}),))
    credentials = server_credentials(server, clock=lambda: datetime.now(UTC), problem=problems.append)
    port = running.add_secure_port("127.0.0.1:0", credentials)
    await running.start()
    try:
        yield SimpleNamespace(port=port, problems=problems, revocations=revocations)
    finally:
        await running.stop(0)


async def hello(port: int, credentials: grpc.ChannelCredentials, host: str = "localhost") -> str:
    """Return the name by which the server knows whoever dials, or raise AioRpcError."""
    async with grpc.aio.secure_channel(f"{host}:{port}", credentials) as channel:
        stream = channel.stream_stream("/bract/hello")(timeout=10)
        await stream.write(b"hello")
        return (await stream.read()).decode()


async def turned_away(port: int, credentials: grpc.ChannelCredentials, host: str = "localhost") -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await hello(port, credentials, host)
    return raised.value


async def diagnosis(port: int, identity: Identity, host: str = "localhost") -> BractError | None:
    return await asyncio.to_thread(diagnose, host, port, identity, now=NOW)


def test_a_name_of_several_words_comes_back_from_its_certificate(federation) -> None:
    made = site(federation.authority, federation.path / "va", "VA Long Beach")
    assert made.name == name_of(x509.load_pem_x509_certificate(made.certificate)) == "VA Long Beach"


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_a_provisioned_site_gets_in_and_is_known_by_its_certificate(federation, host) -> None:
    async def run() -> None:
        async with serving(federation.server) as server:
            assert await hello(server.port, channel_credentials(federation.berlin), host) == "berlin"
            assert await diagnosis(server.port, federation.berlin, host) is None

    asyncio.run(run())


def test_a_client_without_a_certificate_is_turned_away(federation) -> None:
    async def run() -> None:
        async with serving(federation.server) as server:
            nobody = grpc.ssl_channel_credentials(federation.server.authority)
            assert (await turned_away(server.port, nobody)).code() is grpc.StatusCode.UNAVAILABLE
            with pytest.raises(grpc.aio.AioRpcError):
                async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
                    await channel.unary_unary("/bract/hello")(b"", timeout=5)
            assert await hello(server.port, channel_credentials(federation.berlin)) == "berlin"

    asyncio.run(run())


def stranger(federation) -> Identity:
    """Return a site of another authority that bears a known name, and trusts this federation's server."""
    other = Authority.create(federation.path / "other", name="hospitals", now=NOW)
    made = site(other, federation.path / "stranger")
    return replaced_authority(made, federation.server.authority)


def replaced_authority(identity: Identity, authority: bytes) -> Identity:
    return Identity(**{**identity.__dict__, "authority": authority})


def expired(federation) -> Identity:
    return site(federation.authority, federation.path / "expired", "paris", now=NOW - 400 * DAY, days=30)


@pytest.mark.parametrize("who", [stranger, expired, lambda federation: federation.server])
def test_a_wrong_certificate_is_turned_away_by_tls_and_the_sentence_names_it(federation, who) -> None:
    identity = who(federation)

    async def run() -> None:
        async with serving(federation.server) as server:
            error = await turned_away(server.port, channel_credentials(identity))
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            found = await diagnosis(server.port, identity)
            assert found is not None and found.code == "identity-rejected"
            assert f"{identity.serial:040x}" in found.sentence
            assert str(identity.folder / f"{identity.role}.pem") in found.sentence
            assert await hello(server.port, channel_credentials(federation.berlin)) == "berlin"

    asyncio.run(run())


def host_elsewhere(federation) -> Identity:
    return provisioning.serve(federation.authority, federation.path / "host", Hosts.of(["fl.example.org"]), now=NOW)


def server_expired(federation) -> Identity:
    hosts = Hosts.of(["old.example.org", "localhost"], ["127.0.0.1"])
    return provisioning.serve(federation.authority, federation.path / "old", hosts, now=NOW - 400 * DAY, days=30)


def server_of_others(federation) -> Identity:
    other = Authority.create(federation.path / "other", name="hospitals", now=NOW)
    return provisioning.serve(other, federation.path / "impostor", LOCAL, now=NOW)


def client_as_server(federation) -> Identity:
    made = site(federation.authority, federation.path / "mallory", "localhost.example")
    shutil.copy(federation.server.folder / "revoked.pem", made.folder)
    return made


@pytest.mark.parametrize(
    ("who", "words"),
    [
        (host_elsewhere, "is for fl.example.org, not for localhost; dial one of these"),
        (server_expired, "expired on"),
        (server_of_others, "was not issued by the authority that this site trusts"),
        (client_as_server, "is not that of a server"),
    ],
)
def test_a_site_does_not_talk_to_a_wrong_server_and_says_why(federation, who, words) -> None:
    identity = who(federation)

    async def run() -> None:
        async with serving(identity) as server:
            error = await turned_away(server.port, channel_credentials(federation.berlin))
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            found = await diagnosis(server.port, federation.berlin)
            assert found is not None and found.code == "server-untrusted"
            assert words in found.sentence
            assert f"the server's certificate at localhost:{server.port}" in found.sentence
            assert f"{identity.serial:040x}" in found.sentence

    asyncio.run(run())


def test_a_server_without_tls_and_no_server_are_told_apart(federation) -> None:
    async def run() -> None:
        plain = grpc.aio.server()
        port = plain.add_insecure_port("127.0.0.1:0")
        await plain.start()
        found = await diagnosis(port, federation.berlin, "127.0.0.1")
        await plain.stop(0)
        assert found is not None and found.code == "server-untrusted" and "--insecure" in found.sentence

    asyncio.run(run())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        found = diagnose("127.0.0.1", taken.getsockname()[1], federation.berlin, now=NOW)
    assert found is not None and found.code == "server-unreachable" and "refused" in found.sentence


def test_a_revocation_takes_effect_on_a_running_server_and_on_its_open_streams(federation) -> None:
    paris = site(federation.authority, federation.path / "paris", "paris")

    async def run() -> None:
        async with serving(federation.server) as server:
            async with grpc.aio.secure_channel(f"localhost:{server.port}", channel_credentials(paris)) as channel:
                stream = channel.stream_stream("/bract/hello")(timeout=10)
                await stream.write(b"hello")
                assert await stream.read() == b"paris"
                federation.authority.revoke("paris", now=NOW)
                assert provisioning.publish(federation.authority) == ([federation.server.folder], [])
                await stream.write(b"still there")
                with pytest.raises(grpc.aio.AioRpcError) as raised:
                    await stream.read()
                assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED
                said = raised.value.details()
                assert said is not None and f"site paris (serial {paris.serial:040x}) was revoked" in said
            with pytest.raises(grpc.aio.AioRpcError, match="was revoked"):
                await hello(server.port, channel_credentials(paris))
            assert await hello(server.port, channel_credentials(federation.berlin)) == "berlin"

    asyncio.run(run())


def test_a_renewed_server_certificate_is_shown_without_a_restart_and_a_bad_one_is_not(federation) -> None:
    async def shown(port: int) -> int:
        text = await asyncio.to_thread(ssl.get_server_certificate, ("127.0.0.1", port))
        return x509.load_pem_x509_certificate(text.encode()).serial_number

    async def run() -> None:
        async with serving(federation.server) as server:
            assert await shown(server.port) == federation.server.serial
            issued = federation.authority.renew("localhost", now=NOW)
            assert provisioning.hand_over(federation.authority, issued, now=NOW)
            assert await shown(server.port) == int(issued.serial, 16) != federation.server.serial
            assert await hello(server.port, channel_credentials(federation.berlin)) == "berlin"
            assert server.problems == []
            (federation.server.folder / "server.pem").write_bytes(federation.berlin.certificate)
            assert await shown(server.port) == int(issued.serial, 16)
            assert len(server.problems) == 1 and "server.pem" in server.problems[0]

    asyncio.run(run())


def test_a_certificate_that_expires_while_its_stream_is_open_is_refused_by_the_timer(federation) -> None:
    revocations = Revocations(federation.server.folder / "revoked.pem", federation.server.authority)
    client = peer({"x509_pem_cert": [federation.berlin.certificate]})
    admit(client, revocations, now=federation.berlin.expires)
    later = federation.berlin.expires + timedelta(seconds=1)
    assert "expired on" in refused("identity-expired", lambda: admit(client, revocations, now=later))


# Who a peer is


def forged(federation, *, common_name: str, names: list[x509.GeneralName], usages) -> bytes:
    """Return a certificate that the authority's key signs and bract would never issue."""
    key = pem.read_key(federation.authority.folder / "ca.key", what="key", mend="")
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]))
        .issuer_name(federation.authority.certificate.subject)
        .public_key(pem.new_key().public_key())
        .serial_number(5)
        .not_valid_before(NOW - DAY)
        .not_valid_after(NOW + DAY)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=True)
    )
    return pem.certificate_bytes(builder.sign(key, hashes.SHA256()))


def test_a_peer_is_named_by_its_certificate_alone(federation) -> None:
    client, server = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH
    paris = x509.UniformResourceIdentifier("urn:bract:client:paris")
    assert peer_name({"x509_pem_cert": [federation.berlin.certificate], "x509_common_name": [b"paris"]}) == "berlin"
    good = forged(federation, common_name="paris", names=[paris], usages=[client])
    assert peer_name({"x509_pem_cert": [good]}) == "paris"
    for context in (
        {},
        {"x509_common_name": [b"berlin"]},
        {"x509_pem_cert": [b"nonsense"]},
        {"x509_pem_cert": [federation.berlin.certificate] * 2},
        {"x509_pem_cert": [federation.server.certificate]},
        {"x509_pem_cert": [forged(federation, common_name="berlin", names=[paris], usages=[client])]},
        {"x509_pem_cert": [forged(federation, common_name="paris", names=[paris, paris], usages=[client])]},
        {"x509_pem_cert": [forged(federation, common_name="paris", names=[paris], usages=[client, server])]},
    ):
        refused("peer-unnamed", lambda context=context: peer_name(context))
    both = forged(federation, common_name="paris", names=[paris], usages=[client, server])
    assert role_of(x509.load_pem_x509_certificate(both)) is None


# What the authority grants


def test_certificates_say_no_more_than_they_have_to(federation) -> None:
    for identity, usage in (
        (federation.server, ExtendedKeyUsageOID.SERVER_AUTH),
        (federation.berlin, ExtendedKeyUsageOID.CLIENT_AUTH),
    ):
        made = x509.load_pem_x509_certificate(identity.certificate)
        constraints = made.extensions.get_extension_for_class(x509.BasicConstraints)
        assert constraints.critical and constraints.value == x509.BasicConstraints(ca=False, path_length=None)
        assert list(made.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [usage]
        assert not made.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
        assert made.serial_number.bit_length() > 100
    root = federation.authority.certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert root.critical and root.value == x509.BasicConstraints(ca=True, path_length=0)


def evil_request(key, *, common_name: str = "paris") -> bytes:
    builder = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(
            x509.Name(
                [
                    x509.NameAttribute(NameOID.ORGANIZATION_NAME, "administrators"),
                    x509.NameAttribute(NameOID.COMMON_NAME, common_name),
                ]
            )
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName(
                [x509.DNSName("localhost"), x509.UniformResourceIdentifier("urn:bract:client:berlin")]
            ),
            critical=False,
        )
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    )
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(key, algorithm).public_bytes(Encoding.PEM)


def test_a_request_that_asks_for_more_gets_its_name_and_nothing_else(federation) -> None:
    issued = federation.authority.approve(evil_request(pem.new_key()), where="evil.pem", now=NOW)
    made = x509.load_pem_x509_certificate(federation.authority.certificate_of(issued))
    assert made.subject.rfc4514_string() == "CN=paris"
    assert made.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert list(made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value) == [
        x509.UniformResourceIdentifier("urn:bract:client:paris")
    ]
    assert role_of(made) == "client"


def tampered(request: bytes) -> bytes:
    """Return a request with another name, under the signature for the one before."""
    der = x509.load_pem_x509_csr(request).public_bytes(Encoding.DER).replace(b"paris", b"milan")
    return x509.load_der_x509_csr(der).public_bytes(Encoding.PEM)


@pytest.mark.parametrize(
    ("make", "code", "words"),
    [
        (lambda: evil_request(rsa.generate_private_key(65537, 2048)), "identity-request", "ECDSA P-256"),
        (lambda: evil_request(ec.generate_private_key(ec.SECP192R1())), "identity-request", "ECDSA P-256"),
        (lambda: evil_request(ed25519.Ed25519PrivateKey.generate()), "identity-request", "ECDSA P-256"),
        (lambda: tampered(evil_request(pem.new_key())), "identity-request", "not signed by the key"),
        (lambda: evil_request(pem.new_key(), common_name="../../etc"), "provision-value", "1 to 63"),
        (lambda: evil_request(pem.new_key(), common_name="a\x1b[2J"), "provision-value", "1 to 63"),
        (lambda: evil_request(pem.new_key(), common_name="berlin"), "identity-taken", "held by another key"),
        (lambda: evil_request(pem.new_key(), common_name="BERLIN"), "identity-taken", "held by another key"),
        (lambda: evil_request(pem.new_key(), common_name="localhost"), "identity-taken", "held by another key"),
        (lambda: b"nonsense", "identity-request", "no certificate request"),
        (lambda: pem.key_bytes(pem.new_key()), "identity-request", "no certificate request"),
    ],
)
def test_a_bad_request_is_refused_and_leaves_no_trace(federation, make, code, words) -> None:
    before = contents(federation.authority.folder)
    request = make()
    said = refused(code, lambda: federation.authority.approve(request, where="evil.pem", now=NOW))
    assert words in said and "\x1b" not in said
    assert contents(federation.authority.folder) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_request_that_is_approved_is_the_one_that_is_meant(federation) -> None:
    asked = provisioning.request("paris", federation.path / "paris")
    request = asked.file.read_bytes()

    def approve(**expected: str):
        return federation.authority.approve(request, where="r.pem", now=NOW, **expected)

    assert "asks for the name paris, not milan" in refused("identity-mismatch", lambda: approve(name="milan"))
    assert "do not approve" in refused("identity-mismatch", lambda: approve(fingerprint="00" * 32))
    prefix = asked.key_fingerprint[:20]
    refused("identity-mismatch", lambda: approve(fingerprint=prefix))
    typed = asked.key_fingerprint.replace(":", "").lower()
    assert approve(name="paris", fingerprint=typed).name == "paris"


def test_asking_again_gets_the_same_certificate_and_a_renewal_the_next_for_the_same_key(federation) -> None:
    request = (federation.berlin.folder / "berlin.request.pem").read_bytes()
    again = federation.authority.approve(request, where="r.pem", now=NOW)
    assert int(again.serial, 16) == federation.berlin.serial
    renewed = federation.authority.renew("berlin", now=NOW + 300 * DAY)
    assert renewed.serial != again.serial and renewed.key_fingerprint == again.key_fingerprint
    answer = federation.path / "answer.pem"
    answer.write_bytes(federation.authority.answer(renewed))
    installed = provisioning.install(answer, federation.berlin.folder, fingerprint=None, now=NOW + 300 * DAY)
    assert installed.serial == int(renewed.serial, 16) and installed.expires > federation.berlin.expires
    assert installed.key == federation.berlin.key


def test_a_revoked_key_is_never_certified_again_but_its_name_may_be(federation) -> None:
    request = (federation.berlin.folder / "berlin.request.pem").read_bytes()
    federation.authority.revoke("berlin", now=NOW)
    refused("identity-revoked", lambda: federation.authority.approve(request, where="r.pem", now=NOW))
    refused("identity-revoked", lambda: federation.authority.renew("berlin", now=NOW))
    again = site(federation.authority, federation.path / "berlin-2")
    assert again.name == "berlin" and again.serial != federation.berlin.serial
    assert [each.state(NOW) for each in federation.authority.index() if each.name == "berlin"] == ["revoked", "valid"]


def test_a_serial_revokes_one_certificate_and_a_name_all(federation) -> None:
    second = federation.authority.renew("berlin", now=NOW)
    revocations = Revocations(federation.authority.folder / "revoked.pem", federation.berlin.authority)
    shown = f"{federation.berlin.serial:040X}"
    federation.authority.revoke(":".join(shown[i : i + 2] for i in range(0, 40, 2)), now=NOW)
    assert revocations.is_revoked(federation.berlin.serial) and not revocations.is_revoked(int(second.serial, 16))
    assert len(federation.authority.revoke("berlin", now=NOW)) == 2
    assert revocations.is_revoked(int(second.serial, 16)) and not revocations.is_revoked(federation.server.serial)
    refused("identity-unknown", lambda: federation.authority.revoke("atlantis", now=NOW))
    refused("identity-unknown", lambda: federation.authority.renew("atlantis", now=NOW))


def test_adding_and_removing_a_site_touches_no_other(federation) -> None:
    before = {**contents(federation.berlin.folder), **contents(federation.server.folder)}
    site(federation.authority, federation.path / "paris", "paris")
    federation.authority.revoke("paris", now=NOW)
    provisioning.publish(federation.authority)
    after = {**contents(federation.berlin.folder), **contents(federation.server.folder)}
    changed = {path for path in before | after if before.get(path) != after.get(path)}
    assert changed == {str(federation.server.folder / "revoked.pem")}


def test_no_certificate_outlives_its_authority(tmp_path) -> None:
    authority = Authority.create(tmp_path / "ca", name="short", now=NOW, days=10)
    made = site(authority, tmp_path / "berlin")
    assert made.expires == authority.certificate.not_valid_after_utc
    late = NOW + 11 * DAY
    asked = provisioning.request("paris", tmp_path / "paris").file.read_bytes()
    refused("identity-expired", lambda: authority.approve(asked, where="r.pem", now=late))
    said = refused("identity-expired", lambda: Identity.load(made.folder, role="client", now=late))
    assert "ca.pem: the federation's authority expired" in said


@pytest.mark.parametrize(
    "name", ["", ".", "..", "-x", "a/b", "a ", " a", "a  b", "a\tb", "ä", "a\n", "x" * 64, "a\x00"]
)
def test_names_that_could_mislead_are_refused(tmp_path, name) -> None:
    refused("provision-value", lambda: provisioning.request(name, tmp_path / "site"))
    assert not (tmp_path / "site").exists()


@pytest.mark.parametrize(
    ("names", "addresses"),
    [(["*.example.org"], []), (["host:8443"], []), (["-a"], []), ([], []), (["a\n"], []), ([], ["300.1.1.1"])],
)
def test_hosts_that_no_server_may_have_are_refused(names, addresses) -> None:
    refused("provision-value", lambda: Hosts.of(names, addresses))


def test_an_address_given_as_a_name_is_an_address() -> None:
    assert Hosts.of(["::1", "Fl.Example.org", "fl.example.org"]).listed == ("fl.example.org", "::1")


def test_many_at_once_lose_nothing_and_a_name_goes_to_one(federation) -> None:
    """Real processes that approve at the same time: three names, and three keys for a fourth."""
    files = [provisioning.request(f"site-{n}", federation.path / f"s{n}").file for n in range(3)]
    files += [provisioning.request("wanted", federation.path / f"w{n}").file for n in range(3)]
    command = [sys.executable, "-m", "bract", "provision", "approve", "--authority", str(federation.authority.folder)]
    running = [subprocess.Popen([*command, str(file)], stderr=subprocess.PIPE, text=True) for file in files]
    ended = [(each.communicate()[1], each.returncode) for each in running]
    assert [status for _, status in ended[:3]] == [0, 0, 0]
    assert sorted(status for _, status in ended[3:]) == [0, 3, 3]
    assert sum("identity-taken" in said for said, _ in ended) == 2
    names = [each.name for each in federation.authority.index()]
    assert sorted(names) == ["berlin", "localhost", "site-0", "site-1", "site-2", "wanted"]


KILLED = """
import os, signal, sys
from datetime import UTC, datetime
from pathlib import Path
from bract.transport.authority import Authority
left, real = int(sys.argv[1]), os.replace
def replace(*paths):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    real(*paths)
os.replace = replace
authority, now = Authority.open(Path(sys.argv[2])), datetime.now(UTC)
if sys.argv[3] == "revoke":
    authority.revoke("berlin", now=now)
else:
    authority.approve(Path(sys.argv[3]).read_bytes(), where="r.pem", now=now)
"""


@pytest.mark.parametrize("writes", [0, 1, 2])
@pytest.mark.parametrize("what", ["approve", "revoke"])
def test_a_kill_at_any_write_leaves_an_authority_that_ends_what_was_begun(federation, what, writes) -> None:
    asked = provisioning.request("paris", federation.path / "paris").file
    argument = "revoke" if what == "revoke" else str(asked)
    script = [sys.executable, "-c", KILLED, str(writes), str(federation.authority.folder), argument]
    status = subprocess.run(script, check=False).returncode
    assert status == (0 if writes == 2 else -9)
    if what == "revoke" and writes == 1:
        # The index says so, the list not yet: any later command writes the list.
        assert [each.state(NOW) for each in federation.authority.index() if each.name == "berlin"] == ["revoked"]
        federation.authority.renew("localhost", now=NOW)
        assert Revocations(federation.authority.folder / "revoked.pem", federation.berlin.authority).is_revoked(
            federation.berlin.serial
        )
    federation.authority.revoke("berlin", now=NOW)
    issued = federation.authority.approve(asked.read_bytes(), where="r.pem", now=NOW)
    assert [each.serial for each in federation.authority.index() if each.name == "paris"] == [issued.serial]


# Files


def test_keys_are_for_their_owner_alone_whatever_the_umask(tmp_path) -> None:
    before = os.umask(0)
    try:
        authority = Authority.create(tmp_path / "ca", name="hospitals", now=NOW)
        provisioning.serve(authority, tmp_path / "server", LOCAL, now=NOW)
        site(authority, tmp_path / "berlin")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert {modes[name] for name in ("ca.key", "server.key", "client.key", "index.jsonl")} == {0o600}
    assert {modes[name] for name in ("ca.pem", "server.pem", "client.pem", "revoked.pem")} == {0o644}
    assert {modes[name] for name in ("ca", "server", "berlin")} == {0o700}
    assert not [name for name in modes if name.endswith(".tmp")]
    holders = [path.name for path in tmp_path.rglob("*") if path.is_file() and b"PRIVATE" in path.read_bytes()]
    assert sorted(holders) == ["ca.key", "client.key", "server.key"]


def test_a_key_is_at_no_moment_open_to_others(tmp_path, monkeypatch) -> None:
    born: list[int] = []
    real = os.fchmod

    def fchmod(handle: int, mode: int) -> None:
        born.append(stat.S_IMODE(os.fstat(handle).st_mode))
        real(handle, mode)

    monkeypatch.setattr(os, "fchmod", fchmod)
    before = os.umask(0)
    try:
        provisioning.request("berlin", tmp_path / "berlin")
    finally:
        os.umask(before)
    assert born == [0o600, 0o600]


def test_what_is_there_is_never_written_over(federation) -> None:
    before = contents(federation.path)
    refused("authority-exists", lambda: Authority.create(federation.authority.folder, name="x", now=NOW))
    refused("identity-exists", lambda: provisioning.request("berlin", federation.berlin.folder))
    refused("identity-exists", lambda: provisioning.request("berlin", federation.server.folder))
    refused(
        "identity-exists", lambda: provisioning.serve(federation.authority, federation.server.folder, LOCAL, now=NOW)
    )
    after = {path: held for path, held in contents(federation.path).items() if not path.endswith(".lock")}
    assert after == {path: held for path, held in before.items() if not path.endswith(".lock")}


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    refused("provision-unwritable", lambda: provisioning.request("berlin", tmp_path / "file" / "site"))
    refused("provision-unwritable", lambda: Authority.create(tmp_path / "file", name="x", now=NOW))


def test_a_request_made_again_before_the_answer_is_for_the_same_key(tmp_path) -> None:
    first = provisioning.request("berlin", tmp_path / "berlin")
    assert provisioning.request("berlin", tmp_path / "berlin").key_fingerprint == first.key_fingerprint
    said = refused("identity-missing", lambda: Identity.load(tmp_path / "berlin", role="client", now=NOW))
    assert "client.pem" in said and "bract provision install" in said


# Installing


def test_the_first_answer_needs_the_authoritys_fingerprint_told_by_another_way(federation) -> None:
    folder = federation.path / "paris"
    asked = provisioning.request("paris", folder)
    answer = federation.path / "answer.pem"
    issued = federation.authority.approve(asked.file.read_bytes(), where="r.pem", now=NOW)
    answer.write_bytes(federation.authority.answer(issued))
    before = contents(folder)

    def install(fingerprint: str | None):
        return provisioning.install(answer, folder, fingerprint=fingerprint, now=NOW)

    said = refused("identity-unpinned", lambda: install(None))
    assert federation.authority.fingerprint not in said
    refused("identity-mismatch", lambda: install("AB:CD"))
    refused("identity-mismatch", lambda: install(""))
    assert contents(folder) == before
    assert install(federation.authority.fingerprint.lower()).name == "paris"


def test_an_answer_is_installed_only_where_it_belongs(federation) -> None:
    other = Authority.create(federation.path / "other", name="hospitals", now=NOW)
    elsewhere = site(other, federation.path / "elsewhere", "berlin")
    answer = federation.path / "answer.pem"
    folder = federation.berlin.folder
    before = contents(folder)

    def install(*parts: bytes):
        answer.write_bytes(b"".join(parts))
        return provisioning.install(answer, folder, fingerprint=None, now=NOW)

    mine, ours = federation.berlin.certificate, federation.berlin.authority
    assert "trusts" in refused("identity-mismatch", lambda: install(elsewhere.certificate, elsewhere.authority))
    assert "was not issued by" in refused("identity-mismatch", lambda: install(same_key(federation, other), ours))
    assert "another key" in refused("identity-mismatch", lambda: install(federation.server.certificate, ours))
    for wrong in ((mine,), (ours,), (mine, mine, ours), (b"nonsense",), (pem.key_bytes(pem.new_key()),)):
        refused("identity-unreadable", lambda wrong=wrong: install(*wrong))
    assert contents(folder) == before
    install(mine, ours)
    install(ours, mine)


def same_key(federation, other: Authority) -> bytes:
    """Return a certificate for berlin's key by another authority."""
    key = x509.load_pem_x509_certificate(federation.berlin.certificate).public_key()
    made = end_certificate(
        role="client",
        name="berlin",
        hosts=None,
        key=key,
        authority=other.certificate,
        authority_key=pem.read_key(other.folder / "ca.key", what="key", mend=""),
        now=NOW,
        days=10,
    )
    return pem.certificate_bytes(made)


# Loading


def swap_key(federation) -> None:
    pem.write(federation.berlin.folder / "client.key", pem.key_bytes(pem.new_key()), mode=0o600)


def other_authority(federation) -> None:
    other = Authority.create(federation.path / "other", name="hospitals", now=NOW)
    shutil.copy(other.folder / "ca.pem", federation.berlin.folder)


def servers_certificate(federation) -> None:
    for end in ("pem", "key"):
        shutil.copy(federation.server.folder / f"server.{end}", federation.berlin.folder / f"client.{end}")


@pytest.mark.parametrize(
    ("spoil", "code", "words"),
    [
        (lambda f: (f.berlin.folder / "client.pem").unlink(), "identity-missing", "it comes from the authority"),
        (lambda f: (f.berlin.folder / "client.key").unlink(), "identity-missing", "client.key: this site's key"),
        (lambda f: (f.berlin.folder / "ca.pem").unlink(), "identity-missing", "ca.pem: the authority that this site"),
        (lambda f: (f.berlin.folder / "client.key").chmod(0o640), "identity-unreadable", "chmod 600"),
        (lambda f: (f.berlin.folder / "client.key").write_text("x"), "identity-unreadable", "no plain PEM key"),
        (lambda f: (f.berlin.folder / "client.pem").write_text("x"), "identity-unreadable", "no PEM certificate"),
        (
            lambda f: (f.berlin.folder / "ca.pem").write_bytes(f.berlin.certificate),
            "identity-mismatch",
            "is not the certificate of an authority",
        ),
        (swap_key, "identity-mismatch", "does not fit its key"),
        (other_authority, "identity-mismatch", "was not issued by the authority in ca.pem"),
        (servers_certificate, "identity-mismatch", "is that of a server, and a client's is needed"),
    ],
)
def test_what_is_wrong_with_an_identity_is_one_sentence(federation, spoil, code, words) -> None:
    Identity.load(federation.berlin.folder, role="client", now=NOW)
    spoil(federation)
    said = refused(code, lambda: Identity.load(federation.berlin.folder, role="client", now=NOW))
    assert words in said and str(federation.berlin.folder) in said and ";" in said


def test_an_identity_is_valid_within_its_dates(federation) -> None:
    folder, ends = federation.berlin.folder, federation.berlin.expires
    load = lambda now: Identity.load(folder, role="client", now=now)  # noqa: E731
    assert load(ends).name == "berlin"
    said = refused("identity-expired", lambda: load(ends + timedelta(seconds=1)))
    assert "this site's certificate" in said and "bract provision renew berlin" in said
    assert "set the clock" in refused("identity-expired", lambda: load(NOW - DAY))
    # A clock that lags a little is no reason to turn away a certificate that was made just now.
    assert load(NOW - timedelta(minutes=50)).name == "berlin"


def test_expiry_is_warned_of_30_days_ahead(federation) -> None:
    ends = federation.berlin.expires
    assert warn(federation.berlin, ends - 30 * DAY - timedelta(seconds=1)) is None
    said = warn(federation.berlin, ends - 30 * DAY)
    assert said is not None and "in 30 days" in said and "client.pem" in said and "renew berlin" in said
    assert "in 1 day)" in str(warn(federation.berlin, ends - DAY))
    assert "today" in str(warn(federation.berlin, ends))
    assert "authority expires" in str(warn(federation.berlin, federation.berlin.authority_expires - DAY))


def test_a_server_that_runs_for_weeks_warns_each_day_until_its_certificate_is_renewed(federation) -> None:
    folder, clock = federation.server.folder, [federation.server.expires - 32 * DAY]
    endpoint = open_endpoint("127.0.0.1:0", folder, clock=lambda: clock[0], problem=print)
    said = []
    for _ in range(6 * 24):
        said.append(endpoint.warning())
        clock[0] += timedelta(hours=1)
    told = [hour for hour, text in enumerate(said) if text is not None]
    assert told == [48, 72, 96, 120] and "server.pem" in str(said[48]) and "in 30 days" in str(said[48])
    assert "in 29 days" in str(said[72])


def test_a_key_is_not_shown(federation) -> None:
    secret = federation.berlin.key.splitlines()[1].decode()
    assert secret not in repr(federation.berlin) and "PRIVATE" not in repr(federation.berlin)


# The list of the revoked


def test_a_list_that_goes_bad_changes_nothing_and_is_reported(federation) -> None:
    path = federation.server.folder / "revoked.pem"
    empty = path.read_bytes()
    revocations = Revocations(path, federation.server.authority)
    assert not revocations.is_revoked(federation.berlin.serial)
    federation.authority.revoke("berlin", now=NOW)
    provisioning.publish(federation.authority)
    assert revocations.is_revoked(federation.berlin.serial) and revocations.problem is None
    other = Authority.create(federation.path / "other", name="hospitals", now=NOW)
    foreign = sign_list(
        {}, number=99, authority=other.certificate, key=pem.read_key(other.folder / "ca.key", what="", mend=""), now=NOW
    )
    for content, words in ((b"half a", "damaged"), (empty, "older list"), (foreign, "not signed by this federation")):
        path.write_bytes(content)
        assert revocations.is_revoked(federation.berlin.serial)
        assert revocations.problem is not None and words in revocations.problem
    path.unlink()
    assert revocations.is_revoked(federation.berlin.serial)
    refused("identity-missing", lambda: Revocations(path, federation.server.authority))
    provisioning.publish(federation.authority)
    assert revocations.is_revoked(federation.berlin.serial) and revocations.problem is None


def test_a_list_is_installed_by_hand_on_another_machine_but_never_an_older_one(federation) -> None:
    old = federation.path / "old.pem"
    old.write_bytes(federation.authority.revocation_list())
    away = federation.path / "away"
    federation.server.folder.rename(away)
    federation.authority.revoke("berlin", now=NOW)
    assert provisioning.publish(federation.authority) == ([], [federation.server.folder])
    new = federation.authority.folder / "revoked.pem"
    assert provisioning.is_list(new) and not provisioning.is_list(away / "server.pem")
    provisioning.install_list(new, away)
    assert Revocations(away / "revoked.pem", federation.server.authority).is_revoked(federation.berlin.serial)
    refused("identity-mismatch", lambda: provisioning.install_list(old, away))
    assert (away / "revoked.pem").read_bytes() == new.read_bytes()


def test_a_damaged_authority_is_one_sentence(federation) -> None:
    folder = federation.authority.folder
    refused("identity-missing", lambda: Authority.open(federation.path / "nowhere"))
    (folder / "ca.key").chmod(0o644)
    refused("identity-unreadable", lambda: Authority.open(folder))
    pem.write(folder / "ca.key", pem.key_bytes(pem.new_key()), mode=0o600)
    assert "does not fit" in refused("identity-mismatch", lambda: Authority.open(folder))
    (folder / "index.jsonl").write_text('{"serial": 1}\n')
    refused("identity-unreadable", federation.authority.index)
    with pytest.raises(InputError):
        federation.authority.renew("berlin", now=NOW)
