"""The swapped norms, routers and rotary embedding compute what Transformers' own do, and hold the same parameters."""

from __future__ import annotations

import pytest
import torch
from transformers import MixtralForCausalLM

from mixtral_serve.kernels import native
from mixtral_serve.model.checkpoint import open_checkpoint
from mixtral_serve.model.loader import build_empty, load_model, places
from mixtral_serve.model.rowwise import RotaryTable, make_row_invariant, row_invariant_bytes

pytestmark = pytest.mark.skipif(not native.is_available(), reason="the compiled kernels were not built")


@pytest.fixture
def model(tiny_checkpoint) -> MixtralForCausalLM:
    return MixtralForCausalLM.from_pretrained(
        tiny_checkpoint, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    ).eval()


@torch.inference_mode()
def test_a_model_with_swapped_modules_gives_the_same_logits(model) -> None:
    tokens = torch.arange(60).view(1, 60) % 97
    wanted = model(tokens, output_router_logits=False).logits
    make_row_invariant(model)
    found = model(tokens, output_router_logits=False).logits
    assert not torch.equal(found, wanted), "nothing was swapped"
    assert torch.allclose(found, wanted, atol=1e-4)


@torch.inference_mode()
def test_each_swapped_module_answers_what_the_one_before_it_did(model) -> None:
    hidden = torch.randn(1, 7, 48, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 5, 3, 255, 3, 17, 1]])
    layer = model.model.layers[0]
    before = (layer.input_layernorm(hidden), *layer.mlp.gate(hidden), *model.model.rotary_emb(hidden, positions))
    make_row_invariant(model)
    after = (layer.input_layernorm(hidden), *layer.mlp.gate(hidden), *model.model.rotary_emb(hidden, positions))
    for new, old in zip(after, before, strict=True):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)
        assert torch.allclose(new.double(), old.double(), atol=1e-6)


def test_weights_may_be_loaded_before_or_after(tiny_checkpoint, tiny_shape) -> None:
    model = build_empty(tiny_shape)
    names = [name for name, _ in places(model)]
    make_row_invariant(model)
    assert [name for name, _ in places(model)] == names
    loaded = load_model(open_checkpoint(tiny_checkpoint), "fp32")
    parameters = dict(loaded.named_parameters())
    make_row_invariant(loaded)
    assert all(parameter is parameters[name] for name, parameter in loaded.named_parameters())
    assert not loaded.model.rotary_emb.cosine.is_meta


def test_the_table_takes_the_bytes_that_are_planned_for_it(model) -> None:
    make_row_invariant(model)
    assert sum(buffer.nbytes for buffer in model.model.rotary_emb.buffers()) == row_invariant_bytes(10, 256)


def test_a_position_has_the_same_cosines_wherever_it_stands_in_a_batch() -> None:
    table = RotaryTable(1.0 / (1e4 ** (torch.arange(0, 10, 2) / 10)), 300)
    everything = torch.cat(table(torch.zeros(1), torch.arange(300).unsqueeze(0)), dim=-1)
    for first in range(0, 300, 7):
        some = torch.cat(table(torch.zeros(1), torch.arange(first, min(first + 7, 300)).unsqueeze(0)), dim=-1)
        assert torch.equal(some[0], everything[0, first : first + 7])
    assert table(torch.zeros(1, dtype=torch.bfloat16), torch.tensor([[3]]))[0].dtype is torch.bfloat16
