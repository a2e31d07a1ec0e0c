"""Memory in large pages, for what is read from end to end in every step: packed weights, keys and values.

Every 4 KB page that a kernel touches is looked up in a table; weights of tens of gigabytes have millions of them, and
on a virtual machine each look-up that the processor does not remember walks two tables. Pages of 2 MB need one
look-up in 512. The system is asked, not forced: where it has no large pages, everything works as before.

Invariants: what is returned holds zeros and is not touched yet; it goes back to the system when the tensor ends.
"""

from __future__ import annotations

import mmap
from contextlib import suppress
from math import prod
from typing import Final

import torch

_LEAST_BYTES: Final = 4 << 20
"""Smaller tensors would leave most of their large pages empty."""


def untouched(*dims: int, dtype: torch.dtype) -> torch.Tensor:
    """A dense tensor of zeros, in large pages if it is large.

    Raises:
        MemoryError: the system has, or allows, no more.
    """
    num_bytes = prod(dims) * dtype.itemsize
    if num_bytes < _LEAST_BYTES:
        return torch.zeros(dims, dtype=dtype)
    try:
        pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"cannot allocate {num_bytes} bytes: {error.strerror}") from None
    with suppress(AttributeError, OSError):  # a Python or a system without large pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(dims)
