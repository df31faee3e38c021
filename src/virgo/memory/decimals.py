"""Addition of decimal numbers as INCRBYFLOAT does it: in the processor's 80-bit floating point.

Redis adds in C's `long double`, whose mantissa has 64 bits on x86-64, and prints 17 decimals without
trailing zeros. Python has no such type, so numbers are exact fractions that are rounded to 64 bits, half
to even, after reading and after adding.
"""

from __future__ import annotations

import re
from fractions import Fraction

from virgo.errors import BadArgument

_MANTISSA_BITS = 64
_DECIMALS = 17
_LENGTH_MAX = 5 * 1024  # a longer text is no number for Redis either
_EXPONENT_MAX = 4932  # of 80-bit floating point, in decimal
_NUMBER = re.compile(rb"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE]([+-]?\d{1,5}))?").fullmatch
_LARGEST = (2 - Fraction(1, 2 ** (_MANTISSA_BITS - 1))) * Fraction(2) ** 16383


def add(left: bytes, right: bytes) -> bytes:
    """The sum as text. Raises BadArgument: one of them is no number, or the sum is none."""
    total = _rounded(_parse(left) + _parse(right))
    if abs(total) > _LARGEST:
        raise BadArgument("the sum would be infinite", hint="Take smaller numbers.")
    return _shown(total)


def _parse(text: bytes) -> Fraction:
    match = _NUMBER(text) if len(text) < _LENGTH_MAX else None
    if match is None or abs(int(match[1] or 0)) > _EXPONENT_MAX:
        shown = text[:24].decode("utf-8", "backslashreplace")
        raise BadArgument(f"{shown!r} is not a number", hint="As in 10.5 or 2.0e3.")
    return _rounded(Fraction(text.decode("ascii").replace("+.", "+0.").replace("-.", "-0.")))


def _rounded(number: Fraction) -> Fraction:
    """To the nearest number of 64 bits, half to even."""
    if not number:
        return number
    size = abs(number)
    exponent = size.numerator.bit_length() - size.denominator.bit_length() - _MANTISSA_BITS
    # The quotient has 64 or 65 bits: too many by one are seen after the division.
    while (mantissa := size / Fraction(2) ** exponent) >= 1 << _MANTISSA_BITS:
        exponent += 1
    while mantissa < 1 << _MANTISSA_BITS - 1:
        exponent -= 1
        mantissa = size / Fraction(2) ** exponent
    return (round(mantissa) if number > 0 else -round(mantissa)) * Fraction(2) ** exponent


def _shown(number: Fraction) -> bytes:
    """17 decimals, half to even, without trailing zeros."""
    scaled = round(number * 10**_DECIMALS)
    whole, decimals = divmod(abs(scaled), 10**_DECIMALS)
    text = f"{whole}.{decimals:0{_DECIMALS}d}".rstrip("0").rstrip(".")
    return (f"-{text}" if scaled < 0 else text).encode()
