"""Memory for what is large: what it holds, and that it goes back."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from mixtral_serve.kernels.pages import untouched


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dims", [(0, 3), (3, 5), (2, 3 << 20), (1 << 20, 4, 2)])
def test_small_and_large_tensors_hold_zeros_and_take_values(dims: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = untouched(*dims, dtype=dtype)
    assert tensor.shape == dims
    assert tensor.dtype == dtype
    assert tensor.is_contiguous()
    assert not bool(tensor.any())
    assert bool((tensor.fill_(3) == 3).all())


def test_the_memory_goes_back_with_the_last_view() -> None:
    before = anonymous_bytes()
    tensor = untouched(64 << 20, dtype=torch.uint8).fill_(1)
    view = tensor[1:]
    del tensor
    gc.collect()
    assert anonymous_bytes() - before > 60 << 20
    del view
    gc.collect()
    assert anonymous_bytes() - before < 4 << 20


def test_more_than_there_can_be_is_a_memory_error() -> None:
    with pytest.raises(MemoryError, match="cannot allocate"):
        untouched(1 << 60, dtype=torch.uint8)


def anonymous_bytes() -> int:
    """Resident anonymous memory of this process."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text("ascii").splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024
