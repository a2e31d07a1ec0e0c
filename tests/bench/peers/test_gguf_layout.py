"""How a GGUF file's tensors come from a checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from bench.peers.gguf_layout import Checkpoint, interleave, stays_float, tensors
from mixtral_serve.model.synthetic import DEMO_SIZED, write_synthetic_checkpoint

Numbers = npt.NDArray[np.float64]


def rotated_by_halves(x: Numbers, angles: Numbers) -> Numbers:
    """Rotary embedding as Transformers applies it to one head: element i turns with element i + half."""
    first, second = np.split(x, 2)
    return np.concatenate([first * np.cos(angles) - second * np.sin(angles),
                           second * np.cos(angles) + first * np.sin(angles)])  # fmt: skip


def rotated_by_pairs(x: Numbers, angles: Numbers) -> Numbers:
    """The same as llama.cpp applies it: element 2i turns with element 2i + 1."""
    even, odd = x[0::2], x[1::2]
    turned = np.empty_like(x)
    turned[0::2] = even * np.cos(angles) - odd * np.sin(angles)
    turned[1::2] = odd * np.cos(angles) + even * np.sin(angles)
    return turned


def test_interleaved_projections_give_the_same_scores_in_both_conventions() -> None:
    generator = np.random.default_rng(0)
    num_heads, head_dim, hidden = 2, 8, 6
    query, key = (generator.integers(0, 50, (num_heads * head_dim, hidden)).astype(np.uint16) for _ in range(2))
    x, y = generator.normal(size=(2, hidden))
    at, of = generator.normal(size=(2, head_dim // 2))
    theirs_query, theirs_key = interleave(query, num_heads), interleave(key, num_heads)
    for head in range(num_heads):
        rows = slice(head * head_dim, (head + 1) * head_dim)
        ours = rotated_by_halves(query[rows] @ x, at) @ rotated_by_halves(key[rows] @ y, of)
        theirs = rotated_by_pairs(theirs_query[rows] @ x, at) @ rotated_by_pairs(theirs_key[rows] @ y, of)
        assert theirs == pytest.approx(ours)


def test_every_tensor_of_a_checkpoint_is_in_the_file_once(tmp_path: Path) -> None:
    write_synthetic_checkpoint(tmp_path, DEMO_SIZED, weights="bf16", max_shard_bytes=1 << 20)
    found = {name: (parts, stacked) for name, parts, stacked in tensors(Checkpoint(tmp_path))}
    assert len(found) == 3 + 10 * DEMO_SIZED.num_layers
    assert sum(part.size for parts, _ in found.values() for part in parts) == DEMO_SIZED.num_parameters
    experts, stacked = found["blk.3.ffn_down_exps.weight"]
    assert stacked
    assert [part.shape for part in experts] == [(256, 128)] * 8
    assert found["output.weight"][0][0].shape == (1536, 256)


def test_norms_and_routers_stay_in_floating_point() -> None:
    names = ("output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_gate_inp.weight")
    assert all(stays_float(name) for name in names)
    assert not any(stays_float(name) for name in ("output.weight", "blk.0.ffn_gate_exps.weight"))


def test_weights_in_another_format_are_refused(tmp_path: Path) -> None:
    write_synthetic_checkpoint(tmp_path, DEMO_SIZED, weights="fp32")
    with pytest.raises(ValueError, match="is F32, expected BF16"):
        Checkpoint(tmp_path)
