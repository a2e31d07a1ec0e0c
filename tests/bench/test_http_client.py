"""The HTTP client: framing whatever the cuts, and every failure as an ``ExchangeError``."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.http_client import CannotConnect, ConnectionLost, NotHttp, ResponseParser, Target, TooSlow, exchange

bodies = st.lists(st.binary(min_size=1, max_size=30), max_size=5)
cuts = st.lists(st.integers(0, 400), max_size=15)


def feed(parser: ResponseParser, data: bytes, places: list[int]) -> bytes:
    at = sorted({min(place, len(data)) for place in places} | {0, len(data)})
    pieces = [piece for a, b in pairwise(at) for piece in parser.feed(data[a:b])]
    return b"".join(pieces)


@given(bodies, cuts, st.booleans(), st.sampled_from([b"", b"X-Trailer: 1\r\n"]))
def test_a_chunked_body_does_not_depend_on_the_cuts(
    chunks: list[bytes], places: list[int], interim: bool, trailer: bytes
) -> None:
    data = b"HTTP/1.1 100 Continue\r\n\r\n" if interim else b""
    data += b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-Name: value\r\n\r\n"
    data += b"".join(b"%x;ext=1\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n" + trailer + b"\r\n"
    parser = ResponseParser()
    assert feed(parser, data, places) == b"".join(chunks)
    assert parser.is_complete
    assert (parser.status, parser.headers["x-name"]) == (200, "value")
    parser.end()


@given(st.binary(max_size=60), cuts)
def test_a_body_of_known_length_does_not_depend_on_the_cuts(body: bytes, places: list[int]) -> None:
    parser = ResponseParser()
    assert feed(parser, b"HTTP/1.1 404 Not Found\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body), places) == body
    assert parser.is_complete
    assert parser.status == 404


def test_a_body_without_length_ends_with_the_connection() -> None:
    parser = ResponseParser()
    assert parser.feed(b"HTTP/1.1 200 OK\r\n\r\nabc") == [b"abc"]
    assert not parser.is_complete
    parser.end()
    assert parser.is_complete


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nab",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n",
    ],
)
def test_an_answer_that_is_cut_is_lost(data: bytes) -> None:
    parser = ResponseParser()
    parser.feed(data)
    with pytest.raises(ConnectionLost):
        parser.end()


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nabc\r\n",
        b"x" * (70 << 10),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1" * 2000,
    ],
)
def test_what_is_not_http_is_refused(data: bytes) -> None:
    with pytest.raises(NotHttp):
        ResponseParser().feed(data)


@pytest.mark.parametrize(
    ("url", "is_loopback"),
    [
        ("http://127.0.0.1:11400", True),
        ("http://localhost:1/v1/", True),
        ("http://[::1]:80", True),
        ("http://127.1.2.3", True),
        ("http://localhost.example.com", False),
        ("http://10.0.0.1", False),
        ("https://example.com/api/v1", False),
        ("http://0.0.0.0:1", False),
    ],
)
def test_only_this_machine_is_loopback(url: str, is_loopback: bool) -> None:
    assert Target.parse(url).is_loopback is is_loopback


@pytest.mark.parametrize("url", ["127.0.0.1:80", "ftp://localhost", "http://", "http://localhost:99999"])
def test_a_base_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"URL|[Pp]ort"):
        Target.parse(url)


def test_a_request_carries_path_prefix_host_and_length() -> None:
    request = Target.parse("http://[::1]:8000/prefix/v1").request("POST", "/v1/x", b"{}", {"A": "b"})
    head, body = request.split(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0] == b"POST /prefix/v1/x HTTP/1.1"
    assert {b"Host: [::1]:8000", b"A: b", b"Content-Length: 2", b"Connection: close"} <= set(lines)
    assert body == b"{}"


def test_nobody_listening_cannot_be_connected_to(run_async: Callable[..., None]) -> None:
    async def main() -> None:
        server = await asyncio.start_server(lambda _r, _w: None, "127.0.0.1", 0)
        target = Target.parse(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        server.close()
        await server.wait_closed()
        with pytest.raises(CannotConnect):
            await exchange(target, target.request("GET", "/"), lambda _s, _p: None, timeout_s=5)

    run_async(main())


def test_a_silent_server_is_too_slow(serving: Callable[..., Any], run_async: Callable[..., None]) -> None:
    async def main() -> None:
        async with serving("silent") as server:
            target = Target.parse(server.base_url)
            request = target.request("POST", "/v1/completions", b'{"max_tokens": 1}')
            with pytest.raises(TooSlow):
                await exchange(target, request, lambda _s, _p: None, timeout_s=0.05)

    run_async(main())


def test_what_the_reader_raises_ends_the_exchange(serving: Callable[..., Any], run_async: Callable[..., None]) -> None:
    def refuse(status: int, piece: bytes) -> None:
        raise LookupError(f"enough of {status} after {len(piece)} bytes")

    async def main() -> None:
        async with serving() as server:
            target = Target.parse(server.base_url)
            request = target.request("POST", "/v1/completions", b'{"max_tokens": 5}')
            with pytest.raises(LookupError, match="enough"):
                await exchange(target, request, refuse, timeout_s=5)

    run_async(main())
