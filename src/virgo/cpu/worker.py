"""One worker: a process that runs one call at a time and answers each with its outcome.

It speaks RESP on the one socket it was given: `[order, function, argument...]` in, `[flags, outcome]` out,
in order. Whatever a call does, short of ending the process, becomes an outcome. The process is the leader
of a process group of its own; `bind_to_lifeline` makes the kernel kill that group when the other end of a
pipe is closed, so that no worker, and nothing that a call started, outlives its node: not even when the
node was killed, and not even when the call never returns to Python.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import pickle
import select
import signal
import socket
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NoReturn

import hiredis
import msgspec

from virgo import context as contexts
from virgo.cpu import messages, programs
from virgo.cpu.arguments import unpack_arguments
from virgo.cpu.ceiling import within
from virgo.cpu.exports import exported
from virgo.cpu.leased import Leased
from virgo.cpu.messages import WANTED, Failure, Order, Terms, failed
from virgo.cpu.needs import Grant
from virgo.cpu.outcomes import not_loaded, outcome_of
from virgo.cpu.traces import Setting, has_children
from virgo.errors import BadArgument, VirgoError
from virgo.limits import FUNCTIONS_CACHED_MAX

_RECEIVE_BYTES: Final = 256 * 1024
_DESCRIPTORS_MAX: Final = 2
_F_SETSIG: Final = 10  # Linux; the standard library has no name for it
_PR_SET_CHILD_SUBREAPER: Final = 36
_OOM_SCORE: Final = "500"  # when memory runs out, a worker goes before its node
_seek = os.lseek


def bind_to_lifeline(descriptor: int) -> None:
    """Have the kernel kill this process's group when the other end of the pipe is closed."""
    fcntl.fcntl(descriptor, fcntl.F_SETOWN, -os.getpgid(0))
    fcntl.fcntl(descriptor, _F_SETSIG, signal.SIGKILL)
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_ASYNC)
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    if poll.poll(0):  # closed before the kernel was told to watch it
        os.killpg(0, signal.SIGKILL)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends, so that none gets lost."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def offer_to_oom_killer() -> None:
    """Be chosen before the node when memory runs out."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE, encoding="ascii")


def write_to(output: int) -> None:
    """Make a descriptor standard output and standard error, for Python and for whatever else writes there."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(output, number)
        stream = open(number, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    os.close(output)


class Worker:
    """Runs calls that arrive on a socket.

    Args:
        node: the name of the node, for messages.
    """

    def __init__(self, *, node: str) -> None:
        self._node = node
        self._functions: OrderedDict[bytes, Callable[..., Any]] = OrderedDict()
        self._handed: list[int] = []  # descriptors that came with the request
        self._connections: list[socket.socket] = []
        self.forked = False
        self._setting = Setting()
        self._flushes = (sys.stdout.flush, sys.stderr.flush)
        # A process that a call forks must not answer in the worker's place.
        os.register_at_fork(after_in_child=self._step_back)

    def __repr__(self) -> str:
        return f"<Worker {os.getpid()} of {self._node} functions={len(self._functions)}>"

    def serve(self, connection: socket.socket) -> None:
        """Run calls until the other side closes the connection."""
        reader = hiredis.Reader()
        self._connections.append(connection)
        while True:
            data, handed, _, _ = socket.recv_fds(connection, _RECEIVE_BYTES, _DESCRIPTORS_MAX)
            self._handed += handed
            if not data:
                return
            reader.feed(data)
            while (request := reader.gets()) is not False:
                if request == WANTED:  # a lease that has ended by now
                    continue
                flags, outcome = self.handle(request)
                if self.forked:  # the call has returned in a process that it forked
                    self.leave()
                head = b"*2\r\n$%d\r\n%b\r\n$%d\r\n" % (len(flags), flags, len(outcome))
                if len(outcome) < _RECEIVE_BYTES:
                    connection.sendall(b"%b%b\r\n" % (head, outcome))
                else:  # not copied once more
                    for part in (head, outcome, b"\r\n"):
                        connection.sendall(part)
                del request, outcome

    def handle(self, request: list[bytes]) -> tuple[bytes, bytes]:
        """Run one call; flags for the pool, and the outcome."""
        order = messages.decode_order(request[0])
        if order.form == "lease":
            terms = messages.decode_terms(order.context)
            with within(Grant(memory=terms.memory)):
                outcome = self._serve_lease(terms)
            return self._flags(), outcome
        # Threads of the call inherit no context variables; there is one call here, so they share its context.
        contexts.adopt(contexts.decode(order.context, speaker=contexts.NODE) if order.context else None)
        try:
            with within(order.grant):
                flags, outcome = self._run(order, request)
        finally:
            contexts.adopt(None)
            self.output_end()
        # What it has loaded for its GPUs stays with these: it is of no use for a call that gets others.
        if order.grant.gpus:
            flags = messages.RETIRE
        elif order.form == "pickle":
            flags = flags or self._flags()
        return flags, outcome

    def _flags(self) -> bytes:
        """For the pool, when others may have this worker: whether they may."""
        return b"" if self.forked or self._setting.restore() else messages.RETIRE

    def _run(self, order: Order, request: list[bytes]) -> tuple[bytes, bytes]:
        if order.program is not None:
            return self._run_program(order, order.program, request[2:])
        try:
            function = self.function_of(order.name, order.digest, request[1])
        except BaseException as error:  # noqa: BLE001 - unpickling runs code: anything may come
            return b"", not_loaded(order, error, node=self._node)
        if function is None:
            return b"", messages.UNKNOWN
        outcome = outcome_of(order, function, request[2:], node=self._node, land=order.land)
        assert isinstance(outcome, bytes)
        return b"", outcome

    def leave(self) -> NoReturn:
        """End a process that a call forked, as if its part of the program were over."""
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(0)

    def output_end(self) -> int:
        """Where the output of this process, and of those that it has forked, has got to."""
        for flush in self._flushes:
            try:  # not `suppress`: this is done after every call
                flush()
            except ValueError:
                continue
        return _seek(1, 0, os.SEEK_CUR)

    def _step_back(self) -> None:
        """In a process that a call has forked: nothing of the worker's is ours."""
        self.forked = True
        for connection in self._connections:
            connection.close()

    def _serve_lease(self, terms: Terms) -> bytes:
        """Be leased until that ends."""
        client, page = self._handed[:2]
        del self._handed[:2]
        connection = socket.socket(fileno=client)
        self._connections.append(connection)
        try:
            Leased(self, connection, page, self._connections[0], terms).serve()
        except OSError:  # the client was gone before it began
            connection.close()
        finally:
            self._connections.remove(connection)
        return messages.packed(None)

    def function_of(self, name: str, digest: bytes, sent: bytes) -> Callable[..., Any] | None:
        """The function to call, None if it must be sent. Raises KeyError, or what unpickling raises."""
        if not digest:
            return exported()[name]
        function = self._functions.get(digest)
        if function is not None:
            self._functions.move_to_end(digest)
            return function
        if not sent:
            return None
        function = pickle.loads(sent)  # noqa: S301 - role exec sent it
        self._functions[digest] = function
        if len(self._functions) > FUNCTIONS_CACHED_MAX:
            self._functions.popitem(last=False)
        return function  # type: ignore[no-any-return]

    def _run_program(self, order: Order, command: list[str], words: list[bytes]) -> tuple[bytes, bytes]:
        try:
            if order.form == "data":
                values, options = unpack_arguments(words[0])
                if options:
                    raise BadArgument(
                        f"{order.label} is a program and takes no keyword arguments",
                        hint="Give them as words, as on a command line: '--count', 5.",
                    )
                words = programs.words_of(values)
            output = programs.run(order.label, command, words, node=self._node)
            outcome = messages.packed(output) if order.form == "data" else messages.BULK + output
        except programs.ProgramFailed as error:
            outcome = failed(error.failure)
        except VirgoError as error:
            outcome = failed(Failure(error.message, hint=error.hint, cause="program", node=self._node))
        except msgspec.DecodeError as error:
            outcome = failed(Failure(str(error), cause="program", node=self._node))
        return (messages.RETIRE if has_children() else b""), outcome


def main(connection: socket.socket, lifeline: int, output: int, *, node: str) -> None:
    """Be a worker, in a process just forked, until the connection is closed."""
    os.setpgid(0, 0)
    write_to(output)
    bind_to_lifeline(lifeline)
    adopt_orphans()
    offer_to_oom_killer()
    numpy = sys.modules.get("numpy.random")
    if numpy is not None:  # unlike `random`, it does not seed itself after a fork
        numpy.seed()
    Worker(node=node).serve(connection)
