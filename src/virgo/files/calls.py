"""What the files clients send: requests with the meaning of their answers, and plans of several.

A plan is a generator: it yields requests to be sent together, is sent their results (or the errors in
their places), and returns the outcome. The blocking and the asyncio client differ only in who drives it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Generator
from typing import Any, TypeVar

import msgspec

from virgo.errors import DiskFull, VirgoError, WrongType
from virgo.files import core
from virgo.limits import FILE_BUFFER_BYTES, FILE_CHUNK_BYTES, FILE_CHUNKS_AHEAD, NODE_LOST_S
from virgo.wire.call import AsyncRunner, Call, Runner, as_nothing, as_text, whole

T = TypeVar("T")
AnyPath = str | os.PathLike[str]
Content = bytes | bytearray | memoryview
Plan = Generator[list[Call[Any]], list[Any], T]


class FileStatus(msgspec.Struct, frozen=True):
    """What a path or descriptor names, as the node that holds it sees it.

    Attributes:
        name: the last part of the path.
        kind: `file`, `directory`, `link`, or what else it is.
        size: in bytes.
        modified_ns: time of the last change, nanoseconds since 1970.
        mode: permission bits.
        links: count of its names.
        node: the node that holds it, where that is not plain from the path.
        lost: its node is not up; nothing else is known of it.
    """

    name: str
    kind: str
    size: int = 0
    modified_ns: int = 0
    mode: int = 0
    links: int = 0
    node: str = ""
    lost: bool = False

    @property
    def is_directory(self) -> bool:
        """Whether it holds other files."""
        return self.kind == "directory"


_AT = "the position"

# --- single requests ------------------------------------------------------------------------


def open_file(path: AnyPath, mode: str | None) -> Call[int]:
    """Open; the descriptor."""
    if not isinstance(mode, str | None):
        raise WrongType(
            f"a mode is text, not {type(mode).__name__}", hint="r, w, a or x, as in Python's open()."
        )
    words = ("VIRGO_OPEN", plain(path))
    return Call(words if mode is None else (*words, mode), int)


def plain(path: AnyPath) -> str:
    """A path as text; bytes that are not UTF-8 survive as surrogates. Raises BadArgument."""
    if isinstance(path, (str, os.PathLike)):
        return os.fspath(path)
    raise WrongType(f"a path is text, not {type(path).__name__}", hint="Write '/NODE/name'.")


def close_file(descriptor: int) -> Call[None]:
    """End a descriptor."""
    return Call(("VIRGO_CLOSE", whole(descriptor, "the descriptor")), as_nothing)


def read_piece(descriptor: int, size: int, position: int) -> Call[bytes]:
    """One read."""
    return Call(
        ("VIRGO_READ", whole(descriptor, "the descriptor"), whole(size, "the size"), whole(position, _AT)),
        bytes,
    )


def write_piece(descriptor: int, data: bytes, position: int) -> Call[int]:
    """One write; the count."""
    return Call(("VIRGO_WRITE", whole(descriptor, "the descriptor"), data, whole(position, _AT)), int)


def sync_file(descriptor: int) -> Call[None]:
    """Make it durable on its node."""
    return Call(("FILES.SYNC", whole(descriptor, "the descriptor")), as_nothing)


def truncate_file(descriptor: int, size: int) -> Call[None]:
    """Set its size."""
    return Call(("FILES.TRUNCATE", whole(descriptor, "the descriptor"), whole(size, "the size")), as_nothing)


def descriptor_status(descriptor: int) -> Call[FileStatus]:
    """Status of an open file."""
    return Call(("FILES.FSTAT", descriptor), _status)


def status(path: AnyPath) -> Call[FileStatus]:
    """Status of a path."""
    return Call(("FILES.STAT", plain(path)), _status)


def listing(path: AnyPath) -> Call[list[FileStatus]]:
    """Entries of a directory."""
    return Call(("FILES.LIST", plain(path)), _statuses)


def change(operation: str, *paths: AnyPath) -> Call[None]:
    """REMOVE, MKDIR or RENAME."""
    return Call((f"FILES.{operation}", *map(plain, paths)), as_nothing)


def digest(descriptor: int, algorithm: str) -> Call[str]:
    """A checksum of an open file, in hexadecimal digits."""
    return Call(("FILES.DIGEST", descriptor, algorithm), as_text, math.inf)


def stats() -> Call[dict[str, Any]]:
    """Figures of the connected node's files."""
    return Call(("FILES.STATS",), msgspec.json.decode)


def _status(reply: bytes) -> FileStatus:
    return _entry(msgspec.json.decode(reply))


def _statuses(reply: bytes) -> list[FileStatus]:
    return [_entry(item) for item in msgspec.json.decode(reply)]


def _entry(item: dict[str, Any]) -> FileStatus:
    return msgspec.convert({**item, "name": core.entry_name(item)}, FileStatus)


# --- plans ----------------------------------------------------------------------------------


def reading(descriptor: int, size: int, position: int) -> Plan[bytes]:
    """At most `size` bytes from `position`, in pieces; fewer only at the end of the file."""
    if whole(size, "the size") <= FILE_CHUNK_BYTES:
        (reply,) = yield [read_piece(descriptor, size, position)]
        data: bytes = _value(reply)
        return data
    found = bytearray()
    while len(found) < size:
        asked: list[Call[bytes]] = []
        start, end = position + len(found), position + size
        while start < end and len(asked) < FILE_CHUNKS_AHEAD:
            asked.append(read_piece(descriptor, min(FILE_CHUNK_BYTES, end - start), start))
            start += FILE_CHUNK_BYTES
        pieces = yield asked
        for call, piece in zip(asked, pieces, strict=True):
            found += _value(piece)
            if len(piece) < int(call.request[2]):
                return bytes(found)
    return bytes(found)


def reading_all(descriptor: int, position: int) -> Plan[bytes]:
    """From `position` to the end: one small request first, for most files are small."""
    (reply,) = yield [read_piece(descriptor, FILE_BUFFER_BYTES, position)]
    first: bytes = _value(reply)
    if len(first) < FILE_BUFFER_BYTES:
        return first
    found = [first]
    position += len(first)
    window = FILE_CHUNK_BYTES * FILE_CHUNKS_AHEAD
    while True:
        found.append((yield from reading(descriptor, window, position)))
        position += len(found[-1])
        if len(found[-1]) < window:
            return b"".join(found)


def writing(descriptor: int, data: Content, position: int) -> Plan[int]:
    """Write in pieces; the count of bytes from the start that are on their way to disk.

    One piece at a time, so that nothing follows a piece that was cut short. Raises what stopped it if
    that was the first piece.
    """
    view, position = _view(data), whole(position, _AT)
    written = 0
    while True:
        piece = bytes(view[written : written + FILE_CHUNK_BYTES])
        (reply,) = yield [write_piece(descriptor, piece, position + written)]
        if written and isinstance(reply, Exception):
            return written
        count: int = _value(reply)
        written += count
        if count < len(piece) or written >= len(view):
            return written


def loading(path: AnyPath) -> Plan[bytes]:
    """The content of a file."""
    descriptor = yield from single(open_file(path, "r"))
    return (yield from closing(descriptor, reading_all(descriptor, 0)))


def saving(path: AnyPath, data: Content, *, mode: str, durable: bool) -> Plan[int]:
    """Make `data` the content of a file; all of it, or the error that stopped it."""
    descriptor = yield from single(open_file(path, mode))
    return (yield from closing(descriptor, _filling(descriptor, data, durable)))


def _filling(descriptor: int, data: Content, durable: bool) -> Plan[int]:
    count = yield from writing_whole(descriptor, data, 0)
    if durable:
        yield from single(sync_file(descriptor))
    return count


def closing(descriptor: int, work: Plan[T]) -> Plan[T]:
    """Run a plan and close the descriptor, whatever comes; what stopped the plan is what is raised."""
    try:
        result = yield from work
    except GeneratorExit:  # nobody drives it any more
        raise
    except BaseException:
        yield [Call(("VIRGO_CLOSE", descriptor), as_nothing, NODE_LOST_S)]
        raise
    yield from single(close_file(descriptor))
    return result


def writing_whole(descriptor: int, data: Content, position: int) -> Plan[int]:
    """Write all of it, or raise what stopped it."""
    view = _view(data)
    written = 0
    while written < len(view):
        count = yield from writing(descriptor, view[written:], position + written)
        if count == 0:
            raise DiskFull(f"write {descriptor}: {written} of {len(view)} bytes were written")
        written += count
    return written


def _view(data: object) -> memoryview:
    """The bytes of anything that has some. Raises WrongType."""
    try:
        return memoryview(data).cast("B")  # type: ignore[arg-type]
    except TypeError:
        raise WrongType(
            f"the data must be bytes, not {type(data).__name__}", hint="Encode text: 'a'.encode()."
        ) from None


def single(call: Call[T]) -> Plan[T]:
    """One request, as a plan."""
    (reply,) = yield [call]
    value: T = _value(reply)
    return value


def _value(result: Any) -> Any:
    if isinstance(result, Exception):
        raise result
    return result


def drive(runner: Runner, plan: Plan[T]) -> T:
    """Run a plan to its end. What interrupts a request is raised in the plan, which may close files."""
    try:
        calls = next(plan)
        while True:
            try:
                results = runner.run_many(calls) if len(calls) > 1 else [runner.run(calls[0])]
            except VirgoError as error:
                results = [error] * len(calls)
            except BaseException as error:  # noqa: BLE001 - the plan raises it again
                calls = plan.throw(error)
                continue
            calls = plan.send(results)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


async def drive_async(runner: AsyncRunner, plan: Plan[T]) -> T:
    """Run a plan to its end. A cancellation is raised in the plan, which may close files first."""
    try:
        calls = next(plan)
        while True:
            try:
                many = len(calls) > 1
                results = await runner.run_many(calls) if many else [await runner.run(calls[0])]
            except VirgoError as error:
                results = [error] * len(calls)
            except GeneratorExit:  # the event loop is gone, nothing can be sent
                raise
            except BaseException as error:  # noqa: BLE001 - the plan raises it again
                calls = plan.throw(error)
                continue
            calls = plan.send(results)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
