"""The one error tree: what was attempted, on what, what went wrong, and what to do next.

Every refusal and fault that VIRGO reports is a `VirgoError`. Each class has a stable `code`, the first
word of the RESP error reply, so that every client in every language can tell them apart; `to_line` and
`from_line` are inverse, so an error raised on one node arrives as the same class on another. Where
Python has a built-in error with the same meaning (`KeyError`, `TimeoutError`, `FileNotFoundError`, ...)
the class derives from that too.
"""

from __future__ import annotations

import errno
import re
from typing import ClassVar

_HINT = " Hint: "
_registry: dict[str, type[VirgoError]] = {}


class VirgoError(Exception):
    """Base of all errors. `str()` is one line: message, then the hint.

    Args:
        message: what was attempted, on what, and what went wrong, in one sentence.
        hint: what the reader can do next; falls back to the class's `default_hint`.
    """

    code: ClassVar[str] = "ERR"
    default_hint: ClassVar[str] = ""
    number: ClassVar[int] = 0  # `errno` of those that are an OSError

    def __init__(self, message: str = "", *, hint: str = "") -> None:
        super().__init__(message)
        if self.number:  # only those that are an OSError have it, and so the attribute
            object.__setattr__(self, "errno", self.number)
        self.message = message
        self.hint = hint or self.default_hint

    def __init_subclass__(cls) -> None:
        if "code" in cls.__dict__:
            assert cls.code not in _registry, f"two errors share the code {cls.code}"
            _registry[cls.code] = cls

    def __str__(self) -> str:
        return f"{self.message}{_HINT}{self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.hint), self.__dict__

    def to_line(self) -> str:
        """The error as the text of a RESP error reply (no leading '-', no line ends)."""
        return f"{self.code} {' '.join(str(self).split())}"


def _rebuild(kind: type[VirgoError], message: str, hint: str) -> VirgoError:
    return kind(message, hint=hint)


def from_line(line: str) -> VirgoError:
    """The error that a RESP error reply stands for; an unknown code gives a plain `VirgoError`."""
    code, _, rest = line.partition(" ")
    # The last hint is the error's own: the message may quote an error that has one too, or be empty.
    message, mark, hint = f" {rest}".rpartition(_HINT)
    if not mark:
        message, hint = rest, ""
    message = message.strip()
    kind = _registry.get(code)
    if kind is None:
        return VirgoError(line, hint="")  # its text is not ours, and says all there is
    return kind(message, hint=hint)


# --- the caller's side ----------------------------------------------------------------------


class BadRequest(VirgoError, ValueError):
    """The bytes on the wire are not a request."""

    code = "BADREQ"
    default_hint = "Speak RESP, as every Redis client does, or one command on a line; docs/wire.md says more."


class UnknownCommand(VirgoError, ValueError):
    """No such command is served here."""

    code = "UNKNOWN"
    default_hint = "COMMAND lists what this port serves."


class BadArgument(VirgoError, ValueError):
    """An argument is missing, malformed or out of range."""

    code = "BADARG"


class WrongType(BadArgument, TypeError):
    """A `BadArgument` that a client refuses before it sends it: not of a type that can be meant."""


class TooLarge(VirgoError, ValueError):
    """A size exceeds a limit of `virgo.limits`."""

    code = "TOOBIG"
    default_hint = "Send less at once, in several requests; the bounds and their reasons are in virgo.limits."


class NotAuthenticated(VirgoError, PermissionError):
    """The connection has not said who it is."""

    code = "NOAUTH"
    default_hint = "Send AUTH with the token in $VIRGO_HOME/token, or use the node's Unix socket."


class WrongToken(VirgoError, PermissionError):
    """The token is not one of this cloud's."""

    code = "WRONGPASS"
    default_hint = "The token is in $VIRGO_HOME/token of the machine that runs the node."


class Denied(VirgoError, PermissionError):
    """The identity lacks the role that the command needs."""

    code = "NOPERM"
    default_hint = (
        "An administrator gives roles: security.roles in the configuration, or `virgo token create`."
    )


class NotLoaded(VirgoError):
    """The module behind this port or command is not loaded, or is restarting."""

    code = "NOTLOADED"
    default_hint = "`virgo modules` lists the modules of this node and their state."


class UnknownId(VirgoError, KeyError):
    """No such allocation: never made, or freed."""

    code = "NOID"
    default_hint = "Ids come from VIRGO_MALLOC and end with VIRGO_FREE; a freed id is never reused."


class BadDescriptor(VirgoError, OSError):
    """No such open file: never opened, or closed."""

    code = "BADFD"
    number = errno.EBADF
    default_hint = "Descriptors come from VIRGO_OPEN and end with VIRGO_CLOSE, or after a day without use."


class FileMissing(VirgoError, FileNotFoundError):
    """The path does not exist on its node."""

    code = "NOENT"
    number = errno.ENOENT
    default_hint = "`virgo ls` of the directory above it shows what is there."


class FileThere(VirgoError, FileExistsError):
    """The path exists already."""

    code = "EXISTS"
    number = errno.EEXIST
    default_hint = "Choose another name, or remove what has this one."


class FileRefused(VirgoError, OSError):
    """The file system refused: a directory where a file is needed, no permission, an I/O error.

    The message ends with the name of the kernel's error, `(EISDIR)`, which is also its `errno`.
    """

    code = "FILE"
    number = errno.EIO

    def __init__(self, message: str = "", *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        named = re.search(r"\((E[A-Z0-9]+)\)$", message)
        if named is not None:
            self.errno = getattr(errno, named[1], errno.EIO)


class PathEscape(VirgoError, PermissionError):
    """The path leads out of its exported root."""

    code = "ESCAPE"
    number = errno.EACCES
    default_hint = "Paths stay below an exported root: no '..', no absolute or outward links."


class NotExported(VirgoError, LookupError):
    """No function or program of this name may be called."""

    code = "NOTEXPORTED"
    default_hint = "`virgo call --list` shows what is exported; @virgo.export adds a function."


class CallFailed(VirgoError, RuntimeError):
    """A cloned call ended without a result; the message carries the cause.

    Attributes:
        cause: one of `exception`, `signal`, `memory`, `exit`, `program`, `result`, `output`, `cancelled`,
            `lost`.
        node: the name of the node where it ran, if it ran.
        remote_traceback: the traceback text of the remote exception, or "".
        attempts: how often it was run.
    """

    code = "CALLFAILED"
    default_hint = "`virgo logs TASK` shows what it wrote."
    _traceback_hint = (
        "The traceback is in the error's remote_traceback; VIRGO_DEBUG=1 makes `virgo call` show it."
    )

    def __init__(
        self,
        message: str = "",
        *,
        hint: str = "",
        cause: str = "exception",
        node: str = "",
        remote_traceback: str = "",
        attempts: int = 1,
    ) -> None:
        super().__init__(message, hint=hint or (self._traceback_hint if remote_traceback else ""))
        self.cause = cause
        self.node = node
        self.remote_traceback = remote_traceback
        self.attempts = attempts


class Cancelled(VirgoError):
    """The request was cancelled, and what it had started was stopped."""

    code = "CANCELLED"
    default_hint = (
        "It was stopped on request, or since its client went away; send it again if it is still wanted."
    )


class DeadlineExceeded(VirgoError, TimeoutError):
    """The deadline passed first. Whether the effect took place is unknown unless said."""

    code = "DEADLINE"
    default_hint = "Give it more time (timeout=, --timeout); `virgo status` shows which node is busy or lost."


# --- the cloud's side -----------------------------------------------------------------------


class NodeLost(VirgoError, ConnectionError):
    """The node that holds the data or runs the call does not answer."""

    code = "NODELOST"
    default_hint = "`virgo nodes` shows who is up; data on a node is back when the node is."


class NoNode(VirgoError, LookupError):
    """No node of that name, or none that can take the work."""

    code = "NONODE"
    default_hint = "`virgo nodes` lists the nodes of this cloud."


class NotRunning(VirgoError, ConnectionError):
    """No node answers at the given place."""

    code = "NOTRUNNING"
    default_hint = "`virgo up` starts a node."


class Busy(VirgoError):
    """A bound on outstanding work is reached; nothing was started."""

    code = "BUSY"
    default_hint = "Try again in a moment, or send less at once."


class PoolFull(VirgoError, MemoryError):
    """The memory pool has no room for it."""

    code = "OOM"
    default_hint = "Free regions or raise memory.capacity_bytes; `virgo status` shows the use."


class DiskFull(VirgoError, OSError):
    """The disk under the pool or the file is full; what was acknowledged earlier is intact."""

    code = "DISKFULL"
    number = errno.ENOSPC
    default_hint = "Make room on the disk, then try again."


class Conflict(VirgoError):
    """A compare-and-set found another version than it expected."""

    code = "CONFLICT"
    default_hint = "Somebody else was faster: read what is there now, then decide anew."


class CrossNode(VirgoError):
    """Keys that are to be changed as one lie on several nodes; nothing was done."""

    code = "CROSSNODE"
    default_hint = "Keys with the same part in braces lie together: {user:7}:name and {user:7}:age."


class TransactionAborted(VirgoError):
    """Nothing of the transaction was done, since one of its commands was refused."""

    code = "EXECABORT"
    default_hint = "The answer to the command that was refused says why."


class EngineUnavailable(VirgoError, ConnectionError):
    """The engine does not answer; the outcome of a write in flight is unknown."""

    code = "NOENGINE"
    default_hint = "`virgo status` shows the engine; it is restarted by `virgo up` on its own."


class UnsafeEngine(VirgoError):
    """The engine's settings can lose acknowledged data."""

    code = "UNSAFE"
    default_hint = "Mend the setting, or start with --unsafe-engine and accept the loss."


class PortTaken(VirgoError, OSError):
    """Another process holds a port that the node needs."""

    code = "PORTTAKEN"


class BadConfig(VirgoError, ValueError):
    """A configuration file or variable cannot be used."""

    code = "BADCONFIG"
    default_hint = "docs/configuration.md has every key, docs/security.md what certificates and tokens need."


class InternalFault(VirgoError):
    """A defect of VIRGO itself; the node logged the traceback."""

    code = "FAULT"
    default_hint = "The node's log has the traceback; please report it."
