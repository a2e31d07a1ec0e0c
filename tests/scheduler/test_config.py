"""``SchedulerConfig`` validates itself, and each refusal names its field."""

from __future__ import annotations

import pytest

from scheduler.config import SchedulerConfig
from scheduler.errors import ConfigError


@pytest.mark.parametrize(
    ("field", "least"),
    [
        ("num_blocks", 2),
        ("block_size", 1),
        ("max_num_seqs", 1),
        ("max_model_len", 1),
        ("max_prefill_chunk", 1),
        ("max_waiting", 1),
        ("max_preemptions", 0),
        ("max_overtakes", 0),
    ],
)
def test_each_bound_holds_at_its_edge_and_one_below_is_refused_by_name(field: str, least: int) -> None:
    fields = {"num_blocks": 8}
    assert getattr(SchedulerConfig(**{**fields, field: least}), field) == least
    with pytest.raises(ConfigError, match=f"{field}: must be at least {least}, got {least - 1}") as caught:
        SchedulerConfig(**{**fields, field: least - 1})
    assert caught.value.field == field


def test_a_step_must_hold_one_token_of_every_running_request() -> None:
    SchedulerConfig(num_blocks=8, max_num_seqs=4, max_num_batched_tokens=4)
    with pytest.raises(ConfigError, match="max_num_batched_tokens"):
        SchedulerConfig(num_blocks=8, max_num_seqs=4, max_num_batched_tokens=3)
    with pytest.raises(ConfigError, match="max_num_batched_tokens: must be at least 1"):
        SchedulerConfig(num_blocks=8, max_num_seqs=1, max_num_batched_tokens=0)


def test_i19_one_request_may_hold_what_the_pool_and_the_context_allow_without_the_null_block() -> None:
    assert SchedulerConfig(num_blocks=5, block_size=4).max_tokens_per_request == 16
    assert SchedulerConfig(num_blocks=5, block_size=4, max_model_len=7).max_tokens_per_request == 7


def test_defaults_are_what_the_documentation_says() -> None:
    config = SchedulerConfig(num_blocks=2)
    assert (config.block_size, config.max_num_seqs, config.max_num_batched_tokens) == (16, 64, 512)
    assert (config.max_model_len, config.max_waiting, config.max_prefill_chunk) == (32768, 4096, None)
    assert (config.max_preemptions, config.max_overtakes, config.enable_prefix_caching) == (3, 64, True)
