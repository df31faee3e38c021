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
from virgo.wire.call import Argument
from virgo.wire.client import Client

T = TypeVar("T")
_ENCODER: Final = msgspec.msgpack.Encoder()


class FarNode:
    """A node on another machine, for all threads of a worker.

    Args:
        name: the node's.
        client: of the node itself: nothing goes by way of another.
    """

    def __init__(self, name: str, client: Client) -> None:
        self._name = name
        self._client = client
        self._silent = False
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<FarNode {self._name} at {self._client.address}{', silent' if self._silent else ''}>"

    def execute(self, *request: Argument) -> Any:
        """Run a command. Raises NodeLost as soon as the node is seen not to live, NotRunning."""
        if self._silent:
            raise NodeLost(f"{request[0]!s}: node {self._name} does not answer")
        try:
            return self._client.execute(*request, timeout_s=MOUNT_ACT_S)
        except NodeLost:
            self._ask()
            raise

    def _ask(self) -> None:
        """Ask in the background whether it lives, unless somebody does."""
        with self._lock:
            if self._silent:
                return
            self._silent = True
        threading.Thread(target=self._until_it_answers, name=f"ask {self._name}", daemon=True).start()

    def _until_it_answers(self) -> None:
        while self._silent:
            try:
                self._client.execute("PING", timeout_s=MOUNT_PROBE_S)
                self._silent = False
            except VirgoError:
                time.sleep(MOUNT_PROBE_S / 4)


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
