"""What a port serves: commands by name, each with its role and arity.

A handler gets the session and the whole request, the command's name first, and returns a value for
`resp.encode` or raises a VirgoError. A plain function is answered at once; it may also return an
awaitable when the work turns out to lie elsewhere. A coroutine function is awaited, and the requests
behind it on the same connection wait, unless the command is `concurrent`: then they are started too, and
the answers still leave in order.

Names are case-insensitive; `virgo_cloud_x` is `virgo_x`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from virgo.errors import BadArgument, UnknownCommand, from_line
from virgo.limits import REQUEST_ARGUMENTS_MAX

if TYPE_CHECKING:
    from virgo.wire.session import Session

Handler = Callable[["Session", list[bytes]], Any | Awaitable[Any]]


# The name under which a reader hands on a line that is no request, with the error as its argument.
MISREAD: Final = b"\n"


@dataclass(frozen=True, slots=True)
class Command:
    """One command.

    Attributes:
        name: canonical name, upper case.
        handler: see the module.
        role: the role that the caller needs; "" for commands that need none, not even a login.
        arguments_min, arguments_max: count of arguments behind the name; None for any number.
        concurrent: requests behind it on the connection need not wait for its end.
        writes: part of the session's batch: answered only once the batch is committed.
        run: handles requests that are alike at once, from the front, and gives the bytes of their answers;
            see `runs`. It raises nothing: what it cannot answer is left to the handler.
        run_words: words of the requests that it takes.
        usage: the arguments, as shown to people.
        summary: one line.
        aliases: further names.
        place: the listening place where it is served and nowhere else, "" for all that speak RESP.
    """

    name: str
    handler: Handler
    role: str = "read"
    arguments_min: int = 0
    arguments_max: int | None = 0
    concurrent: bool = False
    writes: bool = False
    usage: str = ""
    summary: str = ""
    aliases: tuple[str, ...] = ()
    run: Callable[[Session, list[list[bytes]]], list[bytes]] | None = None
    run_words: int = 0
    place: str = ""
    words_min: int = field(init=False)
    words_max: int = field(init=False)

    def __post_init__(self) -> None:
        """Count the words of a whole request, the name among them."""
        high = REQUEST_ARGUMENTS_MAX if self.arguments_max is None else self.arguments_max + 1
        object.__setattr__(self, "words_min", self.arguments_min + 1)
        object.__setattr__(self, "words_max", high)

    def check_arity(self, request: list[bytes]) -> None:
        """Raise BadArgument unless the count of arguments fits."""
        if not self.words_min <= len(request) <= self.words_max:
            raise BadArgument(
                f"{self.name} got {len(request) - 1} arguments",
                hint=f"Usage: {self.name} {self.usage}".rstrip(),
            )


def _refuse_line(_session: Session, request: list[bytes]) -> None:
    raise from_line(request[1].decode("utf-8", "replace"))


_MISREAD = Command("(line)", _refuse_line, "", 1, 1)


def canonical(name: bytes) -> bytes:
    """The name under which a command is kept."""
    upper = name.upper()
    if upper.startswith(b"VIRGO_CLOUD_"):
        upper = b"VIRGO_" + upper[12:]
    return upper


class CommandTable:
    """Commands by name; a lookup remembers each spelling that it has met.

    Attributes:
        spellings: commands by the names met so far, to be looked at before `find`.
        fallback: answers to names that are not in the table; None for UnknownCommand.
    """

    def __init__(self, commands: Iterable[Command] = ()) -> None:
        self._commands: dict[bytes, Command] = {}
        self.spellings: dict[bytes, Command] = {}
        self.fallback: Command | None = None
        self.add(commands)

    def __iter__(self) -> Iterator[Command]:
        return iter({command.name: command for command in self._commands.values()}.values())

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def add(self, commands: Iterable[Command]) -> None:
        """Serve these too; a later command replaces an earlier one of the same name."""
        for command in commands:
            for name in (command.name, *command.aliases):
                self._commands[canonical(name.encode())] = command
        self.spellings = {**self._commands, MISREAD: _MISREAD}

    def replace(self, commands: Iterable[Command]) -> None:
        """Serve these and no others."""
        self._commands.clear()
        self.add(commands)

    def find(self, name: bytes) -> Command:
        """The command of that name. Raises UnknownCommand."""
        command = self.spellings.get(name)
        if command is None:
            command = self._commands.get(canonical(name))
            if command is None:
                if self.fallback is not None:
                    return self.fallback
                shown = name[:40].decode("utf-8", "backslashreplace")
                raise UnknownCommand(f"no command {shown!r} is served here")
            if len(self.spellings) < 4 * len(self._commands) + 64:
                self.spellings[name] = command
        return command
