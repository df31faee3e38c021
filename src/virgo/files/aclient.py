"""Files for asyncio: the same surface as `virgo.files.client`, with `await`.

async with await cloud.files.open("/n2/notes.txt", "w") as file:
    await file.write("hello")
await cloud.files.ls("/n2")
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from virgo.errors import FileMissing, FileThere
from virgo.files import calls
from virgo.files.astream import AsyncBinaryFile, AsyncFile
from virgo.files.atext import open_text, text_format
from virgo.files.calls import AnyPath, Content, FileStatus, drive_async
from virgo.files.cursor import Cursor
from virgo.files.stream import check_arguments
from virgo.limits import FILE_BUFFER_BYTES, FILE_CHUNK_BYTES, FILE_CHUNKS_AHEAD
from virgo.wire.call import AsyncRunner

T = TypeVar("T")


class AsyncFilesClient:
    """The cloud's files, through one node, for one event loop; see `FilesClient`."""

    def __init__(self, runner: AsyncRunner) -> None:
        self._runner = runner

    def __repr__(self) -> str:
        return f"<AsyncFilesClient {self._runner!r}>"

    # --- file objects -------------------------------------------------------------------------

    async def open(
        self,
        path: AnyPath,
        mode: str = "r",
        *,
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> AsyncFile[Any]:
        """A file object with the methods of Python's own and `await`; see `FilesClient.open`."""
        can = check_arguments(mode, buffering, encoding, errors, newline)
        layout = None if "b" in mode else text_format(encoding, errors, newline)
        descriptor = await self._runner.run(calls.open_file(path, mode))
        cursor = Cursor(descriptor, name=calls.plain(path), mode=can)
        size = buffering if buffering == 0 or buffering > 1 else FILE_BUFFER_BYTES
        buffer = AsyncBinaryFile(self._runner, cursor, size)
        if layout is None:
            return buffer
        try:
            return await open_text(buffer, layout, mode=mode, line_buffering=buffering == 1)
        except BaseException:
            await buffer.close()
            raise

    async def sync(self, file: AsyncFile[Any] | int) -> None:
        """Flush a file object (or take a descriptor) and wait until it is on the disk of its node."""
        if isinstance(file, int):
            await self._runner.run(calls.sync_file(file))
        else:
            await file.sync()

    # --- names --------------------------------------------------------------------------------

    async def ls(self, path: AnyPath = "/") -> list[FileStatus]:
        """See `FilesClient.ls`."""
        return await self._runner.run(calls.listing(path))

    async def stat(self, path: AnyPath) -> FileStatus:
        """See `FilesClient.stat`."""
        return await self._runner.run(calls.status(path))

    async def exists(self, path: AnyPath) -> bool:
        """Whether the path names anything."""
        try:
            await self.stat(path)
        except FileMissing:
            return False
        return True

    async def remove(self, path: AnyPath) -> None:
        """See `FilesClient.remove`."""
        await self._runner.run(calls.change("REMOVE", path))

    async def mkdir(self, path: AnyPath, *, exist_ok: bool = False) -> None:
        """See `FilesClient.mkdir`."""
        try:
            await self._runner.run(calls.change("MKDIR", path))
        except FileThere:
            if not exist_ok or not (await self.stat(path)).is_directory:
                raise

    async def rename(self, path: AnyPath, new_path: str) -> None:
        """See `FilesClient.rename`."""
        await self._runner.run(calls.change("RENAME", path, new_path))

    # --- whole files --------------------------------------------------------------------------

    async def read_bytes(self, path: AnyPath) -> bytes:
        """See `FilesClient.read_bytes`."""
        return await drive_async(self._runner, calls.loading(path))

    async def read_text(self, path: AnyPath, encoding: str = "utf-8") -> str:
        """See `FilesClient.read_text`."""
        return (await self.read_bytes(path)).decode(encoding)

    async def write_bytes(self, path: AnyPath, data: Content, *, durable: bool = False) -> int:
        """See `FilesClient.write_bytes`."""
        return await drive_async(self._runner, calls.saving(path, data, mode="w", durable=durable))

    async def write_text(
        self, path: AnyPath, text: str, encoding: str = "utf-8", *, durable: bool = False
    ) -> int:
        """See `FilesClient.write_text`."""
        return await self.write_bytes(path, text.encode(encoding), durable=durable)

    async def put(self, local: str | PathLike[str], path: AnyPath, *, durable: bool = False) -> int:
        """See `FilesClient.put`; the local file is read in a thread."""
        pieces = _pieces(local)
        count = 0
        try:
            piece = await _in_thread(next, pieces, b"")  # before the target is emptied: it may fail
            async with await self.open(path, "wb") as target:
                while piece:
                    count += await target.write(piece)
                    piece = await _in_thread(next, pieces, b"")
                if durable:
                    await target.sync()
        finally:
            pieces.close()
        return count

    async def get(self, path: AnyPath, local: str | PathLike[str]) -> int:
        """See `FilesClient.get`; the local file is written in a thread."""
        sink = _sink(local)
        count = 0
        try:
            async with await self.open(path, "rb", buffering=0) as source:
                await _in_thread(next, sink)
                while piece := await source.read(FILE_CHUNK_BYTES * FILE_CHUNKS_AHEAD):
                    await _in_thread(sink.send, piece)
                    count += len(piece)
        finally:
            sink.close()
        return count

    # --- the calls ----------------------------------------------------------------------------

    async def open_descriptor(self, path: AnyPath, mode: str | None = None) -> int:
        """See `FilesClient.open_descriptor`."""
        return await self._runner.run(calls.open_file(path, mode))

    async def read(self, descriptor: int, size: int, position: int) -> bytes:
        """See `FilesClient.read`."""
        return await drive_async(self._runner, calls.reading(descriptor, size, position))

    async def write(self, descriptor: int, data: Content, position: int) -> int:
        """See `FilesClient.write`."""
        return await drive_async(self._runner, calls.writing(descriptor, data, position))

    async def close(self, descriptor: int) -> None:
        """See `FilesClient.close`."""
        await self._runner.run(calls.close_file(descriptor))

    async def truncate(self, descriptor: int, size: int) -> None:
        """Set the size of an open file."""
        await self._runner.run(calls.truncate_file(descriptor, size))

    async def stats(self) -> dict[str, Any]:
        """Figures of the connected node's files."""
        return await self._runner.run(calls.stats())


def _pieces(local: str | PathLike[str]) -> Generator[bytes, None, None]:
    """The content of a file of this machine, opened when the first piece is asked for."""
    with Path(local).open("rb", buffering=0) as source:
        while piece := source.read(FILE_CHUNK_BYTES):
            yield piece


def _sink(local: str | PathLike[str]) -> Generator[None, bytes, None]:
    """Takes the content of a file of this machine, after one `next`, which creates it."""
    with Path(local).open("wb") as target:
        while True:
            target.write((yield))
            target.flush()


async def _in_thread(work: Callable[..., T], *arguments: Any) -> T:
    """Work on a local file off the event loop, to its end: what is closed next must not be in use."""
    running = asyncio.get_running_loop().run_in_executor(None, work, *arguments)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise
