"""Types of command-line options: numbers within bounds, refused with a sentence that names them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeVar

_Number = TypeVar("_Number", int, float)


def number(least: float, most: float) -> Callable[[str], float]:
    """A number from ``least`` to ``most``."""
    return _within(float, least, most)


def integer(least: int, most: int) -> Callable[[str], int]:
    """An integer from ``least`` to ``most``."""
    return _within(int, least, most)


def count(text: str) -> int:
    """An integer from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def _within(convert: Callable[[str], _Number], least: _Number, most: _Number) -> Callable[[str], _Number]:
    def parse(text: str) -> _Number:
        value = convert(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not between {least} and {most}")
        return value

    parse.__name__ = getattr(convert, "__name__", "number")  # argparse says it of what is no number at all
    return parse
