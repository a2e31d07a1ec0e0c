"""A bar where somebody watches, lines where a log is kept."""

from __future__ import annotations

import io
import logging

import pytest

from mixtral_serve.model.progress import progress
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
    assert [record.message for record in caplog.records] == [f"loading x: {n} of {total} tensors" for n in said]
