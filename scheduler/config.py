"""``SchedulerConfig``: the few numbers that bound a schedule. Frozen; validates itself.

Rejected: a config object that travels everywhere. Only ``Scheduler`` reads this one, and settings of other
rooms are not in it.
"""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.errors import ConfigError


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Bounds of the schedule.

    Raises:
        ConfigError: a field is outside its bounds; the message names it.
    """

    num_blocks: int
    """Blocks in the pool, the null block included. At least 2."""
    block_size: int = 16
    """Tokens per block."""
    max_num_seqs: int = 64
    """Most requests that run at once."""
    max_num_batched_tokens: int = 512
    """Most tokens in one step, over all requests."""
    max_model_len: int = 32768
    """Most tokens (prompt and output) of one request, whatever the pool holds."""
    max_prefill_chunk: int | None = None
    """Most tokens of one request in one step; None leaves only the budget."""
    max_waiting: int = 4096
    """Most requests that wait; beyond it ``add`` raises ``QueueFullError``."""
    enable_prefix_caching: bool = True
    max_preemptions: int = 3
    """After so many preemptions a request resumes only with all the blocks it can ever need pledged to it,
    and is not preempted again."""
    max_overtakes: int = 64
    """How many later arrivals may start (or give up) before a waiting request starts, whatever the policy prefers."""
    cache_seed: bytes = b""
    """Mixed into every block hash: random per process, so that hashes cannot be predicted from outside."""

    def __post_init__(self) -> None:
        self._at_least("num_blocks", 2)
        for name in ("block_size", "max_num_seqs", "max_num_batched_tokens", "max_model_len", "max_waiting"):
            self._at_least(name, 1)
        if self.max_prefill_chunk is not None:
            self._at_least("max_prefill_chunk", 1)
        self._at_least("max_preemptions", 0)
        self._at_least("max_overtakes", 0)
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                "max_num_batched_tokens",
                f"{self.max_num_batched_tokens} is below max_num_seqs ({self.max_num_seqs}): "
                "a full batch of decodes would not fit one step",
            )

    @property
    def max_tokens_per_request(self) -> int:
        """The one formula for what a request may hold: start-up, admission and decode all use it."""
        return min(self.max_model_len, (self.num_blocks - 1) * self.block_size)

    def _at_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value < least:
            raise ConfigError(name, f"must be at least {least}, got {value}")
