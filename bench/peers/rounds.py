"""The measurement itself: every contender, every row, again and again, one computing at a time.

Owns: ``Fleet`` (which workers are loaded) and ``measure``. In a round those that stay loaded take turns row by row,
each row beginning with the next one, and sleep in between: a row's figures lie seconds apart, and what drifts is in all
of them alike. Where memory is short, the others are loaded one after another, each for all rows.

Invariant: one contender's failure is a reason in the results and disturbs no other.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

from bench.peers.process import WorkerError, WorkerUnavailableError
from bench.peers.results import MAX_STEPS, Plan, Results, Row, Sample

_MIN_STEPS: Final = 3
_FIRST_STEPS: Final = 2
"""Of the unmeasured decode that tells how long a step takes."""


class Asked(Protocol):
    """What ``measure`` needs of a worker; ``process.Worker`` is one."""

    @property
    def facts(self) -> dict[str, Any]: ...
    @property
    def is_alive(self) -> bool: ...
    @property
    def resident_bytes(self) -> int: ...
    def ask(self, command: dict[str, dict[str, int]]) -> dict[str, Any]: ...
    def sleep(self) -> None: ...
    def wake(self) -> None: ...
    def close(self) -> None: ...


class Fleet:
    """The workers that are loaded.

    Args:
        start: loads a contender's worker; raises ``WorkerError``.
        staying: contenders that stay loaded between their visits, asleep.
    """

    def __init__(self, start: Callable[[str], Asked], staying: frozenset[str]) -> None:
        self._start = start
        self._staying = staying
        self._asleep: dict[str, Asked] = {}

    def stays(self, name: str) -> bool:
        """Whether the contender stays loaded between its visits."""
        return name in self._staying

    @contextlib.contextmanager
    def visit(self, name: str) -> Iterator[_Visit]:
        """The contender's worker, awake; afterwards it sleeps or is gone."""
        visit = _Visit(name, self._start, self._asleep.pop(name, None))
        try:
            yield visit
        finally:
            worker = visit.worker
            if worker is not None and worker.is_alive and self.stays(name):
                worker.sleep()
                self._asleep[name] = worker
            elif worker is not None:
                worker.close()

    def close(self) -> None:
        """End all workers."""
        while self._asleep:
            self._asleep.popitem()[1].close()


class _Visit:
    """One contender's turn; loads its worker when first asked, and anew after it has died."""

    def __init__(self, name: str, start: Callable[[str], Asked], sleeper: Asked | None) -> None:
        self._name = name
        self._start = start
        self._is_asleep = True
        self.worker = sleeper
        self.is_cold = sleeper is None
        """Whether the worker has computed nothing yet."""

    def load(self) -> Asked:
        """The worker, perhaps asleep: one that is loaded sleeps until it is its turn to compute."""
        if self.worker is not None and not self.worker.is_alive:
            self.worker.close()
            self.worker = None
        if self.worker is None:
            self.worker = self._start(self._name)
            self.worker.sleep()
            self._is_asleep = self.is_cold = True
        return self.worker

    def awake(self) -> Asked:
        """The worker, ready to compute."""
        worker = self.load()
        if self._is_asleep:
            worker.wake()
            self._is_asleep = False
        return worker


def measure(
    plan: Plan,
    contenders: Sequence[str],
    fleet: Fleet,
    *,
    read_bandwidth: Callable[[], float],
    lock: Path | None = None,
    note: Callable[[str], None] = lambda _: None,
    on_round: Callable[[Results], None] = lambda _: None,
) -> Results:
    """Run all rounds.

    Args:
        contenders: in the order of the first round.
        fleet: loads them; closed by the caller.
        read_bandwidth: bytes per second of a plain read, measured when called.
        lock: a file to hold, shared while a worker loads and exclusively while it is measured.
        note: told what goes on, a line at a time.
        on_round: given the results so far after every round, so that a run which is broken off leaves something.
    """
    results = Results()
    steps: dict[tuple[str, Row], int] = {}
    for number in range(plan.num_rounds):
        with held(lock):
            results.bandwidth.append(read_bandwidth())
        for name, rows in _turns(plan, contenders, fleet, number):
            if name not in results.failures:
                note(f"round {number + 1} of {plan.num_rounds}, {' and '.join(map(str, rows))}: {name}")
                with fleet.visit(name) as visit:
                    _Turn(plan, name, visit, results, steps, lock).take(rows, number)
        on_round(results)
    return results


def _turns(plan: Plan, contenders: Sequence[str], fleet: Fleet, number: int) -> list[tuple[str, tuple[Row, ...]]]:
    """Who computes what in a round, in order."""
    staying = [name for name in contenders if fleet.stays(name)]
    others = [name for name in contenders if not fleet.stays(name)]
    anew = [(name, plan.rows) for name in _rotated(others, number)]
    turns = anew if number % 2 else []
    for at, row in enumerate(plan.rows):
        turns += [(name, (row,)) for name in _rotated(staying, number + at)]
    return turns if number % 2 else turns + anew


def _rotated(names: Sequence[str], by: int) -> Sequence[str]:
    at = by % max(1, len(names))
    return (*names[at:], *names[:at])


class _Turn:
    """One contender in one round."""

    def __init__(
        self,
        plan: Plan,
        name: str,
        visit: _Visit,
        results: Results,
        steps: dict[tuple[str, Row], int],
        lock: Path | None,
    ) -> None:
        self._plan = plan
        self._name = name
        self._visit = visit
        self._results = results
        self._steps = steps
        self._lock = lock

    def take(self, rows: Sequence[Row], number: int) -> None:
        """Measure each of ``rows`` once. Loading shares the lock with others; measuring does not."""
        with held(self._lock, shared=True):
            is_loaded = self._loaded(self._visit.load) is not None
        if is_loaded:
            with held(self._lock):
                for row in rows:
                    if (self._name, row) not in self._results.row_failures:
                        self._take_row(row, number)

    def _loaded(self, load: Callable[[], Asked]) -> Asked | None:
        """The worker; None if it cannot be loaded, which then stands in the results."""
        try:
            worker = load()
        except (WorkerError, OSError) as error:
            prefix = "not available" if isinstance(error, WorkerUnavailableError) else "failed"
            self._results.failures[self._name] = f"{prefix}: {error}"
            return None
        self._results.facts[self._name] = worker.facts
        return worker

    def _take_row(self, row: Row, number: int) -> None:
        worker = self._loaded(self._visit.awake)
        if worker is None:
            return
        try:
            if self._visit.is_cold:
                self._warm_up(worker)
                self._visit.is_cold = False
            sample = self._sample(worker, row, number)
        except WorkerError as error:
            self._results.row_failures[self._name, row] = f"failed: {error}"
            return
        self._results.samples.setdefault((self._name, row), []).append(sample)
        before = self._results.resident_bytes.get(self._name, 0)
        self._results.resident_bytes[self._name] = max(before, worker.resident_bytes)

    def _warm_up(self, worker: Asked) -> None:
        """A first prompt touches all weights, and makes what is made once."""
        size = max((row.size for row in self._plan.rows if row.kind == "prefill"), default=64)
        worker.ask({"prefill": {"tokens": size, "serial": -1}})

    def _sample(self, worker: Asked, row: Row, number: int) -> Sample:
        if row.kind == "prefill":
            answer = worker.ask({"prefill": {"tokens": row.size, "serial": number}})
        else:
            num_steps = self._steps.get((self._name, row))
            if num_steps is None:
                first = worker.ask(self._decode(row, _FIRST_STEPS))
                num_steps = steps_for(self._plan.seconds, first["seconds"] / _FIRST_STEPS)
                self._steps[self._name, row] = num_steps
            answer = worker.ask(self._decode(row, num_steps))
        return Sample(number, float(answer["seconds"]), int(answer["tokens"]))

    def _decode(self, row: Row, num_steps: int) -> dict[str, dict[str, int]]:
        return {"decode": {"batch": row.size, "steps": num_steps, "context": self._plan.context}}


def steps_for(seconds: float, step_s: float) -> int:
    """How many steps take about ``seconds``, within bounds."""
    return min(MAX_STEPS, max(_MIN_STEPS, math.ceil(seconds / step_s)))


@contextlib.contextmanager
def held(lock: Path | None, *, shared: bool = False) -> Iterator[None]:
    """Hold a lock on a file, if one is given, as ``flock(1)`` does."""
    if lock is None:
        yield
        return
    with lock.open("a") as opened:
        fcntl.flock(opened, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
