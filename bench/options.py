"""Types of command-line options: numbers within bounds, refused with a sentence that names them."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def number(least: float, most: float) -> Callable[[str], float]:
    """A number from ``least`` to ``most``."""

    def a_number(text: str) -> float:
        value = float(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not between {least:g} and {most:g}")
        return value

    return a_number


def integer(least: int, most: int) -> Callable[[str], int]:
    """An integer from ``least`` to ``most``."""

    def an_integer(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not between {least} and {most}")
        return value

    return an_integer


def count(text: str) -> int:
    """An integer from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value
