"""TLS between machines: real handshakes with the certificates that `virgo ca` makes, and bad files."""

from __future__ import annotations

import datetime
import shutil
import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest
from cryptography import x509

from virgo.config import SecurityConfig
from virgo.errors import BadArgument, BadConfig
from virgo.wire import authority, tls

PLAIN = SecurityConfig()


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tls directory of a machine with an authority and certificates for itself and others."""
    directory = tmp_path_factory.mktemp("home") / "tls"
    authority.create_authority(directory, name="test")
    authority.issue(directory, "n1", hosts=["127.0.0.1", "::1", "localhost"], node=True, into=directory)
    authority.issue(directory, "alice", roles=["read", "exec"])
    authority.issue(directory, "n2", hosts=["10.9.8.7"], node=True)
    return directory


def home_of(ca: Path, name: str, tmp_path: Path) -> Path:
    """Another machine: its certificate copied to its VIRGO_HOME as `virgo ca issue` says."""
    home = tmp_path / name
    shutil.copytree(ca / "issued" / name, home / "tls")
    return home


def shake(
    server: ssl.SSLContext, client: ssl.SSLContext, host: str = "127.0.0.1"
) -> tuple[dict[str, object], str]:
    """Connect and exchange a line; returns the client's certificate as the server saw it, and the version."""
    ours, theirs = socket.socketpair()
    ours.settimeout(10)
    theirs.settimeout(10)
    seen: list[object] = []

    def serve() -> None:
        try:
            with server.wrap_socket(theirs, server_side=True) as peer:
                seen.extend([peer.getpeercert(), peer.version()])
                peer.sendall(peer.recv(100))
        except OSError as error:
            seen.append(error)
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.wrap_socket(ours, server_hostname=host) as peer:
            peer.sendall(b"hello")
            assert peer.recv(100) == b"hello"
    finally:
        ours.close()
        thread.join()
    assert isinstance(seen[0], dict), seen
    return seen[0], str(seen[1])


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "n1"])
def test_nodes_and_users_meet_over_tls_13(ca: Path, tmp_path: Path, host: str) -> None:
    """A certificate of the same authority connects by every host of the server, with TLS 1.3."""
    server = tls.server_context(ca.parent, PLAIN)
    certificate, version = shake(server, tls.client_context(home_of(ca, "alice", tmp_path), PLAIN), host)
    assert version == "TLSv1.3"
    subject = certificate["subject"]
    assert subject == (
        (("commonName", "alice"),),
        (("organizationalUnitName", "role-exec"),),
        (("organizationalUnitName", "role-read"),),
    )


def test_a_server_must_be_the_host_that_was_asked_for(ca: Path, tmp_path: Path) -> None:
    """A node's certificate does not pass at another address."""
    server = tls.server_context(home_of(ca, "n2", tmp_path), PLAIN)
    client = tls.client_context(ca.parent, PLAIN)
    with pytest.raises(ssl.SSLCertVerificationError, match="IP address mismatch"):
        shake(server, client, "127.0.0.1")
    shake(server, client, "10.9.8.7")


def test_a_user_cannot_pose_as_a_node(ca: Path, tmp_path: Path) -> None:
    """A user's certificate cannot serve, even to a client that does not check the host."""
    server = tls.server_context(home_of(ca, "alice", tmp_path), PLAIN)
    client = tls.client_context(ca.parent, PLAIN, check_host=False)
    with pytest.raises(ssl.SSLCertVerificationError, match="unsuitable certificate purpose"):
        shake(server, client)


def test_other_authorities_and_no_certificate_are_refused(ca: Path, tmp_path: Path) -> None:
    """A client of another cloud, one without certificate and one of TLS 1.2 do not get in."""
    server = tls.server_context(ca.parent, PLAIN)
    other = tmp_path / "other" / "tls"
    authority.create_authority(other)
    authority.issue(other, "evil", node=True, hosts=["127.0.0.1"], into=other)
    stranger = tls.client_context(other.parent, PLAIN)
    stranger.load_verify_locations(cafile=ca / "ca.crt")
    bare = ssl.create_default_context(cafile=ca / "ca.crt")
    old = ssl.create_default_context(cafile=ca / "ca.crt")
    old.load_cert_chain(ca / "node.crt", ca / "node.key")
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    for client in (stranger, bare, old):
        with pytest.raises((ssl.SSLError, ConnectionError, AssertionError)):
            shake(server, client)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake(tls.server_context(other.parent, PLAIN), tls.client_context(ca.parent, PLAIN))


def test_contexts_are_strict(ca: Path) -> None:
    """TLS 1.3 at least, certificates on both sides, host check, no resumption, kernel TLS asked for."""
    server, client = tls.server_context(ca.parent, PLAIN), tls.client_context(ca.parent, PLAIN)
    for context in (server, client):
        assert context.minimum_version == ssl.TLSVersion.TLSv1_3
        assert context.verify_mode == ssl.CERT_REQUIRED
        assert context.options & 8
    assert client.check_hostname
    assert server.num_tickets == 0
    assert len(client.get_ca_certs()) == 1


def test_keys_are_private_and_nothing_is_overwritten(ca: Path) -> None:
    """Key files are 0600, the authority's key is not handed out, and a second making is refused."""
    for key in ("ca.key", "node.key", "issued/alice/node.key", "issued/n2/node.key"):
        assert stat.S_IMODE((ca / key).stat().st_mode) == 0o600
    assert not {"ca.key", "cluster.secret"} & {path.name for path in (ca / "issued" / "alice").iterdir()}
    assert not (ca / "issued" / "n2" / "ca.key").exists()
    before = {path: path.read_bytes() for path in ca.rglob("*") if path.is_file()}
    with pytest.raises(BadConfig, match="exists already"):
        authority.create_authority(ca)
    with pytest.raises(BadConfig, match="exists already"):
        authority.issue(ca, "alice", roles=["admin"])
    assert {path: path.read_bytes() for path in ca.rglob("*") if path.is_file()} == before


def test_certificates_say_what_was_asked(ca: Path) -> None:
    """Hosts, units, purposes and validity are in the certificate; an authority's signature is below it."""
    made = authority.issue(
        ca, "n5", hosts=["[2001:db8::1]", "Node5.Example.", "10.0.0.5"], node=True, days=30
    )
    certificate = x509.load_pem_x509_certificate(made.files.certificate.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == [
        "2001:db8::1",
        "10.0.0.5",
    ]
    assert names.get_values_for_type(x509.DNSName) == ["node5.example", "n5"]
    left = certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    assert datetime.timedelta(days=29) < left <= datetime.timedelta(days=30)
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert tls.check_files(made.files) == certificate


@pytest.mark.parametrize(
    "options",
    [
        {"name": "../x", "node": True},
        {"name": "a b", "roles": ["read"]},
        {"name": "x" * 64, "node": True},
        {"name": "n", "node": True, "hosts": ["not a host"]},
        {"name": "n", "node": True, "hosts": ["-x"]},
        {"name": "n", "node": True, "hosts": [f"h{index}" for index in range(200)]},
        {"name": "n", "roles": ["king"]},
        {"name": "n"},
        {"name": "n", "node": True, "days": 0},
        {"name": "n", "node": True, "days": 10**9},
    ],
    ids=str,
)
def test_bad_wishes_are_refused(ca: Path, options: dict[str, object]) -> None:
    """A bad name, host, role or duration is BadArgument, and leaves nothing behind."""
    if options.get("days") == 10**9:
        assert authority.issue(ca, "long", node=True, days=10**9).expires.year < 2200
        return
    before = sorted(ca.rglob("*"))
    with pytest.raises(BadArgument):
        authority.issue(ca, **options)  # type: ignore[arg-type]
    assert sorted(ca.rglob("*")) == before


def spoil(home: Path, ca: Path, how: str) -> None:
    directory = home / "tls"
    if how.startswith("no "):
        (directory / how.removeprefix("no ")).unlink()
    elif how == "other key":
        shutil.copy(ca / "issued" / "alice" / "node.key", directory / "node.key")
    elif how == "other authority":
        authority.create_authority(home / "second")
        shutil.copy(home / "second" / "ca.crt", directory / "ca.crt")
    elif how == "open key":
        (directory / "node.key").chmod(0o644)
    elif how == "garbage":
        (directory / "node.crt").write_bytes(b"\xff\x00 not PEM")
    elif how == "garbage key":
        (directory / "node.key").write_bytes(b"\xff\x00 not PEM")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no node.crt", "there is no .*virgo ca issue"),
        ("no node.key", "there is no .*virgo ca issue"),
        ("no ca.crt", "there is no .*virgo ca i"),
        ("other key", "is not the key of"),
        ("other authority", "is not from the authority"),
        ("open key", "may be read by others.*chmod 600"),
        ("garbage", "not a certificate in PEM"),
        ("garbage key", "not an unencrypted private key"),
    ],
)
def test_unusable_files_are_named_with_the_remedy(ca: Path, tmp_path: Path, how: str, message: str) -> None:
    """Missing, mismatched, unsafe and malformed files are BadConfig at start that names the file."""
    home = home_of(ca, "n2", tmp_path)
    spoil(home, ca, how)
    for make in (tls.server_context, tls.client_context):
        with pytest.raises(BadConfig, match=message) as caught:
            make(home, PLAIN)
        assert str(home) in str(caught.value)


@pytest.mark.parametrize("years", [-5, 5])
def test_certificates_out_of_their_time_are_named(
    ca: Path, tmp_path: Path, years: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A certificate that has expired, or is not valid yet because a clock is wrong, is BadConfig."""
    home = home_of(ca, "n2", tmp_path)
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=365 * years)
    monkeypatch.setattr(tls, "now_utc", lambda: later)
    with pytest.raises(BadConfig, match=r"is valid from .* which is not now.*virgo ca issue"):
        tls.server_context(home, PLAIN)


def test_configured_places_are_used(ca: Path, tmp_path: Path) -> None:
    """`security.certificate`, `key` and `authority` name files elsewhere."""
    config = SecurityConfig(
        certificate=str(ca / "node.crt"), key=str(ca / "node.key"), authority=str(ca / "ca.crt")
    )
    shake(tls.server_context(tmp_path, config), tls.client_context(tmp_path, config))
