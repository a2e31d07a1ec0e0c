"""Answering with a JSON object of given fields.

Owns the kinds of things described (people, products, trips, free records with
made-up fields), the sentences that describe them and the requests for fields
in any order and selection.
"""

import json
from dataclasses import dataclass
from random import Random
from typing import Final

from mixtral_serve.demo.conversation import Episode, dialogue, joined, punctuated
from mixtral_serve.demo.words import COLOURS, NOUNS, WEEKDAYS, city, first_name, made_up, words_of

Value = str | int


@dataclass(frozen=True, slots=True)
class _Kind:
    """A kind of thing: its fields and sentences that mention all of them."""

    fields: tuple[str, ...]
    sentences: tuple[str, ...]


_KINDS: Final[tuple[_Kind, ...]] = (
    _Kind(
        ("name", "age", "city"),
        (
            "{name} is {age} years old and lives in {city}.",
            "{name} lives in {city} and is {age} years old.",
            "{name}, {age} years old, comes from {city}.",
            "In {city} lives {name}, who is {age}.",
            "{name} is {age}. The home of {name} is {city}.",
        ),
    ),
    _Kind(
        ("name", "age", "job"),
        (
            "{name} is {age} years old and works as a {job}.",
            "{name} is a {job} and is {age} years old.",
            "The {job} {name} is {age} years old.",
            "{name}, {age}, has the job of a {job}.",
        ),
    ),
    _Kind(
        ("item", "price", "color"),
        (
            "The {color} {item} costs {price} dollars.",
            "A {color} {item} costs {price} dollars.",
            "For {price} dollars you get a {color} {item}.",
            "The price of the {color} {item} is {price} dollars.",
        ),
    ),
    _Kind(
        ("name", "item", "quantity"),
        (
            "{name} ordered {quantity} of {item}.",
            "{name} wants {quantity} times {item}.",
            "Please send {quantity} pieces of {item} to {name}.",
            "An order by {name}: {quantity} of {item}.",
        ),
    ),
    _Kind(
        ("name", "city", "day"),
        (
            "{name} goes to {city} on {day}.",
            "On {day} {name} travels to {city}.",
            "{name} will be in {city} on {day}.",
            "The trip of {name} to {city} is on {day}.",
        ),
    ),
    _Kind(
        ("animal", "name", "color"),
        (
            "{name} is a {color} {animal}.",
            "The {color} {animal} is called {name}.",
            "My {animal} {name} is {color}.",
            "I have a {color} {animal} with the name {name}.",
        ),
    ),
)
_JOBS: Final = ("baker", "teacher", "doctor", "farmer", "pilot", "painter", "nurse", "lawyer", "driver", "cook")
_ANIMALS: Final = ("dog", "cat", "horse", "rabbit", "bird", "fish", "mouse", "goat", "cow")
_FREE_FIELDS: Final = words_of("title size country color number year level team code type value user date place")
_REQUESTS: Final = (
    "{text} Answer with a JSON object with the fields {fields}.",
    "{text} Answer with a JSON object with the fields {fields}.",
    "{text} Reply with JSON with the fields {fields}.",
    "{text} Give me a JSON object with {fields}.",
    "Answer with a JSON object with the fields {fields}. {text}",
    "Extract {fields} as JSON: {text}",
    "Write a JSON object with the keys {fields} for this text: {text}",
    "{text} Return JSON with the keys {fields}.",
    "{text} Return {fields} as a JSON object.",
    "Turn this into a JSON object with the fields {fields}: {text}",
    "{text} Write {fields} as JSON.",
)


def _value(rng: Random, field: str) -> Value:
    number_ranges = {"age": (5, 99), "price": (1, 200), "quantity": (2, 60)}
    if field in number_ranges:
        return rng.randint(*number_ranges[field])
    if field == "name":
        return first_name(rng)
    if field == "city":
        return city(rng)
    choices = {"job": _JOBS, "item": NOUNS, "color": COLOURS, "day": WEEKDAYS, "animal": _ANIMALS}
    return rng.choice(choices[field])


def free_value(rng: Random) -> Value:
    """A value for a field that no sentence is known for."""
    draw = rng.random()
    if draw < 0.3:
        return rng.randint(0, 999)
    if draw < 0.6:
        return rng.choice(NOUNS)
    if draw < 0.7:
        return rng.choice(COLOURS)
    return made_up(rng) if draw < 0.75 else rng.choice((first_name(rng), city(rng)))


def free_field(rng: Random) -> str:
    """A field name, sometimes a made-up one."""
    return rng.choice(_FREE_FIELDS) if rng.random() < 0.97 else made_up(rng)


def _free_record(rng: Random) -> tuple[str, dict[str, Value]]:
    record = {free_field(rng): free_value(rng) for _ in range(rng.randint(1, 3))}
    pattern = rng.choice(("{f} is {v}", "{f}: {v}", "{f} = {v}", "the {f} is {v}"))
    text = ", ".join(pattern.format(f=field, v=value) for field, value in record.items())
    return text[:1].upper() + text[1:] + "." if pattern.startswith("the") else f"Record: {text}.", record


def extraction_episode(rng: Random) -> Episode:
    """Describe something and ask for some of its fields as JSON; held out by the values."""
    if rng.random() < 0.25:
        text, record = _free_record(rng)
    else:
        kind = rng.choice(_KINDS)
        record = {field: _value(rng, field) for field in kind.fields}
        text = rng.choice(kind.sentences).format(**record)
    size = len(record) if rng.random() < 0.6 else rng.randint(1, len(record))
    fields = rng.sample(list(record), size)
    if rng.random() < 0.4:
        fields = [field for field in record if field in fields]
    listed = ", ".join(fields) if rng.random() < 0.6 else joined(fields)
    request = rng.choice(_REQUESTS).format(text=text, fields=listed)
    answer = json.dumps({field: record[field] for field in fields})
    request = request if rng.random() < 0.5 or request.startswith(text) else punctuated(rng, request)
    return Episode("json", f"json {sorted(record.items())}", dialogue(request, answer))
