"""Frames survive any splitting, and the engine's end never waits for its reader."""

from __future__ import annotations

import socket
import struct
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtral_serve.engine.transport import MAX_FRAME_BYTES, EngineSocket, FrameDecoder, FrameError, frame


@given(payloads=st.lists(st.binary(max_size=300)), cuts=st.lists(st.integers(1, 40), min_size=1))
def test_payloads_come_out_whole_and_in_order_however_the_bytes_are_split(
    payloads: list[bytes], cuts: list[int]
) -> None:
    data = b"".join(map(frame, payloads))
    decoder = FrameDecoder()
    out: list[bytes] = []
    position = turn = 0
    while position < len(data):
        size = cuts[turn % len(cuts)]
        out += decoder.feed(data[position : position + size])
        position, turn = position + size, turn + 1
    assert out == payloads
    assert decoder.num_pending_bytes == 0


def test_a_frame_that_announces_more_than_the_limit_is_refused_from_its_header_alone() -> None:
    with pytest.raises(FrameError, match="announced"):
        FrameDecoder().feed(struct.pack("<I", MAX_FRAME_BYTES + 1))


@pytest.fixture
def pair() -> tuple[EngineSocket, socket.socket]:
    engine_end, other_end = socket.socketpair()
    connection = EngineSocket(engine_end)
    yield connection, other_end
    connection.close()
    other_end.close()


def read_frames(sock: socket.socket, count: int) -> list[bytes]:
    decoder, frames = FrameDecoder(), []
    while len(frames) < count:
        frames += decoder.feed(sock.recv(1 << 16))
    return frames


def test_poll_returns_what_came_and_notices_the_end(pair: tuple[EngineSocket, socket.socket]) -> None:
    connection, other = pair
    assert connection.poll(0.0) == []
    other.sendall(frame(b"one") + frame(b"two")[:5])
    assert connection.poll(None) == [b"one"]
    other.sendall(frame(b"two")[5:])
    other.close()
    assert connection.poll(None) == [b"two"]
    assert not connection.is_open


def test_an_end_inside_a_frame_is_an_error(pair: tuple[EngineSocket, socket.socket]) -> None:
    connection, other = pair
    other.sendall(frame(b"one")[:-1])
    other.close()
    with pytest.raises(FrameError, match="inside"):
        connection.poll(None)
    assert not connection.is_open


def test_row35_send_never_waits_for_a_reader_and_loses_nothing(pair: tuple[EngineSocket, socket.socket]) -> None:
    connection, other = pair
    payloads = [bytes([i]) * 50_000 for i in range(100)]
    for payload in payloads:
        connection.send(payload)  # 5 MB: far beyond what a socket holds; a blocking send would hang here
    assert connection.num_unsent_bytes > 0
    decoder, out = FrameDecoder(), []
    while len(out) < len(payloads):
        out += decoder.feed(other.recv(1 << 20))
        connection.poll(0.0)
    assert out == payloads
    assert connection.num_unsent_bytes == 0


@pytest.mark.timeout(30)
def test_an_idle_poll_wakes_up_to_send_what_is_left(pair: tuple[EngineSocket, socket.socket]) -> None:
    connection, other = pair
    connection.send(b"x" * 5_000_000)
    assert connection.num_unsent_bytes > 0

    def read_all_then_answer() -> None:
        assert len(read_frames(other, 1)[0]) == 5_000_000
        other.sendall(frame(b"thanks"))

    reader = threading.Thread(target=read_all_then_answer)
    reader.start()
    answer: list[bytes] = []
    while not answer:
        answer = connection.poll(None)  # would hang if only input could end the wait
    reader.join()
    assert answer == [b"thanks"]


def test_a_vanished_reader_costs_nothing(pair: tuple[EngineSocket, socket.socket]) -> None:
    connection, other = pair
    other.close()
    connection.send(b"x" * 1_000_000)
    assert connection.num_unsent_bytes == 0
    assert connection.poll(None) == []
    assert not connection.is_open


def test_finish_sends_what_is_left_before_it_closes(pair: tuple[EngineSocket, socket.socket]) -> None:
    connection, other = pair
    connection.send(b"last words")
    connection.finish(1.0)
    assert read_frames(other, 1) == [b"last words"]
    assert other.recv(1) == b""


def test_finish_gives_up_on_a_reader_that_does_not_read(pair: tuple[EngineSocket, socket.socket]) -> None:
    connection, _other = pair
    connection.send(b"x" * 5_000_000)
    connection.finish(0.05)
    assert not connection.is_open
