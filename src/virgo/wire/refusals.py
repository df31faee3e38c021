"""Errors that a session makes itself: a role that is missing, a defect in a handler."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from virgo.context import NOBODY, Identity
from virgo.errors import Denied, InternalFault, NotAuthenticated, VirgoError

if TYPE_CHECKING:
    from virgo.wire.commands import Command

log = logging.getLogger("virgo.wire")


def denied(what: str, role: str, identity: Identity) -> Denied:
    """Who asks lacks the role."""
    return Denied(
        f"{what} needs the role {role!r}, which {identity.name or 'nobody'} lacks",
        hint=f"Its roles: {', '.join(sorted(identity.roles)) or 'none'}; see security.roles.",
    )


def defect(request: list[bytes], error: Exception) -> InternalFault:
    """A handler failed as none should; the traceback is logged."""
    name = request[0][:40].decode("utf-8", "backslashreplace")
    log.error("%s failed", name, exc_info=error)
    return InternalFault(f"{name} failed: {type(error).__name__}: {error}")


def not_allowed(command: Command, identity: Identity) -> VirgoError:
    """The error for a command that the identity may not run."""
    if identity == NOBODY or command.role == "login":
        return NotAuthenticated(f"{command.name} needs a login")
    return denied(command.name, command.role, identity)
