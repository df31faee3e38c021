"""The monitoring port of a NATS server: JSON over HTTP on loopback, read without a library."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

from virgo.errors import EngineUnavailable
from virgo.limits import CONNECT_S, ENGINE_MONITOR_BYTES_MAX


async def fetch_json(url: str) -> bytes:
    """The body of the answer to GET, whatever its status.

    Raises:
        EngineUnavailable: nothing answers there.
    """
    parts = urlsplit(url)
    path = f"{parts.path or '/'}{f'?{parts.query}' if parts.query else ''}"
    try:
        async with asyncio.timeout(CONNECT_S):
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 80)
            try:
                # Version 1.0: no chunks, and the server closes behind its answer.
                writer.write(f"GET {path} HTTP/1.0\r\nHost: {parts.netloc}\r\n\r\n".encode())
                answer = await _read_to_end(reader)
            finally:
                writer.close()
    except (OSError, TimeoutError) as error:
        raise EngineUnavailable(f"the engine's monitoring port {url}: {error or 'no answer'}") from error
    return answer.partition(b"\r\n\r\n")[2]


async def _read_to_end(reader: asyncio.StreamReader) -> bytes:
    answer = bytearray()
    while part := await reader.read(65536):
        answer += part
        if len(answer) > ENGINE_MONITOR_BYTES_MAX:
            raise EngineUnavailable(
                f"the engine's monitoring port sent over {ENGINE_MONITOR_BYTES_MAX} bytes"
            )
    return bytes(answer)
