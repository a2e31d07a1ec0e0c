"""Which tensors a GGUF file of a Mixtral holds, and how they come from a checkpoint in the Hub's layout.

Owns: the names, the order of rows in rotated projections, and reading bf16 tensors through memory maps (safetensors'
NumPy interface knows no bf16). Needs NumPy only: it runs in llama.cpp's environment and in ours.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_PLAIN = {
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "block_sparse_moe.gate.weight": "ffn_gate_inp.weight",
}
_ROTATED = {
    "self_attn.q_proj.weight": ("attn_q.weight", "num_attention_heads"),
    "self_attn.k_proj.weight": ("attn_k.weight", "num_key_value_heads"),
}
_EXPERTS = {"w1": "ffn_gate_exps.weight", "w2": "ffn_down_exps.weight", "w3": "ffn_up_exps.weight"}
_OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}

Bits = npt.NDArray[np.uint16]
"""bf16 numbers, as they lie in the file."""


class Checkpoint:
    """The bf16 tensors of a checkpoint, mapped."""

    def __init__(self, directory: Path) -> None:
        self.config: dict[str, Any] = json.loads((directory / "config.json").read_text("utf-8"))
        self.words: dict[str, int] = json.loads((directory / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
        self._tensors: dict[str, Bits] = {}
        for file in sorted(directory.glob("*.safetensors")):
            self._tensors |= _mapped(file)

    def __getitem__(self, name: str) -> Bits:
        return self._tensors[name]


def _mapped(file: Path) -> dict[str, Bits]:
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
    header.pop("__metadata__", None)
    found: dict[str, Bits] = {}
    for name, entry in header.items():
        if entry["dtype"] != "BF16":
            raise ValueError(f"{name} is {entry['dtype']}, expected BF16")
        begin = 8 + size + entry["data_offsets"][0]
        found[name] = np.memmap(file, np.uint16, "r", offset=begin, shape=tuple(entry["shape"]))
    return found


def tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, list[Bits], bool]]:
    """Name in GGUF, parts that follow each other in memory, and whether they are stacked to one more dimension."""
    config = checkpoint.config
    for source, name in _OUTER.items():
        yield name, [checkpoint[source]], False
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for source, name in _PLAIN.items():
            yield f"blk.{layer}.{name}", [checkpoint[f"{prefix}.{source}"]], False
        for source, (name, heads) in _ROTATED.items():
            yield f"blk.{layer}.{name}", [interleave(checkpoint[f"{prefix}.{source}"], config[heads])], False
        for source, name in _EXPERTS.items():
            experts = [
                checkpoint[f"{prefix}.block_sparse_moe.experts.{expert}.{source}.weight"]
                for expert in range(config["num_local_experts"])
            ]
            yield f"blk.{layer}.{name}", experts, True


def interleave(weight: Bits, num_heads: int) -> Bits:
    """Rows of each head in llama.cpp's order: the two rows that rotate together stand side by side."""
    rows, columns = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def stays_float(name: str) -> bool:
    """llama.cpp wants norms and routers in fp32."""
    return "norm" in name or "gate_inp" in name
