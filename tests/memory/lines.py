"""Two servers of memcached's protocol beside each other, and answers in a form that can be compared."""

from __future__ import annotations

import re
import socket
import time
from pathlib import Path

_CAS = re.compile(rb"(?<= c)[0-9]{2,}|(?<= c)[0-9](?=[ \r])")
_GETS = re.compile(rb"^(VALUE [^ ]+ [0-9]+ [0-9]+ )([0-9]+)(?=\r)", re.MULTILINE)
_LEFT = re.compile(rb"(?<= t)([0-9]+)")
_IDLE = re.compile(rb"(?<= l)([0-9]+)")
_SHOWN = re.compile(rb"^(ME [^ ]+) .* (fetch=[a-z]+) .*(?=\r)", re.MULTILINE)
# Whatever value is still awaited, these lines complete it, and the last one is answered by a line of its own.
_FILL = b"\r\n" * 40
_END = b"mg the.end Ofinished\r\n"
_ENDED = b"EN Ofinished\r\n"


class Talk:
    """One connection.

    Args:
        place: a path of a Unix socket, or a port of this machine.
    """

    def __init__(self, place: Path | str | int) -> None:
        self.socket = socket.socket(socket.AF_INET if isinstance(place, int) else socket.AF_UNIX)
        self.socket.settimeout(20)
        self.socket.connect(("127.0.0.1", place) if isinstance(place, int) else str(place))

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def ask(self, *chunks: bytes) -> bytes:
        """Send the chunks and what completes them; all answers up to the end."""
        for chunk in chunks:
            self.send(chunk)
            if len(chunks) > 1:
                time.sleep(0.0002)  # so that it mostly arrives as a chunk of its own
        self.send(_END)
        return self.until(_ENDED).removesuffix(_ENDED)

    def ask_whatever(self, *chunks: bytes) -> bytes:
        """As `ask`, when it is not sure that the chunks end with a whole request."""
        return self.ask(*chunks, _FILL)

    def until(self, end: bytes) -> bytes:
        """What comes, up to an end; or until the other side closes. Raises AssertionError after 20 s."""
        found = bytearray()
        while not found.endswith(end):
            try:
                data = self.socket.recv(1 << 20)
            except TimeoutError:
                raise AssertionError(f"waiting for {end!r}, only {bytes(found)!r:.500} came") from None
            if not data:
                break
            found += data
        return bytes(found)

    def cas(self, key: bytes) -> int:
        """The cas unique of an item, 0 if it is not there; it does not count as a use."""
        found = re.search(rb" c([0-9]+)", self.ask(b"mg %b c u\r\n" % key))
        return int(found[1]) if found else 0

    def close(self) -> None:
        self.socket.close()


def roughly(left_s: int) -> bytes:
    """A time that is left, up to the next ten seconds; one of the calendar is just far away."""
    return b"far" if left_s > 1_000_000 else b"%d" % (-(-left_s // 10) * 10)


def plain(answer: bytes) -> bytes:
    """An answer without what two servers cannot agree on: cas uniques are numbered as they come, and times
    are taken roughly, since a second may begin in between."""
    numbers: dict[bytes, bytes] = {}

    def numbered(value: bytes) -> bytes:
        return numbers.setdefault(value, b"#%d" % len(numbers))

    answer = _GETS.sub(lambda match: match[1] + numbered(match[2]), answer)
    answer = _CAS.sub(lambda match: numbered(match[0]), answer)
    answer = _LEFT.sub(lambda match: roughly(int(match[1])), answer)
    answer = _SHOWN.sub(rb"\1 ... \2", answer)
    return _IDLE.sub(b"#", answer)
