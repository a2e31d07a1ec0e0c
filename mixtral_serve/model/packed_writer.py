"""Writing one file of a packed checkpoint: many workers, each with a slab of rows, in any order.

Owns: ``PackedWriter``, a file under its temporary name until it is complete and on the disk, and ``work_for``, the
pieces of work that fill it. Rows are quantised independently of each other and lie one after another in the packed
tensor, so a piece is a slab of rows: whoever does it maps the shard, reads the slab, quantises it, writes it to its
place and unmaps. The memory needed is that of one slab per worker, whatever the size of the model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open

from mixtral_serve.kernels.formats import NotFiniteError
from mixtral_serve.kernels.quantizer import quantize_matrix
from mixtral_serve.model.errors import CheckpointError
from mixtral_serve.model.manifest import FileRecord, file_sha256
from mixtral_serve.model.packed_layout import MatrixSpec, PackedFile, PlainSpec
from mixtral_serve.model.quantize_journal import PART_SUFFIX, put_in_place
from mixtral_serve.model.shape import ROW_TILE, Packing

SLAB_ELEMENTS: Final = 4 << 20
"""Weights of a slab: 8 MB of bf16."""

_DTYPES: Final = {"F32": torch.float32, "BF16": torch.bfloat16}


class PackedWriter:
    """A file that is being made. ``put`` may be called by many threads at once; then ``finish``, or ``close``."""

    def __init__(self, path: Path, file: PackedFile) -> None:
        self._path, self._file = path, file
        self._part = path.with_name(path.name + PART_SUFFIX)
        self._handle = os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            # All of it now: a disk that is too small says so before the work is done.
            os.posix_fallocate(self._handle, 0, file.num_bytes)
            self._write(memoryview(file.header), 0)
        except BaseException:
            self.close()
            raise

    @property
    def file(self) -> PackedFile:
        """What is being made."""
        return self._file

    def put(self, name: str, values: torch.Tensor, *, tiles_before: int = 0) -> int:
        """Write a tensor, or the part of it that has so many tiles before it; returns its bytes."""
        data = values.contiguous().view(-1).view(torch.uint8).numpy().data
        tile_bytes = data.nbytes // values.shape[0]
        self._write(data, self._file.tensor(name).begin + tiles_before * tile_bytes)
        return data.nbytes

    def finish(self) -> FileRecord:
        """Bring it to the disk and give it its name."""
        try:
            os.fsync(self._handle)
        finally:
            self.close()
        record = FileRecord(self._file.num_bytes, file_sha256(self._part))
        put_in_place(self._part, self._path)
        return record

    def close(self) -> None:
        """No more is written."""
        os.close(self._handle)

    def _write(self, data: memoryview, offset: int) -> None:
        while data.nbytes:
            written = os.pwrite(self._handle, data, offset)
            data, offset = data[written:], offset + written


def work_for(writer: PackedWriter, weights: Packing, shard_of: Mapping[str, Path]) -> Iterator[Callable[[], int]]:
    """Pieces of work that together write every tensor of the file; each returns the bytes it wrote.

    They raise ``CheckpointError`` where the source cannot be read or holds values that are not finite, and ``OSError``
    where the file cannot be written.
    """
    for matrix in writer.file.matrices:
        num_rows = max(SLAB_ELEMENTS // matrix.num_cols // ROW_TILE, 1) * ROW_TILE
        for expert in range(matrix.num_experts or 1):
            shard = shard_of[matrix.source_name(expert)]
            for first in range(0, matrix.num_rows, num_rows):
                rows = slice(first, min(first + num_rows, matrix.num_rows))
                yield partial(_put_slab, writer, weights, shard, matrix=matrix, expert=expert, rows=rows)
    for spec in writer.file.plain:
        yield partial(_put_plain, writer, shard_of[spec.name], spec)


def _put_slab(
    writer: PackedWriter, weights: Packing, shard: Path, *, matrix: MatrixSpec, expert: int, rows: slice
) -> int:
    name = matrix.source_name(expert)
    try:
        packed = quantize_matrix(_source(shard, name)[rows], weights)
    except NotFiniteError as error:
        raise CheckpointError(shard.name, str(error), subject=name) from None
    tiles_before = expert * -(-matrix.num_rows // ROW_TILE) + rows.start // ROW_TILE
    num_bytes = writer.put(f"{matrix.name}.quants", packed.quants, tiles_before=tiles_before)
    return num_bytes + writer.put(f"{matrix.name}.scales", packed.scales, tiles_before=tiles_before)


def _put_plain(writer: PackedWriter, shard: Path, spec: PlainSpec) -> int:
    return writer.put(spec.name, _source(shard, spec.name).to(_DTYPES[spec.dtype]))


def _source(shard: Path, name: str) -> torch.Tensor:
    """A tensor in its mapped file, which stays mapped as long as the tensor lives."""
    try:
        with safe_open(shard, framework="pt") as tensors:
            weight: torch.Tensor = tensors.get_tensor(name)
            return weight
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(shard.name, f"cannot be read ({error})", subject=name) from None
