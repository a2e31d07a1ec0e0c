"""The engine process: its loop, its endings, and what happens to it when the others misbehave."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from mixtral_serve.engine.core import EngineCore
from mixtral_serve.engine.errors import EXIT_CONFIG
from mixtral_serve.engine.fakes import FakeScript, Fault, byte_ids, fake_parts
from mixtral_serve.engine.messages import Cancel, Delta, Failed, Inbox, Outbox, Ready, Shutdown, decode_outbox, encode
from mixtral_serve.engine.process import EXIT_BROKEN, serve
from mixtral_serve.engine.transport import EngineSocket, FrameDecoder, frame

POISON = byte_ids("!")[0]


class Line:
    """The API process's end, blocking."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sock.settimeout(30.0)
        self._decoder = FrameDecoder()
        self._messages: list[Outbox] = []

    def tell(self, *commands: object) -> None:
        self.sock.sendall(frame(encode(Inbox(commands))))

    def hear(self) -> Outbox | None:
        """The next message; None at the end."""
        while not self._messages:
            data = self.sock.recv(1 << 16)
            if not data:
                return None
            self._messages += map(decode_outbox, self._decoder.feed(data))
        return self._messages.pop(0)

    def deltas_until_end_of(self, *request_ids: str) -> list[Delta]:
        left, deltas = set(request_ids), []
        while left:
            message = self.hear()
            assert message is not None, "the engine ended first"
            deltas += message.deltas
            left -= {d.request_id for d in message.deltas if d.finish_reason}
        return deltas


@contextmanager
def engine(script: FakeScript) -> Iterator[tuple[Line, subprocess.Popen[bytes]]]:
    ours, theirs = socket.socketpair()
    argv = [sys.executable, "-m", "mixtral_serve.engine.fakes", "--fd", str(theirs.fileno())]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    process = subprocess.Popen(
        [*argv, "--script", msgspec.json.encode(script).decode()], pass_fds=[theirs.fileno()], env=env
    )
    theirs.close()
    try:
        yield Line(ours), process
    finally:
        ours.close()
        process.kill()
        process.wait(10)


def test_an_engine_introduces_itself_serves_and_ends_when_told(submit_of):
    with engine(FakeScript(output="Hello")) as (line, process):
        ready = line.hear()
        assert isinstance(ready, Ready)
        assert ready.info.name == "fake"
        line.tell(submit_of("a"))
        assert "".join(d.text for d in line.deltas_until_end_of("a")) == "Hello"
        line.tell(submit_of("b", max_tokens=4000, ignore_eos=True))
        line.hear()
        line.tell(Shutdown())
        assert line.deltas_until_end_of("b")[-1].finish_reason == "cancelled"
        assert line.hear() is None
        assert process.wait(10) == 0


def test_row54_an_engine_that_cannot_start_as_configured_says_why_and_exits_with_78():
    with engine(FakeScript(load_error="shard 3 is truncated")) as (line, process):
        assert line.hear() == Failed(message="shard 3 is truncated", exit_code=EXIT_CONFIG)
        assert process.wait(10) == EXIT_CONFIG


def test_row49_a_configuration_that_contradicts_itself_is_such_a_case():
    with engine(FakeScript(max_num_seqs=64, max_num_batched_tokens=8)) as (line, process):
        failed = line.hear()
        assert isinstance(failed, Failed)
        assert "max_num_batched_tokens" in failed.message
        assert process.wait(10) == EXIT_CONFIG


def test_a_crash_while_loading_is_a_crash():
    with engine(FakeScript(load_crash=True)) as (line, process):
        assert line.hear() is None
        assert process.wait(10) not in (0, EXIT_CONFIG)


def test_the_engine_ends_with_its_parent_when_idle_and_when_busy(submit_of):
    for busy in (False, True):
        with engine(FakeScript(never_ends=True, step_s=0.01)) as (line, process):
            line.hear()
            if busy:
                line.tell(submit_of("a", max_tokens=4000))
                line.hear()
            line.sock.close()
            assert process.wait(10) in (0, 1)


PARENT = """
import asyncio, json, sys, time
from mixtral_serve.engine.client import EngineClient
from mixtral_serve.engine.launch import EngineLaunch

async def main():
    argv = (sys.executable, "-m", "mixtral_serve.engine.fakes", "--script", json.dumps({"load_s": 600}))
    client = EngineClient(EngineLaunch(argv), max_waiting=1)
    await client.start()
    while client.engine_pid is None:
        await asyncio.sleep(0.01)
    print(client.engine_pid, flush=True)
    await client.wait_ready()

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells of a parent's death on Linux only")
def test_row52_an_engine_that_is_still_loading_ends_with_a_killed_parent():
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, env=env) as parent:
        assert parent.stdout is not None
        stat = Path(f"/proc/{int(parent.stdout.readline())}/stat")
        deadline_s = time.monotonic() + 20
        while "loading" not in loading_state_of(stat):
            assert time.monotonic() < deadline_s, "the engine does not begin to load"
            time.sleep(0.02)
        parent.kill()
        while loading_state_of(stat) != "gone":
            assert time.monotonic() < deadline_s, "the engine outlives its parent"
            time.sleep(0.02)


def loading_state_of(stat: Path) -> str:
    """Whether an engine process has come to ignore SIGTERM (it loads then), or has ended."""
    try:
        if stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return "gone"
        ignored = re.search(r"SigIgn:\s*(\w+)", stat.with_name("status").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return "gone"
    assert ignored is not None
    return "loading" if int(ignored[1], 16) & 1 << (signal.SIGTERM - 1) else "starting"


def test_row58_sigint_and_sigterm_are_for_the_parent(submit_of):
    with engine(FakeScript(output="Hello")) as (line, process):
        line.hear()
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        line.tell(submit_of("a"))
        assert line.deltas_until_end_of("a")[-1].finish_reason == "stop"


def test_row37_an_engine_whose_steps_always_fail_ends_with_a_code(submit_of):
    with engine(FakeScript(poison={POISON: Fault.RAISE})) as (line, process):
        line.hear()
        for i in range(16):
            line.tell(submit_of(f"r{i}", "!"))
            assert line.deltas_until_end_of(f"r{i}")[-1].finish_reason == "error"
        assert process.wait(10) == EXIT_BROKEN


def test_row35_a_reader_that_stops_reading_does_not_stop_the_engine(submit_of):
    """In one process and in lockstep: the loop runs in a thread, nobody reads, and all steps are done."""
    ours, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    script = FakeScript(never_ends=True, num_blocks=4096)
    parts = fake_parts(script)
    core = EngineCore(parts.scheduler, parts.runner, parts.token_bytes)
    connection = EngineSocket(theirs)
    thread = threading.Thread(target=serve, args=(connection, core))
    thread.start()
    line = Line(ours)
    line.tell(*(submit_of(f"r{i}", "x", max_tokens=300) for i in range(32)))
    deadline = 2000
    while parts.scheduler.stats().num_steps < 300 and deadline:
        thread.join(0.01)  # gives the engine time; nothing is read meanwhile
        deadline -= 1
    assert parts.scheduler.stats().num_steps == 300
    assert connection.num_unsent_bytes > 100_000
    deltas = line.deltas_until_end_of(*(f"r{i}" for i in range(32)))
    assert len(deltas) == 32 * 300
    line.tell(Shutdown())
    thread.join(10)
    assert not thread.is_alive()
    ours.close()


def test_cancel_reaches_a_running_request_between_two_steps(submit_of):
    with engine(FakeScript(never_ends=True, step_s=0.005)) as (line, _):
        line.hear()
        line.tell(submit_of("a", max_tokens=4000))
        line.hear()
        line.tell(Cancel("a"), Cancel("nobody"))
        last = line.deltas_until_end_of("a")[-1]
        assert last.finish_reason == "cancelled"
        assert last.num_output_tokens < 100


@pytest.mark.parametrize("data", [b"\xff" * 64, frame(b"\xc1 not a message")])
def test_an_engine_does_not_go_on_with_a_parent_that_speaks_gibberish(data):
    with engine(FakeScript()) as (line, process):
        line.hear()
        line.sock.sendall(data)
        assert process.wait(10) == 1
