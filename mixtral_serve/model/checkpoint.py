"""A checkpoint directory, checked from end to end before a single weight is read.

Owns: ``open_checkpoint``, which decides whether a directory may be loaded, and ``Checkpoint``, its answer. It
reads the JSON files and the headers of the safetensors shards; when it returns, every tensor the model needs is
known to be there, once, in the right shape and in a complete file. A directory with a manifest is a packed checkpoint
and is checked against that (``manifest``, ``packed``).

Invariants: no file that can carry code is opened (their presence alone refuses the directory); shard names are plain
names inside the directory; foreign weights are read through safetensors only, our own by their fixed layout.

Rejected: ``from_pretrained``. It succeeds with random weights when a tensor is missing, and follows ``auto_map``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from safetensors import SafetensorError, safe_open

from mixtral_serve.model.config_file import read_json, read_shape
from mixtral_serve.model.errors import CheckpointError
from mixtral_serve.model.manifest import Manifest, verified_manifest
from mixtral_serve.model.packed import check_weights
from mixtral_serve.model.shape import EMBEDDING, HEAD, ModelShape

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer_config.json")

_CODE_SUFFIXES: Final = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".py", ".pyc", ".so"})
_DTYPES: Final = frozenset({"F32", "BF16", "F16"})
_LEGACY: Final = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
"""Buffers that older exports stored and that are computed from the config today; they may be there and are not read."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file and the tensors in it that the model takes, in the file's own order."""

    path: Path
    tensors: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A directory that passed every check that needs no weights in memory."""

    path: Path
    shape: ModelShape
    shards: tuple[Shard, ...]
    manifest: Manifest | None = None
    """Of a packed checkpoint."""

    @property
    def num_tensors(self) -> int:
        """Tensors that loading will read."""
        return sum(len(shard.tensors) for shard in self.shards)


def open_checkpoint(path: Path) -> Checkpoint:
    """Check the directory ``path`` and list what is to be loaded.

    Raises:
        CheckpointError: something is missing, unexpected, misshapen, truncated or refused; one line that names it.
    """
    if not path.is_dir():
        raise CheckpointError(".", f"{path} is not a directory")
    _refuse_code(path)
    manifest = verified_manifest(path)
    shape = read_shape(path)
    _check_tokenizer(path, shape.vocab_size)
    if manifest is not None:
        files = check_weights(path, shape, manifest)
        shards = tuple(Shard(path / file.name, tuple(tensor.name for tensor in file.tensors)) for file in files)
        return Checkpoint(path, shape, shards, manifest)
    return Checkpoint(path, shape, _check_shards(path, shape))


def _check_shards(path: Path, shape: ModelShape) -> tuple[Shard, ...]:
    """Every tensor of the shape, once, in the shards of a checkpoint in the Hub's layout."""
    expected = shape.hub_tensors()
    shards = []
    where: dict[str, str] = {}
    for file, listed in _shard_files(path):
        taken = []
        for name, dtype, dims in _header(path, file):
            if name in where:
                raise CheckpointError(file, f"is also in {where[name]}", subject=name)
            where[name] = file
            if listed is not None and name not in listed:
                raise CheckpointError(file, f"is not what {INDEX} says is in this file", subject=name)
            if _check_tensor(file, name, dtype, dims, shape, expected):
                taken.append(name)
        for name in listed or ():
            if name not in where:
                raise CheckpointError(file, f"is missing, although {INDEX} lists it", subject=name)
        shards.append(Shard(path / file, tuple(taken)))
    for name in expected:
        if name not in where:
            raise CheckpointError(SINGLE if len(shards) == 1 else INDEX, "is missing", subject=name)
    return tuple(shards)


def _refuse_code(path: Path) -> None:
    for directory, _, files in os.walk(path):
        for file in sorted(files):
            if Path(file).suffix.lower() in _CODE_SUFFIXES:
                name = str((Path(directory) / file).relative_to(path))
                raise CheckpointError(name, "may carry code; a checkpoint holds safetensors and JSON only")


def _check_tokenizer(path: Path, vocab_size: int) -> None:
    """Both files there, and no token id beyond the head."""
    for file in TOKENIZER_FILES:
        if not (path / file).is_file():
            raise CheckpointError(file, "is missing")
    file = TOKENIZER_FILES[0]
    tokenizer = read_json(path, file)
    read_json(path, TOKENIZER_FILES[1])
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    added = tokenizer.get("added_tokens") or []
    if not isinstance(vocabulary, dict) or not vocabulary or not isinstance(added, list):
        raise CheckpointError(file, "has no vocabulary that maps tokens to ids")
    ids = [*vocabulary.values(), *(token.get("id") if isinstance(token, dict) else None for token in added)]
    if not all(isinstance(token_id, int) and token_id >= 0 for token_id in ids):
        raise CheckpointError(file, "has a token whose id is not a whole number")
    largest = max(ids)
    if largest >= vocab_size:
        raise CheckpointError(file, f"has token id {largest}, the model's head ends at {vocab_size - 1}")


def _shard_files(path: Path) -> Iterator[tuple[str, frozenset[str] | None]]:
    """File name and the tensors that the index says are in it (None for a single file)."""
    if not (path / INDEX).exists():
        if not (path / SINGLE).exists():
            raise CheckpointError(SINGLE, f"is missing, and so is {INDEX}")
        yield SINGLE, None
        return
    weight_map = read_json(path, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(INDEX, "has no weight_map")
    listed: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(INDEX, "is not said to be in a safetensors file of this directory", subject=name)
        listed.setdefault(file, set()).add(name)
    for file in sorted(listed):
        if not (path / file).is_file():
            raise CheckpointError(file, f"is missing, although {INDEX} lists it")
    for file in sorted(listed):
        yield file, frozenset(listed[file])


def _header(path: Path, file: str) -> list[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of each tensor; opening checks that header and data cover the file exactly."""
    try:
        with safe_open(path / file, framework="np") as tensors:
            header = []
            for name in tensors.offset_keys():
                entry = tensors.get_slice(name)
                header.append((name, entry.get_dtype(), tuple(entry.get_shape())))
            return header
    except (SafetensorError, OSError) as error:
        raise CheckpointError(file, f"is not a complete safetensors file ({error})") from None


def _check_tensor(
    file: str, name: str, dtype: str, dims: tuple[int, ...], shape: ModelShape, expected: dict[str, tuple[int, ...]]
) -> bool:
    """Whether the tensor is to be loaded; the named exceptions are not."""
    if _LEGACY.fullmatch(name):
        return False
    if name not in expected and not (shape.tied and name == HEAD):
        raise CheckpointError(file, "is a tensor that the model does not have", subject=name)
    wanted = expected.get(name, expected[EMBEDDING])
    if dims != wanted:
        raise CheckpointError(file, f"has shape {list(dims)}, the config asks for {list(wanted)}", subject=name)
    if dtype not in _DTYPES:
        raise CheckpointError(file, f"is {dtype}; only {', '.join(sorted(_DTYPES))} are read", subject=name)
    return name in expected
