"""Refuses an engine whose settings can lose acknowledged data, or answer a read from the past.

What is checked of a stream is in its configuration; what is checked of a server needs its monitoring port,
which an embedded server has on loopback. Of a server that only its URL is known of, its version is seen,
and whether it syncs before it acknowledges is not: that is a note, not a refusal, and `status` shows it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

# Skipped syncs were still being mended in the versions before.
VERSION_MIN: Final = (2, 15, 1)


@dataclass(frozen=True, slots=True)
class Audit:
    """What was found: `unsafe` settings, and `notes` on what could not be seen."""

    unsafe: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def version_findings(version: str) -> list[str]:
    """What is wrong with a server of this version, `2.15.1` for example."""
    match = re.match(r"v?(\d+)\.(\d+)\.(\d+)", version)
    wanted = ".".join(map(str, VERSION_MIN))
    if match is None:
        return [f"the server's version is {version or 'not given'!r}, at least {wanted} is needed"]
    if tuple(map(int, match.groups())) < VERSION_MIN:
        return [f"the server's version is {version}, at least {wanted} is needed"]
    return []


def server_findings(varz: Mapping[str, Any]) -> list[str]:
    """What is wrong with a server that says this at `/varz` of its monitoring port."""
    found = version_findings(str(varz.get("version", "")))
    jetstream = varz.get("jetstream") or {}
    settings = jetstream.get("config")
    if not settings:
        return [*found, "JetStream is not enabled"]
    if not settings.get("sync_always"):
        found.append(
            f"sync_interval is {settings.get('sync_interval', 0) / 1e9:g} s, not 'always': "
            "what was acknowledged in that time is lost with the power"
        )
    return found


def stream_findings(
    configuration: Mapping[str, Any], *, replicas: int, settings: Mapping[str, Any]
) -> list[str]:
    """What is wrong with a stream of this configuration.

    Args:
        replicas: copies that the cloud wants.
        settings: further settings that the stream's use relies on.
    """
    found = []
    if configuration.get("storage") != "file":
        found.append(f"its storage is {configuration.get('storage')!r}, not 'file': a restart loses all")
    if configuration.get("num_replicas", 1) < replicas:
        found.append(f"it has {configuration.get('num_replicas', 1)} replicas, not {replicas}")
    if configuration.get("allow_direct"):
        found.append("allow_direct is set: a replica that lags may answer a read")
    if configuration.get("persist_mode") not in (None, "", "default"):
        found.append(f"persist_mode is {configuration['persist_mode']!r}: acknowledged before it is on disk")
    if configuration.get("discard") != "new":
        found.append("discard is not 'new': a full stream drops its oldest entries without a word")
    if not configuration.get("allow_atomic"):
        found.append("allow_atomic is not set: an append of several entries is refused")
    if configuration.get("no_ack"):
        found.append("no_ack is set: nothing is ever acknowledged")
    found += [
        f"{limit} is {configuration[limit]}: entries go away by themselves"
        for limit in ("max_msgs", "max_age")
        if configuration.get(limit, 0) > 0
    ]
    found += [
        f"{key} is {configuration.get(key)!r}, not {wanted!r}"
        for key, wanted in settings.items()
        if configuration.get(key) != wanted
    ]
    return found
