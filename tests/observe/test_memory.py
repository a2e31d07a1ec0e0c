"""Memory as observers show it: planned and measured side by side."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from mixtral_serve.contract import ModelInfo
from mixtral_serve.engine.messages import EngineMemory, EngineStats
from mixtral_serve.machine import ProcessMemory
from mixtral_serve.observe.memory import MemoryCollector, MemoryMonitor, PlannedMemory

PLANNED = PlannedMemory(
    cap_bytes=1000,
    cap_name="cap",
    parts={"weights": 300, "kv_cache": 200, "live_requests": 50, "step": 100, "api_process": 90, "page_tables": 2},
    api_bytes=90,
    processes_bytes=740,
)
INFO = ModelInfo(
    name="m",
    fingerprint="f",
    vocab_size=1,
    max_model_len=1,
    eos_token_ids=(2,),
    num_blocks=2,
    block_size=1,
    weights_bytes=299,
    kv_cache_bytes=198,
)


@dataclass
class Engine:
    """An engine as its client shows it."""

    info: ModelInfo | None = None
    stats: EngineStats = field(default_factory=EngineStats)
    engine_pid: int | None = None


@dataclass
class World:
    """Two processes whose memory a test sets."""

    engine: Engine = field(default_factory=Engine)
    memory: dict[Path, ProcessMemory] = field(default_factory=dict)

    def set(self, api_bytes: int, engine_bytes: int) -> None:
        self.engine.engine_pid = 7
        self.memory[Path("/proc/self/status")] = ProcessMemory(api_bytes, api_bytes + 10)
        self.memory[Path("/proc/7/status")] = ProcessMemory(engine_bytes, engine_bytes + 20)

    def monitor(self) -> MemoryMonitor:
        return MemoryMonitor(PLANNED, self.engine, read=self.memory.get)


@pytest.fixture
def world() -> World:
    return World()


def test_a_report_holds_the_plan_against_what_is_measured(world: World) -> None:
    world.set(80, 560)
    world.engine.info = INFO
    world.engine.stats = EngineStats(reserved_bytes=33, memory=EngineMemory(is_under_pressure=True, num_sheddings=4))
    report = world.monitor().report()
    assert report == {
        "cap_bytes": 1000,
        "cap_set_by": "cap",
        "planned_bytes": 742,
        "parts": {
            "weights": {"planned_bytes": 300, "measured_bytes": 299},
            "kv_cache": {"planned_bytes": 200, "measured_bytes": 198},
            "live_requests": {"planned_bytes": 50, "measured_bytes": 33},
            "step": {"planned_bytes": 100, "measured_bytes": None},
            "api_process": {"planned_bytes": 90, "measured_bytes": 80},
            "page_tables": {"planned_bytes": 2, "measured_bytes": None},
        },
        "processes": {
            "api": {"planned_bytes": 90, "anonymous_bytes": 80},
            "engine": {
                "planned_bytes": 650,
                "anonymous_bytes": 560,
                "data_bytes": 580,
                "besides_weights_and_kv_cache_bytes": 560 - 299 - 198,
            },
            "both": {"planned_bytes": 740, "anonymous_bytes": 640, "high_water_bytes": 640},
        },
        "pressure": {"is_under_pressure": True, "num_sheddings": 4},
    }


def test_before_the_engine_is_there_only_the_plan_and_this_process_are_known(world: World) -> None:
    world.set(80, 560)
    world.engine.engine_pid = None
    report = world.monitor().report()
    assert report["parts"]["weights"] == {"planned_bytes": 300, "measured_bytes": None}  # type: ignore[index]
    assert report["processes"]["both"]["anonymous_bytes"] == 80  # type: ignore[index]


def test_the_high_water_mark_stays_when_memory_falls(world: World) -> None:
    world.set(80, 560)
    monitor = world.monitor()
    assert monitor.total() == ProcessMemory(640, 640)
    world.set(10, 20)
    assert (monitor.total().anon_bytes, monitor.peak_bytes) == (30, 640)


def test_the_gauges_say_what_the_report_says(world: World) -> None:
    world.set(80, 560)
    world.engine.info = INFO
    world.engine.stats = EngineStats(memory=EngineMemory(is_under_pressure=True, num_sheddings=4))
    registry = CollectorRegistry()
    registry.register(MemoryCollector(world.monitor()))

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"mixtral_serve_memory_{name}", labels)

    assert value("cap_bytes") == 1000
    assert {part: value("planned_bytes", part=part) for part in PLANNED.parts} == PLANNED.parts
    assert (value("measured_bytes", part="weights"), value("measured_bytes", part="step")) == (299, None)
    assert [value("process_planned_bytes", process=name) for name in ("api", "engine", "both")] == [90, 650, 740]
    assert [value("process_anonymous_bytes", process=name) for name in ("api", "engine", "both")] == [80, 560, 640]
    assert (value("high_water_bytes"), value("pressure"), value("sheddings_total")) == (640, 1, 4)


def test_this_process_is_really_read() -> None:
    assert MemoryMonitor(PLANNED, Engine()).total().anon_bytes > 1 << 20
