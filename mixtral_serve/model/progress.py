"""Progress of a long load: a bar where somebody watches, log lines where a log is kept."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Protocol, TextIO

from tqdm import tqdm

_log = logging.getLogger(__name__)

BYTES: Final = "bytes"
"""The unit that is shown in megabytes and gigabytes."""

_LINE_EVERY_S: Final = 5.0


class Progress(Protocol):
    """What a long piece of work reports to."""

    def advance(self, num_done: int) -> None:
        """``num_done`` more units are done."""
        ...


class _Bar:
    def __init__(self, bar: tqdm[None]) -> None:
        self._bar = bar

    def advance(self, num_done: int) -> None:
        self._bar.update(num_done)


class _Lines:
    """A line every few seconds and one at the end: a load of an hour and one of a second are both readable.

    All but the last say the rate so far and the seconds left at that rate.
    """

    def __init__(self, label: str, total: int, unit: str, clock: Callable[[], float]) -> None:
        self._label, self._total, self._unit = label, total, unit
        self._clock = clock
        self._num_done = 0
        self._started_s = clock()
        self._next_line_s = self._started_s + _LINE_EVERY_S

    def advance(self, num_done: int) -> None:
        self._num_done += num_done
        now = self._clock()
        if self._num_done == self._total or now >= self._next_line_s:
            self._next_line_s = now + _LINE_EVERY_S
            _log.info("%s: %s%s", self._label, self._amounts(), self._outlook(now - self._started_s))

    def _amounts(self) -> str:
        if self._unit == BYTES:
            size, name = (1e9, "GB") if self._total >= 1e9 else (1e6, "MB")
            return f"{self._num_done / size:.2f} of {self._total / size:.2f} {name}"
        return f"{self._num_done} of {self._total} {self._unit}"

    def _outlook(self, elapsed_s: float) -> str:
        if self._num_done == self._total or not self._num_done or elapsed_s <= 0:
            return ""
        rate = self._num_done / elapsed_s
        shown = f"{rate / 1e6:.0f} MB/s" if self._unit == BYTES else f"{rate:.1f} {self._unit}/s"
        return f", {shown}, {(self._total - self._num_done) / rate:.0f} s left"


@contextmanager
def progress(
    label: str,
    *,
    total: int,
    unit: str,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Progress]:
    """Report ``total`` units (at least 1) of work to ``stream`` (default: standard error) or to the log."""
    target = sys.stderr if stream is None else stream
    if target.isatty():
        shown = "B" if unit == BYTES else f" {unit}"
        with tqdm(total=total, desc=label, unit=shown, unit_scale=unit == BYTES, file=target) as bar:
            yield _Bar(bar)
    else:
        yield _Lines(label, total, unit, clock)
