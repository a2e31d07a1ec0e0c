"""Random JSON schemas that every answer can keep to within some dozens of tokens.

Owns: ``random_schema``. All that can grow is bounded: strings by ``maxLength`` or a pattern, arrays by ``maxItems``,
numbers by their bounds, objects by ``additionalProperties: false``, the whole by its depth. A seed gives the same
schema everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any, Final

Schema = dict[str, Any]

_NAMES: Final = ("name", "city", "age", "tags", "price", "is_open", "items", "unit", "note", "größe", 'a "b"', "x/y")
_WORDS: Final = ("red", "green", "blue", "north", "south", "yes", "no", "naïve", "a b", 'say "hi"', "back\\slash")
_PATTERNS: Final = (
    "^[a-z]{2,8}$",
    "^[A-Z]{3}-[0-9]{2,4}$",
    "^(red|green|blue)( (light|dark))?$",
    "^[0-9]{4}-[0-1][0-9]$",
    "^#[0-9a-f]{6}$",
)
_FORMATS: Final = ("date", "uuid", "ipv4")


def random_schema(rng: Random, *, depth: int = 3) -> Schema:
    """A schema nested at most ``depth`` levels deep."""
    return rng.choice(_NESTED)(rng, depth) if depth > 0 and rng.random() < 0.5 else rng.choice(_FLAT)(rng)


def _object(rng: Random, depth: int) -> Schema:
    names = rng.sample(_NAMES, rng.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: random_schema(rng, depth=depth - 1) for name in names},
        "required": [name for name in names if rng.random() < 0.6],
        "additionalProperties": False,
    }


def _array(rng: Random, depth: int) -> Schema:
    least = rng.randint(0, 2)
    return {
        "type": "array",
        "items": random_schema(rng, depth=depth - 1),
        "minItems": least,
        "maxItems": least + rng.randint(0, 2),
    }


def _tuple(rng: Random, depth: int) -> Schema:
    items = [random_schema(rng, depth=depth - 1) for _ in range(rng.randint(1, 3))]
    return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}


def _any_of(rng: Random, depth: int) -> Schema:
    return {"anyOf": [random_schema(rng, depth=depth - 1) for _ in range(rng.randint(2, 3))]}


def _string(rng: Random) -> Schema:
    least = rng.randint(0, 4)
    return {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 16)}


def _pattern(rng: Random) -> Schema:
    return {"type": "string", "pattern": rng.choice(_PATTERNS)}


def _format(rng: Random) -> Schema:
    return {"type": "string", "format": rng.choice(_FORMATS)}


def _enum(rng: Random) -> Schema:
    return {"enum": [*rng.sample(_WORDS, rng.randint(1, 4)), *rng.sample((None, True, 7, -1.5, [1], {"k": "v"}), 2)]}


def _const(rng: Random) -> Schema:
    return {"const": rng.choice(_WORDS)}


def _integer(rng: Random) -> Schema:
    least = rng.randint(-1000, 1000)
    schema: Schema = {"type": "integer", "minimum": least, "maximum": least + rng.randint(0, 10_000)}
    if rng.random() < 0.3:
        schema |= {"multipleOf": rng.choice((2, 5, 10)), "maximum": least + 10_000}
    return schema


def _number(rng: Random) -> Schema:
    least = rng.randint(-100, 100)
    return {"type": "number", "minimum": least, "exclusiveMaximum": least + rng.randint(1, 50), "multipleOf": 0.25}


def _simple(rng: Random) -> Schema:
    return {"type": rng.choice(("boolean", "null", ["boolean", "null"]))}


_FLAT: Final[Sequence[Callable[[Random], Schema]]] = (
    _string,
    _pattern,
    _format,
    _enum,
    _const,
    _integer,
    _number,
    _simple,
)
_NESTED: Final[Sequence[Callable[[Random, int], Schema]]] = (_object, _object, _object, _array, _tuple, _any_of)
