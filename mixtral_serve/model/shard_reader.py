"""Reading the tensors of a checked checkpoint, one after another, while the one before is being worked on.

Owns: ``shard_tensors``. ``open_checkpoint`` has had every file's header checked by safetensors; here the tensors' bytes
are read into two buffers in turn, by a thread of its own.

Invariants: at most two tensors are in memory; nothing is mapped, so a file that is truncated meanwhile is an error and
not the end of the process. A tensor is valid until the next one is asked for.

Rejected: mapping the shard, as safetensors does (its pages stay with the process until the whole shard is done, a
private mapping counts against a process's limit on data, and a truncated file kills it with SIGBUS).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from itertools import cycle
from typing import Any, Final

import torch

from mixtral_serve.model.checkpoint import Shard
from mixtral_serve.model.errors import CheckpointError

_DTYPES: Final = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_LENGTH_BYTES: Final = 8
_MOST_HEADER_BYTES: Final = 100_000_000
"""What safetensors itself allows."""


def shard_tensors(shard: Shard) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and values of each of ``shard.tensors``, in that order.

    Raises:
        CheckpointError: the file is not the one that was checked any more.
    """
    try:
        with shard.path.open("rb", buffering=0) as opened, ThreadPoolExecutor(1, "read") as reader:
            header, begin = _read_header(opened)
            buffers = cycle((_Buffer(), _Buffer()))
            reads = (reader.submit(_read, opened, header[name], begin, next(buffers)) for name in shard.tensors)
            reading = next(reads, None)
            for name in shard.tensors:
                assert reading is not None, "there is a read for every name"
                tensor = reading.result()
                reading = next(reads, None)  # into the other buffer, while the caller works on this one
                yield name, tensor
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(shard.path.name, f"cannot be read ({error})") from None


class _Buffer:
    """Memory that is used again for the next tensor, as long as that is not larger."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def of(self, num_bytes: int) -> torch.Tensor:
        if self._memory.numel() < num_bytes:
            self._memory = torch.empty(0, dtype=torch.uint8)  # the old one goes before the new one comes
            self._memory = torch.empty(num_bytes, dtype=torch.uint8)
        return self._memory[:num_bytes]


def _read_header(opened: FileIO) -> tuple[dict[str, Any], int]:
    """The entries by name, and where the first tensor begins in the file."""
    num_bytes = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
    if num_bytes > _MOST_HEADER_BYTES:
        raise ValueError("its header is too long")
    return json.loads(opened.read(num_bytes)), _LENGTH_BYTES + num_bytes


def _read(opened: FileIO, entry: dict[str, Any], begin: int, buffer: _Buffer) -> torch.Tensor:
    """One tensor, in ``buffer``."""
    dtype, dims = _DTYPES[entry["dtype"]], tuple(entry["shape"])
    first, end = entry["data_offsets"]
    if end - first != math.prod(dims) * dtype.itemsize:
        raise ValueError("its header contradicts itself")
    raw = buffer.of(end - first)
    view, num_read = raw.numpy().data, 0
    opened.seek(begin + first)
    while num_read < len(view):
        piece = opened.readinto(view[num_read:])
        if not piece:
            raise ValueError("it ends early")
        num_read += piece
    return raw.view(dtype).view(dims)
