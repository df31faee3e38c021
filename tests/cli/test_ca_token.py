"""`virgo ca` and `virgo token`: what they make can be used, and what goes wrong is one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.conftest import Virgo
from virgo.config import SecurityConfig
from virgo.wire import tls
from virgo.wire.auth import Authenticator


def test_ca_init_and_issue_make_certificates_that_fit_together(virgo: Virgo, tmp_path: Path) -> None:
    """After `init` this machine can serve; after `issue` another can connect with the copied directory."""
    made = virgo("ca", "init", "--json").json
    assert made["certificate"]["node"]
    assert {"127.0.0.1", "::1", "localhost"} <= set(made["certificate"]["hosts"])
    tls.server_context(tmp_path / "home", SecurityConfig())
    issued = virgo("ca", "issue", "n2", "--node", "--host", "10.0.0.2", "--json").json
    assert issued["hosts"] == ["10.0.0.2", "n2"]
    place = Path(issued["certificate"]).parent
    place.rename(tmp_path / "tls")
    tls.client_context(tmp_path, SecurityConfig())


def test_ca_says_what_to_copy_where(virgo: Virgo, tmp_path: Path) -> None:
    """People are told which files to copy to which machine, and never shown a key."""
    text = virgo("ca", "init").text + virgo("ca", "issue", "alice", "--role", "read").text
    assert f"{tmp_path}/home/tls/issued/alice" in text
    assert "$VIRGO_HOME/tls" in text
    assert "PRIVATE" not in text


@pytest.mark.parametrize(
    "words",
    [
        ["issue", "n2"],
        ["issue", "n2", "--node", "--role", "read"],
        ["issue", "n2", "--role", "king"],
        ["issue", "n2", "--role", "read", "--host", "a"],
        ["issue", "../n2", "--node"],
        ["init"],
    ],
)
def test_ca_refuses_in_words(virgo: Virgo, words: list[str], tmp_path: Path) -> None:
    """A contradiction, an unknown role, a bad name and a second authority fail, and nothing is made."""
    assert virgo("ca", "init").status == 0
    assert virgo("ca", *words).status != 0
    made = {path.name for path in (tmp_path / "home" / "tls").iterdir()}
    assert made == {"ca.crt", "ca.key", "cluster.secret", "node.crt", "node.key"}


def test_a_token_is_shown_once_and_works(virgo: Virgo, tmp_path: Path) -> None:
    """The printed token logs in with its roles; the list shows it without its secret; removed, it is gone."""
    secret = virgo("token", "create", "ci", "--role", "read", "--role", "write").text.strip()
    known = Authenticator(tmp_path / "home", SecurityConfig())
    assert known.token("ci", secret).roles == {"read", "write"}
    listed = virgo("token", "list", "--json")
    assert [(one["name"], one["roles"]) for one in listed.json] == [("ci", ["read", "write"])]
    assert secret not in listed.text + virgo("token", "list").text
    assert virgo("token", "create", "ci", "--role", "read").status != 0
    assert virgo("token", "remove", "ci").status == 0
    assert virgo("token", "remove", "ci").status != 0
    assert known.tokens() == []
