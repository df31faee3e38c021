"""Two machines on this one: network namespaces with a link between them that can be cut."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SUBNET = "10.77.0"
_switches = itertools.count(1)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@dataclass(frozen=True)
class Machine:
    """A namespace with an address, a VIRGO_HOME and shared memory of its own."""

    namespace: str
    address: str
    home: Path

    @property
    def shared_memory(self) -> Path:
        """What is its /dev/shm."""
        return self.home.with_name(f"{self.home.name}-shm")

    def virgo(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run the command line on this machine."""
        return self.run([sys.executable, "-m", "virgo.cli", *arguments], check=check)

    def python(self, program: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a Python program on this machine."""
        return self.run([sys.executable, "-c", program, *arguments], check=check)

    def run(self, command: list[str], *, check: bool) -> subprocess.CompletedProcess[str]:
        """Run a command on this machine."""
        mount = f'mount --bind {self.shared_memory} /dev/shm && exec "$@"'
        result = subprocess.run(
            ["ip", "netns", "exec", self.namespace, "sh", "-c", mount, "sh", *command],
            env={**os.environ, "VIRGO_HOME": str(self.home)},
            capture_output=True,
            text=True,
            timeout=90,
        )
        assert not check or result.returncode == 0, (command[-3:], result.stdout, result.stderr)
        return result

    def nodes(self) -> dict[str, dict[str, Any]]:
        """The nodes as this machine sees them, by name."""
        status = json.loads(self.virgo("status", "--json").stdout)
        return {node["name"]: node for node in status["nodes"]}

    def cut(self) -> None:
        """Cut the link: packets vanish, and nobody is told."""
        _ip("netns", "exec", self.namespace, "ip", "link", "set", "eth", "down")

    def mend(self) -> None:
        """Mend the link."""
        _ip("netns", "exec", self.namespace, "ip", "link", "set", "eth", "up")


@contextmanager
def machines(directory: Path, count: int = 2) -> Iterator[list[Machine]]:
    """Machines on one switch, named by this process so that runs do not meet."""
    tag = f"v{os.getpid() % 100000}x{next(_switches)}"
    bridge = f"{tag}br"
    made: list[Machine] = []
    _ip("link", "add", bridge, "type", "bridge")
    try:
        _ip("link", "set", bridge, "up")
        for index in range(1, count + 1):
            namespace = f"{tag}-{index}"
            machine = Machine(namespace, f"{_SUBNET}.{index}", directory / f"m{index}")
            _ip("netns", "add", namespace)
            made.append(machine)
            machine.shared_memory.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", machine.shared_memory], check=True)
            _ip("link", "add", f"{tag}p{index}", "type", "veth", "peer", "name", "eth", "netns", namespace)
            _ip("link", "set", f"{tag}p{index}", "master", bridge, "up")
            inside = ("netns", "exec", namespace, "ip")
            _ip(*inside, "addr", "add", f"{machine.address}/24", "dev", "eth")
            _ip(*inside, "link", "set", "eth", "up")
            _ip(*inside, "link", "set", "lo", "up")
        yield made
    finally:
        for machine in made:
            machine.virgo("down", check=False)
            subprocess.run(["umount", "--lazy", machine.shared_memory], check=True)
            _ip("netns", "del", machine.namespace)
        _ip("link", "del", bridge)
