"""A client that leaves is noticed at once, and what it asked for is cancelled."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from typing import Any

import pytest

from mixtral_serve.engine.messages import Delta

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}


def submitted(api: Any) -> list[str]:
    return [submit.request_id for submit in api.engine.submits]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_said", [0, 2])
def test_row29_row30_row31_leaving_cancels_every_choice(
    api: Any, run: Any, start_exchange: Any, n: int, stream: bool, num_said: int
) -> None:
    """Before the first token and in the middle, streaming or not."""
    api.engine.answer = None

    async def scenario() -> None:
        call = start_exchange(api.app, "POST", CHAT, json.dumps(BODY | {"stream": stream, "n": n}).encode())
        task = call.start()
        await api.engine.on_submit.wait()
        if num_said:
            api.engine.say(api.engine.submits[0].request_id, "x" * num_said, reason=None)
            if stream:
                await call.on_send.wait()
        call.left.set()
        await task
        assert sorted(api.engine.cancelled) == sorted(submitted(api))
        if stream and not num_said:
            assert call.sent == []

    run(scenario())
    api.engine.answer = "hello world"
    api.assert_alive()


def test_a_finished_request_is_not_cancelled(api: Any) -> None:
    api.chat(stream=True)
    api.chat()
    assert api.engine.cancelled == []


def test_a_server_that_cancels_the_handler_cancels_the_request(api: Any, run: Any, start_exchange: Any) -> None:
    api.engine.answer = None

    async def scenario() -> None:
        for stream in (True, False):
            call = start_exchange(api.app, "POST", CHAT, json.dumps(BODY | {"stream": stream}).encode())
            api.engine.on_submit.clear()
            task = call.start()
            await api.engine.on_submit.wait()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        assert sorted(api.engine.cancelled) == sorted(submitted(api))

    run(scenario())


def request_bytes(**fields: Any) -> bytes:
    body = json.dumps(BODY | fields).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


@pytest.mark.parametrize("way", ["close", "half-close", "reset"])
@pytest.mark.parametrize("stream", [False, True])
def test_row30_every_way_of_leaving_a_socket_counts(api: Any, run: Any, loopback: Any, way: str, stream: bool) -> None:
    api.engine.answer = None

    async def scenario() -> None:
        async with loopback(api.app) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request_bytes(stream=stream))
            await api.engine.on_submit.wait()
            if stream:
                api.engine.say(api.engine.last.request_id, "x", reason=None)
                await reader.readuntil(b"data: ")
            connection = writer.get_extra_info("socket")
            if way == "half-close":
                connection.shutdown(socket.SHUT_WR)
            elif way == "reset":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if way != "half-close":
                writer.transport.abort()
            await api.engine.on_cancel.wait()
            writer.close()

    run(scenario())


def test_row35_a_reader_that_stalls_is_aborted_and_disturbs_nobody(api: Any, run: Any, loopback: Any) -> None:
    api.engine.answer = None

    async def scenario() -> None:
        async with loopback(api.app, stall_s=0.3) as port:
            stalled = socket.socket()
            stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            stalled.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(stalled, ("127.0.0.1", port))
            await loop.sock_sendall(stalled, request_bytes(stream=True))
            await api.engine.on_submit.wait()
            request_id = api.engine.last.request_id
            # More than the kernel takes for a reader who does not read: megabytes, on loopback.
            for _ in range(200):
                delta = Delta(request_id=request_id, text="y" * 65_536, token_ids=(5,))
                api.engine.streams[request_id].push(delta)
            await api.engine.on_cancel.wait()
            assert api.engine.cancelled == [request_id]
            api.engine.answer = "hello world"
            assert (await api.send("POST", CHAT, BODY)).status == 200
            stalled.close()

    run(scenario())


def test_row35_a_reader_that_pauses_and_goes_on_gets_everything(api: Any, run: Any, loopback: Any) -> None:
    api.engine.answer = None
    size = 65_536

    async def scenario() -> None:
        async with loopback(api.app, stall_s=20.0) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=4096)
            writer.write(request_bytes(stream=True))
            await api.engine.on_submit.wait()
            request_id = api.engine.last.request_id
            stream = api.engine.streams[request_id]
            for _ in range(200):
                stream.push(Delta(request_id=request_id, text="y" * size, token_ids=(5,)))
            api.engine.end(request_id, "stop")
            taken = stream.num_queued
            while True:  # until the server waits for the reader, who has not begun
                await asyncio.sleep(0.05)
                if stream.num_queued == taken:
                    break
                taken = stream.num_queued
            assert taken > 0, "the reader's pause has reached the stream"
            received = b""
            while not received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
                received = received[-64:] + (data := await reader.read(1 << 20))
                assert data
            assert api.engine.cancelled == []
            writer.close()

    run(scenario())
