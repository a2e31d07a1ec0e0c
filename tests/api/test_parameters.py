"""Every line of the table of parameters is true: each works, or is refused as it says, up to its bounds and not beyond.

The walk goes over ``rows_of``, from which ``docs/api.md`` is made. A parameter without a probe fails it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace as replace_struct

from mixtral_serve.api.reference import ENDPOINTS, Row, page, rows_of
from mixtral_serve.text.chat_template import load_chat_template
from mixtral_serve.text.fakes import write_tiny_tokenizer
from tests.api.parameter_probes import BODIES, LABELS, PROBES, RESPONSES, STREAM, Probe, Seen
from tests.api.schema_values import beyond, edges


@pytest.fixture
def api(shared_api: Any) -> Any:
    """To build an application takes longer than most of these tests."""
    shared_api.engine.submits.clear()
    shared_api.engine.streams.clear()
    return shared_api


DOCUMENT = Path(__file__).parents[2] / "docs" / "api.md"
ROWS = [(endpoint.path, row) for endpoint in ENDPOINTS for row in rows_of(endpoint)]
WORKING = [(path, row) for path, row in ROWS if row.refused is None]
REFUSED = [(path, row) for path, row in ROWS if row.refused is not None]


def name_of(value: object) -> str:
    return value.name if isinstance(value, Row) else str(value).rpartition("/")[2]


def probe_for(path: str, row: Row) -> Probe:
    probe = PROBES.get(f"{path} {row.name}") or PROBES.get(row.name)
    assert probe is not None, f"{row.name} has no probe: add one to PROBES that shows that it works"
    return probe


def body(path: str, base: dict[str, Any], name: str, *value: Any) -> dict[str, Any]:
    """The request with the parameter ``name``, or without it where no value is given."""
    fields = BODIES[path] | base
    if not value:
        return fields
    outer, _, inner = name.rpartition(".")
    return fields | ({outer: fields.get(outer, {}) | {inner: value[0]}} if outer else {inner: value[0]})


def send(api: Any, path: str, fields: dict[str, Any]) -> Seen:
    before = len(api.engine.submits)
    reply = api.call("POST", path, fields)
    assert reply.status == 200, reply.body
    answer = events_of(path, reply) if fields.get("stream") else reply.json()
    return Seen(api.engine.submits[before:], answer)


def events_of(path: str, reply: Any) -> list[Any]:
    """A stream's events. Those of a response have names of their own before the data."""
    if path != RESPONSES:
        events: list[Any] = reply.events
        return events
    return [json.loads(line[6:]) for line in reply.body.decode().splitlines() if line.startswith("data: {")]


def without_ids(seen: Seen) -> tuple[Any, ...]:
    submits = [replace_struct(submit, request_id="", arrival_s=0.0) for submit in seen.submits]
    return submits, re.sub(r"[a-z]+[_-][0-9a-f]{16,}", "", json.dumps(seen.answer))


@pytest.mark.parametrize(("path", "row"), WORKING, ids=name_of)
def test_it_works(api: Any, path: str, row: Row, tmp_path: Path) -> None:
    probe = probe_for(path, row)
    if probe.template is not None:
        write_tiny_tokenizer(tmp_path, chat_template=probe.template)
        api = api.with_deps(chat_template=load_chat_template(tmp_path, api.deps.tokenizer))
    assert probe.shows(send(api, path, body(path, probe.base, row.name, probe.value)))
    if (path, row.name) not in [*LABELS, (RESPONSES, "stream_options")]:
        assert not probe.shows(send(api, path, body(path, probe.base, row.name))), "not of itself"


@pytest.mark.parametrize(("path", "name"), LABELS)
def test_a_label_has_no_effect(api: Any, path: str, name: str) -> None:
    label = PROBES.get(f"{path} {name}") or PROBES[name]
    plain, labelled = (send(api, path, body(path, {}, name, *value)) for value in ((), (label.value,)))
    assert without_ids(plain) == without_ids(labelled)


@pytest.mark.parametrize(("path", "row"), WORKING, ids=name_of)
def test_its_smallest_and_largest_values_are_served(api: Any, path: str, row: Row) -> None:
    probe = probe_for(path, row)
    for value in edges(row.schema) if probe.edges is None else probe.edges:
        send(api, path, body(path, probe.base, row.name, value))
    send(api, path, body(path, {} if row.is_required else probe.base, row.name, *([] if row.is_required else [None])))


@pytest.mark.parametrize(("path", "row"), WORKING, ids=name_of)
def test_what_is_beyond_its_bounds_is_refused_and_named(api: Any, path: str, row: Row) -> None:
    probe = probe_for(path, row)
    (form, *others) = (form for form in row.schema.get("anyOf", [row.schema]) if form.get("type") != "null")
    is_told = probe.edges is None or (not others and form.get("type") in ("boolean", "integer", "number", "string"))
    values = [*probe.beyond, *(beyond(form) if is_told else [])]
    for value in values:
        reply = api.call("POST", path, body(path, probe.base, row.name, value))
        assert reply.status == 400, (value, reply.body)
        named = reply.error["param"]
        assert named == row.name or named.startswith((row.name + "[", row.name + ".")), value
    assert api.engine.submits == []


@pytest.mark.parametrize(("path", "row"), REFUSED, ids=name_of)
def test_what_is_refused_is_refused_by_name_with_the_reason(api: Any, path: str, row: Row) -> None:
    assert row.refused is not None
    base = STREAM if "." in row.name else {}
    asks = body(path, base, row.name, {"asks": "for something"})
    reply = api.call("POST", path, asks)
    assert (reply.status, reply.error["code"]) == (400, "unsupported_parameter")
    assert reply.error["param"] == row.name
    assert reply.error["message"].endswith(f": {row.refused.reason}.")
    assert api.engine.submits == []
    for neutral in row.refused.neutral:
        send(api, path, body(path, base, row.name, neutral))
    if row.refused.is_field:
        probe = probe_for(path, row)
        assert probe.shows(send(api, path, body(path, base, row.name, probe.value)))
        assert not probe.shows(send(api, path, body(path, base, row.name)))
    lenient = api.with_settings(unknown_fields="warn").call("POST", path, asks)
    assert (lenient.status, lenient.headers["x-mixtral-serve-warning"]) == (200, f"ignored: {row.name}")


def test_the_page_is_what_the_schemas_say() -> None:
    written = DOCUMENT.read_text("utf-8")
    assert written == page(), "write it anew: python -m mixtral_serve.api.reference docs/api.md"
    assert all(row.text for _, row in ROWS), "each parameter's docstring says what it does"


def test_every_parameter_has_a_probe() -> None:
    assert [row.name for path, row in WORKING if not (PROBES.get(f"{path} {row.name}") or PROBES.get(row.name))] == []


def test_no_probe_is_left_over() -> None:
    names = {row.name for _, row in ROWS} | {f"{path} {row.name}" for path, row in ROWS}
    assert set(PROBES) <= names
