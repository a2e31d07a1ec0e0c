"""Events do not depend on how the bytes were cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.sse import MAX_EVENT_BYTES, EventDecoder, EventTooLarge

payloads = st.lists(st.binary(max_size=20).map(lambda b: b.replace(b"\n", b"").replace(b"\r", b"")), max_size=6)
line_ends = st.sampled_from([b"\n", b"\r\n", b"\r"])


def cut(data: bytes, places: list[int]) -> list[bytes]:
    at = sorted({min(place, len(data)) for place in places} | {0, len(data)})
    return [data[a:b] for a, b in pairwise(at)]


@given(payloads, line_ends, st.lists(st.integers(0, 300), max_size=12))
def test_events_do_not_depend_on_the_cuts(events: list[bytes], line_end: bytes, places: list[int]) -> None:
    stream = b"".join(b"data: " + data + line_end * 2 for data in events) + b": a comment ends it" + b"\n"
    decoder = EventDecoder()
    assert [found for piece in cut(stream, places) for found in decoder.feed(piece)] == events


def test_data_lines_are_joined_and_other_fields_and_comments_skipped() -> None:
    stream = b": keep-alive\n\nevent: x\ndata: a\nid: 1\ndata:b\ndata\n\n\n\ndata:  c\n\n"
    assert EventDecoder().feed(stream) == [b"a\nb\n", b" c"]


def test_an_unfinished_event_is_no_event() -> None:
    assert EventDecoder().feed(b"data: a\n") == []


def test_an_event_without_end_is_refused() -> None:
    decoder = EventDecoder()
    with pytest.raises(EventTooLarge):
        decoder.feed(b"data: " + b"x" * (MAX_EVENT_BYTES + 1))
