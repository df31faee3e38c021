"""NumPy arrays in shared memory: `cloud.memory.array` and `attach`. Needs NumPy, the extra `arrays`.

An array is the bytes of a shared region, mapped; its region's note has shape and type. It is writable in
place for who holds its lease, the creator at first, and read-only for all others, in other threads and
processes of the machine. On another machine it is a copy, as of when it was attached or last refreshed.

The lease orders those who keep to it, as locks of files do: a slice that was taken while it was held stays
writable. Results of calculations, slices and other views are plain arrays; they keep the memory mapped, also
when the region has been freed.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any
from weakref import WeakValueDictionary

import msgspec
import numpy as np

from virgo.errors import BadArgument, Denied, NotRunning, UnknownId
from virgo.limits import MEMORY_REGION_BYTES_MAX
from virgo.members import node_of
from virgo.memory import descriptors
from virgo.memory.leases import Lease
from virgo.memory.regioncalls import SegmentInfo
from virgo.memory.segments import Segment
from virgo.wire.call import seconds, whole

_writable: WeakValueDictionary[int, SharedArray] = WeakValueDictionary()


class SharedArray(np.ndarray[Any, Any]):
    """An array in shared memory; as a context manager it is freed at the end of the block.

    Attributes:
        region: its region; None for what was made of a shared array and is none itself.
    """

    region: Any
    _info: SegmentInfo
    _lease: Lease | None
    _fetch: Callable[[SharedArray], Any]

    def __array_finalize__(self, _source: object) -> None:
        self.region, self._lease = None, None

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = (), **options: Any) -> Any:
        """What is calculated is a plain array; only who has the lease may have it written into this one."""
        for target in (*inputs[:1], *out) if method == "at" else out:
            if isinstance(target, SharedArray):
                target._check_writable()
        if out:
            options["out"] = tuple(plain(each) for each in out)
        found = getattr(ufunc, method)(*(plain(each) for each in inputs), **options)
        if not out:
            return found
        if len(out) == 1:
            return found if out[0] is None else out[0]
        return tuple(new if given is None else given for new, given in zip(found, out, strict=True))

    def __array_wrap__(self, array: Any, context: Any = None, return_scalar: bool = False) -> Any:
        """What is calculated is a plain array, unless it is written into this one."""
        if array is self:
            return self
        plain = array.view(np.ndarray)
        return plain[()] if return_scalar else plain

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        return found.view(np.ndarray) if isinstance(found, SharedArray) else found

    def __setitem__(self, key: Any, value: Any) -> None:
        self._check_writable()
        super().__setitem__(key, value)

    def copy(self, order: Any = "C") -> Any:
        """A plain array of its own."""
        return self.view(np.ndarray).copy(order)

    def __copy__(self) -> Any:
        return self.copy("K")

    def __deepcopy__(self, _memo: Any) -> Any:
        return self.copy("K")

    def __reduce_ex__(self, protocol: Any) -> Any:
        """It travels as its id; elsewhere it is attached, and on its machine so without a copy."""
        if self.region is None:
            return self.view(np.ndarray).__reduce_ex__(protocol)
        return arrived, (self._info,)

    # --- the right to write -------------------------------------------------------------------

    @property
    def held(self) -> bool:
        """Whether this process has the lease, by this object."""
        return self._lease is not None and self._lease.held

    def acquire(self, timeout_s: float = 0.0) -> None:
        """Have the lease, and so write in place until `release`; nothing if this thread has it already.

        A thread that ends without releasing it keeps it; then any other one may release it.

        Raises:
            Busy: another thread or process has it, for so many seconds. UnknownId: the array was freed.
            BadArgument: its memory is on another machine. WrongType: `timeout_s` is no number.
        """
        lease, me = self._leased(), threading.current_thread()
        timeout_s = seconds(timeout_s)
        if lease.owner is me:
            return
        with self._explained(lease):
            lease.acquire(timeout_s, me)
        self._write_now()

    def release(self) -> None:
        """Let go of the lease: from now on the array is read-only here. Nothing if it is not held.

        Raises BadArgument if another thread or task of this process has acquired it, and has not ended.
        """
        owner = None if self._lease is None else self._lease.owner
        if not _is_ours(owner):
            raise BadArgument(
                f"the lease of the array of region {self.region.id:#x} is of {owner!r:.100}",
                hint="Who has acquired it releases it.",
            )
        self._let_go()

    @contextlib.contextmanager
    def writing(self, timeout_s: float = 0.0) -> Iterator[SharedArray]:
        """Hold the lease for a `with` block, or for as long as this thread does anyway; see `acquire`."""
        kept = self._lease is not None and self._lease.owner is threading.current_thread()
        self.acquire(timeout_s)
        try:
            yield self
        finally:
            if not kept:
                self.release()

    @contextlib.asynccontextmanager
    async def writing_async(self, timeout_s: float = 0.0) -> AsyncIterator[SharedArray]:
        """Hold the lease for an `async with` block of this task; others wait for it, and so do other tasks.

        What a thread has acquired, the event loop's too, no task has. Raises as `acquire`.
        """
        from virgo.memory import aleases  # the blocking face does without asyncio

        lease, me = self._leased(), aleases.current()
        timeout_s = seconds(timeout_s)
        kept = lease.owner is me
        if not kept:
            with self._explained(lease):
                await aleases.acquire(lease, timeout_s, me)
            self._write_now()
        try:
            yield self
        finally:
            if not kept:
                self.release()

    def _leased(self) -> Lease:
        if self._lease is None:
            raise self._read_only()
        return self._lease

    @contextlib.contextmanager
    def _explained(self, lease: Lease) -> Iterator[None]:
        """What it means for an array that its segment cannot be opened."""
        try:
            yield
        except NotRunning as error:
            if lease.segment.exists():
                raise Denied(
                    f"{error.message}: it is another user's", hint="Write by region.write."
                ) from error
            raise UnknownId(f"the array of region {self.region.id:#x} was freed") from None

    def _write_now(self) -> None:
        self.flags.writeable = True
        _writable[id(self)] = self

    def _let_go(self) -> None:
        if self._lease is not None and self._lease.held:
            self.flags.writeable = False
            self._lease.release()

    def _check_writable(self) -> None:
        if not self.flags.writeable and self.region is not None:
            raise self._read_only()

    def __virgo_node__(self) -> int:
        """Where it lies; what was made of it lies nowhere in particular."""
        return 0 if self.region is None else node_of(self.region.id)

    def _of_region(self) -> Any:
        """Its region. Raises BadArgument for a part of one, which has none."""
        if self.region is None:
            raise BadArgument(
                "this was made of a shared array, and is none",
                hint="Its source has the region and the lease: ask that.",
            )
        return self.region

    def _read_only(self) -> BadArgument:
        self._of_region()
        what = f"the array of region {self.region.id:#x}"
        if self._lease is None:
            return BadArgument(
                f"{what} is a copy here: its memory is on node {self._info.node}",
                hint="array.write(values, start) writes there, and array.refresh() fetches it anew.",
            )
        return BadArgument(
            f"{what} is read-only here, without its lease", hint="`with array.writing(timeout_s=...):`"
        )

    # --- the region ---------------------------------------------------------------------------

    def write(self, values: Any, start: int = 0) -> Any:
        """Write values from element `start` on, counted in memory's order, from any machine; atomic.

        Raises:
            Busy: somebody, this array included, holds the lease. TooLarge: they do not fit.
        """
        data = np.ascontiguousarray(values, dtype=self.dtype).tobytes()
        return self._of_region().write(data, whole(start, "the start") * self.itemsize)

    def refresh(self) -> Any:
        """Have a copy hold what the array holds now; one whose memory is on this machine does anyway."""
        self._of_region()
        return self._fetch(self)

    def free(self) -> Any:
        """Give the memory back; who has it mapped keeps the pages. Raises UnknownId if it was freed."""
        region = self._of_region()
        self._let_go()
        return region.free()

    def __enter__(self) -> SharedArray:
        if inspect.iscoroutinefunction(self._of_region().free):
            raise BadArgument("freeing this array is awaited", hint="`async with array:`")
        return self

    def __exit__(self, *_exc: object) -> None:
        self.free()

    async def __aenter__(self) -> SharedArray:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        done = self.free()
        if isinstance(done, Awaitable):
            await done


def _is_ours(owner: object) -> bool:
    """Whether a lease that was acquired for that one is ours to release: also if its owner has ended."""
    if owner is None or owner is threading.current_thread():
        return True
    if isinstance(owner, threading.Thread):
        return not owner.is_alive()
    from virgo.memory import aleases  # which a task has loaded

    return aleases.is_ours(owner)


def plain(given: Any) -> Any:
    """As NumPy's own class, if it is ours."""
    return given.view(np.ndarray) if isinstance(given, SharedArray) else given


def arrived(info: SegmentInfo) -> SharedArray:
    """An array that came from another process: mapped, if its memory is here, and no node need be asked.

    What must be asked for goes through the connection of this process.
    """
    from virgo.memory.region import arrived as region_arrived
    from virgo.memory.region import near_client

    client = near_client()
    segment = info.segment()
    try:
        descriptors.shut(segment.open())
    except NotRunning:
        found: SharedArray = client.attach(info.id)
        return found
    return build(info, segment, region_arrived(info.id, info.size), lambda _array: None)


# --- how they are noted -------------------------------------------------------------------------


def describe(shape: Any, dtype: Any) -> tuple[int, str]:
    """Bytes and note of an array's region. Raises BadArgument."""
    try:
        kind = np.dtype(dtype)
    except TypeError as error:
        raise BadArgument(f"{dtype!r:.60} is no type of elements: {error}", hint="float, 'i4', ...") from None
    if kind.subdtype is not None:
        raise BadArgument(
            f"{kind} is itself an array, and no type of elements", hint="Make its sides part of the shape."
        )
    if kind.hasobject:
        raise BadArgument(
            f"an array of {kind} cannot be shared: it holds references",
            hint="Numbers, or fixed-size records.",
        )
    sides = [whole(side, "a side") for side in (shape if isinstance(shape, tuple | list) else (shape,))]
    if any(side < 0 for side in sides):
        raise BadArgument(f"the shape {tuple(sides)} has a negative side", hint="0 or more elements each.")
    if not _possible(len(sides), kind):
        raise BadArgument(f"NumPy has no arrays of {len(sides)} sides", hint="Use fewer and longer ones.")
    note = {"shape": sides, "dtype": np.lib.format.dtype_to_descr(kind)}
    return max(1, math.prod(sides) * kind.itemsize), msgspec.json.encode(note).decode()


def parse(info: SegmentInfo) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type, as noted. Raises BadArgument if it is no array; the note may be anybody's."""
    try:
        note = msgspec.json.decode(info.note.encode(), type=_Note)
        kind = np.lib.format.descr_to_dtype(_tuples(note.dtype))
        fits = 0 <= math.prod(note.shape) * kind.itemsize <= info.size
        sound = all(side >= 0 for side in note.shape) and _possible(len(note.shape), kind)
        if kind.hasobject or not fits or not sound:
            raise ValueError(info.note)
    except (msgspec.DecodeError, ValueError, TypeError, KeyError, IndexError, SyntaxError):
        raise no_array(info.id) from None
    return tuple(note.shape), kind


def _possible(sides: int, kind: np.dtype[Any]) -> bool:
    """Whether NumPy has arrays of so many sides: a bound of its own, which its versions differ in."""
    try:
        np.empty((0,) * sides, kind)
    except ValueError:
        return False
    return True


class _Note(msgspec.Struct):
    shape: list[int]
    dtype: Any


def _tuples(descr: Any) -> Any:
    """What JSON made lists of: a record's fields are tuples in a list, a field's shape is a tuple."""
    if not isinstance(descr, list):
        return descr
    return [
        tuple(tuple(part) if index == 2 else _tuples(part) for index, part in enumerate(field))
        for field in descr
    ]


def no_array(identifier: int) -> BadArgument:
    """The error for a region that is none."""
    return BadArgument(
        f"region {identifier:#x} is no array",
        hint="memory.array(shape, dtype) makes one; region(id) serves it.",
    )


# --- how they come to be ------------------------------------------------------------------------


def build(info: SegmentInfo, segment: Segment | None, region: Any, fetch: Any) -> SharedArray:
    """The array, read-only: the memory itself, or without a segment a copy of nothing yet.

    Args:
        info: of its region.
        segment: its file, if that is here.
        region: what is to be its region.
        fetch: has the bytes of a copy fetched; see `SharedArray.refresh`.
    """
    shape, kind = parse(info)
    memory: Any
    if segment is None:
        memory = bytearray(info.size)
    else:
        try:
            memory = segment.map(write=True)
        except NotRunning:
            memory = segment.map()
    array = np.ndarray.__new__(SharedArray, shape, kind, memory)
    array.flags.writeable = False
    array.region, array._info, array._fetch = region, info, fetch
    array._lease = None if segment is None else Lease(segment)
    return array


def creator(array: SharedArray) -> SharedArray:
    """With the lease, if its memory is here."""
    if array._lease is not None:
        array.acquire()
    return array


def pieces(array: SharedArray) -> Iterator[tuple[int, int]]:
    """Offset and size of the reads that fetch a copy; none if it is the memory itself."""
    if array._lease is None:
        for offset in range(0, array.nbytes, MEMORY_REGION_BYTES_MAX):
            yield offset, min(MEMORY_REGION_BYTES_MAX, array.nbytes - offset)


def fill(array: SharedArray, offset: int, data: bytes) -> None:
    """Take bytes into a copy."""
    memory: Any = array.base
    memoryview(memory)[offset : offset + len(data)] = data


def _after_fork_in_child() -> None:
    """The lease is the parent's."""
    for array in list(_writable.values()):
        array.flags.writeable = False
    _writable.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
