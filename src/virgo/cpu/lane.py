"""A leased worker, as its client sees it: calls out, outcomes in, and what is left when it ends.

Not safe for several threads: whoever has a lane has it alone. Nothing here waits but `call`.
"""

from __future__ import annotations

import os
import select
import socket
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from typing import Final

import hiredis
import msgspec

from virgo.cpu import messages
from virgo.cpu.apart import APART, GIFT, LENT, Apart, Received
from virgo.cpu.calls import Item, Task
from virgo.cpu.messages import Outcome
from virgo.cpu.segments import Segment, spare
from virgo.cpu.slate import BEGUN, LET_GO, TAKEN_FROM, TAKEN_TO, UNSENT, UNSENT_FIRST, Slate
from virgo.kernel import barrier
from virgo.limits import AWAKE_S, SOON_S
from virgo.wire.wakeful import ALONE

_RECEIVE_BYTES: Final = 256 * 1024
_EXTRA_BYTES: Final = socket.CMSG_SPACE(4)
_task_of = attrgetter("task")


class LaneOver(Exception):
    """The worker has closed the connection, or died."""


@dataclass(slots=True)
class Rest:
    """What is left of a lane that has ended.

    Attributes:
        ended: calls with their outcomes.
        begun: calls that had begun and have no outcome.
        fresh: calls that had not begun.
        let_go: whether the worker gave the lease back, rather than die.
    """

    ended: list[tuple[Item, Outcome]] = field(default_factory=list)
    begun: list[Item] = field(default_factory=list)
    fresh: list[Item] = field(default_factory=list)
    let_go: bool = False


class Lane:
    """One leased worker.

    Args:
        connection: to it; becomes non-blocking.
        slate: that of the lease.
        lease: number of the lease on its node.
        node: the name of that.

    Attributes:
        busy_since: since when it has been at the call that it is at, in monotonic time; 0.0 if it has none.
        slow: nothing has been heard of its call for long; it gets no more until something is.
        stopping: why it is being stopped on our request, "" while it is not.
        victims, after: the calls that die with it, and who is told when it is dead.
        bytes: of the arguments of calls that it has.
    """

    def __init__(self, connection: socket.socket, slate: Slate, lease: int, node: str) -> None:
        connection.setblocking(False)
        self.lease = lease
        self.node = node
        self.busy_since = 0.0
        self.slow = False
        self.stopping = ""
        self.victims: list[Item] = []
        self.after: list[Callable[[], None]] = []
        self.bytes = 0
        self._connection = connection
        self._slate = slate
        self._reader = hiredis.Reader()
        self._flying: deque[Item | None] = deque()  # None: not to be answered any more
        self._answered = 0  # calls, from the first on
        self._known: set[bytes] = set()
        self._out: deque[tuple[memoryview, Segment | None]] = deque()
        self._descriptors: deque[int] = deque()  # that have come, for outcomes to come
        self._soon = False
        self._seen, self._seen_at = 0, 0.0
        self._taken_to = -1

    def __repr__(self) -> str:
        return f"<Lane {self.lease} of {self.node}: {len(self._flying)} calls>"

    @property
    def flying(self) -> int:
        """Calls that it has."""
        return len(self._flying)

    @property
    def sending(self) -> bool:
        """Whether something waits to be sent."""
        return bool(self._out)

    def fileno(self) -> int:
        """Of the connection, -1 when closed."""
        return self._connection.fileno()

    def close(self) -> None:
        """Give the worker back; what it still runs is nobody's."""
        self._connection.close()
        while self._descriptors:
            os.close(self._descriptors.pop())

    def items(self) -> list[Item]:
        """The calls that it has; for any thread."""
        return [item for item in list(self._flying) if item is not None]

    def forget(self, task: Task) -> None:
        """The worker does not know the function (any more)."""
        self._known.discard(task.digest)

    def begun(self) -> list[Item]:
        """Those of its calls that the worker has begun; the last of them is the one that it is at."""
        count = max(0, self._slate.words[BEGUN] - self._answered)
        return [item for item in list(self._flying)[:count] if item is not None]

    def stands(self, now: float) -> float:
        """For how long it has begun no call although it has some to begin, as far as was looked."""
        begun = self._slate.words[BEGUN]
        if begun != self._seen or begun >= self._answered + len(self._flying):
            self._seen, self._seen_at = begun, now
        return now - max(self._seen_at, self.busy_since)

    # --- out ----------------------------------------------------------------------------------

    def push(self, items: Sequence[Item]) -> None:
        """Give it calls; they are on their way as far as the socket takes them. Raises LaneOver."""
        if not self._flying:
            self.busy_since = time.monotonic()
        for task, group in groupby(items, _task_of):
            arguments: list[bytes] = []
            for item in group:
                self.bytes += len(item.arguments)
                if type(item.arguments) is bytes:
                    arguments.append(item.arguments)
                    continue
                if arguments:
                    self._put_out(self._parcel(task, arguments))
                assert isinstance(item.arguments, Apart)
                arguments = []
                self._put_out(self._parcel(task, [item.arguments.data]), item.arguments.segment)
            if arguments:
                self._put_out(self._parcel(task, arguments))
        self._flying.extend(items)
        self.send()

    def _parcel(self, task: Task, arguments: list[bytes]) -> bytes:
        function = b"" if task.digest in self._known else task.function
        self._known.add(task.digest)
        packed: bytes = hiredis.pack_command((task.head(), function, *arguments))  # type: ignore[arg-type]
        return packed

    def _put_out(self, data: bytes, segment: Segment | None = None) -> None:
        """Have bytes sent, together with those that wait already, unless a descriptor goes with them."""
        if segment is None and self._out and self._out[-1][1] is None:
            data = bytes(self._out.pop()[0]) + data
        self._out.append((memoryview(data), segment))

    def send(self) -> None:
        """Send what waits, as far as the socket takes it. Raises LaneOver."""
        out = self._out
        while out:
            data, segment = out[0]
            try:
                if segment is not None:
                    sent = socket.send_fds(self._connection, [data], [segment.descriptor])
                else:
                    sent = self._connection.send(data, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return
            except OSError as error:
                raise LaneOver from error
            if sent == len(data):
                out.popleft()
            else:
                out[0] = data[sent:], None

    # --- in -----------------------------------------------------------------------------------

    def receive(self) -> list[tuple[Item, Outcome]]:
        """The outcomes that have come. Raises LaneOver; then see `rest`."""
        try:
            data = self._read()
        except BlockingIOError:
            return []
        except OSError as error:
            raise LaneOver from error
        if not data:
            raise LaneOver
        return self._take(data)

    def _read(self) -> bytes:
        """What there is on the connection; descriptors are kept until the outcome that they belong to."""
        data, extra, _, _ = self._connection.recvmsg(_RECEIVE_BYTES, _EXTRA_BYTES)
        for _level, _kind, payload in extra:
            self._descriptors += array("i", payload)
        return data

    def _take(self, data: bytes) -> list[tuple[Item, Outcome]]:
        try:
            self._reader.feed(data)
            outcomes, gets = [], self._reader.gets
            while (outcome := gets()) is not False:
                if outcome == GIFT:
                    spare(Segment(self._descriptors.popleft()))
                    continue
                if outcome[:1] == APART or outcome[:1] == LENT:
                    outcome = Received.apart(outcome, self._descriptors.popleft())
                outcomes.append(outcome)
            next_one = self._flying.popleft
            items = [next_one() for _ in outcomes]
        except (
            hiredis.ProtocolError,
            IndexError,
            OSError,
            ValueError,
            msgspec.DecodeError,
        ) as error:  # a call has written to the connection
            raise LaneOver from error
        self._answered += len(items)
        self.slow = False
        self.busy_since = time.monotonic() if self._flying else 0.0
        found = [(item, outcome) for item, outcome in zip(items, outcomes, strict=True) if item is not None]
        self.bytes -= sum([len(item.arguments) for item, _ in found])
        return found

    def call(self, item: Item, deadline: float | None) -> Outcome | None:
        """Have one call run and wait for its outcome; None if the deadline comes first.

        Raises:
            LaneOver: the worker is gone, before or meanwhile.
        """
        self.push((item,))
        began = time.monotonic()
        while self._soon:
            found = self.receive()
            if found:
                return found[0][1]
            if time.monotonic() > began + AWAKE_S:
                break
        found = []
        poll = select.poll()
        while not found:
            poll.register(self._connection, select.POLLIN | (select.POLLOUT if self._out else 0))
            left_s = None if deadline is None else deadline - time.monotonic()
            if left_s is not None and left_s <= 0:
                return None
            poll.poll(None if left_s is None else left_s * 1000 + 1)
            self.send()
            found = self.receive()
        self._soon = time.monotonic() - began < SOON_S and not ALONE
        return found[0][1]

    # --- back ---------------------------------------------------------------------------------

    def take_back(self) -> list[Item]:
        """Calls that it has not begun and never will."""
        words, answered = self._slate.words, self._answered
        end = answered + len(self._flying)
        first = max(words[BEGUN], answered)
        if first >= end:
            return []
        words[TAKEN_TO] = end
        # What was taken before stays so until the worker is past it: it may be looking just now.
        if words[BEGUN] > self._taken_to:
            words[TAKEN_FROM] = first
        self._taken_to = end
        if not barrier.everywhere():  # it answers those that it has not begun, when it comes to them
            return []
        return self._pull(max(first, words[BEGUN]))

    def _pull(self, first: int) -> list[Item]:
        """The calls from that number on, which are not waited for any more."""
        taken = []
        for place in range(first - self._answered, len(self._flying)):
            item = self._flying[place]
            if item is not None:
                self._flying[place] = None
                self.bytes -= len(item.arguments)
                taken.append(item)
        return taken

    def finished(self) -> list[tuple[Item, Outcome]]:
        """Outcomes that the worker has laid down and could not send yet, since it is at a call."""
        words = self._slate.words
        first, size = words[UNSENT_FIRST], words[UNSENT]
        if not size or size > len(self._slate.outcomes):
            return []
        barrier.everywhere()
        data = bytes(self._slate.outcomes[:size])
        if words[UNSENT_FIRST] != first or words[UNSENT] < size:  # it has sent them meanwhile
            return []
        reader = hiredis.Reader()
        reader.feed(data)
        found: list[tuple[Item, Outcome]] = []
        place = first - self._answered
        while place < len(self._flying) and (outcome := reader.gets()) is not False:
            item = self._flying[place] if place >= 0 else None
            if item is not None:
                self._flying[place] = None
                self.bytes -= len(item.arguments)
                found.append((item, outcome))
            place += 1
        return found

    def rest(self) -> Rest:
        """What is left when it has ended; the connection is closed."""
        rest = Rest(let_go=bool(self._slate.words[LET_GO]))
        while True:
            try:
                data = self._read()
                if not data:
                    break
                rest.ended += self._take(data)
            except (OSError, LaneOver):
                break
        self.close()
        rest.ended += self.finished()
        begun = self._slate.words[BEGUN]
        rest.fresh = self._pull(max(begun, self._answered))
        rest.begun = self.items()
        self._flying.clear()
        self._out.clear()
        self._slate.leave()
        # Those that it found taken back are answered so, and not begun.
        for item, outcome in rest.ended:
            if outcome == messages.TAKEN:
                rest.fresh.insert(0, item)
        rest.ended = [(item, outcome) for item, outcome in rest.ended if outcome != messages.TAKEN]
        return rest
