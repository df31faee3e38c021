"""The maps of this process: one for each store, however many clients share it, and none across a fork.

Before a fork they are closed, and parent and child each map anew when they next need it. If a view is held
then, its map stays the parent's, and the child asks the node.
"""

from __future__ import annotations

import os
import threading
import weakref

from virgo.memory.mapped import Mapped

_maps: weakref.WeakValueDictionary[str, Mapped] = weakref.WeakValueDictionary()
_registry = threading.RLock()


def open_mapped(directory: str, identity: str, map_bytes: int) -> Mapped:
    """The process's map of that store. Raises NotRunning."""
    with _registry:
        found = _maps.get(directory)
        if found is not None and found.identity != identity:
            found.close()
            found = None
        if found is None:
            found = Mapped(directory, identity, map_bytes)
            _maps[directory] = found
        return found


_forking: list[Mapped] = []
_held_open: list[Mapped] = []  # among these


def _before_fork() -> None:
    """A child must not share its parent's places in the reader table, so there are none when it begins."""
    _registry.acquire()
    _forking[:] = list(_maps.values())
    for each in _forking:
        each.opening.acquire()
        if not each.before_fork():
            _held_open.append(each)


def _after_fork() -> None:
    for each in _forking:
        each.opening.release()
    _forking.clear()
    _held_open.clear()
    _registry.release()


def _after_fork_in_child() -> None:
    for each in _held_open:
        each.leave_to_parent()
    _after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
