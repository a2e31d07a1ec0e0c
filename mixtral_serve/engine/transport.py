"""Length-prefixed frames over a socket pair: the codec, and the engine's end of the line.

Owns: ``frame`` and ``FrameDecoder`` (sans-IO: bytes in, whole payloads out) and ``EngineSocket``, which the
engine process reads and writes without ever waiting for the other side to read.

A frame is four bytes of payload length, little-endian, then the payload.

Invariants: payloads come out whole and in order, however the bytes were split on the way; a length above
``MAX_FRAME_BYTES`` is refused before anything of that size is allocated. What the reader has not taken yet
waits in ``EngineSocket``'s out-buffer; it is bounded because an engine sends at most one delta per token it
was asked for.

Rejected: one message per datagram (``SOCK_SEQPACKET`` bounds a message by the socket buffer, and a scored
prompt is larger); a blocking ``sendall`` (a stalled API process would stretch every step).
"""

from __future__ import annotations

import select
import socket
import struct
from collections import deque
from typing import Final

MAX_FRAME_BYTES: Final = 1 << 30
"""A scored 32k prompt with 20 alternatives a position is some 15 MB; beyond this the stream is out of step."""

_HEADER: Final = struct.Struct("<I")
_READ_BYTES: Final = 1 << 18


class FrameError(Exception):
    """The bytes are not frames of this protocol, or ended inside one. The connection is useless then."""


def frame(payload: bytes) -> bytes:
    """``payload`` with its length in front.

    Raises:
        FrameError: the payload is longer than ``MAX_FRAME_BYTES``.
    """
    if len(payload) > MAX_FRAME_BYTES:
        raise FrameError(f"a payload of {len(payload)} bytes is longer than a frame may be")
    return _HEADER.pack(len(payload)) + payload


class FrameDecoder:
    """Cuts a stream of bytes back into payloads."""

    __slots__ = ("_buffer", "_needed")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._needed = _HEADER.size

    @property
    def num_pending_bytes(self) -> int:
        """Bytes of a frame that has only begun; 0 between frames."""
        return len(self._buffer)

    def feed(self, data: bytes | bytearray | memoryview) -> list[bytes]:
        """Take in the next bytes and return the payloads they complete, in order.

        Raises:
            FrameError: a frame says that it is longer than ``MAX_FRAME_BYTES``.
        """
        buffer = self._buffer
        buffer += data
        if len(buffer) < self._needed:  # the usual answer while a large frame comes in: nothing to do yet
            return []
        payloads: list[bytes] = []
        start = 0
        with memoryview(buffer) as view:
            while True:
                self._needed = _HEADER.size
                if len(buffer) - start < self._needed:
                    break
                (length,) = _HEADER.unpack_from(view, start)
                if length > MAX_FRAME_BYTES:
                    raise FrameError(f"a frame of {length} bytes was announced")
                self._needed += length
                if len(buffer) - start < self._needed:
                    break
                payloads.append(bytes(view[start + _HEADER.size : start + self._needed]))
                start += self._needed
        del buffer[:start]
        return payloads


class EngineSocket:
    """The engine process's end: reads when asked, writes when there is room, never waits to write.

    ``sock`` is made non-blocking and belongs to this object.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._decoder = FrameDecoder()
        self._out: deque[memoryview] = deque()
        self._poller = select.poll()
        self._is_open = True

    @property
    def is_open(self) -> bool:
        """False once the other side has gone; nothing can be read or written then."""
        return self._is_open

    @property
    def num_unsent_bytes(self) -> int:
        """What waits for the reader."""
        return sum(len(chunk) for chunk in self._out)

    def poll(self, timeout_s: float | None) -> list[bytes]:
        """Send what fits, wait up to ``timeout_s`` for input (None: until there is some), return whole payloads.

        Returns early, with nothing, when only room to write appeared.

        Raises:
            FrameError: the input is not frames, or it ended inside one.
        """
        self._flush()
        mask = select.POLLIN | (select.POLLOUT if self._out else 0)
        self._poller.register(self._sock, mask)
        ready = self._poller.poll(None if timeout_s is None else timeout_s * 1000.0)
        if not ready:
            return []
        if ready[0][1] & select.POLLOUT:
            self._flush()
        return self._read() if ready[0][1] & ~select.POLLOUT else []

    def send(self, payload: bytes) -> None:
        """Queue one frame and send what the socket takes now."""
        self._out.append(memoryview(frame(payload)))
        self._flush()

    def finish(self, timeout_s: float) -> None:
        """Send what is left, waiting up to ``timeout_s`` in all for the reader, then close."""
        self._sock.settimeout(timeout_s)
        try:
            while self._out:
                self._sock.sendall(self._out.popleft())
        except OSError:
            self._out.clear()
        self.close()

    def close(self) -> None:
        """Close the socket."""
        self._is_open = False
        self._sock.close()

    def _read(self) -> list[bytes]:
        payloads: list[bytes] = []
        while True:
            try:
                data = self._sock.recv(_READ_BYTES)
            except BlockingIOError:
                return payloads
            except ConnectionError:
                data = b""
            if not data:
                self._is_open = False
                if self._decoder.num_pending_bytes:
                    raise FrameError("the connection ended inside a frame")
                return payloads
            payloads += self._decoder.feed(data)

    def _flush(self) -> None:
        while self._out:
            chunk = self._out[0]
            try:
                num_sent = self._sock.send(chunk)
            except BlockingIOError:
                return
            except OSError:  # the reader is gone; the next read sees the end
                self._out.clear()
                return
            if num_sent < len(chunk):
                self._out[0] = chunk[num_sent:]
            else:
                self._out.popleft()
