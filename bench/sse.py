"""Server-sent events, as bytes come in: the part of the format that OpenAI-compatible servers use.

Owns: ``EventDecoder``. Sans-IO: bytes in, the data of complete events out.

Invariants: the events do not depend on how the bytes were cut; an unfinished event at the end of the stream is
dropped, as the standard says.

Rejected: a library (httpx-sse and its kin decode text lines; we need bytes, and nothing but ``data``).
"""

from __future__ import annotations

from typing import Final

MAX_EVENT_BYTES: Final = 4 << 20
"""An event that grows beyond this is no answer to a measurement."""


class EventTooLarge(ValueError):
    """One event has more than ``MAX_EVENT_BYTES``."""


class EventDecoder:
    """Cuts a byte stream into events."""

    __slots__ = ("_data", "_rest")

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, data: bytes) -> list[bytes]:
        """The ``data`` of the events that ``data`` completes: lines of one event joined by a line break.

        Raises:
            EventTooLarge: an event does not end.
        """
        data = self._rest + data
        if b"\r" in data:
            # A CR at the end may be half of a CRLF: it waits for the next byte.
            tail = b"\r" if data.endswith(b"\r") else b""
            data = data.removesuffix(tail).replace(b"\r\n", b"\n").replace(b"\r", b"\n") + tail
        *lines, self._rest = data.split(b"\n")
        events = []
        for line in lines:
            if line.startswith(b"data:"):
                self._data.append(line[6:] if line[5:6] == b" " else line[5:])
            elif line == b"data":
                self._data.append(b"")
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data.clear()
        if len(self._rest) > MAX_EVENT_BYTES or sum(map(len, self._data)) > MAX_EVENT_BYTES:
            raise EventTooLarge(f"an event has more than {MAX_EVENT_BYTES} bytes")
        return events
