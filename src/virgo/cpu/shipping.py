"""Functions and arguments as bytes.

Pickling a function by value costs a hundred times more than calling it, so the bytes are kept: but only as
long as nothing that they hold can have changed. A function whose code, defaults, closure and globals are
all immutable, and still the same objects, is shipped from memory; any other is pickled anew each time.
Only short bytes are kept, and few, so what they keep alive is little.

The program itself, and modules beside it, are shipped by value; installed modules by name, so the nodes must
have them.
"""

from __future__ import annotations

import functools
import hashlib
import io
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import cloudpickle

from virgo.cpu import apart
from virgo.cpu.apart import Apart, Large, is_large
from virgo.cpu.arguments import cached, pack_arguments, ship_plain
from virgo.cpu.calls import Task

_ATOMS: Final = (type(None), bool, int, float, complex, str, bytes, types.BuiltinFunctionType)
_DEPTH_MAX: Final = 4

_KEPT_BYTES_MAX: Final = 64 * 1024
_KEPT_MAX: Final = 256

# By the identity of the function, which the parts keep alive: all that its bytes depend on, and these.
_kept: dict[int, tuple[list[Any], Shipped]] = {}
_modules_seen = 0


class Shipped:
    """A callable as bytes, for `pickle.loads`.

    Attributes:
        data, digest: the bytes, and their SHA-256.
        task: what whoever calls it without options keeps with it.
    """

    __slots__ = ("data", "digest", "task")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.digest = hashlib.sha256(data).digest()
        self.task: Any = None


def ship(function: Any) -> Shipped:
    """A callable as bytes. Raises what pickling raises."""
    parts: list[Any] = []
    if type(function) is not types.FunctionType or not _collect(function, parts, 0):
        return Shipped(_dump(function))
    known, shipped = _kept.get(id(function), _NOTHING)
    if len(known) == len(parts) and all(old is new for old, new in zip(known, parts, strict=True)):
        return shipped
    shipped = Shipped(_dump(function))
    if len(shipped.data) <= _KEPT_BYTES_MAX:
        if len(_kept) >= _KEPT_MAX:
            _kept.clear()
        _kept[id(function)] = parts, shipped
    return shipped


_NOTHING: Final[tuple[list[Any], Shipped]] = ([], Shipped(b""))


def ship_arguments(args: tuple[Any, ...], kwargs: dict[str, Any], *, segments: bool = False) -> bytes | Apart:
    """Arguments for `arguments.load_arguments`; see `apart.dumps`. Raises what pickling raises."""
    if not kwargs:
        plain = ship_plain(args)
        if plain is not None:
            return plain
    _include_neighbours()
    if any(map(is_large, args)):
        args = tuple(Large(value) if is_large(value) else value for value in args)
    return apart.dumps((args, kwargs), dumps, segments=segments)


def arguments_of(task: Task, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes | Apart:
    """The arguments of one call of a task. Raises BadArgument, or what pickling raises."""
    if task.trusted:
        return ship_arguments(args, kwargs, segments=True)
    return pack_arguments(args, kwargs)


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """By value also what has a cache, whose functions others have only by name."""

    def reducer_override(self, obj: Any) -> Any:
        """See `pickle.Pickler`."""
        if type(obj) is _Cached and not _name_is_enough(obj):
            return cached, (obj.__wrapped__, obj.cache_parameters())
        return super().reducer_override(obj)


_Cached: Final = functools._lru_cache_wrapper


def _name_is_enough(function: Any) -> bool:
    """Whether a node finds a function of a module by its name."""
    module = sys.modules.get(function.__module__)
    if "<locals>" in function.__qualname__:
        return False
    return module is not None and module.__name__ != "__main__" and _goes_by_name(module)


def dumps(
    value: Any, protocol: int = 5, buffer_callback: Callable[[pickle.PickleBuffer], Any] | None = None
) -> bytes:
    """`cloudpickle.dumps` by that pickler."""
    with io.BytesIO() as file:
        _Pickler(file, protocol=protocol, buffer_callback=buffer_callback).dump(value)
        return file.getvalue()


def _dump(value: Any) -> bytes:
    _include_neighbours()
    return dumps(value)


def _include_neighbours() -> None:
    """Ship modules that lie beside the program by value, like the program: no node has them."""
    global _modules_seen  # noqa: PLW0603 - what of sys.modules was looked at
    if len(sys.modules) == _modules_seen:
        return
    _modules_seen = len(sys.modules)
    program = getattr(sys.modules.get("__main__"), "__file__", None)
    beside = Path(program).resolve().parent if program else Path.cwd()
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not file or name == "__main__" or name.partition(".")[0] == "virgo":
            continue
        place = Path(file).resolve()
        if place.is_relative_to(beside) and not _installed(place):
            cloudpickle.register_pickle_by_value(module)


def _installed(place: Path) -> bool:
    """Whether a module's file belongs to Python or to an installed distribution."""
    inside = any(place.is_relative_to(prefix) for prefix in (sys.prefix, sys.base_prefix))
    return inside or not {"site-packages", "dist-packages"}.isdisjoint(place.parts)


def _collect(function: types.FunctionType, parts: list[Any], depth: int) -> bool:
    """List all that the function's bytes depend on; False if any of it could change in place."""
    if depth > _DEPTH_MAX or function.__dict__:
        return False
    code = function.__code__
    parts += [function, code]
    values = list(function.__defaults__ or ()) + list((function.__kwdefaults__ or {}).values())
    try:
        values += [cell.cell_contents for cell in function.__closure__ or ()]
    except ValueError:  # a cell that is not filled yet
        return False
    for name in _names(code):
        if name in function.__globals__:
            values.append(function.__globals__[name])
        else:
            parts.append(name)  # a built-in, or an attribute: should a global of that name appear, it shows
    return all(_frozen(value, parts, depth) for value in values)


def _frozen(value: Any, parts: list[Any], depth: int) -> bool:
    parts.append(value)
    kind = type(value)
    if kind in _ATOMS:
        return True
    if kind is types.ModuleType:
        return _goes_by_name(value)
    if kind is types.FunctionType:
        return any(value is part for part in parts[:-1]) or _collect(value, parts, depth + 1)
    if kind in (tuple, frozenset):
        return depth < _DEPTH_MAX and all(_frozen(item, parts, depth + 1) for item in value)
    return False


def _goes_by_name(module: types.ModuleType) -> bool:
    """Whether the bytes hold a module's name only, and not what is in it."""
    name = module.__name__
    if sys.modules.get(name) is not module:
        return False
    _include_neighbours()
    by_value = cloudpickle.list_registry_pickle_by_value()
    while name and name not in by_value:
        name = name.rpartition(".")[0]
    return not name


def _names(code: types.CodeType) -> list[str]:
    """The global names that a function and the functions inside it may use."""
    names = list(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names += _names(constant)
    return names
