"""Names for shell completion: cheap, bounded in time, and silent when there is nothing to say."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from virgo.cloud import Cloud

_TIMEOUT_S = 0.5  # a shell that waits longer for a name is worse than one without


def node_names(incomplete: str) -> list[str]:
    """Nodes of the cloud; those of this machine if none answers."""
    from virgo.config import home
    from virgo.node.control import local_nodes

    return _matching(incomplete, _asked_nodes, lambda: local_nodes(home()))


def export_names(incomplete: str) -> list[tuple[str, str]]:
    """Functions and programs that may be called, with what they do."""
    found: list[tuple[str, str]] = []
    with suppress(Exception), _cloud() as cloud:  # completion has no place to show an error
        found = [(entry.name, entry.summary) for entry in cloud.cpu.exports()]
    return [entry for entry in found if entry[0].startswith(incomplete)]


def task_ids(incomplete: str) -> list[tuple[str, str]]:
    """Calls that run, with what they are called."""
    found: list[tuple[str, str]] = []
    with suppress(Exception), _cloud() as cloud:  # completion has no place to show an error
        found = [(one.task, one.label) for one in cloud.cpu.tasks()]
    return [entry for entry in found if entry[0].startswith(incomplete)]


def remote_paths(incomplete: str) -> list[str]:
    """Files and directories of the cloud."""
    directory = incomplete.rpartition("/")[0] + "/"

    def listed() -> Iterable[str]:
        from virgo.cli.files import listing

        with _cloud() as cloud:
            return [f"{directory}{entry.name}" for entry in listing(cloud, directory)]

    return _matching(incomplete, listed)


def _cloud() -> Cloud:
    from virgo.cloud import connect

    return connect(embedded=False, timeout_s=_TIMEOUT_S)


def _asked_nodes() -> Iterable[str]:
    with _cloud() as cloud:
        return [member.name for member in cloud.nodes]


def _matching(incomplete: str, *sources: Callable[[], Iterable[str]]) -> list[str]:
    """What the first source that has an answer gives."""
    for source in sources:
        with suppress(Exception):  # completion has no place to show an error
            return [name for name in source() if name.startswith(incomplete)]
    return []
