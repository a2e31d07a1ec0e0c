"""The two limits are measured on work that is really done."""

from __future__ import annotations

import pytest
import torch

from mixtral_serve.kernels import native
from mixtral_serve.kernels.machine_limits import multiply_registers, read_memory
from mixtral_serve.kernels.native import Isa, limited_to

pytestmark = pytest.mark.skipif(not native.is_available(), reason="the compiled kernels were not built")


@pytest.mark.parametrize("num_words", [16, 1000 * 16, (256 << 10) // 8 * 3 + 32])
def test_every_word_is_read(num_words: int) -> None:
    words = torch.arange(num_words, dtype=torch.int64)
    for isa in Isa:
        with limited_to(isa):
            assert read_memory(words) == int(words.sum())


def test_wider_instructions_count_more_operations_per_round() -> None:
    counts = []
    for isa in Isa:
        with limited_to(isa):
            counts.append(multiply_registers())
    assert all(count > 0 for count in counts)
    there = counts[: native.best_isa() + 1]
    assert sorted(set(there)) == there
