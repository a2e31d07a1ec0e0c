"""A bar where somebody watches, lines where a log is kept."""

from __future__ import annotations

import io
import logging

import pytest

from mixtral_serve.model.progress import progress


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


@pytest.mark.parametrize(("total", "num_lines"), [(1, 1), (4, 4), (10, 10), (995, 10)])
def test_a_log_gets_at_most_ten_lines_and_the_last_says_all(caplog, total, num_lines) -> None:
    stream = io.StringIO()
    with caplog.at_level(logging.INFO), progress("loading x", total=total, unit="tensors", stream=stream) as report:
        for _ in range(total):
            report.advance(1)
    assert stream.getvalue() == ""
    assert len(caplog.records) == num_lines
    assert caplog.records[-1].message == f"loading x: {total} of {total} tensors"
