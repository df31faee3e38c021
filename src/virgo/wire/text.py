"""A typed line as a request: Redis inline commands and the reference system's `name(arg,arg)`.

Inline, words are split at blanks as redis-server does it: "double quotes" know the escapes \\n \\r \\t \\b
\\a \\xHH \\" \\\\, 'single quotes' only \\'; a quote may begin within a word, but behind its end comes a
blank or the end of the line. A NUL, which telnet may send behind a carriage return, is a blank.

The text form is a name with a parenthesis right behind it, to the line's last character. Its arguments are
split at commas and lose the blanks around them; a quoted argument may hold commas, blanks and
parentheses, and behind its end comes a blank, a comma or the end. A semicolon may follow.
`virgo_cloud_malloc` is `virgo_malloc`.

A line takes time in proportion to its length, whatever is in it.
"""

from __future__ import annotations

import re
from typing import Final

from virgo.errors import BadRequest

_BLANKS: Final = b" \t\n\v\f\r\x00"
_CALL: Final = re.compile(rb"([A-Za-z_][A-Za-z0-9_.]*)\(")
_ESCAPES: Final = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"b": b"\b", b"a": b"\a"}
# What may stand behind a closing quote.
_INLINE_ENDS: Final = frozenset({b"", *(bytes([blank]) for blank in _BLANKS)})
_TEXT_ENDS: Final = _INLINE_ENDS | {b","}
# Possessive repeats (`*+`, `(?>`): a quote that is not closed is found out in one pass.
_PIECE: Final = re.compile(
    rb"""(?P<blank>[ \t\n\v\f\r\x00]+)|(?P<comma>,)"""
    rb"""|(?P<double>"(?>[^"\\]|\\.)*+")|(?P<single>'(?>[^'\\]|\\'|\\)*+')"""
    rb"""|(?P<plain>[^ \t\n\v\f\r\x00,"']+)""",
    re.DOTALL,
)


def split_line(line: bytes) -> list[bytes]:
    """The request in a line without its end; an empty list for a blank line.

    Raises:
        BadRequest: a quote is not closed, or something else than a blank follows its end.
    """
    stripped = line.strip(_BLANKS).removesuffix(b";").rstrip(_BLANKS)
    if stripped.endswith(b")"):
        call = _CALL.match(stripped)
        if call is not None:
            return [call[1], *_split(stripped[call.end() : -1], at_commas=True)]
    return _split(line, at_commas=False)


def _split(text: bytes, *, at_commas: bool) -> list[bytes]:
    words: list[bytes] = []
    word: list[bytes] = []
    gap = b""  # blanks inside an argument of the text form, kept if something follows
    open_word = False
    ends = _TEXT_ENDS if at_commas else _INLINE_ENDS
    position = 0
    while position < len(text):
        piece = _PIECE.match(text, position)
        if piece is None:
            raise BadRequest("unbalanced quotes in the line", hint="Close the quote, or escape it.")
        position = piece.end()
        kind = piece.lastgroup
        if kind == "blank" and not at_commas:
            if open_word:
                words.append(b"".join(word))
            word, open_word = [], False
        elif kind == "blank":
            gap = piece[0]
        elif kind == "comma" and at_commas:
            words.append(b"".join(word))
            word, gap, open_word = [], b"", True
        else:
            if gap and word:
                word.append(gap)
            gap = b""
            word.append(_unquote(piece[0], kind))
            open_word = True
            if kind in ("single", "double") and text[position : position + 1] not in ends:
                raise BadRequest(
                    f"something follows the quote that ends at character {position} of the line",
                    hint="Put a blank behind it, or the whole word into the quotes.",
                )
    if open_word:
        words.append(b"".join(word))
    return words


def _unquote(piece: bytes, kind: str | None) -> bytes:
    if kind == "single":
        return piece[1:-1].replace(b"\\'", b"'")
    if kind == "double":
        return re.sub(rb"\\(x[0-9a-fA-F]{2}|.)", _unescape, piece[1:-1], flags=re.DOTALL)
    return piece


def _unescape(match: re.Match[bytes]) -> bytes:
    code = match[1]
    if len(code) == 3:
        return bytes([int(code[1:], 16)])
    return _ESCAPES.get(code, code)
