"""The table of all parameters, made from the schemas: ``python -m mixtral_serve.api.reference docs/api.md`` writes it.

Owns: ``Row``, ``rows_of``, the list of endpoints with a body, and the page ``docs/api.md``.

What the page says of a parameter is its field's own docstring, its bounds are the field's own constraints, and a
refused parameter's reason is the one that the error message gives; so the page cannot say anything else than the code.
A test compares the page with what this module makes, and another sends every row's limits.

Rejected: an OpenAPI page for this. It has no place for fields that are refused, nor for the reason.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel

from mixtral_serve.api.schemas.chat import ChatRequest
from mixtral_serve.api.schemas.common import StreamOptions, StrictModel
from mixtral_serve.api.schemas.completions import CompletionRequest
from mixtral_serve.api.schemas.embeddings import EMBEDDING_UNSUPPORTED, EmbeddingRequest
from mixtral_serve.api.schemas.refused import CHAT_UNSUPPORTED, COMPLETION_UNSUPPORTED, STREAM_UNSUPPORTED, Refused
from mixtral_serve.api.schemas.responses import (
    RESPONSE_STREAM_UNSUPPORTED,
    RESPONSES_UNSUPPORTED,
    TEXT_UNSUPPORTED,
    ResponsesRequest,
    TextConfig,
)
from mixtral_serve.api.schemas.tokens import (
    CONVERSATION_FIELDS,
    TOKENIZE_UNSUPPORTED,
    DetokenizeRequest,
    TokenizeRequest,
)

_INTRODUCTION: Final = """\
# The API's parameters

Made from the schemas by `python -m mixtral_serve.api.reference docs/api.md`; do not edit.

`null` means absent, for every parameter. Types are strict: `"1"` and `true` are no numbers. A value beyond a bound is a
400 that names the parameter. Each parameter works as its line says, or is *refused* by name with the reason; a refused
parameter passes only with a value that asks for what happens anyway. Unknown parameters are refused too.

With `unknown_fields = "warn"` in the configuration, refused and unknown parameters are dropped instead, and the header
`x-mixtral-serve-warning` of the answer names them. Values out of bounds, contradictions and messages that cannot be
read are refused in either case.
"""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A route whose body has parameters."""

    path: str
    model: type[BaseModel]
    refused: Mapping[str, Refused]
    nested: Mapping[str, tuple[type[BaseModel], Mapping[str, Refused]]]
    """Parameters that are objects with parameters of their own."""
    note: str = ""
    """What the table cannot say."""


@dataclass(frozen=True, slots=True)
class Row:
    """One parameter of one endpoint."""

    name: str
    text: str
    schema: Mapping[str, Any]
    """JSON schema of the value; empty for a refused parameter that no model knows."""
    is_required: bool = False
    default: object = None
    refused: Refused | None = None


_STREAMS: Final = {"stream_options": (StreamOptions, STREAM_UNSUPPORTED)}
# Events of responses have their own frame: no option is left that asks for something.
_RESPONSES: Final = {
    "stream_options": (StrictModel, RESPONSE_STREAM_UNSUPPORTED),
    "text": (TextConfig, TEXT_UNSUPPORTED),
}
_CONVERSATION: Final = ", ".join([f"`{name}`" for name in sorted(CONVERSATION_FIELDS)])
ENDPOINTS: Final[Sequence[Endpoint]] = (
    Endpoint("/v1/chat/completions", ChatRequest, CHAT_UNSUPPORTED, _STREAMS),
    Endpoint("/v1/completions", CompletionRequest, COMPLETION_UNSUPPORTED, _STREAMS),
    Endpoint("/v1/responses", ResponsesRequest, RESPONSES_UNSUPPORTED, _RESPONSES),
    Endpoint("/v1/embeddings", EmbeddingRequest, EMBEDDING_UNSUPPORTED, {}),
    Endpoint(
        "/tokenize",
        TokenizeRequest,
        TOKENIZE_UNSUPPORTED,
        {},
        note="Also under `/v1`. Instead of `prompt` and `add_special_tokens` it takes a conversation as chat "
        f"completions do ({_CONVERSATION}), and so does `/apply-template`, which answers with the text too.",
    ),
    Endpoint("/detokenize", DetokenizeRequest, {}, {}, note="Also under `/v1`."),
)


def rows_of(endpoint: Endpoint) -> list[Row]:
    """All parameters of an endpoint by name: those that work, then those that are refused."""
    rows = list(_rows(endpoint.model, endpoint.refused, prefix=""))
    for name, (model, refused) in endpoint.nested.items():
        rows += _rows(model, refused, prefix=name + ".")
    return sorted(rows, key=lambda row: (row.refused is not None, row.name))


def page() -> str:
    """``docs/api.md``."""
    return "\n".join([_INTRODUCTION, *(_section(endpoint) for endpoint in ENDPOINTS)])


def bounds(schema: Mapping[str, Any]) -> str:
    """A value's type and limits in words."""
    if "enum" in schema or "const" in schema:
        values = schema["enum"] if "enum" in schema else [schema["const"]]
        return " or ".join(f"`{json.dumps(value)}`" for value in values)
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return ", or ".join(bounds(form) for form in schema[several] if form.get("type") != "null")
    kind = schema.get("type", "object")
    if kind == "array":
        return f"array{_count(schema, 'Items', '')}: {bounds(schema.get('items', {}))}"
    if kind == "object":
        inner = schema.get("additionalProperties")
        return f"object{_count(schema, 'Properties', '')}" + (f": {bounds(inner)}" if isinstance(inner, dict) else "")
    if kind == "string":
        return f"string{_count(schema, 'Length', ' characters')}"
    return f"{kind}{_range(schema)}"


def _rows(model: type[BaseModel], refused: Mapping[str, Refused], *, prefix: str) -> Iterator[Row]:
    described = model.model_json_schema()
    for name, field in model.model_fields.items():
        if name in refused:
            continue
        schema = _resolved(described["properties"][name], described.get("$defs", {}))
        text = " ".join((field.description or "").split()).replace("``", "`")
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        yield Row(prefix + name, text, schema, is_required=field.is_required(), default=default)
    for name, rule in refused.items():
        yield Row(prefix + name, rule.reason, {}, refused=rule)


def _resolved(value: object, definitions: Mapping[str, Any]) -> Any:
    """``value`` with references replaced by what they point to."""
    if isinstance(value, dict):
        if "$ref" in value:
            return _resolved(definitions[value["$ref"].rpartition("/")[2]], definitions)
        return {key: _resolved(item, definitions) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolved(item, definitions) for item in value]
    return value


def _count(schema: Mapping[str, Any], what: str, unit: str) -> str:
    least, most = schema.get(f"min{what}", 0), schema.get(f"max{what}")
    if most is None:
        return f" of at least {least}{unit}" if least else ""
    return f" of {least} to {most}{unit}"


def _range(schema: Mapping[str, Any]) -> str:
    low = f"{schema['minimum']:g}" if "minimum" in schema else None
    if isinstance(schema.get("minimum"), int):
        low = str(schema["minimum"])
    if "exclusiveMinimum" in schema:
        return f", above {schema['exclusiveMinimum']:g} to {schema['maximum']:g}"
    high = schema.get("maximum")
    if high is None:
        return f", at least {low}" if low is not None else ""
    return f", {low} to {high if isinstance(high, int) else f'{high:g}'}"


def _section(endpoint: Endpoint) -> str:
    note = [endpoint.note, ""] if endpoint.note else []
    lines = [f"## POST {endpoint.path}", "", *note, "| Parameter | Values | Default | |", "|---|---|---|---|"]
    for row in rows_of(endpoint):
        if row.refused is None:
            default = "required" if row.is_required else _spelled(row.default)
            cells = [f"`{row.name}`", bounds(row.schema), default, row.text]
        else:
            neutral = [_spelled(value) for value in row.refused.neutral]
            cells = [f"`{row.name}`", " or ".join(neutral) or "none", "", f"*Refused*: {row.text}."]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, ""])


def _spelled(value: object) -> str:
    if isinstance(value, BaseModel):
        value = value.model_dump(exclude_none=True, by_alias=True)
    return "" if value is None else f"`{json.dumps(value)}`"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page to the path given; returns the exit code."""
    (path,) = sys.argv[1:] if arguments is None else arguments
    Path(path).write_text(page(), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
