"""A bar where somebody watches, lines where a log is kept."""

from __future__ import annotations

import io
import logging

import pytest

from mixtral_serve.model.progress import BYTES, progress
from scheduler.sim import VirtualClock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_and_the_log_nothing(caplog) -> None:
    terminal = Terminal()
    with caplog.at_level(logging.INFO), progress("loading x", total=3, unit="tensors", stream=terminal) as report:
        for _ in range(3):
            report.advance(1)
    assert "loading x: 100%" in terminal.getvalue()
    assert not caplog.records


@pytest.mark.parametrize(("total", "seconds_each", "said"), [(1, 0.0, [1]), (995, 0.0, [995]), (7, 2.0, [3, 6, 7])])
def test_a_log_gets_a_line_every_five_seconds_and_the_last_says_all(caplog, total, seconds_each, said) -> None:
    stream, clock = io.StringIO(), VirtualClock()
    with (
        caplog.at_level(logging.INFO),
        progress("loading x", total=total, unit="tensors", stream=stream, clock=clock) as report,
    ):
        for _ in range(total):
            clock.advance(seconds_each)
            report.advance(1)
    assert stream.getvalue() == ""
    assert [record.message.partition(", ")[0] for record in caplog.records] == [
        f"loading x: {n} of {total} tensors" for n in said
    ]


def test_a_line_on_the_way_tells_the_rate_and_the_seconds_left(caplog) -> None:
    stream, clock = io.StringIO(), VirtualClock()
    with (
        caplog.at_level(logging.INFO),
        progress("packing x", total=4_000_000_000, unit=BYTES, stream=stream, clock=clock) as packing,
        progress("loading x", total=10, unit="tensors", stream=stream, clock=clock) as loading,
    ):
        clock.advance(6.0)
        packing.advance(1_500_000_000)
        loading.advance(6)
        clock.advance(4.0)
        packing.advance(2_500_000_000)
    assert [record.message for record in caplog.records] == [
        "packing x: 1.50 of 4.00 GB, 250 MB/s, 10 s left",
        "loading x: 6 of 10 tensors, 1.0 tensors/s, 4 s left",
        "packing x: 4.00 of 4.00 GB",
    ]
