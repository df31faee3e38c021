"""What a call writes, given to its caller as it comes: the option `output`.

Such a call goes through the node, which says under which id it is known; what it has written is asked for by
that every few moments (`CPU.LOG`). Its outcome is given to whoever waits when all has been handed on.
"""

from __future__ import annotations

import codecs
import io
import threading
from collections.abc import Callable
from typing import Any, Final, Protocol, cast, runtime_checkable

from virgo.cpu.calls import Sink
from virgo.cpu.futures import Cancel, CpuFuture
from virgo.cpu.messages import Outcome
from virgo.cpu.seen import Written
from virgo.errors import BadArgument, CallFailed, Cancelled, VirgoError
from virgo.limits import OUTPUT_LOOK_S, OUTPUT_LOOK_S_MAX

_IDLE_S: Final = 10.0


@runtime_checkable
class Writable(Protocol):
    """A file, of text or of bytes."""

    def write(self, data: Any, /) -> Any:
        """Take some."""


Output = Writable | Callable[[bytes], object]
Write = Callable[[bytes], object]


def writer(output: Output) -> Write:
    """What takes bytes and hands them on. Raises BadArgument."""
    if not isinstance(output, Writable):
        if callable(output):
            return output
        raise BadArgument(
            f"output is a {type(output).__name__}, which nothing can be written to",
            hint="Give a file, sys.stderr for example, or a function of bytes.",
        )
    file = cast("Any", output)
    flush = getattr(file, "flush", None)
    text = isinstance(file, io.TextIOBase) or hasattr(file, "encoding")
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode if text else bytes

    def write(data: bytes) -> None:
        file.write(decode(data))
        if flush is not None:
            flush()

    return write


class Reading:
    """How far what a call has written was handed on.

    Args:
        write: where it goes.
    """

    __slots__ = ("_offset", "_write")

    def __init__(self, write: Write) -> None:
        self._write = write
        self._offset = 0

    @property
    def offset(self) -> int:
        """Bytes so far."""
        return self._offset

    def take(self, written: Written) -> bool:
        """Hand on what came; whether there was anything. Raises what writing raises, or CallFailed."""
        if written.offset > self._offset:
            raise CallFailed(
                f"{written.offset - self._offset} bytes of what {written.label} wrote are lost",
                hint="What is not read is kept for ten minutes after the call, and by its node only.",
                cause="output",
                node=written.node,
            )
        self._offset = written.offset + len(written.data)
        if written.data:
            self._write(written.data)
        return bool(written.data)


class Followed:
    """The sink of one call whose output is followed.

    Attributes:
        reading: of it.
        future: who waits for the call.
        end: gives that its outcome; None while there is none.
    """

    def __init__(self, future: CpuFuture, write: Write, news: Callable[[], None]) -> None:
        self.reading = Reading(write)
        self.future = future
        self.end: Callable[[], None] | None = None
        self._news = news

    def __repr__(self) -> str:
        return f"<Followed {self.future.item!r} {self.reading.offset} bytes>"

    def settle(self, index: int, outcome: Outcome) -> None:
        """See Sink."""
        self._keep(lambda sink: sink.settle(index, outcome))

    def fail(self, index: int, error: VirgoError) -> None:
        """See Sink."""
        if isinstance(error, Cancelled) and not self.future.done():  # whoever did that waits for no more
            self.future.fail(index, error)
        self._keep(lambda sink: sink.fail(index, error))

    def _keep(self, end: Callable[[Sink], None]) -> None:
        self.end = lambda: end(self.future)
        self._news()


class Follower:
    """Follows the output of the calls of a client, in a thread that is there while there are some.

    Args:
        look: what a call has written, from an offset on. Raises VirgoError.
        cancel: ends calls.
    """

    def __init__(self, look: Callable[[str, int], Written], cancel: Cancel) -> None:
        self._look = look
        self._cancel = cancel
        self._changed = threading.Condition()
        self._followed: list[Followed] = []
        self._ended = False  # some has ended since the last look
        self._thread: threading.Thread | None = None

    def __repr__(self) -> str:
        return f"<Follower of {len(self._followed)} calls>"

    def follow(self, future: CpuFuture, write: Write) -> Followed:
        """The sink for the call of a future."""
        followed = Followed(future, write, self._news)
        with self._changed:
            self._followed.append(followed)
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="virgo-output", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return followed

    def _news(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _serve(self) -> None:
        look_s = OUTPUT_LOOK_S
        while True:
            with self._changed:
                if not self._changed.wait_for(lambda: self._followed, _IDLE_S):
                    self._thread = None
                    return
                self._changed.wait_for(lambda: self._ended, look_s)
                self._ended = False
                followed = list(self._followed)
            # One after the other: a call that has written nothing costs a request, so it is asked ever less.
            wrote = [self._step(one) for one in followed]
            look_s = OUTPUT_LOOK_S if any(wrote) else min(2 * look_s, OUTPUT_LOOK_S_MAX)
            del followed  # with its results, which may be large

    def _step(self, followed: Followed) -> bool:
        """Hand on what a call has written; its outcome if that was all."""
        end, item = followed.end, followed.future.item  # looked at first: what is there then is all
        wrote = False
        try:
            while item is not None and item.id and not followed.future.done():
                try:
                    written = self._look(item.id, followed.reading.offset)
                except VirgoError:  # it has written nothing, or nodes do not answer: its outcome says more
                    break
                if not followed.reading.take(written):
                    break
                wrote = True
        except BaseException as error:  # noqa: BLE001 - of the caller's file: he is to know
            self._fail(followed, error)
            return wrote
        if end is not None:
            self._drop(followed)
            if not followed.future.done():
                end()
        return wrote

    def _fail(self, followed: Followed, error: BaseException) -> None:
        """The output cannot be handed on: as of a program whose pipe is closed, the call is stopped."""
        self._drop(followed)
        if not followed.future.done() and followed.future.set_running_or_notify_cancel():
            followed.future.set_exception(error)
        if followed.future.item is not None:
            self._cancel([followed.future.item])

    def _drop(self, followed: Followed) -> None:
        with self._changed:
            self._followed.remove(followed)
