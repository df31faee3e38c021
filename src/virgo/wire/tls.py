"""TLS between machines: contexts that accept the certificates of one cloud and no others.

Both sides of a connection show a certificate; TLS is 1.3 or newer, and a client checks that the server is
the host it asked for. The files are looked at first, so that a missing, expired or mismatched one is an
error at start that says what to do, and not a failed handshake later.

Kernel TLS is asked for, and used where the kernel offers it and the connection has a socket of its own:
the blocking client's. asyncio encrypts in user space. There are no revocation lists: an identity is
barred by an empty list in `[security.roles]`, and everyone by a new authority.
"""

from __future__ import annotations

import ssl
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from virgo.config import SecurityConfig
from virgo.errors import BadConfig
from virgo.wire.authority import TlsFiles, load_certificates, load_key, now_utc, public_bytes

# CPython names it from 3.12 on; the value is OpenSSL's.
_KERNEL_TLS = getattr(ssl, "OP_ENABLE_KTLS", 8)


def files_of(home: Path, config: SecurityConfig) -> TlsFiles:
    """The files that the configuration names, by default those in `$VIRGO_HOME/tls`."""
    directory = home / "tls"
    return TlsFiles(
        certificate=Path(config.certificate) if config.certificate else directory / "node.crt",
        key=Path(config.key) if config.key else directory / "node.key",
        authority=Path(config.authority) if config.authority else directory / "ca.crt",
    )


def server_context(home: Path, config: SecurityConfig) -> ssl.SSLContext:
    """For listeners: shows this machine's certificate and demands one of the same authority.

    Raises:
        BadConfig: a file is missing, unsafe, expired, or does not fit the others.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # Without tickets there is no resumption, and so no login that outlives a barred certificate; a client
    # that writes and closes loses nothing to tickets that it never read.
    context.num_tickets = 0
    return _fill(context, files_of(home, config))


def client_context(home: Path, config: SecurityConfig, *, check_host: bool = True) -> ssl.SSLContext:
    """For connections to other machines: shows this machine's certificate, checks the server's and its host.

    Raises:
        BadConfig: as for `server_context`.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = check_host
    return _fill(context, files_of(home, config))


def check_files(files: TlsFiles) -> x509.Certificate:
    """The certificate, after making sure that it can be used with its key and authority.

    Raises:
        BadConfig: what is wrong with which file, and how to mend it.
    """
    renew = "Make a new one: `virgo ca issue` on the machine that has the authority."
    chain = load_certificates(files.certificate)
    authorities = load_certificates(files.authority)
    certificate, now = chain[0], now_utc()
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        until = f"{certificate.not_valid_before_utc:%F %R} to {certificate.not_valid_after_utc:%F %R} UTC"
        raise BadConfig(f"{files.certificate} is valid from {until}, which is not now", hint=renew)
    if all(now > authority.not_valid_after_utc for authority in authorities):
        raise BadConfig(f"{files.authority} has expired", hint="`virgo ca init` makes a new authority.")
    if public_bytes(certificate.public_key()) != public_bytes(load_key(files.key).public_key()):
        raise BadConfig(
            f"{files.key} is not the key of {files.certificate}", hint="Copy both from the same place."
        )
    if not any(_issued_by(chain[-1], authority) for authority in authorities):
        raise BadConfig(
            f"{files.certificate} is not from the authority {files.authority}",
            hint="Copy ca.crt together with the certificate; all machines of a cloud have the same.",
        )
    return certificate


def _fill(context: ssl.SSLContext, files: TlsFiles) -> ssl.SSLContext:
    check_files(files)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.options |= _KERNEL_TLS
    try:
        context.load_verify_locations(cafile=files.authority)
        context.load_cert_chain(files.certificate, files.key)
    except (OSError, ssl.SSLError) as error:
        raise BadConfig(f"{files.certificate} cannot be used: {error}") from error
    return context


def _issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True
