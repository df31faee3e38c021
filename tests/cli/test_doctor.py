"""The doctor sees what is wrong, says how to mend it, and changes nothing."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cli.conftest import Virgo
from conftest import RunningCloud, free_offset
from virgo.home import write_record
from virgo.kernel.process import ProcessMark
from virgo.members import PORTS

LOOKED_AT = {
    "configuration", "Python", "packages", "engine", "home", "token", "certificates", "exports", "placement",
    "leftovers", "nodes", "ports", "disk", "shared memory", "pressure", "FUSE", "system calls", "open files",
    "kernel TLS", "clock",
}  # fmt: skip


def findings(virgo: Virgo, *words: object, **options: Any) -> dict[str, dict[str, str]]:
    """What the doctor found, by name; of several the last."""
    done = virgo("doctor", "--json", *words, **options)
    found = done.json["checks"]
    failed = any(one["state"] == "fail" for one in found)
    assert done.json["ok"] is not failed
    assert done.status == int(failed)
    assert all(one["hint"] for one in found if one["state"] == "fail")
    return {one["name"]: one for one in found}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    place = tmp_path / "home"
    place.mkdir(mode=0o700)
    return place


def test_everything_is_looked_at(virgo: Virgo, home: Path) -> None:
    """Each thing has its line, for scripts and for people, and an untouched home stays empty."""
    found = findings(virgo)
    assert set(found) >= LOOKED_AT
    assert found["engine"]["message"].endswith("(packaged, checksum as pinned)")
    assert not list(home.iterdir())
    shown = virgo("doctor").text
    assert set(found) <= {line[6:].split("  ")[0] for line in shown.splitlines()}
    assert shown.splitlines()[-1].endswith(" to mend")


def test_a_place_for_shared_regions_that_cannot_be_used(virgo: Virgo, home: Path) -> None:
    """What `virgo up` would refuse is a failure that names it, and a place that works has its room."""
    settings = home / "virgo.toml"
    for place, state in ((home / "nowhere", "fail"), (home, "ok")):
        settings.write_text(f'[memory]\nshared_directory = "{place}"\n')
        found = findings(virgo)["shared memory"]
        assert (found["state"], str(place) in found["message"]) == (state, True)


def test_a_token_that_others_may_read(virgo: Virgo, home: Path) -> None:
    """Mode 0644 is a failure with the command that mends it; so is a token that can be guessed."""
    token = home / "token"
    token.write_text("x" * 40)
    token.chmod(0o644)
    assert findings(virgo)["token"]["hint"] == f"chmod 600 {token}"
    token.chmod(0o600)
    assert findings(virgo)["token"]["state"] == "ok"
    token.write_text("short")
    assert findings(virgo)["token"]["state"] == "fail"


def test_a_port_that_is_held(virgo: Virgo) -> None:
    """The holder is named; ports that do not exist are a failure too."""
    offset = 935
    with socket.create_server(("127.0.0.1", PORTS["queue"] + offset)):
        found = findings(virgo, "--port-offset", offset)["ports"]
    assert found["state"] == "fail"
    assert f"pid {os.getpid()}" in found["message"]
    beyond = findings(virgo, "--port-offset", 1535, "--nodes", 2)["ports"]
    assert beyond["message"] == "port 65536 does not exist"


def test_ports_of_this_cloud_are_not_taken(virgo: Virgo, home: Path) -> None:
    """Asked about the offset of its own cloud, also of a node that does not answer, it says whose."""
    offset = free_offset()
    ports = {name: port + offset for name, port in PORTS.items()}
    with contextlib.ExitStack() as held:
        for port in ports.values():
            held.enter_context(socket.create_server(("127.0.0.1", port)))
        assert findings(virgo, "--port-offset", offset)["ports"]["state"] == "fail"
        process = ProcessMark.of(os.getpid()).to_json()
        write_record(home / "run" / "n1.json", {"process": process, "member": {"ports": ports}})
        found = findings(virgo, "--port-offset", offset)["ports"]
        assert found["state"] == "ok"
        assert found["message"].endswith("are held by the nodes that run")
        found = findings(virgo, "--port-offset", offset, "--nodes", 2)["ports"]
        assert found["message"].endswith("are free, or held by the nodes that run")


def test_the_offset_of_a_running_cloud(virgo: Virgo, cloud3: RunningCloud) -> None:
    """Its ports are its own, also where the doctor is asked to plan with the same offset."""
    offset = cloud3.ports("n1")["cpu"] - PORTS["cpu"]
    found = findings(virgo, "--port-offset", offset, "--nodes", 3, home=cloud3.home)["ports"]
    assert found["state"] == "ok"
    assert found["message"].endswith("are held by the nodes that run")


def test_a_home_that_cannot_be_used(virgo: Virgo, tmp_path: Path) -> None:
    """Too deep for sockets, or open to others."""
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    assert "Linux allows 107" in findings(virgo, home=deep)["home"]["message"]
    shared = tmp_path / "s"
    shared.mkdir()
    shared.chmod(0o777)
    done = virgo("doctor", "--json", home=shared).json["checks"]
    assert {"warn"} <= {one["state"] for one in done if one["name"] == "home"}
    assert any(one["hint"] == f"chmod go-w {shared}" for one in done)


def test_a_configuration_that_cannot_be_read(virgo: Virgo, home: Path) -> None:
    """It is one failure among the findings, and the rest is looked at all the same."""
    (home / "virgo.toml").write_text("[node]\nbnd = '127.0.0.1'\n")
    found = findings(virgo)
    assert found["configuration"]["state"] == "fail"
    assert "bnd" in found["configuration"]["message"]
    assert set(found) >= LOOKED_AT


def test_an_engine_that_is_not_the_pinned_one(
    virgo: Virgo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is too old is a failure; one that is not there is another."""
    server = tmp_path / "nats-server"
    server.write_text("#!/bin/sh\necho 'nats-server: v2.9.0'\n")
    server.chmod(0o755)
    monkeypatch.setenv("VIRGO_ENGINE_SERVER", str(server))
    assert "at least 2.15.1" in findings(virgo)["engine"]["message"]
    monkeypatch.setenv("VIRGO_ENGINE_SERVER", "/no/such/server")
    assert findings(virgo)["engine"]["state"] == "fail"


def test_what_killed_processes_leave_behind(virgo: Virgo, home: Path) -> None:
    """A living process of a dead `up` is named with its pid; a dead record is harmless and said to be."""
    with subprocess.Popen(["sleep", "60"]) as orphan:
        record = home / "run" / "n1.json"
        write_record(record, {"process": ProcessMark.of(orphan.pid).to_json()})
        found = findings(virgo)["leftovers"]
        assert (found["state"], f"n1 (pid {orphan.pid})" in found["message"]) == ("warn", True)
        assert orphan.poll() is None
        orphan.terminate()
    found = findings(virgo)["leftovers"]
    assert (found["state"], "n1.json" in found["message"]) == ("warn", True)
    assert record.exists()


def test_a_running_cloud_is_reached_at_every_place(virgo: Virgo, cloud3: RunningCloud) -> None:
    """Each node is asked by socket and by its six ports; its ports count as its own."""
    found = findings(virgo, home=cloud3.home)
    for name in cloud3.names:
        assert found[f"node {name}"]["message"] == "answers at 7 places"
    assert found["ports"]["message"] == "18 are held by the nodes that run"
    assert found["leftovers"]["state"] == "ok"
    assert found["token"]["message"] == "mode 0600"


def test_exports_that_are_not_there(virgo: Virgo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each export without its directory is a failure that names both."""
    monkeypatch.setenv("VIRGO_FILES_EXPORTS", json.dumps({"good": str(tmp_path), "bad": "/no/such/place"}))
    found = findings(virgo)["exports"]
    assert (found["state"], found["message"]) == ("fail", "bad: /no/such/place is not there")
    monkeypatch.setenv("VIRGO_FILES_EXPORTS", json.dumps({"good": str(tmp_path)}))
    assert findings(virgo)["exports"] == {"name": "exports", "state": "ok", "message": "good", "hint": ""}


def test_rules_that_name_no_node(virgo: Virgo, cloud3: RunningCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule of placement whose node the running cloud does not know is named; without one none can."""
    rules = [{"prefix": "/good", "node": "n2"}, {"prefix": "/bad", "node": "n9"}]
    monkeypatch.setenv("VIRGO_FILES_PLACEMENT", json.dumps(rules))
    found = findings(virgo, home=cloud3.home)["placement"]
    assert found["state"] == "fail"
    assert found["message"] == "the rule for '/bad' names 'n9', which is no node of this cloud"
    assert "n1, n2, n3" in found["hint"]
    assert findings(virgo)["placement"]["message"].startswith("2 rules; whether")
    monkeypatch.setenv("VIRGO_FILES_PLACEMENT", json.dumps(rules[:1]))
    found = findings(virgo, home=cloud3.home)["placement"]
    assert (found["state"], found["message"]) == ("ok", "1 rule")
