"""What the federation's certificates say: the one profile by which they are made and held against.

X.509 version 3 (RFC 5280), ECDSA P-256 with SHA-256. The authority signs itself, may sign end certificates alone (path
length 0), and is nobody else's: it stands in no store of the system, so it needs no name constraints. A server's
certificate is good for serving the host names and addresses that it lists (extended key usage serverAuth alone), a
client's for its one name (clientAuth alone). Nothing but the public key and the name of a request gets into one.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal
from urllib.parse import quote

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ..core.errors import InputError
from .pem import MALFORMED, PrivateKey, PublicKey, is_p256

Role = Literal["server", "client"]
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

URI = "urn:bract:client:"
NAME = re.compile(r"(?=.{1,63}\Z)[A-Za-z0-9][A-Za-z0-9._-]*( [A-Za-z0-9._-]+)*")
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(\.{_LABEL})*")
_USAGES = {"server": ExtendedKeyUsageOID.SERVER_AUTH, "client": ExtendedKeyUsageOID.CLIENT_AUTH}

AUTHORITY_DAYS = 3650
CERTIFICATE_DAYS = 365
# A site whose clock lags by less takes a certificate that was made just now.
_CLOCK_LAG = timedelta(hours=1)


def check_name(name: str, *, of: str) -> str:
    """Return a name that goes into a certificate; InputError `provision-value` says what is allowed."""
    if not NAME.fullmatch(name):
        raise InputError(
            "provision-value",
            f"{of} = {name!r}: a name takes 1 to 63 of A-Z a-z 0-9 . _ - and single spaces between them, "
            "and begins with a letter or a digit",
        )
    return name


@dataclass(frozen=True, kw_only=True)
class Hosts:
    """What a server is reached as: host names, without wildcards, and IP addresses; at least one of them."""

    names: tuple[str, ...] = ()
    addresses: tuple[Address, ...] = ()

    @classmethod
    def of(cls, names: Sequence[str], addresses: Sequence[str] = ()) -> Hosts:
        """Read host names and addresses as they are typed; a name that is an address counts as one."""
        hosts, found = [], []
        for text in names:
            try:
                found.append(ipaddress.ip_address(text))
            except ValueError:
                if not _HOST.fullmatch(text):
                    raise InputError(
                        "provision-value",
                        f"--name = {text!r}: is no host name; give the one that clients dial, without wildcard or port",
                    ) from None
                hosts.append(text.lower())
        for text in addresses:
            try:
                found.append(ipaddress.ip_address(text))
            except ValueError:
                raise InputError(
                    "provision-value", f"--address = {text!r}: is no IP address; a host name goes to --name"
                ) from None
        if not hosts and not found:
            raise InputError(
                "provision-value", "--name: a server needs a host name or an --address, the ones that clients dial"
            )
        return cls(names=tuple(dict.fromkeys(hosts)), addresses=tuple(dict.fromkeys(found)))

    @property
    def listed(self) -> tuple[str, ...]:
        """Names and addresses as text."""
        return (*self.names, *map(str, self.addresses))

    @property
    def first(self) -> str:
        """What the certificate is listed as."""
        return self.listed[0]


def authority_certificate(key: PrivateKey, *, name: str, now: datetime, days: int) -> x509.Certificate:
    """Return the certificate by which an authority signs itself."""
    check_name(name, of="--name")
    builder = _builder(name, key.public_key(), issuer=_subject(name), start=now - _CLOCK_LAG, end=_end(now, days))
    return (
        builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(ca=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def end_certificate(
    *,
    role: Role,
    name: str,
    hosts: Hosts | None,
    key: PublicKey,
    authority: x509.Certificate,
    authority_key: PrivateKey,
    now: datetime,
    days: int,
) -> x509.Certificate:
    """Return a server's (with its hosts) or a client's certificate; it never outlives the authority's."""
    if hosts is None:
        names: list[x509.GeneralName] = [_uri(name)]
    else:
        names = [*map(x509.DNSName, hosts.names), *map(x509.IPAddress, hosts.addresses)]
    builder = _builder(
        name[:64],
        key,
        issuer=authority.subject,
        start=max(now - _CLOCK_LAG, authority.not_valid_before_utc),
        end=min(_end(now, days), authority.not_valid_after_utc),
    )
    signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    return (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(ca=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([_USAGES[role]]), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(signer, critical=False)
        .sign(authority_key, hashes.SHA256())
    )


def new_request(name: str, key: PrivateKey) -> x509.CertificateSigningRequest:
    """Return a site's request: its name and its public key, signed by the key (RFC 2986)."""
    return x509.CertificateSigningRequestBuilder().subject_name(_subject(name)).sign(key, hashes.SHA256())


def read_request(content: bytes, *, where: str) -> tuple[str, PublicKey]:
    """Return the name and the public key of a request, all that is taken from it; InputError `identity-request`."""
    again = "the site makes it anew with `bract provision request NAME --out DIR`"
    try:
        request = x509.load_pem_x509_csr(content)
        names = [each.value for each in request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        key = request.public_key()
        if not isinstance(key, PublicKey) or not is_p256(key):
            raise InputError("identity-request", f"{where}: its key has to be ECDSA P-256; {again}")
        signed = request.is_signature_valid
    except (*MALFORMED, InvalidSignature) as error:
        raise InputError("identity-request", f"{where}: is no certificate request in PEM; {again}") from error
    if not signed:
        raise InputError("identity-request", f"{where}: was not signed by the key that it names; {again}")
    if len(names) != 1 or not isinstance(names[0], str):
        raise InputError("identity-request", f"{where}: has to name one site, not {len(names)}; {again}")
    return check_name(names[0], of=f"{where}, name"), key


def is_authority(certificate: x509.Certificate) -> bool:
    """Say whether a certificate is that of an authority: it may sign others, and signs itself."""
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        return constraints.ca and is_p256(certificate.public_key()) and issued_by(certificate, certificate)
    except (*MALFORMED, x509.ExtensionNotFound):
        return False


def issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Say whether an authority signed a certificate."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (*MALFORMED, InvalidSignature):
        return False
    return True


def role_of(certificate: x509.Certificate) -> Role | None:
    """Return what a certificate is good for: "server", "client", or None if neither or more than that one."""
    try:
        usages = list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    except (*MALFORMED, x509.ExtensionNotFound):
        return None
    roles: dict[Role, x509.ObjectIdentifier] = {"server": _USAGES["server"], "client": _USAGES["client"]}
    return next((role for role, usage in roles.items() if usages == [usage] and not constraints.ca), None)


def name_of(certificate: x509.Certificate) -> str | None:
    """Return whom a certificate names: a client, or a server's first host; None if the authority gives no such form.

    A client's common name and its one alternative name, the URI, have to agree.
    """
    try:
        names = [each.value for each in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        others = list(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except (*MALFORMED, x509.ExtensionNotFound):
        return None
    match role_of(certificate):
        case "server":
            hosts = [str(each.value) for each in others if isinstance(each, x509.DNSName | x509.IPAddress)]
            return hosts[0] if hosts else None
        case "client" if len(names) == 1 and isinstance(names[0], str) and NAME.fullmatch(names[0]):
            return names[0] if others == [_uri(names[0])] else None
    return None


def _builder(
    name: str, key: PublicKey, *, issuer: x509.Name, start: datetime, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(_subject(name))
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
    )


def _uri(name: str) -> x509.UniformResourceIdentifier:
    return x509.UniformResourceIdentifier(URI + quote(name))


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _end(now: datetime, days: int) -> datetime:
    if not 1 <= days <= AUTHORITY_DAYS:
        raise InputError("provision-value", f"--days = {days}: has to lie between 1 and {AUTHORITY_DAYS}")
    return now.astimezone(UTC) + timedelta(days=days)


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )
