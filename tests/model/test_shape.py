"""How many bytes a Mixtral takes in each form, and that the published sizes come out."""

from __future__ import annotations

import math

import pytest

from mixtral_serve.model.shape import HEAD, ModelShape, Packing, kv_dtype_for, packed_bytes

MIXTRAL_8X7B = ModelShape(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_query_heads=32,
    num_kv_heads=8,
    head_dim=128,
    num_experts=8,
    num_experts_per_token=2,
    max_model_len=32768,
)
ODD = ModelShape(
    vocab_size=101,
    hidden_size=40,
    intermediate_size=36,
    num_layers=3,
    num_query_heads=5,
    num_kv_heads=1,
    head_dim=8,
    num_experts=3,
    num_experts_per_token=2,
    max_model_len=64,
    tied=True,
)


def test_a_packed_matrix_pays_for_its_padding_and_its_scales() -> None:
    assert packed_bytes("int4", 16, 32) == 16 * 32 // 2 + 16 * (1 + 4)
    assert packed_bytes("int4", 16, 4096 + 32) == 16 * (4096 + 32) // 2 + 16 * (129 + 2 * 4)
    assert packed_bytes("int8", 16, 32) == 16 * 32 + 16 * 4
    assert packed_bytes("int4", 17, 33) == packed_bytes("int4", 32, 64)
    assert packed_bytes("int8", 1, 1) == packed_bytes("int8", 16, 32)


def test_mixtral_8x7b_takes_93_gb_in_bf16_47_in_int8_and_25_in_int4() -> None:
    assert MIXTRAL_8X7B.weights_bytes("bf16") == 93_405_585_408
    assert round(MIXTRAL_8X7B.weights_bytes("int8") / 1e9, 1) == 46.9
    assert round(MIXTRAL_8X7B.weights_bytes("int4") / 1e9, 1) == 25.1


@pytest.mark.parametrize("packing", ["int8", "int4"])
@pytest.mark.parametrize("shape", [MIXTRAL_8X7B, ODD])
def test_the_sum_over_all_tensors_is_what_the_weights_take(shape: ModelShape, packing: Packing) -> None:
    tensors = shape.hub_tensors()
    if shape.tied:
        tensors[HEAD] = (shape.vocab_size, shape.hidden_size)
    total = 0
    for name, dims in tensors.items():
        if "embed" in name:
            total += 2 * math.prod(dims)
        elif "norm" in name or "gate" in name:
            total += 4 * math.prod(dims)
        else:
            num_rows, num_cols = dims
            total += packed_bytes(packing, num_rows, num_cols)
    assert shape.weights_bytes(packing) == total


def test_keys_and_values_are_fp32_beside_fp32_weights_and_bf16_beside_others_unless_asked() -> None:
    assert [kv_dtype_for(weights) for weights in ("fp32", "bf16", "int8", "int4")] == ["fp32", "bf16", "bf16", "bf16"]
    assert kv_dtype_for("int4", "int8") == "int8"
