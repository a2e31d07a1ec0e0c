"""The measurement: who is asked what and when, and what becomes of those who fail."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.peers.process import WorkerError, WorkerUnavailableError
from bench.peers.results import MAX_STEPS, Plan, Results, Row
from bench.peers.rounds import Fleet, held, measure, steps_for

ONE, FOUR, PROMPT = Row("decode", 1), Row("decode", 4), Row("prefill", 512)


class FakeWorker:
    """A loaded contender: a decode step takes 0.1 s, a prompt 1 ms per token; writes down what happens to it."""

    def __init__(self, name: str, diary: list[str]) -> None:
        self.name = name
        self.diary = diary
        self.facts = {"version": f"{name} 1.0"}
        self.resident_bytes = 1000
        self.is_alive = True
        self.dies_at: int | None = None
        self.refuses: int | None = None

    def ask(self, command: dict[str, dict[str, int]]) -> dict[str, Any]:
        ((verb, arguments),) = command.items()
        self.diary.append(f"{self.name} {verb} {' '.join(str(value) for value in arguments.values())}")
        if verb == "prefill":
            return {"seconds": arguments["tokens"] / 1000, "tokens": arguments["tokens"]}
        if arguments["batch"] == self.dies_at:
            self.is_alive = False
            raise WorkerError("killed by SIGKILL")
        if arguments["batch"] == self.refuses:
            raise WorkerError("ValueError: too many")
        return {"seconds": 0.1 * arguments["steps"], "tokens": arguments["batch"] * arguments["steps"]}

    def sleep(self) -> None:
        self.diary.append(f"{self.name} sleeps")

    def wake(self) -> None:
        self.diary.append(f"{self.name} wakes")

    def close(self) -> None:
        self.is_alive = False
        self.diary.append(f"{self.name} ends")


class World:
    """Starts fake workers as told."""

    def __init__(self, staying: tuple[str, ...] = ()) -> None:
        self.diary: list[str] = []
        self.prepare: Callable[[FakeWorker], None] = lambda _: None
        self.refused: dict[str, WorkerError] = {}
        self.fleet = Fleet(self.start, frozenset(staying))

    def start(self, name: str) -> FakeWorker:
        if name in self.refused:
            raise self.refused[name]
        self.diary.append(f"{name} loads")
        worker = FakeWorker(name, self.diary)
        self.prepare(worker)
        return worker

    def measure(self, *contenders: str, rows: tuple[Row, ...] = (ONE,), rounds: int = 1) -> Results:
        plan = Plan(rows, rounds, context=17, seconds=2.0)
        return measure(plan, contenders, self.fleet, read_bandwidth=lambda: 30e9)


def test_a_cold_worker_is_warmed_up_and_its_steps_are_chosen_by_their_length() -> None:
    world = World()
    results = world.measure("a", rows=(FOUR, PROMPT))
    assert world.diary == [
        "a loads",
        "a sleeps",
        "a wakes",
        "a prefill 512 -1",
        "a decode 4 2 17",
        "a decode 4 20 17",
        "a prefill 512 0",
        "a ends",
    ]
    assert results.tokens_per_s("a", FOUR) == pytest.approx(40)
    assert results.tokens_per_s("a", PROMPT) == pytest.approx(1000)
    assert results.facts["a"] == {"version": "a 1.0"}
    assert results.resident_bytes["a"] == 1000
    assert results.bandwidth == [30e9]


def test_rounds_begin_with_one_contender_after_the_other() -> None:
    world = World(staying=("a", "b", "c"))
    results = world.measure("a", "b", "c", rounds=3)
    visits = [line.split()[0] for line in world.diary if line.endswith("wakes")]
    assert visits == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert [sample.round for sample in results.samples["b", ONE]] == [0, 1, 2]
    assert len(results.bandwidth) == 3


def test_those_that_stay_take_turns_row_by_row_and_the_others_do_all_rows_at_once() -> None:
    world = World(staying=("a", "b"))
    results = world.measure("a", "x", "b", rows=(ONE, FOUR), rounds=2)
    asked = [line.split() for line in world.diary if " decode " in line and " 20 " in line]
    first = [("a", "1"), ("b", "1"), ("b", "4"), ("a", "4"), ("x", "1"), ("x", "4")]
    second = [("x", "1"), ("x", "4"), ("b", "1"), ("a", "1"), ("a", "4"), ("b", "4")]
    assert [(name, batch) for name, _, batch, *_ in asked] == [*first, *second]
    assert all(len(samples) == 2 for samples in results.samples.values())


def test_those_that_stay_sleep_between_their_turns_and_the_others_are_loaded_anew() -> None:
    world = World(staying=("a",))
    world.measure("a", "b", rounds=2)
    happened = [line for line in world.diary if line.split()[1] in ("loads", "sleeps", "wakes", "ends")]
    assert happened == [
        *("a loads", "a sleeps", "a wakes", "a sleeps"),
        *("b loads", "b sleeps", "b wakes", "b ends"),
        *("b loads", "b sleeps", "b wakes", "b ends"),
        *("a wakes", "a sleeps"),
    ]
    world.fleet.close()
    assert world.diary[-1] == "a ends"


def test_a_row_that_fails_is_not_tried_again_and_disturbs_no_other() -> None:
    world = World(staying=("a",))
    world.prepare = lambda worker: setattr(worker, "refuses", 4)
    results = world.measure("a", rows=(ONE, FOUR, PROMPT), rounds=2)
    assert results.row_failures == {("a", FOUR): "failed: ValueError: too many"}
    assert len(results.samples["a", ONE]) == len(results.samples["a", PROMPT]) == 2
    assert sum("decode 4" in line for line in world.diary) == 1
    assert results.reason("a") is None


def test_a_worker_that_dies_is_loaded_again_for_the_next_row() -> None:
    world = World(staying=("a",))
    world.prepare = lambda worker: setattr(worker, "dies_at", 1)
    results = world.measure("a", "b", rows=(ONE, FOUR))
    assert results.row_failures["a", ONE] == "failed: killed by SIGKILL"
    assert world.diary.count("a loads") == 2
    assert world.diary.count("a prefill 64 -1") == 2, "both processes were warmed up"
    assert len(results.samples["a", FOUR]) == 1
    assert world.diary[-1] == "b ends"


def test_who_cannot_be_loaded_is_a_reason_and_is_not_visited_again() -> None:
    world = World()
    world.refused = {"a": WorkerError("ImportError: no"), "b": WorkerUnavailableError("no such weights")}
    results = world.measure("a", "b", "c", rounds=2)
    assert results.failures == {"a": "failed: ImportError: no", "b": "not available: no such weights"}
    assert results.reason("a") == "failed: ImportError: no"
    assert len(results.samples["c", ONE]) == 2


def test_what_was_measured_is_handed_out_after_every_round() -> None:
    world = World()
    counts: list[int] = []
    plan = Plan((ONE,), 3, context=17, seconds=2.0)
    measure(
        plan,
        ["a"],
        world.fleet,
        read_bandwidth=lambda: 30e9,
        on_round=lambda results: counts.append(len(results.samples["a", ONE])),
    )
    assert counts == [1, 2, 3]


def test_nobody_to_measure_still_tells_of_the_machine() -> None:
    assert World().measure(rounds=2).bandwidth == [30e9, 30e9]


@pytest.mark.parametrize(("step_s", "steps"), [(0.001, MAX_STEPS), (0.1, 20), (0.3, 7), (10.0, 3)])
def test_steps_fill_the_time_within_bounds(step_s: float, steps: int) -> None:
    assert steps_for(2.0, step_s) == steps


def test_sequences_have_room_for_prompt_steps_and_a_late_start() -> None:
    plan = Plan((ONE, Row("decode", 64), PROMPT), 3, context=17, seconds=2.0)
    assert plan.most_sequences == 64
    assert plan.most_positions == 520
    assert Plan((ONE,), 3, context=1000, seconds=2.0).most_positions > 1000 + MAX_STEPS
    assert Plan((PROMPT,), 3, context=17, seconds=2.0).most_sequences == 1


def test_others_may_compute_while_a_worker_loads_and_not_while_it_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    world = World()
    free: dict[str, bool] = {}

    def others_may_compute() -> bool:
        with path.open("a") as other:
            try:
                fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    class Watching(FakeWorker):
        def ask(self, command: dict[str, dict[str, int]]) -> dict[str, Any]:
            free["measuring"] = others_may_compute()
            return super().ask(command)

    def start(name: str) -> FakeWorker:
        free["loading"] = others_may_compute()
        return Watching(name, world.diary)

    plan = Plan((ONE,), 1, context=17, seconds=2.0)
    measure(plan, ["a"], Fleet(start, frozenset()), read_bandwidth=lambda: 1.0, lock=path)
    assert free == {"loading": True, "measuring": False}


def test_who_cannot_be_loaded_in_a_later_round_keeps_what_was_measured() -> None:
    world = World()
    world.prepare = lambda worker: world.refused.update({worker.name: WorkerError("no room")})
    results = world.measure("a", rounds=2)
    assert len(results.samples["a", ONE]) == 1
    assert results.reason("a") is None
    assert results.failures["a"] == "failed: no room"


def test_a_lock_is_shared_or_exclusive_and_given_back(tmp_path: Path) -> None:
    path = tmp_path / "lock"

    def is_free(mode: int) -> bool:
        with path.open("a") as other:
            try:
                fcntl.flock(other, mode | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    with held(path, shared=True):
        assert is_free(fcntl.LOCK_SH)
        assert not is_free(fcntl.LOCK_EX)
    with held(path):
        assert not is_free(fcntl.LOCK_SH)
    assert is_free(fcntl.LOCK_EX)
    with held(None):
        assert is_free(fcntl.LOCK_EX)
