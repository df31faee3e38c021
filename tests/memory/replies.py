"""Replies of either side in one form, so that they can be compared."""

from __future__ import annotations

from typing import Any

from redis import ResponseError

from virgo.errors import VirgoError


def plain(reply: Any) -> Any:
    """A reply as bytes and numbers, all errors alike."""
    if isinstance(reply, (ResponseError, VirgoError)):
        return VirgoError
    if isinstance(reply, str):
        return reply.encode()
    if isinstance(reply, (list, tuple)):
        return [plain(part) for part in reply]
    if isinstance(reply, bytes) and reply.startswith(b"+"):
        return reply[1:].rstrip()
    return reply
