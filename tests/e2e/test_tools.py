"""Functions, from the definition to the answer that uses the result, by the official client and the bundled model."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

GET_WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
SET_TIMER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "set_timer",
        "description": "Set a timer",
        "parameters": {"type": "object", "properties": {"minutes": {"type": "integer"}}, "required": ["minutes"]},
    },
}
QUESTIONS = (
    ("What is the weather in Paris?", "get_weather", {"city": "Paris"}),
    ("Set a timer for 12 minutes.", "set_timer", {"minutes": 12}),
    ("Tell me the weather in Rome.", "get_weather", {"city": "Rome"}),
    ("Start a timer of 45 minutes.", "set_timer", {"minutes": 45}),
)


@pytest.fixture
def model(quiet_server: Any) -> str:
    name: str = quiet_server.client().models.list().data[0].id
    return name


@pytest.fixture
def client(quiet_server: Any) -> openai.OpenAI:
    opened: openai.OpenAI = quiet_server.client(_strict_response_validation=True)
    return opened


def ask(client: openai.OpenAI, model: str, messages: list[Any], **fields: Any) -> Any:
    asked: dict[str, Any] = {"tools": [GET_WEATHER, SET_TIMER], "temperature": 0, "max_tokens": 96, **fields}
    return client.chat.completions.create(model=model, messages=messages, **asked)


def said(question: str) -> list[Any]:
    return [{"role": "user", "content": question}]


@pytest.mark.parametrize(("question", "name", "arguments"), QUESTIONS)
def test_the_model_calls_the_function_that_the_question_is_for(
    client: openai.OpenAI, model: str, question: str, name: str, arguments: dict[str, Any]
) -> None:
    choice = ask(client, model, said(question)).choices[0]
    calls = choice.message.tool_calls
    assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == [(name, arguments)]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)


def test_a_question_for_no_function_is_answered_in_text(client: openai.OpenAI, model: str) -> None:
    choice = ask(client, model, said("What is the capital of France?")).choices[0]
    assert "Paris" in (choice.message.content or "")
    assert (choice.finish_reason, choice.message.tool_calls) == ("stop", None)


def test_a_stream_makes_the_same_calls_as_a_whole_answer(client: openai.OpenAI, model: str) -> None:
    question = "What is the weather in Paris and London?"
    whole = ask(client, model, said(question)).choices[0].message.tool_calls
    calls: dict[int, dict[str, Any]] = {}
    reasons: list[str] = []
    for chunk in ask(client, model, said(question), stream=True):
        choice = chunk.choices[0]
        assert not choice.delta.content
        reasons += [choice.finish_reason] if choice.finish_reason else []
        for part in choice.delta.tool_calls or []:
            call = calls.setdefault(part.index, {"id": part.id, "name": part.function.name, "arguments": ""})
            call["arguments"] += part.function.arguments
    assert [(call["name"], call["arguments"]) for call in calls.values()] == [
        (call.function.name, call.function.arguments) for call in whole
    ]
    assert reasons == ["tool_calls"]
    assert len(calls) == 2, "the model was taught to ask for both cities at once"
    assert len(ask(client, model, said(question), parallel_tool_calls=False).choices[0].message.tool_calls) == 1


def test_a_forced_call_is_made_whatever_is_asked(client: openai.OpenAI, model: str) -> None:
    named = {"type": "function", "function": {"name": "set_timer"}}
    for tool_choice, reason in ((named, "stop"), ("required", "tool_calls")):
        # Hot enough that nothing but the grammar can hold the form.
        answer = ask(client, model, said("Hello!"), tool_choice=tool_choice, temperature=1.5, n=4, seed=1)
        for choice in answer.choices:
            if choice.finish_reason == "length":
                continue
            assert choice.finish_reason == reason
            for call in choice.message.tool_calls:
                arguments = json.loads(call.function.arguments)
                expected = {"set_timer": ("minutes", int), "get_weather": ("city", str)}[call.function.name]
                assert isinstance(arguments[expected[0]], expected[1])
                assert tool_choice == "required" or call.function.name == "set_timer"


def test_a_result_is_fed_back_and_used(client: openai.OpenAI, model: str) -> None:
    """Ask, call, result, answer: what the answer says stands in the result alone."""
    find_person: dict[str, Any] = {
        "type": "function",
        "function": {
            "name": "find_person",
            "description": "Find a person",
            "parameters": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
        },
    }
    messages = said("Find the person with name Anna.")
    call = ask(client, model, messages, tools=[find_person], tool_choice="required").choices[0].message
    assert call.tool_calls[0].function.name == "find_person"
    messages += [
        call.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": "Anna is 34 years old and lives in Paris."},
        {"role": "user", "content": "Answer with a JSON object with the fields age, city."},
    ]
    answer = ask(client, model, messages, tools=[find_person]).choices[0]
    assert answer.finish_reason == "stop"
    assert json.loads(answer.message.content or "") == {"age": 34, "city": "Paris"}


def test_an_answer_can_be_continued(client: openai.OpenAI, model: str) -> None:
    whole = ask(client, model, said("Count from 3 to 9."), tools=openai.NOT_GIVEN).choices[0].message.content
    begun = [*said("Count from 3 to 9."), {"role": "assistant", "content": whole[:4]}]
    body = {"continue_final_message": True, "add_generation_prompt": False}
    rest = ask(client, model, begun, tools=openai.NOT_GIVEN, extra_body=body).choices[0].message.content
    assert whole[:4] + rest == whole


@pytest.mark.slow
def test_langchain_runs_a_tool_loop(quiet_server: Any, model: str) -> None:
    @tool
    def get_weather(city: str) -> str:
        """Get the weather in a city"""
        return f"{city} is 34 years old."  # a sentence of a kind that the model can read

    chat = ChatOpenAI(
        model=model, base_url=quiet_server.base_url + "/v1", api_key="none", temperature=0, max_retries=0, max_tokens=96
    )
    messages: list[Any] = [HumanMessage("What is the weather in Paris?")]
    offered = chat.bind_tools([get_weather])
    answer = offered.invoke(messages)
    assert [(call["name"], call["args"]) for call in answer.tool_calls] == [("get_weather", {"city": "Paris"})]
    streamed: Any = None
    for chunk in offered.stream(messages):
        streamed = chunk if streamed is None else streamed + chunk
    assert [(call["name"], call["args"]) for call in streamed.tool_calls] == [("get_weather", {"city": "Paris"})]
    results = [get_weather.invoke(call) for call in answer.tool_calls]
    assert all(isinstance(result, ToolMessage) for result in results)
    request = HumanMessage("Answer with a JSON object with the fields name, age.")
    last = offered.invoke([*messages, answer, *results, request])
    assert json.loads(str(last.content))["age"] == 34
    assert not last.tool_calls
    forced = chat.bind_tools([get_weather], tool_choice="get_weather").invoke([HumanMessage("Hello!")])
    assert forced.tool_calls[0]["name"] == "get_weather"


@pytest.mark.slow
def test_the_operator_chooses_the_chat_format_and_how_strict_it_is(new_server: Any) -> None:
    with new_server("--chat-template", "mixtral", "--strict-chat") as server:
        strict = server.client()
        name = strict.models.list().data[0].id
        answer = ask(strict, name, said("What is the capital of France?"), tools=openai.NOT_GIVEN)
        assert "Paris" in answer.choices[0].message.content
        with pytest.raises(openai.BadRequestError) as caught:
            ask(strict, name, [*said("Hello!"), {"role": "assistant", "content": "Hi"}], tools=openai.NOT_GIVEN)
        assert caught.value.param == "messages"
        call = ask(strict, name, said("What is the weather in Paris?")).choices[0].message.tool_calls[0]
        assert json.loads(call.function.arguments) == {"city": "Paris"}, "the format is the one it was trained on"
