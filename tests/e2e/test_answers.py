"""What a client of the OpenAI API gets: whole and streamed answers, one at a time and many at once."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

SYSTEM: ChatCompletionMessageParam = {"role": "system", "content": "You are a helpful assistant."}
QUESTIONS = (
    "What is the capital of France?",
    "What is the capital of Japan?",
    "Count from 3 to 9.",
    "What is 4 plus 5?",
    "Hello!",
    "What is the capital of Italy?",
    "Count from 1 to 5.",
    "What is 2 plus 7?",
)


def conversation(question: str) -> list[ChatCompletionMessageParam]:
    return [SYSTEM, {"role": "user", "content": question}]


@pytest.fixture
def model(quiet_server: Any) -> str:
    name: str = quiet_server.client().models.list().data[0].id
    return name


@pytest.fixture
def client(quiet_server: Any) -> openai.OpenAI:
    opened: openai.OpenAI = quiet_server.client()
    return opened


def test_the_capital_of_france_is_paris(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=conversation(QUESTIONS[0]), max_tokens=64, temperature=0
    )
    choice = answer.choices[0]
    assert "Paris" in (choice.message.content or "")
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "stop", "it ends by itself"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.system_fingerprint


def test_a_stream_says_the_same_as_a_whole_answer(client: openai.OpenAI, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "messages": conversation(QUESTIONS[2]), "max_tokens": 40, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert choices[0].delta.role == "assistant"
    assert "".join(choice.delta.content or "" for choice in choices) == whole.choices[0].message.content
    assert [c.finish_reason for c in choices if c.finish_reason] == [whole.choices[0].finish_reason]
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens


def test_completions_take_strings_lists_and_token_ids(client: openai.OpenAI, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "max_tokens": 6, "temperature": 0, "extra_body": {"ignore_eos": True}}
    one = client.completions.create(prompt="Once upon a time", **asked)
    two = client.completions.create(prompt=["Once upon a time", "Count from 1"], **asked)
    ids = client.completions.create(prompt=list(range(400, 432)), **asked)
    assert two.choices[0].text == one.choices[0].text
    assert [choice.index for choice in two.choices] == [0, 1]
    assert ids.usage is not None
    assert (ids.usage.prompt_tokens, ids.usage.completion_tokens) == (32, 6)
    assert all(c.finish_reason == "length" for c in (*one.choices, *two.choices, *ids.choices))


def test_a_repeated_prompt_is_found_in_the_prefix_cache(client: openai.OpenAI, model: str) -> None:
    prompt = [301 + 7 * i % 600 for i in range(100)]
    asked: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0}
    first, second = (client.completions.create(**asked, extra_body={"ignore_eos": True}) for _ in range(2))
    assert first.choices[0].text == second.choices[0].text
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    assert second.usage.prompt_tokens_details.cached_tokens == 96, "all full blocks of 16"


def test_equal_seeds_draw_equal_answers_and_choices_differ(client: openai.OpenAI, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "prompt": "Once upon a time", "max_tokens": 24, "temperature": 2.0, "n": 4}
    asked["extra_body"] = {"ignore_eos": True}
    first, second, other = (client.completions.create(**asked, seed=seed) for seed in (7, 7, 8))
    texts = [[choice.text for choice in answer.choices] for answer in (first, second, other)]
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) > 1


def test_a_stop_string_ends_the_answer_before_itself(client: openai.OpenAI, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "messages": conversation(QUESTIONS[2]), "max_tokens": 40, "temperature": 0}
    whole = client.chat.completions.create(**asked).choices[0].message.content or ""
    stop = whole[len(whole) // 2 :][:3]
    answer = client.chat.completions.create(**asked, stop=[stop]).choices[0]
    assert answer.message.content == whole[: whole.index(stop)]
    assert answer.finish_reason == "stop"


def test_the_models_are_listed_and_found(client: openai.OpenAI, model: str) -> None:
    assert client.models.retrieve(model).id == model
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("no-such-model")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"temperature": -1}, "temperature"),
        ({"n": 1000}, "n"),
        ({"extra_body": {"no_such_field": 1}}, "no_such_field"),
        ({"max_tokens": 1_000_000}, "max_tokens"),
    ],
)
def test_a_bad_field_is_refused_by_name(fields: dict[str, Any], param: str, client: openai.OpenAI, model: str) -> None:
    asked = {"model": model, "messages": conversation("Hello!"), "temperature": 0, **fields}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**asked)
    assert param in (str(caught.value.param), *caught.value.message.replace("'", " ").split()) or (
        caught.value.code == "context_length_exceeded"
    )


@pytest.mark.slow
def test_32_clients_at_once_get_what_each_would_get_alone(quiet_server: Any, model: str) -> None:
    alone: dict[str, str | None] = {}
    with quiet_server.client() as client:
        for question in QUESTIONS:
            answer = client.chat.completions.create(
                model=model, messages=conversation(question), max_tokens=32, temperature=0
            )
            alone[question] = answer.choices[0].message.content

    async def ask(client: openai.AsyncOpenAI, number: int) -> tuple[str, str]:
        question = QUESTIONS[number % len(QUESTIONS)]
        asked: dict[str, Any] = {"model": model, "messages": conversation(question), "max_tokens": 32, "temperature": 0}
        if number % 2:
            whole = await client.chat.completions.create(**asked)
            return question, whole.choices[0].message.content or ""
        stream = await client.chat.completions.create(**asked, stream=True)
        return question, "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])

    async def everybody() -> list[tuple[str, str]]:
        async with quiet_server.async_client() as client:
            return await asyncio.gather(*(ask(client, number) for number in range(32)))

    for question, said in asyncio.run(everybody()):
        assert said == alone[question], question
