"""Names of the engine's objects as NATS subjects and stream names.

A name is any text of 1 to 512 UTF-8 bytes; a NATS subject has dots, wildcards and no spaces. `encode` maps
each name to one subject token, and no two names to the same: bytes outside a safe set become `=XX`.
"""

from __future__ import annotations

import hashlib
import re
from typing import Final

from virgo.errors import BadArgument
from virgo.limits import ENGINE_NAME_BYTES_MAX

REGISTER_PREFIX: Final = "virgo.reg."
SIGNAL_PREFIX: Final = "virgo.sig."
LOG_PREFIX: Final = "virgo.log."
LEASE_PREFIX: Final = "virgo.lease."
READ_GUARD: Final = "virgo.reg-read"

REGISTERS_STREAM: Final = "VIRGO_REGISTERS"
LEASES_STREAM: Final = "VIRGO_LEASES"

# JetStream refuses stream names above 255 characters; a stream is also a directory on the server.
_STREAM_TOKEN_CHARS_MAX: Final = 160
# '/' and '\' are safe in a subject but not in a stream's name, which is made of the same token.
_UNSAFE = re.compile(rb"[^A-Za-z0-9_\-+,;:@!()\[\]]")
_ESCAPED = re.compile(r"=([0-9A-F]{2})")


def encode(name: str) -> str:
    """The subject token of a name.

    Raises:
        BadArgument: the name is empty, too long or no UTF-8.
    """
    try:
        data = name.encode()
    except UnicodeEncodeError:
        raise BadArgument(f"the name {name[:40]!a} is not valid text", hint="Names are UTF-8.") from None
    if not 1 <= len(data) <= ENGINE_NAME_BYTES_MAX:
        raise BadArgument(
            f"a name of {len(data)} bytes", hint=f"Names have 1 to {ENGINE_NAME_BYTES_MAX} UTF-8 bytes."
        )
    return _UNSAFE.sub(lambda match: b"=%02X" % match[0][0], data).decode()


def decode(token: str) -> str:
    """The name of which `encode` made the token."""
    return _ESCAPED.sub(lambda match: chr(int(match[1], 16)), token).encode("latin-1").decode()


def log_stream(log: str) -> str:
    """The stream that holds a log; long names are hashed, and kept in the stream's metadata."""
    token = encode(log)
    if len(token) > _STREAM_TOKEN_CHARS_MAX:
        # '=h' begins no escape, so that no other name has this token.
        token = f"=h{hashlib.sha256(log.encode()).hexdigest()}"
    return f"VIRGO_LOG_{token}"


def log_subject(log: str) -> str:
    """The subject of a log's entries."""
    return LOG_PREFIX + encode(log)
