"""The memory that the process really takes, watched while it works.

Owns: ``MemoryWatch``. It looks after loading and after every step, outside of what is timed. Anonymous memory is what
the cap is about: pages of files (libraries, for the most part) can be dropped by the kernel at any time. What a step
takes and gives back within itself is between two looks; the kernel's own high-water mark, which counts pages of files
as well, bounds it from above.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mixtral_serve.machine import OWN_STATUS, process_memory


@dataclass(frozen=True, slots=True)
class MemoryPeak:
    """Bytes of one process; None where the kernel does not say."""

    loaded_anon_bytes: int | None
    """Anonymous memory when model and cache were there, before the first step."""
    peak_anon_bytes: int | None
    """The most that was seen after any step."""
    high_water_bytes: int | None
    """The kernel's mark of the most that was ever resident, pages of files included."""
    num_looks: int


class MemoryWatch:
    """Looks at one process."""

    def __init__(self, status: Path = OWN_STATUS) -> None:
        self._status = status
        self._loaded_anon_bytes: int | None = None
        self._peak_anon_bytes: int | None = None
        self._num_looks = 0

    def loaded(self) -> None:
        """Model and cache are there."""
        self.look()
        self._loaded_anon_bytes = self._peak_anon_bytes

    def look(self) -> None:
        """Take the memory of this moment into account."""
        now = process_memory(self._status)
        if now is not None:
            self._num_looks += 1
            self._peak_anon_bytes = max(self._peak_anon_bytes or 0, now.anon_bytes)

    def peak(self) -> MemoryPeak:
        """What was seen so far."""
        return MemoryPeak(self._loaded_anon_bytes, self._peak_anon_bytes, self._high_water(), self._num_looks)

    def _high_water(self) -> int | None:
        try:
            found = re.search(r"^VmHWM:\s+(\d+) kB$", self._status.read_text("ascii", "replace"), re.MULTILINE)
        except OSError:
            return None
        return None if found is None else int(found[1]) * 1024
