"""Operations on virtual paths: found where they lie, run there.

`open` and `run` are for callers: they find the node that holds the path and run the operation here or
there. `open_here` and `run_here` are for nodes: the path is one of this node's own, or a placed file that
this node holds or is to hold.

A directory of the pool is spread over the nodes: it exists if any node has it, its entries are those of all
nodes that are up, and the registers add the files of lost nodes.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import msgspec

from virgo.errors import BadArgument, Conflict, FileMissing, FileThere, NodeLost, NoNode, VirgoError
from virgo.files import core
from virgo.files.core import POOL, PRIVATE, Kind, Mode, Place, Spot
from virgo.files.faults import translate
from virgo.files.local import LocalFiles
from virgo.files.placement import Directory, Pool
from virgo.limits import PLACEMENT_ATTEMPTS_MAX
from virgo.module import NodeServices
from virgo.wire.resp import OK

_DIRECTORY = {"kind": "directory", "size": 0}


class Runner(Protocol):
    """Runs blocking work in a thread."""

    def __call__(self, work: Callable[..., Any], *arguments: Any) -> Awaitable[Any]: ...  # noqa: D102


class Operations:
    """What can be done with paths, on any node."""

    def __init__(
        self,
        *,
        node: NodeServices,
        local: LocalFiles,
        exports: frozenset[str],
        names: Directory,
        pool: Pool,
        run: Runner,
    ) -> None:
        self._node = node
        self._local = local
        self._exports = exports
        self._names = names
        self._pool = pool
        self._thread = run
        self.forwarded = 0

    # --- for callers --------------------------------------------------------------------------

    async def open(self, path: str, mode: Mode, *written: bytes) -> int:
        """Open a path wherever it lies; `written` is the mode as it came. Returns the descriptor."""
        place = core.locate(path, self._names.is_node)
        if place.kind is Kind.TOP or place.directory:
            raise translate(OSError(errno.EISDIR, os.strerror(errno.EISDIR)), f"open {path!r}")
        if place.kind is Kind.NODE:
            return int(await self._at(self._names.number(place.node), "OPEN", place, mode, *written))
        for _ in range(PLACEMENT_ATTEMPTS_MAX):
            number = await self._pool.find(place)
            if number is None:
                if not mode.create:
                    await self._refuse_directory(place, "open")
                    raise FileMissing(f"open {place.path!r}: no such file or directory")
                await self._check_free(place)
                number = self._pool.choose()
            with contextlib.suppress(Conflict):  # placed elsewhere in the meantime
                return int(await self._at(number, "OPEN", place, mode, *written))
        raise Conflict(f"the placement of {place.path!r} keeps changing", hint="Try again in a moment.")

    async def run(self, operation: str, path: str, *rest: str) -> Any:
        """STAT, LIST, REMOVE, MKDIR or RENAME, wherever it lies."""
        place = core.locate(path, self._names.is_node)
        if operation == "RENAME":
            return await self._rename(place, core.locate(rest[0], self._names.is_node))
        if place.kind is Kind.TOP:
            return self._run_top(operation)
        if place.kind is Kind.NODE:
            return await self._at(self._names.number(place.node), operation, place)
        return await self._run_pool(operation, place)

    # --- for nodes ----------------------------------------------------------------------------

    async def open_here(self, path: str, mode: Mode) -> int:
        """Open one of this node's own files, or a placed file that it holds."""
        place = self._own(path)
        spot = core.spot(place, self._exports)
        if place.kind is not Kind.POOL or not mode.create:
            return await self._open_local(spot, mode, place.path)
        async with self._pool.changing(place):
            holder = await self._pool.claim(place)
            if holder is None and await self._thread(self._local.exists, spot):
                await self._clear_stale(place, spot)
            return await self._open_local(spot, mode, place.path)

    async def run_here(self, operation: str, path: str, *rest: str) -> Any:
        """STAT, LIST, REMOVE, MKDIR or RENAME on this node's own files."""
        place = self._own(path)
        spot = core.spot(place, self._exports)
        shown = place.path
        if operation == "STAT":
            return msgspec.json.encode(await self._thread(self._status, spot, shown))
        if operation == "LIST":
            return await self._thread(self._listing, spot, shown)
        if operation == "REMOVE":
            async with self._pool.changing(place):
                try:
                    await self._thread(self._local.remove, spot, shown)
                except FileMissing:
                    await self._forget(place)
                    raise
                await self._forget(place)
        elif operation == "MKDIR":
            await self._thread(self._local.make_directory, spot, shown)
        elif operation == "RENAME" and rest:
            await self._rename_here(place, self._own(rest[0]))
        elif operation == "STALE":
            async with self._pool.changing(place):
                if not await self._pool.held_here(place):
                    with contextlib.suppress(FileMissing):
                        await self._thread(self._local.remove, spot, shown)
        else:
            raise BadArgument(
                f"FILES.HERE knows no operation {operation!r}",
                hint="It is for nodes; docs/wire.md has the rest.",
            )
        return OK

    async def _forget(self, place: Place) -> None:
        if place.kind is Kind.POOL:
            await self._pool.forget(place)

    # --- finding ------------------------------------------------------------------------------

    def _own(self, path: str) -> Place:
        """The place of a path on this node. Raises NoNode for another node's."""
        place = core.locate(path, lambda _name: True)
        if place.kind is Kind.TOP or (place.kind is Kind.NODE and place.node != self._node.name):
            raise NoNode(f"{path!r} is not on node {self._node.name}")
        return place

    async def _at(self, number: int, operation: str, place: Place, *rest: Any) -> Any:
        """Run the operation on that node; for OPEN, `rest` is the mode and its text."""
        if number == self._node.number:
            if operation == "OPEN":
                return await self.open_here(place.path, rest[0])
            return await self.run_here(operation, place.path, *rest)
        self.forwarded += 1
        sent = rest[1:] if operation == "OPEN" else rest
        reply = await self._node.call(number, "FILES.HERE", operation, place.path, *sent)
        return reply if operation in ("OPEN", "STAT", "LIST") else OK

    def _run_top(self, operation: str) -> bytes:
        if operation == "STAT":
            return msgspec.json.encode({"name": "/", **_DIRECTORY})
        if operation != "LIST":
            raise translate(OSError(errno.EBUSY, os.strerror(errno.EBUSY)), f"{operation.lower()} '/'")
        names = [member.name for member in self._node.members()]
        return msgspec.json.encode([{"name": name, **_DIRECTORY} for name in sorted({*names, POOL})])

    async def _open_local(self, spot: Spot, mode: Mode, shown: str) -> int:
        """Open in a thread; if the caller goes away meanwhile, the descriptor is closed."""
        work = asyncio.ensure_future(self._thread(self._local.open, spot, mode, shown))
        try:
            return int(await asyncio.shield(work))
        except asyncio.CancelledError:
            work.add_done_callback(self._abandon)
            raise

    def _abandon(self, work: asyncio.Future[int]) -> None:
        if not work.cancelled() and work.exception() is None:
            self._local.close(work.result())

    # --- the pool -----------------------------------------------------------------------------

    async def _run_pool(self, operation: str, place: Place) -> Any:
        if operation == "LIST":
            return await self._list_pool(place)
        if not place.parts:
            if operation == "STAT":
                return msgspec.json.encode({"name": POOL, **_DIRECTORY})
            raise translate(OSError(errno.EBUSY, os.strerror(errno.EBUSY)), f"{operation.lower()} /pool")
        number = await self._pool.find(place)
        if operation == "MKDIR":
            if await self._ask_all("STAT", place):
                raise FileThere(f"mkdir {place.path!r}: it exists already")
            return await self._at(self._node.number if number is None else number, operation, place)
        if number is not None:
            return await self._at(number, operation, place)
        holders = await self._directories(place)
        if not holders:
            raise FileMissing(f"{operation.lower()} {place.path!r}: no such file or directory")
        if operation == "STAT":
            return msgspec.json.encode({"name": place.parts[-1], **_DIRECTORY})
        if msgspec.json.decode(await self._list_pool(place)):
            code = errno.ENOTEMPTY
            raise translate(OSError(code, os.strerror(code)), f"remove {place.path!r}")
        for holder in holders:
            with contextlib.suppress(FileMissing):
                await self._at(holder, operation, place)
        return OK

    async def _ask_all(self, operation: str, place: Place) -> dict[int, Any]:
        """The operation's answers of all nodes that have the path; lost nodes do not answer."""
        numbers = [member.number for member in self._node.members()]
        answers = await asyncio.gather(
            *[self._at(number, operation, place) for number in numbers], return_exceptions=True
        )
        found = {}
        for number, answer in zip(numbers, answers, strict=True):
            if isinstance(answer, BaseException):
                if not isinstance(answer, FileMissing | NodeLost | NoNode):
                    raise answer
            else:
                found[number] = answer
        return found

    async def _directories(self, place: Place) -> list[int]:
        """The nodes that have this pool directory."""
        answers = await self._ask_all("STAT", place)
        return [
            number for number, answer in answers.items() if msgspec.json.decode(answer)["kind"] == "directory"
        ]

    async def _check_free(self, place: Place) -> None:
        """Refuse to place a file where the pool has a directory, or below a file.

        Without a lock over the whole pool this is a courtesy: of two who create `a` and `a/b` at the same
        moment both may succeed, and both files can be reached.
        """
        above = [Place(Kind.POOL, parts=place.parts[:length]) for length in range(1, len(place.parts))]
        holders = await asyncio.gather(self._refuse_directory(place, "open"), *map(self._pool.find, above))
        for ancestor, holder in zip(above, holders[1:], strict=True):
            if holder is not None and self._pool.rule(ancestor) is None:
                code = errno.ENOTDIR
                raise translate(OSError(code, os.strerror(code)), f"open {place.path!r}")

    async def _refuse_directory(self, place: Place, operation: str) -> None:
        if await self._directories(place):
            code = errno.EISDIR
            raise translate(OSError(code, os.strerror(code)), f"{operation} {place.path!r}")

    async def _list_pool(self, place: Place) -> bytes:
        """The union of all nodes' directories, and the registered files of those that do not answer."""
        if place.parts and self._pool.rule(place) is None and await self._pool.find(place) is not None:
            code = errno.ENOTDIR
            raise translate(OSError(code, os.strerror(code)), f"list {place.path!r}")
        answers = await self._ask_all("LIST", place)
        named = {self._node.member(number).name: answer for number, answer in answers.items()}
        merged = await self._thread(_merge, named)
        registered = await self._pool.names_below(place) if self._names.some_lost() else {}
        for name, directory in registered.items():
            if name not in merged and not directory:
                merged.update(await self._lost_entry(Place(Kind.POOL, parts=(*place.parts, name))))
        if not answers and not merged and place.parts:
            raise FileMissing(f"list {place.path!r}: no such file or directory")
        return bytes(await self._thread(_encode_listing, merged))

    async def _lost_entry(self, place: Place) -> dict[str, dict[str, Any]]:
        """A registered file that no node shows: of a lost node it is listed, otherwise it is gone."""
        number = await self._pool.find(place)
        if number is None or any(member.number == number for member in self._node.members()):
            return {}
        name = place.parts[-1]
        shown = {
            **core.name_fields(name),
            "kind": "file",
            "node": self._node.member(number).name,
            "lost": True,
        }
        return {name: shown}

    # --- renaming -----------------------------------------------------------------------------

    async def _rename(self, place: Place, new: Place) -> Any:
        if Kind.TOP in (place.kind, new.kind) or not place.parts or not new.parts:
            raise translate(OSError(errno.EBUSY, os.strerror(errno.EBUSY)), f"rename {place.path!r}")
        holder, target = await self._holder(place), await self._holder(new)
        if holder is None:
            await self._refuse_directory(place, "rename")
            raise FileMissing(f"rename {place.path!r}: no such file or directory")
        crossing = place.kind is not new.kind
        fixed = new.kind is Kind.NODE or self._pool.rule(new) is not None
        if crossing or (fixed and holder != target):
            raise translate(
                OSError(errno.EXDEV, os.strerror(errno.EXDEV)), f"rename {place.path!r} to {new.path!r}"
            )
        return await self._at(holder, "RENAME", place, new.path)

    async def _holder(self, place: Place) -> int | None:
        if place.kind is Kind.NODE:
            return self._names.number(place.node)
        return await self._pool.find(place)

    async def _rename_here(self, place: Place, new: Place) -> None:
        """Rename on this node; a placed file takes its register along."""
        spot, new_spot = core.spot(place, self._exports), core.spot(new, self._exports)
        if place.kind is not Kind.POOL or place == new:
            await self._thread(self._local.rename, spot, new_spot, place.path)
            return
        async with self._pool.changing(place, new):
            if not await self._pool.held_here(place):
                raise Conflict(f"{place.path!r} moved to another node", hint="Try again.")
            before = await self._pool.find(new)
            if before is None or before == self._node.number:
                await self._thread(self._local.status, spot, place.path)
                await self._pool.claim(new)
                await self._thread(self._local.rename, spot, new_spot, place.path)
            else:  # the old file is seen until the register leads to the new one
                await self._thread(self._local.link_over, spot, new_spot, place.path)
                before = await self._pool.claim(new, take_over=True)
                await self._thread(self._local.remove, spot, place.path)
            await self._pool.forget(place)
        if before not in (None, self._node.number):
            with contextlib.suppress(VirgoError):  # what is left there is out of reach, and cleared on use
                await self._at(int(before or 0), "STALE", new)

    async def _clear_stale(self, place: Place, spot: Spot) -> None:
        """What has the name of a new placed file: a directory, or the remains of a replaced one."""
        status = await self._thread(self._local.status, spot, place.path)
        if status["kind"] != "directory":
            await self._thread(self._local.remove, spot, place.path)

    # --- blocking -----------------------------------------------------------------------------

    def _status(self, spot: Spot, shown: str) -> dict[str, Any]:
        return {**self._local.status(spot, shown), "node": self._node.name}

    def _listing(self, spot: Spot, shown: str) -> bytes:
        entries = self._local.list(spot, shown)
        if spot.root == PRIVATE and not spot.path and self._exports:
            own = [item for item in entries if item["name"] not in self._exports]
            entries = own + [{"name": name, **_DIRECTORY} for name in self._exports]
            entries.sort(key=lambda item: str(item["name"]))
        return msgspec.json.encode(entries)


def _merge(answers: dict[str, bytes]) -> dict[str, dict[str, Any]]:
    """The entries of all nodes' listings by name; a directory is one, whoever has it."""
    merged: dict[str, dict[str, Any]] = {}
    for node, answer in answers.items():
        for item in msgspec.json.decode(answer):
            if item["kind"] != "directory":
                item["node"] = node
            merged.setdefault(core.entry_name(item), item)
    return merged


def _encode_listing(entries: dict[str, dict[str, Any]]) -> bytes:
    return msgspec.json.encode([entries[name] for name in sorted(entries)])
