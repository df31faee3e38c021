"""The processes behind the workers: one template, and what it forks.

`TemplateProcess` starts the template and starts it again when it dies; workers that it had forked before
go on. `WorkerProcess` is the node's end of one worker: its connection, and the lifeline whose closing
makes the kernel kill the worker's process group. Neither knows what a call is; the pool does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Protocol, cast

import hiredis
import msgspec

from virgo.cpu.outputs import Outputs
from virgo.errors import BadConfig, NotLoaded
from virgo.limits import CALL_TERMINATE_S, RESTART_BACKOFF_S_MAX, TEMPLATE_START_S, WORKER_STATUS_S

log = logging.getLogger("virgo.cpu")

_CONTROL_BYTES: Final = 256 * 1024
_BACKOFF_S: Final = 0.1


class Owner(Protocol):
    """Who is told what becomes of workers: the pool."""

    def answered(self, worker: WorkerProcess, flags: bytes, outcome: bytes) -> None:
        """The worker has answered its request."""

    def ended(self, worker: WorkerProcess) -> None:
        """The worker is dead; `worker.status` says how, if that is known. Told once."""


class WorkerProcess(asyncio.Protocol):
    """The node's end of one worker.

    Attributes:
        number: its number in this node; never given again.
        pid: its process, 0 until the template has told it.
        known: digests of the functions that it has, the least recently used first.
        gone: done when it is dead.
        ending: why the node ends it, "" while it does not.
        status: its exit status, negative for a signal; None if unknown.
    """

    def __init__(self, owner: Owner, template: TemplateProcess, number: int) -> None:
        self.number = number
        self.pid = 0
        self.known: OrderedDict[bytes, None] = OrderedDict()
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.ending = ""
        self.status: int | None = None
        self._owner = owner
        self._template = template
        self._lifeline = -1
        self._reader = hiredis.Reader()
        self._transport: asyncio.Transport | None = None

    def __repr__(self) -> str:
        state = "gone" if self.gone.done() else self.ending or "up"
        return f"<WorkerProcess {self.number} pid={self.pid} {state}>"

    def hold_lifeline(self, descriptor: int) -> None:
        """Own the write end of its lifeline."""
        self._lifeline = descriptor

    def send(self, *parts: bytes) -> None:
        """Send a request; if the worker is gone, `ended` follows."""
        if self._transport is not None:
            self._transport.write(hiredis.pack_command(parts))  # type: ignore[arg-type]

    def hand(self, descriptors: Sequence[int], *parts: bytes) -> None:
        """Send a request with descriptors, which are closed here; it must be idle. Raises OSError."""
        try:
            if self._transport is not None:
                plain = self._transport.get_extra_info("socket")
                with socket.socket(fileno=os.dup(plain.fileno())) as own:
                    socket.send_fds(own, [hiredis.pack_command(parts)], descriptors)  # type: ignore[arg-type]
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to its process group, if it has not ended."""
        self._template.signal(self.number, number)

    def terminate(self, reason: str) -> None:
        """End it: SIGTERM to its process group, and SIGKILL if that is not enough."""
        if not self.ending:
            self.ending = reason
            self.signal(signal.SIGTERM)
            self.signal(signal.SIGCONT)  # it may be held, see `flow`
            asyncio.get_running_loop().call_later(CALL_TERMINATE_S, self.kill)

    def kill(self, reason: str = "") -> None:
        """End it at once, with its process group."""
        self.ending = self.ending or reason
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1
            self.signal(signal.SIGKILL)  # in case the call closed its end

    def bury(self) -> None:
        """It is dead: let go of everything, and tell."""
        if not self.gone.done():
            self.gone.set_result(None)
            self.kill()
            if self._transport is not None:
                self._transport.abort()
            self._owner.ended(self)

    # --- the transport's side -----------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection is there."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are of no common class

    def data_received(self, data: bytes) -> None:
        """Read answers."""
        try:
            self._reader.feed(data)
            while (reply := self._reader.gets()) is not False:
                flags, outcome = reply
                self._owner.answered(self, flags, outcome)
        except (hiredis.ProtocolError, TypeError, ValueError):
            log.warning("worker %d wrote what is no answer; a call has used its connection", self.number)
            self.kill()

    def connection_lost(self, error: Exception | None) -> None:
        """It has died, or its call has closed the connection: either way it is of no use any more."""
        self._transport = None
        self.kill()
        # Only the template learns how it ended.
        wait_s = WORKER_STATUS_S if self._template.alive and self.pid else 0.0
        asyncio.get_running_loop().call_later(wait_s, self.bury)


class TemplateProcess:
    """The template of a node.

    Args:
        owner: who is told what becomes of workers.
        node, imports: see `template.Settings`.
        log_path: file for what the template and the workers write.
        environment: their environment variables.
    """

    def __init__(
        self, owner: Owner, *, node: str, imports: Sequence[str], log_path: Path, environment: dict[str, str]
    ) -> None:
        self.exports: dict[str, str] = {}
        self._owner = owner
        self._settings = msgspec.json.encode({"node": node, "imports": list(imports)}).decode()
        self._log_path = log_path
        self._environment = environment
        self._workers: dict[int, WorkerProcess] = {}
        self._control: socket.socket | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._ready: asyncio.Future[None] | None = None
        self._restart: asyncio.Task[None] | None = None
        self._stopping = False
        self.restarts = 0

    def __repr__(self) -> str:
        return f"<TemplateProcess pid={self.pid} {'up' if self.alive else 'down'} restarts={self.restarts}>"

    @property
    def alive(self) -> bool:
        """Whether workers can be forked."""
        return self._control is not None and self._ready is not None and self._ready.done()

    @property
    def pid(self) -> int:
        """Its process, 0 before the start."""
        return self._process.pid if self._process is not None else 0

    async def start(self) -> None:
        """Start it and wait until its imports are done.

        Raises:
            BadConfig: a configured module cannot be imported.
            NotLoaded: it does not come up.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        loop = asyncio.get_running_loop()
        try:
            with theirs, self._log_path.open("ab") as output:
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable, "-P", "-m", "virgo.cpu.template", str(theirs.fileno()), self._settings,
                    stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output,
                    pass_fds=[theirs.fileno()], env=self._environment, start_new_session=True,
                )  # fmt: skip
        except OSError as error:
            ours.close()
            raise NotLoaded(f"the template of the workers could not be started: {error}") from error
        self._ready = loop.create_future()
        self._control = ours
        loop.add_reader(ours.fileno(), self._read)
        try:
            async with asyncio.timeout(TEMPLATE_START_S):
                await self._ready
        except TimeoutError:
            await self._shut()
            raise NotLoaded(
                f"the template of the workers did not come up within {TEMPLATE_START_S:.0f} s",
                hint=f"Does a module of cpu.imports take so long? See {self._log_path}.",
            ) from None
        except BaseException:
            await self._shut()
            raise

    async def stop(self) -> None:
        """End it, and with it every worker."""
        self._stopping = True
        if self._restart is not None:
            self._restart.cancel()
            await asyncio.gather(self._restart, return_exceptions=True)
        for worker in list(self._workers.values()):
            worker.kill("the node is stopping")
        await self._shut()
        for worker in list(self._workers.values()):
            self._forget(worker)

    async def fork(self, number: int, outputs: Outputs) -> WorkerProcess:
        """Fork a worker that writes to a file of `outputs`, and connect to it. Raises NotLoaded, OSError."""
        if self._control is None or not self.alive:
            raise NotLoaded("the template of the workers is not there")
        worker = WorkerProcess(self._owner, self, number)
        ours, theirs = socket.socketpair()
        read_end = output = -1
        try:
            output = outputs.open(number)
            read_end, write_end = os.pipe2(os.O_CLOEXEC)
            worker.hold_lifeline(write_end)
            ours.setblocking(False)
            message = msgspec.msgpack.encode(["fork", number])
            socket.send_fds(self._control, [message], [theirs.fileno(), read_end, output])
        except OSError:
            outputs.gone(number)
            worker.kill()
            ours.close()
            raise
        finally:
            theirs.close()
            for descriptor in (read_end, output):
                if descriptor >= 0:
                    os.close(descriptor)
        self._workers[number] = worker
        await asyncio.get_running_loop().create_unix_connection(lambda: worker, sock=ours)
        return worker

    def signal(self, number: int, signal_number: signal.Signals) -> None:
        """Send a signal to a worker's process group, if the worker has not ended."""
        if self._control is not None and number in self._workers:
            with contextlib.suppress(OSError):  # it is gone; a worker's lifeline does the rest
                self._control.send(msgspec.msgpack.encode(["signal", number, int(signal_number)]))

    def _read(self) -> None:
        assert self._control is not None
        try:
            data = self._control.recv(_CONTROL_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._take(*msgspec.msgpack.decode(data))
        else:
            self._lost()

    def _take(self, verb: str, what: Any, *rest: Any) -> None:
        if verb == "ready":
            self.exports = what
        elif verb == "forked" and what in self._workers:
            self._workers[what].pid = rest[0]
        elif verb == "ended" and what in self._workers:
            worker = self._workers[what]
            worker.status = rest[0]
            self._forget(worker)
        if self._ready is not None and not self._ready.done():
            if verb == "ready":
                self._ready.set_result(None)
            elif verb == "failed":
                self._ready.set_exception(BadConfig(f"cpu.imports: {what}", hint=f"See {self._log_path}."))

    def _forget(self, worker: WorkerProcess) -> None:
        # What the worker wrote before it ended is read first: its last answer may be there.
        asyncio.get_running_loop().call_soon(worker.bury)
        del self._workers[worker.number]

    def _lost(self) -> None:
        """The template has died: start another, in the background."""
        self._close_control()
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(
                NotLoaded(
                    "the template of the workers ended before it was ready", hint=f"See {self._log_path}."
                )
            )
        elif not self._stopping:
            log.error("the template of the workers has died and is started again; workers go on")
            self._workers.clear()  # it cannot report on them any more
            self._restart = asyncio.get_running_loop().create_task(self._start_again())

    async def _start_again(self) -> None:
        backoff_s = _BACKOFF_S
        await self._shut()
        while True:
            try:
                await self.start()
            except (BadConfig, NotLoaded, OSError) as error:
                log.error("%s", error)  # noqa: TRY400 - the error is a sentence of its own
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, RESTART_BACKOFF_S_MAX)
            else:
                self.restarts += 1
                return

    def _close_control(self) -> None:
        if self._control is not None:
            asyncio.get_running_loop().remove_reader(self._control.fileno())
            self._control.close()
            self._control = None

    async def _shut(self) -> None:
        """Close the control socket, which ends the template, and wait for its end."""
        self._close_control()
        if self._process is not None:
            try:
                await asyncio.wait_for(self._process.wait(), CALL_TERMINATE_S)
            except TimeoutError:  # still importing, perhaps
                self._process.kill()
                await self._process.wait()
            self._process = None
