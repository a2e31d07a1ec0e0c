"""Clients that leave: whatever the server was doing for them ends, and their blocks are free again."""

from __future__ import annotations

import json
import select
import socket
import struct
from collections.abc import Callable
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

LONG = 3500
"""Output tokens that take long: whoever asks for them leaves before."""


@pytest.fixture
def ask(quiet_server: Any) -> Callable[..., socket.socket]:
    """Sends one completion request over a bare socket and returns it."""
    model = quiet_server.client().models.list().data[0].id
    address = urlsplit(quiet_server.base_url)

    def send(*, stream: bool, num_prompt_tokens: int = 32, first_id: int = 300) -> socket.socket:
        prompt = [first_id + (i * i + i) % 500 for i in range(num_prompt_tokens)]
        body = {"model": model, "prompt": prompt, "max_tokens": LONG, "stream": stream, "ignore_eos": True}
        body["max_tokens"] = min(LONG, 4000 - num_prompt_tokens)
        data = json.dumps(body).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
        )
        connection = socket.create_connection((address.hostname, address.port), timeout=30.0)
        connection.sendall(head.encode() + b"\r\n\r\n" + data)
        return connection

    return send


def test_row29_leaving_during_the_prefill_frees_the_blocks(
    quiet_server: Any, ask: Callable[..., socket.socket]
) -> None:
    with closing(ask(stream=True, num_prompt_tokens=3900)) as connection:
        quiet_server.wait_until_metric("num_requests_running", 1)
        assert not select.select([connection], [], [], 0)[0], "nothing has been answered yet"
    quiet_server.wait_until_quiet()


def test_row30_leaving_a_stream_frees_the_blocks(quiet_server: Any) -> None:
    client = quiet_server.client()
    model = client.models.list().data[0].id
    stream = client.completions.create(
        model=model, prompt="Once upon a time", max_tokens=LONG, stream=True, extra_body={"ignore_eos": True}
    )
    assert next(iter(stream)).choices
    assert quiet_server.metric("num_requests_running") == 1
    stream.close()
    quiet_server.wait_until_quiet()


def hang_up(connection: socket.socket) -> None:
    connection.close()


def reset(connection: socket.socket) -> None:
    """Linger for no time: closing sends a reset instead of an orderly end."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def close_half(connection: socket.socket) -> None:
    """Say that nothing more will be sent, and go on listening."""
    connection.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("leave", [hang_up, reset, close_half])
def test_row30_each_way_of_leaving_a_stream_frees_the_blocks(
    leave: Callable[[socket.socket], None], quiet_server: Any, ask: Callable[..., socket.socket]
) -> None:
    with closing(ask(stream=True)) as connection:
        assert connection.recv(10).startswith(b"HTTP/1.1 2")
        leave(connection)
        quiet_server.wait_until_quiet()


def test_row31_leaving_a_whole_answer_frees_the_blocks(quiet_server: Any) -> None:
    model = quiet_server.client().models.list().data[0].id
    with pytest.raises(openai.APITimeoutError):
        quiet_server.client(timeout=0.5).completions.create(
            model=model, prompt="Once upon a time", max_tokens=LONG, extra_body={"ignore_eos": True}
        )
    quiet_server.wait_until_quiet()


@pytest.mark.slow
def test_row32_leaving_the_queue_costs_no_prefill(quiet_server: Any, ask: Callable[..., socket.socket]) -> None:
    seated = [ask(stream=True, first_id=300 + i) for i in range(16)]
    try:
        quiet_server.wait_until_metric("num_requests_running", 16)
        num_prompt_tokens = quiet_server.metric("prompt_tokens_total")
        with closing(ask(stream=False, num_prompt_tokens=500)), closing(ask(stream=True, num_prompt_tokens=500)):
            quiet_server.wait_until_metric("num_requests_waiting", 2)
        quiet_server.wait_until_metric("num_requests_waiting", 0)
        assert quiet_server.metric("num_requests_running") == 16, "those who have a seat are not disturbed"
        assert quiet_server.metric("prompt_tokens_total") == num_prompt_tokens
    finally:
        for connection in seated:
            connection.close()
    quiet_server.wait_until_quiet()
