"""Sorting rows by expert changes nothing but the time: the results are Transformers' own."""

from __future__ import annotations

import pytest
import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from mixtral_serve.model.experts import sorted_experts_forward


def make_experts(num_experts: int, dtype: torch.dtype = torch.float32) -> MixtralExperts:
    config = MixtralConfig(
        hidden_size=24,
        intermediate_size=20,
        num_local_experts=num_experts,
        num_attention_heads=2,
        num_key_value_heads=1,
        experts_implementation="eager",
    )
    experts = MixtralExperts(config)
    generator = torch.Generator().manual_seed(num_experts)
    for parameter in experts.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).mul_(0.2).to(dtype)
        parameter.requires_grad_(False)
    return experts


def route(num_rows: int, num_experts: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_rows)
    scores = torch.randn(num_rows, num_experts, generator=generator).softmax(dim=-1)
    weights, index = scores.topk(k, dim=-1)
    hidden = torch.randn(num_rows, 24, generator=generator)
    return hidden, index, weights / weights.sum(dim=-1, keepdim=True)


@pytest.mark.parametrize("num_rows", [1, 2, 7, 64])
@pytest.mark.parametrize(("num_experts", "k"), [(8, 2), (4, 1), (5, 3), (2, 2), (1, 1)])
def test_results_equal_transformers_eager_experts(num_rows, num_experts, k) -> None:
    experts = make_experts(num_experts)
    hidden, index, weights = route(num_rows, num_experts, k)
    ours = sorted_experts_forward(experts, hidden, index, weights)
    assert torch.allclose(ours, experts(hidden, index, weights), atol=1e-6)


def test_row10_no_row_is_dropped_when_all_choose_the_same_expert() -> None:
    experts = make_experts(8)
    hidden, _, _ = route(200, 8, 2)
    index = torch.tensor([[5, 2]]).expand(200, 2)
    weights = torch.tensor([[0.75, 0.25]]).expand(200, 2)
    ours = sorted_experts_forward(experts, hidden, index, weights)
    assert torch.allclose(ours, experts(hidden, index, weights), atol=1e-6)


def test_row10_what_batch_mates_choose_does_not_change_a_row() -> None:
    experts = make_experts(8)
    hidden, index, weights = route(64, 8, 2)
    together = sorted_experts_forward(experts, hidden, index, weights)
    for row in (0, 13, 63):
        one = slice(row, row + 1)
        alone = sorted_experts_forward(experts, hidden[one], index[one], weights[one])
        # PyTorch's products round differently for different numbers of rows; nothing else may differ.
        assert torch.allclose(alone, together[one], atol=1e-6)


def test_a_row_that_is_not_finite_stays_alone() -> None:
    experts = make_experts(4)
    hidden, index, weights = route(6, 4, 2)
    hidden[3] = torch.nan
    out = sorted_experts_forward(experts, hidden, index, weights)
    assert out[3].isnan().all()
    assert out[[0, 1, 2, 4, 5]].isfinite().all()


def test_bf16_rows_give_bf16_results_summed_in_fp32() -> None:
    experts = make_experts(4, torch.bfloat16)
    hidden, index, weights = route(16, 4, 2)
    ours = sorted_experts_forward(experts, hidden.bfloat16(), index, weights)
    assert ours.dtype == torch.bfloat16
    exact = sorted_experts_forward(experts.float(), hidden.bfloat16().float(), index, weights)
    assert torch.allclose(ours.float(), exact, atol=0.03)
