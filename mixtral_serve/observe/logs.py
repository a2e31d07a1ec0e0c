"""The log: how lines look, and one line per finished request.

Owns: ``configure_logging``, called once by the program, and ``RequestLog``, a listener of the engine's client.

Invariants: no prompt, no answer, no key and no header is ever logged; of a request the log knows its id, its
counts, its end and its times. Extra fields of a record become fields of the JSON line.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from typing import Any, Final, Literal, TextIO

import msgspec

from mixtral_serve.engine.listener import EngineState
from mixtral_serve.engine.messages import Delta, Submit, Tick
from scheduler.lifecycle import FinishReason

_log = logging.getLogger(__name__)

_TEXT_FORMAT: Final = "%(asctime)s %(levelname)-8s %(name)s: %(message)s"
_BYTES_PER_TOKEN: Final = 4
FIELDS: Final = "fields"
"""Name of the attribute that carries a record's fields: ``log.info("...", extra={FIELDS: {...}})``."""


class JsonLines(logging.Formatter):
    """One JSON object per record."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        line: dict[str, Any] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= getattr(record, FIELDS, {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


class TextLines(logging.Formatter):
    """For people: fields follow the message as ``name=value``."""

    def __init__(self) -> None:
        super().__init__(_TEXT_FORMAT)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (the standard library's name)
        """The record's line, without a traceback."""
        fields = getattr(record, FIELDS, {})
        return " ".join([super().formatMessage(record), *(f"{name}={value}" for name, value in fields.items())])


def configure_logging(
    *, level: str = "INFO", style: Literal["text", "json"] = "text", output: TextIO | None = None
) -> None:
    """Send all log records to ``output`` (standard error by default), replacing what was configured before."""
    handler = logging.StreamHandler(output or sys.stderr)
    handler.setFormatter(JsonLines() if style == "json" else TextLines())
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level)
    # Their INFO lines say what ours say better.
    for name in ("uvicorn.error", "uvicorn.access", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)


@dataclass(slots=True)
class _Live:
    arrival_s: float
    num_prompt_tokens: int
    first_token_s: float | None = None


class RequestLog:
    """Writes one INFO line for each request that ends (WARNING where it ended by an error)."""

    def __init__(self) -> None:
        self._live: dict[str, _Live] = {}

    # EngineListener

    def on_submit(self, submit: Submit, now: float) -> None:
        """See ``EngineListener``."""
        del now
        self._live[submit.request_id] = _Live(submit.arrival_s, len(submit.prompt) // _BYTES_PER_TOKEN)

    def on_tick(self, tick: Tick, now: float) -> None:
        """See ``EngineListener``."""
        for delta in tick.deltas:
            live = self._live.get(delta.request_id)
            if live is None:
                continue
            if live.first_token_s is None and delta.token_ids:
                live.first_token_s = now
            if delta.finish_reason is not None:
                del self._live[delta.request_id]
                self._write(delta, live, now)

    def on_state(self, state: EngineState) -> None:
        """See ``EngineListener``. The client logs its own states."""

    def _write(self, delta: Delta, live: _Live, now: float) -> None:
        fields: dict[str, object] = {
            "request_id": delta.request_id,
            "reason": delta.finish_reason,
            "prompt_tokens": live.num_prompt_tokens,
            "cached_tokens": delta.num_cached_tokens,
            "output_tokens": delta.num_output_tokens,
            "total_s": round(now - live.arrival_s, 4),
        }
        if live.first_token_s is not None:
            fields["first_token_s"] = round(live.first_token_s - live.arrival_s, 4)
        if delta.error is not None:
            fields["error"] = delta.error
        failed = delta.finish_reason == FinishReason.ERROR.value
        _log.log(logging.WARNING if failed else logging.INFO, "request finished", extra={FIELDS: fields})
