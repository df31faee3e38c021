"""systemd: telling it that the node is ready and alive, and the unit that runs a node.

`notify` speaks the sd_notify protocol over the datagram socket that NOTIFY_SOCKET names; without systemd
it does nothing and says so. `unit` renders a unit of Type=notify in a sandbox as tight as a node that
runs other people's functions can bear. Nothing here installs or starts anything.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from virgo.errors import BadArgument
from virgo.limits import NODE_START_S, NODE_STOP_S, WATCHDOG_S


def notify(state: str) -> bool:
    """Send `READY=1`, `WATCHDOG=1`, `STOPPING=1`, `STATUS=...`; whether the manager got it.

    A node goes on when its manager does not listen (it may be re-executing itself), hence no error.
    """
    place = os.environ.get("NOTIFY_SOCKET", "")
    if not place or place[0] not in "/@":
        return False
    address = "\0" + place[1:] if place[0] == "@" else place
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.setblocking(False)
            channel.connect(address)
            channel.sendall(state.encode())
    except OSError:
        return False
    return True


def watchdog_interval_s() -> float | None:
    """How often to send `WATCHDOG=1`: half of what systemd allows. None if it does not watch us."""
    allowed = os.environ.get("WATCHDOG_USEC", "")
    watched = os.environ.get("WATCHDOG_PID", "")
    if not allowed.isdigit() or int(allowed) == 0 or (watched and watched != str(os.getpid())):
        return None
    return int(allowed) / 2_000_000


def unit(
    command: Sequence[str],
    *,
    home: Path,
    user: str = "",
    group: str = "",
    writable: Sequence[Path] = (),
    environment: Mapping[str, str] | None = None,
    watchdog_s: float = WATCHDOG_S,
    files_max: int = 65_536,
) -> str:
    """The text of a system unit that runs one node.

    Args:
        command: the node's command line, its first word an absolute path.
        home: VIRGO_HOME; must exist when the unit starts.
        user, group: who runs it; "" for root.
        writable: further directories that it may write: exported roots of the files module.
        environment: variables besides VIRGO_HOME.
        watchdog_s: it is restarted when it has not said `WATCHDOG=1` for so long.
        files_max: open files: connections, regions and descriptors together.

    Raises:
        BadArgument: the command is not absolute, or a value has a line end.
    """
    if not command or not command[0].startswith("/"):
        raise BadArgument(
            f"the unit's command must be an absolute path, not {list(command[:1])}",
            hint="`command -v virgo` shows where it is.",
        )
    variables = {"VIRGO_HOME": str(home), **(environment or {})}
    service = [
        "Type=notify",
        "NotifyAccess=main",
        f"ExecStart={' '.join(_quoted(word, command=True) for word in command)}",
        *(f"Environment={_quoted(f'{key}={value}')}" for key, value in variables.items()),
        *([f"User={_plain(user)}"] if user else []),
        *([f"Group={_plain(group)}"] if group else []),
        "Restart=on-failure",
        "RestartSec=1s",
        f"TimeoutStartSec={NODE_START_S:.0f}s",
        # The node's own patience first, then the workers that outlived it.
        f"TimeoutStopSec={2 * NODE_STOP_S:.0f}s",
        f"WatchdogSec={watchdog_s:g}s",
        # SIGTERM to the node, which ends its workers in order; SIGKILL to whatever is left.
        "KillMode=mixed",
        f"LimitNOFILE={files_max}",
        "UMask=0077",
        *_SANDBOX,
        f"ReadWritePaths={' '.join(_quoted(str(path)) for path in (home, *writable))}",
    ]
    return "\n".join([*_HEAD, "", "[Service]", *service, "", *_TAIL, ""])


_HEAD = (
    "[Unit]",
    "Description=VIRGO node",
    "Wants=network-online.target",
    "After=network-online.target time-sync.target",
    # A node that dies at once again and again is a matter for a person.
    "StartLimitIntervalSec=300",
    "StartLimitBurst=10",
)
_TAIL = ("[Install]", "WantedBy=multi-user.target")

# Not here, with reason: MemoryDenyWriteExecute (functions may be compiled at run time), PrivateNetwork
# (it is a server), PrivateDevices (workers may need an accelerator), RestrictNamespaces (sandboxes of
# allowlisted programs need them).
_SANDBOX = (
    "NoNewPrivileges=yes",
    "ProtectSystem=strict",
    "ProtectHome=read-only",
    "PrivateTmp=yes",
    "ProtectKernelTunables=yes",
    "ProtectKernelModules=yes",
    "ProtectKernelLogs=yes",
    "ProtectControlGroups=yes",
    "ProtectClock=yes",
    "ProtectHostname=yes",
    "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6",
    "RestrictRealtime=yes",
    "RestrictSUIDSGID=yes",
    "LockPersonality=yes",
    "SystemCallArchitectures=native",
    "SystemCallFilter=@system-service",
    "SystemCallErrorNumber=EPERM",
    "CapabilityBoundingSet=",
)


def _plain(text: str) -> str:
    if "\n" in text or "\r" in text or "\0" in text:
        raise BadArgument(
            f"{text!r} cannot stand in a unit: it has a line end", hint="Take the line end out."
        )
    return text.replace("%", "%%")


def _quoted(text: str, *, command: bool = False) -> str:
    """One word as systemd reads it back: specifiers doubled, and quoted where it must be."""
    word = _plain(text)
    if command:
        word = word.replace("$", "$$")
    if word and not set(word) & set(" \t\"'\\;"):
        return word
    return '"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"'
