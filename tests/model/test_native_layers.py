"""Decoder layers computed whole have the bits of their modules one by one."""

from __future__ import annotations

import random
from array import array
from dataclasses import replace

import pytest
import torch
from transformers import MixtralForCausalLM

from mixtral_serve.kernels import native
from mixtral_serve.kernels.formats import Kind, PackedMatrix
from mixtral_serve.kernels.native_backend import NativeBackend
from mixtral_serve.kernels.native_layers import LayerTensors, NativeLayers
from mixtral_serve.kernels.native_products import PASS_ROWS, KernelArgumentError
from mixtral_serve.kernels.quantizer import quantize_into
from mixtral_serve.model.loader import build_empty
from mixtral_serve.model.native_attention import native_step
from mixtral_serve.model.native_kv_cache import NativeKVCache
from mixtral_serve.model.native_layers import NativeDecoderLayers, hand_over
from mixtral_serve.model.quantized import compute_with, hold_packed, packed_places
from mixtral_serve.model.rowwise import make_row_invariant
from mixtral_serve.model.runner import LoadedModel, Numerics, assemble_runner
from mixtral_serve.model.shape import KVDtype, ModelShape

pytestmark = pytest.mark.skipif(not native.is_available(), reason="the compiled kernels are not installed")


def filled(shape: ModelShape, kind: Kind, seed: int) -> MixtralForCausalLM:
    """A model of random weights that no backend has yet; equal seeds make equal models."""
    generator = torch.Generator().manual_seed(seed)
    model = build_empty(shape)
    hold_packed(model, kind)
    make_row_invariant(model)
    for _, place in packed_places(model):
        if not isinstance(place, PackedMatrix):
            place.copy_(torch.randn(place.shape, generator=generator))
            continue
        several = place.quants.dim() == 4
        for matrix in [place[i] for i in range(place.quants.shape[0])] if several else [place]:
            weight = torch.randn(matrix.num_rows, matrix.num_cols, generator=generator)
            quantize_into(weight / matrix.num_cols**0.5, matrix)
    return model


@pytest.fixture
def rows_of(drive, make_request):
    """All rows of logits that a model gives when it plays some requests."""

    def run(model, shape, kind, kv_dtype, max_num_batched_tokens):
        rows = {}

        def listen(slices, logits) -> None:
            rows.update(
                {(s.request_id, s.num_output_tokens): row.clone() for s, row in zip(slices, logits, strict=True)}
            )

        runner = assemble_runner(
            LoadedModel(model, shape, Numerics(weights=kind, kv_cache_dtype=kv_dtype), NativeBackend()),
            num_blocks=120,
            block_size=16,
            name="m",
            logits_listener=listen,
        )
        rng = random.Random(0)
        lengths = (PASS_ROWS + 37, 40, 3, 1)
        prompts = [[rng.randrange(shape.vocab_size) for _ in range(length)] for length in lengths]
        requests = [make_request(f"r{i}", prompt, max_tokens=4) for i, prompt in enumerate(prompts)]
        drive(runner, requests, max_num_batched_tokens=max_num_batched_tokens)
        return rows

    return run


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize(("kv_dtype", "window"), [("fp32", None), ("bf16", 24), ("int8", None)])
def test_whole_layers_have_the_bits_of_their_modules(
    tiny_shape: ModelShape, rows_of, kind: Kind, kv_dtype: KVDtype, window: int | None
) -> None:
    shape = replace(tiny_shape, max_model_len=1024, sliding_window=window)
    whole, apart = filled(shape, kind, seed=3), filled(shape, kind, seed=3)
    hand_over(whole, NativeBackend())
    compute_with(apart, NativeBackend())
    assert [type(layer) for layer in whole.model.layers] == [NativeDecoderLayers]
    assert len(apart.model.layers) == shape.num_layers
    found = rows_of(whole, shape, kind, kv_dtype, 2 * PASS_ROWS)
    expected = rows_of(apart, shape, kind, kv_dtype, 2 * PASS_ROWS)
    assert found.keys() == expected.keys()
    assert len(found) == 16
    for key, row in found.items():
        assert torch.equal(row, expected[key]), key
        assert row.isfinite().all()


def test_a_listener_hears_each_rows_experts_and_changes_no_bit(tiny_shape: ModelShape, rows_of) -> None:
    shape = replace(tiny_shape, max_model_len=1024)
    model = filled(shape, "int4", seed=5)
    hand_over(model, NativeBackend())
    expected = rows_of(model, shape, "int4", "bf16", 2 * PASS_ROWS)
    heard: list[torch.Tensor] = []
    model.model.layers[0].routing_listener = heard.append
    found = rows_of(model, shape, "int4", "bf16", 2 * PASS_ROWS)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert {(ids.shape[0], ids.shape[2]) for ids in heard} == {(shape.num_layers, shape.num_experts_per_token)}
    assert sum(ids.shape[1] for ids in heard) == PASS_ROWS + 37 + 40 + 3 + 1 + 4 * 3
    for ids in heard:
        assert int(ids.min()) >= 0
        assert int(ids.max()) < shape.num_experts
        assert bool((ids[..., 0] != ids[..., 1]).all())
    rows = torch.cat(heard, dim=1)
    assert not torch.equal(rows[0], rows[1]), "each layer routes on its own"


@pytest.fixture
def parts(tiny_shape: ModelShape):
    """What a layer is made of."""
    hidden, inner = tiny_shape.hidden_size, tiny_shape.intermediate_size
    query, key = (n * tiny_shape.head_dim for n in (tiny_shape.num_query_heads, tiny_shape.num_kv_heads))
    norms = {name: torch.ones(hidden) for name in ("attention_norm", "experts_norm")}
    dense = norms | {"gate": torch.zeros(4, hidden)}
    dims = {"q": (query, hidden), "k": (key, hidden), "v": (key, hidden), "o": (hidden, query)}
    packed = {name: PackedMatrix.empty("int8", *of) for name, of in dims.items()}
    for name, of in {"w1": (inner, hidden), "w2": (hidden, inner), "w3": (inner, hidden)}.items():
        packed[name] = PackedMatrix.empty("int8", *of, num_matrices=4)
    return dense, packed


def made_of(dense, packed, num_chosen: int = 2) -> NativeLayers:
    """One layer."""
    return NativeLayers([LayerTensors(dense, packed)], num_chosen=num_chosen, epsilon=1e-5)


def test_weights_that_do_not_fit_each_other_are_refused_by_name(parts, tiny_shape: ModelShape) -> None:
    dense, packed = parts
    made_of(dense, packed)
    hidden = tiny_shape.hidden_size
    bad_dense = {
        "attention_norm": torch.ones(hidden + 1),
        "experts_norm": torch.ones(hidden, dtype=torch.float64),
        "gate": torch.zeros(4, 2 * hidden)[:, ::2],
    }
    for name, tensor in bad_dense.items():
        with pytest.raises(KernelArgumentError, match=name):
            made_of(dense | {name: tensor}, packed)
    for name, matrix in packed.items():
        leading = None if matrix.quants.dim() == 3 else 3
        small = PackedMatrix.empty("int8", matrix.num_rows + 16, matrix.num_cols + 32, num_matrices=leading)
        with pytest.raises(KernelArgumentError):
            made_of(dense, packed | {name: small})
    other = PackedMatrix.empty("int4", packed["o"].num_rows, packed["o"].num_cols)
    with pytest.raises(KernelArgumentError, match="o is packed as int4"):
        made_of(dense, packed | {"o": other})
    with pytest.raises(KernelArgumentError, match="experts per row"):
        made_of(dense, packed, num_chosen=5)


def test_layers_that_differ_are_refused_by_their_number(parts, tiny_shape: ModelShape) -> None:
    dense, packed = parts
    layer = LayerTensors(dense, packed)
    fewer = {
        n: PackedMatrix.empty("int8", m.num_rows, m.num_cols, num_matrices=3) for n, m in packed.items() if n[0] == "w"
    }
    other = LayerTensors(dense | {"gate": torch.zeros(3, tiny_shape.hidden_size)}, packed | fewer)
    with pytest.raises(KernelArgumentError, match="no layers"):
        NativeLayers([], num_chosen=2, epsilon=1e-5)
    with pytest.raises(KernelArgumentError, match="layer 2 has other shapes than layer 0"):
        NativeLayers([layer, layer, other], num_chosen=2, epsilon=1e-5)


def test_a_cache_of_another_number_of_layers_is_refused(parts, tiny_shape: ModelShape) -> None:
    layers = NativeLayers([LayerTensors(*parts)] * (tiny_shape.num_layers + 1), num_chosen=2, epsilon=1e-5)
    cache = NativeKVCache(tiny_shape, num_blocks=4, block_size=16, dtype="fp32")
    nothing = torch.zeros(0, tiny_shape.hidden_size), *[torch.zeros(0, tiny_shape.head_dim)] * 2
    step = native_step(cache, [], array("q"), sliding_window=None)
    with pytest.raises(KernelArgumentError, match=f"of {tiny_shape.num_layers} layers do not fit"):
        layers.run(*nothing, attention=step.call, storage=cache.layer_addresses)


def test_a_router_over_more_experts_than_the_kernels_can_choose_among_is_refused(parts, tiny_shape: ModelShape) -> None:
    dense, packed = parts
    hidden, inner, number = tiny_shape.hidden_size, tiny_shape.intermediate_size, 257
    for name, of in {"w1": (inner, hidden), "w2": (hidden, inner), "w3": (inner, hidden)}.items():
        packed[name] = PackedMatrix.empty("int8", *of, num_matrices=number)
    with pytest.raises(KernelArgumentError, match="at most 256 experts"):
        made_of(dense | {"gate": torch.zeros(number, hidden)}, packed)
