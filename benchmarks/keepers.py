"""Who keeps values by key: how a client of each reaches its server, with the same few calls on all.

A function here takes the stack that is to close the client, and where the server is; it can be sent to
another process. `servers` starts the servers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import servers
from benchmarks.harness import Need

REDIS_NEEDS: tuple[Need, ...] = (servers.REDIS, servers.module("redis"), servers.module("hiredis"))
MEMCACHED_NEEDS: tuple[Need, ...] = (servers.MEMCACHED, servers.module("pymemcache"))


@dataclass(frozen=True, slots=True)
class Values:
    """Values by key, as a client has them.

    Attributes:
        get: the value of a key; None if it is absent.
        set: set one key.
        get_many: the values of several keys in one request, in order; None for those that are absent.
        set_many: set several keys in one request.
        delete: delete one key.
        delete_many: delete several keys, in one request or without waiting for each answer.
    """

    get: Callable[[str], Any]
    set: Callable[[str, bytes], Any]
    get_many: Callable[[Sequence[str]], list[Any]]
    set_many: Callable[[Mapping[str, bytes]], Any]
    delete: Callable[[str], Any]
    delete_many: Callable[[Sequence[str]], Any]


def virgo_mapped(running: ExitStack, home: Path) -> Values:
    """Our client on the node's machine: one key at a time by mapping, several through the node."""
    return _of_ours(mapped_memory(running, home))


def mapped_memory(running: ExitStack, home: Path) -> Any:
    """`cloud.memory` where it maps the node's store."""
    import virgo

    memory = running.enter_context(virgo.connect(home=home, embedded=False)).memory
    if not memory.mapped:
        raise RuntimeError("the node's store was not mapped")
    return memory


def virgo_tcp(running: ExitStack, place: servers.Virgo) -> Values:
    """Our client's plain requests over TCP, without any mapping."""
    import virgo
    from virgo.memory.client import MemoryClient

    target = f"127.0.0.1:{place.memory_port}"
    cloud = running.enter_context(virgo.connect(target, token=place.token, home=place.home))
    return _of_ours(MemoryClient(cloud.client, mapped=False))


def _of_ours(memory: Any) -> Values:
    return Values(
        get=memory.get,
        set=memory.set,
        get_many=lambda keys: _in_order(memory.get_many(keys), keys),
        set_many=memory.set_many,
        delete=memory.__delitem__,
        delete_many=lambda keys: memory.delete(*keys),
    )


def _in_order(found: Mapping[str, Any], keys: Sequence[str]) -> list[Any]:
    return [found.get(key) for key in keys]


def redis_py(running: ExitStack, port: int) -> Values:
    """redis-py with hiredis."""
    import redis

    client = running.enter_context(redis.Redis(port=port))
    return Values(
        get=client.get,
        set=client.set,
        get_many=client.mget,
        set_many=client.mset,
        delete=client.delete,
        delete_many=lambda keys: client.delete(*keys),
    )


def pymemcache(running: ExitStack, port: int) -> Values:
    """pymemcache, which waits for the answer to each set and fails if it is an error."""
    from pymemcache.client.base import Client

    client = Client(("127.0.0.1", port), default_noreply=False, no_delay=True)
    running.callback(client.close)

    def set_many(items: Mapping[str, bytes]) -> None:
        failed = client.set_many(items)
        if failed:
            raise RuntimeError(f"memcached did not take {len(failed)} of {len(items)} values")

    return Values(
        get=client.get,
        set=client.set,
        get_many=lambda keys: _in_order(client.get_many(keys), keys),
        set_many=set_many,
        delete=client.delete,
        delete_many=lambda keys: client.delete_many(keys, noreply=True),
    )
