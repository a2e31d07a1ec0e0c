"""What is loaded is what the files hold, in the places where Transformers would put it."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import MixtralForCausalLM

from mixtral_serve.model.checkpoint import SINGLE, open_checkpoint
from mixtral_serve.model.errors import CheckpointError
from mixtral_serve.model.loader import build_empty, load_model, places
from mixtral_serve.model.shape import ModelShape
from mixtral_serve.model.synthetic import write_synthetic_checkpoint


def assert_same_parameters(ours: MixtralForCausalLM, theirs: MixtralForCausalLM) -> None:
    expected = dict(theirs.named_parameters())
    found = dict(ours.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        assert torch.equal(parameter, expected[name]), name
    for name, buffer in ours.named_buffers():
        assert torch.equal(buffer, theirs.get_buffer(name)), name


def test_parameters_equal_those_that_transformers_loads(tiny_checkpoint) -> None:
    ours = load_model(open_checkpoint(tiny_checkpoint), "fp32")
    theirs = MixtralForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    assert_same_parameters(ours, theirs)
    assert not ours.training
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def test_shards_load_like_one_file(tiny_checkpoint, tiny_shape, tmp_path) -> None:
    write_synthetic_checkpoint(tmp_path / "s", tiny_shape, seed=1, weights="fp32", max_shard_bytes=30_000)
    one = load_model(open_checkpoint(tiny_checkpoint), "fp32")
    many = load_model(open_checkpoint(tmp_path / "s"), "fp32")
    assert_same_parameters(many, one)


def test_a_tied_head_is_the_embedding(tiny_shape, tmp_path) -> None:
    shape = ModelShape(**{field: getattr(tiny_shape, field) for field in tiny_shape.__slots__} | {"tied": True})
    write_synthetic_checkpoint(tmp_path / "tied", shape, weights="fp32")
    model = load_model(open_checkpoint(tmp_path / "tied"), "fp32")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same_parameters(model, MixtralForCausalLM.from_pretrained(tmp_path / "tied", dtype=torch.float32))


@pytest.mark.parametrize(("weights", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_weights_are_held_in_the_asked_dtype_and_rotary_frequencies_in_fp32(tiny_checkpoint, weights, dtype) -> None:
    model = load_model(open_checkpoint(tiny_checkpoint), weights)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}


def test_the_number_of_parameters_of_a_shape_is_that_of_the_model(tiny_checkpoint, tiny_shape) -> None:
    model = load_model(open_checkpoint(tiny_checkpoint), "fp32")
    assert tiny_shape.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert tiny_shape.weights_bytes("fp32") == sum(parameter.nbytes for parameter in model.parameters())


def test_mixtral_8x7b_has_the_published_size() -> None:
    shape = ModelShape(
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
    assert shape.num_parameters == 46_702_792_704
    assert len(shape.hub_tensors()) == 995


def test_an_empty_model_has_a_place_for_each_tensor_of_its_shape_and_no_storage(tiny_shape) -> None:
    model = build_empty(tiny_shape)
    assert all(parameter.is_meta for parameter in model.parameters())
    found = {name: tuple(place.shape) for name, place in places(model)}
    assert found == tiny_shape.hub_tensors()


def test_row55_no_shard_is_mapped_after_loading(tiny_checkpoint) -> None:
    model = load_model(open_checkpoint(tiny_checkpoint), "fp32")
    assert SINGLE not in Path("/proc/self/maps").read_text()
    before = model.model.embed_tokens.weight.clone()
    size = (tiny_checkpoint / SINGLE).stat().st_size
    data = (tiny_checkpoint / SINGLE).read_bytes()
    try:
        os.truncate(tiny_checkpoint / SINGLE, 0)
        assert torch.equal(model.model.embed_tokens.weight, before)
    finally:
        (tiny_checkpoint / SINGLE).write_bytes(data)
    assert (tiny_checkpoint / SINGLE).stat().st_size == size


def test_row54_a_file_that_breaks_between_check_and_load_is_named(tiny_shape, tmp_path) -> None:
    write_synthetic_checkpoint(tmp_path / "m", tiny_shape, weights="fp32")
    opened = open_checkpoint(tmp_path / "m")
    os.truncate(tmp_path / "m" / SINGLE, 1000)
    with pytest.raises(CheckpointError, match=f"{SINGLE}: cannot be read"):
        load_model(opened, "fp32")


def test_loading_logs_its_progress_and_its_end(tiny_checkpoint, caplog) -> None:
    with caplog.at_level(logging.INFO, logger="mixtral_serve.model"):
        load_model(open_checkpoint(tiny_checkpoint), "fp32")
    lines = [record.message for record in caplog.records]
    assert lines[-2] == "loading tiny: 41 of 41 tensors"
    assert lines[-1].startswith("loaded tiny as fp32 in ")


def test_synthetic_weights_do_not_depend_on_sharding_or_dtype(tiny_shape, tmp_path) -> None:
    write_synthetic_checkpoint(tmp_path / "a", tiny_shape, seed=3, weights="fp32")
    write_synthetic_checkpoint(tmp_path / "b", tiny_shape, seed=3, weights="bf16", max_shard_bytes=9_000)
    write_synthetic_checkpoint(tmp_path / "c", tiny_shape, seed=4, weights="fp32")
    a = load_file(tmp_path / "a" / SINGLE)
    b = {name: tensor for shard in (tmp_path / "b").glob("*.safetensors") for name, tensor in load_file(shard).items()}
    c = load_file(tmp_path / "c" / SINGLE)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name].bfloat16(), b[name]) for name in a)
    assert not any(torch.equal(a[name], c[name]) for name in a)
