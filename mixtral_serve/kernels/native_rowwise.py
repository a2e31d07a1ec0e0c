"""Norms, the router and the rotary table in the compiled kernels, each row on its own.

``torch.ops.mixtral_serve.rms_norm`` and ``route``: the order of every sum is a function of the row alone
(``csrc/rowwise.h``), so a row has the same bits in any batch, for any number of threads and on any instruction set.
``rotary_table`` computes cosines and sines once per position; looking them up cannot depend on the batch.

Rejected: PyTorch's own operators. Their results were seen to hold still for norms, but nothing promises it, and a
product with the router's weights changes with the number of rows.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from mixtral_serve.kernels.native import library


@functools.cache
def _typed_library() -> ctypes.CDLL:
    loaded = library()
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    loaded.mixtral_rms_norm.argtypes = [pointer] * 3 + [integer] * 2 + [ctypes.c_float, integer]
    loaded.mixtral_route.argtypes = [pointer] * 5 + [integer] * 5
    loaded.mixtral_rotary_table.argtypes = [pointer] * 3 + [integer] * 2
    for function in (loaded.mixtral_rms_norm, loaded.mixtral_route, loaded.mixtral_rotary_table):
        function.restype = None
    loaded.mixtral_max_experts.restype = integer
    return loaded


def max_experts() -> int:
    """Among how many experts the router can choose.

    Raises:
        NativeUnavailableError: there are no compiled kernels.
    """
    return int(_typed_library().mixtral_max_experts())


_LIBRARY = torch.library.Library("mixtral_serve", "FRAGMENT")  # type: ignore[no-untyped-call]  # PyTorch does not say
_LIBRARY.define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor")  # type: ignore[no-untyped-call]  # PyTorch does not say
_LIBRARY.define("route(Tensor hidden, Tensor gate, int k) -> (Tensor, Tensor, Tensor)")  # type: ignore[no-untyped-call]  # PyTorch does not say


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``weight * x / sqrt(mean(x ** 2) + eps)`` over the last dimension of ``x`` [..., width], fp32."""
    _require(x.dtype is torch.float32 and x.dim() > 0 and x.shape[-1] > 0, "rms_norm: x must be fp32 rows")
    _check_dense(weight, "rms_norm: weight")
    _require(weight.shape == x.shape[-1:], "rms_norm: weight and x differ in width")
    x = x.contiguous()
    out = torch.empty_like(x)
    width = x.shape[-1]
    _typed_library().mixtral_rms_norm(
        x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // width, width, eps, torch.get_num_threads()
    )
    return out


def _rms_norm_fake(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:  # noqa: ARG001 - the schema's
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _route(hidden: torch.Tensor, gate: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Softmax over all experts, the ``k`` most probable ones (the lowest ids among equals), weights scaled to sum 1.

    Args:
        hidden: fp32 [rows, hidden].
        gate: fp32 [experts, hidden].
        k: experts per row.

    Returns:
        Logits fp32 [rows, experts]; weights fp32 [rows, k], descending; their experts int64 [rows, k]. A row that is
        not finite has weights of NaN and experts that exist.
    """
    _require(hidden.dtype is torch.float32 and hidden.dim() == 2, "route: hidden must be fp32 [rows, hidden]")
    _check_dense(gate, "route: gate")
    _require(gate.dim() == 2 and gate.shape[1] == hidden.shape[1] > 0, "route: gate and hidden differ in width")
    loaded = _typed_library()
    num_experts: int = gate.shape[0]
    _require(1 <= k <= num_experts <= max_experts(), "route: k or the number of experts is out of range")
    hidden = hidden.contiguous()
    num_rows, width = hidden.shape
    logits = torch.empty(num_rows, num_experts)
    weights = torch.empty(num_rows, k)
    experts = torch.empty(num_rows, k, dtype=torch.int64)
    pointers = (tensor.data_ptr() for tensor in (hidden, gate, logits, weights, experts))
    loaded.mixtral_route(*pointers, num_rows, width, num_experts, k, torch.get_num_threads())
    return logits, weights, experts


def _route_fake(hidden: torch.Tensor, gate: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_rows = hidden.shape[0]
    chosen = hidden.new_empty(num_rows, k)
    return hidden.new_empty(num_rows, gate.shape[0]), chosen, chosen.new_empty(chosen.shape, dtype=torch.int64)


_LIBRARY.impl("rms_norm", _rms_norm, "CPU")  # type: ignore[no-untyped-call]  # PyTorch does not say
_LIBRARY.impl("route", _route, "CPU")  # type: ignore[no-untyped-call]  # PyTorch does not say
torch.library.register_fake("mixtral_serve::rms_norm", _rms_norm_fake, lib=_LIBRARY)
torch.library.register_fake("mixtral_serve::route", _route_fake, lib=_LIBRARY)


def rotary_table(frequencies: torch.Tensor, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of ``position * frequency``.

    Args:
        frequencies: fp32 [head_dim / 2], radians per position.
        num_positions: positions 0 to so many are in the table.

    Returns:
        Two tensors, fp32 [num_positions, head_dim / 2].

    Raises:
        NativeUnavailableError: there are no compiled kernels.
    """
    _check_dense(frequencies, "rotary_table: frequencies")
    _require(num_positions >= 0, "rotary_table: num_positions must not be negative")
    cosine = torch.empty(num_positions, frequencies.numel())
    sine = torch.empty_like(cosine)
    pointers = (tensor.data_ptr() for tensor in (frequencies, cosine, sine))
    _typed_library().mixtral_rotary_table(*pointers, num_positions, frequencies.numel())
    return cosine, sine


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _check_dense(tensor: torch.Tensor, name: str) -> None:
    _require(tensor.dtype is torch.float32 and tensor.is_contiguous(), f"{name} must be dense fp32")
