"""The cloud's files as fsspec knows file systems: `virgo://NODE/path`, for pandas, pyarrow, zarr and Dask.

    import fsspec
    with fsspec.open("virgo://n2/table.csv", "w") as file: ...
    cloud.files.fs.glob("/n2/*.csv")

Paths are those of `FilesClient`: `virgo://n2/x` and `/n2/x` are the same, and so are `virgo://pool/x` and
`/pool/x`. File objects are Python's own buffered ones, not fsspec's, so they append, seek and write
anywhere.

Promises: what `pipe`, `put` and a transaction write is seen whole or not at all (a transaction) or raises; a
missing file is FileNotFoundError, as everywhere. Nothing is kept of listings, so nothing is stale.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import io
import os
import stat
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, ClassVar

from fsspec.callbacks import DEFAULT_CALLBACK, Callback
from fsspec.spec import AbstractFileSystem
from fsspec.utils import stringify_path

from virgo.errors import FileMissing, FileRefused
from virgo.files import calls
from virgo.files.calls import FileStatus, drive
from virgo.files.stream import open_stream
from virgo.limits import FILE_CHUNK_BYTES, FILE_RANGES_AT_ONCE
from virgo.wire import near
from virgo.wire.call import Runner

_TYPES = {"file": "file", "directory": "directory", "link": "link"}


class VirgoFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """See the module.

    Args:
        runner: the connection; by default that of `virgo.connect()` in this process, made when it is needed.
        options: as fsspec has them.
    """

    protocol: ClassVar[str] = "virgo"
    root_marker = "/"

    def __init__(self, runner: Runner | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._given = runner

    def __repr__(self) -> str:
        return f"<VirgoFileSystem {self._given or 'by the connection of the process'}>"

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process: by the connection there."""
        return VirgoFileSystem, ()

    @property
    def _runner(self) -> Runner:
        return self._given or near.connection()

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(item) for item in path]
        plain = stringify_path(path).removeprefix("virgo://").removeprefix("virgo:")
        return "/" + plain.strip("/")

    def unstrip_protocol(self, name: str) -> str:
        """The URL of a path."""
        return f"virgo:/{self._strip_protocol(name)}"

    # --- what is there ------------------------------------------------------------------------

    def info(self, path: str, **_options: Any) -> dict[str, Any]:
        """What a path names: name, size, type, mtime (seconds since 1970), mode, nlink, node."""
        path = self._strip_protocol(path)
        return _described(path, self._runner.run(calls.status(path)))

    def ls(self, path: str, detail: bool = True, **_options: Any) -> list[Any]:
        """Entries of a directory, or the file itself, as `info` describes them or as paths."""
        path = self._strip_protocol(path)
        try:
            entries = self._runner.run(calls.listing(path))
            found = [_described(f"{path.rstrip('/')}/{entry.name}", entry) for entry in entries]
        except FileRefused as error:
            if error.errno != errno.ENOTDIR:
                raise
            found = [self.info(path)]
        return found if detail else [entry["name"] for entry in found]

    def created(self, path: str) -> datetime.datetime:
        """When it was last changed; a node does not say when it was made."""
        return self.modified(path)

    def modified(self, path: str) -> datetime.datetime:
        """When its content was last changed."""
        return datetime.datetime.fromtimestamp(self.info(path)["mtime"], tz=datetime.UTC)

    def digest(self, path: str, algorithm: str = "sha256") -> str:
        """A checksum of the content, in hexadecimal digits, computed where the file is.

        Raises:
            BadArgument: the algorithm is none of Python's `hashlib`.
        """
        descriptor = self._runner.run(calls.open_file(self._strip_protocol(path), "r"))
        work = calls.single(calls.digest(descriptor, algorithm))
        return drive(self._runner, calls.closing(descriptor, work))

    # --- names --------------------------------------------------------------------------------

    def mkdir(self, path: str, create_parents: bool = True, **_options: Any) -> None:
        """Make a directory. Raises FileExistsError; FileNotFoundError without the one above it."""
        path = self._strip_protocol(path)
        if not create_parents and self._parent(path) != path:
            self.info(self._parent(path))
        self._runner.run(calls.change("MKDIR", path))

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a directory and those above it."""
        try:
            self.mkdir(path)
        except OSError:
            if not exist_ok or not self.isdir(path):
                raise

    def rmdir(self, path: str) -> None:
        """Remove an empty directory."""
        self._runner.run(calls.change("REMOVE", self._strip_protocol(path)))

    def _rm(self, path: str) -> None:
        self.rmdir(path)

    def mv(
        self, path1: str, path2: str, recursive: bool = False, maxdepth: int | None = None, **options: Any
    ) -> None:
        """Move; within a node, or the pool, by a rename, which takes no time."""
        old, new = self._strip_protocol(path1), self._strip_protocol(path2)
        if isinstance(old, str) and isinstance(new, str) and not set("*?[") & set(old):
            if stringify_path(path2).endswith("/") or self.isdir(new):
                new = f"{new.rstrip('/')}/{old.rpartition('/')[2]}"
            try:
                self._runner.run(calls.change("RENAME", old, new))
            except FileRefused as error:
                if error.errno not in (errno.EXDEV, errno.EISDIR):
                    raise
            else:
                return
        super().mv(path1, path2, recursive=recursive, maxdepth=maxdepth, **options)

    def cp_file(self, path1: str, path2: str, **_options: Any) -> None:
        """Copy a file, or make a directory of the name."""
        if self.isdir(path1):
            self.makedirs(path2, exist_ok=True)
            return
        with self._open(path1, "rb") as source, self._open(path2, "wb") as target:
            while piece := source.read(FILE_CHUNK_BYTES):
                target.write(piece)

    # --- content ------------------------------------------------------------------------------

    def _open(
        self,
        path: str,
        mode: str = "rb",
        block_size: int | None = None,
        autocommit: bool = True,
        cache_options: Any = None,
        **_options: Any,
    ) -> IO[Any]:
        """A buffered file object; without `autocommit` it is seen by nobody until the transaction ends."""
        path = self._strip_protocol(path)
        size = block_size if isinstance(block_size, int) and block_size > 1 else -1
        if autocommit or not set(mode) & set("wx"):
            return open_stream(self._runner, path, mode, buffering=size)
        return _Pending(self._runner, path, size)  # type: ignore[return-value]

    def touch(self, path: str, truncate: bool = True, **_options: Any) -> None:
        """Make a file that is empty, or that is there."""
        with self._open(path, "wb" if truncate else "ab"):
            pass

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_options: Any) -> bytes:
        """The content of a file, or a part of it; negative positions count from the end."""
        path = self._strip_protocol(path)
        if start is None and end is None:
            return drive(self._runner, calls.loading(path))
        descriptor = self._runner.run(calls.open_file(path, "r"))
        return drive(self._runner, calls.closing(descriptor, _part(descriptor, start or 0, end)))

    def cat_ranges(
        self,
        paths: list[str],
        starts: Any,
        ends: Any,
        max_gap: int | None = None,
        on_error: str = "return",
        **_options: Any,
    ) -> list[bytes | Exception]:
        """Parts of files, several at once; what fails is in its place, or raised with `on_error="raise"`."""
        count = len(paths)
        begin = starts if isinstance(starts, Sequence) else [starts] * count
        behind = ends if isinstance(ends, Sequence) else [ends] * count
        if not len(begin) == len(behind) == count:
            raise ValueError(f"{count} paths, but {len(begin)} starts and {len(behind)} ends")

        def part(index: int) -> bytes | Exception:
            try:
                return self.cat_file(paths[index], begin[index], behind[index])
            except OSError as error:
                if on_error == "raise":
                    raise
                return error

        with ThreadPoolExecutor(FILE_RANGES_AT_ONCE, thread_name_prefix="virgo-ranges") as pool:
            return list(pool.map(part, range(count)))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_options: Any) -> None:
        """Make a value the content of a file; `mode="create"`: of one that is not there yet."""
        kind = "x" if mode == "create" else "w"
        drive(self._runner, calls.saving(self._strip_protocol(path), value, mode=kind, durable=False))

    def get_file(
        self,
        rpath: str,
        lpath: Any,
        callback: Callback = DEFAULT_CALLBACK,
        outfile: Any = None,
        **_options: Any,
    ) -> None:
        """Copy a file of the cloud to this machine, or make a directory of the name."""
        if outfile is None and self.isdir(rpath):
            Path(lpath).mkdir(parents=True, exist_ok=True)
            return
        with contextlib.ExitStack() as stack:
            source = stack.enter_context(self._open(rpath, "rb"))
            callback.set_size(self.info(rpath)["size"])
            if outfile is None:
                Path(lpath).parent.mkdir(parents=True, exist_ok=True)
                outfile = stack.enter_context(Path(lpath).open("wb"))
            while piece := source.read(FILE_CHUNK_BYTES):
                outfile.write(piece)
                callback.relative_update(len(piece))

    def put_file(
        self,
        lpath: Any,
        rpath: str,
        callback: Callback = DEFAULT_CALLBACK,
        mode: str = "overwrite",
        **_options: Any,
    ) -> None:
        """Copy a file of this machine into the cloud, or make a directory of the name."""
        if Path(lpath).is_dir():
            self.makedirs(rpath, exist_ok=True)
            return
        with Path(lpath).open("rb") as source:
            callback.set_size(os.fstat(source.fileno()).st_size)
            with self._open(rpath, "xb" if mode == "create" else "wb") as target:
                while piece := source.read(FILE_CHUNK_BYTES):
                    target.write(piece)
                    callback.relative_update(len(piece))


class _Pending(io.BufferedIOBase):
    """A file that is written under another name, and gets its own when it is whole."""

    def __init__(self, runner: Runner, path: str, size: int) -> None:
        above, _, name = path.rpartition("/")
        self._runner = runner
        self.path = path
        self._aside = f"{above}/.{name[:200]}.{uuid.uuid4().hex}"
        self._file = open_stream(runner, self._aside, "wb", buffering=size)

    def writable(self) -> bool:
        """True."""
        return True

    def write(self, data: Any, /) -> int:
        """As of any file."""
        return int(self._file.write(data))

    def flush(self) -> None:
        """As of any file."""
        if not self._file.closed:
            self._file.flush()

    def close(self) -> None:
        """End writing; the file is not seen before `commit`."""
        self._file.close()
        super().close()

    def commit(self) -> None:
        """Give it its name, in place of what had that."""
        self._runner.run(calls.change("RENAME", self._aside, self.path))

    def discard(self) -> None:
        """Forget it."""
        with contextlib.suppress(FileMissing):
            self._runner.run(calls.change("REMOVE", self._aside))


def _part(descriptor: int, start: int, end: int | None) -> calls.Plan[bytes]:
    size = 0
    if start < 0 or end is None or end < 0:
        size = (yield from calls.single(calls.descriptor_status(descriptor))).size
    start = max(0, size + start) if start < 0 else start
    end = size if end is None else max(0, size + end) if end < 0 else end
    return (yield from calls.reading(descriptor, max(0, end - start), start))


def _described(path: str, status: FileStatus) -> dict[str, Any]:
    """A status as fsspec has it; of a link, what it is itself."""
    return {
        "name": path,
        "size": status.size if status.kind == "file" else 0,
        "type": _TYPES.get(status.kind, "other"),
        "mtime": status.modified_ns / 1e9,
        "mode": status.mode | (stat.S_IFDIR if status.is_directory else stat.S_IFREG),
        "nlink": status.links,
        "node": status.node,
    }
