"""Identities: who is who by socket, token and certificate, and what each may do."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from virgo import limits
from virgo.config import SecurityConfig
from virgo.context import NOBODY
from virgo.errors import BadArgument, BadConfig, Denied, WrongToken
from virgo.wire.auth import Authenticator
from virgo.wire.tokens import TokenStore

STRANGER = 54_321


def authenticator(home: Path, **roles: list[str]) -> Authenticator:
    return Authenticator(
        home, SecurityConfig(roles={key.replace("_", ":"): value for key, value in roles.items()})
    )


def main_token(home: Path) -> str:
    return (home / "token").read_text().strip()


# --- Unix sockets ---------------------------------------------------------------------------------


def test_the_owner_and_root_are_members_of_the_cloud(tmp_path: Path) -> None:
    """Processes of the user who owns VIRGO_HOME, and root's, are administrators and members."""
    owner = tmp_path / "owned"
    owner.mkdir()
    uids = {0, os.getuid()}
    if os.getuid() == 0:
        os.chown(owner, 4321, 4321)
        uids.add(4321)
    known = authenticator(owner)
    for uid in uids:
        identity = known.unix(uid, uid, 1)
        assert identity.name == f"uid:{uid}"
        assert identity.node
        assert all(identity.may(role) for role in ("read", "write", "exec", "admin"))


def test_other_users_have_what_is_configured_and_nothing_else(tmp_path: Path) -> None:
    """Another user is nobody unless the configuration names it, and is never a member."""
    known = authenticator(tmp_path, **{f"uid_{STRANGER}": ["read", "write"], "uid_54322": []})
    identity = known.unix(STRANGER, 1, 1)
    assert identity.roles == {"read", "write"}
    assert not identity.node
    assert not identity.may("exec")
    assert known.unix(54_322, 1, 1) == NOBODY
    assert known.unix(54_323, 1, 1) == NOBODY


# --- the main token -------------------------------------------------------------------------------


def test_the_main_token_is_made_once_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    """The first start makes a long random token, 0600, that later starts keep."""
    home = tmp_path / "new"
    known = authenticator(home)
    token = main_token(home)
    assert len(token) >= 40
    assert stat.S_IMODE((home / "token").stat().st_mode) == 0o600
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    authenticator(home)
    assert main_token(home) == token
    for user in ("", "default", "main", "token:main"):
        identity = known.token(user, token)
        assert identity.name == "token:main"
        assert identity.may("admin")
        assert not identity.node
    assert list(home.iterdir()) == [home / "token"]


def test_processes_that_start_at_once_agree_on_the_token(tmp_path: Path) -> None:
    """Processes that race to make the token all end up with the same one."""
    code = "import sys; from pathlib import Path; from virgo.wire.tokens import TokenStore\n"
    code += "sys.stdin.readline(); print(TokenStore(Path(sys.argv[1])).main())"
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    with ThreadPoolExecutor() as pool:
        tokens = {done[0].strip() for done in pool.map(lambda racer: racer.communicate("go\n"), racers)}
    assert tokens == {main_token(tmp_path)}


@pytest.mark.parametrize("token", ["", "x", "wrong" * 10, "é" * 20, "\udcff" * 20, "\0" * 43, "x" * 100_000])
def test_a_wrong_token_is_refused_for_every_user(tmp_path: Path, token: str) -> None:
    """What is not a token of this cloud is WrongToken, whatever the user name; the token is not echoed."""
    known = authenticator(tmp_path)
    known.create_token("ci", ["read"])
    for user in ("", "default", "main", "ci", "nosuch", "../token", "ci\0", "*", "x" * 5000):
        with pytest.raises(WrongToken) as caught:
            known.token(user, token)
        assert len(token) < 5 or token not in str(caught.value)
    with pytest.raises(WrongToken):
        known.token("ci", main_token(tmp_path))
    assert known.stats()["refused"] == 10


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_token_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    """A token file with rights for group or others stops the start, and the login while it runs."""
    known = authenticator(tmp_path)
    (tmp_path / "token").chmod(mode)
    with pytest.raises(BadConfig, match="chmod 600"):
        authenticator(tmp_path)
    with pytest.raises(BadConfig, match="may be read by others"):
        known.token("", main_token(tmp_path))


@pytest.mark.parametrize("content", [b"", b"short\n", b"\xff" * 40, b"x" * (limits.TOKEN_FILE_BYTES_MAX + 1)])
def test_a_file_that_holds_no_token_is_refused(tmp_path: Path, content: bytes) -> None:
    """An empty, short, binary or huge token file is BadConfig; an empty token never logs in."""
    (tmp_path / "token").write_bytes(content)
    (tmp_path / "token").chmod(0o600)
    with pytest.raises(BadConfig):
        authenticator(tmp_path)


def test_a_changed_main_token_is_noticed(tmp_path: Path) -> None:
    """After the file is replaced the old token opens nothing, and the new one does; removed, neither."""
    known = authenticator(tmp_path)
    old = main_token(tmp_path)
    known.token("", old)
    (tmp_path / "token").write_text("a-token-that-was-written-by-hand\n")
    with pytest.raises(WrongToken):
        known.token("", old)
    assert known.token("", "a-token-that-was-written-by-hand").may("admin")
    (tmp_path / "token").unlink()
    with pytest.raises(WrongToken):
        known.token("", old)
    assert not (tmp_path / "token").exists()


# --- named tokens ---------------------------------------------------------------------------------


def test_named_tokens_have_the_roles_they_were_made_with(tmp_path: Path) -> None:
    """A named token logs in by itself or with its name, has its roles, and only its hash is on disk."""
    known = authenticator(tmp_path)
    secret = known.create_token("ci", ["read", "exec"])
    for user in ("", "default", "ci", "token:ci"):
        identity = known.token(user, secret)
        assert (identity.name, identity.roles, identity.node) == ("token:ci", {"read", "exec"}, False)
    path = tmp_path / "tokens" / "ci.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert secret not in path.read_text()
    assert [(token.name, token.roles) for token in known.tokens()] == [("ci", {"read", "exec"})]
    with pytest.raises(WrongToken):
        known.token("other", secret)


def test_a_removed_token_opens_nothing(tmp_path: Path) -> None:
    """A running node notices at the next login that a token was revoked, by whatever process."""
    known = authenticator(tmp_path)
    secret = known.create_token("ci", ["read"])
    assert known.token("ci", secret).may("read")
    TokenStore(tmp_path).remove("ci")
    for user in ("", "ci"):
        with pytest.raises(WrongToken):
            known.token(user, secret)
    again = known.create_token("ci", ["write"])
    assert again != secret
    assert known.token("ci", again).roles == {"write"}


@pytest.mark.parametrize(
    "name", ["", "main", "default", "../x", "a/b", ".hidden", "a b", "é", "x" * 64, "a\n"]
)
def test_names_that_could_leave_the_directory_are_refused(tmp_path: Path, name: str) -> None:
    """A token's name is a plain file name, and not one of the main token's."""
    with pytest.raises(BadArgument):
        authenticator(tmp_path).create_token(name, ["read"])
    with pytest.raises(BadArgument):
        TokenStore(tmp_path).remove(name)


def test_tokens_are_made_once_and_with_known_roles(tmp_path: Path) -> None:
    """A second token of the same name, no role and an unknown role are refused."""
    known = authenticator(tmp_path)
    secret = known.create_token("ci", ["read"])
    for name, roles in (("ci", ["write"]), ("a", []), ("b", ["root"]), ("c", ["read", "Read"])):
        with pytest.raises(BadArgument):
            known.create_token(name, roles)
    assert known.token("ci", secret).roles == {"read"}
    assert [token.name for token in known.tokens()] == ["ci"]


def test_a_spoilt_file_does_not_lock_the_others_out(tmp_path: Path) -> None:
    """A file that cannot be used is an error only for its own token and where nothing else fits."""
    known = authenticator(tmp_path)
    secret = known.create_token("good", ["read"])
    bad = tmp_path / "tokens" / "bad.json"
    bad.write_text("{")
    bad.chmod(0o600)
    assert known.token("", secret).may("read")
    with pytest.raises(BadConfig, match=r"bad\.json"):
        known.token("bad", secret)
    with pytest.raises(BadConfig):
        known.token("", "some-other-token-altogether")
    bad.write_text(json.dumps({"name": "good", "roles": ["admin"], "sha256": "0" * 64}))
    with pytest.raises(BadConfig):
        known.token("bad", secret)


# --- certificates and configuration ---------------------------------------------------------------


def test_certificates_give_what_their_units_say(tmp_path: Path) -> None:
    """`virgo-node` makes a member; `role-...` gives roles; other units and names give nothing."""
    known = authenticator(tmp_path)
    node = known.certificate("n2", ["virgo-node"])
    assert (node.name, node.node, node.may("admin")) == ("cert:n2", True, True)
    user = known.certificate("alice", ["role-read", "role-exec", "Sales", "role-king"])
    assert (user.name, user.node, user.roles) == ("cert:alice", False, {"read", "exec"})
    assert known.certificate("alice", []) == NOBODY
    assert known.certificate("alice", ["Sales"]) == NOBODY
    assert known.certificate("", ["virgo-node"]) == NOBODY


def test_the_configuration_has_the_last_word(tmp_path: Path) -> None:
    """Where `security.roles` names an identity it decides alone; an empty list bars it, nodes included."""
    known = authenticator(
        tmp_path, cert_alice=["read"], cert_n9=[], token_ci=["write"], token_old=[], cert_n3=["read"]
    )
    assert known.certificate("alice", ["role-admin"]).roles == {"read"}
    assert known.certificate("n9", ["virgo-node"]) == NOBODY
    assert known.certificate("n3", ["virgo-node"]).node
    assert known.token("", known.create_token("ci", ["admin"])).roles == {"write"}
    barred = known.create_token("old", ["read"])
    with pytest.raises(Denied):
        known.token("", barred)


@pytest.mark.parametrize(
    "roles", [{"alice": ["read"]}, {"uid:x": ["read"]}, {"uid:5": ["king"]}, {"cert:": []}]
)
def test_a_wrong_configuration_is_refused_at_start(tmp_path: Path, roles: dict[str, list[str]]) -> None:
    """An identity or role that does not exist is BadConfig and not a silent default."""
    with pytest.raises(BadConfig):
        Authenticator(tmp_path, SecurityConfig(roles=roles))


@pytest.mark.skipif(os.getuid() != 0 and not os.environ.get("CI"), reason="only root gives files away")
def test_what_root_makes_for_a_service_is_the_services(tmp_path: Path) -> None:
    """A token that root makes in another user's VIRGO_HOME is that user's, whose node has to read it."""
    os.chown(tmp_path, 65534, 65534)
    store = TokenStore(tmp_path)
    store.create("ours", ["read"])
    store.main()
    for path in (tmp_path / "tokens", tmp_path / "tokens" / "ours.json", tmp_path / "token"):
        assert (path.stat().st_uid, path.stat().st_gid) == (65534, 65534), path
