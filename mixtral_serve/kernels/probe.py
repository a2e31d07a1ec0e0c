"""``python -m mixtral_serve.kernels.probe KIND KERNELS``: what would compute with such weights here.

For callers that must not import a tensor library themselves. The last line says it; those before it say what the
self-test found. Exits with 0; with 1 if nothing would compute; and with 3 if something would, but not with the best
instructions of this CPU.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from typing import get_args

from mixtral_serve.kernels.formats import Kind
from mixtral_serve.kernels.names import EXIT_LESSER_INSTRUCTIONS, KernelChoice
from mixtral_serve.kernels.registry import KernelsUnavailableError, choose
from mixtral_serve.kernels.self_test import settle_isa


def main(argv: Sequence[str] | None = None, *, settle: Callable[[], bool] = settle_isa) -> int:
    """Write what ``settle`` and ``choose`` log, or the reason to refuse, to standard output. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m mixtral_serve.kernels.probe")
    parser.add_argument("kind", choices=get_args(Kind))
    parser.add_argument("kernels", choices=get_args(KernelChoice))
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    is_best = settle()
    try:
        choose(options.kind, options.kernels)
    except KernelsUnavailableError as error:
        sys.stdout.write(f"{error}\n")
        return 1
    return 0 if is_best else EXIT_LESSER_INSTRUCTIONS


if __name__ == "__main__":
    sys.exit(main())
