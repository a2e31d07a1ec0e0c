"""``MixtralRunner``: one step of the plan through Transformers' Mixtral, and what the plan asked of it.

Owns: the loaded model and its paged KV cache. A step is: lay the plan out as one ragged row, run the inner
model once, compute logits for the rows that need them only, sample, score, pool. Nothing about a request is
kept between steps.

Invariants: one request's non-finite numbers end that request and no other; results stand in the plan's order;
logits are never materialised for more than a bounded number of rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import torch
from transformers import MixtralForCausalLM

from mixtral_serve import __version__
from mixtral_serve.contract import ModelInfo, RunBatch, SamplingParams
from mixtral_serve.kernels.backend import Backend
from mixtral_serve.kernels.names import KernelChoice
from mixtral_serve.kernels.registry import choose
from mixtral_serve.kernels.self_test import settle_isa
from mixtral_serve.model.batch import StepInputs, build_inputs
from mixtral_serve.model.checkpoint import open_checkpoint
from mixtral_serve.model.kv_cache import KVCache, allocate_kv_cache
from mixtral_serve.model.loader import load_model
from mixtral_serve.model.logit_processors import SampleRow
from mixtral_serve.model.logprobs import token_logprobs
from mixtral_serve.model.pooling import pool
from mixtral_serve.model.sampler import NON_FINITE, Sampled, prepare, sample
from mixtral_serve.model.shape import KVDtype, ModelShape, Weights, kv_dtype_for
from mixtral_serve.model.threads import apply_threads, plan_threads
from mixtral_serve.model.wide_rows import finite_rows
from scheduler.events import TokenLogprob
from scheduler.lifecycle import FinishReason
from scheduler.plan import ScheduledSlice, SliceResult, StepResult

_MAX_LOGITS: Final = 8 << 20
"""Logits computed at once for scored prompts (32 MB in fp32)."""

LogitsListener = Callable[[Sequence[ScheduledSlice], torch.Tensor], None]
"""Called once a step with the sampling slices and their raw logits [slices, vocab]; must not change them."""


class MixtralRunner:
    """Implements ``mixtral_serve.contract.Runner``. Not thread-safe: one step at a time.

    Args:
        model: as ``loader.load_model`` returns it.
        shape: its dimensions.
        cache: its KV cache.
        info: what the server tells others about it.
        logits_listener: sees the raw logits of every sampled row.
    """

    def __init__(
        self,
        model: MixtralForCausalLM,
        shape: ModelShape,
        *,
        cache: KVCache,
        info: ModelInfo,
        logits_listener: LogitsListener | None = None,
    ) -> None:
        self._model = model
        self._shape = shape
        self._cache = cache
        self._info = info
        self._logits_listener = logits_listener

    @property
    def info(self) -> ModelInfo:
        """Facts of the model; constant."""
        return self._info

    @property
    def cache(self) -> KVCache:
        """The tensors of keys and values, for measurements and fault injection."""
        return self._cache

    @torch.inference_mode()
    def run(self, batch: RunBatch) -> StepResult:
        """Compute every slice of the plan; see the protocol."""
        slices = batch.plan.slices
        if not slices:
            return StepResult(())
        inputs = build_inputs(batch.plan, self._cache, sliding_window=self._shape.sliding_window)
        hidden = self._forward(inputs)
        sampled = self._sample(batch, inputs, hidden)
        results = []
        for i, part in enumerate(slices):
            result = _token_result(part, sampled.get(i))
            if part.num_logits > part.samples or part.pools:
                rows = hidden[inputs.first_rows[i] : inputs.first_rows[i] + part.num_tokens]
                scores = self._score(part, batch.sampling[i], rows) if part.num_logits else ()
                result = _prompt_result(part, result, scores, rows)
            results.append(result)
        return StepResult(tuple(results))

    def _forward(self, inputs: StepInputs) -> torch.Tensor:
        """Hidden states after the final norm, [rows, hidden]."""
        self._cache.clear(inputs.fresh_blocks)
        output = self._model.model(
            input_ids=inputs.input_ids,
            position_ids=inputs.positions,
            use_cache=False,
            step=inputs.attention,
        )
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Raw logits of ``hidden`` [rows, hidden], fp32."""
        logits: torch.Tensor = self._model.lm_head(hidden)
        return logits.float()

    def _sample(self, batch: RunBatch, inputs: StepInputs, hidden: torch.Tensor) -> dict[int, Sampled]:
        """Index of the slice -> its next token, for slices that sample."""
        slices = batch.plan.slices
        chosen = [i for i, part in enumerate(slices) if part.samples]
        if not chosen:
            return {}
        masks = batch.masks or (None,) * len(slices)
        rows = [SampleRow(batch.sampling[i], slices[i].num_output_tokens, masks[i], slices[i].tokens) for i in chosen]
        prepared = prepare(rows)
        last = torch.tensor([inputs.first_rows[i] + slices[i].num_tokens - 1 for i in chosen])
        logits = self._logits(hidden.index_select(0, last))
        if self._logits_listener is not None:
            self._logits_listener([slices[i] for i in chosen], logits)
        return dict(zip(chosen, sample(logits, prepared), strict=True))

    def _score(
        self, part: ScheduledSlice, params: SamplingParams, hidden: torch.Tensor
    ) -> tuple[TokenLogprob, ...] | None:
        """Log-probabilities of the prompt's tokens that the slice's rows predict; None where they are not finite."""
        num_prompt_tokens = len(part.tokens) - part.num_output_tokens
        first = part.num_tokens - part.num_logits
        end = min(part.num_tokens, num_prompt_tokens - 1 - part.start)
        at_once = max(1, _MAX_LOGITS // self._shape.vocab_size)
        entries: list[TokenLogprob] = []
        for begin in range(first, end, at_once):
            stop = min(begin + at_once, end)
            logits = self._logits(hidden[begin:stop])
            if not all(finite_rows(logits)):
                return None
            targets = list(part.tokens[part.start + begin + 1 : part.start + stop + 1])
            entries.extend(token_logprobs(logits, targets, [params.prompt_logprobs or 0] * len(targets)))
        return tuple(entries)


def _token_result(part: ScheduledSlice, sampled: Sampled | None) -> SliceResult:
    """What came of a slice that at most samples."""
    if sampled is None:
        return SliceResult(part.request_id)
    if sampled.error is not None:
        return _failed(part, sampled.error)
    return SliceResult(part.request_id, sampled.token_id, sampled.logprob)


def _prompt_result(
    part: ScheduledSlice, result: SliceResult, scores: tuple[TokenLogprob, ...] | None, hidden: torch.Tensor
) -> SliceResult:
    """``result`` with what was asked about the prompt; any failure makes it an error and nothing else."""
    if scores is None:
        return _failed(part, NON_FINITE)
    embedding = pool(part, hidden) if part.pools else None
    if part.pools and embedding is None:
        return _failed(part, "the model produced hidden states that are not finite")
    return result if result.error else result._replace(prompt_logprobs=scores, embedding=embedding)


def _failed(part: ScheduledSlice, error: str) -> SliceResult:
    return SliceResult(part.request_id, finish=FinishReason.ERROR, error=error)


@dataclass(frozen=True, slots=True, kw_only=True)
class Numerics:
    """How numbers are held, and what computes with them."""

    weights: Weights = "fp32"
    kernels: KernelChoice = "auto"
    """Which backend computes with packed weights. Weights in fp32 and bf16 are PyTorch's own."""
    kv_cache_dtype: Literal["auto"] | KVDtype = "auto"


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that holds its weights, and what it was loaded with."""

    model: MixtralForCausalLM
    shape: ModelShape
    numerics: Numerics
    backend: Backend | None
    """What computes with packed weights; None for weights in floating point."""


def load_runner(
    checkpoint: Path,
    numerics: Numerics,
    *,
    num_blocks: int,
    block_size: int,
    num_threads: int,
    name: str | None = None,
    logits_listener: LogitsListener | None = None,
) -> MixtralRunner:
    """Load ``checkpoint`` and allocate its KV cache; sets PyTorch's thread count for the process.

    Args:
        checkpoint: a directory in the Hub's layout, or a packed one.
        numerics: how weights, keys and values are held and computed with.
        num_blocks: blocks of the KV cache, the null block included, as the accountant found.
        block_size: positions per block.
        num_threads: most threads to compute with; clipped to what the process may use.
        name: what the model is served as; default: the directory's name.
        logits_listener: see ``MixtralRunner``.

    Raises:
        CheckpointError: the directory cannot be served.
        KernelsUnavailableError, NativeUnavailableError: nothing here computes with such weights, keys and values.
    """
    apply_threads(plan_threads(num_threads))
    settle_isa()
    opened = open_checkpoint(checkpoint)
    shape, weights = opened.shape, numerics.weights
    backend = None
    if weights == "int8" or weights == "int4":
        backend = choose(weights, numerics.kernels, dims=(shape.intermediate_size, shape.hidden_size))
    model = load_model(opened, weights, backend)
    return assemble_runner(
        LoadedModel(model, shape, numerics, backend),
        num_blocks=num_blocks,
        block_size=block_size,
        name=name or checkpoint.resolve().name,
        logits_listener=logits_listener,
    )


def assemble_runner(
    loaded: LoadedModel,
    *,
    num_blocks: int,
    block_size: int,
    name: str,
    logits_listener: LogitsListener | None = None,
) -> MixtralRunner:
    """Give a model a KV cache.

    Args:
        loaded: the model.
        num_blocks: blocks of the KV cache, the null block included.
        block_size: positions per block.
        name: what the model is served as.
        logits_listener: see ``MixtralRunner``.
    """
    shape, numerics, backend = loaded.shape, loaded.numerics, loaded.backend
    weights = numerics.weights
    kv_dtype = kv_dtype_for(weights, numerics.kv_cache_dtype)
    cache = allocate_kv_cache(
        shape,
        num_blocks=num_blocks,
        block_size=block_size,
        dtype=kv_dtype,
        compute_dtype=torch.bfloat16 if weights == "bf16" else torch.float32,
        is_native=(backend is not None and backend.is_row_invariant) or kv_dtype == "int8",
    )
    info = ModelInfo(
        name=name,
        fingerprint=fingerprint(name, numerics, backend),
        vocab_size=shape.vocab_size,
        max_model_len=shape.max_model_len,
        hidden_size=shape.hidden_size,
        eos_token_ids=shape.eos_token_ids,
        num_blocks=num_blocks,
        block_size=block_size,
        weights_bytes=shape.weights_bytes(weights),
        kv_cache_bytes=cache.num_bytes,
    )
    return MixtralRunner(loaded.model, shape, cache=cache, info=info, logits_listener=logits_listener)


def fingerprint(name: str, numerics: Numerics, backend: Backend | None) -> str:
    """Model, weights, keys and values, backend, and whether it keeps the law of equal bits: ``system_fingerprint``.

    ``batchinvariant``: a request's logits have the same bits whatever else is in the batch, however its prompt is cut
    into chunks and for any number of threads. PyTorch's products round differently for different numbers of rows, so
    what computes with them is ``batchvariant``.
    """
    held = f"{numerics.weights}-kv{kv_dtype_for(numerics.weights, numerics.kv_cache_dtype)}"
    if backend is None or backend.name == "torch":
        return f"{name}-{held}-torch{torch.__version__}-batchvariant"
    law = "batchinvariant" if backend.is_row_invariant else "batchvariant"
    return f"{name}-{held}-{backend.name}{__version__}-{law}"
