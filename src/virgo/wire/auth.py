"""Who asks: an identity for each connection, and the roles that it has.

| way in | name | roles |
| --- | --- | --- |
| Unix socket, the owner of VIRGO_HOME or root | `uid:N` | admin, and a member of the cloud |
| Unix socket, another user | `uid:N` | as configured; unnamed users are nobody |
| the main token | `token:main` | admin |
| a named token | `token:NAME` | as configured, else those that the token was made with |
| certificate with unit `virgo-node` | `cert:NAME` | admin, and a member of the cloud |
| another certificate | `cert:NAME` | as configured, else its units `role-read`, `role-write`, ... |

"As configured" is `[security.roles]`: where it names an identity it has the only word, so that roles can
be changed, or taken away by an empty list (of a node's certificate too), without new credentials.
Credentials are looked at when a
connection is opened; what is revoked later opens no new one, and ends the open ones with the node.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from virgo.config import SecurityConfig
from virgo.context import NOBODY, ROLES, Identity
from virgo.errors import BadConfig, Denied, WrongToken
from virgo.wire.tokens import MAIN, MAIN_NAMES, Token, TokenStore

UNIT_NODE = "virgo-node"
UNIT_ROLE = "role-"

_ADMIN = frozenset({"admin"})
_NAMED = re.compile(r"uid:[0-9]+|(token|cert):.+")


class Authenticator:
    """Turns credentials into identities.

    Args:
        home: VIRGO_HOME, where the tokens are; the main token is made if it is absent.
        config: the roles of named identities.

    Raises:
        BadConfig: a role or identity in the configuration is not one, or the main token's file is unsafe.
    """

    def __init__(self, home: Path, config: SecurityConfig) -> None:
        self._home = home
        self._configured = _configured_roles(config)
        self._tokens = TokenStore(home)
        self._tokens.main()
        self._owner = home.stat().st_uid
        self._accepted = 0
        self._refused = 0

    def __repr__(self) -> str:
        return f"<Authenticator {self._home} accepted={self._accepted} refused={self._refused}>"

    def stats(self) -> dict[str, Any]:
        """Logins accepted and refused, and identities that the configuration names."""
        return {
            "accepted": self._accepted,
            "refused": self._refused,
            "configured": len(self._configured),
        }

    def unix(self, uid: int, gid: int, pid: int) -> Identity:
        """The identity of a Unix socket's peer, by its credentials; NOBODY for an unnamed user."""
        name = f"uid:{uid}"
        if uid in (0, self._owner):
            return self._count(Identity(name=name, roles=_ADMIN, node=True))
        return self._count(self._identity(name, frozenset()))

    def token(self, user: str, token: str) -> Identity:
        """The identity behind a token; `user` may be "" or "default" for any, else the token's name.

        Raises:
            WrongToken: there is no such token, or it is not that user's.
            Denied: it is a token, but the configuration has taken all of its roles.
            BadConfig: the file of the token cannot be used.
        """
        user = user.removeprefix("token:")
        if user in MAIN_NAMES and self._tokens.is_main(token):
            return self._count(Identity(name=f"token:{MAIN}", roles=_ADMIN))
        found = None if user == MAIN else self._tokens.find(token, "" if user in MAIN_NAMES else user)
        if found is None:
            self._refused += 1
            raise WrongToken("the token is wrong" if user in MAIN_NAMES else "the user or token is wrong")
        identity = self._count(self._identity(f"token:{found.name}", found.roles))
        if identity == NOBODY:
            raise Denied(
                f"the token {found.name!r} has no roles any more",
                hint="[security.roles] of the node's configuration has taken them away.",
            )
        return identity

    def certificate(self, common_name: str, units: Iterable[str] = ()) -> Identity:
        """The identity of a TLS peer, by its verified certificate's common name and units."""
        if not common_name:
            return self._count(NOBODY)
        units = frozenset(units)
        name = f"cert:{common_name}"
        if UNIT_NODE in units and self._configured.get(name) != frozenset():
            return self._count(Identity(name=name, roles=_ADMIN, node=True))
        own = frozenset(unit.removeprefix(UNIT_ROLE) for unit in units if unit.startswith(UNIT_ROLE))
        return self._count(self._identity(name, own & ROLES))

    def create_token(self, name: str, roles: Iterable[str]) -> str:
        """Make a named token and return its secret. Raises BadArgument."""
        return self._tokens.create(name, roles)

    def tokens(self) -> list[Token]:
        """The named tokens. Raises BadConfig."""
        return self._tokens.all()

    def remove_token(self, name: str) -> None:
        """Revoke a named token. Raises BadArgument."""
        self._tokens.remove(name)

    def _identity(self, name: str, own: frozenset[str]) -> Identity:
        roles = self._configured.get(name, own)
        return Identity(name=name, roles=roles) if roles else NOBODY

    def _count(self, identity: Identity) -> Identity:
        if identity == NOBODY:
            self._refused += 1
        else:
            self._accepted += 1
        return identity


def _configured_roles(config: SecurityConfig) -> dict[str, frozenset[str]]:
    for name, roles in config.roles.items():
        if not _NAMED.fullmatch(name):
            raise BadConfig(
                f"security.roles: {name!r} is not an identity",
                hint="Write uid:N, token:NAME or cert:NAME.",
            )
        wrong = set(roles) - ROLES
        if wrong:
            raise BadConfig(
                f"security.roles: {name} has the unknown role {sorted(wrong)[0]!r}",
                hint=f"Roles are {', '.join(sorted(ROLES))}.",
            )
    return {name: frozenset(roles) for name, roles in config.roles.items()}
