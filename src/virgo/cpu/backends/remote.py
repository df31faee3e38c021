"""A call where an engine has put it: what VIRGO ships is run, and comes to the outcome that its workers make.

Beyond those of `messages` there are three outcomes that only go from here to `base`: that the call was taken
back before it began (TAKEN), that it was stopped, and that it had begun before and what became of it is lost.
"""

from __future__ import annotations

import os
import pickle
import socket
import time
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, Final

from virgo import context as contexts
from virgo.context import Context
from virgo.cpu import messages
from virgo.cpu.outcomes import not_loaded, outcome_of
from virgo.limits import FUNCTIONS_CACHED_MAX

STOPPED: Final = b"S"
LOST: Final = b"L"


@cache
def machine() -> str:
    """The node's name in messages: that of the machine."""
    return socket.gethostname()


def run(key: str, head: bytes, function: bytes, arguments: bytes) -> bytes:
    """Run a call.

    Args:
        key: its id.
        head: a `Parcel`.
        function: the callable, pickled.
        arguments: its arguments, for `arguments.load_arguments`.
    """
    parcel = messages.decode_parcel(head)
    deadline = None if parcel.left_ms is None else time.monotonic() + parcel.left_ms / 1000
    before = os.getpid()
    with contexts.using(Context(id=key, cause=parcel.cause, deadline=deadline)):
        try:
            target = _loaded(function)
        except BaseException as error:  # noqa: BLE001 - unpickling runs code: anything may come
            return not_loaded(parcel, error, node=machine())
        outcome = outcome_of(parcel, target, [arguments], node=machine())
    if os.getpid() != before:  # the call has returned in a process that it forked
        os._exit(0)
    assert isinstance(outcome, bytes)
    return outcome


@lru_cache(FUNCTIONS_CACHED_MAX)
def _loaded(function: bytes) -> Callable[..., Any]:
    """As in VIRGO's workers, a function keeps its globals between calls."""
    return pickle.loads(function)  # type: ignore[no-any-return]  # noqa: S301 - the client's own cluster
