"""The HTTP connection against clients that send too much, too slowly, or no HTTP."""

from __future__ import annotations

import asyncio
import json
import resource
import time
from typing import Any

import pytest

CHAT = "/v1/chat/completions"
BODY = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}).encode()
HEAD = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def rss_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    """One answer; status 0 where the connection ended without one."""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
    except (asyncio.IncompleteReadError, ConnectionError):
        return 0, {}, b""
    first, *lines = head.rstrip("\r\n").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return int(first.split()[1]), headers, body


async def send_slowly(writer: asyncio.StreamWriter, chunks: Any) -> None:
    """Send until the server has had enough."""
    try:
        for chunk in chunks:
            writer.write(chunk)
            await writer.drain()
    except ConnectionError:
        return


async def exchange(port: int, chunks: Any) -> tuple[int, dict[str, str], bytes]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    sending = asyncio.create_task(send_slowly(writer, chunks))
    try:
        return await answer(reader)
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        writer.close()


def assert_envelope(body: bytes, code: str) -> None:
    assert json.loads(body)["error"]["code"] == code
    assert len(body) < 2000


def test_row18_huge_heads_are_refused_with_flat_memory(api: Any, run: Any, loopback: Any) -> None:
    async def scenario() -> None:
        async with loopback(api.app) as port:
            before = rss_bytes()
            big_header = [HEAD.encode(), b"X-Big: ", *[b"x" * 65_536] * 512]
            many_headers = [HEAD.encode(), *[f"X-{i}: y\r\n".encode() for i in range(20_000)], b"\r\n"]
            long_target = [b"GET /" + b"x" * 1_000_000 + b" HTTP/1.1\r\n\r\n"]
            for chunks in (big_header, many_headers, long_target):
                status, headers, body = await exchange(port, chunks)
                assert status in (0, 400)  # 0: the reset came before the answer was read
                if status:
                    assert_envelope(body, "invalid_http")
                    assert headers["x-request-id"].startswith("req_")
            assert rss_bytes() - before < 16_000_000

    run(scenario())
    api.assert_alive()


OVERSIZE = {
    "declared": [f"{HEAD}Content-Length: 2000000\r\n\r\n".encode(), *[b"x" * 65_536] * 31],
    "declared absurdly": [f"{HEAD}Content-Length: {'9' * 18}\r\n\r\n".encode()],
    "chunked": [f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode(), *[b"10000\r\n" + b"x" * 65_536 + b"\r\n"] * 400],
}


@pytest.mark.parametrize("chunks", OVERSIZE.values(), ids=OVERSIZE)
def test_row20_a_body_over_the_limit_stops_at_the_limit(api: Any, run: Any, loopback: Any, chunks: list[bytes]) -> None:
    async def scenario() -> None:
        async with loopback(api.app) as port:
            before = rss_bytes()
            status, _, body = await exchange(port, chunks)
            assert status == 413
            assert_envelope(body, "request_too_large")
            assert rss_bytes() - before < 16_000_000

    run(scenario())
    assert api.engine.submits == []
    api.assert_alive()


@pytest.mark.slow
def test_row22_a_body_in_chunks_of_one_byte_holds_up_nobody(api: Any, run: Any, loopback: Any) -> None:
    chunks = [f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode(), *[b"1\r\nx\r\n" * 10_000] * 10]
    small = api.with_settings(max_body_bytes=99_999)

    async def scenario() -> None:
        worst_s: list[float] = []

        async def probe() -> None:
            worst_s.append(0.0)
            while True:
                start = time.thread_time()  # the loop's work in one turn, however busy the machine is
                await asyncio.sleep(0)
                worst_s[-1] = max(worst_s[-1], time.thread_time() - start)

        async with loopback(small.app) as port:
            for _ in range(3):  # the best of three: a neighbour on the same core slows the clock's seconds too
                probing = asyncio.create_task(probe())
                status, _, body = await exchange(port, chunks)
                probing.cancel()
                assert status == 413
                assert_envelope(body, "request_too_large")
            assert min(worst_s) < 0.25, worst_s

    run(scenario())


@pytest.mark.parametrize(
    ("extra", "code"),
    [
        ("Content-Type: text/plain\r\n", "unsupported_media_type"),
        ("", "unsupported_media_type"),
        ("Content-Type: application/json\r\nContent-Encoding: gzip\r\n", "unsupported_media_type"),
        ("Content-Type: application/json\r\nContent-Encoding: deflate\r\n", "unsupported_media_type"),
    ],
)
def test_row20_what_is_not_plain_json_is_415(api: Any, run: Any, loopback: Any, extra: str, code: str) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\n{extra}Content-Length: {len(BODY)}\r\n\r\n".encode()

    async def scenario() -> None:
        async with loopback(api.app) as port:
            status, _, body = await exchange(port, [head, BODY])
            assert status == 415
            assert_envelope(body, code)

    run(scenario())
    api.assert_alive()


def test_content_types_with_parameters_are_json_too(api: Any) -> None:
    for media_type in ("application/json; charset=utf-8", "Application/JSON"):
        assert api.call("POST", CHAT, BODY, {"content-type": media_type}).status == 200


def test_row19_a_body_that_trickles_is_ended(api: Any, run: Any, loopback: Any) -> None:
    impatient = api.with_settings(body_timeout_s=0.2)

    async def scenario() -> None:
        async with loopback(impatient.app, client_turn_s=0.2) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(f"{HEAD}Content-Length: {len(BODY)}\r\n\r\n".encode() + BODY[:5])
            status, _, body = await answer(reader)
            assert status == 408
            assert_envelope(body, "request_timeout")
            assert await reader.read() == b"", "and the connection ends: the rest of the body never came"
            writer.close()

    run(scenario())
    api.assert_alive()


def test_row19_heads_that_trickle_and_idle_connections_are_closed_while_others_are_served(
    api: Any, run: Any, loopback: Any
) -> None:
    async def scenario() -> None:
        async with loopback(api.app, client_turn_s=2.0) as port:
            slow = [await asyncio.open_connection("127.0.0.1", port) for _ in range(100)]
            for index, (_, writer) in enumerate(slow):
                writer.write(HEAD.encode()[: index % 40])
            status, _, _ = await exchange(port, [f"{HEAD}Content-Length: {len(BODY)}\r\n\r\n".encode(), BODY])
            assert status == 200
            start = time.monotonic()
            for reader, writer in slow:
                assert await reader.read() == b""
                writer.close()
            assert time.monotonic() - start < 10

    run(scenario())


def test_a_connection_is_kept_for_the_next_request(api: Any, run: Any, loopback: Any) -> None:
    request = f"{HEAD}Content-Length: {len(BODY)}\r\n\r\n".encode() + BODY

    async def scenario() -> None:
        async with loopback(api.app, client_turn_s=0.5) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for _ in range(3):
                writer.write(request)
                assert (await answer(reader))[0] == 200
            writer.write(request * 3)  # pipelined
            for _ in range(3):
                assert (await answer(reader))[0] == 200
            assert await reader.read() == b"", "closed when it has been idle for long enough"
            writer.close()

    run(scenario())


@pytest.mark.parametrize(
    "garbage",
    [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 not plain http\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"],
)
def test_what_is_no_http_is_answered_in_the_envelope(api: Any, run: Any, loopback: Any, garbage: bytes) -> None:
    async def scenario() -> None:
        async with loopback(api.app) as port:
            status, _, body = await exchange(port, [garbage])
            assert status == 400
            assert_envelope(body, "invalid_http")

    run(scenario())


@pytest.mark.parametrize(
    "target", ["/v1/models?x=/livez", "//livez", "/%6civez", "/livez/", "/v1/../livez", "*", "/a;b"]
)
def test_row2_odd_targets_and_hosts_change_no_answer(api: Any, run: Any, loopback: Any, target: str) -> None:
    async def scenario() -> list[int]:
        statuses = []
        async with loopback(api.app) as port:
            for host in ("x", "a/?x=", "h/#", "evil.example:80"):
                request = f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
                status, headers, _ = await exchange(port, [request])
                statuses.append(status)
                assert "location" not in headers
        return statuses

    assert len(set(run(scenario()))) == 1
