"""Who is measured: each contender's worker, environment, number format and memory, and what must be converted first.

Owns: ``CONTENDERS`` and the arithmetic of what fits into memory together. Pure, but for looking whether files are
there.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mixtral_serve.model.shape import ModelShape

OURS: Final = "mixtral-serve"
_OVERHEAD_BYTES: Final = 1_500_000_000
"""Interpreter, libraries, KV cache and activations of a worker, about."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One contender."""

    name: str
    """As the table shows it: the server and its number format."""
    worker: str
    """Module under ``bench.peers.workers``."""
    variant: str
    bytes_per_weight: float
    """Held in memory once loaded."""
    environment: str | None = None
    """Name of its virtual environment; None: the one this runs in."""
    converter_bytes_per_weight: float = 0
    """Held while the slice is converted for it; next to nothing where that is done tensor by tensor."""

    @property
    def is_ours(self) -> bool:
        """Whether it is this project's own."""
        return self.environment is None

    def memory_bytes(self, shape: ModelShape) -> int:
        """What its worker needs, about."""
        return _OVERHEAD_BYTES + int(self.bytes_per_weight * shape.num_parameters)

    def converter_bytes(self, shape: ModelShape) -> int:
        """What its conversion needs, about."""
        return _OVERHEAD_BYTES + int(self.converter_bytes_per_weight * shape.num_parameters)


CONTENDERS: Final = (
    Entry(f"{OURS} int4", "ours", "int4", 0.6),
    Entry(f"{OURS} int8", "ours", "int8", 1.1),
    Entry(f"{OURS} bf16", "ours", "bf16", 2),
    Entry(f"{OURS} fp32", "ours", "fp32", 4),
    Entry("llama.cpp Q4_0", "llama_cpp", "Q4_0", 0.6, "llama"),
    Entry("llama.cpp Q8_0", "llama_cpp", "Q8_0", 1.1, "llama"),
    Entry("vLLM bf16", "vllm_cpu", "bf16", 2.4, "vllm"),
    Entry("Transformers bf16", "transformers_cb", "bf16", 2, "transformers"),
    Entry("Transformers fp32", "transformers_cb", "fp32", 4, "transformers"),
    # The exporter holds the experts three times over: more than 19.8 GB for one layer of true width.
    Entry("OpenVINO int4", "openvino_genai", "int4", 0.6, "openvino", 12),
    Entry("OpenVINO int8", "openvino_genai", "int8", 1.1, "openvino", 12),
)
RATED: Final = (f"{OURS} int4", f"{OURS} int8")
"""Those whose ratios to every peer are reported."""


class SelectionError(Exception):
    """Nobody is called so; the message names those there are."""


def select(only: Sequence[str], known: Sequence[Entry] = CONTENDERS) -> tuple[Entry, ...]:
    """The contenders whose names hold one of the words of ``only``, whatever the case; all, without any.

    Raises:
        SelectionError: a word fits nobody.
    """
    if not only:
        return tuple(known)
    for word in only:
        if not any(word.lower() in entry.name.lower() for entry in known):
            raise SelectionError(f"no contender is called {word!r}; there are {', '.join(e.name for e in known)}")
    return tuple(entry for entry in known if any(word.lower() in entry.name.lower() for word in only))


def python_of(entry: Entry, environments: Path) -> Path:
    """The interpreter that runs its worker."""
    if entry.environment is None:
        return Path(sys.executable)
    return environments / entry.environment / "bin" / "python"


def model_of(entry: Entry, checkpoint: Path) -> Path:
    """The slice in the form that this contender reads, beside the checkpoint."""
    if entry.worker == "llama_cpp":
        return checkpoint.with_name(f"{checkpoint.name}-gguf") / f"{entry.variant}.gguf"
    if entry.worker == "openvino_genai":
        return checkpoint.with_name(f"{checkpoint.name}-openvino-{entry.variant}")
    return checkpoint


def conversion_of(entry: Entry, checkpoint: Path) -> list[str]:
    """Module and arguments that make ``model_of``; empty where the checkpoint itself is read."""
    model = model_of(entry, checkpoint)
    if model == checkpoint:
        return []
    if entry.worker == "llama_cpp":
        return ["bench.peers.workers.to_gguf", str(checkpoint), str(model.parent), entry.variant]
    return ["bench.peers.workers.to_openvino", str(checkpoint), str(model), entry.variant]


def residents(needs: Mapping[str, int], budget_bytes: int) -> tuple[frozenset[str], dict[str, str]]:
    """Who stays loaded through the whole run, and who cannot be loaded at all and why.

    Those that stay leave room for the largest of those that are loaded anew in every round, one at a time; the smaller
    a contender, the sooner it stays.

    Args:
        needs: contender -> bytes.
        budget_bytes: for all workers at once.
    """
    refused = {name: beyond(need, budget_bytes) for name, need in needs.items() if need > budget_bytes}
    ascending = sorted((need, name) for name, need in needs.items() if name not in refused)
    for num_staying in range(len(ascending), 0, -1):
        staying, others = ascending[:num_staying], ascending[num_staying:]
        largest_other = others[-1][0] if others else 0
        if sum(need for need, _ in staying) + largest_other <= budget_bytes:
            return frozenset(name for _, name in staying), refused
    return frozenset(), refused


def beyond(need_bytes: int, budget_bytes: int) -> str:
    """Why something does not run that needs more than there is."""
    return f"needs about {need_bytes / 1e9:.1f} GB of memory, the budget is {budget_bytes / 1e9:.1f} GB"
