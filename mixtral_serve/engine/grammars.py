"""Constrained requests: compiled beside the ticks, masked beside the forward.

Owns: ``Grammars``, the matchers of live requests and the two side threads that work on them. One compiles: a request
whose grammar is not ready is not in the scheduler yet, so no step ever waits for it. One computes masks: ``masks``
starts it on all rows of a step at once and the runner resolves the handles when it has the logits.

A grammar that several requests share (the choices of one call, a schema used again and again) is compiled once while it
stays among the last few; each request goes on from a copy of its own.

Invariants: a matcher has consumed exactly the tokens of its request that were committed, so preemption and recomputing
do not touch it; it is never read by both threads at once, because the step's masks are awaited before ``advance`` goes
on. What fails ends its own request: a mask's error reaches the row that asked for it, and no other.

A request ends with "stop" in the step that completes its grammar: where nothing can follow there is no end-of-sequence
token to wait for, and neither ``min_tokens`` nor ``ignore_eos`` keeps it open. Where the grammar would accept both more
text and the end, end-of-sequence is one of the allowed tokens. Stop strings, stop tokens and ``max_tokens`` end a
request before its grammar is satisfied, as they end any.

Rejected: compiling within the tick (a schema may take some tenths of a second); a blocked state within the scheduler (a
request that is not ready holds nothing, so the scheduler need not know of it).
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from typing import Final, Generic, NamedTuple, TypeVar

from mixtral_serve.contract import TokenMask
from mixtral_serve.text.errors import GrammarError
from mixtral_serve.text.grammar_vocabulary import Matcher, Vocabulary
from scheduler.lifecycle import FinishReason
from scheduler.plan import SliceResult, StepPlan, StepResult

_log = logging.getLogger(__name__)

POLL_S: Final = 0.002
"""How soon to look again for a grammar that is being compiled, where there is nothing else to do."""
_MAX_KEPT: Final = 16
"""Compiled grammars that are kept for the next request with the same."""

T = TypeVar("T")


class Ready(NamedTuple, Generic[T]):
    """A request whose grammar is compiled, or cannot be."""

    held: T
    matcher: Matcher | None
    error: str | None
    """Why there is no matcher."""


class _Compiling(NamedTuple, Generic[T]):
    held: T
    matcher: Future[Matcher]


class _Mask:
    """One row's part of a step's masks."""

    __slots__ = ("_batch", "_index")

    def __init__(self, batch: Future[list[memoryview | GrammarError]], index: int) -> None:
        self._batch = batch
        self._index = index

    def bits(self) -> memoryview:
        """See ``TokenMask``."""
        mask = self._batch.result()[self._index]
        if isinstance(mask, GrammarError):
            raise mask
        return mask


class Grammars(Generic[T]):
    """The matchers of the live requests; ``T`` is what the caller keeps of a request until its grammar is ready."""

    def __init__(
        self,
        new_vocabulary: Callable[[], Vocabulary],
        *,
        compiler: Executor | None = None,
        masker: Executor | None = None,
    ) -> None:
        """``new_vocabulary`` is called when the first grammar comes. Executors: threads of our own by default, which
        start with their first work."""
        self._new_vocabulary = new_vocabulary
        self._vocabulary: Vocabulary | None = None
        self._compiler = compiler or ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")
        self._masker = masker or ThreadPoolExecutor(max_workers=1, thread_name_prefix="mask")
        self._kept: OrderedDict[str, Matcher] = OrderedDict()  # the compiling thread's own
        self._compiling: dict[str, _Compiling[T]] = {}
        self._matchers: dict[str, Matcher] = {}
        self._batch: Future[list[memoryview | GrammarError]] | None = None

    @property
    def compiling_ids(self) -> tuple[str, ...]:
        """Requests that wait for their grammars."""
        return tuple(self._compiling)

    @property
    def held(self) -> tuple[T, ...]:
        """What is kept of them."""
        return tuple([waiting.held for waiting in self._compiling.values()])

    @property
    def has_ready(self) -> bool:
        """Whether ``take_ready`` would return any."""
        return any(waiting.matcher.done() for waiting in self._compiling.values())

    def close(self) -> None:
        """Begin nothing further; the threads end after what they are at. Waits for nobody."""
        for executor in (self._compiler, self._masker):
            executor.shutdown(wait=False, cancel_futures=True)

    def start(self, request_id: str, grammar: str, held: T) -> None:
        """Begin to compile. ``held`` comes back through ``take_ready`` or ``drop``."""
        assert request_id not in self._compiling, "ids are unique among live requests"
        self._compiling[request_id] = _Compiling(held, self._compiler.submit(self._compile, grammar))

    def take_ready(self) -> list[Ready[T]]:
        """The requests whose grammars are done by now, in the order they came."""
        ready: list[Ready[T]] = []
        for request_id in [key for key, waiting in self._compiling.items() if waiting.matcher.done()]:
            waiting = self._compiling.pop(request_id)
            try:
                ready.append(Ready(waiting.held, waiting.matcher.result(), None))
            except GrammarError as error:
                ready.append(Ready(waiting.held, None, f"its grammar cannot be compiled: {error}"))
            except Exception as error:  # noqa: BLE001 - whatever a grammar provokes ends its own request
                _log.exception("the grammar of request %s could not be compiled", request_id)
                ready.append(Ready(waiting.held, None, f"its grammar cannot be compiled: {type(error).__name__}"))
        return ready

    def drop(self, request_id: str) -> T | None:
        """Forget a request that waits for its grammar. None where no such request waits."""
        waiting = self._compiling.pop(request_id, None)
        if waiting is None:
            return None
        waiting.matcher.cancel()
        return waiting.held

    def open(self, request_id: str, matcher: Matcher) -> None:
        """The request may be scheduled from now on."""
        self._matchers[request_id] = matcher

    def forget(self, request_id: str) -> None:
        """The request has ended. Unknown ids are fine."""
        self._matchers.pop(request_id, None)

    def masks(self, plan: StepPlan) -> tuple[TokenMask | None, ...]:
        """Begin to compute what the constrained rows of this step may sample, and the handles on it.

        Aligned with ``plan.slices``; empty where no row is constrained.
        """
        if not self._matchers:
            return ()
        matchers = [self._matchers.get(part.request_id) if part.samples else None for part in plan.slices]
        chosen = [matcher for matcher in matchers if matcher is not None]
        if not chosen:
            return ()
        assert self._vocabulary is not None, "whoever has a matcher has compiled"
        batch = self._batch = self._masker.submit(self._vocabulary.fill, chosen)
        indices = iter(range(len(chosen)))
        return tuple([None if matcher is None else _Mask(batch, next(indices)) for matcher in matchers])

    def advance(self, plan: StepPlan, result: StepResult) -> StepResult:
        """Go on by the step's tokens. STOP where one completes its grammar, ERROR where one does not fit it."""
        if self._batch is None:
            return result
        wait([self._batch])  # a runner that failed has not looked at its masks
        self._batch = None
        replaced: dict[int, SliceResult] = {}
        for index, (part, outcome) in enumerate(zip(plan.slices, result.results, strict=True)):
            matcher = self._matchers.get(part.request_id)
            if matcher is None or outcome.token_id is None or outcome.finish is not None:
                continue  # unconstrained, within its prompt, or over anyway
            try:
                matcher.consume(outcome.token_id)
            except GrammarError as error:
                replaced[index] = SliceResult(
                    part.request_id, finish=FinishReason.ERROR, error=f"its grammar failed: {error}"
                )
            else:
                if matcher.is_complete:
                    replaced[index] = outcome._replace(finish=FinishReason.STOP)
        if not replaced:
            return result
        return StepResult(tuple([replaced.get(i, outcome) for i, outcome in enumerate(result.results)]))

    def _compile(self, grammar: str) -> Matcher:
        """In the compiling thread: a matcher at the beginning of ``grammar``."""
        if self._vocabulary is None:
            self._vocabulary = self._new_vocabulary()
        known = self._kept.get(grammar)
        if known is None:
            known = self._kept[grammar] = self._vocabulary.compile(grammar)
            while len(self._kept) > _MAX_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(grammar)
        return known.copy()
