"""``python -m mixtral_serve.kernels.probe KIND KERNELS``: what would compute with such weights here, in one line.

For callers that must not import a tensor library themselves. Exits with 0, or with 1 if nothing would.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import get_args

from mixtral_serve.kernels.formats import Kind
from mixtral_serve.kernels.names import KernelChoice
from mixtral_serve.kernels.registry import KernelsUnavailableError, choose


def main(argv: Sequence[str] | None = None) -> int:
    """Write the line that ``choose`` logs, or its reason to refuse, to standard output. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m mixtral_serve.kernels.probe")
    parser.add_argument("kind", choices=get_args(Kind))
    parser.add_argument("kernels", choices=get_args(KernelChoice))
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        choose(options.kind, options.kernels)
    except KernelsUnavailableError as error:
        sys.stdout.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
