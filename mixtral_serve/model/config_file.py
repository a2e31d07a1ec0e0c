"""``config.json`` and ``generation_config.json`` of a checkpoint -> ``ModelShape``.

Owns: which fields are taken, and their bounds. The files come from outside, so this is an allow-list: a field
that is not named here reaches nothing. A few fields would change what the model computes or would run code;
those are refused when they are set, not skipped.

Rejected: ``AutoConfig`` and ``MixtralConfig.from_pretrained``, which follow ``auto_map`` to code in the checkpoint
directory and accept any field.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Final, NoReturn

from mixtral_serve.model.errors import CheckpointError
from mixtral_serve.model.shape import ModelShape

CONFIG: Final = "config.json"
GENERATION_CONFIG: Final = "generation_config.json"
MAX_JSON_BYTES: Final = 64 << 20

_REFUSED: Final[dict[str, str]] = {
    "auto_map": "asks for code from the checkpoint, which is never run",
    "quantization_config": "is not supported: the weights must be plain floating point",
    "rope_scaling": "is not supported",
    "attention_bias": "is not supported",
}
_LARGEST: Final = 1 << 31


def read_json(directory: Path, file: str) -> dict[str, object]:
    """One JSON object of the checkpoint.

    Raises:
        CheckpointError: missing, too large, not UTF-8, not JSON, NaN or Infinity in it, or not an object.
    """
    path = directory / file
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(file, f"is larger than {MAX_JSON_BYTES} bytes")
        value = json.loads(path.read_bytes().decode("utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise CheckpointError(file, "is missing") from None
    except OSError as error:
        raise CheckpointError(file, f"cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(file, f"is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(file, "is not a JSON object")
    return value


def read_shape(directory: Path) -> ModelShape:
    """The shape that ``config.json`` declares; weights are not looked at.

    Raises:
        CheckpointError: a file or field is missing, out of bounds or refused; the message names it.
    """
    config = read_json(directory, CONFIG)
    fields = _Fields(config)
    if config.get("model_type") != "mixtral":
        fields.fail("model_type", f"must be 'mixtral', is {str(config.get('model_type'))[:60]!r}")
    for name, problem in _REFUSED.items():
        if config.get(name):
            fields.fail(name, problem)
    if config.get("hidden_act", "silu") != "silu":
        fields.fail("hidden_act", "must be 'silu'")
    hidden_size = fields.count("hidden_size")
    num_query_heads = fields.count("num_attention_heads")
    num_kv_heads = fields.count("num_key_value_heads", default=num_query_heads)
    if num_query_heads % num_kv_heads:
        fields.fail("num_key_value_heads", f"{num_kv_heads} does not divide num_attention_heads ({num_query_heads})")
    head_dim = fields.count("head_dim", default=hidden_size // num_query_heads)
    if head_dim % 2:
        fields.fail("head_dim", f"must be even for rotary positions, is {head_dim}")
    num_experts = fields.count("num_local_experts")
    vocab_size = fields.count("vocab_size")
    return ModelShape(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.count("intermediate_size"),
        num_layers=fields.count("num_hidden_layers"),
        num_query_heads=num_query_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        num_experts=num_experts,
        num_experts_per_token=fields.count("num_experts_per_tok", most=num_experts),
        max_model_len=fields.count("max_position_embeddings"),
        sliding_window=None if config.get("sliding_window") is None else fields.count("sliding_window"),
        rope_theta=_rope_theta(fields),
        rms_norm_eps=fields.positive("rms_norm_eps", default=1e-5),
        tied=fields.flag("tie_word_embeddings"),
        bos_token_id=next(iter(fields.token_ids("bos_token_id", vocab_size)), None),
        eos_token_ids=_eos_token_ids(directory, fields, vocab_size),
    )


def _rope_theta(fields: _Fields) -> float:
    """``rope_theta`` stands at the top in older files, inside ``rope_parameters`` in newer ones."""
    nested = fields.values.get("rope_parameters")
    if nested is None:
        return fields.positive("rope_theta", default=1e6)
    if not isinstance(nested, dict):
        fields.fail("rope_parameters", "must be an object")
    if nested.get("rope_type", "default") != "default":
        fields.fail("rope_parameters", "only rope_type 'default' is supported")
    extra = sorted(set(nested) - {"rope_type", "rope_theta"})
    if extra:
        fields.fail("rope_parameters", f"{extra[0]} is not supported")
    return _Fields(nested).positive("rope_theta", default=1e6)


def _eos_token_ids(directory: Path, fields: _Fields, vocab_size: int) -> tuple[int, ...]:
    """``generation_config.json`` has the last word where it exists: chat models list their end of turn there."""
    if (directory / GENERATION_CONFIG).exists():
        generation = _Fields(read_json(directory, GENERATION_CONFIG), GENERATION_CONFIG)
        ids = generation.token_ids("eos_token_id", vocab_size)
        if ids:
            return ids
    return fields.token_ids("eos_token_id", vocab_size)


class _Fields:
    """Typed access to the fields of one JSON object; every failure names file and field."""

    def __init__(self, values: dict[str, object], file: str = CONFIG) -> None:
        self.values = values
        self.file = file

    def fail(self, name: str, problem: str) -> NoReturn:
        raise CheckpointError(self.file, problem, subject=name)

    def count(self, name: str, *, default: int | None = None, most: int = _LARGEST) -> int:
        """A positive whole number of at most ``most``. Null counts as absent."""
        value = self.values.get(name)
        if value is None:
            value = default
        if value is None:
            self.fail(name, "is missing")
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            self.fail(name, f"must be a whole number from 1 to {most}, is {str(value)[:60]}")
        return value

    def positive(self, name: str, *, default: float) -> float:
        """A finite number above 0."""
        value = self.values.get(name)
        if value is None:
            value = default
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            self.fail(name, f"must be a positive number, is {str(value)[:60]}")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.values.get(name, False)
        if not isinstance(value, bool):
            self.fail(name, "must be true or false")
        return value

    def token_ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """One id, a list of ids, or null for none."""
        value = self.values.get(name)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        for token_id in ids:
            if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < vocab_size:
                self.fail(name, f"must be token ids below vocab_size ({vocab_size})")
        return tuple(dict.fromkeys(ids))


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")
