"""What a JSON schema may ask for before anybody compiles it.

Owns: ``check_schema``, which walks a schema once, without recursion, and refuses what would cost too much to compile
or could not be kept: too many bytes, values or levels, keywords that the grammar library does not know, and
``multipleOf`` whose automaton would be huge.

The library has limits of its own (``grammar_vocabulary``); they hold for everything that is bounded there by fuel. The
one thing that it computes outside any limit is the automaton of ``multipleOf``: it has one state per remainder, and an
intersection has the least common multiple of them.

Invariants: a walk costs time linear in the schema, and stops at the limits; a reason names keywords, fields of the
schema's own language and limits, never what else the schema says.

Rejected: ignoring unknown keywords such as ``not`` (the answer would not validate, and nobody would be told).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any, Final

from mixtral_serve.text.errors import GrammarError

MAX_SCHEMA_BYTES: Final = 65_536
"""Of the schema as JSON."""
MAX_SCHEMA_DEPTH: Final = 64
"""Levels of objects and arrays."""
MAX_SCHEMA_VALUES: Final = 8_192
"""Objects, arrays and scalars."""
MAX_MULTIPLE: Final = 10_000
"""Least common multiple of all ``multipleOf``, in units of the smallest decimal place among them."""
_MAX_MULTIPLE_PLACES: Final = 6
_MAX_REFERENCES: Final = 16
"""``$ref`` in a row, each of which leads to nothing but the next."""

_SCHEMA_KEYS: Final = ("items", "additionalProperties", "additionalItems")
_LIST_KEYS: Final = ("allOf", "anyOf", "oneOf", "prefixItems")
_MAP_KEYS: Final = ("properties", "patternProperties", "$defs", "definitions")
_UNSUPPORTED: Final = (
    "not",
    "if",
    "then",
    "else",
    "contains",
    "minContains",
    "maxContains",
    "uniqueItems",
    "propertyNames",
    "dependencies",
    "dependentRequired",
    "dependentSchemas",
    "unevaluatedItems",
    "unevaluatedProperties",
    "$dynamicRef",
    "$recursiveRef",
    "x-guidance",
)
"""The last is the grammar library's own, with which a schema could choose to be ignored."""
_TYPES: Final = frozenset(("object", "array", "string", "number", "integer", "boolean", "null"))


def check_schema(schema: Mapping[str, Any]) -> None:
    """Refuse a schema that is too large, too deep, or says what no grammar here can keep.

    Raises:
        GrammarError: with the reason.
    """
    _check_size(schema)
    steps: list[Decimal] = []
    for part in _subschemas(schema):
        for keyword in _UNSUPPORTED:
            if keyword in part:
                raise GrammarError(f"the keyword '{keyword}' is not supported")
        _check_type(part)
        _check_reference(part, schema)
        if "multipleOf" in part:
            steps.append(_step(part["multipleOf"]))
    _check_steps(steps)


def _check_size(schema: Mapping[str, Any]) -> None:
    pending: list[tuple[object, int]] = [(schema, 1)]
    num_values = 0
    while pending:
        value, depth = pending.pop()
        num_values += 1
        if not isinstance(value, Mapping | list):
            continue
        children = value.values() if isinstance(value, Mapping) else value
        if depth > MAX_SCHEMA_DEPTH:
            raise GrammarError(f"it is nested more than {MAX_SCHEMA_DEPTH} levels deep")
        if num_values + len(pending) + len(children) > MAX_SCHEMA_VALUES:
            raise GrammarError(f"it has more than {MAX_SCHEMA_VALUES} values")
        pending += [(child, depth + 1) for child in children]
    if len(json.dumps(schema, ensure_ascii=False).encode(errors="surrogatepass")) > MAX_SCHEMA_BYTES:
        raise GrammarError(f"it is larger than {MAX_SCHEMA_BYTES} bytes")


def _subschemas(schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The schema and all schemas within it; values of ``enum``, ``const`` and the like are none."""
    pending: list[object] = [schema]
    while pending:
        part = pending.pop()
        if not isinstance(part, Mapping):
            if not isinstance(part, bool):
                raise GrammarError("a schema within it is neither an object nor a boolean")
            continue
        yield part
        for key in _SCHEMA_KEYS:
            inner = part.get(key, True)
            pending += inner if isinstance(inner, list) else [inner]
        for key in _LIST_KEYS:
            inner = part.get(key, [])
            if not isinstance(inner, list):
                raise GrammarError(f"'{key}' is not an array")
            pending += inner
        for key in _MAP_KEYS:
            inner = part.get(key, {})
            if not isinstance(inner, Mapping):
                raise GrammarError(f"'{key}' is not an object")
            pending += inner.values()


def _check_type(part: Mapping[str, Any]) -> None:
    kinds = part.get("type", [])
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if not isinstance(kind, str) or kind not in _TYPES:
            raise GrammarError(f"a 'type' is none of {', '.join(sorted(_TYPES))}")
    required = part.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise GrammarError("'required' is not an array of names")
    if not isinstance(part.get("enum", []), list):
        raise GrammarError("'enum' is not an array")


def _check_reference(part: Mapping[str, Any], schema: Mapping[str, Any]) -> None:
    """Refuse references that only lead to each other: the library follows them without end or result."""
    place: object = part
    for _ in range(_MAX_REFERENCES):
        reference = place.get("$ref") if isinstance(place, Mapping) else None
        if reference is None:
            return
        if not isinstance(reference, str) or not reference.startswith("#"):
            raise GrammarError("a '$ref' is no reference within the schema")
        place = schema
        for name in reference[1:].split("/")[1:]:
            if not isinstance(place, Mapping):
                return  # into an array, or nowhere: the library knows
            place = place.get(name.replace("~1", "/").replace("~0", "~"))
    raise GrammarError(f"more than {_MAX_REFERENCES} '$ref' lead to each other")


def _step(value: object) -> Decimal:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise GrammarError("'multipleOf' is not a number above 0")
    step = Decimal(repr(value))
    if -int(step.normalize().as_tuple().exponent) > _MAX_MULTIPLE_PLACES:
        raise GrammarError(f"'multipleOf' has more than {_MAX_MULTIPLE_PLACES} decimal places")
    return step


def _check_steps(steps: list[Decimal]) -> None:
    places = max((-int(step.normalize().as_tuple().exponent) for step in steps), default=0)
    multiple = 1
    for step in steps:
        multiple = math.lcm(multiple, int(step.scaleb(max(places, 0))))
        if multiple > MAX_MULTIPLE:
            raise GrammarError(f"all 'multipleOf' together have a common multiple above {MAX_MULTIPLE}")
