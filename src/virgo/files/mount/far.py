"""A node that is reached over the wire, as a worker of a mount sees it: acts, and data of its open files."""

from __future__ import annotations

from typing import Any, Final, TypeVar

import msgspec

from virgo.limits import MOUNT_ACT_S
from virgo.wire.call import Argument
from virgo.wire.client import Client

T = TypeVar("T")
_ENCODER: Final = msgspec.msgpack.Encoder()


class Far:
    """See the module; for one root of the node.

    Args:
        client: of the node itself: nothing goes by way of another.
        root: which of its roots, "" for the private directory.
    """

    def __init__(self, client: Client, root: str) -> None:
        self._client = client
        self._root = root

    def __repr__(self) -> str:
        return f"<Far {self._root!r} at {self._client.address}>"

    def act(self, decoder: msgspec.msgpack.Decoder[T], act: str, *arguments: Any) -> T:
        """Have it done; what it gives. Raises what the node answered, NodeLost."""
        return decoder.decode(self.execute("FILES.AT", self._root, act, _ENCODER.encode(arguments)))

    def do(self, act: str, *arguments: Any) -> None:
        """The same for an act that gives nothing."""
        self.execute("FILES.AT", self._root, act, _ENCODER.encode(arguments))

    def execute(self, *request: Argument) -> Any:
        """Run a command. Raises NodeLost as soon as the node is seen not to live, NotRunning."""
        return self._client.execute(*request, timeout_s=MOUNT_ACT_S)
