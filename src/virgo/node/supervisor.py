"""`virgo up`: the engine and the nodes of one machine, watched and restarted.

One supervisor serves one VIRGO_HOME. It starts the embedded engine (unless one is configured or joined),
then the nodes, each a process of its own; one that dies is started again, ever more slowly if it dies
again and again. Its own death stops nobody: the nodes go on, and the next `virgo up` or `virgo down`
finds them by their records. A first start that fails stops all and says why.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from virgo.config import Config
from virgo.cpu.programs import allowlist
from virgo.errors import BadConfig, Busy, NotRunning, VirgoError, from_line
from virgo.files.roots import check_present
from virgo.home import (
    log_file,
    node_directory,
    read_record,
    record_path,
    run_directory,
    socket_path,
    write_record,
)
from virgo.kernel.process import ProcessMark
from virgo.kernel.systemd import notify
from virgo.limits import NODE_LOST_S, NODE_START_S, NODE_STOP_S, RESTART_BACKOFF_S_MAX
from virgo.node.control import NODES, RECORD, check_room, failure_path, leftovers, stop_leftovers
from virgo.node.engines import LocalEngine, connect_engine
from virgo.node.membership import register_patiently
from virgo.node.transport import server_tls
from virgo.wire.aclient import AsyncClient
from virgo.wire.address import Address

log = logging.getLogger("virgo.up")
Progress = Callable[[str], None]
_BACKOFF_S_MIN = 0.3
_POLL_S = 0.05
_RECORD_CHECK_S, _RECORD_MISSING_MAX = 1.0, 3  # it is missing for a moment while it is written anew


class UpOptions(msgspec.Struct, frozen=True):
    """What `virgo up` was asked for.

    Attributes:
        nodes: names of the nodes to run here, in the order of their ports.
        engines: embedded engine servers to run here: 1, or 3 or 5 as a cluster.
        owner: mark of a process whose end ends the cloud, for an embedded node.
        environment: variables that carry command line options to the nodes.
    """

    nodes: list[str]
    engines: int = 1
    owner: dict[str, str | int] | None = None
    environment: dict[str, str] = {}


class Child:
    """One node process and its restarts."""

    def __init__(self, home: Path, name: str, index: int, environment: dict[str, str]) -> None:
        self.home = home
        self.name = name
        self.index = index
        self.environment = environment
        self.process: asyncio.subprocess.Process | None = None
        self.restarts = 0

    def __repr__(self) -> str:
        return f"<Child {self.name} pid {self.process.pid if self.process else 0}, {self.restarts} restarts>"

    async def start(self) -> None:
        """Start the process."""
        record_path(self.home, self.name).unlink(missing_ok=True)
        with log_file(self.home, self.name).open("ab") as output:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "virgo.node", self.name, str(self.index),
                stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output,
                env={**os.environ, **self.environment}, start_new_session=True,
            )  # fmt: skip

    async def serving(self) -> None:
        """Wait until it serves. Raises what kept it from it."""
        assert self.process is not None
        deadline = time.monotonic() + NODE_START_S
        while read_record(record_path(self.home, self.name)) is None:
            if self.process.returncode is not None:
                failure = read_record(record_path(self.home, f"{self.name}.failure"))
                if failure:
                    raise from_line(str(failure["error"]))
                raise NotRunning(
                    f"node {self.name} ended at its start with status {self.process.returncode}",
                    hint=f"Its log is {log_file(self.home, self.name)}.",
                )
            if time.monotonic() > deadline:
                raise NotRunning(
                    f"node {self.name} does not serve after {NODE_START_S:g} s",
                    hint=f"Its log is {log_file(self.home, self.name)}.",
                )
            await asyncio.sleep(_POLL_S)

    async def watch(self) -> None:
        """Restart it each time it ends; runs until cancelled."""
        backoff_s = _BACKOFF_S_MIN
        while True:
            assert self.process is not None
            started = time.monotonic()
            status = await self.process.wait()
            if time.monotonic() - started > 30:
                backoff_s = _BACKOFF_S_MIN
            log.warning(
                "node %s ended with status %s; starting it again in %.1f s", self.name, status, backoff_s
            )
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, RESTART_BACKOFF_S_MAX)
            self.restarts += 1
            await self.start()

    async def stop(self) -> None:
        """End it: SIGTERM, then SIGKILL."""
        if self.process is None or self.process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()
            try:
                async with asyncio.timeout(NODE_STOP_S):
                    await self.process.wait()
            except TimeoutError:
                self.process.kill()
                await self.process.wait()


class Supervisor:
    """Runs a machine's part of a cloud until it is told to stop."""

    def __init__(self, config: Config, options: UpOptions, *, progress: Progress = log.info) -> None:
        self.config = config
        self.options = options
        self.progress = progress
        self.stopping = asyncio.Event()
        self._unnoted = False  # whether the record does not tell the truth, for want of room
        self.engine = LocalEngine(config, options.engines, on_change=lambda: self._note("serving"))
        self.children = [
            Child(config.home, name, index, options.environment)
            for index, name in enumerate(options.nodes, 1)
        ]

    def __repr__(self) -> str:
        return f"<Supervisor of {', '.join(self.options.nodes)} under {self.config.home}>"

    async def run(self, *, serving: Callable[[], None] = lambda: None) -> None:
        """Start all, call `serving`, and keep all running until `stopping` is set.

        Raises:
            Busy: a cloud runs here already.
            VirgoError: something did not start; then all is stopped again.
        """
        with self._alone():
            # Refuse before anything runs: an unsafe bind, an export or a program that is not there.
            server_tls(self.config)
            check_present(self.config.files)
            allowlist(self.config.cpu.programs)
            await self._run(serving)

    async def _run(self, serving: Callable[[], None]) -> None:
        self._record("starting")
        watchers: list[asyncio.Task[None]] = []
        try:
            self.progress("starting the engine")
            await self.engine.start()
            watchers.append(asyncio.create_task(self.engine.watch(), name="watch engine"))
            await self._register()
            self.progress(f"starting {len(self.children)} node{'s' if len(self.children) > 1 else ''}")
            for child in self.children:
                await child.start()
            for child in self.children:
                await child.serving()
                self.progress(f"node {child.name} serves")
                watchers.append(asyncio.create_task(child.watch(), name=f"watch {child.name}"))
            await self._acquaint()
            if self.options.owner is not None:
                watchers.append(asyncio.create_task(self._follow_owner(), name="owner"))
            self._record("serving")
            watchers.append(asyncio.create_task(self._follow_record(), name="record"))
            notify("READY=1")
            serving()
            await self.stopping.wait()
        finally:
            self._note("stopping")
            notify("STOPPING=1")
            for watcher in watchers:
                watcher.cancel()
            await asyncio.gather(*(child.stop() for child in self.children))
            await self.engine.stop()
            record_path(self.config.home, RECORD).unlink(missing_ok=True)

    async def _acquaint(self) -> None:
        """Wait until each node has heard all the others, so that whoever asks any of them finds all."""
        wanted = set(self.options.nodes)
        deadline = time.monotonic() + NODE_LOST_S
        for name in self.options.nodes:
            place = Address(path=str(socket_path(self.config.home, name)))
            async with AsyncClient(place) as client:
                while time.monotonic() < deadline:
                    if wanted <= {member.name for member in await client.run(NODES)}:
                        break
                    await asyncio.sleep(_POLL_S)

    async def _register(self) -> None:
        """Give the nodes their numbers in their order; each knows its own from then on."""
        engine = await connect_engine(self.config)
        try:
            for name in self.options.nodes:
                await register_patiently(engine, node_directory(self.config.home, name), name)
        finally:
            await engine.close()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Be the only supervisor of this VIRGO_HOME: by a lock that the kernel drops with the process."""
        with (run_directory(self.config.home) / f"{RECORD}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Busy(
                    f"a cloud is up under {self.config.home} already",
                    hint="`virgo status` shows it, `virgo down` stops it; each VIRGO_HOME has its own cloud.",
                ) from None
            if leftovers(self.config.home):
                self.progress("stopping what a killed `virgo up` has left behind")
                stop_leftovers(self.config.home)
            yield

    def _record(self, state: str) -> None:
        value = {
            "process": ProcessMark.of(os.getpid()).to_json(),
            "state": state,
            "nodes": self.options.nodes,
            "owner": self.options.owner,
            "engine": self.engine.describe(),
        }
        write_record(record_path(self.config.home, RECORD), value)

    def _note(self, state: str) -> None:
        """Record the state if the disk takes it: it may be full, and that must keep nothing from going on."""
        try:
            self.engine.record()
            self._record(state)
        except OSError as error:
            if not self._unnoted:
                log.warning("that the cloud is %s could not be recorded yet: %s", state, error)
            self._unnoted = True
        else:
            self._unnoted = False

    async def _follow_record(self) -> None:
        """End when VIRGO_HOME was removed under us, for then nobody could find and stop what runs."""
        path = record_path(self.config.home, RECORD)
        missing = 0
        while missing < _RECORD_MISSING_MAX:
            await asyncio.sleep(_RECORD_CHECK_S)
            if self._unnoted and path.exists():
                self._note("serving")
            missing = 0 if path.exists() else missing + 1
        log.error("%s is gone: all that was started for it ends", path)
        self.stopping.set()

    async def _follow_owner(self) -> None:
        """End when the owner has ended."""
        mark = ProcessMark.from_json(self.options.owner)
        while mark.alive():  # noqa: ASYNC110 - another process's end is no event of ours
            await asyncio.sleep(0.5)
        self.stopping.set()


async def supervise(
    config: Config,
    options: UpOptions,
    *,
    progress: Progress = log.info,
    serving: Callable[[], None] = lambda: None,
) -> None:
    """Run a supervisor until SIGTERM, SIGINT or SIGHUP. Raises DiskFull, and what kept it from its start."""
    check_room(config.home)
    supervisor = Supervisor(config, options, progress=progress)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, supervisor.stopping.set)
    work = asyncio.create_task(supervisor.run(serving=serving))
    stop = asyncio.create_task(supervisor.stopping.wait())
    await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
    if not work.done() and not serving_or_done(config.home):
        work.cancel()  # told to stop while starting
    stop.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await work


def serving_or_done(home: Path) -> bool:
    """Whether the start is over."""
    record = read_record(record_path(home, RECORD))
    return record is None or record.get("state") != "starting"


def main() -> int:
    """Entry of a detached supervisor: `python -m virgo.node.supervisor`, options in the environment."""
    from virgo import config as configuration

    logging.basicConfig(
        level="INFO", format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    os.chdir("/")  # lest a directory of the caller's stay in use
    home = configuration.home()
    failure = failure_path(home, os.getpid())
    try:
        options = msgspec.json.decode(os.environ["VIRGO_UP"].encode(), type=UpOptions)
        asyncio.run(supervise(configuration.load(), options))
    except KeyError:
        write_record(
            failure, {"error": BadConfig("VIRGO_UP is not set", hint="Use `virgo up --detach`.").to_line()}
        )
        return 2
    except VirgoError as error:
        log.critical("cannot go on: %s", error)
        write_record(failure, {"error": error.to_line()})
        return 1
    except OSError as error:
        log.critical("cannot go on: %s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
