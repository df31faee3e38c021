"""Functions that may be called by name, from any language: `@virgo.export`.

The registry is of the process: a node's workers have what `virgo.cpu.builtin` and the modules in
`cpu.imports` register; `cloud.cpu.publish` ships a function to the whole cloud instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final, TypeVar, overload

from virgo.errors import BadArgument
from virgo.limits import NAME_CHARS_MAX

F = TypeVar("F", bound=Callable[..., Any])

_NAME: Final = re.compile(rf"[A-Za-z_][A-Za-z0-9_.\-]{{0,{NAME_CHARS_MAX - 1}}}")
_registry: dict[str, Callable[..., Any]] = {}


@overload
def export(function: F, /) -> F: ...
@overload
def export(*, name: str) -> Callable[[F], F]: ...
def export(function: Any = None, /, *, name: str = "") -> Any:
    """Let a function be called by name, its own unless another is given; it is returned unchanged.

    Raises:
        BadArgument: the name is not one, or another function has it.
    """
    if function is None:
        return lambda decorated: _register(decorated, name)
    return _register(function, name)


def exported() -> Mapping[str, Callable[..., Any]]:
    """The registered functions by name; a live view."""
    return MappingProxyType(_registry)


def check_name(name: str) -> str:
    """The name, if it can be one of a call. Raises BadArgument."""
    if not _NAME.fullmatch(name):
        raise BadArgument(
            f"{name[:80]!r} cannot be the name of an exported function",
            hint=f"A letter, then letters, digits, '_', '.', '-'; at most {NAME_CHARS_MAX} characters.",
        )
    return name


def summary_of(function: Callable[..., Any]) -> str:
    """The first line of its docstring."""
    return (function.__doc__ or "").strip().partition("\n")[0]


def _register(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    if not callable(function):
        raise BadArgument(
            f"@virgo.export needs a function, not {type(function).__name__}",
            hint="Write @virgo.export, or @virgo.export(name=...), above a def.",
        )
    name = check_name(name or getattr(function, "__name__", ""))
    present = _registry.get(name)
    if present is not None and _place(present) != _place(function):
        raise BadArgument(
            f"{name!r} is exported already, by {'.'.join(_place(present))}",
            hint="Give one of them another name: @virgo.export(name=...).",
        )
    _registry[name] = function
    return function


def _place(function: Callable[..., Any]) -> tuple[str, str]:
    return getattr(function, "__module__", ""), getattr(function, "__qualname__", repr(function))
