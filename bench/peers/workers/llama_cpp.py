"""llama.cpp through llama-cpp-python's low-level interface: ``llama_decode`` with one token of each sequence.

That is what its server does at every step, without the server around it. Decoding sequences keep their prompts in
the KV cache between measurements and are rolled back to them. Settings are llama.cpp's defaults (repacked weights,
flash attention where it chooses so, a KV cache split by sequence), but for one: weights are read into memory, not
mapped, so that no page of them is fetched from disk while the clock runs.

Runs in llama.cpp's environment.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from bench.peers.protocol import Facts, WorkerOptions, decode_prompt, run_worker

_MAX_SEQUENCES = 256
"""llama.cpp's own bound (``LLAMA_MAX_SEQ``)."""
_MAX_BATCH = 2048
_MICRO_BATCH = 512
_END = -1
"""In llama.cpp's ranges of positions: up to the last."""


class LlamaCppError(Exception):
    """llama.cpp refused a call."""


class LlamaCpp:
    """Implements ``bench.peers.protocol.Contender`` for a quantised GGUF file. One sequence more is for prompts."""

    def __init__(self, options: WorkerOptions) -> None:
        llama_cpp.llama_backend_init()
        wanted = llama_cpp.llama_model_default_params()
        _set(wanted, load_mode=llama_cpp.LLAMA_LOAD_MODE_NONE, n_gpu_layers=0)
        self._model = llama_cpp.llama_model_load_from_file(str(options.model).encode(), wanted)
        if not self._model:
            raise LlamaCppError(f"{options.model.name} cannot be loaded")
        settings = llama_cpp.llama_context_default_params()
        num_sequences = min(options.sequences + 1, _MAX_SEQUENCES)
        _set(
            settings,
            n_seq_max=num_sequences,
            n_ctx=options.positions * num_sequences,
            n_batch=_MAX_BATCH,
            n_ubatch=_MICRO_BATCH,
            n_threads=options.threads,
            n_threads_batch=options.threads,
            kv_unified=False,
        )
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise LlamaCppError("no context could be made")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(_MAX_BATCH, 0, 1)
        self._num_threads = options.threads
        self._spare = num_sequences - 1
        self._first_tokens: dict[tuple[int, int], int] = {}
        """(sequence, length of its prompt) -> the token after it; these prompts stand in the cache."""

    @property
    def facts(self) -> Facts:
        """See ``Contender``."""
        system = llama_cpp.llama_print_system_info().decode()
        return Facts(f"llama-cpp-python {llama_cpp.__version__}", {"system": system, "threads": self._num_threads})

    def decode(self, batch: int, steps: int, context: int) -> float:
        """See ``Contender``."""
        if batch > self._spare:
            raise LlamaCppError(f"at most {self._spare} sequences, not {batch}")
        tokens = self._with_prompts(batch, context)
        tokens = self._step(tokens, context)
        began_s = time.perf_counter()
        for step in range(1, steps + 1):
            tokens = self._step(tokens, context + step)
        took_s = time.perf_counter() - began_s
        for sequence in range(batch):
            llama_cpp.llama_memory_seq_rm(self._memory, sequence, context, _END)
        return took_s

    def prefill(self, prompt: list[int]) -> float:
        """See ``Contender``."""
        began_s = time.perf_counter()
        self._prompt(self._spare, prompt)
        took_s = time.perf_counter() - began_s
        llama_cpp.llama_memory_seq_rm(self._memory, self._spare, 0, _END)
        return took_s

    def _with_prompts(self, batch: int, context: int) -> list[int]:
        """The next token of each sequence, whose prompts are in the cache afterwards."""
        for sequence in range(batch):
            if (sequence, context) not in self._first_tokens:
                llama_cpp.llama_memory_seq_rm(self._memory, sequence, 0, _END)
                next_token = self._prompt(sequence, decode_prompt(sequence, context))
                self._first_tokens = {key: token for key, token in self._first_tokens.items() if key[0] != sequence}
                self._first_tokens[sequence, context] = next_token
        return [self._first_tokens[sequence, context] for sequence in range(batch)]

    def _prompt(self, sequence: int, prompt: Sequence[int]) -> int:
        """Compute a whole prompt; the token after it."""
        rows = [(token, position, sequence, position == len(prompt) - 1) for position, token in enumerate(prompt)]
        return self._compute(rows)[0]

    def _step(self, tokens: list[int], position: int) -> list[int]:
        """One token of each sequence, all at the same position; the tokens after them."""
        return self._compute([(token, position, sequence, True) for sequence, token in enumerate(tokens)])

    def _compute(self, rows: Sequence[tuple[int, int, int, bool]]) -> list[int]:
        """The greedy pick after each row (token, position, sequence, whether its logits are wanted) that wants it."""
        batch = self._batch
        if len(rows) > _MAX_BATCH:
            raise LlamaCppError(f"at most {_MAX_BATCH} rows, not {len(rows)}")
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wants_logits) in enumerate(rows):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = wants_logits
        code = llama_cpp.llama_decode(self._context, batch)
        if code:
            raise LlamaCppError(f"llama_decode answered {code}")
        num_logits = sum(wants_logits for *_, wants_logits in rows)
        picked: list[int] = self._logits(num_logits).argmax(axis=1).tolist()
        return picked

    def _logits(self, num_rows: int) -> npt.NDArray[np.float32]:
        """Of the last call, [rows, vocabulary]; overwritten by the next one."""
        pointer = ctypes.cast(llama_cpp.llama_get_logits(self._context), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(pointer, shape=(num_rows, self._vocab_size))


def _set(settings: Any, **values: int) -> None:
    """Set fields of one of llama.cpp's structures, and no others: a structure takes any attribute without a word."""
    known = {name for name, *_ in settings._fields_}
    for name, value in values.items():
        if name not in known:
            raise LlamaCppError(f"this llama.cpp has no setting {name}")
        setattr(settings, name, value)


if __name__ == "__main__":
    run_worker(LlamaCpp)
