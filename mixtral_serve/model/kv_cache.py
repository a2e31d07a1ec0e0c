"""``PagedKVCache``: the tensors that keys and values live in, block by block, for attention in PyTorch's operators.

Owns: two tensors of shape [layers, blocks, block_size, kv_heads, head_dim], allocated and touched once, and a
workspace that blocks of one layer are gathered into for a product, in the dtype that is computed with. It knows no
request and no length: block tables say what is where, the scheduler says who owns it. Also the choice between it and
``NativeKVCache``: ``allocate_kv_cache``.

Invariants: a slot is read only after it was written or cleared since its block last changed hands. ``clear`` is what
makes that hold for the unwritten tail of a block that is being filled: a failed request may have left NaN there, and
NaN times a masked zero is NaN again.

Rejected: one tensor per layer (clearing a block would be one call per layer); gathering into fresh memory (above a few
megabytes the allocator maps it anew each time, and the page faults cost more than the copy).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import nan
from typing import Final, TypeAlias

import torch

from mixtral_serve.kernels.native import NativeUnavailableError
from mixtral_serve.model.native_kv_cache import NativeKVCache
from mixtral_serve.model.shape import KVDtype, ModelShape

_LEAST_WORKSPACE_BYTES: Final = 4 << 20


class PagedKVCache:
    """Keys and values of all layers.

    Args:
        shape: the model's dimensions.
        num_blocks: blocks in each layer, the null block (id 0) included.
        block_size: positions per block.
        dtype: of keys and values as they are held.
        compute_dtype: of keys and values as they are computed with; default: as held.
    """

    def __init__(
        self,
        shape: ModelShape,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        dims = (shape.num_layers, num_blocks, block_size, shape.num_kv_heads, shape.head_dim)
        self.keys = torch.empty(dims, dtype=dtype).zero_()
        """Zeroed rather than only reserved: the pages are ours from the start, not when load is highest."""
        self.values = torch.empty(dims, dtype=dtype).zero_()
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype
        self.compute_dtype = compute_dtype or dtype
        self._slots = (shape.num_layers, num_blocks * block_size, shape.num_kv_heads * shape.head_dim)
        self._blocks = (shape.num_layers, num_blocks, block_size * shape.num_kv_heads * shape.head_dim)
        self._key_slots, self._value_slots = self.keys.view(self._slots), self.values.view(self._slots)
        self._key_blocks, self._value_blocks = self.keys.view(self._blocks), self.values.view(self._blocks)
        self._heads = (shape.num_kv_heads, shape.head_dim)
        self.max_gather_blocks = gather_blocks(shape, num_blocks, block_size, dtype.itemsize)
        """Most blocks one ``gather`` may name."""
        workspace = (self.max_gather_blocks, self._blocks[2])
        self._key_workspace = torch.empty(workspace, dtype=dtype)
        self._value_workspace = torch.empty(workspace, dtype=dtype)
        converted = workspace if self.compute_dtype is not dtype else (0, self._blocks[2])
        self._converted = [torch.empty(converted, dtype=self.compute_dtype) for _ in range(2)]

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values, without the workspace."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def workspace_bytes(self) -> int:
        """Bytes of the gather workspace."""
        return sum(each.nbytes for each in (self._key_workspace, self._value_workspace, *self._converted))

    def clear(self, blocks: Sequence[int]) -> None:
        """Zero whole blocks in every layer."""
        if blocks:
            index = torch.tensor(blocks)
            self.keys.index_fill_(1, index, 0)
            self.values.index_fill_(1, index, 0)

    def poison(self, blocks: Sequence[int] | None = None) -> None:
        """Make what blocks (default: all) hold NaN, as a fault would."""
        index = torch.tensor(range(self.num_blocks) if blocks is None else blocks)
        self.keys.index_fill_(1, index, nan)
        self.values.index_fill_(1, index, nan)

    def write(self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store keys and values [rows, kv_heads, head_dim] at ``slots`` [rows] (block * block_size + offset)."""
        self._key_slots[layer].index_copy_(0, slots, keys.flatten(1).to(self.dtype))
        self._value_slots[layer].index_copy_(0, slots, values.flatten(1).to(self.dtype))

    def gather(self, layer: int, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of ``blocks`` ([n]) one after another: two views [n * block_size, kv_heads, head_dim]
        of ``compute_dtype``.

        The views are of the workspace: the next ``gather`` overwrites them.
        """
        num = blocks.shape[0]
        keys, values = self._key_workspace[:num], self._value_workspace[:num]
        torch.index_select(self._key_blocks[layer], 0, blocks, out=keys)
        torch.index_select(self._value_blocks[layer], 0, blocks, out=values)
        if self.compute_dtype is not self.dtype:
            keys, values = (to[:num].copy_(held) for to, held in zip(self._converted, (keys, values), strict=True))
        dims = (num * self.block_size, *self._heads)
        return keys.view(dims), values.view(dims)


def gather_blocks(shape: ModelShape, num_blocks: int, block_size: int, bytes_per_element: int) -> int:
    """Blocks that the gather workspace holds: one request of any length, and at least a few megabytes' worth."""
    longest = -(-shape.max_model_len // block_size)
    block_bytes = 2 * block_size * shape.num_kv_heads * shape.head_dim * bytes_per_element
    return max(min(longest, num_blocks), _LEAST_WORKSPACE_BYTES // block_bytes, 1)


KVCache: TypeAlias = PagedKVCache | NativeKVCache
"""Both offer ``num_blocks``, ``block_size``, ``num_bytes``, ``workspace_bytes``, ``clear`` and ``poison``."""


def allocate_kv_cache(
    shape: ModelShape,
    *,
    num_blocks: int,
    block_size: int,
    dtype: KVDtype,
    compute_dtype: torch.dtype,
    is_native: bool,
) -> KVCache:
    """The cache for attention in the compiled kernels (``is_native``) or in PyTorch's operators.

    Args:
        shape: the model's dimensions.
        num_blocks: blocks in each layer, the null block included.
        block_size: positions per block.
        dtype: how keys and values are held.
        compute_dtype: of the activations. PyTorch's operators compute in it, the compiled kernels always in fp32.
        is_native: whether the compiled kernels attend.

    Raises:
        NativeUnavailableError: the compiled kernels are not there and are asked for, by name or by int8.
    """
    if is_native:
        return NativeKVCache(shape, num_blocks=num_blocks, block_size=block_size, dtype=dtype)
    if dtype == "int8":
        raise NativeUnavailableError("keys and values in int8 need the compiled kernels: choose bf16, or install them")
    held = torch.float32 if dtype == "fp32" else torch.bfloat16
    return PagedKVCache(shape, num_blocks=num_blocks, block_size=block_size, dtype=held, compute_dtype=compute_dtype)
