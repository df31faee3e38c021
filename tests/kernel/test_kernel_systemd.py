"""systemd: notifications over a real socket, and units that systemd itself accepts."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from virgo.errors import BadArgument
from virgo.kernel import systemd


@pytest.mark.parametrize("abstract", [False, True])
def test_states_reach_the_manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    """A state arrives as one datagram, on a socket with a path and on an abstract one."""
    name = f"virgo-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name if abstract else name)
        manager.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name if abstract else name)
        assert systemd.notify("READY=1\nSTATUS=serving, ä")
        assert manager.recv(100) == "READY=1\nSTATUS=serving, ä".encode()


@pytest.mark.parametrize("place", [None, "", "relative", "vsock:2:1", "/nowhere/at/all"])
def test_without_a_manager_nothing_happens(monkeypatch: pytest.MonkeyPatch, place: str | None) -> None:
    """Where nobody listens `notify` says False and the node goes on."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    if place is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", place)
    assert not systemd.notify("READY=1")


@pytest.mark.parametrize(
    ("usec", "pid", "interval_s"),
    [
        ("30000000", "", 15.0),
        ("30000000", str(os.getpid()), 15.0),
        ("30000000", "1", None),
        ("0", "", None),
        ("x", "", None),
        (None, "", None),
    ],
)
def test_the_watchdog_is_fed_at_half_its_time(
    monkeypatch: pytest.MonkeyPatch, usec: str | None, pid: str, interval_s: float | None
) -> None:
    """The interval is half of WATCHDOG_USEC, and none if another process is watched."""
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    if usec is not None:
        monkeypatch.setenv("WATCHDOG_USEC", usec)
    monkeypatch.setenv("WATCHDOG_PID", pid)
    assert systemd.watchdog_interval_s() == interval_s


ODD = {
    "home": Path("/tmp"),
    "environment": {"VIRGO_NOTE": "a \"b\" $c 100% 'd' \\e"},
    "writable": [Path("/var/tmp")],
}


@pytest.mark.parametrize("options", [{"home": Path("/tmp")}, {**ODD, "user": "root", "group": "root"}])
def test_systemd_accepts_the_unit(tmp_path: Path, options: dict[str, object]) -> None:
    """`systemd-analyze verify` has nothing to say about the unit, and rates its sandbox as OK or better."""
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    path = tmp_path / "virgo-test.service"
    path.write_text(systemd.unit(["/bin/true", "up", "100% $HOME"], **options))  # type: ignore[arg-type]
    done = subprocess.run([analyze, "verify", "--man=no", str(path)], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "virgo-test" not in done.stderr, done.stderr
    rating = subprocess.run(
        [analyze, "security", "--offline=true", "--threshold=40", str(path)], text=True, capture_output=True
    )
    assert rating.returncode == 0, rating.stdout[-300:]


def test_the_unit_says_what_the_node_needs() -> None:
    """Readiness, watchdog, limits, sandbox and writable places are in the unit, quoted where needed."""
    unit = systemd.unit(
        ["/opt/my virgo/virgo", "up", "--note", "50%", "$HOME"],
        home=Path("/var/lib/virgo"),
        user="virgo",
        writable=[Path("/srv/my data")],
    )
    lines = unit.splitlines()
    for line in (
        "Type=notify",
        "User=virgo",
        "KillMode=mixed",
        "WatchdogSec=30s",
        "LimitNOFILE=65536",
        "NoNewPrivileges=yes",
        "ProtectSystem=strict",
        "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6",
        "Environment=VIRGO_HOME=/var/lib/virgo",
        'ReadWritePaths=/var/lib/virgo "/srv/my data"',
        'ExecStart="/opt/my virgo/virgo" up --note 50%% $$HOME',
    ):
        assert line in lines
    assert unit.endswith("WantedBy=multi-user.target\n")


@pytest.mark.parametrize(
    "options",
    [
        {"command": ["virgo"]},
        {"command": []},
        {"command": ["/bin/true", "a\nExecStartPost=/bin/evil"]},
        {"command": ["/bin/true"], "user": "x\nUser=root"},
        {"command": ["/bin/true"], "environment": {"A": "b\rc"}},
    ],
)
def test_nothing_can_be_smuggled_into_the_unit(options: dict[str, object]) -> None:
    """Relative commands and values with line ends are refused."""
    with pytest.raises(BadArgument):
        systemd.unit(home=Path("/tmp"), **options)  # type: ignore[arg-type]
