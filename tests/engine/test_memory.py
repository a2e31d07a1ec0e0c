"""The memory watch: when it sheds, when it refuses, and when it stops refusing."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest

from mixtral_serve.contract import SamplingParams
from mixtral_serve.engine.errors import EngineUnavailable, MemoryPressure, RequestFailed
from mixtral_serve.engine.fakes import FakeScript, Fault, byte_ids
from mixtral_serve.engine.memory import CGROUP_PERIOD_S, SHED_PERIOD_S, MemoryGate, MemoryWatch, Watermarks
from mixtral_serve.engine.messages import Delta
from mixtral_serve.machine import CgroupMemory, ProcessMemory

POISON = byte_ids("!")[0]
PERIOD_S = 0.125
MARKS = Watermarks(high_bytes=100, low_bytes=80)


@dataclass
class World:
    """Memory as a test wants it to be, and what was done about it."""

    anon_bytes: int = 0
    data_bytes: int = 0
    cgroups: list[CgroupMemory] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    freed_by_shedding: int = 0
    num_readings: int = 0

    def watch(self) -> MemoryWatch:
        return MemoryWatch(
            MARKS,
            read=self.read,
            read_cgroups=lambda: self.cgroups,
            release=lambda: self.log.append("release"),
            period_s=PERIOD_S,
        )

    def read(self) -> ProcessMemory:
        self.num_readings += 1
        return ProcessMemory(self.anon_bytes, self.data_bytes)

    def shed(self) -> None:
        self.log.append("shed")
        self.anon_bytes -= self.freed_by_shedding


def test_below_the_mark_nothing_happens_and_the_peak_is_remembered() -> None:
    world = World(anon_bytes=99, data_bytes=60)
    watch = world.watch()
    assert not watch.observe(0.0, shed=world.shed)
    world.anon_bytes = 50
    watch.observe(1.0, shed=world.shed)
    assert (watch.state.anon_bytes, watch.state.data_bytes, watch.state.peak_anon_bytes) == (50, 60, 99)
    assert world.log == []


def test_shedding_comes_first_and_where_it_helps_nobody_is_refused() -> None:
    world = World(anon_bytes=100, freed_by_shedding=10)
    watch = world.watch()
    assert not watch.observe(0.0, shed=world.shed)
    assert world.log == ["shed", "release"], "prefixes first, then what the allocator keeps"
    assert not watch.is_under_pressure
    assert (watch.state.num_sheddings, watch.state.anon_bytes) == (1, 90)


def test_where_shedding_does_not_help_requests_are_refused_until_the_low_mark() -> None:
    world = World(anon_bytes=100)
    watch = world.watch()
    assert watch.observe(0.0, shed=world.shed)
    assert watch.is_under_pressure
    world.anon_bytes = 80
    assert not watch.observe(1.0, shed=world.shed)
    assert watch.is_under_pressure, "between the marks what was, stays"
    world.anon_bytes = 79
    assert watch.observe(2.0, shed=world.shed)
    assert not watch.is_under_pressure
    world.anon_bytes = 99
    assert not watch.observe(3.0, shed=world.shed)
    assert not watch.is_under_pressure


def test_mapped_memory_counts_like_resident_memory() -> None:
    world = World(anon_bytes=10, data_bytes=100)
    watch = world.watch()
    assert watch.observe(0.0, shed=world.shed)
    assert watch.is_under_pressure


def test_readings_and_sheddings_keep_their_distance() -> None:
    world = World(anon_bytes=100)
    watch = world.watch()
    for number in range(round(SHED_PERIOD_S / PERIOD_S)):
        watch.observe(number * PERIOD_S, shed=world.shed)
        watch.observe((number + 0.5) * PERIOD_S, shed=world.shed)
    assert world.log.count("shed") == 1
    assert world.num_readings == round(SHED_PERIOD_S / PERIOD_S) + 1, "one a period, and one more after the shedding"
    watch.observe(SHED_PERIOD_S, shed=world.shed)
    assert world.log.count("shed") == 2


def test_short_again_right_after_a_shedding_that_helped_is_pressure() -> None:
    world = World(anon_bytes=100, freed_by_shedding=10)
    watch = world.watch()
    watch.observe(0.0, shed=world.shed)
    world.anon_bytes = 100
    assert watch.observe(PERIOD_S, shed=world.shed)
    assert watch.is_under_pressure
    assert world.log.count("shed") == 1


def test_row53_a_cgroup_near_its_limit_sheds_and_refuses_before_the_limit() -> None:
    world = World(cgroups=[CgroupMemory("/a/memory.max", 10_000, 9_000), CgroupMemory("/memory.high", 1000, 979)])
    watch = world.watch()
    assert not watch.observe(0.0, shed=world.shed)
    assert world.log == []
    world.cgroups[1] = CgroupMemory("/memory.high", 1000, 980)
    assert watch.observe(CGROUP_PERIOD_S, shed=world.shed)
    assert watch.is_under_pressure
    assert world.log == ["shed", "release"]
    world.cgroups[1] = CgroupMemory("/memory.high", 1000, 960)
    assert not watch.observe(2 * CGROUP_PERIOD_S, shed=world.shed)
    world.cgroups[1] = CgroupMemory("/memory.high", 1000, 959)
    assert watch.observe(3 * CGROUP_PERIOD_S, shed=world.shed)
    assert not watch.is_under_pressure


def test_what_cannot_be_read_is_never_pressure() -> None:
    watch = MemoryWatch(MARKS, read=lambda: None, read_cgroups=list)
    assert not watch.observe(0.0, shed=lambda: None)
    assert not watch.is_under_pressure


def test_the_marks_lie_within_the_slack() -> None:
    assert Watermarks.below(1000, 100) == Watermarks(high_bytes=950, low_bytes=925)
    assert Watermarks.below(10, 100) == Watermarks(1, 1), "a limit below the slack is always pressure"


def test_a_gate_lets_pass_until_memory_is_short() -> None:
    world = World(anon_bytes=10)
    now = 0.0
    gate = MemoryGate(world.watch(), clock=lambda: now)
    gate.check()
    world.anon_bytes = 100
    gate.check()
    now = 1.0
    with pytest.raises(MemoryPressure) as caught:
        gate.check()
    assert isinstance(caught.value, EngineUnavailable)
    assert caught.value.retry_after_s > 0


# In the engine


def test_row53_under_pressure_the_core_forgets_prefixes_and_refuses_what_comes(new_driver: Any) -> None:
    world = World()
    driver = new_driver(memory=world.watch())
    driver.submit("first", "a prompt of several blocks, so that something is cached when it ends")
    driver.run()
    assert driver.scheduler.stats().num_cached_blocks > 0
    driver.submit("running", max_tokens=30, ignore_eos=True)
    driver.tick()
    world.anon_bytes, driver.now = 100, 10.0
    driver.tick()
    assert driver.scheduler.stats().num_cached_blocks <= driver.scheduler.stats().num_used_blocks
    assert driver.last_tick.stats.memory.is_under_pressure
    driver.submit("late")
    driver.tick()
    assert (driver.last("late").refusal, driver.last("late").error) == ("MemoryPressure", "memory pressure")
    driver.run()
    assert driver.end("running") in ("stop", "length"), "what was admitted goes on"
    world.anon_bytes, driver.now = 0, 20.0
    driver.tick()
    driver.submit("again")
    driver.run()
    assert driver.end("again") in ("stop", "length")


def test_an_idle_engine_says_that_pressure_is_over(new_driver: Any) -> None:
    world = World(anon_bytes=100)
    driver = new_driver(memory=world.watch())
    assert driver.core.wait_s is None
    assert driver.tick() is not None, "a change is told although nothing runs"
    assert driver.last_tick.stats.memory.is_under_pressure
    assert driver.core.wait_s == PERIOD_S, "it looks again without being asked"
    assert driver.tick() is None
    world.anon_bytes, driver.now = 0, 5.0
    told = driver.tick()
    assert told is not None
    assert not told.stats.memory.is_under_pressure
    assert driver.core.wait_s is None


def test_row51_a_failed_step_sheds_at_once_if_memory_is_short(new_driver: Any) -> None:
    world = World()
    driver = new_driver(FakeScript(poison={POISON: Fault.RAISE}), memory=world.watch())
    driver.tick()
    world.anon_bytes = 100
    driver.submit("a", "!")
    driver.tick()
    assert driver.end("a") == "error"
    assert world.log == ["release"]
    driver.tick()
    assert world.log == ["release", "release"]
    assert driver.last_tick.stats.memory.is_under_pressure


def test_requests_are_charged_for_the_log_probabilities_they_ask_for(new_driver: Any) -> None:
    rich = SamplingParams(logprobs=20)
    driver = new_driver(FakeScript(requests_budget_bytes=100_000))
    driver.submit("plain", max_tokens=16)
    driver.tick()
    plain = driver.last_tick.stats.reserved_bytes
    driver.submit("rich", max_tokens=16, sampling=rich)
    driver.tick()
    assert driver.last_tick.stats.reserved_bytes - plain == plain + 16 * 20 * 144
    driver.submit("too rich", max_tokens=64, sampling=rich)
    driver.tick()
    assert driver.last("too rich").refusal == "MemoryFullError"


def test_row51_an_allocation_beyond_the_limit_ends_its_request_and_not_the_process(
    run: Any, new_client: Any, submit_of: Any
) -> None:
    script = FakeScript(
        output="fine", poison={POISON: Fault.ALLOCATE}, allocate_bytes=256 << 20, data_headroom_bytes=64 << 20
    )

    async def scenario() -> None:
        async with new_client(script) as client:
            await client.wait_ready()
            pid = client.engine_pid
            for number in range(3):
                (bad,) = client.submit([submit_of(f"bad{number}", "!")])
                with pytest.raises(RequestFailed, match="the request failed in the engine") as caught:
                    await collect(bad)
                assert "MemoryError" in caught.value.detail
                (later,) = client.submit([submit_of(f"later{number}", "x")])
                assert "".join(delta.text for delta in await collect(later)) == "fine"
            assert client.engine_pid == pid

    run(scenario())


def test_row53_a_client_refuses_while_its_engine_is_under_pressure(
    run: Any, new_client: Any, submit_of: Any, until: Any
) -> None:
    async def scenario() -> None:
        async with new_client(FakeScript(output="x", high_water_bytes=1)) as client:
            await client.wait_ready()
            client.submit([submit_of("looks")])
            await until(lambda: client.stats.memory.is_under_pressure)
            with pytest.raises(MemoryPressure):
                client.submit([submit_of("late")])
            assert client.stats.memory.anon_bytes > 1

    run(scenario())


async def collect(stream: Any) -> list[Delta]:
    return [delta async for delta in stream]


LIMITED = """
import torch
from mixtral_serve.engine.memory import limit_data
from mixtral_serve.machine import process_memory

torch.ones(64, 64) @ torch.ones(64, 64)
limit_data(process_memory().data_bytes + (64 << 20))
for make in (lambda: bytearray(256 << 20), lambda: torch.empty(256 << 20, dtype=torch.uint8), lambda: [0] * (40 << 20)):
    try:
        make()
    except (MemoryError, RuntimeError) as error:
        print(type(error).__name__, "allocate" in str(error) or isinstance(error, MemoryError))
print(float((torch.ones(64, 64) @ torch.ones(64, 64)).sum()))
limit_data(1 << 40)
print(len(bytearray(256 << 20)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mappings on Linux only")
def test_row51_beyond_the_limit_python_and_pytorch_raise_and_go_on() -> None:
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "MemoryError True",
        "RuntimeError True",
        "MemoryError True",
        str(64.0 * 64 * 64),
        str(256 << 20),
    ]


LOADED = """
import gc
from mixtral_serve.compose.engine import build_limited_engine
from mixtral_serve.settings import Settings

parts = build_limited_engine(Settings())
print(len(gc.get_objects()))
"""


@pytest.mark.slow
def test_collections_of_garbage_in_a_loaded_engine_look_at_little() -> None:
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 5000
