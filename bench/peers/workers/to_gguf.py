"""A Mixtral checkpoint in the Hub's layout as a GGUF file, and that file quantised by llama.cpp itself.

``python -m bench.peers.workers.to_gguf CHECKPOINT DIRECTORY Q4_0 Q8_0`` writes ``DIRECTORY/Q4_0.gguf`` and so on, in
llama.cpp's environment. Weights stay bf16 on the way; the result is what ``llama-quantize`` makes by default, its
choice of finer types for some tensors included.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

from bench.peers.gguf_layout import Checkpoint, stays_float, tensors

_FILE_TYPES = {"Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0}


def write_gguf(checkpoint: Checkpoint, path: Path) -> None:
    """Write ``path`` in bf16."""
    writer = gguf.GGUFWriter(path, "llama")
    _describe(writer, checkpoint)
    for name, parts, stacked in tensors(checkpoint):
        shape = ((len(parts),) if stacked else ()) + parts[0].shape
        if stays_float(name):
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * math.prod(shape))
        else:
            # Raw tensors are described by their bytes.
            bytes_shape = (*shape[:-1], 2 * shape[-1])
            num_bytes = math.prod(bytes_shape)
            writer.add_tensor_info(name, bytes_shape, np.dtype(np.uint8), num_bytes, gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, parts, _ in tensors(checkpoint):
        whole = np.stack(parts) if len(parts) > 1 else parts[0]
        if stays_float(name):
            writer.write_tensor_data((whole.astype(np.uint32) << 16).view(np.float32))
        else:
            writer.write_tensor_data(np.ascontiguousarray(whole).view(np.uint8))
    writer.close()


def _describe(writer: Any, checkpoint: Checkpoint) -> None:
    """Dimensions and vocabulary."""
    config = checkpoint.config
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(llama_cpp.LLAMA_FTYPE_MOSTLY_BF16)
    words = sorted(checkpoint.words, key=checkpoint.words.__getitem__)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([-float(i) for i in range(len(words))])
    writer.add_token_types([_token_type(word) for word in words])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])


def _token_type(word: str) -> int:
    if word == "<unk>":
        return int(gguf.TokenType.UNKNOWN)
    if word in ("<s>", "</s>"):
        return int(gguf.TokenType.CONTROL)
    return int(gguf.TokenType.BYTE if word.startswith("<0x") else gguf.TokenType.NORMAL)


def quantise(source: Path, target: Path, file_type: str) -> None:
    """Let llama.cpp quantise ``source``.

    Raises:
        RuntimeError: it could not.
    """
    wanted = llama_cpp.llama_model_quantize_default_params()
    wanted.ftype = _FILE_TYPES[file_type]
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), wanted)
    if code:
        raise RuntimeError(f"llama_model_quantize answered {code}")


def main() -> None:
    """Convert once and quantise as often as asked; the bf16 file is removed."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers.workers.to_gguf", description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("directory", type=Path)
    parser.add_argument("file_types", choices=_FILE_TYPES, nargs="+")
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    plain = options.directory / "bf16.gguf"
    write_gguf(Checkpoint(options.checkpoint), plain)
    for file_type in options.file_types:
        partial = options.directory / f"{file_type}.partial"
        quantise(plain, partial, file_type)
        partial.rename(options.directory / f"{file_type}.gguf")
    plain.unlink()


if __name__ == "__main__":
    main()
