"""Bytes to requests: what is sent arrives, however it is cut, and what is no request ends in a fault."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from itertools import pairwise

import hiredis
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from virgo import limits
from virgo.errors import BadRequest, TooLarge, VirgoError
from virgo.wire.framing import RequestReader

# Generous: the time of an example is the machine's affair; no explanations: they take a minute.
CHECK = settings(deadline=None, max_examples=150, phases=set(Phase) - {Phase.explain})
ROOM = limits.REQUEST_BYTES_MAX

# Values that look like the protocol, whole and in pieces, among ordinary bytes.
LOOKALIKES = [
    b"*99999999\r\n",
    b"*1000000000\r\n",
    b"*2\r\n*2\r\n*2\r\n",
    b"\r\n>99999999\r\n~99999999\r\n|99999999\r\n%99999999\r\n",
    b"*1\r\n$4\r\nPING\r\n",
    b"\r\n$3\r\nGET\r\n",
    b"\r\n*",
    b"\r\n$",
    b"\r\n",
    b"$99999999999\r\n",
    b"\r\nPING\r\n",
    b"x" * 5000,
    b"*7\r\n" * 1500,
    b"line\r\n$5\r\n" * 600,
]
VALUES = st.one_of(st.binary(max_size=40), st.sampled_from(LOOKALIKES))
REQUESTS = st.lists(VALUES, min_size=1, max_size=6)
WORD = st.text("abcXYZ019_-.:/*$>", min_size=1, max_size=12).filter(lambda word: word[0].isalnum())


def packed(requests: list[list[bytes]]) -> bytes:
    return b"".join(hiredis.pack_command(tuple(request)) for request in requests)


def cut(data: bytes, places: list[float]) -> list[bytes]:
    """The data in pieces, cut at these fractions of its length."""
    at = sorted({0, len(data), *(int(place * len(data)) for place in places)})
    return [data[begin:end] for begin, end in pairwise(at)]


PING = b"*1\r\n$4\r\nPING\r\n"
CUTS = st.lists(st.floats(0, 1), max_size=12)


def decode(chunks: list[bytes], room: int = ROOM) -> tuple[list[list[bytes]], VirgoError | None]:
    reader = RequestReader(room)
    requests = [request for chunk in chunks for request in reader.read(chunk)]
    return requests, reader.fault


@CHECK
@given(st.lists(REQUESTS, max_size=12), CUTS)
def test_requests_arrive_whole_and_in_order_however_they_are_cut(
    requests: list[list[bytes]], places: list[float]
) -> None:
    """Any requests, RESP-encoded and cut at arbitrary places, decode to themselves."""
    assert decode(cut(packed(requests), places)) == (requests, None)


@pytest.mark.parametrize("value", [look for look in LOOKALIKES if len(look) < 100])
def test_values_that_look_like_requests_pass_at_every_cut(value: bytes) -> None:
    """A value that holds headers, bombs or commands passes unharmed at each pair of neighbouring cuts."""
    requests = [[b"SET", b"k", value], [b"GET", value], [value]]
    data = packed(requests)
    for place in range(len(data)):
        chunks = [data[:place], data[place : place + 1], data[place + 1 :]]
        assert decode(chunks) == (requests, None), place


def test_bytes_one_by_one() -> None:
    """Requests that arrive byte by byte, inline ones among them, are the same requests."""
    requests = [[b"SET", b"k", look] for look in LOOKALIKES if len(look) < 100]
    data = packed(requests) + b"PING\r\n" + packed(requests)
    got, fault = decode([bytes([byte]) for byte in data])
    assert fault is None
    assert got == [*requests, [b"PING"], *requests]


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[bytes, list[list[bytes]]]:
    """A stream of RESP, inline and text-form requests, and what it says."""
    stream, said = b"", []
    for kind in draw(st.lists(st.sampled_from(["resp", "inline", "call", "blank", "empty"]), max_size=10)):
        end = draw(st.sampled_from([b"\r\n", b"\n"]))
        if kind == "resp":
            request = draw(REQUESTS)
            stream += packed([request])
        elif kind == "blank":
            stream += end
            continue
        elif kind == "empty":
            stream += b"*0\r\n"
            continue
        else:
            request = [word.encode() for word in draw(st.lists(WORD, min_size=1, max_size=5))]
            if kind == "call":
                request[0] = b"virgo_set"
                stream += request[0] + b"(" + b" , ".join(request[1:]) + b")" + end
            else:
                stream += b" ".join(request) + end
        said.append(request)
    return stream, said


@CHECK
@given(mixtures(), CUTS)
@example((b"*1\r\n$4\r\nPING\r\nPING\r\n*0\r\nPING\n", [[b"PING"], [b"PING"], [b"PING"]]), [0.5])
def test_resp_and_lines_mix_on_one_connection(
    mixture: tuple[bytes, list[list[bytes]]], places: list[float]
) -> None:
    """RESP, inline and text-form requests may follow each other in any order, cut anywhere."""
    stream, said = mixture
    assert decode(cut(stream, places)) == (said, None)


# Bytes that are likely to be nearly right.
SPLINTERS = st.lists(
    st.one_of(
        st.sampled_from(
            b"* $ \r\n \n 1 2 0 -1 05 + : #f\r\n _\r\n a *1\r\n *2\r\n *3\r\n *0\r\n *-1\r\n $1\r\na\r\n"
            b" $0\r\n\r\n $-1\r\n >2\r\n %1\r\n :0\r\n PING\r\n *1\r\n$4\r\nPING\r\n $4\r\n"
            b' *1048577\r\n $99999999999\r\n >1000000000\r\n f(a)\n " !3\r\n'.split(b" ")
        ),
        st.binary(max_size=6),
    ),
    max_size=14,
).map(b"".join)


@settings(CHECK, max_examples=400)
@given(SPLINTERS, CUTS)
def test_any_bytes_mean_the_same_however_they_are_cut(data: bytes, places: list[float]) -> None:
    """Arbitrary bytes raise nothing, and which requests are read from them does not depend on the cuts."""
    readers = RequestReader(ROOM), RequestReader(ROOM)
    whole, pieces = (
        [request for chunk in [*chunks, PING] for request in reader.read(chunk)]
        for reader, chunks in zip(readers, ([data], cut(data, places)), strict=True)
    )
    assert pieces == whole
    assert all(type(part) is bytes for request in whole for part in request)
    assert all(whole)


@CHECK
@given(st.binary(max_size=300))
def test_random_bytes_never_raise(data: bytes) -> None:
    """Random bytes give requests and perhaps a fault, which is one of ours; after it nothing is read."""
    reader = RequestReader(ROOM)
    reader.read(data)
    if reader.fault is not None:
        assert isinstance(reader.fault, VirgoError)
        assert reader.read(b"*1\r\n$4\r\nPING\r\n") == []


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"*1000000000\r\n", TooLarge),
        (b"*4294967295\r\n", TooLarge),
        (b"*9223372036854775807\r\n", TooLarge),
        (b"*99999999999999999999\r\n", BadRequest),
        (b"*1048577\r\n", TooLarge),
        (b"*1\r\n" * 30, BadRequest),
        (b"*1\r\n*1\r\n$4\r\nPING\r\n", BadRequest),
        (b"*2\r\n$1\r\na\r\n*1000000000\r\n", BadRequest),
        (b"*1\r\n$99999999999\r\n", TooLarge),
        (b"*1\r\n$9223372036854775807\r\n", TooLarge),
        (b"*1\r\n>1000000000\r\n", BadRequest),
        (b"*1\r\n~1000000000\r\n", BadRequest),
        (b"*1\r\n|1000000000\r\n", BadRequest),
        (b"*1\r\n%1000000000\r\n", BadRequest),
        (b"*2\r\n$1\r\naXX>1000000000\r\n", BadRequest),
        (b"*1\r\n%1\r\n*1\r\n:1\r\n:1\r\n", BadRequest),
        (b"*2\r\n$3\r\nGET\r\n:5\r\n", BadRequest),
        (b"*2\r\n$3\r\nGET\r\n$-1\r\n", BadRequest),
        (b"*1\r\n(12x\r\n", BadRequest),
        (b"*1\r\n,nonsense\r\n", BadRequest),
        (b"*1\r\n_\r\n", BadRequest),
        (b"*1\r\nPING\r\n", BadRequest),
        (b"*-1\r\n", BadRequest),
        (b"*01\r\n$4\r\nPING\r\n", BadRequest),
        (b"*1\r\n$04\r\nPING\r\nPING\r\n", BadRequest),
        (b"*1\n$4\nPING\n" + b" " * 40, BadRequest),
        (b"$4\r\nPING\r\n", BadRequest),
        (b":1\r\n", BadRequest),
        (b"#f\r\n", BadRequest),
        (b"x" * (limits.INLINE_BYTES_MAX + 1), TooLarge),
        (b"x" * (limits.INLINE_BYTES_MAX + 1) + b"\r\n", TooLarge),
        (b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\nSHUTDOWN\r\n", BadRequest),
    ],
    ids=lambda value: value[:24].decode("latin1").strip() if isinstance(value, bytes) else value.__name__,
)
def test_what_is_no_request_is_a_typed_fault(data: bytes, error: type[VirgoError]) -> None:
    """Each malformed or oversized request is a fault of the right class, whole and byte by byte, and
    the requests before it are answered."""
    before = b"*1\r\n$4\r\nPING\r\nECHO a\r\n"
    for chunks in ([before + data], [before, data], [bytes([byte]) for byte in before + data]):
        started = time.monotonic()
        requests, fault = decode([*chunks, PING])
        assert time.monotonic() - started < 10
        assert requests == [[b"PING"], [b"ECHO", b"a"]]
        assert type(fault) is error
        assert str(fault)


def test_a_fault_in_the_chunk_of_a_complete_request_waits_for_the_login_in_it() -> None:
    """A value that is too large for a stranger is not refused in the chunk that may have brought the
    login, and is refused in the next one if there was none."""
    login, value = packed([[b"AUTH", b"token"]]), packed([[b"SET", b"k", b"v" * 50_000]])
    for raised in (True, False):
        reader = RequestReader(limits.REQUEST_UNAUTHENTICATED_BYTES_MAX)
        assert reader.read(login + value[:30_000]) == [[b"AUTH", b"token"]]
        assert reader.fault is None
        if raised:
            reader.request_bytes_max = ROOM
        got = reader.read(value[30_000:40_000]) + reader.read(value[40_000:])
        assert (got == [[b"SET", b"k", b"v" * 50_000]]) is raised
        assert (reader.fault is None) is raised


@pytest.mark.parametrize(
    "data",
    [
        b"*1\r\n$20000\r\n",
        b"*5000\r\n" + b"$4\r\nabcd\r\n" * 3000,
        b"x" * 20_000,
        b"*1\r\n$20000\r\n" + b"x" * 20_000,
    ],
    ids=["announced", "many", "line", "sent"],
)
def test_a_stranger_gets_16_kib(data: bytes) -> None:
    """Before the login a request above REQUEST_UNAUTHENTICATED_BYTES_MAX is a fault, however it comes."""
    requests, fault = decode(
        [data[at : at + 1000] for at in range(0, len(data), 1000)], limits.REQUEST_UNAUTHENTICATED_BYTES_MAX
    )
    assert requests == []
    assert type(fault) is TooLarge


def test_bounds_are_exact_enough_for_what_is_allowed() -> None:
    """A request with as many arguments as allowed passes, as does a long inline command."""
    request = [b"MSET", *[b"ab"] * (limits.REQUEST_ARGUMENTS_MAX - 1)]
    data = packed([request])
    assert decode([data[at : at + 65_536] for at in range(0, len(data), 65_536)]) == ([request], None)
    line = b"a" * (limits.INLINE_BYTES_MAX - 1)
    assert decode([line + b"\n"]) == ([[line]], None)


def test_a_deep_pipeline_is_decoded_quickly() -> None:
    """100,000 pipelined requests, whole or in chunks, take well under a second each 100,000."""
    request = [b"GET", b"key:000000000001"]
    data = packed([request] * limits.PIPELINE_DEPTH_MAX)
    for size in (len(data), 65_536, 4_099):
        started = time.monotonic()
        requests, fault = decode([data[at : at + size] for at in range(0, len(data), size)])
        assert fault is None
        assert requests == [request] * limits.PIPELINE_DEPTH_MAX
        assert time.monotonic() - started < 10


@pytest.mark.parametrize("line", [b"<id>123456</id>\r\n", b"*1000000000\r\n", b"\r\n$5\r\n*12345678"])
def test_large_values_take_time_in_proportion(line: bytes) -> None:
    """A 32 MiB value full of suspicious text is read in bounded time: it is not looked at again and again."""
    value = line * (32 * limits.MiB // len(line))
    data = packed([[b"SET", b"k", value]])
    started = time.monotonic()
    requests, fault = decode([data[at : at + 65_536] for at in range(0, len(data), 65_536)])
    assert fault is None
    assert requests == [[b"SET", b"k", value]]
    assert time.monotonic() - started < 10


def _rss_growth_mib(script: str) -> float:
    """How much memory a fresh process used at most above its start, running `script` with a reader `r`."""
    code = textwrap.dedent(
        """
        import resource, hiredis, re
        from virgo import limits
        from virgo.wire.framing import RequestReader
        r = RequestReader(limits.REQUEST_BYTES_MAX)
        def peak():
            with open("/proc/self/status") as status:
                return int(re.search(r"VmHWM:\\s+(\\d+)", status.read())[1])
        before = peak()
        """
    )
    code += textwrap.dedent(script) + "\nprint((peak() - before) / 1024)\n"
    done = subprocess.run(
        [sys.executable, "-c", code], text=True, capture_output=True, timeout=60, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


BOMBS = """
bombs = b"*1000000000 *4294967295 *1@>1000000000 *1@~1000000000 *1@$99999999999 *1@|1000000000"
bombs += b" *1@$1@aXX>1000000000 *1@%1000000000 *999999@*999999@*999999"
bombs = [bomb.replace(b"@", b"\\r\\n") + b"\\r\\n" for bomb in bombs.split()]
for header in b"*1048576@ *999999@ *999@$0@@ *1@ >999@ ~999@ |9999@ %1@".split():
    bombs.append(header.replace(b"@", b"\\r\\n") * 20_000)
for bomb in bombs:
    for step in (1, 5, 65_536, len(bomb)):
        reader = RequestReader(limits.REQUEST_BYTES_MAX)
        for at in range(0, len(bomb), step):
            reader.read(bomb[at : at + step])
        reader.read(b"*1\\r\\n$4\\r\\nPING\\r\\n")
        assert reader.fault is not None, bomb
"""
NESTED = """
chunk = b"*0\\r\\n$0\\r\\n\\r\\n" * 6000
r.read(b"*1048576\\r\\n$3\\r\\nSET\\r\\n")
for _ in range(500):
    r.read(chunk)
assert r.fault is not None
"""
STREAM = """
data = hiredis.pack_command(("SET", "k", b"\\r\\n*$>" * 4000)) * 10
for _ in range(50):
    for at in range(0, len(data), 60_001):
        r.read(data[at : at + 60_001])
assert r.fault is None
"""


@pytest.mark.parametrize(
    ("script", "mib"), [(BOMBS, 24), (NESTED, 24), (STREAM, 24)], ids=["bombs", "nested", "stream"]
)
def test_memory_is_bounded(script: str, mib: float) -> None:
    """Headers that announce much, nested arrays without end and long streams leave the process small."""
    assert _rss_growth_mib(script) < mib
