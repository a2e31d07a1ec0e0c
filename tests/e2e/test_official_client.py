"""The official client, strict about the form of what it gets, with every parameter that it documents.

Its own types say which parameters there are: one that is neither tried nor refused here fails the test, whatever
version of it is installed. What each parameter does is proven in ``tests/api/test_parameters.py``; here all of them
pass through the real client, the real server and the real model, one at a time and all at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any, Final, get_type_hints

import httpx
import openai
import pytest
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params
from pydantic import BaseModel


class Person(BaseModel):
    name: str
    age: int


PERSON: Final = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
PARAMETERS: Final = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}},
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTION: Final = {"name": "get_weather", "description": "Get the weather in a city", "parameters": PARAMETERS}
TOOL: Final = {"type": "function", "function": FUNCTION}
FLAT_TOOL: Final = {"type": "function", "strict": True, **FUNCTION}
FORMAT: Final = {"name": "person", "schema": PERSON, "strict": True}
LABELS: Final = {"user": "u", "safety_identifier": "s", "prompt_cache_key": "k", "metadata": {"a": "b"}}
PENALTIES: Final = {"presence_penalty": 0.5, "frequency_penalty": 0.5, "logit_bias": {"940": 1}, "seed": 7}
CHAT: Final[dict[str, list[Any]]] = {
    **{name: [value] for name, value in {**LABELS, **PENALTIES}.items()},
    "model": ["mixtral-demo"],
    "messages": [
        [{"role": "developer", "content": "Be short."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    ],
    "function_call": ["none", "auto"],
    "functions": [[]],
    "logprobs": [True, False],
    "max_completion_tokens": [5],
    "max_tokens": [5],
    "modalities": [["text"]],
    "n": [2],
    "parallel_tool_calls": [True, False],
    "prompt_cache_retention": ["in_memory"],
    "reasoning_effort": ["none"],
    "response_format": [
        {"type": "text"},
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": FORMAT},
    ],
    "service_tier": ["auto", "default"],
    "stop": ["END", ["a", "b", "c", "d"]],
    "store": [False],
    "stream": [True, False],
    "stream_options": [{"include_usage": True}],
    "temperature": [0, 1.5],
    "tool_choice": ["auto", "none", "required", {"type": "function", "function": {"name": "get_weather"}}],
    "tools": [[TOOL]],
    "top_logprobs": [3],
    "top_p": [0.5],
    "verbosity": ["medium"],
}
TEXT: Final[dict[str, list[Any]]] = {
    **{name: [value] for name, value in PENALTIES.items()},
    "model": ["mixtral-demo"],
    "prompt": ["One two", ["One", "two"], [300, 301], [[300], [301, 302]]],
    "best_of": [1],
    "echo": [True],
    "logprobs": [0, 3],
    "max_tokens": [5, 0],
    "n": [2],
    "stop": ["END", ["a", "b", "c", "d"]],
    "stream": [True, False],
    "stream_options": [{"include_usage": True}],
    "suffix": [""],
    "temperature": [0, 1.5],
    "top_p": [0.5],
    "user": ["u"],
}
RESPONSES: Final[dict[str, list[Any]]] = {
    **{name: [value] for name, value in LABELS.items()},
    "model": ["mixtral-demo"],
    "input": ["Hi", [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}]],
    "instructions": ["Be short."],
    "include": [["message.output_text.logprobs"]],
    "max_output_tokens": [5],
    "parallel_tool_calls": [True, False],
    "background": [False],
    "context_management": [[]],
    "prompt_cache_retention": ["in_memory"],
    "reasoning": [{"effort": "none"}],
    "service_tier": ["auto", "default"],
    "store": [False],
    "stream": [True, False],
    "stream_options": [{}],
    "temperature": [0, 1.5],
    "text": [{"format": {"type": "text"}}, {"format": {"type": "json_schema", **FORMAT}}],
    "tool_choice": ["auto", "none", "required", {"type": "function", "name": "get_weather"}],
    "tools": [[FLAT_TOOL]],
    "top_logprobs": [2],
    "top_p": [0.5],
    "truncation": ["disabled"],
}
EMBEDDINGS: Final[dict[str, list[Any]]] = {
    "model": ["mixtral-demo"],
    "input": ["Paris", ["Paris", "Rome"], [300, 301], [[300], [301]]],
    "dimensions": [8],
    "encoding_format": ["float"],
    "user": ["u"],
}
REFUSED: Final[dict[str, dict[str, Any]]] = {
    "chat": {
        "audio": {"voice": "alloy", "format": "mp3"},
        "moderation": {"model": "omni"},
        "prediction": {"type": "content", "content": "x"},
        "prompt_cache_options": {"mode": "explicit"},
        "web_search_options": {},
        "best_of": 2,
        "store": True,
        "reasoning_effort": "high",
        "modalities": ["text", "audio"],
        "functions": [FUNCTION],
        "service_tier": "flex",
        "verbosity": "low",
    },
    "text": {"best_of": 2, "suffix": "x"},
    "responses": {
        "access_programs": ["x"],
        "background": True,
        "background_options": {"x": 1},
        "conversation": "conv_1",
        "image": {"x": 1},
        "max_tool_calls": 1,
        "moderation": {"model": "omni"},
        "previous_response_id": "resp_1",
        "prompt": {"id": "pmpt_1"},
        "prompt_cache_options": {"mode": "explicit"},
        "reasoning": {"effort": "high"},
        "store": True,
        "truncation": "auto",
    },
    "embeddings": {"normalize": False},
}
DOCUMENTED: Final = {
    "chat": chat_create_params.CompletionCreateParamsStreaming,
    "text": completion_create_params.CompletionCreateParamsStreaming,
    "responses": response_create_params.ResponseCreateParamsStreaming,
    "embeddings": embedding_create_params.EmbeddingCreateParams,
}
TRIED: Final = {"chat": CHAT, "text": TEXT, "responses": RESPONSES, "embeddings": EMBEDDINGS}
BASES: Final[dict[str, dict[str, Any]]] = {
    "chat": {"messages": [{"role": "user", "content": "What is the weather in Paris?"}], "max_completion_tokens": 40},
    "text": {"prompt": "One two three", "max_tokens": 4},
    "responses": {"input": "What is the weather in Paris?", "max_output_tokens": 40},
    "embeddings": {"input": "Paris", "encoding_format": "float"},
}
NEEDS: Final[dict[str, dict[str, Any]]] = {
    "top_logprobs": {"logprobs": True, "include": ["message.output_text.logprobs"]},
    "stream_options": {"stream": True},
    "tool_choice": {"tools": [TOOL]},
    "parallel_tool_calls": {"tools": [TOOL]},
}
"""What else must be sent. Each endpoint takes of it what it documents."""


def create_of(client: openai.OpenAI, endpoint: str) -> Callable[..., Any]:
    made = {
        "chat": client.chat.completions.create,
        "text": client.completions.create,
        "responses": client.responses.create,
        "embeddings": client.embeddings.create,
    }
    create: Callable[..., Any] = made[endpoint]
    return create


def send(client: openai.OpenAI, endpoint: str, fields: dict[str, Any]) -> Any:
    """A whole answer, or the list of a stream's chunks. Fields that the client has no argument for go beside it."""
    known = get_type_hints(DOCUMENTED[endpoint])
    asked = {"model": "mixtral-demo", **BASES[endpoint], **fields}
    if "max_tokens" in fields:
        asked.pop("max_completion_tokens", None)
    if endpoint == "responses" and asked.get("tools") == [TOOL]:
        asked["tools"] = [FLAT_TOOL]
    own = {name: value for name, value in asked.items() if name in known}
    others = {name: value for name, value in asked.items() if name not in known}
    answer = create_of(client, endpoint)(**own, extra_body=others or None)
    return list(answer) if asked.get("stream") else answer


def client_for(server: Any, endpoint: str, fields: Iterable[str] = ()) -> openai.OpenAI:
    """Strict, but for one form that the client's types do not allow although its makers send it: a text chunk without
    finish reason."""
    client: openai.OpenAI = server.client(_strict_response_validation=not (endpoint == "text" and "stream" in fields))
    return client


@pytest.mark.parametrize("endpoint", DOCUMENTED)
def test_every_documented_parameter_is_tried_or_refused(endpoint: str) -> None:
    documented = set(get_type_hints(DOCUMENTED[endpoint]))
    assert documented - set(TRIED[endpoint]) - set(REFUSED[endpoint]) == set()
    assert set(TRIED[endpoint]) <= documented, "a name that the client does not know proves nothing"


@pytest.mark.slow
@pytest.mark.parametrize("endpoint", DOCUMENTED)
def test_each_parameter_alone_gets_an_answer_of_the_documented_form(quiet_server: Any, endpoint: str) -> None:
    known = get_type_hints(DOCUMENTED[endpoint])
    for name, values in TRIED[endpoint].items():
        needed = {key: value for key, value in NEEDS.get(name, {}).items() if key in known}
        for value in values:
            fields = {**needed, name: value}
            with client_for(quiet_server, endpoint, fields) as client:
                answer = send(client, endpoint, fields)
            assert answer, fields
            whole = answer if not isinstance(answer, list) else answer[-1]
            assert getattr(whole, "model", "mixtral-demo") == "mixtral-demo"


@pytest.mark.slow
def test_all_parameters_at_once_get_an_answer(quiet_server: Any) -> None:
    for endpoint, tried in TRIED.items():
        fields = {name: values[0] for name, values in tried.items() if name != "max_tokens" or endpoint == "text"}
        with client_for(quiet_server, endpoint, fields) as client:
            assert send(client, endpoint, fields)


@pytest.mark.slow
@pytest.mark.parametrize("endpoint", DOCUMENTED)
def test_what_is_not_done_is_a_bad_request_that_names_it(quiet_server: Any, endpoint: str) -> None:
    with client_for(quiet_server, endpoint) as client:
        for name, value in REFUSED[endpoint].items():
            with pytest.raises(openai.BadRequestError) as caught:
                send(client, endpoint, {name: value})
            assert caught.value.param == name
            assert caught.value.code == "unsupported_parameter", name


@pytest.mark.slow
def test_the_helpers_of_the_client_work(quiet_server: Any) -> None:
    """``parse`` and ``stream`` rebuild whole answers from pieces and check them on the way."""
    text = "Lucy is 34 years old and lives in Berlin. Answer with a JSON object with the fields name, age."
    messages: Any = [{"role": "user", "content": text}]
    with client_for(quiet_server, "chat") as client:
        parsed = client.chat.completions.parse(
            model="mixtral-demo", messages=messages, response_format=Person, temperature=0, max_tokens=80
        )
        assert parsed.choices[0].message.parsed == Person(name="Lucy", age=34)
        response = client.responses.parse(model="mixtral-demo", input=text, text_format=Person, temperature=0)
        assert response.output_parsed == Person(name="Lucy", age=34)
        asked: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
        tools: Any = [{"type": "function", "function": {**FUNCTION, "strict": True}}]
        with client.chat.completions.stream(model="mixtral-demo", messages=asked, tools=tools, temperature=0) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_completion()
        assert "tool_calls.function.arguments.done" in kinds
        (call,) = final.choices[0].message.tool_calls or []
        assert json.loads(call.function.arguments) == {"city": "Paris"}


@pytest.mark.slow
def test_bad_requests_are_sent_once_and_have_their_own_class(quiet_server: Any) -> None:
    """The client repeats 408, 409, 429 and 5xx by itself: what cannot get better must be none of these."""
    sent: list[str] = []
    transport = httpx.Client(event_hooks={"request": [lambda request: sent.append(request.url.path)]})
    bad: list[tuple[str, dict[str, Any], type[openai.APIStatusError]]] = [
        ("chat", {"temperature": 9}, openai.BadRequestError),
        (
            "chat",
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}},
            openai.BadRequestError,
        ),
        ("chat", {"model": "other"}, openai.NotFoundError),
        ("text", {"prompt": [5] * 5000}, openai.BadRequestError),
        ("responses", {"input": []}, openai.BadRequestError),
        ("embeddings", {"dimensions": 10**6}, openai.BadRequestError),
    ]
    with quiet_server.client(max_retries=2, http_client=transport) as client:
        for endpoint, fields, expected in bad:
            sent.clear()
            with pytest.raises(expected) as caught:
                send(client, endpoint, fields)
            assert type(caught.value) is expected
            assert caught.value.code
            assert len(sent) == 1, "no retry"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("other")
        with pytest.raises(openai.NotFoundError) as caught:
            client.files.list()
        assert caught.value.code, "a route that does not exist has the envelope too"
