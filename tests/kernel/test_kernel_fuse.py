"""The protocol of /dev/fuse, with a socket in the kernel's place: layouts, answers, faults."""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from virgo.errors import FileMissing, NodeLost, TooLarge
from virgo.kernel import at
from virgo.kernel.fuse import device, protocol, serving
from virgo.kernel.fuse.protocol import OPERATIONS, Can, Operation


class Kernel:
    """The other end of a server's descriptor: asks, and takes the answer."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._unique = 0

    def ask(self, operation: int, body: bytes = b"", *, node: int = 1) -> tuple[int, bytes]:
        """The errno and the rest of the answer."""
        self._unique += 1
        self.tell(operation, body, node=node)
        answer = self._end.recv(1 << 21)
        length, code, unique = protocol.OUT_HEADER.unpack_from(answer)
        assert (length, unique) == (len(answer), self._unique)
        return -code, answer[protocol.OUT_HEADER.size :]

    def tell(self, operation: int, body: bytes, *, node: int = 1) -> None:
        """Ask without waiting."""
        length = protocol.IN_HEADER.size + len(body)
        self._end.send(protocol.IN_HEADER.pack(length, operation, self._unique, node, 1, 2, 3, 0, 0) + body)


@pytest.fixture
def serve() -> Iterator[Callable[..., tuple[Kernel, list[int]]]]:
    """Start a server with some handlers."""
    ends: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def start(**handlers: serving.Handler) -> tuple[Kernel, list[int]]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ends.extend((ours, theirs))
        counts = memoryview(bytearray(8 * (OPERATIONS + 8))).cast("Q")
        named = {Operation[name.upper()]: handler for name, handler in handlers.items()}
        server = serving.Server(theirs.fileno(), named, counts)

        def run() -> None:
            while data := os.read(theirs.fileno(), 1 << 21):
                server.answer(memoryview(data))

        threads.append(threading.Thread(target=run))
        threads[-1].start()
        return Kernel(ours), counts  # type: ignore[return-value]

    yield start
    for end in ends[::2]:
        end.close()
    for thread in threads:
        thread.join(10)
    for end in ends[1::2]:
        end.close()


def test_layouts_have_the_sizes_of_the_kernels_own() -> None:
    """As `sizeof` says of the structures in include/uapi/linux/fuse.h."""
    sizes = {
        "IN_HEADER": 40, "OUT_HEADER": 16, "ATTRIBUTES": 88, "ENTRY_OUT": 40, "ATTR_OUT": 16, "OPEN_OUT": 16,
        "SETATTR_IN": 88, "READ_IN": 40, "WRITE_IN": 40, "STATFS_OUT": 80, "INIT_OUT": 64, "CREATE_IN": 16,
        "RELEASE_IN": 24, "FSYNC_IN": 16, "FALLOCATE_IN": 32, "LSEEK_IN": 24, "COPY_FILE_RANGE_IN": 56,
        "DIRENT": 24, "INVAL_INODE_OUT": 24, "MKNOD_IN": 16, "RENAME2_IN": 16,
    }  # fmt: skip
    assert {name: getattr(protocol, name).size for name in sizes} == sizes


def test_attributes_say_what_the_status_says(tmp_path: Path) -> None:
    """Every field, times before 1970 and beyond 2038 too."""
    file = tmp_path / "file"
    file.write_bytes(b"x" * 5000)
    os.utime(file, ns=(-1_500_000_000, 5_000_000_000_000_000_007))
    status = file.stat()
    fields = protocol.ATTRIBUTES.unpack(protocol.attributes(status))
    assert fields[:3] == (status.st_ino, 5000, status.st_blocks)
    assert (fields[3], fields[6]) == divmod(status.st_atime_ns, 10**9)
    assert (fields[4], fields[7]) == divmod(status.st_mtime_ns, 10**9)
    assert fields[9:13] == (status.st_mode, 1, os.getuid(), os.getgid())
    assert protocol.mode_of(protocol.attributes(status)) == status.st_mode


@pytest.mark.parametrize("number", [(0, 0), (1, 3), (8, 257), (4095, 1_048_575)])
def test_numbers_of_devices_go_both_ways(number: tuple[int, int]) -> None:
    """Twelve bits and twenty, as the kernel packs them."""
    assert protocol.device_in(protocol.device_out(os.makedev(*number))) == os.makedev(*number)


def test_a_request_is_answered_by_its_handler(serve: Callable[..., tuple[Kernel, list[int]]]) -> None:
    """With who asks, what about, and what it says; an answer of any length arrives."""

    def read(request: serving.Request) -> bytes:
        assert (request.node, request.uid, request.gid, request.pid) == (7, 1, 2, 3)
        return bytes(request.body) * 50_000

    kernel, counts = serve(read=read, lookup=lambda request: b"+".join(request.names()))
    assert kernel.ask(Operation.READ, b"ab", node=7) == (0, b"ab" * 50_000)
    assert kernel.ask(Operation.LOOKUP, b"one\0two\0") == (0, b"one+two")
    assert counts[Operation.READ] == counts[Operation.LOOKUP] == 1


def test_what_is_not_handled_is_refused(serve: Callable[..., tuple[Kernel, list[int]]]) -> None:
    """ENOSYS, for operations of a newer kernel too; what has no answer gets none."""
    kernel, _ = serve(flush=lambda _request: b"")
    assert kernel.ask(Operation.POLL) == (errno.ENOSYS, b"")
    assert kernel.ask(4096) == (errno.ENOSYS, b"")
    kernel.tell(Operation.FORGET, bytes(8))
    kernel.tell(Operation.INTERRUPT, bytes(8))
    assert kernel.ask(Operation.FLUSH) == (0, b"")


def test_what_a_handler_raises_is_an_errno(serve: Callable[..., tuple[Kernel, list[int]]]) -> None:
    """The kernel's own, the cloud's, and EIO for a fault of ours, which is counted."""
    raised: list[BaseException] = [
        OSError(errno.ENOTEMPTY, ""), FileMissing("x"), NodeLost("x"), TooLarge("x"), KeyError("a fault"),
    ]  # fmt: skip

    def getattr_(_request: serving.Request) -> bytes:
        raise raised.pop(0)

    kernel, counts = serve(getattr=getattr_)
    wanted = [errno.ENOTEMPTY, errno.ENOENT, errno.EHOSTDOWN, errno.EFBIG, errno.EIO]
    assert [kernel.ask(Operation.GETATTR)[0] for _ in wanted] == wanted
    assert counts[OPERATIONS] == 1


def test_the_greeting_agrees_on_what_both_can() -> None:
    """Nothing is claimed that the kernel has not offered, nor what was not wanted."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        offered = (
            Can.INIT_EXT | Can.PASSTHROUGH | Can.BIG_WRITES | Can.MAX_PAGES | Can.ASYNC_READ | Can.POSIX_LOCKS
        )
        body = struct.pack("=IIIII44x", 7, 45, 131_072, offered & 0xFFFFFFFF, offered >> 32)
        ours.send(protocol.IN_HEADER.pack(40 + len(body), Operation.INIT, 9, 0, 0, 0, 0, 0, 0) + body)
        agreed = serving.greet(theirs.fileno(), Can.PASSTHROUGH | Can.ASYNC_READ | Can.DO_READDIRPLUS)
        answer = ours.recv(4096)
    fields = protocol.INIT_OUT.unpack_from(answer, protocol.OUT_HEADER.size)
    assert Can.PASSTHROUGH in agreed and Can.DO_READDIRPLUS not in agreed and Can.POSIX_LOCKS not in agreed
    assert fields[3] | fields[10] << 32 == agreed
    assert fields[:2] == (7, protocol.MINOR)


def test_handles_tell_files_apart_whose_numbers_are_the_same(tmp_path: Path) -> None:
    """A file that gets the number of a removed one is another file; a further name is the same one."""
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        seen = set()
        for _ in range(50):
            (tmp_path / "file").write_bytes(b"")
            os.link(tmp_path / "file", tmp_path / "second")
            assert at.handle(directory, b"file") == at.handle(directory, b"second")
            seen.add(at.handle(directory, b"file"))
            (tmp_path / "file").unlink()
            (tmp_path / "second").unlink()
        assert len(seen) == 50 or seen == {b""}
    finally:
        os.close(directory)


def test_entries_are_read_from_any_offset_on(tmp_path: Path) -> None:
    """Each offset leads to what comes behind its entry, by another descriptor too."""
    names = {b"name-%03d" % number for number in range(300)}
    for name in names:
        (tmp_path / os.fsdecode(name)).touch()
    seen: list[bytes] = []
    offset = 0
    while True:
        directory = os.open(tmp_path, os.O_RDONLY)
        try:
            os.lseek(directory, offset, os.SEEK_SET)
            read = list(at.entries(directory, 1000))
        finally:
            os.close(directory)
        if not read:
            break
        name, number, kind, offset = read[0]  # one at a time, whatever was read
        seen.append(name)
        if name not in (b".", b".."):
            assert number == (tmp_path / os.fsdecode(name)).stat().st_ino and kind == stat.S_IFREG >> 12
    assert sorted(seen) == sorted(names | {b".", b".."})


def test_a_place_that_is_no_mount_is_known_without_asking(tmp_path: Path) -> None:
    """Whatever its name."""
    assert device.mounted_at(tmp_path) is None
    assert device.mounted_at(Path("/")) is None
    with pytest.raises(OSError, match="Invalid argument"):
        device.unmount(tmp_path)
