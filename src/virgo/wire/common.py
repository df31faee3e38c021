"""What every port answers: the commands that Redis clients, redis-cli and people expect of any server."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from virgo._version import __version__
from virgo.context import NOBODY
from virgo.errors import BadArgument, Denied, NotAuthenticated
from virgo.wire import resp
from virgo.wire.commands import Command
from virgo.wire.session import Session

# What HELLO and INFO say of the Redis version: clients choose features by it.
REDIS_VERSION = "7.0.0"


def commands(info: Callable[[], dict[str, dict[str, Any]]]) -> list[Command]:
    """The common commands; `info` gives the sections of INFO."""
    return [
        Command("WITH", _never, "context", 2, None, usage="context command [argument...]"),
        Command("PING", _ping, "", 0, 1, usage="[message]", summary="Is anybody there?"),
        Command("ECHO", lambda _s, r: r[1], "login", 1, 1, usage="message", summary="The message."),
        Command("HELLO", _hello, "", 0, None, usage="[2|3 [AUTH user token] [SETNAME name]]"),
        Command("AUTH", _auth, "", 1, 2, usage="[user] token", summary="Log in."),
        Command("QUIT", _quit, "", 0, None, summary="Close the connection."),
        Command("RESET", _reset, "", 0, 0, summary="Forget login and protocol."),
        Command("SELECT", _select, "login", 1, 1, usage="0"),
        Command("CLIENT", _client, "login", 1, None, usage="ID|INFO|GETNAME|SETNAME|SETINFO|LIST"),
        Command("COMMAND", _command, "login", 0, None, usage="[COUNT|LIST|DOCS|INFO name...]"),
        Command("CONFIG", _config, "login", 1, None, usage="GET pattern"),
        Command("TIME", _time, "login", 0, 0, summary="Seconds and microseconds since 1970."),
        Command(
            "INFO", lambda _s, r: _info(info(), r[1:]), "login", 0, None, usage="[section...]",
            summary="The node and its modules, as Redis formats it.",
        ),
    ]  # fmt: skip


def _never(_session: Session, _request: list[bytes]) -> None:
    raise AssertionError("WITH is handled by the session")


def _ping(_session: Session, request: list[bytes]) -> bytes:
    return resp.PONG if len(request) == 1 else request[1]


def _auth(session: Session, request: list[bytes]) -> resp.Encoded:
    user = request[1].decode("utf-8", "replace") if len(request) == 3 else "default"
    session.login(session.service.authenticator.token(user, request[-1].decode("utf-8", "replace")))
    return resp.OK


def _hello(session: Session, request: list[bytes]) -> dict[str, Any]:
    words = request[1:]
    protocol = session.protocol
    if words:
        if words[0] not in (b"2", b"3"):
            raise BadArgument(
                "HELLO knows the protocols 2 and 3", hint="Usage: HELLO [2|3 [AUTH user token]]"
            )
        protocol = int(words.pop(0))
    while words:
        option = words.pop(0).upper()
        if option == b"AUTH" and len(words) >= 2:
            _auth(session, [b"AUTH", words.pop(0), words.pop(0)])
        elif option == b"SETNAME" and words:
            session.client_name = _name(words.pop(0))
        else:
            raise BadArgument("HELLO: unknown option", hint="Usage: HELLO [2|3 [AUTH user token]]")
    if session.identity == NOBODY:
        raise NotAuthenticated("HELLO needs a login", hint="HELLO 3 AUTH default TOKEN logs in at once.")
    session.protocol = protocol
    return {
        "server": "virgo",
        "version": REDIS_VERSION,
        "virgo": __version__,
        "proto": protocol,
        "id": session.number,
        "mode": "standalone",
        "role": "master",
        "modules": [],
    }


def _quit(session: Session, _request: list[bytes]) -> resp.Encoded:
    session.close()
    return resp.OK


def _reset(session: Session, _request: list[bytes]) -> resp.Simple:
    session.reset()
    return resp.Simple("RESET")


def _select(_session: Session, request: list[bytes]) -> resp.Encoded:
    if request[1] != b"0":
        raise BadArgument("there is one database, 0", hint="Use a namespace in the key instead.")
    return resp.OK


def _name(data: bytes) -> str:
    name = data.decode("utf-8", "replace")
    if not name.isprintable() or " " in name:
        raise BadArgument(
            "a client's name has no blanks or control characters", hint="Letters, digits, '-', '_', '.', ':'."
        )
    return name[:256]


def _client(session: Session, request: list[bytes]) -> Any:
    what = request[1].upper()
    if what == b"ID":
        return session.number
    if what == b"GETNAME":
        return session.client_name
    if what == b"SETNAME" and len(request) == 3:
        session.client_name = _name(request[2])
        return resp.OK
    if what in (b"SETINFO", b"NO-EVICT", b"NO-TOUCH"):
        return resp.OK
    if what == b"INFO":
        return _describe(session)
    if what == b"LIST":
        if not session.identity.may("admin"):
            raise Denied("CLIENT LIST needs the role 'admin'")
        sessions = sorted(session.service.sessions, key=lambda other: other.number)
        return "".join(_describe(other) + "\n" for other in sessions)
    raise BadArgument("CLIENT: unknown subcommand", hint="ID, INFO, LIST, GETNAME, SETNAME, SETINFO")


def _describe(session: Session) -> str:
    age = int(session.service.loop.time() - session.opened)
    return (
        f"id={session.number} addr={session.peer} name={session.client_name} age={age}"
        f" user={session.identity.name} resp={session.protocol}"
    )


def _command(session: Session, request: list[bytes]) -> Any:
    what = request[1].upper() if len(request) > 1 else b""
    found = sorted(session.table, key=lambda command: command.name)
    if what == b"COUNT":
        return len(found)
    if what == b"LIST":
        return [command.name.lower() for command in found]
    if what == b"DOCS":
        wanted = {name.upper().decode("utf-8", "replace") for name in request[2:]}
        chosen = [command for command in found if not wanted or command.name in wanted]
        return {
            command.name.lower(): {
                "summary": command.summary or f"{command.name} {command.usage}".strip(),
                "since": __version__,
                "group": "virgo",
            }
            for command in chosen
        }
    if what in (b"", b"INFO"):
        wanted = {name.upper().decode("utf-8", "replace") for name in request[2:]}
        return [_entry(command) for command in found if not wanted or command.name in wanted]
    raise BadArgument("COMMAND: unknown subcommand", hint="COUNT, LIST, DOCS or INFO")


def _entry(command: Command) -> list[Any]:
    low = command.arguments_min + 1
    arity = low if command.arguments_max == command.arguments_min else -low
    flags = ["write" if command.writes or command.role == "write" else "readonly"]
    return [command.name.lower(), arity, flags, 0, 0, 0, [f"@{command.role or 'connection'}"], [], [], []]


def _config(_session: Session, request: list[bytes]) -> Any:
    if request[1].upper() == b"GET":
        return {}  # redis-benchmark asks for `save` and `appendonly`
    raise BadArgument("CONFIG knows only GET here", hint="Settings are in $VIRGO_HOME/virgo.toml.")


def _time(_session: Session, _request: list[bytes]) -> list[str]:
    seconds, rest = divmod(time.time_ns(), 1_000_000_000)
    return [str(seconds), str(rest // 1000)]


def _info(sections: dict[str, dict[str, Any]], wanted: list[bytes]) -> str:
    names = {name.decode("utf-8", "replace").lower() for name in wanted} - {"all", "everything", "default"}
    lines: list[str] = []
    for title, values in sections.items():
        if not names or title.lower() in names:
            lines += [f"# {title}", *(f"{key}:{value}" for key, value in values.items()), ""]
    return "\r\n".join(lines)
