"""What only asyncio file objects promise: cancellation, turns of several tasks, the event loop kept free.

That they read, write and seek as Python's own do is shown in test_files_stream.py, for both faces.
"""

from __future__ import annotations

import asyncio
import gc
import io
import re
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from files.loopback import AsyncioRunner, Cloud
from virgo.errors import BadDescriptor, FileMissing, VirgoError
from virgo.files.aclient import AsyncFilesClient
from virgo.limits import FILE_BUFFER_BYTES, FILE_CHUNK_BYTES, FILE_CHUNKS_AHEAD

_WAIT_S = 60


class Gate:
    """Holds calls of one command until `open` is set, and tells that one has come."""

    def __init__(self, command: str) -> None:
        self.command = command
        self.come, self.open = asyncio.Event(), asyncio.Event()

    async def __call__(self, call: Any) -> None:
        if call.request[0] == self.command:
            self.come.set()
            await self.open.wait()


def on_files(directory: Path, work: Callable[[AsyncFilesClient, AsyncioRunner], Awaitable[None]]) -> None:
    """Run work on an asyncio client of the first of three nodes; at the end nothing is open."""

    async def main() -> None:
        async with Cloud(directory) as nodes, asyncio.timeout(_WAIT_S):
            runner = AsyncioRunner(nodes[0])
            files = AsyncFilesClient(runner)
            await work(files, runner)
            assert [node.module.stats()["open"] for node in nodes] == [0, 0, 0]

    asyncio.run(main())


async def cancel_at(gate: Gate, runner: AsyncioRunner, work: Awaitable[Any]) -> None:
    """Begin the work, and cancel it while the node has its request."""
    runner.before = gate
    task = asyncio.ensure_future(work)
    come = asyncio.ensure_future(gate.come.wait())
    await asyncio.wait({task, come}, return_when=asyncio.FIRST_COMPLETED)
    assert come.done() and task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    runner.before = None


def test_a_cancelled_read_takes_nothing(tmp_path: Path) -> None:
    """What comes after a cancelled read begins where that one would have begun, in bytes and in text."""

    async def work(files: AsyncFilesClient, runner: AsyncioRunner) -> None:
        await files.write_bytes("/n2/lines", b"".join(bytes([kind]) * 20_000 + b"\n" for kind in b"abc"))
        for mode, buffering in (("rb", 2), ("rb", 0), ("r", 2)):
            async with await files.open("/n2/lines", mode, buffering=buffering) as file:
                first = await file.readline()
                for cancelled in (file.read(), file.readline(), file.read(19_000)):
                    place = await file.tell()
                    await cancel_at(Gate("VIRGO_READ"), runner, cancelled)
                    assert await file.tell() == place
                assert first + await file.read() == await read(files, mode)

    async def read(files: AsyncFilesClient, mode: str) -> Any:
        return await (files.read_bytes("/n2/lines") if mode == "rb" else files.read_text("/n2/lines"))

    on_files(tmp_path, work)


def test_what_a_cancelled_flush_had_is_flushed_later(tmp_path: Path) -> None:
    """A flush or write that is cancelled midway loses and doubles nothing: the next one does it again."""

    async def work(files: AsyncFilesClient, runner: AsyncioRunner) -> None:
        async with await files.open("/n2/file", "wb", buffering=8) as file:
            assert await file.write(b"12345") == 5
            await cancel_at(Gate("VIRGO_WRITE"), runner, file.flush())
            await cancel_at(Gate("VIRGO_WRITE"), runner, file.write(b"67890"))
            assert await file.tell() == 5
            await file.write(b"67890")
        assert await files.read_bytes("/n2/file") == b"1234567890"

    on_files(tmp_path, work)


def test_a_cancelled_operation_on_a_whole_file_leaves_nothing_open(tmp_path: Path) -> None:
    """read_bytes, write_bytes, put and get close their descriptor also when they are cancelled."""
    (tmp_path / "local").write_bytes(b"local")

    async def work(files: AsyncFilesClient, runner: AsyncioRunner) -> None:
        await files.write_bytes("/n2/file", b"x" * 100)
        for command, operation in (
            ("VIRGO_READ", files.read_bytes("/n2/file")),
            ("VIRGO_WRITE", files.write_bytes("/n2/file", b"y")),
            ("FILES.SYNC", files.write_bytes("/n2/file", b"y", durable=True)),
            ("VIRGO_READ", files.get("/n2/file", tmp_path / "got")),
            ("FILES.SYNC", files.put(tmp_path / "local", "/n2/file", durable=True)),
        ):
            await cancel_at(Gate(command), runner, operation)

    on_files(tmp_path / "cloud", work)


def test_tasks_take_turns(tmp_path: Path) -> None:
    """Tasks that share a file object write and read whole lines, each one once."""

    async def work(files: AsyncFilesClient, _runner: AsyncioRunner) -> None:
        for mode in ("", "b"):
            lines = [f"{task} {step}\n" for task in range(20) for step in range(20)]
            given = [line.encode() if mode else line for line in lines]
            async with await files.open("/n2/log", f"w{mode}", buffering=64) as log:
                await asyncio.gather(*[log.writelines(given[at : at + 20]) for at in range(0, 400, 20)])
            async with await files.open("/n2/log", f"r{mode}", buffering=64) as log:
                taken = await asyncio.gather(*[log.readline() for _ in range(401)])
            assert sorted(taken) == sorted([*given, given[0][:0]])

    on_files(tmp_path, work)


def test_iteration_and_lines_over_many_buffers(tmp_path: Path) -> None:
    """Lines longer and shorter than a buffer come whole, by iteration, readlines with a hint, and read1."""

    async def work(files: AsyncFilesClient, _runner: AsyncioRunner) -> None:
        lines = [b"%d " % number * (number * 37 % 3000) + b"\n" for number in range(300)]
        lines += [b"long" * (FILE_BUFFER_BYTES // 2), b"\n", b"no end"]
        content = b"".join(lines)
        wanted = content.splitlines(keepends=True)
        await files.write_bytes("/n3/lines", content)
        for buffering in (0, 100, -1):
            async with await files.open("/n3/lines", "rb", buffering=buffering) as file:
                assert [line async for line in file] == wanted
                await file.seek(0)
                some = await file.readlines(1000)
                assert some == wanted[: len(some)] and sum(map(len, some[:-1])) < 1000 <= sum(map(len, some))
                pieces = [piece async for piece in aiter_until_empty(file.read1)]
                assert b"".join(some + pieces) == content
        async with await files.open("/n3/lines") as text:
            assert [line.encode() async for line in text] == wanted

    async def aiter_until_empty(read: Callable[[], Awaitable[bytes]]) -> Any:
        while piece := await read():
            yield piece

    on_files(tmp_path, work)


_LINE_ENDS = {None: r"\n", "": r"\r\n|\r|\n", "\n": r"\n", "\r": r"\r", "\r\n": r"\r\n"}


@pytest.mark.parametrize("newline", _LINE_ENDS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "shift_jis", "iso2022_jp"])
def test_every_place_in_a_text_can_be_returned_to(tmp_path: Path, encoding: str, newline: str | None) -> None:
    """From what tell gave, seek leads to the same characters and lines, at the edge of a piece too."""
    tail = "a\r\n\u3042\u3042\rb\nc\r"

    async def work(files: AsyncFilesClient, _runner: AsyncioRunner) -> None:
        for before in range(8):  # so that each character of the tail lies over the edge once
            content = ("x" * 20_000).encode(encoding)[: io.DEFAULT_BUFFER_SIZE - before * 2]
            whole = content.decode(encoding) + tail
            await files.write_bytes("/n1/text", whole.encode(encoding))
            wanted = re.sub("\r\n?", "\n", whole) if newline is None else whole
            lines = re.compile(f".*?({_LINE_ENDS[newline]}|$)", re.DOTALL)
            async with await files.open("/n1/text", encoding=encoding, newline=newline) as file:
                start = len(whole) - len(tail) - 1
                assert await file.read(start) == wanted[:start]
                places = []
                for index in range(start, len(wanted) + 1):
                    places.append((index, await file.tell()))
                    assert await file.read(1) == wanted[index : index + 1]
                for index, place in reversed(places):
                    for size in (1, 2, 100):
                        assert await file.seek(place) == place
                        assert await file.read(size) == wanted[index : index + size]
                    await file.seek(place)
                    position = index
                    while line := await file.readline():
                        assert line == lines.match(wanted, position)[0]  # type: ignore[index]
                        position += len(line)
                    assert position == len(wanted)

    on_files(tmp_path, work)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_a_byte_order_mark_is_at_the_start_only(tmp_path: Path, encoding: str) -> None:
    """Appending, and writing after a seek, adds no second mark; writing from the start writes it anew."""

    async def work(files: AsyncFilesClient, _runner: AsyncioRunner) -> None:
        for mode, text in (("w", "one"), ("a", "two"), ("a", "three")):
            async with await files.open("/n1/text", mode, encoding=encoding) as file:
                await file.write(text)
        assert await files.read_bytes("/n1/text") == "onetwothree".encode(encoding)
        async with await files.open("/n1/text", "r+", encoding=encoding) as file:
            await file.seek(0, 2)
            await file.write("four")
            await file.seek(0)
            await file.write("ONE")
        assert await files.read_bytes("/n1/text") == "ONEtwothreefour".encode(encoding)

    on_files(tmp_path, work)


def test_local_files_are_moved_in_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """put and get bring files of every size over, and read and write local ones off the event loop."""
    sizes = [0, 1, FILE_CHUNK_BYTES, FILE_CHUNK_BYTES * FILE_CHUNKS_AHEAD + 3]
    threads: set[int] = set()
    opened = Path.open

    def note(self: Path, *arguments: Any, **options: Any) -> Any:
        if self.name in ("from", "to"):
            threads.add(threading.get_ident())
        return opened(self, *arguments, **options)

    async def work(files: AsyncFilesClient, _runner: AsyncioRunner) -> None:
        for size in sizes:
            (tmp_path / "given").write_bytes(bytes(range(256)) * (size // 256) + b"x" * (size % 256))
            (tmp_path / "given").rename(tmp_path / "from")
            assert await files.put(tmp_path / "from", "/n2/big", durable=True) == size
            assert await files.get("/n2/big", tmp_path / "to") == size
            given, got = [await asyncio.to_thread((tmp_path / name).read_bytes) for name in ("from", "to")]
            assert given == got == await files.read_bytes("/n2/big")

    monkeypatch.setattr(Path, "open", note)
    on_files(tmp_path / "cloud", work)
    assert threads and threading.get_ident() not in threads


def test_what_cannot_be_moved_changes_nothing(tmp_path: Path) -> None:
    """put of an absent file leaves the target as it was; get of an absent one makes no local file."""

    async def work(files: AsyncFilesClient, _runner: AsyncioRunner) -> None:
        await files.write_text("/n2/file", "kept")
        with pytest.raises(FileNotFoundError):
            await files.put(tmp_path / "absent", "/n2/file")
        assert await files.read_text("/n2/file") == "kept"
        with pytest.raises(FileMissing):
            await files.get("/n2/absent", tmp_path / "local")
        assert not (tmp_path / "local").exists()

    on_files(tmp_path / "cloud", work)


def test_closing_says_what_went_wrong_once(tmp_path: Path) -> None:
    """An error of the last flush or of closing reaches the program, and the object is closed all the same."""

    async def work(files: AsyncFilesClient, _runner: AsyncioRunner) -> None:
        file: Any = await files.open("/n1/file", "w")
        await file.write("lost")
        await files.close(file.buffer.descriptor)
        with pytest.raises(BadDescriptor):
            await file.close()
        assert file.closed
        await file.close()
        for use in (file.read, file.tell, file.flush, file.sync, file.readline):
            with pytest.raises(ValueError, match="closed"):
                await use()
        with pytest.raises(ValueError, match="closed"):
            await file.write("more")

    on_files(tmp_path, work)


def test_a_file_left_open_is_told(tmp_path: Path) -> None:
    """An object that is dropped while open warns, since nothing can close it any more."""

    async def work(files: AsyncFilesClient, _runner: AsyncioRunner) -> None:
        file: Any = await files.open("/n1/file", "wb")
        descriptor = file.descriptor
        with pytest.warns(ResourceWarning, match="unclosed <AsyncBinaryFile '/n1/file'"):
            del file
            gc.collect()
        await files.close(descriptor)

    on_files(tmp_path, work)


def test_bad_arguments_open_nothing(tmp_path: Path) -> None:
    """Errors of arguments are those of Python's open, and leave nothing open."""

    async def work(files: AsyncFilesClient, _runner: AsyncioRunner) -> None:
        await files.write_bytes("/n1/file", b"")
        for options in (
            {"newline": "x"},
            {"mode": "rb", "errors": "strict"},
            {"buffering": 0},
            {"mode": "rw"},
        ):
            with pytest.raises(ValueError):
                await files.open("/n1/file", **options)
        with pytest.raises(LookupError):
            await files.open("/n1/file", encoding="no-such-encoding")
        with pytest.raises(LookupError):
            await files.open("/n1/file", encoding="hex")  # a codec, but none of text
        async with await files.open("/n1/file", "w") as text:
            with pytest.raises(TypeError):
                await text.write(b"bytes")
        async with await files.open("/n1/file", "wb") as binary:
            with pytest.raises(TypeError):
                await binary.write("text")
        with pytest.raises(VirgoError):
            await files.open("/n1/none/file")

    on_files(tmp_path, work)
