"""Restarts slow down in a crash loop and start over after a healthy minute."""

from __future__ import annotations

from mixtral_serve.engine.backoff import RestartBackoff


def test_delays_double_from_half_a_second_up_to_thirty() -> None:
    backoff = RestartBackoff()
    assert [backoff.next_delay_s(0.0) for _ in range(9)] == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]


def test_a_healthy_minute_starts_over_and_less_than_that_does_not() -> None:
    backoff = RestartBackoff()
    for _ in range(3):
        backoff.next_delay_s(0.0)
    backoff.note_ready(100.0)
    assert backoff.next_delay_s(159.0) == 4
    backoff.note_ready(200.0)
    assert backoff.next_delay_s(260.0) == 0.5


def test_an_engine_that_never_came_up_was_not_healthy() -> None:
    backoff = RestartBackoff()
    backoff.note_ready(0.0)
    backoff.next_delay_s(61.0)
    assert backoff.next_delay_s(500.0) == 1.0
