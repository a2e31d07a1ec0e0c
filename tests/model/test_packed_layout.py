"""The layout of a packed checkpoint is that of the kernels' matrices, and safetensors agrees with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open

from mixtral_serve.kernels.formats import PackedMatrix
from mixtral_serve.model.packed_layout import ENDS_FILE, layer_file, packed_files
from mixtral_serve.model.shape import EMBEDDING, ModelShape, int4_scale_bytes

PACKINGS = ("int8", "int4")


@pytest.mark.parametrize("packing", PACKINGS)
def test_matrices_lie_as_the_kernels_hold_them(tiny_shape: ModelShape, packing) -> None:
    for file in packed_files(tiny_shape, packing):
        for matrix in file.matrices:
            held = PackedMatrix.empty(packing, matrix.num_rows, matrix.num_cols, num_matrices=matrix.num_experts)
            for leaf, tensor in (("quants", held.quants), ("scales", held.scales)):
                stored = file.tensor(f"{matrix.name}.{leaf}")
                assert stored.dims == tensor.shape
                assert stored.num_bytes == tensor.nbytes


@pytest.mark.parametrize("num_cols", [1, 32, 33, 4096, 4097, 8192, 14336, 14337])
def test_scales_take_what_the_kernels_say_however_many_sections(num_cols: int) -> None:
    assert int4_scale_bytes(num_cols) == PackedMatrix.empty("int4", 16, num_cols).scales.nbytes


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("tied", [False, True])
def test_the_tensors_take_the_bytes_that_the_memory_plan_counts(tiny_shape: ModelShape, packing, tied) -> None:
    shape = replace(tiny_shape, tied=tied)
    stored = [tensor for file in packed_files(shape, packing) for tensor in file.tensors]
    assert sum(tensor.num_bytes for tensor in stored) == shape.weights_bytes(packing)
    assert len({tensor.name for tensor in stored}) == len(stored)


@pytest.mark.parametrize("tied", [False, True])
def test_every_tensor_on_the_hub_goes_somewhere_and_a_tied_embedding_to_two_places(tiny_shape, tied) -> None:
    shape = replace(tiny_shape, tied=tied)
    sources = [spec.name for file in packed_files(shape, "int4") for spec in file.plain]
    for file in packed_files(shape, "int4"):
        for matrix in file.matrices:
            sources += [matrix.source_name(expert) for expert in range(matrix.num_experts or 1)]
    assert set(sources) == set(shape.hub_tensors())
    assert sorted(sources) == sorted([*shape.hub_tensors(), *([EMBEDDING] if tied else [])])


@pytest.mark.parametrize("packing", PACKINGS)
def test_safetensors_finds_every_tensor_where_the_layout_puts_it(tiny_shape, packing, tmp_path: Path) -> None:
    for file in packed_files(tiny_shape, packing):
        path = tmp_path / file.name
        body = bytearray(file.num_bytes - len(file.header))
        for number, tensor in enumerate(file.tensors):
            body[tensor.begin - len(file.header)] = number + 1
        path.write_bytes(file.header + body)
        with safe_open(path, framework="pt") as opened:
            assert opened.metadata()["packing"] == packing
            assert opened.offset_keys() == [tensor.name for tensor in file.tensors]
            for number, tensor in enumerate(file.tensors):
                found = opened.get_tensor(tensor.name)
                assert opened.get_slice(tensor.name).get_dtype() == tensor.dtype
                assert found.shape == tensor.dims
                assert bytes(found.contiguous().view(-1).untyped_storage())[:1] == bytes([number + 1])


def test_there_is_one_file_per_layer_and_one_for_the_rest(tiny_shape: ModelShape) -> None:
    assert [file.name for file in packed_files(tiny_shape, "int8")] == [layer_file(0), layer_file(1), ENDS_FILE]


def test_tensors_begin_at_multiples_of_their_elements_however_odd_the_widths() -> None:
    odd = ModelShape(
        vocab_size=97,
        hidden_size=45,
        intermediate_size=7,
        num_layers=1,
        num_query_heads=3,
        num_kv_heads=1,
        head_dim=2,
        num_experts=3,
        num_experts_per_token=1,
        max_model_len=8,
    )
    sizes = {"U8": 1, "BF16": 2, "F32": 4}
    for packing in PACKINGS:
        for file in packed_files(odd, packing):
            assert file.tensors[0].begin % 64 == 0
            assert all(tensor.begin % sizes[tensor.dtype] == 0 for tensor in file.tensors)
