"""Runs: requests of a pipeline that are alike, handled by one call of their command instead of one each.

What a request costs beside its work is the way to its handler. A command that has a `run` gets up to
`RUN_REQUESTS_MAX` requests of its name and length at once, and answers as many of them as it can from the
front, in bytes; the others, of keys on other nodes for example, are handled one by one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from virgo.limits import RUN_REQUESTS_MAX
from virgo.wire.commands import Command

if TYPE_CHECKING:
    from virgo.wire.session import Session

_FLUSH_ANSWERS = 1024  # of a few KiB each


def handle_run(
    session: Session,
    command: Command,
    request: list[bytes],
    out: list[bytes],
    writes: list[int],
) -> bool:
    """Handle a request with those behind it that are alike; False if it has to be handled by itself.

    Args:
        session: whose queue has the requests behind it; those that were answered leave it.
        command: their command.
        request: the first.
        out: gets the answers; emptied into the connection when it has become long.
        writes: gets the positions of those that are final only with their batch.
    """
    queue, name, words, alike = session.queue, request[0], len(request), [request]
    if words != command.run_words or not queue:
        return False
    while queue and len(alike) < RUN_REQUESTS_MAX:
        following = queue[0]
        if following[0] != name or len(following) != words:
            break
        alike.append(queue.popleft())
    answers = command.run(session, alike) if command.run is not None and len(alike) > 1 else []
    queue.extendleft(reversed(alike[max(1, len(answers)) :]))
    if command.writes:
        writes += range(len(out), len(out) + len(answers))
    out += answers
    if len(out) > _FLUSH_ANSWERS:
        session.finish(out, writes)
    return bool(answers)
