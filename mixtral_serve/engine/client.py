"""``EngineClient``: the API process's face of the engine. Submits requests, feeds token streams, keeps an engine alive.

Owns: the engine process (through ``EngineProcess``), the token streams of all live requests, the engine's
state as seen from here, and the restarts.

    LOADING ──► READY ◄──► RESTARTING     an engine that dies is started again, after a pause that doubles
       │          │            │
       ├──────────┼────────────┼──► DEAD  the engine says that it cannot start as configured
       └──► DRAINING ◄─────────┘
               └──────────────────► DEAD  stopped

(LOADING goes to RESTARTING too, when the first engine dies before it is ready.)

Invariants: every accepted request ends in exactly one delta with a finish reason, on its stream and at the listeners
alike, also when the engine dies (then the client writes it, with "error"); nothing here waits for a reader; listeners
run after the streams were fed, and what they raise is logged and goes no further. Lives on one event loop and
is not thread-safe.

Rejected: pausing the engine for a slow consumer (its blocks would be held by the slowest client of all),
re-sending requests after a crash (their clients have seen half an answer), a thread for the socket.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, ParamSpec

from mixtral_serve.contract import ModelInfo
from mixtral_serve.engine.admission import FinishRate, check_submits, num_waiting
from mixtral_serve.engine.backoff import RestartBackoff
from mixtral_serve.engine.ending import ENGINE_DIED, SHUTTING_DOWN, error_of
from mixtral_serve.engine.errors import (
    EXIT_CONFIG,
    EngineError,
    EngineStartError,
    EngineUnavailable,
    MemoryPressure,
    QueueFull,
)
from mixtral_serve.engine.inspection import Inspections, RequestTable
from mixtral_serve.engine.launch import EngineLaunch, EngineProcess
from mixtral_serve.engine.listener import EngineListener, EngineState
from mixtral_serve.engine.messages import (
    Cancel,
    Command,
    Delta,
    EngineStats,
    Failed,
    Inbox,
    Outbox,
    Ready,
    Shutdown,
    Submit,
    Tick,
)
from mixtral_serve.engine.stream import TokenStream
from mixtral_serve.engine.watchdog import Health, Watchdog
from scheduler.lifecycle import FinishReason

P = ParamSpec("P")

_log = logging.getLogger(__name__)

_SHUTDOWN_GRACE_S: Final = 3.0
"""How long the engine may take to end after ``Shutdown``; a step cannot be interrupted otherwise."""
_LOADING_RETRY_AFTER_S: Final = 5.0
_GONE_RETRY_AFTER_S: Final = 30.0


class EngineClient:
    """Owns the engine process: spawns it, submits, routes deltas to streams, sees it die, restarts it."""

    def __init__(
        self,
        launch: EngineLaunch,
        *,
        max_waiting: int,
        max_num_seqs: int = 64,
        listeners: Sequence[EngineListener] = (),
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        watchdog: Watchdog | None = None,
    ) -> None:
        """``max_waiting`` bounds the requests that wait, ``max_num_seqs`` is the engine's number of seats;
        ``sleep`` is awaited between restarts."""
        self._launch = launch
        self._max_waiting = max_waiting
        self._max_num_seqs = max_num_seqs
        self._listeners = tuple(listeners)
        self._clock = clock
        self._sleep = sleep
        self._watchdog = watchdog or Watchdog()
        self._health = Health.HEALTHY
        self._backoff = RestartBackoff()
        self._finish_rate = FinishRate()
        self._state = EngineState.LOADING
        self._info: ModelInfo | None = None
        self._load_s = _LOADING_RETRY_AFTER_S
        self._failed: Failed | None = None
        self._stats = EngineStats()
        self._num_ticks = 0
        self._process: EngineProcess | None = None
        self._streams: dict[str, TokenStream] = {}
        self._commands: list[Command] = []
        self._inspections = Inspections(self._post, self._finish_rate)
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._stop_task: asyncio.Task[None] | None = None
        self._stop_at_s = float("inf")
        self._is_closed = False
        self._pause: asyncio.Future[None] | None = None
        self._retry_at_s = 0.0

    @property
    def state(self) -> EngineState:
        """The engine's state."""
        return self._state

    @property
    def health(self) -> Health:
        """The watchdog's last opinion: STALLED when there is work and nothing has moved for too long."""
        return self._health

    @property
    def is_ready(self) -> bool:
        """What a readiness probe asks: requests are taken, and the engine moves."""
        return self._state is EngineState.READY and self._health is Health.HEALTHY

    @property
    def info(self) -> ModelInfo | None:
        """Facts of the model; None until it was loaded for the first time."""
        return self._info

    @property
    def stats(self) -> EngineStats:
        """The engine's numbers as of its last tick."""
        return self._stats

    @property
    def num_live(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    @property
    def engine_pid(self) -> int | None:
        """Process id of the engine; None while there is none."""
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Begin to spawn and supervise the engine; returns at once, in state LOADING."""
        assert not self._tasks, "a client is started once"
        self._tasks = [asyncio.create_task(self._supervise()), asyncio.create_task(self._watch())]
        for task in self._tasks:
            task.add_done_callback(self._on_task_end)

    async def wait_ready(self) -> ModelInfo:
        """Wait until the engine takes requests.

        Raises:
            EngineStartError: it cannot start as configured.
            EngineUnavailable: it was stopped first.
        """
        while self._state is not EngineState.READY:
            if self._failed is not None:
                raise EngineStartError(self._failed.message, self._failed.exit_code)
            if self._state in (EngineState.DEAD, EngineState.DRAINING):
                raise self._unavailable()
            self._changed.clear()
            await self._changed.wait()
        assert self._info is not None, "a ready engine has introduced itself"
        return self._info

    async def stop(self, drain_s: float) -> None:
        """End everything: refuse new requests, let the live ones finish for up to ``drain_s``, end the rest with
        an error, shut the engine down and reap it. Calling it again with a shorter time shortens the wait."""
        self._stop_at_s = min(self._stop_at_s, self._clock() + drain_s)
        self._changed.set()
        if self._stop_task is None:
            was_ready = self._state is EngineState.READY
            if self._state is not EngineState.DEAD:
                self._set_state(EngineState.DRAINING)
            self._stop_task = asyncio.create_task(self._shut_down(was_ready))
        await asyncio.shield(self._stop_task)

    def submit(self, requests: Sequence[Submit]) -> tuple[TokenStream, ...]:
        """Start requests, all or none. Synchronous; never blocks.

        Raises:
            EngineUnavailable: the engine is loading, restarting, draining or dead, or short of memory.
            PromptTooLong, TokenOutOfRange: one of them could never be served.
            QueueFull: too many requests wait.
        """
        if self._state is not EngineState.READY or self._info is None:
            raise self._unavailable()
        if self._stats.memory.is_under_pressure:
            raise MemoryPressure
        ids = {request.request_id for request in requests}
        assert len(ids) == len(requests), "request ids are never used twice"
        assert ids.isdisjoint(self._streams), "request ids are never used twice"
        check_submits(requests, self._info)
        num_live = len(self._streams) + len(requests)
        if num_waiting(self._stats, num_live, self._max_num_seqs) > self._max_waiting:
            raise self._queue_full()
        now = self._clock()
        streams: list[TokenStream] = []
        for request in requests:
            stream = TokenStream(request.request_id, self._cancel, self._to_error)
            self._streams[request.request_id] = stream
            streams.append(stream)
            self._post(request)
            for listener in self._listeners:
                self._tell(listener.on_submit, request, now)
        return tuple(streams)

    async def inspect(self, tenant: str) -> RequestTable:
        """The requests of ``tenant`` as of the next tick. Raises ``EngineUnavailable`` where no engine answers."""
        table = await self._inspections.ask(tenant) if self._state is EngineState.READY else None
        if table is None:
            raise self._unavailable()
        return table

    # What the engine says

    def _on_message(self, message: Outbox) -> None:
        if self._is_closed:
            return  # all requests have been ended from here; what the engine still says about them is too late
        if isinstance(message, Tick):
            self._num_ticks += 1
            self._on_tick(message)
        elif isinstance(message, Ready):
            self._info = message.info
            self._load_s = message.load_s
            self._backoff.note_ready(self._clock())
            self._set_state(EngineState.READY)
        else:
            self._failed = message

    def _on_tick(self, tick: Tick) -> None:
        now = self._clock()
        self._stats = tick.stats
        num_ended = 0
        for delta in tick.deltas:
            if delta.finish_reason is None:
                self._streams[delta.request_id].push(delta)
            else:
                self._streams.pop(delta.request_id).push(delta)
                num_ended += 1
        if num_ended:
            self._finish_rate.note_finished(now, num_ended)
            if not self._streams:
                self._finish_rate.note_idle()
                self._changed.set()
        self._inspections.on_tick(tick, now)
        for listener in self._listeners:
            self._tell(listener.on_tick, tick, now)

    def _end_all(self, error: str) -> None:
        """The live requests will hear nothing more from an engine: end them here."""
        reason = FinishReason.ERROR.value
        deltas = tuple([Delta(request_id=key, finish_reason=reason, error=error) for key in self._streams])
        self._inspections.end()
        self._commands.clear()
        self._on_tick(Tick(deltas=deltas, stats=EngineStats(), timing=None))

    def _set_state(self, state: EngineState) -> None:
        if self._stop_task is not None and state not in (EngineState.DRAINING, EngineState.DEAD):
            return  # an engine that comes up while we stop changes nothing
        if state is not self._state:
            _log.info("engine: %s -> %s", self._state.value, state.value)
            self._state = state
            for listener in self._listeners:
                self._tell(listener.on_state, state)
        self._changed.set()

    def _tell(self, call: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            call(*args, **kwargs)
        except Exception:  # noqa: BLE001 - a listener must not disturb the streams
            _log.exception("a listener failed")

    # What the engine is told

    def _post(self, command: Command) -> None:
        """Send with whatever else this turn of the event loop brings, as one message."""
        if not self._commands:
            asyncio.get_running_loop().call_soon(self._flush)
        self._commands.append(command)

    def _flush(self) -> None:
        commands, self._commands = tuple(self._commands), []
        if commands and self._process is not None:
            self._process.send(Inbox(commands))

    def _cancel(self, request_id: str) -> None:
        if request_id in self._streams:
            self._post(Cancel(request_id))

    # Errors for the other side

    def _unavailable(self) -> EngineUnavailable:
        now = self._clock()
        if self._state is EngineState.LOADING:
            return EngineUnavailable("loading", self._load_s)
        if self._state is EngineState.RESTARTING:
            return EngineUnavailable("restarting", max(self._retry_at_s - now, 0.0) + self._load_s)
        return EngineUnavailable(self._state.value, _GONE_RETRY_AFTER_S)

    def _queue_full(self) -> QueueFull:
        return QueueFull(self._max_waiting, self._finish_rate.retry_after_s(self._clock()))

    def _to_error(self, delta: Delta) -> EngineError:
        return error_of(delta, self._queue_full)

    # The engine's life

    async def _supervise(self) -> None:
        while await self._run_engine():
            delay_s = self._backoff.next_delay_s(self._clock())
            self._retry_at_s = self._clock() + delay_s
            self._set_state(EngineState.RESTARTING)
            _log.warning("the engine is started again in %.1f s", delay_s)
            self._pause = asyncio.ensure_future(self._sleep(delay_s))
            await asyncio.wait({self._pause})
            if self._is_closed:
                return

    async def _run_engine(self) -> bool:
        """One engine process from birth to death. Returns whether another one should be tried."""
        try:
            process = await EngineProcess.spawn(self._launch, self._on_message)
        except OSError as error:
            self._failed = Failed(message=f"the engine cannot be launched: {error}", exit_code=EXIT_CONFIG)
        else:
            self._process = process
            if self._is_closed:  # stopped while it was being spawned
                process.kill()
            exit_code = await process.wait()
            self._process = None
            if exit_code == EXIT_CONFIG and self._failed is None:
                self._failed = Failed(message="the engine cannot start as configured", exit_code=exit_code)
            _log.log(logging.INFO if self._stop_task else logging.ERROR, "the engine ended with code %d", exit_code)
        self._end_all(ENGINE_DIED)
        if self._failed is not None:
            self._set_state(EngineState.DEAD)
        return self._failed is None and self._stop_task is None

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._watchdog.period_s)
            before, process = self._health, self._process
            self._health = self._watchdog.observe(
                self._clock(), has_work=bool(self._streams), num_ticks=self._num_ticks
            )
            if self._health is before or process is None:
                continue
            if self._health is Health.STALLED:
                _log.error("the engine has not moved for %.0f s; its stacks follow", self._watchdog.quiet_s)
                process.dump_stacks()
            elif self._health is Health.HOPELESS:
                _log.error("the engine has not moved for %.0f s and is killed", self._watchdog.quiet_s)
                process.kill()

    async def _shut_down(self, was_ready: bool) -> None:
        await self._drained()
        self._end_all(SHUTTING_DOWN)
        self._is_closed = True
        if self._tasks:
            supervisor, watcher = self._tasks
            watcher.cancel()
            if self._pause is not None:
                self._pause.cancel()
            if was_ready:
                self._post(Shutdown())
                await asyncio.wait({supervisor}, timeout=_SHUTDOWN_GRACE_S)
            if self._process is not None:
                self._process.kill()
            await asyncio.wait(self._tasks)
        self._set_state(EngineState.DEAD)

    async def _drained(self) -> None:
        """Wait until no request is live, or until the time that ``stop`` set."""
        while self._streams and (left_s := self._stop_at_s - self._clock()) > 0:
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), left_s)
            except TimeoutError:
                return

    def _on_task_end(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or task.exception() is None:
            return
        _log.critical("the engine's supervision failed", exc_info=task.exception())
        if self._process is not None:
            self._process.kill()
        self._failed = Failed(message="the engine's supervision failed", exit_code=1)
        self._end_all(ENGINE_DIED)
        self._set_state(EngineState.DEAD)
