"""How a server ends: by a signal, idle and busy; and how it goes on when its engine dies."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

NewServer = Callable[..., Any]

pytestmark = pytest.mark.slow


def begin_stream(server: Any, num_tokens: int) -> Iterator[Any]:
    """A stream of so many tokens whose first chunk has come."""
    client = server.client()
    model = client.models.list().data[0].id
    stream: Iterator[Any] = iter(
        client.completions.create(
            model=model,
            prompt="Once upon a time",
            max_tokens=num_tokens,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True, "skip_special_tokens": False},
        )
    )
    next(stream)
    return stream


def finish_reasons(stream: Iterator[Any]) -> list[str]:
    return [choice.finish_reason for chunk in stream for choice in chunk.choices if choice.finish_reason]


def test_row58_an_idle_server_ends_at_once_and_in_order(new_server: NewServer) -> None:
    with new_server() as server:
        engine_pid = server.engine_pid()
        server.process.send_signal(signal.SIGHUP)
        assert server.get("/livez").status_code == 200, "SIGHUP ends nothing"
        server.process.send_signal(signal.SIGTERM)
        assert server.wait_for_exit(within_s=8.0) == 0
        server.wait_until_gone(engine_pid)


def test_row58_row59_a_busy_server_finishes_what_runs_and_refuses_the_rest(new_server: NewServer) -> None:
    with new_server("--shutdown-timeout-s", "60") as server:
        client = server.client()
        model = client.models.list().data[0].id
        streams = [begin_stream(server, num_tokens=600) for _ in range(3)]
        server.process.send_signal(signal.SIGTERM)
        server.wait_until_status("/readyz", 503)
        assert server.get("/livez").status_code == 200
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model=model, prompt="Too late", max_tokens=1)
        assert caught.value.status_code == 503
        assert int(caught.value.response.headers["retry-after"]) >= 1
        with ThreadPoolExecutor(3) as pool:
            ends = list(pool.map(finish_reasons, streams))
        assert ends == [["length"]] * 3, "what ran when the signal came is answered in full"
        assert server.wait_for_exit(within_s=10.0) == 0


def test_row58_what_outlasts_the_drain_ends_with_an_error_event(new_server: NewServer) -> None:
    with new_server("--shutdown-timeout-s", "0.5") as server:
        streams = [begin_stream(server, num_tokens=3900) for _ in range(3)]
        began_s = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        for stream in streams:
            with pytest.raises(openai.APIError) as caught:
                finish_reasons(stream)
            assert not isinstance(caught.value, openai.APIConnectionError), "an event, not a broken connection"
        assert server.wait_for_exit(within_s=8.0) == 0
        assert time.monotonic() - began_s < 0.5 + 5.0 + 3.0


def test_row58_a_second_signal_ends_it_at_once(new_server: NewServer) -> None:
    with new_server("--shutdown-timeout-s", "300") as server:
        stream = begin_stream(server, num_tokens=3900)
        server.process.send_signal(signal.SIGINT)
        server.wait_until_status("/readyz", 503)
        server.process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError):
            finish_reasons(stream)
        assert server.wait_for_exit(within_s=8.0) == 0


def test_row52_row37_a_killed_engine_ends_its_streams_and_is_replaced(new_server: NewServer) -> None:
    with new_server() as server:
        client = server.client()
        model = client.models.list().data[0].id
        asked = {"model": model, "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
        before = client.completions.create(**asked).choices[0].text
        first_pid = server.engine_pid()
        streams = [begin_stream(server, num_tokens=3900) for _ in range(3)]
        os.kill(first_pid, signal.SIGKILL)
        for stream in streams:
            with pytest.raises(openai.APIError) as caught:
                finish_reasons(stream)
            assert not isinstance(caught.value, openai.APIConnectionError), "an event, not a broken connection"
        server.wait_until_status("/readyz", 503)
        assert server.get("/livez").status_code == 200
        assert server.metric("num_requests_running") == 0
        with pytest.raises(openai.InternalServerError) as refused:
            client.completions.create(**asked)
        assert refused.value.status_code == 503
        assert "retry-after" in refused.value.response.headers
        server.wait_until_status("/readyz", 200)
        assert server.engine_pid() != first_pid
        assert client.completions.create(**asked).choices[0].text == before, "the canary sings as it did"
        server.wait_until_quiet()


def test_row52_a_killed_server_leaves_no_engine_behind(new_server: NewServer) -> None:
    with new_server() as server:
        engine_pid = server.engine_pid()
        begin_stream(server, num_tokens=3900)
        server.process.kill()
        assert server.wait_for_exit(within_s=5.0) == -signal.SIGKILL
        server.wait_until_gone(engine_pid)
