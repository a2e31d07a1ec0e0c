"""``NativeKVCache``: keys and values as the compiled attention reads them, in fp32, bf16 or int8.

Owns: keys [layers, blocks, kv_heads, head_dim, block_size] (sixteen keys of one dimension lie side by side: a score is
a product of vectors), values [layers, blocks, kv_heads, block_size, head_dim], for int8 one fp32 scale per token and
head of each, and the memory that attention works in. Like ``PagedKVCache`` it knows no request and no length.

Invariants: a slot is read as a value only by rows that may see it, so blocks need no clearing when they change hands;
the workspace never grows.

Rejected: one dtype argument of PyTorch's (int8 alone does not say that there are scales).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import nan
from typing import Final

import torch

from mixtral_serve.kernels.native_attention import (
    SPLIT_KEYS,
    AttentionCall,
    attention_call,
    layer_storage,
    partial_floats,
    workspace_floats,
)
from mixtral_serve.kernels.pages import untouched
from mixtral_serve.model.shape import KVDtype, ModelShape

_DTYPES: Final[dict[KVDtype, torch.dtype]] = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
_MAX_PARTIAL_BYTES: Final = 8 << 20
"""What splits of long contexts leave behind before they are combined: contexts of 230,000 tokens for Mixtral-8x7B."""


class NativeKVCache:
    """Keys and values of all layers.

    Args:
        shape: the model's dimensions.
        num_blocks: blocks in each layer, the null block (id 0) included.
        block_size: positions per block; multiples of 16 are read fastest.
        dtype: how keys and values are held.

    Raises:
        NativeUnavailableError: there are no compiled kernels.
    """

    def __init__(self, shape: ModelShape, *, num_blocks: int, block_size: int, dtype: KVDtype) -> None:
        heads = (shape.num_layers, num_blocks, shape.num_kv_heads)
        self.keys = _zeros(*heads, shape.head_dim, block_size, dtype=_DTYPES[dtype])
        self.values = _zeros(*heads, block_size, shape.head_dim, dtype=_DTYPES[dtype])
        num_scales = 2 if dtype == "int8" else 0
        self.scales = tuple(_zeros(*heads, block_size, dtype=torch.float32) for _ in range(num_scales))
        """Of keys and of values; empty unless they are int8."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._scaling = shape.head_dim**-0.5
        self.num_query_heads_per_kv_head = shape.num_query_heads // shape.num_kv_heads
        self._storage = [
            [tensor[layer] for tensor in (self.keys, self.values, *self.scales)] for layer in range(shape.num_layers)
        ]
        self.layer_addresses: Final = layer_storage(self._storage)
        """Where each layer's keys and values are, for the compiled kernels."""
        slot_floats = partial_floats(shape.head_dim, shape.num_query_heads)
        self.max_partials = min(_MAX_PARTIAL_BYTES // (4 * slot_floats), -(-num_blocks * block_size // SPLIT_KEYS))
        """Most splits that one step may leave to be combined."""
        self._workspace = [
            torch.zeros(torch.get_num_threads() * workspace_floats(shape.head_dim)),
            torch.zeros(self.max_partials * slot_floats),
        ]

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values with their scales, without the workspace."""
        return sum(tensor.nbytes for tensor in (self.keys, self.values, *self.scales))

    @property
    def workspace_bytes(self) -> int:
        """Bytes that attention works in."""
        return sum(tensor.nbytes for tensor in self._workspace)

    def clear(self, blocks: Sequence[int]) -> None:
        """Zero whole blocks in every layer."""
        self._fill(blocks, 0)

    def poison(self, blocks: Sequence[int] | None = None) -> None:
        """Make what blocks (default: all) hold NaN, as a fault would."""
        chosen = range(self.num_blocks) if blocks is None else blocks
        self._fill(chosen, nan)

    def attend(
        self, layer: int, rows: Sequence[torch.Tensor], step: Sequence[torch.Tensor], *, window: int, scaling: float
    ) -> torch.Tensor:
        """Store the rows' keys and values, then attend; see ``torch.ops.mixtral_serve.paged_attention``.

        Rows of another dtype than fp32 are converted, and so is what comes back.
        """
        out: torch.Tensor = torch.ops.mixtral_serve.paged_attention.default(
            [row.float() for row in rows], self._storage[layer], step, self._workspace, window, scaling
        )
        return out.to(rows[0].dtype)

    def call(self, step: Sequence[torch.Tensor], *, window: int) -> AttentionCall:
        """A step's attention for the compiled kernels, checked, but for the rows; that of the first layer."""
        return attention_call(
            self._storage[0],
            step,
            self._workspace,
            num_rows=step[0].shape[0],
            num_query_heads=self.num_query_heads_per_kv_head * self.keys.shape[2],
            window=window,
            scaling=self._scaling,
        )

    def _fill(self, blocks: Sequence[int], value: float) -> None:
        index = torch.tensor(blocks, dtype=torch.int64)
        for tensor in self.scales or (self.keys, self.values):  # a scale of 0 or NaN decides for its whole vector
            tensor.index_fill_(1, index, value)


def _zeros(*dims: int, dtype: torch.dtype) -> torch.Tensor:
    """Written rather than only reserved: the pages are ours from the start, not when load is highest."""
    return untouched(*dims, dtype=dtype).zero_()
