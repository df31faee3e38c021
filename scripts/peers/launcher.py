"""Takes memcached's place in its own test suite: a node of VIRGO behind memcached's command line.

Options that have no counterpart are refused, but for those that only tell memcached how to lay out its memory
or run its threads: what they tune does not exist here, and the protocol does not depend on it.

Usage: as memcached's, `-h` for help. Serves until a signal, and removes its state.
"""

from __future__ import annotations

import contextlib
import ctypes
import getopt
import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

_HELP = """memcached 1.6.18
-p, --port=<num>          TCP port to listen on
-U, --udp-port=<num>      ignored: there is no UDP
-s, --unix-socket=<file>  UNIX socket to listen on
-l, --listen=<addr>       loopback address to listen on
-m, --memory-limit=<num>  item memory in megabytes
-I, --max-item-size=<num> largest item
"""
_SHORT = "hp:U:s:a:l:m:I:Mu:o:c:t:vR:f:n:b:B:dP:rkLCFY:SAWe:D:xXV"
_UNITS = {"k": 1024, "m": 1024 * 1024, "g": 1024**3}
# What only tunes a layout or threads that VIRGO does not have.
_IDLE = ("-U", "-u", "-v", "-t", "-R", "-f", "-n", "-r", "-k", "-L", "-M", "-D", "-a")
_IDLE_WORDS = (
    *("relaxed_privileges", "modern", "no_modern", "hashpower", "hash_algorithm", "tail_repair_time"),
    *("slab_reassign", "slab_automove", "slab_automove_window", "slab_chunk_max", "maxconns_fast"),
    *("lru_crawler", "no_lru_crawler", "lru_maintainer", "no_lru_maintainer", "temporary_ttl"),
    "watcher_logbuf_size",
)


class Refused(Exception):
    """An option without a counterpart."""


class Stopped(BaseException):
    """A signal came."""


def stop(_number: int, _frame: object) -> None:
    """The handler of signals: once, so that the stopping itself is not interrupted."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    raise Stopped


def check(name: str, value: str) -> None:
    """Raise Refused unless the option can be passed over."""
    if name == "-o":
        unknown = [word for word in value.split(",") if word.partition("=")[0] not in _IDLE_WORDS]
        if unknown:
            raise Refused(f"-o {unknown[0]}")
        return
    limits = {"-c": range(1, 10_001), "-b": range(1, 1 << 31)}
    if name in limits and int(value) in limits[name]:
        return
    if name not in _IDLE and (name, value) not in (("-B", "auto"), ("-B", "ascii")):
        raise Refused(f"{name} {value}".strip())


def size_of(text: str) -> int:
    """Bytes of a size such as 512k."""
    unit = _UNITS.get(text[-1].lower(), 0)
    return int(text[:-1]) * unit if unit else int(text)


def settings(options: list[tuple[str, str]], home: Path) -> dict[str, str]:
    """The node's configuration, as environment variables."""
    given = {"-p": "11211", "-m": "64", "-I": "1m", "-l": "", "-s": ""}
    for name, value in options:
        if name in given:
            given[name] = value
        else:
            check(name, value)
    if given["-l"] not in ("", "127.0.0.1", "localhost"):
        raise Refused(f"-l {given['-l']}")
    socket = given["-s"] and not given["-l"]
    return {
        "VIRGO_NODE_BIND": "",
        "VIRGO_MEMORY_MEMCACHED": (
            f"unix:{Path(given['-s']).absolute()}" if socket else f"127.0.0.1:{given['-p']}"
        ),
        "VIRGO_MEMORY_MEMCACHED_ROLES": json.dumps(["read", "write", "admin"]),
        "VIRGO_MEMORY_MEMCACHED_ITEM_BYTES": str(size_of(given["-I"])),
        "VIRGO_MEMORY_CAPACITY_BYTES": str(max(16, int(given["-m"])) * 1024 * 1024),
        "VIRGO_MEMORY_EVICT": "false" if ("-M", "") in options else "true",
        "VIRGO_CPU_WORKERS": "1",
        "VIRGO_HOME": str(home),
    }


def main(arguments: list[str]) -> int:
    """Start, wait for a signal, stop."""
    options, rest = getopt.gnu_getopt(arguments, _SHORT)
    if any(name in ("-h", "-V") for name, _ in options):
        sys.stdout.write(_HELP)
        return 0
    # The suite asks for help before each start, which shall not wait for all of VIRGO.
    from virgo.errors import VirgoError
    from virgo.node import control
    from virgo.node.supervisor import UpOptions

    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # end with the suite, however it ends
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, stop)
    home = Path(tempfile.mkdtemp(prefix="virgo-peer-"))
    try:
        if rest:
            raise Refused(rest[0])
        environment = settings(options, home)
        os.environ.update(environment)
        control.start_detached(home, UpOptions(nodes=["n1"], environment=environment))
        while True:
            signal.pause()
    except Stopped:
        return 0
    except (Refused, ValueError, VirgoError) as error:
        sys.stderr.write(f"this memcached is VIRGO, and does not start: {error}\n")
        return 71  # as memcached where the system refuses
    finally:
        with contextlib.suppress(VirgoError):  # it may never have run
            control.stop(home)
        shutil.rmtree(home, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
