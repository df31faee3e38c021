"""What all nodes are at, and what a call has written; and ending one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec

from virgo import context as contexts
from virgo.cpu.pool import WorkerPool
from virgo.cpu.seen import TaskInfo, Written
from virgo.errors import BadArgument, Denied, VirgoError
from virgo.limits import CALL_TERMINATE_S, OUTPUT_READ_BYTES
from virgo.module import NodeServices
from virgo.wire import args, resp
from virgo.wire.commands import Command
from virgo.wire.session import Session

_LOOK_S = CALL_TERMINATE_S + 3.0  # for the answers of other nodes


def _check_owner(task: str, owner: str) -> None:
    context = contexts.current()
    if context is not None and context.identity.name != owner and not context.identity.may("admin"):
        raise Denied(
            f"call {task} is another identity's",
            hint="Its owner may see what it wrote and end it, and an admin.",
        )


class Sight:
    """Answers for this node, and for all.

    Args:
        services: the node.
        pool: its workers.
    """

    def __init__(self, services: NodeServices, pool: WorkerPool) -> None:
        self._services = services
        self._pool = pool

    def __repr__(self) -> str:
        return f"<Sight of {self._services.name}>"

    def commands(self) -> Sequence[Command]:
        """The commands that look."""
        return [
            Command("CPU.PS", self._ps, "read", concurrent=True,
                    summary="What runs and what waits, on all nodes that answer, as JSON."),
            Command("CPU.PS.HERE", self._ps_here, "read", summary="The same of this node."),
            Command("CPU.LOG", self._log, "read", 1, 3, concurrent=True, usage="task [offset [FOLLOWS]]",
                    summary="What a call has written, from an offset on, as MessagePack."),
            Command("CPU.LOG.HERE", self._log_here, "read", 1, 3, usage="task [offset [FOLLOWS]]"),
            Command("CPU.KILL", self._kill, "write", 1, 1, concurrent=True, usage="task",
                    summary="End a call that runs or waits on any node; answers when it is dead."),
            Command("CPU.KILL.HERE", self._kill_here, "write", 1, 1, concurrent=True, usage="task"),
        ]  # fmt: skip

    def _ps_here(self, _session: Session, _request: list[bytes]) -> bytes:
        return msgspec.json.encode(self._pool.tasks())

    async def _ps(self, session: Session, request: list[bytes]) -> bytes:
        found = msgspec.json.decode(self._ps_here(session, request), type=list[TaskInfo])
        for answer in await self._ask_others("CPU.PS.HERE"):
            if not isinstance(answer, VirgoError):
                found += msgspec.json.decode(answer, type=list[TaskInfo])
        return msgspec.json.encode(found)

    def _log_here(self, _session: Session, request: list[bytes]) -> bytes:
        task = args.text(request[1], "task")
        offset = args.integer(request[2], "offset") if len(request) > 2 else 0
        entry = self._pool.output(task)
        if entry is None or offset < 0:
            raise BadArgument(
                f"no call {task[:80]!r} has written anything that is kept here",
                hint="`virgo ps` shows the calls that run; only the last MiB of each worker is kept.",
            )
        _check_owner(task, entry.owner)
        follows = len(request) > 3
        start, data = self._pool.outputs.read(entry, offset, OUTPUT_READ_BYTES, follows=follows)
        written = Written(task, self._services.name, entry.label, data, start, entry.ended)
        return msgspec.msgpack.encode(written)

    async def _log(self, session: Session, request: list[bytes]) -> Any:
        try:
            return self._log_here(session, request)
        except BadArgument as error:
            return await self._found_elsewhere(error, "CPU.LOG.HERE", *request[1:])

    async def _kill_here(self, _session: Session, request: list[bytes]) -> resp.Encoded:
        task = args.text(request[1], "task")
        call = self._pool.kills.find(task)
        if call is not None:
            _check_owner(task, call.owner)
            context = contexts.current()
            if await self._pool.kills.kill(
                call, task, "the node" if context is None else context.identity.name
            ):
                return resp.OK
        raise BadArgument(
            f"no call {task[:80]!r} runs or waits on a node",
            hint="`virgo ps` shows those that do. It may have ended.",
        )

    async def _kill(self, session: Session, request: list[bytes]) -> Any:
        try:
            return await self._kill_here(session, request)
        except BadArgument as error:
            return await self._found_elsewhere(error, "CPU.KILL.HERE", *request[1:])

    async def _found_elsewhere(self, missing: BadArgument, *request: bytes | str) -> Any:
        """The answer of the node that has it. Raises `missing` if none has."""
        answers = await self._ask_others(*request)
        for answer in answers:
            if not isinstance(answer, VirgoError):
                return answer
        for answer in answers:
            if not isinstance(answer, BadArgument):  # it did not answer, so it may be the one
                raise answer
        raise missing

    async def _ask_others(self, *request: bytes | str) -> list[Any]:
        """The answers of the other nodes, or the errors."""
        others = [one for one in self._services.members() if one.number != self._services.number]
        calls = [self._services.call(one.number, *request, timeout_s=_LOOK_S) for one in others]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, VirgoError):
                raise answer
        return answers
