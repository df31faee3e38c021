"""Files as users hold them: `cloud.files`. `virgo.files.aclient` has the same for asyncio.

    with cloud.files.open("/n2/notes.txt", "w") as file:
        print("hello", file=file)
    cloud.files.ls("/n2")

Paths are `/NODE/...` for a node's own files and anything else for the pool. Errors are VIRGO's, and at
the same time Python's: a missing file is a `FileNotFoundError`, a path that leads out a `PermissionError`.
"""

from __future__ import annotations

import shutil
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from virgo.errors import FileMissing, FileThere
from virgo.files import calls
from virgo.files.calls import AnyPath, Content, FileStatus, drive
from virgo.files.stream import RemoteFile, open_stream
from virgo.limits import FILE_CHUNK_BYTES
from virgo.wire.call import Runner

if TYPE_CHECKING:
    from virgo.files.fs import VirgoFileSystem


class FilesClient:
    """The cloud's files, through one node. Safe for several threads; file objects are for one each."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def __repr__(self) -> str:
        return f"<FilesClient {self._runner!r}>"

    @cached_property
    def fs(self) -> VirgoFileSystem:
        """The same files by fsspec: `glob`, `walk`, `cp`, `rm`, parts of files, transactions."""
        from virgo.files.fs import VirgoFileSystem

        return VirgoFileSystem(self._runner, skip_instance_cache=True)

    # --- file objects -------------------------------------------------------------------------

    def open(
        self,
        path: AnyPath,
        mode: str = "r",
        *,
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> IO[Any]:
        """A file object as Python's `open` returns it; text is UTF-8 unless `encoding` says otherwise.

        A created file gets the directories above it. `sync(file)` makes it durable.

        Raises:
            FileMissing, FileThere, FileRefused, PathEscape, NodeLost, BadArgument: as the node says.
            ValueError: arguments that do not go together, as in Python's `open`.
        """
        return open_stream(
            self._runner,
            path,
            mode,
            buffering=buffering,
            encoding=encoding,
            errors=errors,
            newline=newline,
        )

    def sync(self, file: IO[Any] | int) -> None:
        """Flush a file object (or take a descriptor) and wait until it is on the disk of its node."""
        if isinstance(file, int):
            self._runner.run(calls.sync_file(file))
            return
        file.flush()
        raw: Any = file
        while not isinstance(raw, RemoteFile):
            raw = getattr(raw, "buffer", None) or raw.raw
        raw.sync()

    # --- names --------------------------------------------------------------------------------

    def ls(self, path: AnyPath = "/") -> list[FileStatus]:
        """The entries of a directory; of `/` the nodes and the pool. Raises FileMissing, FileRefused."""
        return self._runner.run(calls.listing(path))

    def stat(self, path: AnyPath) -> FileStatus:
        """Kind, size and times; links are shown, not followed. Raises FileMissing."""
        return self._runner.run(calls.status(path))

    def exists(self, path: AnyPath) -> bool:
        """Whether the path names anything."""
        try:
            self.stat(path)
        except FileMissing:
            return False
        return True

    def remove(self, path: AnyPath) -> None:
        """Remove a file or an empty directory. Raises FileMissing, FileRefused."""
        self._runner.run(calls.change("REMOVE", path))

    def mkdir(self, path: AnyPath, *, exist_ok: bool = False) -> None:
        """Make a directory and those above it. Raises FileThere unless `exist_ok`."""
        try:
            self._runner.run(calls.change("MKDIR", path))
        except FileThere:
            if not exist_ok or not self.stat(path).is_directory:
                raise

    def rename(self, path: AnyPath, new_path: str) -> None:
        """Rename within a node or within the pool, replacing a file of the new name in one step."""
        self._runner.run(calls.change("RENAME", path, new_path))

    # --- whole files --------------------------------------------------------------------------

    def read_bytes(self, path: AnyPath) -> bytes:
        """The content of a file."""
        return drive(self._runner, calls.loading(path))

    def read_text(self, path: AnyPath, encoding: str = "utf-8") -> str:
        """The content of a text file."""
        return self.read_bytes(path).decode(encoding)

    def write_bytes(self, path: AnyPath, data: Content, *, durable: bool = False) -> int:
        """Make `data` the file's content, all of it or an error; `durable`: on the disk on return."""
        return drive(self._runner, calls.saving(path, data, mode="w", durable=durable))

    def write_text(self, path: AnyPath, text: str, encoding: str = "utf-8", *, durable: bool = False) -> int:
        """Make `text` the file's content; returns the count of bytes."""
        return self.write_bytes(path, text.encode(encoding), durable=durable)

    def put(self, local: str | PathLike[str], path: AnyPath, *, durable: bool = False) -> int:
        """Copy a file of this machine into the cloud; returns the count of bytes."""
        with Path(local).open("rb", buffering=0) as source, self.open(path, "wb", buffering=0) as target:
            count = 0
            while piece := source.read(FILE_CHUNK_BYTES):
                plan = calls.writing_whole(_raw(target).descriptor, piece, count)
                count += drive(self._runner, plan)
            if durable:
                self.sync(target)
        return count

    def get(self, path: AnyPath, local: str | PathLike[str]) -> int:
        """Copy a file of the cloud to this machine; returns the count of bytes."""
        with self.open(path, "rb") as source, Path(local).open("wb") as target:
            shutil.copyfileobj(source, target, FILE_CHUNK_BYTES)
            return target.tell()

    # --- the calls ----------------------------------------------------------------------------

    def open_descriptor(self, path: AnyPath, mode: str | None = None) -> int:
        """`virgo_open`: without a mode read-write, created when absent, not truncated."""
        return self._runner.run(calls.open_file(path, mode))

    def read(self, descriptor: int, size: int, position: int) -> bytes:
        """`virgo_read`: fewer bytes than asked only at the end of the file."""
        return drive(self._runner, calls.reading(descriptor, size, position))

    def write(self, descriptor: int, data: Content, position: int) -> int:
        """`virgo_write`: the count written, less than given only if the disk filled in the middle."""
        return drive(self._runner, calls.writing(descriptor, data, position))

    def close(self, descriptor: int) -> None:
        """`virgo_close`."""
        self._runner.run(calls.close_file(descriptor))

    def truncate(self, descriptor: int, size: int) -> None:
        """Set the size of an open file."""
        self._runner.run(calls.truncate_file(descriptor, size))

    def stats(self) -> dict[str, Any]:
        """Figures of the connected node's files."""
        return self._runner.run(calls.stats())


def _raw(file: Any) -> RemoteFile:
    assert isinstance(file, RemoteFile)
    return file
