"""Certificates of a cloud: its authority, and what it issues to machines and users.

A cloud has an authority of its own (ECDSA P-256). What a certificate allows is written in its subject and
read by `auth`: the unit `virgo-node` makes a member of the cloud, `role-read` and the like give roles.
Only members' certificates can serve, so that a user's certificate cannot pose as a node. Key files are
0600, appear whole, and nothing that exists is overwritten.

    tls/ca.crt ca.key        the authority; the key stays on the machine where it was made
    tls/node.crt node.key    this machine's certificate
    tls/cluster.secret       what the machines of the cloud share beside it: passwords of their engine
    tls/issued/NAME/         for others: ca.crt, node.crt, node.key, the secret; to be copied to their tls/
"""

from __future__ import annotations

import datetime
import ipaddress
import re
import secrets
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from virgo.errors import BadArgument, BadConfig
from virgo.limits import (
    AUTHORITY_DAYS,
    CERTIFICATE_BACKDATE_S,
    CERTIFICATE_DAYS,
    CERTIFICATE_HOSTS_MAX,
    NAME_CHARS_MAX,
)
from virgo.wire.auth import UNIT_NODE, UNIT_ROLE
from virgo.wire.tokens import check_roles, make_private, write_new

SECRET = "cluster.secret"  # noqa: S105 - the name of a file
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{NAME_CHARS_MAX - 1}}}")
_PEM = "PEM is text between -----BEGIN and -----END; `virgo ca issue` writes it so."
_HOST = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*\.?")


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Where a certificate, its key and the authority's certificate are (PEM)."""

    certificate: Path
    key: Path
    authority: Path


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate that was made, and what it says."""

    name: str
    files: TlsFiles
    expires: datetime.datetime
    hosts: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    node: bool = False


def create_authority(directory: Path, *, name: str = "VIRGO", days: int = AUTHORITY_DAYS) -> Issued:
    """Make `ca.crt` and `ca.key` in `directory`, which is made too.

    Raises:
        BadConfig: there is an authority already; it is left as it is.
        BadArgument: the name or the days are no good.
    """
    _check_name(name)
    make_private(directory)
    files = TlsFiles(directory / "ca.crt", directory / "ca.key", directory / "ca.crt")
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} authority")])
    builder = _builder(subject, subject, key.public_key(), key.public_key(), days)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    certificate = builder.sign(key, hashes.SHA256())
    _write(files, certificate, key)
    write_new(directory / SECRET, secrets.token_urlsafe(48).encode())
    return Issued(name=name, files=files, expires=certificate.not_valid_after_utc)


def issue(
    directory: Path,
    name: str,
    *,
    hosts: Iterable[str] = (),
    roles: Iterable[str] = (),
    node: bool = False,
    days: int = CERTIFICATE_DAYS,
    into: Path | None = None,
) -> Issued:
    """Make a certificate by the authority in `directory`, as `node.crt` and `node.key`.

    Args:
        directory: where `ca.crt` and `ca.key` are.
        name: the common name: the identity is `cert:NAME`.
        hosts: addresses and names under which a node is reached; its `name` is added.
        roles: what it may do; a node may do all.
        node: whether it is a member of the cloud.
        days: how long it is valid; never longer than the authority.
        into: where to put it, with a copy of `ca.crt`; by default `directory/issued/NAME`.

    Raises:
        BadConfig: there is no usable authority, or the certificate exists already.
        BadArgument: a name, host, role or the days are no good.
    """
    _check_name(name)
    chosen = tuple(sorted(check_roles(roles))) if not node else ()
    places = _hosts([*hosts, name]) if node else []
    authority, authority_key = _load_authority(directory)
    key = ec.generate_private_key(ec.SECP256R1())
    units = [UNIT_NODE] if node else [f"{UNIT_ROLE}{role}" for role in chosen]
    subject = x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, name)]
        + [x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, unit) for unit in units]
    )
    days = min(days, max(1, (authority.not_valid_after_utc - now_utc()).days))
    public = authority.public_key()
    assert isinstance(public, ec.EllipticCurvePublicKey)
    builder = _builder(subject, authority.subject, key.public_key(), public, days)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
    purposes = [ExtendedKeyUsageOID.CLIENT_AUTH, *([ExtendedKeyUsageOID.SERVER_AUTH] if node else [])]
    builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
    if places:
        builder = builder.add_extension(x509.SubjectAlternativeName(places), critical=False)
    certificate = builder.sign(authority_key, hashes.SHA256())

    target = into if into is not None else directory / "issued" / name
    make_private(target.parent)
    make_private(target)
    files = TlsFiles(target / "node.crt", target / "node.key", target / "ca.crt")
    _write(files, certificate, key)
    if not files.authority.exists():
        write_new(files.authority, authority.public_bytes(serialization.Encoding.PEM), mode=0o644)
    if node and not (target / SECRET).exists():
        write_new(target / SECRET, _read(directory / SECRET))
    return Issued(
        name=name,
        files=files,
        expires=certificate.not_valid_after_utc,
        hosts=tuple(str(place.value) for place in places),
        roles=chosen,
        node=node,
    )


def now_utc() -> datetime.datetime:
    """The time, as certificates state it."""
    return datetime.datetime.now(datetime.UTC)


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise BadArgument(
            f"{name!r} cannot name a certificate",
            hint=f"Up to {NAME_CHARS_MAX} letters, digits, '.', '_' and '-'.",
        )


def _hosts(hosts: Sequence[str]) -> list[x509.DNSName | x509.IPAddress]:
    found: dict[str, x509.DNSName | x509.IPAddress] = {}
    for host in hosts:
        try:
            address = ipaddress.ip_address(host.strip("[]"))
            found.setdefault(str(address), x509.IPAddress(address))
        except ValueError:
            if not _HOST.fullmatch(host) or len(host) > 253:
                raise BadArgument(
                    f"{host!r} is neither a host name nor an address",
                    hint="Give n2.example.org or 10.0.0.2, without a port.",
                ) from None
            found.setdefault(host.lower(), x509.DNSName(host.lower().rstrip(".")))
    if len(found) > CERTIFICATE_HOSTS_MAX:
        raise BadArgument(
            f"a certificate may have {CERTIFICATE_HOSTS_MAX} hosts",
            hint="Leave out those under which nobody reaches the machine.",
        )
    return list(found.values())


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
    days: int,
) -> x509.CertificateBuilder:
    if not 1 <= days <= AUTHORITY_DAYS:
        raise BadArgument(
            f"a certificate is valid for 1 to {AUTHORITY_DAYS} days, not {days}", hint="Leave --days out."
        )
    begin = now_utc() - datetime.timedelta(seconds=CERTIFICATE_BACKDATE_S)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(now_utc() + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _write(files: TlsFiles, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
    """Key first: a certificate without key is an error at start, a key without certificate is nothing."""
    hint = "Move the old files away first, if they are really to be replaced."
    for path in (files.certificate, files.key):
        if path.exists():
            raise BadConfig(f"{path} exists already", hint=hint)
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    try:
        write_new(files.key, secret)
        write_new(files.certificate, certificate.public_bytes(pem), mode=0o644)
    except FileExistsError as error:
        raise BadConfig(f"{error.filename2 or files.key} exists already", hint=hint) from None


def _load_authority(directory: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    certificate = load_certificates(directory / "ca.crt")[0]
    key = load_key(directory / "ca.key")
    if not isinstance(key, ec.EllipticCurvePrivateKey) or (
        public_bytes(certificate.public_key()) != public_bytes(key.public_key())
    ):
        raise BadConfig(
            f"{directory / 'ca.key'} is not the key of ca.crt beside it",
            hint="Copy both from where they were made.",
        )
    if certificate.not_valid_after_utc < now_utc():
        raise BadConfig(f"{directory / 'ca.crt'} has expired", hint="`virgo ca init` makes a new authority.")
    return certificate, key


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise BadConfig(
            f"there is no {path}",
            hint="`virgo ca init` makes an authority; `virgo ca issue` certificates for other machines.",
        ) from None
    except OSError as error:
        raise BadConfig(
            f"{path}: {error.strerror}", hint="The node's user must be able to read it."
        ) from None


def load_certificates(path: Path) -> list[x509.Certificate]:
    """The certificates in a PEM file, the first one's own first. Raises BadConfig."""
    data = _read(path)
    try:
        return x509.load_pem_x509_certificates(data)
    except ValueError:
        raise BadConfig(f"{path} is not a certificate in PEM form", hint=_PEM) from None


def load_key(path: Path) -> PrivateKeyTypes:
    """The private key in a PEM file that nobody else can read. Raises BadConfig."""
    data = _read(path)
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise BadConfig(f"{path} may be read by others", hint=f"chmod 600 {path}, and make a new key.")
    try:
        return serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError):  # TypeError: it is encrypted
        raise BadConfig(f"{path} is not an unencrypted private key in PEM form", hint=_PEM) from None


def public_bytes(key: object) -> bytes:
    """A public key in the form in which two can be compared."""
    encode = key.public_bytes  # type: ignore[attr-defined]
    data: bytes = encode(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return data
