"""A node that is reached over the wire, as a worker of a mount sees it: acts, and data of its open files.

A node that is silent is noticed by whoever waits for it, in about four seconds (`virgo.wire.life`). From
then on nobody else waits: requests are refused at once, until the node has answered a question asked in the
background.
"""

from __future__ import annotations

import threading
import time
from typing import Any, Final, TypeVar

import msgspec

from virgo.errors import NodeLost, VirgoError
from virgo.limits import MOUNT_ACT_S, MOUNT_PROBE_S
from virgo.wire.call import Argument, Call
from virgo.wire.client import Client, failure
from virgo.wire.pool import as_is

T = TypeVar("T")
_ENCODER: Final = msgspec.msgpack.Encoder()


class FarNode:
    """A node on another machine, for all threads of a worker.

    Args:
        name: the node's.
        client: of the node itself: nothing goes by way of another.
        silent: one number in memory that all workers share: until when (CLOCK_MONOTONIC) it counts as silent.
    """

    def __init__(self, name: str, client: Client, silent: memoryview[float]) -> None:
        self.name = name
        self._client = client
        self._silent = silent
        self._lock = threading.Lock()
        self._asking = False

    def __repr__(self) -> str:
        return f"<FarNode {self.name} at {self._client.address}{', silent' if self.silent else ''}>"

    @property
    def silent(self) -> bool:
        """Whether it is known not to answer."""
        return self._silent[0] > time.monotonic()

    def execute(self, *request: Argument) -> Any:
        """Run a command. Raises NodeLost as soon as the node is seen not to live, NotRunning."""
        if self.silent:
            raise NodeLost(f"{request[0]!s}: node {self.name} does not answer")
        try:
            reply = self._client.exchange(Call(request, as_is, MOUNT_ACT_S))
        except NodeLost:
            self._ask()
            raise
        refusal = failure(reply)  # which may tell of another node that is lost
        if refusal is not None:
            raise refusal
        return reply

    def _ask(self) -> None:
        """Ask in the background whether it lives, unless somebody does."""
        with self._lock:
            if self._asking or self.silent:
                return
            self._asking = True
            self._silent[0] = time.monotonic() + 2 * MOUNT_PROBE_S
        threading.Thread(target=self._until_it_answers, name=f"ask {self.name}", daemon=True).start()

    def _until_it_answers(self) -> None:
        while self._asking:
            try:
                self._client.execute("PING", timeout_s=MOUNT_PROBE_S)
            except VirgoError:
                self._silent[0] = time.monotonic() + 2 * MOUNT_PROBE_S
                time.sleep(MOUNT_PROBE_S / 4)
            else:
                self._silent[0] = 0.0
                self._asking = False


class Far:
    """One root of such a node.

    Args:
        node: which node.
        root: which of its roots, "" for the private directory.
    """

    def __init__(self, node: FarNode, root: str) -> None:
        self._root = root
        self.execute = node.execute
        self._node = node

    def __repr__(self) -> str:
        return f"<Far {self._root!r} of {self._node!r}>"

    def act(self, decoder: msgspec.msgpack.Decoder[T], act: str, *arguments: Any) -> T:
        """Have it done; what it gives. Raises what the node answered, NodeLost."""
        return decoder.decode(self.execute("FILES.AT", self._root, act, _ENCODER.encode(arguments)))

    def do(self, act: str, *arguments: Any) -> None:
        """The same for an act that gives nothing."""
        self.execute("FILES.AT", self._root, act, _ENCODER.encode(arguments))
