from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from mixtral_serve.engine.listener import EngineState
from mixtral_serve.engine.messages import Delta, EngineStats, Submit, Tick
from mixtral_serve.observe.logs import FIELDS, RequestLog, configure_logging


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def finish(log: RequestLog, reason: str, error: str | None = None) -> None:
    log.on_submit(Submit(request_id="r-0", prompt=b"\0" * 20, arrival_s=1.0), 1.0)
    stats = EngineStats()
    log.on_tick(Tick((Delta(request_id="r-0", text="SECRET", token_ids=(5,)),), stats, None), 1.5)
    end = Delta(request_id="r-0", finish_reason=reason, num_output_tokens=9, num_cached_tokens=4, error=error)
    log.on_tick(Tick((end,), stats, None), 3.0)
    log.on_tick(Tick((end,), stats, None), 4.0)
    log.on_state(EngineState.DEAD)


def test_json_lines_carry_fields_and_tracebacks() -> None:
    output = io.StringIO()
    configure_logging(style="json", output=output)
    logging.getLogger("x").info("hello %s", "you", extra={FIELDS: {"count": 3}})
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("x").exception("it failed")
    first, second = (json.loads(line) for line in output.getvalue().splitlines())
    assert first.pop("time") > 0
    assert first == {"level": "info", "logger": "x", "message": "hello you", "count": 3}
    assert "ValueError: broken" in second["exception"]


def test_a_finished_request_is_one_line_without_its_text() -> None:
    output = io.StringIO()
    configure_logging(style="json", output=output)
    finish(RequestLog(), "stop")
    (line,) = output.getvalue().splitlines()
    fields = json.loads(line)
    assert "SECRET" not in line
    assert fields["level"] == "info"
    assert {name: fields[name] for name in ("request_id", "reason", "prompt_tokens", "cached_tokens")} == {
        "request_id": "r-0",
        "reason": "stop",
        "prompt_tokens": 5,
        "cached_tokens": 4,
    }
    assert (fields["output_tokens"], fields["first_token_s"], fields["total_s"]) == (9, 0.5, 2.0)


def test_text_lines_are_for_people() -> None:
    output = io.StringIO()
    configure_logging(output=output)
    finish(RequestLog(), "error", error="non-finite logits")
    (line,) = output.getvalue().splitlines()
    assert "WARNING" in line
    assert "request finished request_id=r-0 reason=error" in line
    assert "error=non-finite logits" in line


def test_levels_are_obeyed_and_configuring_twice_does_not_double() -> None:
    output = io.StringIO()
    configure_logging(output=output)
    configure_logging(level="WARNING", output=output)
    logging.getLogger("x").info("quiet")
    logging.getLogger("x").warning("loud")
    assert output.getvalue().count("\n") == 1
