"""The pool: which node holds a placed path.

A placement rule of the configuration decides, else the register `files/place/PATH` in the engine. The node
that holds a file makes, moves and removes its register itself, under a lock of its own, in an order that
leaves at worst a register without a file, which means the same as no register:

    create   register, then file
    rename   register of the new name, then the file's new name, then the old register
    remove   file, then register

So a register never leads to the wrong file, and no file is out of reach of its register after a crash.
A file that is found without a register of this node is what such a crash left of a file that was replaced
or removed; it is deleted before a new one takes its name.
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import AsyncIterator

import msgspec

from virgo.engine.base import Register
from virgo.errors import Conflict, NoNode
from virgo.files import core
from virgo.files.core import Place
from virgo.limits import PLACEMENT_ATTEMPTS_MAX
from virgo.members import Member
from virgo.module import NodeServices


class _Placed(msgspec.Struct, frozen=True):
    """The value of a register."""

    node: int


class Directory:
    """Nodes by name, as paths name them."""

    def __init__(self, node: NodeServices) -> None:
        self._node = node
        self._known: dict[str, int] = {}  # names of nodes never change, so what was seen stays true

    def number(self, name: str) -> int:
        """The number of the registered node of that name, up or lost. Raises NoNode."""
        number = self.find(name)
        if number is None:
            raise NoNode(f"no node is called {name!r}")
        return number

    def find(self, name: str) -> int | None:
        """The same, or None."""
        if name == self._node.name:
            return self._node.number
        if name not in self._known:
            self._learn()
        return self._known.get(name)

    def is_node(self, name: str) -> bool:
        """Whether it is a registered node's name."""
        return self.find(name) is not None

    def some_lost(self) -> bool:
        """Whether a registered node is not up."""
        self._learn()
        return len(self._known) > len(self._node.members())

    def _learn(self) -> None:
        self._known.update((member.name, member.number) for member in self._node.known())


class Pool:
    """Placement as one node sees and changes it."""

    def __init__(self, node: NodeServices, directory: Directory) -> None:
        self._node = node
        self._directory = directory
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    @contextlib.asynccontextmanager
    async def changing(self, *places: Place) -> AsyncIterator[None]:
        """Alone with the names of these places on this node."""
        async with contextlib.AsyncExitStack() as stack:
            for placed in sorted({place.placed for place in places}):
                lock = self._locks.get(placed)
                if lock is None:
                    lock = self._locks[placed] = asyncio.Lock()
                await stack.enter_async_context(lock)
            yield

    def rule(self, place: Place) -> int | None:
        """The node that a rule names. Raises NoNode if the rule names none of this cloud."""
        name = core.ruled(place.parts, self._node.config.files.placement)
        if name is None:
            return None
        number = self._directory.find(name)
        if number is None:
            raise NoNode(
                f"files.placement puts {place.path!r} on {name!r}, which is no node of this cloud",
                hint="Mend the rule in the configuration, or start that node.",
            )
        return number

    async def find(self, place: Place) -> int | None:
        """The node that holds the file, or would hold it; None if nothing says so."""
        number = self.rule(place)
        if number is not None or not place.parts:
            return number
        register = await self._register(place)
        return None if register is None else _node_of(register)

    def choose(self) -> int:
        """The node for a new file."""
        members: list[Member] = [member for member in self._node.members() if member.state == "up"]
        number = core.roomiest(members, self._node.number)
        return self._node.number if number is None else number

    async def held_here(self, place: Place) -> bool:
        """Whether a rule or the register says that this node holds the file."""
        return await self.find(place) == self._node.number

    async def claim(self, place: Place, *, take_over: bool = False) -> int | None:
        """Make the register say that this node holds the file.

        Returns the node that held it before, None if none did.

        Raises:
            Conflict: another node holds it, unless `take_over`.
        """
        if self.rule(place) is not None:
            return self._node.number
        for _ in range(PLACEMENT_ATTEMPTS_MAX):
            register = await self._register(place)
            holder = None if register is None else _node_of(register)
            if holder == self._node.number:
                return holder
            if holder is not None and not take_over:
                raise Conflict(
                    f"{place.path!r} is placed on another node", hint="Try again: it moved meanwhile."
                )
            with contextlib.suppress(Conflict):
                await self._node.engine.registers.compare_and_set(
                    core.register_name(place.placed),
                    msgspec.json.encode(_Placed(self._node.number)),
                    version=0 if register is None else register.version,
                )
                return holder
        raise Conflict(f"the placement of {place.path!r} keeps changing", hint="Try again in a moment.")

    async def forget(self, place: Place) -> None:
        """Delete the register if it says that this node holds the file."""
        register = None if self.rule(place) is not None else await self._register(place)
        if register is not None and _node_of(register) == self._node.number:
            with contextlib.suppress(Conflict):  # another node took it over
                await self._node.engine.registers.delete(register.name, version=register.version)

    async def names_below(self, place: Place) -> dict[str, bool]:
        """First names below a pool directory, by registers; True for those that are directories."""
        prefix = core.register_name("".join(f"{name}/" for name in place.parts))
        found: dict[str, bool] = {}
        for name in await self._node.engine.registers.names(prefix):
            first, slash, _ = core.placed_of(name)[len(core.placed_of(prefix)) :].partition("/")
            found[first] = bool(slash)
        return found

    async def _register(self, place: Place) -> Register | None:
        return await self._node.engine.registers.get(core.register_name(place.placed))


def _node_of(register: Register) -> int:
    return msgspec.json.decode(register.value, type=_Placed).node
