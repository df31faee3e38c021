"""Threads that read the kernel's requests and answer them.

A thread takes one request, does what it asks and answers, so nothing is handed over between threads, and a
request that waits for another machine holds up its own thread alone. What a handler raises is the answer: an
`OSError` its errno, anything else EIO, with a line in the log and a count, for it is a fault of ours.

A handler is called with a `Request` and returns the answer's bytes, or None for what has no answer. If the
kernel does not want the answer any more, for the caller was killed, `Request.undo` is called.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable, Mapping
from typing import Final

from virgo.errors import (
    DeadlineExceeded,
    Denied,
    NodeLost,
    NoNode,
    NotLoaded,
    NotRunning,
    PathEscape,
    TooLarge,
    VirgoError,
)
from virgo.kernel.fuse.protocol import (
    IN_HEADER,
    INIT_IN,
    INIT_MORE,
    INIT_OUT,
    MAJOR,
    MINOR,
    OPERATIONS,
    OUT_HEADER,
    Can,
    Operation,
)
from virgo.limits import FUSE_BACKGROUND_MAX, FUSE_IO_BYTES_MAX, FUSE_STACKED_MAX

log = logging.getLogger("virgo.kernel.fuse")
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")
_BUFFER_BYTES: Final = FUSE_IO_BYTES_MAX + 4 * _PAGE
_UNANSWERED: Final = frozenset((Operation.FORGET, Operation.BATCH_FORGET, Operation.INTERRUPT))
_HEADER_BYTES: Final = IN_HEADER.size
_ERRNO: Final = (
    (NodeLost, errno.EHOSTDOWN),
    (NotRunning, errno.EHOSTDOWN),
    (NotLoaded, errno.EHOSTDOWN),
    (DeadlineExceeded, errno.ETIMEDOUT),
    (PathEscape, errno.EXDEV),
    (TooLarge, errno.EFBIG),
    (Denied, errno.EACCES),
    (NoNode, errno.ENOENT),
)


class Request:
    """One request of the kernel.

    Attributes:
        operation: what is asked for.
        node: which file or directory.
        uid, gid, pid: who asks.
        body: what follows the header; only valid until the answer.
        undo: what to do if nobody wants the answer.
    """

    __slots__ = ("body", "gid", "node", "operation", "pid", "uid", "undo")

    def __init__(self, operation: int, node: int, uid: int, gid: int, pid: int, body: memoryview) -> None:
        self.operation = operation
        self.node = node
        self.uid = uid
        self.gid = gid
        self.pid = pid
        self.body = body
        self.undo: Callable[[], object] | None = None

    def names(self, at: int = 0) -> list[bytes]:
        """The names that stand in the body from there on."""
        return bytes(self.body[at:]).split(b"\0")[:-1]


Handler = Callable[[Request], "bytes | memoryview | None"]


def greet(device: int, wanted: Can) -> Can:
    """Answer the kernel's first request; what both sides can. Raises FileNotFoundError if it unmounted."""
    request = os.read(device, _BUFFER_BYTES)
    _, operation, unique, *_ = IN_HEADER.unpack_from(request)
    assert operation == Operation.INIT, "a mount begins with INIT"
    _, _, readahead, offered = INIT_IN.unpack_from(request, _HEADER_BYTES)
    if offered & Can.INIT_EXT:
        offered |= INIT_MORE.unpack_from(request, _HEADER_BYTES + INIT_IN.size)[0] << 32
    agreed = Can(offered & (wanted | Can.INIT_EXT | Can.MAX_PAGES | Can.BIG_WRITES))
    stacked = FUSE_STACKED_MAX if agreed & Can.PASSTHROUGH else 0
    body = INIT_OUT.pack(
        MAJOR, MINOR, readahead, int(agreed) & 0xFFFFFFFF, FUSE_BACKGROUND_MAX, FUSE_BACKGROUND_MAX * 3 // 4,
        FUSE_IO_BYTES_MAX, 1, FUSE_IO_BYTES_MAX // _PAGE, 0, int(agreed) >> 32, stacked, 0,
    )  # fmt: skip
    os.write(device, OUT_HEADER.pack(OUT_HEADER.size + len(body), 0, unique) + body)
    return agreed


class Server:
    """Answers the requests that come by one descriptor.

    Attributes:
        counts: requests by operation; behind them, answers that were EIO for a fault of ours.
    """

    def __init__(self, device: int, handlers: Mapping[int, Handler], counts: memoryview[int]) -> None:
        self._device = device
        self._handlers: list[Handler | None] = [handlers.get(number) for number in range(OPERATIONS)]
        self.counts = counts

    def __repr__(self) -> str:
        return f"<Server of descriptor {self._device}, {sum(self.counts[:OPERATIONS])} requests>"

    def run(self, threads: int) -> None:
        """Serve in so many threads, this one among them, until the file system is unmounted."""
        others = [
            threading.Thread(target=self._serve, name=f"fuse {number}", daemon=True)
            for number in range(1, threads)
        ]
        for other in others:
            other.start()
        self._serve()
        for other in others:
            other.join()

    def _serve(self) -> None:
        buffer = bytearray(_BUFFER_BYTES)
        view, device = memoryview(buffer), self._device
        while True:
            try:
                size = os.readv(device, (buffer,))
            except OSError as error:
                if error.errno == errno.ENODEV:  # unmounted
                    return
                if error.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):  # whoever asked has gone
                    continue
                raise
            self.answer(view[:size])

    def answer(self, message: memoryview) -> None:
        """Answer one message of the kernel."""
        _, operation, unique, node, uid, gid, pid, _, _ = IN_HEADER.unpack_from(message)
        handler = self._handlers[operation] if operation < OPERATIONS else None
        self.counts[operation if operation < OPERATIONS else 0] += 1
        if handler is None:
            if operation not in _UNANSWERED:
                self._send(unique, errno.ENOSYS, b"")
            return
        request = Request(operation, node, uid, gid, pid, message[_HEADER_BYTES:])
        code, answer = 0, None
        try:
            answer = handler(request)
        except VirgoError as error:
            code = errno_of(error)
        except OSError as error:
            code = error.errno or errno.EIO
        except Exception:
            log.exception("the answer to %s is a fault of ours", operation)
            self.counts[OPERATIONS] += 1
            code = errno.EIO
        if operation not in _UNANSWERED and not self._send(unique, code, answer or b"") and request.undo:
            request.undo()

    def _send(self, unique: int, code: int, answer: bytes | memoryview) -> bool:
        """Whether the kernel took the answer."""
        header = OUT_HEADER.pack(OUT_HEADER.size + len(answer), -code, unique)
        try:
            if len(answer) < _PAGE:
                os.write(self._device, header + answer)
            else:
                os.writev(self._device, (header, answer))
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENODEV):
                return False
            raise
        return True


def errno_of(error: VirgoError) -> int:
    """What a program is told of an error of the cloud."""
    found = getattr(error, "errno", None)
    if isinstance(found, int) and found > 0:
        return found
    return next((code for kind, code in _ERRNO if isinstance(error, kind)), errno.EIO)
