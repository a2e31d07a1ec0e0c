"""What this machine can do at most: reading memory, and multiplying bytes on registers.

Owns the two measurements that speeds of kernels are related to. Both run on PyTorch's threads, in the instruction set
that the compiled kernels use at that moment.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Final

import torch

from mixtral_serve.kernels.native import library

_ROUNDS: Final = 100_000
"""Long enough that starting the threads does not count: some hundred microseconds at least."""


@functools.cache
def _functions() -> ctypes.CDLL:
    loaded = library()
    loaded.mixtral_read_memory.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32]
    loaded.mixtral_read_memory.restype = ctypes.c_uint64
    loaded.mixtral_multiply_registers.argtypes = [ctypes.c_int64, ctypes.c_int32]
    loaded.mixtral_multiply_registers.restype = ctypes.c_int64
    return loaded


def read_memory(tensor: torch.Tensor) -> int:
    """Read a dense CPU tensor once, with all threads; returns the sum of its 64-bit words, modulo 2**64."""
    assert tensor.is_contiguous()
    assert tensor.device.type == "cpu"
    total: int = _functions().mixtral_read_memory(tensor.data_ptr(), tensor.nbytes, torch.get_num_threads())
    return total


def multiply_registers() -> int:
    """Multiply bytes on registers with all threads; returns the number of multiplications and additions."""
    count: int = _functions().mixtral_multiply_registers(_ROUNDS, torch.get_num_threads())
    return count
