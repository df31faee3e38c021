"""The files module of a node: commands, forwarding to the node that holds a file, and threads for its disk.

Any node serves any path and any descriptor: what lies elsewhere is forwarded once, as `FILES.HERE`, to the
node that holds it. The event loop never waits for a disk: reads of what is in memory are answered at once,
everything else runs in a few threads.

Promises: an acknowledged write is in its node's page cache, and after FILES.SYNC on its disk; a count is
never more than was written; errors are typed and say what to do.

Opening for writing makes the directories above a created file, on `/NODE/` paths too. Reading needs the
role `read`, everything that changes something `write`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from virgo.errors import BadDescriptor, NoNode, TooLarge
from virgo.files import beneath, core, roots
from virgo.files.acts import Acts
from virgo.files.core import DEFAULT_MODE, POOL_ROOT, PRIVATE
from virgo.files.descriptors import DescriptorTable
from virgo.files.local import LocalFiles
from virgo.files.operations import Operations
from virgo.files.placement import Directory, Pool
from virgo.files.roots import Root
from virgo.kernel.process import umask_of
from virgo.limits import DESCRIPTOR_SWEEP_S, FILE_IO_BYTES_MAX, FILE_THREADS_MAX, NODES_MAX, PATH_BYTES_MAX
from virgo.members import Load, node_of
from virgo.module import NodeServices
from virgo.wire import args
from virgo.wire.commands import Command
from virgo.wire.resp import OK

if TYPE_CHECKING:
    from virgo.wire.session import Session

T = TypeVar("T")
log = logging.getLogger("virgo.files")


class FilesModule:
    """`virgo.files` in the node. See `virgo.module.Module`."""

    name = "files"
    requires: tuple[str, ...] = ()
    summary = "files of every node by path, descriptors that outlive connections"

    def __init__(self, node: NodeServices) -> None:
        self._node = node
        self._threads: ThreadPoolExecutor | None = None
        self._local: LocalFiles | None = None
        self._operations: Operations | None = None
        self._acts: Acts | None = None
        self._forwarded = 0

    def __repr__(self) -> str:
        return f"<FilesModule of {self._node.name} {'up' if self._local else 'down'}>"

    async def start(self) -> None:
        """Check the kernel and the configuration, and load the table of descriptors."""
        beneath.check_kernel()
        directories, read_only = self._roots()
        self._threads = ThreadPoolExecutor(FILE_THREADS_MAX, thread_name_prefix="virgo-files")
        local = LocalFiles(directories, read_only)

        def load() -> DescriptorTable:
            for name in (PRIVATE, POOL_ROOT):
                Path(directories[name]).mkdir(mode=0o700, parents=True, exist_ok=True)
            path = self._node.directory / "files-table" / "journal"
            return DescriptorTable(path, number=self._node.number, reopen=local.reopen)

        local.table = await self._run(load)
        names = Directory(self._node)
        self._operations = Operations(
            node=self._node,
            local=local,
            exports=frozenset(self._node.config.files.exports),
            names=names,
            pool=Pool(self._node, names),
            run=self._run,
        )
        self._local = local
        self._acts = Acts(local, keeps_owners=_keeps_owners(), umask=umask_of(os.getpid()))
        self._node.spawn(self._expire(local.table), name="expire descriptors")

    async def _expire(self, table: DescriptorTable) -> None:
        """Close now and then what vanished clients have left open."""
        while True:
            await asyncio.sleep(DESCRIPTOR_SWEEP_S)
            await self._run(table.expire)

    async def stop(self) -> None:
        """Let go of the kernel's descriptors; the table stays for the next start."""
        threads, self._threads = self._threads, None
        local, self._local, self._operations = self._local, None, None
        if threads is not None:
            threads.shutdown(wait=False, cancel_futures=True)
        if local is not None:
            local.table.shut()

    def load(self, load: Load) -> Load:
        """Nothing to add: the node measures the disk."""
        return load

    def stats(self) -> dict[str, Any]:
        """Descriptors, reads, writes, bytes, and what was forwarded."""
        if self._local is None:
            return {}
        local = self._local
        return {
            **local.table.stats(),
            "reads": local.reads,
            "reads_cached": local.reads_cached,
            "writes": local.writes,
            "syncs": local.syncs,
            "bytes_read": local.bytes_read,
            "bytes_written": local.bytes_written,
            "forwarded": self._forwarded + (self._operations.forwarded if self._operations else 0),
            "exports": sorted(self._node.config.files.exports),
        }

    def commands(self) -> Sequence[Command]:
        """What the port serves."""
        return (
            Command("VIRGO_OPEN", self._open, "read", 1, 2, usage="path [mode]", summary="open a file"),
            Command(
                "VIRGO_READ",
                self._read,
                "read",
                3,
                4,
                usage="descriptor size position",
                summary="read at a position; empty at the end",
            ),
            Command(
                "VIRGO_WRITE",
                self._write,
                "write",
                3,
                4,
                usage="descriptor data position | descriptor data size position",
                summary="write at a position; the count written",
            ),
            Command("VIRGO_CLOSE", self._close, "read", 1, 1, usage="descriptor", summary="end a descriptor"),
            Command(
                "FILES.SYNC",
                self._sync,
                "write",
                1,
                1,
                usage="descriptor",
                summary="on return the file is on the disk",
            ),
            Command(
                "FILES.TRUNCATE",
                self._truncate,
                "write",
                2,
                2,
                usage="descriptor size",
                summary="set the size of an open file",
            ),
            Command(
                "FILES.FSTAT",
                self._descriptor_status,
                "read",
                1,
                1,
                usage="descriptor",
                summary="status of an open file, as JSON",
            ),
            Command(
                "FILES.DIGEST",
                self._digest,
                "read",
                2,
                2,
                usage="descriptor algorithm",
                summary="checksum of an open file, by an algorithm of Python's hashlib",
            ),
            self._path_command("FILES.STAT", "read", "path", "status of a path, as JSON"),
            self._path_command("FILES.LIST", "read", "path", "entries of a directory, as a JSON array"),
            self._path_command("FILES.REMOVE", "write", "path", "remove a file or an empty directory"),
            self._path_command("FILES.MKDIR", "write", "path", "make a directory and those above it"),
            self._path_command("FILES.RENAME", "write", "path new-path", "rename on one node, replacing"),
            Command(
                "FILES.HERE",
                self._here,
                "read",
                2,
                3,
                usage="OPEN|STAT|LIST|REMOVE|MKDIR|RENAME path [mode|new-path]",
                summary="an operation on this node's own files, as nodes ask it of each other",
            ),
            Command(
                "FILES.DESCRIPTORS",
                self._descriptors,
                "read",
                summary="the open files of this node, as a JSON array",
            ),
            Command(
                "FILES.ROOTS",
                self._shown,
                "admin",
                summary="where this node's files lie on its machine, as a JSON array, for who mounts them",
            ),
            Command(
                "FILES.AT",
                self._act,
                "admin",
                3,
                3,
                usage="root act arguments",
                summary="an act on this node's own files, for those who have mounted them elsewhere",
            ),
            Command("FILES.STATS", self._stats, "read", summary="figures of this node's files, as JSON"),
        )

    # --- by path ------------------------------------------------------------------------------

    async def _open(self, session: Session, request: list[bytes]) -> Any:
        mode = DEFAULT_MODE if len(request) < 3 else core.parse_mode(args.text(request[2], "mode"))
        if mode.write:
            session.require("write", "opening for writing")
        return await self._ready.open(_path(request[1]), mode, *request[2:3])

    def _path_command(self, name: str, role: str, usage: str, summary: str) -> Command:
        operation = name.partition(".")[2]
        count = len(usage.split())

        async def handle(_session: Session, request: list[bytes]) -> Any:
            return await self._ready.run(operation, *[_path(item) for item in request[1:]])

        return Command(name, handle, role, count, count, usage=usage, summary=summary)

    async def _here(self, session: Session, request: list[bytes]) -> Any:
        operation = request[1].decode("ascii", "replace").upper()
        path, rest = _path(request[2]), request[3:]
        if operation == "OPEN":
            mode = core.parse_mode(args.text(rest[0], "mode")) if rest else DEFAULT_MODE
            if mode.write:
                session.require("write", "opening for writing")
            return await self._ready.open_here(path, mode)
        if operation not in ("STAT", "LIST"):
            session.require("write", operation)
        return await self._ready.run_here(operation, path, *[_path(item) for item in rest])

    # --- by descriptor ------------------------------------------------------------------------

    def _read(self, _session: Session, request: list[bytes]) -> Any:
        """A plain function: what is in memory is answered without a task."""
        descriptor = _descriptor(request[1])
        size = _size(request[-2], "size")
        position = args.integer(request[-1], "position", low=0)
        if node_of(descriptor) != self._node.number:
            return self._forward(descriptor, "VIRGO_READ", descriptor, size, position)
        data = self._files.read_cached(descriptor, size, position)
        return self._run(self._files.read, descriptor, size, position) if data is None else data

    async def _write(self, _session: Session, request: list[bytes]) -> Any:
        descriptor, data = _descriptor(request[1]), request[2]
        position = args.integer(request[-1], "position", low=0)
        if len(request) == 5:
            data = data[: _size(request[3], "size")]
        if len(data) > FILE_IO_BYTES_MAX:
            raise TooLarge(f"one write may have {FILE_IO_BYTES_MAX} bytes", hint="Write in pieces.")
        if node_of(descriptor) != self._node.number:
            return await self._forward(descriptor, "VIRGO_WRITE", descriptor, data, position)
        return await self._run(self._files.write, descriptor, data, position)

    async def _close(self, session: Session, request: list[bytes]) -> Any:
        descriptor = _descriptor(request[1])
        if node_of(descriptor) == self._node.number and self._files.table.writes(descriptor):
            session.require("write", "VIRGO_CLOSE of a descriptor that writes")
        return await self._on_descriptor(request, lambda files: files.close)

    async def _sync(self, _session: Session, request: list[bytes]) -> Any:
        return await self._on_descriptor(request, lambda files: files.sync)

    async def _truncate(self, _session: Session, request: list[bytes]) -> Any:
        size = args.integer(request[2], "size", low=0)
        return await self._on_descriptor(request, lambda files: files.truncate, size)

    async def _descriptor_status(self, _session: Session, request: list[bytes]) -> Any:
        return await self._on_descriptor(request, lambda files: files.descriptor_status)

    async def _digest(self, _session: Session, request: list[bytes]) -> Any:
        descriptor, algorithm = _descriptor(request[1]), args.text(request[2], "algorithm")
        if node_of(descriptor) != self._node.number:
            return await self._forward(descriptor, *request, timeout_s=math.inf)
        return (await self._run(self._files.digest, descriptor, algorithm)).encode()

    async def _on_descriptor(
        self, request: list[bytes], method: Callable[[LocalFiles], Callable[..., Any]], *rest: int
    ) -> Any:
        """Run the method on the node of the descriptor: its answer as JSON, or OK."""
        descriptor = _descriptor(request[1])
        if node_of(descriptor) != self._node.number:
            reply = await self._forward(descriptor, request[0], descriptor, *rest)
            return reply if request[0].upper() == b"FILES.FSTAT" else OK
        result = await self._run(method(self._files), descriptor, *rest)
        return OK if result is None else msgspec.json.encode(result)

    async def _forward(
        self, descriptor: int, *request: bytes | str | int, timeout_s: float | None = None
    ) -> Any:
        number = node_of(descriptor)
        if not 0 < number <= NODES_MAX:
            raise BadDescriptor(f"no file is open as {descriptor}")
        self._forwarded += 1
        try:
            return await self._node.call(number, *request, timeout_s=timeout_s)
        except NoNode:
            raise BadDescriptor(f"no file is open as {descriptor}: no node has its number") from None

    # --- figures ------------------------------------------------------------------------------

    async def _descriptors(self, _session: Session, _request: list[bytes]) -> bytes:
        def describe() -> bytes:
            roots = {PRIVATE: f"/{self._node.name}", POOL_ROOT: "/pool"}
            return msgspec.json.encode(
                [
                    {
                        "descriptor": descriptor,
                        "path": f"{roots.get(kept.root, f'/{self._node.name}/{kept.root}')}/"
                        + kept.path.encode("utf-8", "surrogateescape").decode("utf-8", "replace"),
                    }
                    for descriptor, kept in self._files.table.entries().items()
                ]
            )

        return await self._run(describe)

    def _stats(self, _session: Session, _request: list[bytes]) -> bytes:
        return msgspec.json.encode(self.stats())

    async def _act(self, _session: Session, request: list[bytes]) -> Any:
        root, act = args.text(request[1], "root"), args.text(request[2], "act")
        assert self._acts is not None, "commands are served while the module is up"
        return await self._run(self._acts.run, root, act, request[3])

    def _shown(self, _session: Session, _request: list[bytes]) -> bytes:
        directories, read_only = self._roots()
        keeps = _keeps_owners()
        return msgspec.json.encode(
            [
                Root(self._node.name, name, directory, read_only=name in read_only, keeps_owners=keeps)
                for name, directory in directories.items()
                if name != POOL_ROOT
            ]
        )

    # --- within -------------------------------------------------------------------------------

    @property
    def _files(self) -> LocalFiles:
        assert self._local is not None, "commands are served while the module is up"
        return self._local

    @property
    def _ready(self) -> Operations:
        assert self._operations is not None, "commands are served while the module is up"
        return self._operations

    async def _run(self, work: Callable[..., T], *arguments: Any) -> T:
        """Run blocking work in a thread."""
        assert self._threads is not None
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    def _roots(self) -> tuple[dict[str, str], list[str]]:
        """Directory by root name, and the names of those that are read-only. Raises BadConfig."""
        config = self._node.config.files
        exported = roots.export_directories(config)
        for name, wrong in roots.absent(config).items():
            log.warning("the export %s cannot be served: %s", name, wrong)
        directories = {
            PRIVATE: str(self._node.directory / "files"),
            POOL_ROOT: str(self._node.directory / "files-pool"),
            **{name: str(directory) for name, directory in exported.items()},
        }
        return directories, config.read_only


def _keeps_owners() -> bool:
    """Whether this process may give files away; else all of them are its user's."""
    return os.geteuid() == 0


def _path(data: bytes) -> str:
    if len(data) >= PATH_BYTES_MAX:
        raise TooLarge(f"a path must be shorter than {PATH_BYTES_MAX} bytes", hint="Shorten it.")
    return args.text(data, "path", bytes_max=PATH_BYTES_MAX)


def _descriptor(data: bytes) -> int:
    return args.integer(data, "descriptor")


def _size(data: bytes, name: str) -> int:
    size = args.integer(data, name, low=0)
    if size > FILE_IO_BYTES_MAX:
        raise TooLarge(
            f"{name} is {size}, but one read or write may have {FILE_IO_BYTES_MAX} bytes",
            hint="Read and write in pieces.",
        )
    return size
