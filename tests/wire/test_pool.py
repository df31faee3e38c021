"""What both clients share, at its edges: interrupts, replies without end, a server without room."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from virgo.errors import Busy, DeadlineExceeded
from virgo.wire.address import Address
from virgo.wire.connection import Connection
from virgo.wire.pool import pack_plain

INTERRUPTED = """
import signal
from virgo.wire.pool import pack_plain
def interrupt(*_):
    raise KeyboardInterrupt
signal.signal(signal.SIGALRM, interrupt)
for _ in range(3000):
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.0002)
        while True:
            pack_plain(("GETRANGE", b"k", 1, 2.5, 1 << 60))
    except KeyboardInterrupt:
        pass
"""


def test_ctrl_c_while_a_request_is_packed_is_no_more_than_that() -> None:
    """An exception of a signal handler, at any point of the packing of numbers, does not end the process."""
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_numbers_are_packed_as_text() -> None:
    """As people write them."""
    assert pack_plain(("A", 1, -2, 2.5, 10**18)) == (
        b"*5\r\n$1\r\nA\r\n$1\r\n1\r\n$2\r\n-2\r\n$3\r\n2.5\r\n$19\r\n1000000000000000000\r\n"
    )


@pytest.mark.parametrize("soon", [False, True])
def test_a_reply_that_does_not_end_has_its_deadline(soon: bool) -> None:
    """A server that goes on sending is given as much time as one that says nothing."""
    over = threading.Event()

    def flow(listening: socket.socket) -> None:
        end = listening.accept()[0]
        with end, contextlib.suppress(OSError):
            end.sendall(b"$1073741824\r\n")
            while not over.is_set():
                end.sendall(bytes(65536))

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=flow, args=(listening,))
        thread.start()
        made = Connection(Address(host="127.0.0.1", port=listening.getsockname()[1]))
        made._soon = soon
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            made.receive(0.1)
        took_s = time.monotonic() - began
        over.set()
        made.close()
        thread.join(10)
    assert took_s < 1


def test_a_socket_with_a_full_backlog_is_busy(tmp_path: Path) -> None:
    """A stopped server with as many waiting connections as it may have is there, and has no room."""
    with contextlib.ExitStack() as waiting:
        listening = waiting.enter_context(socket.socket(socket.AF_UNIX))
        listening.bind(str(tmp_path / "s"))
        listening.listen(1)
        with contextlib.suppress(BlockingIOError):
            for _ in range(10):
                each = waiting.enter_context(socket.socket(socket.AF_UNIX))
                each.setblocking(False)
                each.connect(str(tmp_path / "s"))
        with pytest.raises(Busy, match="no room"):
            Connection(Address(path=str(tmp_path / "s")), limit_s=0.2)
