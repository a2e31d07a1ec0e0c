"""The seam between the engine and a model: ``Runner.run(batch) -> StepResult``, and the values it takes.

Owns: ``SamplingParams``, ``TokenMask``, ``RunBatch``, ``ModelInfo`` and the ``Runner`` protocol. Everything is
frozen; nothing here imports a tensor library, so the engine and its tests run without one.

A runner is stateless between steps as far as requests are concerned: what it needs to know of a request
stands in the slice (tokens, block table, partial embedding) and in its sampling parameters. Only the paged
KV cache outlives a step, and the plan alone says who owns which part of it. That is why there is no
"request finished" call that could be forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from scheduler.plan import ScheduledSlice, StepPlan, StepResult


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. Bounds are checked where requests come in; these are the meanings.

    The token at position ``i`` of choice ``choice`` is a function of the logits, these parameters and
    ``(seed, choice, i)`` only: not of batch-mates, chunking or preemption.
    """

    temperature: float = 1.0
    """0 is greedy: the largest logit, the lowest id among equals."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probability reaches this."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the most likely one."""
    seed: int = 0
    """64-bit; drawn at random by the caller where the client gave none."""
    choice: int = 0
    """Index of this request among the ``n`` choices of one call."""
    logprobs: int | None = None
    """None: none wanted; k: the sampled token's log-probability and the k most likely alternatives."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens."""
    presence_penalty: float = 0.0
    """Taken off the logit of each token that the output holds already."""
    frequency_penalty: float = 0.0
    """Taken off the logit of a token once per time that the output holds it."""
    repetition_penalty: float = 1.0
    """Divides the positive logits, multiplies the negative ones, of tokens that prompt or output hold."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Added to the logits of the named tokens."""
    allowed_token_ids: tuple[int, ...] = ()
    """Where given, no other token is ever sampled."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Sequences of token ids, none empty, that never lie in the output as a whole."""
    min_tokens: int = 0
    """Before so many output tokens none of ``suppressed_token_ids`` is sampled. Both are the engine's to fill, from the
    request's stop rule."""
    suppressed_token_ids: tuple[int, ...] = ()
    """What would end the output: end-of-sequence and the request's stop tokens."""


class TokenMask(Protocol):
    """Which tokens are allowed next: a handle that is resolved after the forward, when the logits are there."""

    def bits(self) -> memoryview:
        """Bit ``i`` of the little-endian bits is token ``i``: set where it may be sampled at this position.

        As many 32-bit words as the vocabulary needs, as bytes. Waits where the mask is still being computed; may raise,
        which ends the row that it is for.
        """
        ...


@dataclass(frozen=True, slots=True)
class RunBatch:
    """One step for a runner. The sequences are aligned with ``plan.slices``."""

    plan: StepPlan
    sampling: tuple[SamplingParams, ...]
    masks: tuple[TokenMask | None, ...] = ()
    """Empty when no slice of the step is constrained."""

    def rows(self) -> Sequence[tuple[ScheduledSlice, SamplingParams]]:
        """The slices with their sampling parameters."""
        return list(zip(self.plan.slices, self.sampling, strict=True))


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the rest of the server must know of a loaded model."""

    name: str
    """Default name it is served under."""
    fingerprint: str
    """Model, weights and backend: OpenAI's ``system_fingerprint``."""
    vocab_size: int
    """Rows of the head: every token id of a request is below it."""
    max_model_len: int
    """Positions the model was made for."""
    eos_token_ids: tuple[int, ...]
    num_blocks: int
    """Blocks of the paged KV cache, the null block included."""
    block_size: int
    weights_bytes: int
    kv_cache_bytes: int
    hidden_size: int = 0
    """Elements of an embedding; 0: the model gives none."""


class Runner(Protocol):
    """Runs the model over one step."""

    @property
    def info(self) -> ModelInfo:
        """Facts of the model; constant."""
        ...

    def run(self, batch: RunBatch) -> StepResult:
        """Compute every slice of the plan: write its keys and values, sample where asked.

        One request's failure (non-finite logits, say) is that slice's result with ``finish=ERROR``. An
        exception means the whole step failed; the engine then ends the requests of the plan and goes on.
        """
        ...
