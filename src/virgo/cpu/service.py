"""The processor pool of a node, as a module: its commands, its figures.

| command | role | |
| --- | --- | --- |
| `VIRGO_CLONE name [word...]` | write | run by name; for every language |
| `CPU.EXPORTS` | read | what can be called by name |
| `CPU.CANCEL key...` | write | end calls, and answer when they are dead |
| `CPU.CALL`, `CPU.INVOKE` | exec, write | run a pickled callable, or a name with MessagePack arguments |
| `....SUBMIT`, `CPU.COLLECT` | | the same for many at once, see `mailbox` |
| `....HERE` | | the same between nodes: run on this very node |
| `CPU.CREW`, `CPU.LEASE`, `....STOP`, `....END` | write | workers for a client alone, see `leases` |
| `CPU.PS`, `CPU.LOG` | read | what runs, what a call has written, see `sight` |
| `CPU.PUBLISH`, `CPU.UNPUBLISH` | exec | functions of the whole cloud |

Nothing that arrives is unpickled in this process, only in workers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import msgspec
import psutil

from virgo import context as contexts
from virgo.cpu import messages
from virgo.cpu.dispatch import Dispatcher
from virgo.cpu.exports import check_name
from virgo.cpu.leases import Leases
from virgo.cpu.mailbox import Mailboxes
from virgo.cpu.messages import Options
from virgo.cpu.placement import workers_of
from virgo.cpu.pool import WorkerPool
from virgo.cpu.programs import allowlist
from virgo.cpu.published import Published, PublishedFunction
from virgo.cpu.sight import Sight
from virgo.cpu.stock import Stock, gpus_here
from virgo.errors import BadArgument
from virgo.members import Load
from virgo.module import NodeServices
from virgo.wire import args, resp
from virgo.wire.commands import Command
from virgo.wire.session import Session

_LONGEST = 10  # labels that are shown with their durations
_CLIENTS = "These commands are for VIRGO's own clients; any other calls by name with VIRGO_CLONE."


class CpuModule:
    """Runs calls on the least loaded node."""

    name = "cpu"
    requires: tuple[str, ...] = ()
    summary = "runs functions and programs on the least loaded node"

    def __init__(self, services: NodeServices) -> None:
        self._services = services
        self._programs: dict[str, list[str]] = {}
        self._pool: WorkerPool | None = None
        self._published = Published(services.engine)
        self._mailboxes = Mailboxes()
        self._dispatcher: Dispatcher | None = None
        self._leases: Leases | None = None

    def __repr__(self) -> str:
        return f"<CpuModule of {self._services.name} {self._pool!r}>"

    async def start(self) -> None:
        """Start the workers. Raises BadConfig, NotLoaded."""
        config = self._services.config
        self._programs = allowlist(config.cpu.programs)
        self._pool = WorkerPool(
            node=self._services.name,
            directory=self._services.directory / self.name,
            target=self._target(),
            imports=config.cpu.imports,
            environment=self._environment(),
            stock=Stock(gpus=self._gpus(), memory=psutil.virtual_memory().total),
            memory_bytes=config.cpu.memory_bytes,
        )
        self._dispatcher = Dispatcher(
            self._services,
            self._pool,
            self._programs,
            self._published,
            self._own,
            chance=random.Random(),  # noqa: S311 - it spreads load, it keeps no secret
        )
        self._leases = Leases(self._services, self._dispatcher)
        await self._pool.start()
        await self._published.start()

    async def stop(self) -> None:
        """End all workers and what they run."""
        await self._published.stop()
        if self._pool is not None and self._dispatcher is not None:
            self._dispatcher.seating.close()
            await self._pool.stop()  # calls fail with NodeLost, and those who wait for them are told
            self._pool = self._dispatcher = self._leases = None
        self._mailboxes.close()

    def stats(self) -> dict[str, Any]:
        """Workers and calls of this node, and the calls that it sent to others."""
        if self._pool is None or self._dispatcher is None or self._leases is None:
            return {}
        return {
            **self._pool.stats(),
            **self._leases.stats(),
            "clients": len(self._mailboxes),
            "unplaced": self._dispatcher.seating.waiting,
            "forwarded": dict(self._dispatcher.forwarded),
            "longest_s": self._dispatcher.seating.durations.longest(_LONGEST),
        }

    def load(self, load: Load) -> Load:
        """Fill in `outstanding`, and take this node's share of the machine."""
        if self._pool is None:
            return load
        self._pool.retarget(self._target())
        if self._dispatcher is not None:
            self._dispatcher.seating.go_on()
        return self._own(load)

    def _own(self, load: Load) -> Load:
        """A load with what this module knows filled in."""
        if self._pool is None:
            return load
        stock = self._pool.stock
        return msgspec.structs.replace(
            load,
            outstanding=self._pool.outstanding,
            workers=self._pool.target,
            gpus=stock.gpus,
            gpus_free=stock.gpus_free,
            calls_memory_bytes=stock.memory,
            calls_memory_free_bytes=min(stock.memory_left, load.memory_free_bytes or stock.memory_left),
        )

    def _gpus(self) -> int:
        configured = self._services.config.cpu.gpus
        if configured >= 0:
            return configured
        return gpus_here() if self._services.index == 1 else 0

    def commands(self) -> Sequence[Command]:
        """See the module."""
        dispatcher, leases = self._dispatcher, self._leases
        assert dispatcher is not None and leases is not None

        async def call(_session: Session, request: list[bytes]) -> bytes:
            return await dispatcher.dispatch(_options(request[1], "pickle"), request[2], request[3:])

        async def invoke(_session: Session, request: list[bytes]) -> bytes:
            return await dispatcher.dispatch(_named(request), request[2], request[3:])

        async def call_here(_session: Session, request: list[bytes]) -> bytes:
            return await dispatcher.run_here(_options(request[1], "pickle"), request[2], request[3:])

        async def invoke_here(_session: Session, request: list[bytes]) -> bytes:
            return await dispatcher.run_here(_named(request), request[2], request[3:])

        def crew(session: Session, request: list[bytes]) -> list[int]:
            return leases.crew(session, request[1])

        async def lease(session: Session, request: list[bytes]) -> Any:
            return await leases.lease(session, messages.decode_options(request[1]))

        async def stop(_session: Session, request: list[bytes]) -> int:
            return await leases.stop(request[1], args.integer(request[2], "lease"))

        async def end(_session: Session, request: list[bytes]) -> bytes:
            return await leases.end(request[1], args.integer(request[2], "lease"))

        def freight(_session: Session, request: list[bytes]) -> bytes:
            at, size = args.integer(request[2], "at"), args.integer(request[3], "size")
            return dispatcher.freight.serve(request[1].decode("utf-8", "replace"), at, size)

        assert self._pool is not None
        usage = "options function arguments"
        return [
            *Sight(self._services, self._pool).commands(),
            Command(
                "VIRGO_CLONE", self._clone, "write", 1, None, concurrent=True, usage="name [argument...]",
                summary="Run an exported function or program on the least loaded node.",
            ),
            Command(
                "VIRGO_TEST", self._test, "write", 0, None, concurrent=True, usage="[argument...]",
                aliases=("VIRGO_TEST_KERNELSPACE",), summary="The reference system's test target.",
            ),
            Command("CPU.EXPORTS", self._exports, "read", summary="What can be called: name, kind, summary."),
            Command("CPU.CANCEL", self._cancel, "write", 1, None, concurrent=True, usage="key...",
                    summary="End calls; answers when they are dead, how many there were."),
            Command("CPU.CALL", call, "exec", 3, 3, concurrent=True, usage=usage),
            Command("CPU.INVOKE", invoke, "write", 2, None, concurrent=True, usage=usage),
            Command("CPU.CALL.HERE", call_here, "exec", 3, 3, concurrent=True, usage=usage),
            Command("CPU.INVOKE.HERE", invoke_here, "write", 2, None, concurrent=True, usage=usage),
            Command("CPU.FREIGHT", freight, "exec", 3, 3, usage="token at size",
                    summary="A piece of large buffers that another machine is to have."),
            Command("CPU.CALL.SUBMIT", self._submit, "exec", 4, 4, usage=f"mailbox {usage}",
                    summary="Begin a call; answers its id, its outcome is collected."),
            Command("CPU.INVOKE.SUBMIT", self._submit, "write", 4, 4, usage=f"mailbox {usage}"),
            Command("CPU.COLLECT", self._collect, "write", 1, 1, usage="mailbox",
                    summary="Outcomes of submitted calls: key, error, outcome, key, ..."),
            Command("CPU.CREW", crew, "write", 1, 1, usage="key",
                    summary="Lease workers until this connection closes; answers the nodes of this machine."),
            Command("CPU.LEASE", lease, "write", 1, 1, usage="options",
                    summary="Hand this connection to a worker, or say who has one."),
            Command("CPU.LEASE.STOP", stop, "write", 2, 2, concurrent=True, usage="key lease"),
            Command("CPU.LEASE.END", end, "write", 2, 2, concurrent=True, usage="key lease",
                    summary="How a leased worker ended."),
            Command("CPU.PUBLISH", self._publish, "exec", 2, 3, usage="name function [summary]",
                    summary="Let a cloudpickled function be called by name on every node."),
            Command("CPU.UNPUBLISH", self._unpublish, "exec", 1, 1, usage="name"),
        ]  # fmt: skip

    # --- calls --------------------------------------------------------------------------------

    async def _clone(self, _session: Session, request: list[bytes]) -> Any:
        assert self._dispatcher is not None
        label = request[1][:64].decode("utf-8", "replace")
        options = Options(label=label, form="text")
        return messages.as_reply(await self._dispatcher.dispatch(options, request[1], request[2:]))

    async def _test(self, session: Session, request: list[bytes]) -> Any:
        return await self._clone(session, [b"VIRGO_CLONE", b"virgo_cloud_test", *request[1:]])

    def _submit(self, session: Session, request: list[bytes]) -> bytes:
        assert self._dispatcher is not None
        form: messages.Form = "pickle" if request[0].upper().startswith(b"CPU.CALL") else "data"
        options = _options(request[2], form)
        if not options.key:
            raise BadArgument(f"{request[0].decode()} needs a key in its options", hint=_CLIENTS)
        context = contexts.current() or contexts.Context(id=contexts.new_id(), identity=session.identity)
        mailbox = self._mailboxes.of(request[1], context.identity.name, session)
        with contexts.using(context):
            work = self._dispatcher.dispatch(options, request[3], request[4:])
            mailbox.submit(options.key.encode(), work)
        return context.id.encode()

    async def _collect(self, session: Session, request: list[bytes]) -> list[bytes]:
        context = contexts.current()
        assert context is not None
        return await self._mailboxes.find(request[1], context.identity.name, session).collect()

    async def _cancel(self, _session: Session, request: list[bytes]) -> int:
        assert self._dispatcher is not None
        return await self._dispatcher.cancel_all([key.decode("utf-8", "replace") for key in request[1:]])

    # --- names --------------------------------------------------------------------------------

    async def _exports(self, _session: Session, _request: list[bytes]) -> list[list[str]]:
        assert self._pool is not None
        listing = [[name, "function", summary] for name, summary in self._pool.exports.items()]
        listing += [[name, "program", " ".join(command)] for name, command in self._programs.items()]
        published = await self._published.listing()
        listing += [[name, "published", one.summary] for name, one in published.items()]
        return sorted(listing)

    async def _publish(self, _session: Session, request: list[bytes]) -> int:
        assert self._pool is not None
        context = contexts.current()
        name = check_name(args.text(request[1], "name"))
        if name in self._pool.exports or name in self._programs:
            raise BadArgument(
                f"{name!r} is the name of a function or program that nodes offer themselves",
                hint="Publish it under another name.",
            )
        summary = args.text(request[3], "summary") if len(request) > 3 else ""
        publisher = context.identity.name if context is not None else ""
        return await self._published.publish(name, PublishedFunction(request[2], summary, publisher))

    async def _unpublish(self, _session: Session, request: list[bytes]) -> resp.Encoded:
        await self._published.withdraw(check_name(args.text(request[1], "name")))
        return resp.OK

    # --- this node ----------------------------------------------------------------------------

    def _target(self) -> int:
        """Workers that run at once: as configured, else this node's share of the processors."""
        configured = self._services.config.cpu.workers
        if configured:
            return configured
        members = self._services.members()
        own = next((one for one in members if one.number == self._services.number), None)
        if own is None:
            return 1
        own = msgspec.structs.replace(own, load=msgspec.structs.replace(own.load, workers=0))
        return workers_of(own, members)

    def _environment(self) -> dict[str, str]:
        """What lets a call on a worker find this node again."""
        config = self._services.config
        own = self._services.member(self._services.number)
        found = {"VIRGO_HOME": str(config.home), "VIRGO_URL": f"unix:{own.socket}"}
        if self._gpus():  # they are for the calls that ask for some
            found["CUDA_VISIBLE_DEVICES"] = ""
        return found


def _named(request: list[bytes]) -> Options:
    """The options of a call by name; the form `data` has one payload, `text` any number of words."""
    options = _options(request[1], "data")
    if options.form == "data" and len(request) != 4:
        raise BadArgument(f"a call of the form 'data' has one payload, not {len(request) - 3}", hint=_CLIENTS)
    return options


def _options(data: bytes, form: messages.Form) -> Options:
    """The options of a call whose command stands for `form`. Raises BadRequest, BadArgument."""
    options = messages.decode_options(data)
    if (options.form == "pickle") is not (form == "pickle"):
        raise BadArgument(
            f"a call of the form {options.form!r} came by the command for {form!r}", hint=_CLIENTS
        )
    return options
