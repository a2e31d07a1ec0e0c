"""Where each tensor of a packed checkpoint lies: a function of the model's shape and of the packing, to the byte.

Owns: the names of the files, the tensors in each, their order, and thereby each file's header and size. A writer may
put tensors into place in any order, and a reader has nothing to parse: the first bytes of a file are the expected
header or the file is refused, so no absurd header is ever believed.

There is one file per layer and one for embedding, final norm and head, so that many can be written and read at once.
Each is an ordinary safetensors file. A packed matrix ``NAME`` is two tensors, ``NAME.quants`` and ``NAME.scales`` (see
``kernels.formats``); the experts of a layer share them along the first dimension. All other tensors keep their names
on the Hub; the embedding is bf16, norms and routers are fp32. Imports no tensor library.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from mixtral_serve.model.shape import (
    EMBEDDING,
    GROUP_SIZE,
    HEAD,
    ROW_TILE,
    ModelShape,
    Packing,
    int4_scale_bytes,
)

FORMAT_VERSION: Final = 2
ENDS_FILE: Final = "embedding-and-head.safetensors"
"""The file of what is in no layer."""

Dtype: TypeAlias = Literal["U8", "F32", "BF16"]
"""Names of safetensors."""

_ELEMENT_BYTES: Final[dict[Dtype, int]] = {"U8": 1, "F32": 4, "BF16": 2}
_ALIGNMENT: Final = 64
"""Of the first tensor in its file."""
_FINAL_NORM: Final = "model.norm.weight"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of one file."""

    name: str
    dtype: Dtype
    dims: tuple[int, ...]
    begin: int
    """Offset in the file, in bytes."""

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.dims) * _ELEMENT_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class MatrixSpec:
    """A matrix that is packed, or one per expert."""

    name: str
    num_rows: int
    num_cols: int
    source: str
    """The tensor on the Hub, with a place for the number of the expert."""
    num_experts: int | None = None
    """None: a single matrix, without a leading dimension."""

    def source_name(self, expert: int) -> str:
        """The tensor on the Hub that becomes the matrix of this expert."""
        return self.source.format(expert=expert)

    def stored(self, packing: Packing) -> tuple[tuple[str, Dtype, tuple[int, ...]], ...]:
        """Name, dtype and dimensions of the tensors that hold it, as ``kernels.formats`` lays them out."""
        tiles, groups = -(-self.num_rows // ROW_TILE), -(-self.num_cols // GROUP_SIZE)
        leading = () if self.num_experts is None else (self.num_experts,)
        if packing == "int8":
            return (
                (f"{self.name}.quants", "U8", (*leading, tiles, groups * GROUP_SIZE // 4, 4 * ROW_TILE)),
                (f"{self.name}.scales", "F32", (*leading, tiles, ROW_TILE)),
            )
        return (
            (f"{self.name}.quants", "U8", (*leading, tiles, groups, ROW_TILE * GROUP_SIZE // 2)),
            (f"{self.name}.scales", "U8", (*leading, tiles, int4_scale_bytes(self.num_cols))),
        )


@dataclass(frozen=True, slots=True)
class PlainSpec:
    """A tensor that stays in floating point, under its name on the Hub."""

    name: str
    dtype: Dtype
    dims: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PackedFile:
    """One file: what it is made from, and what lies in it."""

    name: str
    matrices: tuple[MatrixSpec, ...]
    plain: tuple[PlainSpec, ...]
    tensors: tuple[StoredTensor, ...]
    """In the order of the file; one begins where the one before it ends."""
    header: bytes
    """The file's first bytes, up to the first tensor."""

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return self.tensors[-1].begin + self.tensors[-1].num_bytes

    def tensor(self, name: str) -> StoredTensor:
        """The tensor of this name."""
        return next(tensor for tensor in self.tensors if tensor.name == name)


def packed_files(shape: ModelShape, packing: Packing) -> Iterator[PackedFile]:
    """All files with weights of a packed checkpoint: layers in order, then ``ENDS_FILE``."""
    for layer in range(shape.num_layers):
        yield _file(layer_file(layer), packing, *_layer(shape, layer))
    yield _file(ENDS_FILE, packing, *_ends(shape))


def layer_file(layer: int) -> str:
    """Name of the file of a layer, counted from 0."""
    return f"layer-{layer:05d}.safetensors"


def _layer(shape: ModelShape, layer: int) -> tuple[tuple[MatrixSpec, ...], tuple[PlainSpec, ...]]:
    hidden, inner, experts = shape.hidden_size, shape.intermediate_size, shape.num_experts
    query, kv = shape.num_query_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    prefix = f"model.layers.{layer}"
    moe, attention = f"{prefix}.block_sparse_moe", f"{prefix}.self_attn"
    dims = {"w1": (inner, hidden), "w3": (inner, hidden), "w2": (hidden, inner)}
    matrices = [
        MatrixSpec(f"{moe}.experts.{name}", *dims[name], f"{moe}.experts.{{expert}}.{name}.weight", experts)
        for name in dims
    ]
    dims = {"q_proj": (query, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, query)}
    matrices += [MatrixSpec(f"{attention}.{name}", *dims[name], f"{attention}.{name}.weight") for name in dims]
    plain = (
        PlainSpec(f"{moe}.gate.weight", "F32", (experts, hidden)),
        PlainSpec(f"{prefix}.input_layernorm.weight", "F32", (hidden,)),
        PlainSpec(f"{prefix}.post_attention_layernorm.weight", "F32", (hidden,)),
    )
    return tuple(matrices), plain


def _ends(shape: ModelShape) -> tuple[tuple[MatrixSpec, ...], tuple[PlainSpec, ...]]:
    """A tied head is packed as well, from the embedding. The embedding is last: it may have an odd number of bf16."""
    vocabulary, hidden = shape.vocab_size, shape.hidden_size
    head = MatrixSpec(HEAD.removesuffix(".weight"), vocabulary, hidden, EMBEDDING if shape.tied else HEAD)
    plain = (PlainSpec(_FINAL_NORM, "F32", (hidden,)), PlainSpec(EMBEDDING, "BF16", (vocabulary, hidden)))
    return (head,), plain


def _file(name: str, packing: Packing, matrices: tuple[MatrixSpec, ...], plain: tuple[PlainSpec, ...]) -> PackedFile:
    """Put the tensors one after another behind their header."""
    contents = [entry for matrix in matrices for entry in matrix.stored(packing)]
    contents += [(spec.name, spec.dtype, spec.dims) for spec in plain]
    unplaced = [StoredTensor(*entry, begin=0) for entry in contents]
    begins = [0]
    for tensor in unplaced:
        begins.append(begins[-1] + tensor.num_bytes)
    description: dict[str, object] = {
        "__metadata__": {"format": "mixtral-serve", "version": str(FORMAT_VERSION), "packing": packing}
    }
    for number, tensor in enumerate(unplaced):
        offsets = begins[number : number + 2]
        description[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.dims), "data_offsets": offsets}
    text = json.dumps(description, separators=(",", ":")).encode("ascii")
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    tensors = tuple(
        StoredTensor(tensor.name, tensor.dtype, tensor.dims, len(header) + begin)
        for tensor, begin in zip(unplaced, begins, strict=False)
    )
    return PackedFile(name, matrices, plain, tensors, header)
