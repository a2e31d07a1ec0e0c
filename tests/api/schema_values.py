"""Values at and beyond the bounds of a JSON schema."""

from __future__ import annotations

from typing import Any


def edges(schema: Any) -> list[Any]:
    """Smallest and largest legal values of a JSON schema."""
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return [edge for form in schema[several] if form.get("type") != "null" for edge in edges(form)]
    if "enum" in schema:
        return list(schema["enum"])
    if schema["type"] == "boolean":
        return [False, True]
    if schema["type"] == "string":
        return ["x" * schema.get("minLength", 0), "x" * schema.get("maxLength", 1)]
    if schema["type"] == "array":
        return [[edges(schema["items"])[-1]] * count for count in (schema.get("minItems", 0), schema["maxItems"])]
    if schema["type"] == "object":
        largest = edges(schema["additionalProperties"])[-1]
        return [{f"k{i}": largest for i in range(count)} for count in (0, schema["maxProperties"])]
    low = schema.get("minimum", schema.get("exclusiveMinimum", 4) + (1 if schema["type"] == "integer" else 0.001))
    return [low, schema.get("maximum", low)]


def beyond(schema: Any) -> list[Any]:
    """Values just outside a JSON schema's bounds, and one of another type."""
    if "enum" in schema:
        return ["other", 5]
    if schema["type"] == "boolean":
        return [1, "true"]
    if schema["type"] == "string":
        shorter = [""] if schema.get("minLength") else []
        longer = ["x" * (schema["maxLength"] + 1)] if "maxLength" in schema else []
        return [*shorter, *longer, 5]
    if schema["type"] == "array":
        item = edges(schema["items"])[-1]
        fewer = [[]] if schema.get("minItems") else []
        return [*fewer, [item] * (schema["maxItems"] + 1), 5, *([value] for value in beyond(schema["items"]))]
    if schema["type"] == "object":
        inner = schema["additionalProperties"]
        many = {f"k{i}": edges(inner)[-1] for i in range(schema["maxProperties"] + 1)}
        return [many, 5, *({"k": value} for value in beyond(inner))]
    step = 1 if schema["type"] == "integer" else 0.001
    below = [schema["minimum"] - step] if "minimum" in schema else []
    above = [schema["maximum"] + step] if "maximum" in schema else []
    return [*below, *above, "1", True, *(schema[key] for key in ("exclusiveMinimum",) if key in schema)]
