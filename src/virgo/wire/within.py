"""`WITH context COMMAND ...`: a command that is run in a context that came along, as its identity."""

from __future__ import annotations

from virgo import context as contexts
from virgo.context import NOBODY, Context, Identity
from virgo.errors import BadArgument, NotAuthenticated
from virgo.wire.commands import Command, CommandTable
from virgo.wire.refusals import not_allowed


def unwrap(
    request: list[bytes], table: CommandTable, speaker: Identity
) -> tuple[Command, list[bytes], Context]:
    """The command inside, its request, and the context.

    Raises:
        NotAuthenticated, Denied: the speaker, or the context's identity, may not.
        BadArgument, BadRequest, UnknownCommand: it is malformed. DeadlineExceeded: it came too late.
    """
    if speaker == NOBODY:
        raise NotAuthenticated("WITH needs a login first")
    context = contexts.decode(request[1] if len(request) > 1 else b"", speaker=speaker)
    inner = request[2:]
    if not inner or inner[0].upper() == b"WITH":
        raise BadArgument("WITH needs a command", hint="Usage: WITH context command [argument...]")
    command = table.find(inner[0])
    if command.role not in ("", "login") and not context.identity.may(command.role):
        raise not_allowed(command, context.identity)
    command.check_arity(inner)
    context.check(command.name)
    return command, inner, context
