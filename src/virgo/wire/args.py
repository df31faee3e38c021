"""Arguments of requests, checked: each function says in its error which argument was wrong."""

from __future__ import annotations

from virgo.errors import BadArgument
from virgo.wire.resp import INTEGER_MAX

_HINT = "Mend the argument; COMMAND DOCS says what each command is for."


def integer(data: bytes, name: str, *, low: int = -INTEGER_MAX - 1, high: int = INTEGER_MAX) -> int:
    """A decimal or 0x-prefixed number within bounds. Raises BadArgument."""
    try:
        text = data.decode("ascii").strip()
        if "_" in text or len(text) > 20:
            raise ValueError(text)
        value = int(text, 16) if text[:2] in ("0x", "0X") else int(text)
    except ValueError:
        shown = data[:24].decode("utf-8", "backslashreplace")
        if data.isdigit():
            raise BadArgument(
                f"{name} is out of range: it must be between {low} and {high}", hint=_HINT
            ) from None
        raise BadArgument(
            f"{name} must be an integer, not {shown!r}", hint="Decimal digits, or 0x and hexadecimal ones."
        ) from None
    if not low <= value <= high:
        raise BadArgument(f"{name} is {value}, but must be between {low} and {high}", hint=_HINT)
    return value


def text(data: bytes, name: str, *, bytes_max: int = 4096) -> str:
    """UTF-8 text of bounded length without NUL; other bytes survive as surrogates. Raises BadArgument."""
    if len(data) > bytes_max:
        raise BadArgument(f"{name} may have {bytes_max} bytes", hint=_HINT)
    if b"\0" in data:
        raise BadArgument(f"{name} must not contain NUL", hint=_HINT)
    return data.decode("utf-8", "surrogateescape")
