"""The watchdog tells a long step from a dead engine, and sleep from death."""

from __future__ import annotations

from mixtral_serve.engine.watchdog import Health, Watchdog


def watch(dog: Watchdog, start: int, end: int, *, has_work: bool = True, num_ticks: int = 0) -> list[Health]:
    return [dog.observe(float(now), has_work=has_work, num_ticks=num_ticks) for now in range(start, end)]


def test_row38_work_without_a_tick_is_a_stall_and_then_hopeless() -> None:
    dog = Watchdog(stalled_after_s=120, hopeless_after_s=600)
    opinions = watch(dog, 0, 1000)
    assert opinions[119] is Health.HEALTHY
    assert opinions[120] is Health.STALLED
    assert opinions[599] is Health.STALLED
    assert opinions[600] is Health.HOPELESS


def test_row39_a_legal_step_of_ninety_seconds_is_healthy() -> None:
    dog = Watchdog()
    for step in range(5):
        assert set(watch(dog, 90 * step, 90 * (step + 1), num_ticks=step)) == {Health.HEALTHY}


def test_an_idle_engine_is_healthy_for_ever_and_its_idle_time_is_not_held_against_it() -> None:
    dog = Watchdog()
    assert set(watch(dog, 0, 10_000, has_work=False)) == {Health.HEALTHY}
    assert set(watch(dog, 10_000, 10_119)) == {Health.HEALTHY}


def test_one_tick_makes_a_stalled_engine_healthy_again() -> None:
    dog = Watchdog()
    watch(dog, 0, 300)
    assert dog.observe(300.0, has_work=True, num_ticks=1) is Health.HEALTHY
    assert dog.quiet_s == 0


def test_row60_a_suspended_machine_is_not_taken_for_a_dead_engine() -> None:
    dog = Watchdog()
    watch(dog, 0, 10)
    assert dog.observe(100_000.0, has_work=True, num_ticks=0) is Health.HEALTHY
    assert dog.quiet_s == 9 + 5


def test_row64_a_clock_that_jumps_back_changes_nothing() -> None:
    dog = Watchdog()
    watch(dog, 0, 100)
    assert dog.observe(-3600.0, has_work=True, num_ticks=0) is Health.HEALTHY
    assert dog.quiet_s == 99
