"""What will need memory besides the KV cache: the rows of the plan, each an upper bound, with its reason.

Owns: the demands of both processes and ``step_bytes``, the bound on what one step of the model takes and gives back.
Pure arithmetic. The bounds are promises that tests hold measurements against: a process's share covers all its private
writable memory, touched or not (what ``RLIMIT_DATA`` counts), and so also all that is resident.

Rejected: measuring at start-up and planning with what was seen. A measured peak is the peak of the load that was
tried; a bound also covers the load that was not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from mixtral_serve.model.shape import KV_BYTES_PER_ELEMENT, KV_SCALE_BYTES, ModelShape, Weights, kv_dtype_for
from mixtral_serve.settings import Settings
from scheduler.accountant import KVLayout, logprob_bytes, request_bytes

ENGINE_PROCESS_BYTES: Final = 450_000_000
"""Interpreter, PyTorch, Transformers and what they allocate on first use; measured at 345 to 390 MB of data."""
THREAD_BYTES: Final = 10_000_000
"""A thread's stack (8 MB by default) and what the allocator and the libraries keep for it."""
API_PROCESS_BYTES: Final = 300_000_000
"""Interpreter, web framework, tokenizer, metrics, connections; measured at 90 to 200 MB."""
PRIMITIVES_BYTES: Final = 200_000_000
"""oneDNN keeps a compiled primitive per shape of a bf16 product; the engine's environment lets it keep 128."""
ARENAS_BYTES: Final = 128_000_000
"""What the allocator may keep at the tops of its two arenas before it gives memory back."""
BLOCK_INDEX_BYTES: Final = 1_000
"""Python's side of one KV block: its place in the free list, its entry in the prefix cache, its hash."""
MAX_LIVE_REQUESTS_BYTES: Final = 2_000_000_000
"""Budget for the structures of live requests; beyond it requests are refused, however few they are. Enough for all
seats of the default settings with a constrained request of common length on each."""
MAX_ALTERNATIVES: Final = 20
"""Log-probabilities that a request may ask for at each position."""

_PAGE_TABLE_SHARE: Final = 512
"""Eight bytes of page table for each page of 4,096."""
_MASK_BYTES: Final = 48 << 20
"""A prefill's mask is made of at most 4 M elements at a time, with its logical parts beside it."""
_SCORING_BYTES: Final = 4 * (32 << 20)
"""Logits of scored prompts are computed in pieces of 32 MB; a piece is held up to four times (softmax, sorting)."""
_SAMPLING_BYTES_PER_LOGIT: Final = 80
"""Ten numbers of eight bytes: exact weights, their order, ranks, cumulative sums and masks of a filtered draw."""
_BIAS_BYTES: Final = 16
"""Per position that a decode looks at: its block, its bias and the comparison that makes it."""
_LEAST_WORKSPACE_BYTES: Final = 16 << 20


@dataclass(frozen=True, slots=True)
class Demands:
    """Everything but the KV cache, in bytes."""

    weights: int
    step: int
    """Activations, logits and workspaces of one step."""
    live_requests: int
    """The accountant's budget for the structures of live requests, on both sides."""
    block_index: int
    engine_process: int
    allocator_slack: int
    """Freed memory that the engine's allocator keeps, and the holes in it."""
    api_process: int
    page_tables: int
    """The kernel's own, for both processes: no process's memory, but a cgroup is charged for it."""

    def named(self, weights: Weights) -> dict[str, int]:
        """The rows of the plan's table."""
        return {
            f"weights ({weights})": self.weights,
            "one step (bound)": self.step,
            "live requests": self.live_requests,
            "KV block index": self.block_index,
            "engine process": self.engine_process,
            "allocator slack": self.allocator_slack,
            "API process": self.api_process,
            "page tables": self.page_tables,
        }


def kv_layout(shape: ModelShape, settings: Settings) -> KVLayout:
    """The KV cache's layout under these settings."""
    dtype = kv_dtype_for(settings.held_weights, settings.kv_cache_dtype)
    return KVLayout(
        shape.num_layers,
        shape.num_kv_heads,
        shape.head_dim,
        KV_BYTES_PER_ELEMENT[dtype],
        settings.block_size,
        KV_SCALE_BYTES[dtype],
    )


def demands_of(settings: Settings, shape: ModelShape, *, max_model_len: int, cap_bytes: int) -> Demands:
    """All demands of a server with these settings under this cap."""
    weights, layout = settings.held_weights, kv_layout(shape, settings)
    step = step_bytes(
        shape,
        weights,
        num_rows=settings.max_num_batched_tokens,
        num_sampled=settings.max_num_seqs,
        num_context_tokens=settings.max_num_seqs * max_model_len,
    )
    step += workspace_bytes(shape, layout, weights)
    primitives = PRIMITIVES_BYTES if weights == "bf16" else 0
    most_kv_bytes = min(cap_bytes, most_kv_tokens(settings, layout, max_model_len) * layout.bytes_per_token)
    without_page_tables = Demands(
        weights=shape.weights_bytes(weights),
        step=step,
        live_requests=live_requests_bytes(settings, max_model_len, cap_bytes),
        block_index=BLOCK_INDEX_BYTES * (most_kv_bytes // layout.bytes_per_block + 2),
        engine_process=ENGINE_PROCESS_BYTES + THREAD_BYTES * settings.threads + primitives,
        allocator_slack=ARENAS_BYTES + step // 4,
        api_process=API_PROCESS_BYTES,
        page_tables=0,
    )
    most_bytes = min(cap_bytes, most_kv_bytes + sum(without_page_tables.named(weights).values()))
    return replace(without_page_tables, page_tables=most_bytes // _PAGE_TABLE_SHARE)


def step_bytes(shape: ModelShape, weights: Weights, *, num_rows: int, num_sampled: int, num_context_tokens: int) -> int:
    """Bound on what one step takes and gives back, in bytes.

    Args:
        shape: the model's dimensions.
        weights: how weights are held.
        num_rows: tokens that are computed.
        num_sampled: rows that get a next token.
        num_context_tokens: positions that the step's decodes look at, summed over them.

    A step is the forward pass, then sampling or scoring. At its widest, among the experts, the forward holds for each
    row and in fp32 (a bf16 value counts twice): the residual, its norm and a few copies of it; per chosen expert the
    row that goes in, the one that comes out, its permuted and its weighted copy; gate and up (and, in FBGEMM, the
    integers they are made of) and their product. Attention is narrower, but its queries, keys and values and their
    rotated halves can overlap with what is left of the layer before. Besides, in bf16 a product may lay out one matrix
    anew. What the forward gives back lies in pieces between what lives on, so the logits are taken to come on top.
    """
    k, hidden = shape.num_experts_per_token, shape.hidden_size
    heads = (shape.num_query_heads + 2 * shape.num_kv_heads) * shape.head_dim
    per_row = (4 * k + 8) * hidden + 5 * k * shape.intermediate_size + 4 * heads
    forward = 4 * num_rows * per_row + _MASK_BYTES + _BIAS_BYTES * num_context_tokens
    if weights == "bf16":
        forward += 2 * hidden * max(2 * shape.intermediate_size, shape.vocab_size)
    logits = max(num_sampled * shape.vocab_size * _SAMPLING_BYTES_PER_LOGIT, _SCORING_BYTES)
    return forward + logits


def workspace_bytes(shape: ModelShape, layout: KVLayout, weights: Weights) -> int:
    """What attention works in and holds all the time.

    PyTorch's operators gather one layer's keys and values of one long request, and convert them where they are not held
    in the dtype that is computed with. The compiled kernels need a few megabytes, and a table of sines and cosines.
    """
    computed_with = 2 if weights == "bf16" else 4
    bytes_per_token = layout.bytes_per_token // layout.num_layers
    if layout.bytes_per_element != computed_with:
        bytes_per_token += 2 * computed_with * layout.num_kv_heads * layout.head_dim
    gathered = (shape.max_model_len + layout.block_size) * bytes_per_token
    return max(gathered, _LEAST_WORKSPACE_BYTES) + 8 * shape.max_model_len * shape.head_dim


def most_kv_tokens(settings: Settings, layout: KVLayout, max_model_len: int) -> int:
    """Tokens for which blocks are wanted.

    More blocks than all seats can fill would only be a larger prefix cache; whoever wants that asks for it.
    """
    if settings.kv_cache_memory_bytes:
        return settings.kv_cache_memory_bytes // layout.bytes_per_token
    return settings.max_num_seqs * max_model_len


def live_requests_bytes(settings: Settings, max_model_len: int, cap_bytes: int) -> int:
    """Budget for live requests: what all seats and places in the queue could need, but a sixteenth of the cap at
    most, and never less than the largest single request."""
    worst = request_bytes(max_model_len, max_model_len, settings.block_size)
    num_live = settings.max_num_seqs + settings.max_num_queued_reqs
    least = worst + logprob_bytes(max_model_len, max_model_len, MAX_ALTERNATIVES)
    return max(least, min(MAX_LIVE_REQUESTS_BYTES, cap_bytes // 16, num_live * worst))
