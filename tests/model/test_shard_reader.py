"""The reader gives what safetensors would, without mapping the file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixtral_serve.model.checkpoint import Shard
from mixtral_serve.model.errors import CheckpointError
from mixtral_serve.model.shard_reader import shard_tensors

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    """Seven tensors of all dtypes and sizes, one of them empty, asked for in another order than they lie in."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(3, 5), (200, 300), (1,), (0, 4), (64, 64), (7, 11), (500,)]
    tensors = {
        f"t{i}": torch.randn(dims, generator=generator).to(DTYPES[i % len(DTYPES)]) for i, dims in enumerate(sizes)
    }
    save_file(tensors, tmp_path / "x.safetensors")
    return Shard(tmp_path / "x.safetensors", ("t4", "t0", "t1", "t6", "t3", "t2", "t5"))


def test_each_tensor_is_what_safetensors_reads_and_comes_in_the_order_asked_for(shard: Shard) -> None:
    expected = load_file(shard.path)
    names = []
    for name, tensor in shard_tensors(shard):
        names.append(name)
        assert tensor.dtype is expected[name].dtype
        assert torch.equal(tensor, expected[name])
    assert tuple(names) == shard.tensors


def test_row55_the_file_is_never_mapped_and_closed_at_the_end(shard: Shard) -> None:
    for _ in shard_tensors(shard):
        assert shard.path.name not in Path("/proc/self/maps").read_text()
    assert not [link for link in Path("/proc/self/fd").iterdir() if os.path.realpath(link) == str(shard.path)]


def test_a_reader_that_is_left_early_closes_the_file(shard: Shard) -> None:
    tensors = shard_tensors(shard)
    next(tensors)
    tensors.close()
    assert not [link for link in Path("/proc/self/fd").iterdir() if os.path.realpath(link) == str(shard.path)]


@pytest.mark.parametrize("num_bytes", [0, 5, 8, 40, -1])
def test_row54_a_file_that_is_cut_anywhere_is_refused_by_name(shard: Shard, num_bytes: int) -> None:
    os.truncate(shard.path, num_bytes if num_bytes >= 0 else shard.path.stat().st_size + num_bytes)
    with pytest.raises(CheckpointError, match=r"^x\.safetensors: cannot be read"):
        list(shard_tensors(Shard(shard.path, ("t4", "t0", "t6", "t5", "t2", "t1"))))


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [3, 5], "data_offsets": [0, 59]},
        {"dtype": "F32", "shape": [3, 5], "data_offsets": [60, 0]},
        {"dtype": "F64", "shape": [3, 5], "data_offsets": [0, 120]},
        {"dtype": "F32", "shape": [3, 5]},
        {"dtype": "F32", "shape": "3", "data_offsets": [0, 60]},
        ["F32"],
        None,
    ],
)
def test_a_header_that_makes_no_sense_is_refused(tmp_path: Path, entry: object) -> None:
    header = json.dumps({"t": entry}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(200))
    with pytest.raises(CheckpointError, match=r"^x\.safetensors: cannot be read"):
        list(shard_tensors(Shard(path, ("t",))))


def test_an_absurd_length_of_the_header_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="its header is too long"):
        list(shard_tensors(Shard(path, ("t",))))
