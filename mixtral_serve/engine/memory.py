"""The belts of the engine's memory: a limit that the kernel keeps, and a watch that acts before it is reached.

Owns: ``MemoryWatch`` (readings in, an opinion out; no clock and no file but what it is handed), ``MemoryGate``,
``release_memory``, ``settle_heap`` and ``limit_data``.

    below high      all is well
    high reached    what can be given back is given back (``shed``); below high again, all is well
    still high      pressure: new requests are refused until memory is below *low*, shedding again meanwhile

Admission by the accountant comes before this and should make it unnecessary; ``RLIMIT_DATA`` comes after it, and turns
what goes beyond the plan into an exception instead of a killed process. The kernel counts private writable mappings
there, touched or not, so the watch looks at whichever is larger, that count or what is resident.

What shedding can give back: the entries of cached prefixes that nobody holds (the KV tensors themselves are
allocated once and never shrink), garbage in cycles, and free pages that the allocator keeps. No request is ended for
memory: what lives was admitted under a plan, and ending it would return little.

Rejected: two thresholds without distance (a server on the edge would refuse every other request); watching with a
thread (it would contend with the step for the interpreter).
"""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from mixtral_serve.engine.errors import MemoryPressure
from mixtral_serve.engine.messages import EngineMemory
from mixtral_serve.machine import CgroupMemory, ProcessMemory, cgroup_memory, process_memory

_YOUNG_OBJECTS: Final = 10_000
"""That are made before a collection looks at them. Python's 700 take a twentieth of a step outside the forward."""
PERIOD_S: Final = 0.1
"""Between two readings; one takes some 60 microseconds."""
CGROUP_PERIOD_S: Final = 0.5
"""Between two readings of the cgroups above; one takes a few hundred microseconds."""
SHED_PERIOD_S: Final = 2.0
"""Between two sheddings while pressure lasts: each looks at every object there is."""


@dataclass(frozen=True, slots=True)
class Watermarks:
    """When pressure begins and when it ends, in bytes."""

    high_bytes: int
    low_bytes: int

    def __post_init__(self) -> None:
        assert 0 < self.low_bytes <= self.high_bytes, "pressure ends below where it begins"

    @classmethod
    def below(cls, limit_bytes: int, slack_bytes: int) -> Watermarks:
        """Marks at a half and at three quarters of ``slack_bytes`` below ``limit_bytes``."""
        return cls(max(1, limit_bytes - slack_bytes // 2), max(1, limit_bytes - 3 * slack_bytes // 4))


class MemoryWatch:
    """Judges memory from readings, and sheds.

    Args:
        marks: for the process's own memory.
        read: the process's memory now; None where it cannot be read, which is never pressure.
        read_cgroups: the cgroups above it that have a limit.
        release: gives free memory back to the system.
        period_s: least time between two readings.
    """

    def __init__(
        self,
        marks: Watermarks,
        *,
        read: Callable[[], ProcessMemory | None] = process_memory,
        read_cgroups: Callable[[], Sequence[CgroupMemory]] = cgroup_memory,
        release: Callable[[], None] | None = None,
        period_s: float = PERIOD_S,
    ) -> None:
        self._marks = marks
        self._read = read
        self._read_cgroups = read_cgroups
        self._release = release or release_memory
        self.period_s = period_s
        self._due_s = float("-inf")
        self._cgroups_due_s = float("-inf")
        self._shed_due_s = float("-inf")
        self._cgroups: Sequence[CgroupMemory] = ()
        self._state = EngineMemory()

    @property
    def state(self) -> EngineMemory:
        """As of the last reading."""
        return self._state

    @property
    def is_under_pressure(self) -> bool:
        """Whether new requests are refused."""
        return self._state.is_under_pressure

    def observe(self, now: float, *, shed: Callable[[], object]) -> bool:
        """Look, if it is time, and shed if needed. Returns whether the opinion changed.

        ``now`` is in monotonic seconds; ``shed`` gives back what the caller can do without.
        """
        if now < self._due_s:
            return False
        self._due_s = now + self.period_s
        before = self._state.is_under_pressure
        if self._look(now) and now >= self._shed_due_s:
            self._shed_due_s = now + SHED_PERIOD_S
            self._cgroups_due_s = now
            shed()
            self._release()
            self._look(now, num_sheddings=1)
        return self._state.is_under_pressure != before

    def relieve(self, now: float) -> None:
        """An allocation has just failed: the next ``observe`` looks at once and sheds if it must."""
        self._due_s = self._shed_due_s = self._cgroups_due_s = now
        self._release()

    def _look(self, now: float, *, num_sheddings: int = 0) -> bool:
        """Take a reading; whether it is above the mark that counts now."""
        if now >= self._cgroups_due_s:
            self._cgroups_due_s = now + CGROUP_PERIOD_S
            self._cgroups = self._read_cgroups()
        last = self._state
        own = self._read() or ProcessMemory(0, 0)
        is_short = self._is_short(own, was_short=last.is_under_pressure)
        self._state = EngineMemory(
            anon_bytes=own.anon_bytes,
            data_bytes=own.data_bytes,
            peak_anon_bytes=max(last.peak_anon_bytes, own.anon_bytes),
            # A first reading above the mark leads to shedding; what is above it still then is pressure.
            is_under_pressure=is_short and (last.is_under_pressure or num_sheddings > 0 or now < self._shed_due_s),
            num_sheddings=last.num_sheddings + num_sheddings,
        )
        return is_short

    def _is_short(self, own: ProcessMemory, *, was_short: bool) -> bool:
        marks = self._marks
        largest = max(own.anon_bytes, own.data_bytes)
        if largest >= (marks.low_bytes if was_short else marks.high_bytes):
            return True
        return any(
            cgroup.used_bytes >= _cgroup_mark(cgroup.limit_bytes, was_short=was_short) for cgroup in self._cgroups
        )


class MemoryGate:
    """Refuses requests while memory is short: for the side that takes them in.

    There the watch is on both processes together; what the engine's own watch sees reaches its client by itself.
    """

    def __init__(self, watch: MemoryWatch, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._watch = watch
        self._clock = clock

    def check(self) -> None:
        """Let one request pass.

        Raises:
            MemoryPressure: memory is short.
        """
        self._watch.observe(self._clock(), shed=_nothing)
        if self._watch.is_under_pressure:
            raise MemoryPressure


def _nothing() -> None:
    """What a process without caches of its own can do without."""


def _cgroup_mark(limit_bytes: int, *, was_short: bool) -> int:
    """Two hundredths below the limit pressure begins, four hundredths below it ends."""
    return limit_bytes - limit_bytes // (25 if was_short else 50)


def release_memory() -> None:
    """Collect garbage and hand free pages back to the system."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:  # glibc has it, musl has not
            trim(0)


def settle_heap() -> None:
    """Release memory, and have later collections of garbage look at little, and seldom.

    For a process that has loaded all it will: what was imported lives as long as the process, and a collection that
    looks at all of it again, some 350,000 objects, holds up a step for 0.2 s. And a step of many requests makes more
    objects than are usually waited for, nearly all of which are gone without a collection when it ends.
    """
    release_memory()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS)


def limit_data(num_bytes: int) -> int:
    """Have the kernel refuse this process more than ``num_bytes`` of private writable memory from now on.

    An allocation beyond it raises ``MemoryError`` (``RuntimeError`` in PyTorch). May be called again, with more or
    less; memory that is held already stays. Returns the limit that holds, which an outer one may keep lower.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    soft = num_bytes if hard == resource.RLIM_INFINITY else min(num_bytes, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    return soft
