"""What `virgo doctor` looks at in the installation and in what runs: packages, engine, home, nodes."""

from __future__ import annotations

import os
import platform
import re
import stat
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from virgo.cli.diagnosis import Check, Finding, Patient, State
from virgo.cli.render import count
from virgo.limits import TOKEN_CHARS_MIN

_DISTRIBUTION = "virgo-os"
_PYTHON_MIN = (3, 11)
# sockaddr_un.sun_path of Linux, less its closing NUL.
_SOCKET_PATH_BYTES_MAX = 107
_ASK_S = 3.0


def python(_patient: Patient) -> Iterator[Finding]:
    """The interpreter."""
    state: State = "ok" if sys.version_info >= _PYTHON_MIN else "fail"
    text = f"{platform.python_implementation()} {platform.python_version()} at {sys.executable}"
    yield Finding("Python", state, text, "VIRGO needs Python 3.11 or newer.")


def packages(_patient: Patient) -> Iterator[Finding]:
    """The libraries that the package requires."""
    try:
        wanted = metadata.requires(_DISTRIBUTION) or []
        own = metadata.version(_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        hint = f"pip install {_DISTRIBUTION}, or pip install --editable . in a clone."
        yield Finding("packages", "fail", f"{_DISTRIBUTION} is not installed as a package", hint)
        return
    found, missing = [f"{_DISTRIBUTION} {own}"], []
    for requirement in wanted:
        if "extra ==" in requirement:
            continue
        name = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(requirement)
    if missing:
        yield Finding("packages", "fail", f"missing: {', '.join(missing)}", f"pip install {_DISTRIBUTION}")
    else:
        yield Finding("packages", "ok", ", ".join(found))


def engine(patient: Patient) -> Iterator[Finding]:
    """The engine's program, its version and checksum."""
    settings = patient.config.engine
    if settings.url:
        yield Finding("engine", "ok", f"yours at {settings.url}; no server is started here")
        return
    from virgo.engine.binary import find_binary

    binary = find_binary(settings.server, unsafe=settings.unsafe)
    if binary.findings:
        hint = "Accepted because engine.unsafe is set."
        yield Finding("engine", "warn", f"{binary.path}: {'; '.join(binary.findings)}", hint)
        return
    origin = "packaged, checksum as pinned" if binary.packaged else "your own"
    yield Finding("engine", "ok", f"nats-server {binary.version} ({origin})")


def home(patient: Patient) -> Iterator[Finding]:
    """The directory of all state: writable, private, and not too deep for sockets."""
    place = patient.config.home
    present = next(path for path in (place, *place.parents) if path.exists())
    if not os.access(present, os.W_OK | os.X_OK):
        hint = "Choose another VIRGO_HOME, or mend its owner and mode."
        yield Finding("home", "fail", f"{present} is not writable", hint)
        return
    if place.exists():
        with tempfile.TemporaryFile(dir=place) as probe:  # a full or read-only disk says so now
            probe.write(b"virgo")
        if stat.S_IMODE(place.stat().st_mode) & 0o022:
            yield Finding("home", "warn", f"others may write to {place}", f"chmod go-w {place}")
    from virgo.home import socket_path

    length = len(os.fsencode(socket_path(place, f"n{patient.nodes}")))
    if length > _SOCKET_PATH_BYTES_MAX:
        yield Finding(
            "home",
            "fail",
            f"a socket below {place} has a path of {length} bytes; Linux allows {_SOCKET_PATH_BYTES_MAX}",
            "Choose a shorter VIRGO_HOME.",
        )
    else:
        yield Finding("home", "ok", f"{place} {'is writable' if place.exists() else 'can be made'}")


def token(patient: Patient) -> Iterator[Finding]:
    """The main token: there, and nobody else's to read."""
    path = patient.config.home / "token"
    try:
        status = path.stat()
        length = len(path.read_text(encoding="utf-8").strip())
    except FileNotFoundError:
        yield Finding("token", "ok", "not made yet; the first node makes it")
        return
    if stat.S_IMODE(status.st_mode) & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        yield Finding("token", "fail", f"{path} has mode {mode:04o}", f"chmod 600 {path}")
    elif length < TOKEN_CHARS_MIN:
        hint = f"Remove {path}; the next node makes a good one."
        yield Finding("token", "fail", f"it has {length} characters, {TOKEN_CHARS_MIN} are the least", hint)
    else:
        yield Finding("token", "ok", "mode 0600")


def certificates(patient: Patient) -> Iterator[Finding]:
    """Certificates, where the ports need them or some are there."""
    from virgo.node.transport import exposed, server_tls

    if exposed(patient.config):
        server_tls(patient.config)
        yield Finding("certificates", "ok", f"ready for {patient.config.node.bind}")
    elif (patient.config.home / "tls" / "node.crt").exists():
        from virgo.wire.tls import server_context

        server_context(patient.config.home, patient.config.security)
        yield Finding("certificates", "ok", "ready; the ports are on loopback and do without")
    else:
        yield Finding("certificates", "ok", "none, and none needed: the ports are on loopback")


def leftovers(patient: Patient) -> Iterator[Finding]:
    """What killed processes have left behind."""
    from virgo.home import read_record
    from virgo.node import control

    place = patient.config.home
    supervised = control.running(place) is not None
    living = control.leftovers(place)
    if living and not supervised:
        names = ", ".join(f"{name} (pid {mark.pid})" for name, mark in living.items())
        hint = "`virgo up` starts the cloud again and takes them over; `virgo down` stops them."
        yield Finding("leftovers", "warn", f"these run, but nobody watches them: {names}", hint)
        return
    stale = [
        path.name
        for path in sorted((place / "run").glob("*.json"))
        if path.stem not in living
        and not path.stem.endswith(".failure")
        and "process" in (read_record(path) or {})
        and not (supervised and path.stem == control.RECORD)
    ]
    if stale and not supervised:
        hint = "They do no harm; the next `virgo up` replaces them."
        yield Finding("leftovers", "warn", f"records of processes that were killed: {', '.join(stale)}", hint)
    else:
        yield Finding("leftovers", "ok", "none")


def nodes(patient: Patient) -> Iterator[Finding]:
    """Whether what runs can be reached, by socket and by port."""
    from virgo.node import control

    place = patient.config.home
    if control.running(place) is None and not control.leftovers(place):
        yield Finding("nodes", "ok", f"nothing runs under {place}; `virgo up` starts a node")
        return
    known = control.status(place)["nodes"]
    if not known:
        hint = f"The logs are in {place / 'log'}."
        yield Finding("nodes", "fail", "processes of the cloud run, but none answers", hint)
    for node in known:
        yield _reached(node, patient)


def _reached(node: dict[str, Any], patient: Patient) -> Finding:
    from virgo.errors import VirgoError
    from virgo.kernel.load import machine_id
    from virgo.node.transport import client_tls
    from virgo.wire.address import Address
    from virgo.wire.client import Client

    name = f"node {node['name']}"
    if node["state"] != "up":
        hint = f"If it is to run here, `virgo status` tells more; its log is log/{node['name']}.log."
        return Finding(name, "warn", f"is {node['state']}", hint)
    places = [Address(host=node["address"], port=port, tls=node["tls"]) for port in node["ports"].values()]
    if node["machine"] == machine_id():
        places.insert(0, Address(path=node["socket"]))
    tls = client_tls(patient.config)
    for place in places:
        if place.tls and tls is None:
            return Finding(name, "warn", f"{place} cannot be asked without a certificate of this cloud")
        try:
            with Client(place, tls=tls if place.tls else None, timeout_s=_ASK_S) as client:
                client.execute("PING")
        except VirgoError as error:
            return Finding(name, "fail", f"{place}: {error.message}", error.hint)
    down = [f"{module} is {state}" for module, state in node["modules"].items() if state != "up"]
    if down:
        return Finding(name, "fail", "; ".join(down), f"`virgo modules --node {node['name']}` says why.")
    return Finding(name, "ok", f"answers at {len(places)} places")


def exports(patient: Patient) -> Iterator[Finding]:
    """Whether the exported directories are there."""
    from virgo.files.roots import absent

    wrong = absent(patient.config.files)
    for name, what in wrong.items():
        hint = f"Make or mount the directory, or take {name} out of files.exports."
        yield Finding("exports", "fail", f"{name}: {what}", hint)
    if not wrong:
        yield Finding("exports", "ok", ", ".join(patient.config.files.exports) or "none")


def placement(patient: Patient) -> Iterator[Finding]:
    """Whether the rules of placement name nodes of the cloud; only a cloud that runs can tell."""
    from virgo.node import control

    rules = patient.config.files.placement
    place = patient.config.home
    known = [node["name"] for node in control.status(place)["nodes"]] if rules else []
    strange = [rule for rule in rules if known and rule.node not in known]
    for rule in strange:
        yield Finding(
            "placement",
            "fail",
            f"the rule for {rule.prefix!r} names {rule.node!r}, which is no node of this cloud",
            f"The nodes are: {', '.join(known)}. Mend files.placement, or start that node.",
        )
    if not strange:
        unseen = "" if known or not rules else "; whether their nodes exist shows when the cloud runs"
        yield Finding("placement", "ok", f"{count(len(rules), 'rule')}{unseen}")


CHECKS: tuple[Check, ...] = (
    python, packages, engine, home, token, certificates, exports, placement, leftovers, nodes,
)  # fmt: skip
