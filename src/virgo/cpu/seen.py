"""Calls, and what they have written, as they are shown to people."""

from __future__ import annotations

import msgspec


class TaskInfo(msgspec.Struct, frozen=True):
    """One call.

    Attributes:
        task: its id, as in the context of the call.
        node: where it is.
        label: what it is called.
        state: `waiting` for a worker, `running`, or `leased`: a worker that a client has, doing nothing.
        seconds: in that state.
        calls: begun so far by the worker, for the client that has leased it; 0 if none has.
        pid: of the worker, 0 while it waits.
        owner: on whose behalf.
        cpus, gpus, memory: what it was granted: places, GPUs, bytes (0 for no limit).
    """

    task: str
    node: str
    label: str
    state: str
    seconds: float
    calls: int
    pid: int
    owner: str
    cpus: int
    gpus: int
    memory: int


class Written(msgspec.Struct, frozen=True):
    """A part of what a call has written.

    Attributes:
        task, node, label: which call.
        data: bytes of its standard output and standard error, as they came.
        offset: where they begin: more than was asked for if what was before is not kept.
        ended: whether the call writes no more. If there are no data either, that was all.
    """

    task: str
    node: str
    label: str
    data: bytes
    offset: int
    ended: bool
