"""Typed lines: Redis inline commands as redis-server splits them, and the reference's `name(arg,arg)`."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import hiredis
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from virgo.errors import BadRequest
from virgo.wire.text import split_line

CHECK = settings(
    deadline=None,
    max_examples=300,
    phases=set(Phase) - {Phase.explain},
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.mark.parametrize(
    ("line", "request_"),
    [
        (b"virgo_cloud_malloc(100)", [b"virgo_cloud_malloc", b"100"]),
        (b'virgo_cloud_set(123,"a, b (c)")', [b"virgo_cloud_set", b"123", b"a, b (c)"]),
        (b"virgo_cloud_set(123,  plain words here )", [b"virgo_cloud_set", b"123", b"plain words here"]),
        (b"  virgo_get( 7 ) ; ", [b"virgo_get", b"7"]),
        (b"virgo_get(7);", [b"virgo_get", b"7"]),
        (b"virgo_nodes()", [b"virgo_nodes"]),
        (b"virgo_nodes( )", [b"virgo_nodes"]),
        (b"f(,)", [b"f", b"", b""]),
        (b'f("")', [b"f", b""]),
        (b'f(a,"")', [b"f", b"a", b""]),
        (b"f(a,)", [b"f", b"a", b""]),
        (b"f(a(b),c)", [b"f", b"a(b)", b"c"]),
        (b"f('it''s')", BadRequest),
        (b'f(\'it\\\'s\', "say \\"hi\\"")', [b"f", b"it's", b'say "hi"']),
        (b'f("\\x00\\xff\\n")', [b"f", b"\0\xff\n"]),
        (b'f("a"b)', BadRequest),
        (b'f("a)', BadRequest),
        (b"f(don't)", BadRequest),
    ],
)
def test_reference_form(line: bytes, request_: list[bytes] | type[Exception]) -> None:
    """`name(arg,arg)`: split at commas, blanks around arguments dropped, quotes keep everything."""
    if isinstance(request_, list):
        assert split_line(line) == request_
    else:
        with pytest.raises(request_):
            split_line(line)


@pytest.mark.parametrize(
    ("line", "request_"),
    [
        (b"", []),
        (b" \t ", []),
        (b"ECHO (hello)", [b"ECHO", b"(hello)"]),
        (b"ECHO f(a) b", [b"ECHO", b"f(a)", b"b"]),
        (b"SET k a,b;", [b"SET", b"k", b"a,b;"]),
        (b"PING\0", [b"PING"]),
        (b"SET k \xff\xfe", [b"SET", b"k", b"\xff\xfe"]),
        (b"\x01\x02 \xc3\xa9", [b"\x01\x02", b"\xc3\xa9"]),
    ],
)
def test_inline_and_the_reference_form_are_told_apart(line: bytes, request_: list[bytes]) -> None:
    """Only a name with a parenthesis right behind it, up to the line's end, is the reference's form."""
    assert split_line(line) == request_


def quoted(data: bytes) -> bytes:
    return b'"' + b"".join(b"\\x%02x" % byte for byte in data) + b'"'


@CHECK
@given(st.lists(st.binary(max_size=20), min_size=1, max_size=5))
def test_any_bytes_can_be_typed(values: list[bytes]) -> None:
    """Quoted with \\xHH, every value passes in both forms."""
    assert split_line(b"f(" + b", ".join(map(quoted, values)) + b")") == [b"f", *values]
    assert split_line(b"f " + b" ".join(map(quoted, values))) == [b"f", *values]


@CHECK
@given(st.binary(max_size=200))
def test_no_line_raises_anything_else(line: bytes) -> None:
    """Any line is a request or a BadRequest."""
    try:
        request = split_line(line)
    except BadRequest as error:
        assert error.hint
    else:
        assert all(type(word) is bytes for word in request)


@pytest.mark.parametrize(
    "line",
    [
        b"f()" + b" " * 65_000 + b"x",
        b'"' * 65_001,
        b'"' + b"\\" * 65_001,
        b"'" + b"\\'" * 32_500,
        b"f(" * 32_500,
        b"f(" + b")" * 65_000 + b"x",
        b"f(" + b" ," * 32_500 + b")",
        b"a" * 65_000 + b"(",
    ],
    ids=["blanks", "quotes", "backslashes", "escaped", "open", "close", "commas", "name"],
)
def test_no_line_takes_long(line: bytes) -> None:
    """Lines made to trouble a backtracking parser are done in time proportional to their length."""
    started = time.monotonic()
    with contextlib.suppress(BadRequest):
        split_line(line)
    assert time.monotonic() - started < 2


# --- beside redis-server --------------------------------------------------------------------------


class Redis:
    """A redis-server of the test's own that tells how it splits a line."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._connection: socket.socket | None = None

    def _send(self, data: bytes) -> object:
        if self._connection is None:
            self._connection = socket.socket(socket.AF_UNIX)
            self._connection.settimeout(10)
            self._connection.connect(self._path)
        reader = hiredis.Reader(notEnoughData=Ellipsis)
        self._connection.sendall(data)
        while (reply := reader.gets()) is Ellipsis:
            received = self._connection.recv(65536)
            assert received
            reader.feed(received)
        return reply

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def split(self, words: bytes) -> list[bytes] | None:
        """The words, or None if Redis finds the quotes unbalanced."""
        self._send(hiredis.pack_command(("DEL", "words")))
        reply = self._send(b"RPUSH words first " + words + b"\r\n")
        if isinstance(reply, hiredis.ReplyError):
            assert "unbalanced" in str(reply), reply
            self.close()
            return None
        found = self._send(hiredis.pack_command(("LRANGE", "words", 0, -1)))
        assert isinstance(found, list)
        return found[1:]


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    """Started on a Unix socket, ended with the module."""
    program = shutil.which("redis-server")
    if program is None:
        assert not os.environ.get("CI"), "redis-server is not installed"
        pytest.skip("redis-server is not installed")
    directory = tmp_path_factory.mktemp("redis")
    path = directory / "s"
    options = ["--port", "0", "--unixsocket", str(path), "--dir", str(directory), "--save", ""]
    with subprocess.Popen([program, *options], stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 10
        while not Path(path).exists() and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.01)
        server = Redis(str(path))
        yield server
        server.close()
        process.terminate()


@CHECK
@example(b'"a"b')
@example(b"a\"b\"'c'")
@example(b"'a\\\\'")
@example(b"'a\\n\\'b'")
@example(b'"\\x4g\\x41\\q\\""')
@given(
    st.lists(
        st.sampled_from([b"a", b"n", b"x4", b"1", b" ", b"\t", b'"', b"'", b"\\", b",", b"(", b";"]),
        max_size=12,
    )
    .map(b"".join)
    .filter(lambda line: not line.endswith(b"\\"))
)
def test_inline_words_are_split_as_redis_does(redis: Redis, words: bytes) -> None:
    """The same line gives redis-server and us the same words, or both find its quotes unbalanced."""
    try:
        ours: list[bytes] | None = split_line(b"RPUSH words first " + words)[3:]
    except BadRequest:
        ours = None
    assert ours == redis.split(words)
