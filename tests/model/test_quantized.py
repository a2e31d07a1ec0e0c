"""Models with packed weights: what they hold, how they are filled, and that every backend computes with them."""

from __future__ import annotations

import logging
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixtral_serve.kernels.formats import PackedMatrix, dequantize, quantize
from mixtral_serve.kernels.reference_backend import ReferenceBackend
from mixtral_serve.kernels.registry import BACKENDS, KernelsUnavailableError
from mixtral_serve.model.checkpoint import SINGLE, open_checkpoint
from mixtral_serve.model.errors import CheckpointError
from mixtral_serve.model.loader import build_empty, load_model
from mixtral_serve.model.packed_layout import packed_files
from mixtral_serve.model.quantized import PackedExperts, PackedLinear, compute_with, hold_packed, packed_places
from mixtral_serve.model.shape import ModelShape
from mixtral_serve.model.synthetic import write_synthetic_checkpoint

kinds = pytest.mark.parametrize("kind", ["int8", "int4"])
combinations = pytest.mark.parametrize(
    ("kernels", "kind"),
    [(name, kind) for name, make in BACKENDS.items() for kind in ("int8", "int4") if make().missing(kind) is None],
)


def tied(shape: ModelShape) -> ModelShape:
    return ModelShape(**{name: getattr(shape, name) for name in shape.__slots__} | {"tied": True})


class Keeping(ReferenceBackend):
    """Remembers what it was handed, in order."""

    def __init__(self) -> None:
        self.taken: list[PackedMatrix] = []

    def linear(self, weight):
        self.taken.append(weight)
        return super().linear(weight)

    def experts(self, w1, w2, w3):
        self.taken += [w1, w2, w3]
        return super().experts(w1, w2, w3)


@kinds
def test_the_places_of_a_packed_model_are_those_of_a_packed_checkpoint(tiny_shape, kind) -> None:
    model = build_empty(tiny_shape)
    hold_packed(model, kind)
    found = {}
    for name, place in packed_places(model):
        if isinstance(place, PackedMatrix):
            found |= {f"{name}.quants": tuple(place.quants.shape), f"{name}.scales": tuple(place.scales.shape)}
        else:
            found[name] = tuple(place.shape)
    expected = {tensor.name: tensor.dims for file in packed_files(tiny_shape, kind) for tensor in file.tensors}
    assert found == expected


@kinds
@pytest.mark.parametrize("is_tied", [False, True])
def test_a_packed_model_takes_the_bytes_that_its_shape_says(tiny_shape, kind, is_tied) -> None:
    shape = tied(tiny_shape) if is_tied else tiny_shape
    model = build_empty(shape)
    hold_packed(model, kind)
    held = [place.num_bytes if isinstance(place, PackedMatrix) else place.nbytes for _, place in packed_places(model)]
    assert sum(held) == shape.weights_bytes(kind)


@kinds
@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("stored", ["fp32", "bf16"])
def test_each_tensor_of_a_checkpoint_is_quantised_into_its_place(tiny_shape, tmp_path, kind, is_tied, stored) -> None:
    shape = tied(tiny_shape) if is_tied else tiny_shape
    write_synthetic_checkpoint(tmp_path / "m", shape, seed=2, weights=stored, max_shard_bytes=40_000)
    hub = {name: tensor for file in (tmp_path / "m").glob("*.safetensors") for name, tensor in load_file(file).items()}
    backend = Keeping()
    model = load_model(open_checkpoint(tmp_path / "m"), kind, backend)
    taken = iter(backend.taken)
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            expected = quantize(hub[f"{prefix}.self_attn.{name}.weight"], kind)
            assert torch.equal(dequantize(next(taken)), dequantize(expected))
        for role in ("w1", "w2", "w3"):
            several = next(taken)
            for expert in range(shape.num_experts):
                expected = quantize(hub[f"{prefix}.block_sparse_moe.experts.{expert}.{role}.weight"], kind)
                assert torch.equal(dequantize(several[expert]), dequantize(expected))
        assert torch.equal(model.model.layers[layer].mlp.gate.weight, hub[f"{prefix}.block_sparse_moe.gate.weight"])
    head = hub["model.embed_tokens.weight" if is_tied else "lm_head.weight"]
    assert torch.equal(dequantize(next(taken)), dequantize(quantize(head, kind)))
    assert next(taken, None) is None
    assert torch.equal(model.model.embed_tokens.weight, hub["model.embed_tokens.weight"].bfloat16())
    assert model.model.norm.weight.dtype is torch.float32


@kinds
def test_activations_are_fp32_between_all_modules(tiny_checkpoint, kind) -> None:
    model = load_model(open_checkpoint(tiny_checkpoint), kind, ReferenceBackend())
    seen = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
    with torch.inference_mode():
        model.model.embed_tokens(torch.tensor([[1, 2]]))
        model.model.layers[0].self_attn.q_proj(torch.zeros(1, 2, 48))
        model.lm_head(torch.zeros(3, 48))
    assert {name: out.dtype for name, out in seen.items()} == dict.fromkeys(seen, torch.float32)
    assert seen["lm_head"].shape == (3, 97)


def test_a_backend_takes_every_matrix_and_the_modules_let_go_of_theirs(tiny_shape) -> None:
    model = build_empty(tiny_shape)
    hold_packed(model, "int8")
    for _, place in packed_places(model):
        if isinstance(place, PackedMatrix):
            place.quants.fill_(128)
            place.scales.fill_(1)
    compute_with(model, ReferenceBackend())
    assert not [module for module in model.modules() if isinstance(module, PackedLinear) and module.weight is not None]
    assert not [module for module in model.modules() if isinstance(module, PackedExperts) and module.weights]


@combinations
def test_every_backend_answers_nearly_as_fp32_does(make_runner, make_request, drive, kernels, kind) -> None:
    seen: dict[str, torch.Tensor] = {}

    def listener(name: str):
        return lambda _, logits: seen.setdefault(name, logits.clone())

    prompt = list(range(3, 40))
    drive(make_runner(logits_listener=listener("fp32")), [make_request("r", prompt, max_tokens=1)])
    runner = make_runner(weights=kind, kernels=kernels, logits_listener=listener("packed"))
    drive(runner, [make_request("r", prompt, max_tokens=1)])
    similarity = torch.nn.functional.cosine_similarity(seen["fp32"], seen["packed"]).item()
    assert similarity > (0.995 if kind == "int8" else 0.93)


@combinations
def test_the_fingerprint_names_weights_cache_backend_and_law(make_runner, kernels, kind) -> None:
    fingerprint = make_runner(weights=kind, kernels=kernels).info.fingerprint
    law = "batchinvariant" if kernels == "native" else "batchvariant"
    assert fingerprint.startswith(f"tiny-{kind}-kvbf16-{kernels}")
    assert fingerprint.rpartition("-")[2] == law


def test_the_fingerprint_of_weights_in_floating_point_promises_nothing(make_runner) -> None:
    assert make_runner().info.fingerprint == f"tiny-fp32-kvfp32-torch{torch.__version__}-batchvariant"


def test_int4_on_torch_is_refused_before_anything_is_loaded(make_runner, caplog) -> None:
    with (
        caplog.at_level(logging.INFO, logger="mixtral_serve.model"),
        pytest.raises(KernelsUnavailableError, match="int4 weights need the compiled kernels"),
    ):
        make_runner(weights="int4", kernels="torch")
    assert not [record.message for record in caplog.records if record.message.startswith("load")]


@kinds
def test_weights_that_are_not_finite_are_refused_by_name(tiny_shape, tmp_path, kind) -> None:
    write_synthetic_checkpoint(tmp_path / "m", tiny_shape, weights="fp32")
    tensors = load_file(tmp_path / "m" / SINGLE)
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    tensors[name][3, 5] = torch.nan
    save_file(tensors, tmp_path / "m" / SINGLE)
    with pytest.raises(CheckpointError, match=f"{SINGLE}: {name}: holds values that are not finite"):
        load_model(open_checkpoint(tmp_path / "m"), kind, ReferenceBackend())


def test_row54_a_shard_that_ends_early_is_an_error_and_not_the_end_of_the_process(tiny_shape, tmp_path) -> None:
    write_synthetic_checkpoint(tmp_path / "m", tiny_shape, weights="bf16")
    opened = open_checkpoint(tmp_path / "m")
    os.truncate(tmp_path / "m" / SINGLE, (tmp_path / "m" / SINGLE).stat().st_size - 1)
    with pytest.raises(CheckpointError, match=rf"{SINGLE}: cannot be read \(it ends early\)"):
        load_model(opened, "int8", ReferenceBackend())
