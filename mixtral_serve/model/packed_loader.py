"""A packed checkpoint -> the memory of a model that holds packed weights, and nothing in between.

Owns: ``load_packed``. The bytes of the files are the bytes of the tensors, so loading is reading: nothing is
repacked, nothing is copied twice, and at no time is more in memory than the model.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Final

import torch

from mixtral_serve.kernels.formats import PackedMatrix
from mixtral_serve.model.checkpoint import Checkpoint
from mixtral_serve.model.packed import read_weights
from mixtral_serve.model.packed_layout import Dtype, StoredTensor, packed_files
from mixtral_serve.model.progress import BYTES, progress

_log = logging.getLogger(__name__)

_DTYPES: Final[dict[Dtype, torch.dtype]] = {"U8": torch.uint8, "F32": torch.float32, "BF16": torch.bfloat16}


def load_packed(
    checkpoint: Checkpoint, places: Iterable[tuple[str, PackedMatrix | torch.Tensor]], *, num_threads: int
) -> None:
    """Fill every place from ``checkpoint``, which must be packed, and verify every byte.

    Args:
        checkpoint: as ``open_checkpoint`` returned it.
        places: name and storage of everything the model holds, as ``quantized.packed_places`` yields them.
        num_threads: files that are read at once.

    Raises:
        CheckpointError: a file changed or broke since it was checked; the places hold nothing of use.
    """
    manifest = checkpoint.manifest
    assert manifest is not None, "the checkpoint is not packed"
    storage = dict(_tensors(places))
    files = tuple(packed_files(checkpoint.shape, manifest.weights))
    stored = {tensor.name: tensor for file in files for tensor in file.tensors}
    assert stored.keys() == storage.keys(), f"no pair: {sorted(stored.keys() ^ storage.keys())}"
    for name, tensor in stored.items():
        assert storage[name].dtype == _DTYPES[tensor.dtype], f"{name} is held as {storage[name].dtype}"
        assert storage[name].shape == tensor.dims, f"{name} is held as {tuple(storage[name].shape)}"

    def destination(tensor: StoredTensor) -> memoryview:
        return storage[tensor.name].view(-1).view(torch.uint8).numpy().data

    num_bytes = sum(file.num_bytes for file in files)
    started_s = time.monotonic()
    with progress(f"loading {checkpoint.path.name}", total=num_bytes, unit=BYTES) as report:
        read_weights(checkpoint.path, files, manifest, destination, num_threads=num_threads, on_bytes=report.advance)
    took_s = time.monotonic() - started_s
    _log.info(
        "loaded and verified %s as %s: %.2f GB in %.1f s, %.2f GB/s",
        checkpoint.path.name,
        manifest.weights,
        num_bytes / 1e9,
        took_s,
        num_bytes / 1e9 / max(took_s, 1e-9),
    )


def _tensors(places: Iterable[tuple[str, PackedMatrix | torch.Tensor]]) -> Iterable[tuple[str, torch.Tensor]]:
    for name, place in places:
        if isinstance(place, PackedMatrix):
            yield f"{name}.quants", place.quants
            yield f"{name}.scales", place.scales
        else:
            yield name, place
