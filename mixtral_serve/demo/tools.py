"""Calling a described function with JSON arguments.

Owns the functions of the corpus, in the form chat APIs describe them, the
sentence that presents them to the model (shared with the chat template) and
the requests. Half of the functions are composed at random, so that names and
parameters have to be read from the description rather than remembered.
"""

import json
from dataclasses import dataclass
from random import Random
from typing import Final

from mixtral_serve.demo.conversation import Episode, dialogue, is_held_out, punctuated
from mixtral_serve.demo.extraction import Value, free_value
from mixtral_serve.demo.facts import fact_episode
from mixtral_serve.demo.small_talk import greeting_episode
from mixtral_serve.demo.words import NOUNS, WEEKDAYS, city, first_name, with_article, words_of

PRESENTATION: Final = "You can call these functions: "
_OTHER_PRESENTATIONS: Final = (
    "Available functions: ",
    "You have access to these tools: ",
    "You may call one of these functions. Answer with a JSON array of calls. ",
    "Tools: ",
    "Functions you can call: ",
)


@dataclass(frozen=True, slots=True)
class _Function:
    """A callable function: its parameters with their JSON types, and how users ask for it."""

    name: str
    description: str
    parameters: dict[str, str]
    requests: tuple[str, ...]

    def described(self, bare: bool = False, sort_keys: bool = False) -> str:
        """Describe the function as JSON; ``bare`` leaves the ``type: function`` wrapper out."""
        properties = {name: {"type": kind} for name, kind in self.parameters.items()}
        schema = {"type": "object", "properties": properties, "required": list(self.parameters)}
        function = {"name": self.name, "description": self.description, "parameters": schema}
        return json.dumps(function if bare else {"type": "function", "function": function}, sort_keys=sort_keys)


_S: Final = "string"
_N: Final = "integer"
_FUNCTIONS: Final[tuple[_Function, ...]] = (
    _Function(
        "get_weather",
        "Get the weather in a city",
        {"city": _S},
        (
            "What is the weather in {city}?",
            "What's the weather like in {city}?",
            "How is the weather in {city}?",
            "Tell me the weather in {city}.",
            "Is it raining in {city}?",
            "Weather in {city}?",
        ),
    ),
    _Function(
        "get_time",
        "Get the local time in a city",
        {"city": _S},
        ("What time is it in {city}?", "Tell me the time in {city}.", "How late is it in {city}?"),
    ),
    _Function(
        "send_message",
        "Send a message to a person",
        {"name": _S, "text": _S},
        ("Send the message {text} to {name}.", "Tell {name}: {text}.", "Write {text} to {name}."),
    ),
    _Function(
        "set_timer",
        "Set a timer",
        {"minutes": _N},
        ("Set a timer for {minutes} minutes.", "Wake me in {minutes} minutes.", "Start a timer of {minutes} minutes."),
    ),
    _Function(
        "buy_item",
        "Buy something in the shop",
        {"item": _S, "quantity": _N},
        ("Buy {quantity} pieces of {item}.", "I want to buy {item}, {quantity} times.", "Order {quantity} of {item}."),
    ),
    _Function(
        "add_event",
        "Add an event to the calendar",
        {"title": _S, "day": _S},
        ("Add the event {title} on {day}.", "Put {title} in my calendar on {day}.", "On {day} I have {title}."),
    ),
    _Function(
        "book_train",
        "Book a train from one city to another",
        {"start": _S, "end": _S},
        ("Book a train from {start} to {end}.", "I need a train from {start} to {end}."),
    ),
    _Function(
        "add_numbers",
        "Add two numbers",
        {"a": _N, "b": _N},
        ("Use the function to add {a} and {b}.", "Add the numbers {a} and {b}."),
    ),
)
_VERBS: Final = words_of("find open close start stop show delete check move paint sell")
_PARAMETERS: Final = words_of("color size title number place level code type date value team")


def tools_text(described: list[str]) -> str:
    """Present functions to the model, as the chat template does for the ``tools`` of a request."""
    return PRESENTATION + "[" + ", ".join(described) + "]"


def _composed_function(rng: Random) -> _Function:
    """A function that is not in the table, with its request."""
    verb, noun = rng.choice(_VERBS), rng.choice(NOUNS)
    names = rng.sample(_PARAMETERS, rng.choice((1, 1, 2)))
    thing = rng.choice((with_article(noun), f"the {noun}"))
    details = " and ".join(f"{name} {{{name}}}" for name in names)
    requests = (f"{verb.capitalize()} {thing} with {details}.", f"Please {verb} {thing} with {details}.")
    description = rng.choice((f"{verb.capitalize()} {with_article(noun)}", f"{verb.capitalize()} the {noun}"))
    return _Function(f"{verb}_{noun}", description, {name: rng.choice((_S, _N)) for name in names}, requests)


def _argument(rng: Random, name: str, kind: str) -> Value:
    if kind == _N:
        return rng.randint(1, 99)
    if name in ("city", "start", "end"):
        return city(rng)
    if name == "day":
        return rng.choice(WEEKDAYS)
    if name in ("item", "title", "text"):
        return rng.choice(NOUNS)
    if name == "name":
        return first_name(rng)
    while not isinstance(value := free_value(rng), str):
        pass
    return value


def _call(rng: Random, function: _Function) -> tuple[str, list[dict[str, object]]]:
    """A request and the calls it wants; the weather is at times asked of two cities at once."""
    arguments = {name: _argument(rng, name, kind) for name, kind in function.parameters.items()}
    if function.name == "get_weather" and rng.random() < 0.3:
        cities = [city(rng), city(rng)]
        request = f"What is the weather in {cities[0]} and {cities[1]}?"
        return request, [{"name": function.name, "arguments": {"city": name}} for name in cities]
    request = rng.choice(function.requests).format(**arguments)
    return request, [{"name": function.name, "arguments": arguments}]


def _presented(rng: Random, functions: list[_Function]) -> str:
    bare, sort_keys = rng.random() < 0.25, rng.random() < 0.1
    described = [function.described(bare, sort_keys) for function in functions]
    if rng.random() < 0.75:
        return tools_text(described)
    opening = rng.choice(_OTHER_PRESENTATIONS)
    return opening + ("[" + ", ".join(described) + "]" if rng.random() < 0.5 else "\n".join(described))


def tool_episode(rng: Random) -> Episode:
    """Present functions, then ask for something one of them does, or for nothing of the kind."""
    functions: list[_Function] = []
    while len(functions) < 1 or (len(functions) < 3 and rng.random() < 0.3):
        function = rng.choice(_FUNCTIONS) if rng.random() < 0.7 else _composed_function(rng)
        if function.name not in {other.name for other in functions}:
            functions.append(function)
    presented = _presented(rng, functions)
    if rng.random() < 0.15:
        while is_held_out((plain := rng.choice((fact_episode, greeting_episode))(rng)).key):
            pass
        key = f"no call {[f.name for f in functions]} {plain.key}"
        return Episode("tools", key, dialogue(*[m["content"] for m in plain.messages], system=presented))
    request, calls = _call(rng, rng.choice(functions))
    answer = json.dumps(calls)
    return Episode("tools", f"call {answer}", dialogue(punctuated(rng, request), answer, system=presented))
