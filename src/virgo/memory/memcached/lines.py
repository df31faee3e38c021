"""What memcached's protocol asks of a server and not of a key: figures, listings, forgetting all.

`cache_memlimit` lowers the capacity of this node's pool, and raises it again, until the node ends; it is
for administrators. `flush_all` forgets all keys of the cloud, those of other protocols too; with a delay
it is this node that remembers it until then. Listings are of the whole cloud.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from typing import Any, Final

from virgo._version import __version__
from virgo.clock import wall_ms
from virgo.errors import TooLarge, VirgoError
from virgo.limits import CONNECTIONS_MAX, MEMORY_REPLY_BYTES_MAX, MEMORY_SCAN_KEYS_MAX, MEMORY_SLOTS_ALL, MiB
from virgo.memory.keys import Keys
from virgo.memory.listing import Listing
from virgo.memory.memcached.figures import Figures, lines
from virgo.memory.memcached.front import Front, local
from virgo.memory.memcached.numbers import until_ms
from virgo.memory.memcached.orders import ERROR, LINE, PAGE
from virgo.memory.memcached.place import Place
from virgo.memory.store import Store
from virgo.wire.commands import Command
from virgo.wire.resp import SILENT, Encoded
from virgo.wire.session import Session

log = logging.getLogger("virgo.memory")
VERSION: Final = "1.6.18"  # the memcached whose protocol this is; clients choose features by it
_OK, _END = Encoded(b"OK\r\n"), b"END\r\n"
_UNABLE: Final = Encoded(b"MEMLIMIT_ADJUST_FAILED memory.capacity_bytes of the node is less\r\n")
_NO_CRAWLER: Final = Encoded(b"CLIENT_ERROR lru crawler disabled\r\n")


class Lines:
    """Served by one node."""

    def __init__(self, front: Front, store: Store, keys: Keys, listing: Listing, place: Place) -> None:
        self.capacity_bytes_max = 0  # as `cache_memlimit` has set it, 0 for as configured
        self._configured_bytes = store.state.capacity_bytes
        self._front = front
        self._figures: Figures = front.figures
        self._store = store
        self._keys = keys
        self._listing = listing
        self._place = place
        self._flush_ms = 0  # when all is to be forgotten, 0 for never
        self._flush_changed = asyncio.Event()
        self._started = time.monotonic()

    def __repr__(self) -> str:
        return f"<Lines {self._figures!r}>"

    def commands(self) -> list[Command]:
        """What is served."""
        return [local(LINE, self.serve, "login")]

    def serve(self, session: Session, request: list[bytes]) -> Any:
        """LINE name quiet word..."""
        name, quiet, words = request[1], request[2] == b"1", request[3:]
        if name == b"version":
            return Encoded(f"VERSION {VERSION}\r\n".encode())
        if name == b"flush_all":
            session.require("write", "flush_all")
            return self._flush_all(int(words[0]), quiet)
        if name == b"cache_memlimit":
            session.require("admin", "cache_memlimit")
            answer = self._limit(int(words[0]) * MiB)
            return SILENT if quiet else answer
        session.require("read", name.decode())
        if name == b"stats":
            return self._stats(session, words)
        return self._crawl(words)

    def _limit(self, capacity_bytes: int) -> Encoded:
        """The files that are mapped have room for what is configured, and for no more."""
        if capacity_bytes > self._configured_bytes:
            return _UNABLE
        self.capacity_bytes_max = capacity_bytes
        self._store.resize(capacity_bytes)
        return _OK

    # --- forgetting all -------------------------------------------------------------------------

    async def _flush_all(self, seconds: int, quiet: bool) -> Encoded:
        now = wall_ms()
        self._flush_ms = until_ms(seconds, now) if seconds > 0 else 0  # a new one replaces an earlier one
        self._flush_changed.set()
        self._figures.counts["cmd_flush"] += 1
        if self._flush_ms <= now:
            self._flush_ms = 0
            try:
                await self._listing.flush()
            except VirgoError:
                if quiet:
                    return SILENT
                raise
        return SILENT if quiet else _OK

    async def run(self) -> None:
        """Forget all when it is time; runs until cancelled."""
        while True:
            self._flush_changed.clear()
            try:
                async with asyncio.timeout(self._flush_in_s()):
                    await self._flush_changed.wait()
            except TimeoutError:
                self._flush_ms = 0
                try:
                    await self._listing.flush()
                except VirgoError as error:  # nobody waits for it who could be told
                    log.warning("a flush_all that was to come has failed: %s", error)

    def _flush_in_s(self) -> float | None:
        return max(0.0, (self._flush_ms - wall_ms()) / 1000) if self._flush_ms else None

    # --- listings -------------------------------------------------------------------------------

    def _crawl(self, words: list[bytes]) -> Any:
        if len(words) == 2 and words[0] == b"metadump":
            return self._dump(b"keys", 0)
        if words and words[0] in (b"crawl", b"tocrawl", b"sleep", b"enable", b"disable"):
            return _NO_CRAWLER  # what is past its time is removed all the same
        return Encoded(ERROR)

    async def _dump(self, form: bytes, most: int) -> Encoded:
        """Lines on items of the whole cloud, node by node; `most` of them, 0 for all."""
        found: list[bytes] = []
        size = 0
        for number in await self._listing.owners():
            slot = 0
            while slot < MEMORY_SLOTS_ALL and not (most and len(found) >= most):
                request = [PAGE, b"%d" % slot, b"%d" % (MEMORY_SCAN_KEYS_MAX // 100), form]
                onward, page = await self._keys.at(number, self._front.page, request)
                slot = int(onward)
                found += filter(None, page)
                size += sum(map(len, page))
                if size > MEMORY_REPLY_BYTES_MAX:
                    raise TooLarge("the list is too long for one answer", hint="SCAN lists keys in turns.")
                await asyncio.sleep(0)
        return Encoded(b"".join((*(found[:most] if most else found), _END)))

    # --- figures --------------------------------------------------------------------------------

    def _stats(self, session: Session, words: list[bytes]) -> Any:
        if not words:
            return Encoded(lines(self._general(session)))
        name = words[0]
        if name == b"cachedump":
            if len(words) < 3 or not (words[1].isdigit() and words[2].isdigit()):
                return Encoded(b"CLIENT_ERROR bad command line\r\n")
            return self._dump(b"items", int(words[2]))
        if name == b"reset":
            self._figures.counts.clear()
            return Encoded(b"RESET\r\n")
        kinds: dict[bytes, Callable[[Session], list[tuple[str, object]]]] = {
            b"settings": self._settings,
            b"items": self._items,
            b"slabs": lambda _session: [("active_slabs", 0), ("total_malloced", 0)],
            b"sizes": lambda _session: [("sizes_status", "disabled")],
            b"conns": _connections,
        }
        return Encoded(lines(kinds[name](session))) if name in kinds else Encoded(ERROR)

    def _general(self, session: Session) -> list[tuple[str, object]]:
        store = self._store.stats()
        return [
            ("pid", os.getpid()),
            ("uptime", int(time.monotonic() - self._started)),
            ("time", wall_ms() // 1000),
            ("version", VERSION),
            ("virgo_version", __version__),
            ("pointer_size", 64),
            ("max_connections", CONNECTIONS_MAX),
            ("curr_connections", len(session.service.sessions)),
            *self._figures.values(),
            ("limit_maxbytes", store["capacity_bytes"]),
            ("threads", 1),
            ("bytes", store["used_bytes"]),
            ("curr_items", store["keys"]),
            ("evictions", self._store.evictor.evicted),
        ]

    def _settings(self, session: Session) -> list[tuple[str, object]]:
        address = self._place.address
        return [
            ("maxbytes", self._store.state.capacity_bytes),
            ("maxconns", CONNECTIONS_MAX),
            ("tcpport", address.port),
            ("udpport", 0),
            ("inter", address.host or "NULL"),
            ("verbosity", 0),
            ("evictions", "on" if self._store.state.evicts else "off"),
            ("domain_socket", address.path or "NULL"),
            ("num_threads", 1),
            ("cas_enabled", "yes"),
            ("tcp_backlog", 1024),
            ("binding_protocol", "ascii"),
            ("auth_enabled_ascii", "no" if session.service.stranger.roles or address.path else "yes"),
            ("item_size_max", self._place.item_bytes_max),
            ("maxconns_fast", "yes"),
            ("flush_enabled", "yes"),
            ("dump_enabled", "yes"),
        ]

    def _items(self, _session: Session) -> list[tuple[str, object]]:
        return [("items:1:number", self._store.stats()["keys"])]


def _connections(session: Session) -> list[tuple[str, object]]:
    now = session.service.loop.time()
    found: list[tuple[str, object]] = []
    for other in sorted(session.service.sessions, key=lambda one: one.number):
        found += [
            (f"{other.number}:addr", other.peer.replace(" ", ":")),
            (f"{other.number}:secs_since_last_cmd", int(now - other.last_seen)),
        ]
    return found
