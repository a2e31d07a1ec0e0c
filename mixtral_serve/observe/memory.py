"""Memory, planned and measured side by side: for ``GET /memory`` and for Prometheus.

Owns: ``MemoryMonitor``, which reads both processes when it is asked, and keeps the highest sum it has seen, and
``MemoryCollector``, which turns its report into gauges at every scrape.

What can be measured is measured: the weights and the KV cache by the runner that allocated them, the processes by the
kernel. Live requests are shown as the accountant's promises. The other parts of the plan are bounds on what comes and
goes, which no reading can tell apart; together they are the rest of the engine process.

Invariants: the engine's memory is read from outside, so that a step of a minute does not make the numbers old; labels
come from closed sets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from mixtral_serve.contract import ModelInfo
from mixtral_serve.engine.messages import EngineStats
from mixtral_serve.machine import ProcessMemory, process_memory

_NOTHING: Final = ProcessMemory(0, 0)


class MeasuredEngine(Protocol):
    """What a monitor needs of the engine's client."""

    @property
    def info(self) -> ModelInfo | None: ...
    @property
    def stats(self) -> EngineStats: ...
    @property
    def engine_pid(self) -> int | None: ...


@dataclass(frozen=True, slots=True)
class PlannedMemory:
    """The plan in numbers of bytes."""

    cap_bytes: int
    cap_name: str
    parts: Mapping[str, int]
    """By name: weights, kv_cache, live_requests, api_process and whatever else is planned."""
    api_bytes: int
    """The API process's own part."""
    processes_bytes: int
    """What both processes together may hold."""


class MemoryMonitor:
    """Reads memory when asked.

    Args:
        planned: the plan.
        engine: whose process is read, besides this one.
        read: the memory of a process, by its status file.
    """

    def __init__(
        self,
        planned: PlannedMemory,
        engine: MeasuredEngine,
        *,
        read: Callable[[Path], ProcessMemory | None] = process_memory,
    ) -> None:
        self._planned = planned
        self._engine = engine
        self._read = read
        self._peak_bytes = 0

    def processes(self) -> tuple[ProcessMemory, ProcessMemory]:
        """This process and the engine's, now; what cannot be read counts as nothing."""
        pid = self._engine.engine_pid
        own = self._read(Path("/proc/self/status")) or _NOTHING
        engine = _NOTHING if pid is None else self._read(Path(f"/proc/{pid}/status")) or _NOTHING
        self._peak_bytes = max(self._peak_bytes, own.anon_bytes + engine.anon_bytes)
        return own, engine

    def total(self) -> ProcessMemory:
        """Both processes together: what is resident, for both counts."""
        anon_bytes = sum(process.anon_bytes for process in self.processes())
        return ProcessMemory(anon_bytes, anon_bytes)

    def report(self) -> dict[str, object]:
        """Everything, ready for JSON. Sizes are in bytes; ``measured_bytes`` is null where nothing can be measured."""
        own, engine = self.processes()
        planned, stats = self._planned, self._engine.stats
        measured = self.measured_parts(own)
        held = measured.get("weights", 0) + measured.get("kv_cache", 0)
        return {
            "cap_bytes": planned.cap_bytes,
            "cap_set_by": planned.cap_name,
            "planned_bytes": sum(planned.parts.values()),
            "parts": {
                name: {"planned_bytes": num_bytes, "measured_bytes": measured.get(name)}
                for name, num_bytes in planned.parts.items()
            },
            "processes": {
                "api": {"planned_bytes": planned.api_bytes, "anonymous_bytes": own.anon_bytes},
                "engine": {
                    "planned_bytes": planned.processes_bytes - planned.api_bytes,
                    "anonymous_bytes": engine.anon_bytes,
                    "data_bytes": engine.data_bytes,
                    "besides_weights_and_kv_cache_bytes": max(0, engine.anon_bytes - held),
                },
                "both": {
                    "planned_bytes": planned.processes_bytes,
                    "anonymous_bytes": own.anon_bytes + engine.anon_bytes,
                    "high_water_bytes": self._peak_bytes,
                },
            },
            "pressure": {
                "is_under_pressure": stats.memory.is_under_pressure,
                "num_sheddings": stats.memory.num_sheddings,
            },
        }

    def measured_parts(self, own: ProcessMemory) -> dict[str, int]:
        """Parts of the plan that can be measured, given this process's memory."""
        info = self._engine.info
        measured = {"live_requests": self._engine.stats.reserved_bytes, "api_process": own.anon_bytes}
        if info is not None:
            measured |= {"weights": info.weights_bytes, "kv_cache": info.kv_cache_bytes}
        return measured

    @property
    def planned(self) -> PlannedMemory:
        """The plan."""
        return self._planned

    @property
    def peak_bytes(self) -> int:
        """The highest sum of both processes that was seen."""
        return self._peak_bytes

    @property
    def stats(self) -> EngineStats:
        """The engine's numbers as of its last tick."""
        return self._engine.stats


class MemoryCollector(Collector):
    """Gauges of memory, read at every scrape. For ``CollectorRegistry.register``."""

    def __init__(self, monitor: MemoryMonitor) -> None:
        self._monitor = monitor

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """See the library."""
        monitor = self._monitor
        own, engine = monitor.processes()
        planned, measured = monitor.planned, monitor.measured_parts(own)
        yield _gauge("cap_bytes", "What memory was planned under.", {"": planned.cap_bytes})
        yield _gauge("planned_bytes", "The memory plan.", planned.parts)
        sizes = {name: measured[name] for name in planned.parts if name in measured}
        yield _gauge("measured_bytes", "Parts of the memory plan as they are.", sizes)
        shares = {
            "api": planned.api_bytes,
            "engine": planned.processes_bytes - planned.api_bytes,
            "both": planned.processes_bytes,
        }
        yield _gauge("process_planned_bytes", "What the processes may hold.", shares, label="process")
        held = {
            "api": own.anon_bytes,
            "engine": engine.anon_bytes,
            "both": own.anon_bytes + engine.anon_bytes,
        }
        yield _gauge("process_anonymous_bytes", "What the processes hold.", held, label="process")
        yield _gauge("high_water_bytes", "Most that both processes were seen to hold.", {"": monitor.peak_bytes})
        memory = monitor.stats.memory
        yield _gauge("pressure", "1 while requests are refused for memory.", {"": int(memory.is_under_pressure)})
        sheddings = CounterMetricFamily("mixtral_serve_memory_sheddings", "Times that memory was given back early.")
        sheddings.add_metric((), memory.num_sheddings)
        yield sheddings


def _gauge(name: str, text: str, values: Mapping[str, int], *, label: str = "part") -> GaugeMetricFamily:
    """One gauge; ``values`` is by label, and by the empty string for a gauge without one."""
    family = GaugeMetricFamily(f"mixtral_serve_memory_{name}", text, labels=() if "" in values else (label,))
    for value_of, value in values.items():
        family.add_metric((value_of,) if value_of else (), value)
    return family
