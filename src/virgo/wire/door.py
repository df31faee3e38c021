"""The door of a TLS port: connections that have not shown a certificate yet, bounded in number and time.

asyncio makes a protocol, and so a `Session`, only once the handshake is over. Until then a connection costs
a descriptor and memory, and whoever sends nothing would keep both for a minute. So connections are accepted
here: few at once, each with little time, and no more than the node's crowd has room for.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable

from virgo.limits import HANDSHAKE_S, HANDSHAKES_MAX
from virgo.wire.crowd import Crowd
from virgo.wire.session import Session

_ACCEPT_AT_ONCE = 64
_PAUSE_S = 0.2  # after the process ran out of descriptors


class Door:
    """Accepts connections on a listening socket, which it closes at the end.

    Attributes:
        refused: connections that were closed at once, since too many were shaking hands or had come.
        failed: handshakes that came to nothing.
    """

    def __init__(
        self, listening: socket.socket, tls: ssl.SSLContext, crowd: Crowd, session: Callable[[], Session]
    ) -> None:
        self._listening = listening
        self._tls = tls
        self._crowd = crowd
        self._session = session
        self._loop = asyncio.get_running_loop()
        self._shaking: set[asyncio.Task[None]] = set()
        self._pause: asyncio.TimerHandle | None = None
        self.refused = self.failed = 0

    def __repr__(self) -> str:
        return f"<Door {len(self._shaking)} shaking hands, {self.refused} refused, {self.failed} failed>"

    def open(self) -> None:
        """Begin to accept."""
        self._pause = None
        self._loop.add_reader(self._listening, self._accept)

    def close(self) -> None:
        """Accept no more, and end the handshakes."""
        self._loop.remove_reader(self._listening)
        if self._pause is not None:
            self._pause.cancel()
        self._listening.close()
        for task in self._shaking:
            task.cancel()

    def _accept(self) -> None:
        for _ in range(_ACCEPT_AT_ONCE):
            try:
                connection, _address = self._listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError:  # no descriptors: whoever waits in the backlog may wait on
                self._loop.remove_reader(self._listening)
                self._pause = self._loop.call_later(_PAUSE_S, self.open)
                return
            if len(self._shaking) >= HANDSHAKES_MAX or self._crowd.full():
                self.refused += 1
                connection.close()
                continue
            connection.setblocking(False)
            self._crowd.remote += 1
            task = self._loop.create_task(self._shake_hands(connection))
            self._shaking.add(task)
            task.add_done_callback(self._shaking.discard)

    async def _shake_hands(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(
                self._session, connection, ssl=self._tls, ssl_handshake_timeout=HANDSHAKE_S
            )
        except (OSError, TimeoutError):  # no TLS, no certificate, one that is not ours, or silence
            self.failed += 1
            connection.close()
        finally:
            self._crowd.remote -= 1  # the session, if there is one, has been counted by now
