"""The process of a node from which its workers are forked: single-threaded, imports done, nothing running.

Started as `python -m virgo.cpu.template CONTROL SETTINGS`: CONTROL is the descriptor of a SOCK_SEQPACKET
socket to the node, SETTINGS are JSON. Messages are MessagePack arrays.

    node -> template   ["fork", worker] with two descriptors: the worker's socket, its lifeline
                       ["signal", worker, number]: to the worker's process group
    template -> node   ["ready", {name: summary}] or ["failed", reason], once
                       ["forked", worker, pid], ["ended", worker, status or None]

It alone reaps workers, so a signal it sends never reaches a stranger with the same pid. When a worker has
ended, whatever it left behind is killed, in its process group or out of it. When the node closes the
control socket, or dies, so do all workers.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import select
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import msgspec

from virgo.cpu import builtin, worker
from virgo.cpu.exports import exported, summary_of

_MESSAGE_BYTES_MAX = 4096


class Settings(msgspec.Struct, frozen=True):
    """What the node tells its template."""

    node: str
    imports: list[str] = []


class Template:
    """Forks workers on request and reports their ends."""

    def __init__(self, control: socket.socket, settings: Settings) -> None:
        self._control = control
        self._settings = settings
        self._pids: dict[int, int] = {}  # by worker
        self._workers: dict[int, int] = {}  # by pid
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def run(self) -> None:
        """Serve the node until it closes the control socket."""
        signal.signal(signal.SIGCHLD, lambda *_: None)  # only to wake the poll below
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C at a terminal is the node's business
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(self._wake_read, select.POLLIN)
        while True:
            ready = {descriptor for descriptor, _ in poll.poll()}
            if self._wake_read in ready:
                os.read(self._wake_read, 4096)
                self._reap()
            if self._control.fileno() in ready:
                data, descriptors, _, _ = socket.recv_fds(self._control, _MESSAGE_BYTES_MAX, 3)
                if not data:
                    break
                self._obey(msgspec.msgpack.decode(data), descriptors)
        self._kill_all()

    def say(self, *message: Any) -> None:
        """Tell the node; if it is gone, the next read will show it."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._control.send(msgspec.msgpack.encode(message))

    def _obey(self, message: list[Any], descriptors: list[int]) -> None:
        verb, number, *rest = message
        if verb == "fork":
            self._fork(number, *descriptors)
        elif verb == "signal" and number in self._pids:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._pids[number], rest[0])

    def _fork(self, number: int, connection: int, lifeline: int, output: int) -> None:
        try:
            pid = os.fork()
        except OSError as error:
            print(f"worker {number} could not be forked: {error}", file=sys.stderr)
            pid = -1
        if pid == 0:
            self._become_worker(connection, lifeline, output)
        for descriptor in (connection, lifeline, output):
            os.close(descriptor)
        if pid < 0:
            self.say("ended", number, None)
            return
        with contextlib.suppress(OSError):  # the child does it too; whoever is first
            os.setpgid(pid, pid)
        self._pids[number], self._workers[pid] = pid, number
        self.say("forked", number, pid)

    def _become_worker(self, connection: int, lifeline: int, output: int) -> None:
        """In the child: be a worker, then end without any clean-up of the parent's things."""
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            self._control.close()
            os.close(self._wake_read)
            os.close(self._wake_write)
            worker.main(socket.socket(fileno=connection), lifeline, output, node=self._settings.node)
        except BaseException:  # noqa: BLE001 - the child must never run on into the parent's loop
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    def _reap(self) -> None:
        """Take note of the children that have ended, and end what they left behind."""
        left_behind = False
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                break
            if found is None:
                break
            pid = found.si_pid
            number = self._workers.pop(pid, None)
            if number is not None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)  # before reaping: until then the id is surely ours
            _, status = os.waitpid(pid, 0)
            if number is not None:
                del self._pids[number]
                left_behind = True
                self.say("ended", number, os.waitstatus_to_exitcode(status))
        if left_behind:
            self._kill_adopted()

    def _kill_adopted(self) -> None:
        """Kill what left the process group of a worker that has ended: it is our child now."""
        try:
            text = Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="ascii")
        except OSError:  # the kernel was built without it
            return
        for pid in map(int, text.split()):
            if pid not in self._workers:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)

    def _kill_all(self) -> None:
        for pid in self._workers:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
        while self._workers:
            pid, _ = os.wait()
            self._workers.pop(pid, None)
        self._kill_adopted()


def main(arguments: list[str]) -> int:
    """Run the template; `arguments` are those of the command line."""
    control = socket.socket(fileno=int(arguments[0]))
    control.set_inheritable(False)
    settings = msgspec.json.decode(arguments[1], type=Settings)
    template = Template(control, settings)
    assert builtin.echo in exported().values()
    for name in settings.imports:
        try:
            importlib.import_module(name)
        except BaseException as error:  # noqa: BLE001 - the module is not ours; the node tells its user
            traceback.print_exc()
            template.say("failed", f"module {name!r} cannot be imported: {type(error).__name__}: {error}")
            return 1
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    worker.adopt_orphans()
    gc.collect()
    gc.freeze()  # so that a worker's garbage collector does not copy the shared pages
    template.say("ready", {name: summary_of(function) for name, function in exported().items()})
    template.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
