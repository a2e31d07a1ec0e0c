"""What is loaded from a packed checkpoint is what quantising on the fly gives, verified to the last byte."""

from __future__ import annotations

import logging
import os
import random
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtral_serve.demo import checkpoint_path
from mixtral_serve.kernels.backend import ExpertsOp, LinearOp
from mixtral_serve.kernels.formats import Kind, PackedMatrix
from mixtral_serve.model.checkpoint import Checkpoint, open_checkpoint
from mixtral_serve.model.errors import CheckpointError
from mixtral_serve.model.loader import build_empty, load_model
from mixtral_serve.model.manifest import MANIFEST, read_manifest
from mixtral_serve.model.packed_layout import ENDS_FILE, layer_file
from mixtral_serve.model.packed_loader import load_packed
from mixtral_serve.model.quantize import quantize_checkpoint
from mixtral_serve.model.quantized import hold_packed, packed_places
from mixtral_serve.model.shape import ModelShape, Packing
from mixtral_serve.model.synthetic import write_synthetic_checkpoint


class Keeper:
    """A backend that computes nothing and keeps the matrices it is given."""

    name = "keeper"
    label = "keeper"
    is_row_invariant = False

    def __init__(self) -> None:
        self.matrices: list[PackedMatrix] = []

    def missing(self, kind: Kind) -> str | None:
        return f"never used for {kind}"

    def linear(self, weight: PackedMatrix) -> LinearOp:
        self.matrices.append(weight)
        return lambda rows: rows

    def experts(self, w1: PackedMatrix, w2: PackedMatrix, w3: PackedMatrix) -> ExpertsOp:
        self.matrices += [w1, w2, w3]
        return lambda rows, _ids, _weights: rows


def held(checkpoint: Checkpoint, weights: Packing) -> list[torch.Tensor]:
    """Every tensor of the loaded model, packed ones first."""
    keeper = Keeper()
    model = load_model(checkpoint, weights, keeper)
    packed = [tensor for matrix in keeper.matrices for tensor in (matrix.quants, matrix.scales)]
    return packed + [parameter.data for _, parameter in sorted(model.named_parameters())]


def assert_the_same_bits(left: list[torch.Tensor], right: list[torch.Tensor]) -> None:
    assert len(left) == len(right) > 0
    for one, other in zip(left, right, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.fixture(scope="module")
def whole(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "tiny-int8"
    quantize_checkpoint(open_checkpoint(tiny_checkpoint), path, "int8", num_workers=1)
    return path


@pytest.fixture
def packed(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return shutil.copytree(whole, tmp_path / "copy")


def load(checkpoint: Checkpoint, *, num_threads: int = 2) -> dict[str, PackedMatrix | torch.Tensor]:
    assert checkpoint.manifest is not None
    model = build_empty(checkpoint.shape)
    hold_packed(model, checkpoint.manifest.weights)
    places = dict(packed_places(model))
    load_packed(checkpoint, places.items(), num_threads=num_threads)
    return places


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_the_demo_model_is_loaded_as_if_it_were_quantised_on_the_fly(weights: Packing, tmp_path: Path) -> None:
    source = open_checkpoint(checkpoint_path())
    quantize_checkpoint(source, tmp_path / "packed", weights, num_workers=2)
    assert_the_same_bits(held(open_checkpoint(tmp_path / "packed"), weights), held(source, weights))


@settings(max_examples=12, deadline=None)
@given(
    hidden=st.integers(1, 70),
    inner=st.integers(1, 70),
    vocabulary=st.integers(300, 320),
    num_layers=st.integers(1, 3),
    num_experts=st.integers(1, 4),
    head_dim=st.sampled_from([2, 6, 18]),
    tied=st.booleans(),
    dtype=st.sampled_from(["fp32", "bf16"]),
    weights=st.sampled_from(["int8", "int4"]),
    num_workers=st.integers(1, 3),
    num_shards=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_any_model_is_loaded_as_if_it_were_quantised_on_the_fly(
    hidden, inner, vocabulary, num_layers, num_experts, head_dim, tied, dtype, weights, num_workers, num_shards, seed
) -> None:
    shape = ModelShape(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=num_layers,
        num_query_heads=2,
        num_kv_heads=1,
        head_dim=head_dim,
        num_experts=num_experts,
        num_experts_per_token=1,
        max_model_len=16,
        tied=tied,
    )
    with tempfile.TemporaryDirectory() as directory:
        source_path, path = Path(directory) / "source", Path(directory) / "packed"
        at_most = max(1, shape.weights_bytes(dtype) // num_shards)
        write_synthetic_checkpoint(source_path, shape, seed=seed, weights=dtype, max_shard_bytes=at_most)
        source = open_checkpoint(source_path)
        quantize_checkpoint(source, path, weights, num_workers=num_workers)
        assert_the_same_bits(held(open_checkpoint(path), weights), held(source, weights))


def test_a_slab_of_rows_at_a_time_gives_the_same_bits_as_the_matrix_at_once(tmp_path: Path, tiny_shape) -> None:
    # Wider than a slab holds: the head is cut into several.
    shape = replace(tiny_shape, vocab_size=1000, hidden_size=8192, num_layers=1, intermediate_size=16, num_experts=1)
    shape = replace(shape, num_experts_per_token=1)
    write_synthetic_checkpoint(tmp_path / "wide", shape, weights="bf16")
    source = open_checkpoint(tmp_path / "wide")
    quantize_checkpoint(source, tmp_path / "packed", "int4", num_workers=2)
    assert_the_same_bits(held(open_checkpoint(tmp_path / "packed"), "int4"), held(source, "int4"))


def test_loading_says_how_much_it_read_and_how_fast(packed: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="mixtral_serve.model"):
        load(open_checkpoint(packed))
    assert caplog.records[-1].message.startswith("loaded and verified copy as int8: 0.00 GB in ")
    assert caplog.records[-1].message.endswith(" GB/s")


def test_the_number_of_threads_changes_nothing(packed: Path) -> None:
    one, many = (load(open_checkpoint(packed), num_threads=number) for number in (1, 7))
    for name, place in one.items():
        other = many[name]
        if isinstance(place, PackedMatrix):
            assert isinstance(other, PackedMatrix)
            assert torch.equal(place.quants, other.quants)
            assert torch.equal(place.scales, other.scales)
        else:
            assert isinstance(other, torch.Tensor)
            assert torch.equal(place, other)


def test_row55_nothing_is_mapped_or_open_after_loading_so_a_truncated_file_harms_nobody(packed: Path) -> None:
    places = load(open_checkpoint(packed))
    head = places["lm_head"]
    assert isinstance(head, PackedMatrix)
    before = head.quants.clone()
    assert ".safetensors" not in Path("/proc/self/maps").read_text()
    assert not [name for name in map(os.readlink, _open_files()) if name.startswith(str(packed))]
    for file in packed.glob("*.safetensors"):
        os.truncate(file, 0)
    assert torch.equal(head.quants, before)


def _open_files() -> list[str]:
    return [path for path in (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")) if os.path.islink(path)]


def refusal(checkpoint: Checkpoint) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(checkpoint)
    return str(caught.value)


@pytest.mark.parametrize("file", [layer_file(0), layer_file(1), ENDS_FILE])
def test_row54_any_flipped_bit_of_the_weights_is_noticed_when_they_are_loaded(packed: Path, file: str) -> None:
    opened = open_checkpoint(packed)
    data = (packed / file).read_bytes()
    header_bytes = 8 + int.from_bytes(data[:8], "little")
    bits = random.Random(file).sample(range(8 * header_bytes, 8 * len(data)), 12)
    for bit in [8 * header_bytes, *bits, 8 * len(data) - 1]:
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        (packed / file).write_bytes(broken)
        assert refusal(opened).startswith(f"{file}: is not the file that manifest.json lists")


def test_row54_files_of_two_models_with_the_same_header_cannot_be_swapped(packed, tiny_shape, tmp_path) -> None:
    write_synthetic_checkpoint(tmp_path / "m", tiny_shape, seed=2, weights="fp32")
    quantize_checkpoint(open_checkpoint(tmp_path / "m"), tmp_path / "other", "int8", num_workers=1)
    shutil.copy(tmp_path / "other" / layer_file(1), packed / layer_file(1))
    assert refusal(open_checkpoint(packed)).startswith(f"{layer_file(1)}: is not the file that")


def test_row54_a_foreign_manifest_of_a_model_of_the_same_shape_is_refused(packed, tiny_shape, tmp_path) -> None:
    write_synthetic_checkpoint(tmp_path / "m", tiny_shape, seed=2, weights="fp32")
    quantize_checkpoint(open_checkpoint(tmp_path / "m"), tmp_path / "other", "int8", num_workers=1)
    shutil.copy(tmp_path / "other" / MANIFEST, packed / MANIFEST)
    assert " is not the file that manifest.json lists" in refusal(open_checkpoint(packed))


@pytest.mark.parametrize("keep", [0, 100, 3000, -1])
def test_row54_a_file_that_is_truncated_between_check_and_load_is_named(packed: Path, keep: int) -> None:
    opened = open_checkpoint(packed)
    data = (packed / layer_file(1)).read_bytes()
    (packed / layer_file(1)).write_bytes(data[:keep])
    assert refusal(opened).startswith(f"{layer_file(1)}: ")


def test_row54_a_file_that_grows_between_check_and_load_is_named(packed: Path) -> None:
    opened = open_checkpoint(packed)
    with (packed / ENDS_FILE).open("ab") as file:
        file.write(b"\0")
    assert refusal(opened).startswith(f"{ENDS_FILE}: goes on after its ")


def test_row54_a_file_that_goes_between_check_and_load_is_named(packed: Path) -> None:
    opened = open_checkpoint(packed)
    (packed / ENDS_FILE).unlink()
    assert refusal(opened).startswith(f"{ENDS_FILE}: cannot be read: No such file")


def test_a_packed_checkpoint_is_refused_as_other_weights(packed: Path) -> None:
    with pytest.raises(CheckpointError, match=r"manifest\.json: is that of int8 weights"):
        load_model(open_checkpoint(packed), "int4", Keeper())


def test_opening_reads_no_weights(packed: Path) -> None:
    manifest = read_manifest(packed)
    assert manifest is not None
    data = bytearray((packed / ENDS_FILE).read_bytes())
    data[-1] ^= 1
    (packed / ENDS_FILE).write_bytes(data)
    assert open_checkpoint(packed).manifest == manifest
