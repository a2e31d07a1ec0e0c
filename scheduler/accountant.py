"""The memory accountant: what fits under the cap, and who holds how much of it. Pure arithmetic, in bytes.

Two parts. ``plan_memory`` is asked once, before anything is loaded: given the cap, the model's KV layout and
everything else that will need memory, how many KV blocks are left? If the answer is too few it refuses, with a
table of what was asked and what is there. ``MemoryAccountant`` is asked all the time: it holds named
reservations, takes back each exactly once, and never promises more than its budget.

Nothing here measures; it is the promise that measurements are held against. The cap is decimal: 90 GB is
90,000,000,000 bytes (83.8 GiB).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NewType

from scheduler.errors import AccountingError, ConfigError, MemoryFullError, PlanError

DEFAULT_CAP_BYTES: Final = 90_000_000_000

REQUEST_OVERHEAD_BYTES: Final = 8192
"""Python objects of one live request on both sides of the engine: state, view, queue, stream, parameters."""
QUEUED_TOKEN_BYTES: Final = 512
"""One generated token on its way to a client that does not read: delta, text and log-probability."""
LOGPROB_BYTES: Final = 256
"""A prompt token's log-probability: the entry and its place in a list."""
ALTERNATIVE_BYTES: Final = 144
"""One alternative in such an entry: a pair, an id and a number, as Python holds them."""

ReservationId = NewType("ReservationId", int)


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The shape of a model's KV cache."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    bytes_per_element: int
    block_size: int
    """Tokens per block."""
    scale_bytes: int = 0
    """What a head's keys, and its values, of one token need besides their elements: the scale of quantised ones."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_kv_heads", "head_dim", "bytes_per_element", "block_size"):
            if getattr(self, name) < 1:
                raise ConfigError(name, f"must be at least 1, got {getattr(self, name)}")
        if self.scale_bytes < 0:
            raise ConfigError("scale_bytes", f"must not be negative, got {self.scale_bytes}")

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of one token in all layers, with their scales."""
        return 2 * self.num_layers * self.num_kv_heads * (self.head_dim * self.bytes_per_element + self.scale_bytes)

    @property
    def bytes_per_block(self) -> int:
        return self.bytes_per_token * self.block_size


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How the cap is spent. ``num_blocks`` includes the null block."""

    cap_bytes: int
    demands: Mapping[str, int]
    """Everything but KV, by name, in bytes."""
    num_blocks: int
    layout: KVLayout
    cap_name: str = "cap"
    """What sets the cap."""

    @property
    def kv_cache_bytes(self) -> int:
        return self.num_blocks * self.layout.bytes_per_block

    @property
    def planned_bytes(self) -> int:
        """All of it; at most the cap."""
        return sum(self.demands.values()) + self.kv_cache_bytes

    @property
    def num_kv_tokens(self) -> int:
        """Tokens that the usable blocks hold."""
        return (self.num_blocks - 1) * self.layout.block_size

    def num_requests_of(self, num_tokens: int) -> int:
        """How many requests of ``num_tokens`` tokens (prompt and output) the KV cache holds at once."""
        return (self.num_blocks - 1) // -(-num_tokens // self.layout.block_size)

    def table(self) -> str:
        """For people: one row per demand, the KV cache, the sum and the cap."""
        kv_name = f"KV cache ({self.num_blocks:,} blocks, {self.num_kv_tokens:,} tokens)"
        return _table([*self.demands.items(), (kv_name, self.kv_cache_bytes)], self.cap_bytes, self.cap_name)


def plan_memory(
    cap_bytes: int,
    layout: KVLayout,
    demands: Mapping[str, int],
    *,
    min_tokens: int,
    max_tokens: int | None = None,
    cap_name: str = "cap",
) -> MemoryPlan:
    """Divide the cap: first the demands, then as many KV blocks as fit (at most for ``max_tokens`` tokens).

    ``min_tokens`` is the least that the KV cache must hold; ``cap_name`` says in tables what sets the cap.

    Raises:
        ConfigError: a demand is negative.
        PlanError: the demands, or the demands and ``min_tokens`` tokens of KV, exceed the cap.
    """
    for name, num_bytes in demands.items():
        if num_bytes < 0:
            raise ConfigError(name, f"must not be negative, got {num_bytes}")
    num_min_blocks = -(-min_tokens // layout.block_size) + 1
    num_blocks = max(0, (cap_bytes - sum(demands.values())) // layout.bytes_per_block)
    if num_blocks < num_min_blocks:
        kv_name = f"KV cache (at least {num_min_blocks:,} blocks for {min_tokens:,} tokens)"
        rows = [*demands.items(), (kv_name, num_min_blocks * layout.bytes_per_block)]
        raise PlanError(f"the memory plan does not fit under the {cap_name}\n" + _table(rows, cap_bytes, cap_name))
    if max_tokens is not None:
        num_blocks = max(num_min_blocks, min(num_blocks, -(-max_tokens // layout.block_size) + 1))
    return MemoryPlan(cap_bytes, dict(demands), num_blocks, layout, cap_name)


def request_bytes(num_prompt_tokens: int, max_tokens: int, block_size: int) -> int:
    """Upper bound of one live request's structures outside the KV cache, on both sides of the engine.

    The prompt is held three times as 4-byte ids (the message, the request, the growing token array); each
    block costs a table entry and a chain hash; each token of output may wait for its client.
    """
    num_tokens = num_prompt_tokens + max_tokens
    num_blocks = -(-num_tokens // block_size)
    return (
        REQUEST_OVERHEAD_BYTES
        + 8 * num_prompt_tokens
        + 4 * num_tokens
        + 160 * num_blocks
        + QUEUED_TOKEN_BYTES * max_tokens
    )


def logprob_bytes(num_scored_tokens: int, num_output_tokens: int, num_alternatives: int) -> int:
    """What log-probabilities add to ``request_bytes``: entries of the prompt, and alternatives everywhere.

    They are held until the client has read them, and a client may read nothing before the end.
    """
    alternatives = ALTERNATIVE_BYTES * num_alternatives
    return num_scored_tokens * (LOGPROB_BYTES + alternatives) + num_output_tokens * alternatives


@dataclass(frozen=True, slots=True)
class MemoryStats:
    """Reservations at one moment, in bytes."""

    budget_bytes: int
    reserved_bytes: int
    num_reservations: int
    by_name: Mapping[str, int]

    @property
    def available_bytes(self) -> int:
        return self.budget_bytes - self.reserved_bytes


class MemoryAccountant:
    """Named reservations under a budget."""

    def __init__(self, budget_bytes: int) -> None:
        if budget_bytes < 0:
            raise ConfigError("budget_bytes", f"must not be negative, got {budget_bytes}")
        self._budget_bytes = budget_bytes
        self._reserved_bytes = 0
        self._by_name: dict[str, int] = {}
        self._reservations: dict[ReservationId, tuple[str, int]] = {}
        self._next_id = 0

    @property
    def available_bytes(self) -> int:
        """What can still be reserved."""
        return self._budget_bytes - self._reserved_bytes

    @property
    def reserved_bytes(self) -> int:
        """What is set aside now."""
        return self._reserved_bytes

    def reserve(self, name: str, num_bytes: int) -> ReservationId:
        """Set ``num_bytes`` aside under ``name`` (many reservations may share one).

        Raises:
            ConfigError: ``num_bytes`` is negative.
            MemoryFullError: the budget does not allow it. Nothing changed.
        """
        if num_bytes < 0:
            raise ConfigError(name, f"must not be negative, got {num_bytes}")
        if num_bytes > self.available_bytes:
            raise MemoryFullError(name, num_bytes, self.available_bytes)
        reservation_id = ReservationId(self._next_id)
        self._next_id += 1
        self._reservations[reservation_id] = (name, num_bytes)
        self._reserved_bytes += num_bytes
        self._by_name[name] = self._by_name.get(name, 0) + num_bytes
        return reservation_id

    def release(self, reservation_id: ReservationId) -> None:
        """Give a reservation back.

        Raises:
            AccountingError: it was given back before, or never made. Nothing changed.
        """
        if reservation_id not in self._reservations:
            raise AccountingError(f"reservation {reservation_id} is not held")
        name, num_bytes = self._reservations.pop(reservation_id)
        self._reserved_bytes -= num_bytes
        rest = self._by_name.pop(name, 0) - num_bytes
        if rest:
            self._by_name[name] = rest

    def stats(self) -> MemoryStats:
        """A snapshot."""
        return MemoryStats(self._budget_bytes, self._reserved_bytes, len(self._reservations), dict(self._by_name))


def _table(rows: Sequence[tuple[str, int]], cap_bytes: int, cap_name: str) -> str:
    total = sum(num_bytes for _, num_bytes in rows)
    verdict = "left under the cap" if total <= cap_bytes else "MISSING"
    lines = [*rows, ("sum", total), (cap_name, cap_bytes), (verdict, abs(cap_bytes - total))]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"  {name:<{width}}  {num_bytes / 1e9:>9.3f} GB" for name, num_bytes in lines)
