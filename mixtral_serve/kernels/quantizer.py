"""``quantize_matrix``: one matrix of a checkpoint -> its packed form, as fast as this installation can.

Owns: the call of the compiled quantiser. ``formats.quantize`` is the definition, and the bits are the same either way;
the compiled one reads bf16 and fp32 where it lies, on all of PyTorch's threads.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, Final

import torch

from mixtral_serve.kernels.formats import GROUP_COLS, Kind, NotFiniteError, PackedMatrix, quantize
from mixtral_serve.kernels.native import is_available, library

_READ_AS_IT_LIES: Final = (torch.bfloat16, torch.float32)


def quantize_matrix(weight: torch.Tensor, kind: Kind) -> PackedMatrix:
    """Quantise ``weight`` [num_rows, num_cols] of any floating dtype; see ``formats.quantize``.

    Raises:
        NotFiniteError: a value is not finite.
    """
    packed = PackedMatrix.empty(kind, *weight.shape)
    quantize_into(weight, packed)
    return packed


def quantize_into(weight: torch.Tensor, packed: PackedMatrix) -> None:
    """The same, into storage that is there already (one of several experts, say).

    Raises:
        NotFiniteError: a value is not finite; ``packed`` then holds nothing of use.
    """
    assert weight.shape == (packed.num_rows, packed.num_cols), "the storage is for another shape"
    if not is_available():
        packed.copy_(quantize(weight, packed.kind))
        return
    source = weight if weight.dtype in _READ_AS_IT_LIES else weight.float()
    if source.stride(1) != 1:
        source = source.contiguous()
    assert source.is_cpu
    assert packed.quants.is_contiguous()
    assert packed.scales.is_contiguous()
    num_threads = torch.get_num_threads()
    rows = torch.empty(num_threads, -(-packed.num_cols // GROUP_COLS) * GROUP_COLS)
    is_finite = _native_quantize()(
        source.data_ptr(),
        source.dtype == torch.bfloat16,
        packed.num_rows,
        packed.num_cols,
        source.stride(0),
        packed.kind == "int4",
        packed.quants.data_ptr(),
        packed.scales.data_ptr(),
        rows.data_ptr(),
        num_threads,
    )
    if not is_finite:
        raise NotFiniteError("holds values that are not finite")


@functools.cache
def _native_quantize() -> Any:
    function = library().mixtral_quantize
    pointer, flag, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    function.argtypes = [pointer, flag, size, size, size, flag, pointer, pointer, pointer, flag]
    function.restype = ctypes.c_int
    return function
