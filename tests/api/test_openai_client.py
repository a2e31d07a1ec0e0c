"""The official client against a loopback server, with a real engine process around a fake model."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest

from mixtral_serve.api.app import create_app
from mixtral_serve.engine.client import EngineClient
from mixtral_serve.engine.fakes import FakeScript
from mixtral_serve.engine.launch import EngineLaunch
from mixtral_serve.observe.metrics import EngineMetrics

MESSAGES: Any = [{"role": "user", "content": "hello"}]


@asynccontextmanager
async def engine(checkpoint: Path, **script: Any) -> AsyncIterator[tuple[EngineClient, EngineMetrics]]:
    written = msgspec.json.encode(FakeScript(tokenizer=str(checkpoint), **script)).decode()
    launch = EngineLaunch((sys.executable, "-m", "mixtral_serve.engine.fakes", "--script", written))
    metrics = EngineMetrics("tiny")
    client = EngineClient(launch, max_waiting=64, listeners=[metrics])
    await client.start()
    await client.wait_ready()
    try:
        yield client, metrics
    finally:
        await client.stop(0.0)


def strict_client(url: str) -> openai.AsyncOpenAI:
    """A client that refuses answers which are not of the documented form."""
    return openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, _strict_response_validation=True)


def lenient_client(client: openai.AsyncOpenAI) -> openai.AsyncOpenAI:
    """For two forms that the client's own types do not allow although its makers send or ask for them: a text chunk
    without finish reason, and base64, which it decodes only after it has checked the answer."""
    return openai.AsyncOpenAI(base_url=client.base_url, api_key="none", max_retries=0)


@asynccontextmanager
async def served(
    api: Any, loopback: Any, checkpoint: Path, **script: Any
) -> AsyncIterator[tuple[openai.AsyncOpenAI, EngineClient]]:
    async with engine(checkpoint, **script) as (client, metrics):
        app = create_app(replace(api.deps, engine=client, render_metrics=metrics.render))
        async with loopback(app) as port:
            url = f"http://127.0.0.1:{port}/v1"
            async with strict_client(url) as official:
                yield official, client


def test_chat_completions_and_models(api: Any, run: Any, loopback: Any, checkpoint: Path) -> None:
    async def scenario() -> None:
        async with served(api, loopback, checkpoint, output="hello wörld 😀") as (client, _):
            models = await client.models.list()
            assert [model.id for model in models.data] == ["tiny", "org/tiny"]
            assert (await client.models.retrieve("org/tiny")).id == "org/tiny"

            answer = await client.chat.completions.create(model="tiny", messages=MESSAGES, n=2)
            assert [choice.message.content for choice in answer.choices] == ["hello wörld 😀"] * 2
            assert [choice.finish_reason for choice in answer.choices] == ["stop"] * 2
            assert answer.usage is not None
            assert answer.usage.prompt_tokens_details is not None
            assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens

            completion = await client.completions.create(model="tiny", prompt=["a", "b"], max_tokens=3, logprobs=2)
            assert [choice.finish_reason for choice in completion.choices] == ["length"] * 2
            assert completion.choices[0].logprobs is not None
            assert len(completion.choices[0].logprobs.tokens or []) == 3

            scored = await client.chat.completions.create(
                model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=3, max_completion_tokens=2
            )
            assert scored.choices[0].logprobs is not None
            assert [len(token.top_logprobs) for token in scored.choices[0].logprobs.content or []] == [3, 3]

    run(scenario())


def test_streams_and_stop_strings(api: Any, run: Any, loopback: Any, checkpoint: Path) -> None:
    async def scenario() -> None:
        async with served(api, loopback, checkpoint, output="one two three") as (client, _):
            stream = await client.chat.completions.create(
                model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}, stop=["thr"]
            )
            chunks = [chunk async for chunk in stream]
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "one two "
            assert chunks[0].choices[0].delta.role == "assistant"
            assert [chunk.choices[0].finish_reason for chunk in chunks[-3:-1]] == [None, "stop"]
            assert chunks[-1].usage is not None
            assert chunks[-1].usage.completion_tokens > 0

            text = ""
            async with lenient_client(client) as lenient:
                async for part in await lenient.completions.create(model="tiny", prompt="x", stream=True):
                    text += part.choices[0].text
            assert text == " one two three"[: len(text)]

    run(scenario())


def test_errors_are_the_clients_own_classes(api: Any, run: Any, loopback: Any, checkpoint: Path) -> None:
    async def scenario() -> None:
        async with served(api, loopback, checkpoint, output="x") as (client, _):
            with pytest.raises(openai.NotFoundError) as missing:
                await client.chat.completions.create(model="other", messages=MESSAGES)
            assert missing.value.code == "model_not_found"
            with pytest.raises(openai.BadRequestError) as bad:
                await client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=9)
            assert (bad.value.param, bad.value.code) == ("temperature", "decimal_above_max_value")
            with pytest.raises(openai.BadRequestError) as long:
                await client.completions.create(model="tiny", prompt=[5] * 5000)
            assert long.value.code == "context_length_exceeded"

    run(scenario())


def test_row36_a_failing_model_is_an_error_and_the_next_request_works(
    api: Any, run: Any, loopback: Any, checkpoint: Path
) -> None:
    async def scenario() -> None:
        poison = checkpoint_token(api, "Z")
        async with served(api, loopback, checkpoint, output="ok", poison={poison: "nan"}) as (client, _):
            bad: Any = [{"role": "user", "content": "Z"}]
            with pytest.raises(openai.InternalServerError) as failed:
                await client.chat.completions.create(model="tiny", messages=bad)
            assert failed.value.code == "generation_failed"
            answer = await client.chat.completions.create(model="tiny", messages=MESSAGES)
            assert answer.choices[0].message.content == "ok"

    run(scenario())


def checkpoint_token(api: Any, character: str) -> int:
    return int(api.deps.tokenizer.encode(character, add_bos=False)[-1])


def test_row37_a_dying_engine_ends_streams_with_an_error_event(
    api: Any, run: Any, loopback: Any, checkpoint: Path
) -> None:
    async def scenario() -> None:
        async with served(api, loopback, checkpoint, never_ends=True, step_s=0.01, faults={20: "exit"}) as (client, _):
            stream = await client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
            with pytest.raises(openai.APIError) as failed:
                async for _ in stream:
                    pass
            assert failed.value.code == "interrupted"

    run(scenario())


def test_row29_row31_row32_leaving_frees_the_blocks(api: Any, run: Any, loopback: Any, checkpoint: Path) -> None:
    """Streaming, waiting for a whole answer, and still queued: all are gone, and their blocks are free."""

    async def scenario() -> None:
        options = {"never_ends": True, "step_s": 0.005, "max_num_seqs": 2}
        async with served(api, loopback, checkpoint, **options) as (client, engine_client):
            create = client.chat.completions.create
            stream = await create(model="tiny", messages=MESSAGES, stream=True)
            await anext(aiter(stream))
            whole = [asyncio.create_task(create(model="tiny", messages=MESSAGES)) for _ in range(4)]
            while engine_client.num_live < 5 or engine_client.stats.num_waiting < 3:
                await asyncio.sleep(0.005)
            assert engine_client.stats.num_used_blocks > 0
            await stream.close()
            for task in whole:
                task.cancel()
            await asyncio.gather(*whole, return_exceptions=True)
            while engine_client.num_live or engine_client.stats.num_used_blocks:
                await asyncio.sleep(0.005)
            assert engine_client.stats.num_running == engine_client.stats.num_waiting == 0

    run(scenario())


def test_32_concurrent_clients(api: Any, run: Any, loopback: Any, checkpoint: Path) -> None:
    async def scenario() -> None:
        async with served(api, loopback, checkpoint, echo=True, step_s=0.002) as (client, _):

            async def ask(number: int) -> None:
                content: Any = [{"role": "user", "content": f"number {number}"}]
                answer = await client.chat.completions.create(model="tiny", messages=content)
                assert answer.choices[0].message.content == f"[INST] number {number} [/INST]"

            await asyncio.gather(*(ask(number) for number in range(32)))

    run(scenario())


def test_metrics_count_what_happened(api: Any, run: Any, loopback: Any, checkpoint: Path) -> None:
    async def scenario() -> None:
        async with served(api, loopback, checkpoint, output="abc") as (client, _):
            await client.chat.completions.create(model="tiny", messages=MESSAGES)
            page = await client._client.get(str(client.base_url).replace("/v1/", "/metrics"))
            lines = dict(line.rsplit(" ", 1) for line in page.text.splitlines() if not line.startswith("#"))
            labels = '{engine="0",model_name="tiny"}'
            assert float(lines[f"vllm:prompt_tokens_total{labels}"]) > 0
            assert float(lines[f"vllm:generation_tokens_total{labels}"]) > 0
            assert float(lines[f"vllm:time_to_first_token_seconds_count{labels}"]) == 1
            stopped = '{engine="0",finished_reason="stop",model_name="tiny"}'
            assert float(lines[f"vllm:request_success_total{stopped}"]) == 1

    run(scenario())


def test_embeddings(api: Any, run: Any, loopback: Any, checkpoint: Path) -> None:
    async def scenario() -> None:
        async with served(api, loopback, checkpoint) as (client, _):
            texts = ["hello", "world", "hello"]
            async with lenient_client(client) as lenient:
                packed = await lenient.embeddings.create(model="tiny", input=texts)
            plain = await client.embeddings.create(model="tiny", input=texts, encoding_format="float")
            assert packed.usage.total_tokens == plain.usage.total_tokens > 0
            for one, other in zip(packed.data, plain.data, strict=True):
                assert one.embedding == pytest.approx(other.embedding, abs=1e-6)
                assert sum(element**2 for element in one.embedding) == pytest.approx(1.0)
            assert plain.data[0].embedding == plain.data[2].embedding != plain.data[1].embedding
            short = await client.embeddings.create(model="tiny", input="hello", dimensions=3, encoding_format="float")
            assert len(short.data[0].embedding) == 3

    run(scenario())


def test_responses(api: Any, run: Any, loopback: Any, checkpoint: Path) -> None:
    async def scenario() -> None:
        async with served(api, loopback, checkpoint, output="hello wörld") as (client, _):
            answer = await client.responses.create(
                model="tiny",
                input="hi",
                instructions="Be short.",
                metadata={"a": "b"},
                store=False,
                include=["message.output_text.logprobs"],
                top_logprobs=2,
            )
            assert (answer.output_text, answer.status, answer.store) == ("hello wörld", "completed", False)
            assert answer.usage is not None
            assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
            again: Any = [*answer.output, {"role": "user", "content": "and now?"}]
            assert (await client.responses.create(model="tiny", input=again)).status == "completed"

            text = ""
            async for event in await client.responses.create(model="tiny", input="hi", stream=True):
                if event.type == "response.output_text.delta":
                    text += event.delta
            assert text == "hello wörld"
            assert event.type == "response.completed"

            async with client.responses.stream(model="tiny", input="hi") as stream:
                kinds = [event.type async for event in stream]
                final = await stream.get_final_response()
            assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
            assert final.output_text == "hello wörld"

            cut = await client.responses.create(model="tiny", input="hi", stream=True, max_output_tokens=2)
            last = [event async for event in cut][-1]
            assert last.type == "response.incomplete"
            assert last.response.incomplete_details is not None
            assert last.response.incomplete_details.reason == "max_output_tokens"

            with pytest.raises(openai.BadRequestError) as refused:
                await client.responses.create(model="tiny", input="hi", previous_response_id="resp_1")
            assert refused.value.param == "previous_response_id"

    run(scenario())


def test_responses_call_functions(api: Any, run: Any, loopback: Any, checkpoint: Path) -> None:
    nothing = {"type": "object", "properties": {}, "additionalProperties": False}
    tools: Any = [{"type": "function", "name": "now", "parameters": nothing, "strict": True}]
    call = '[{"name": "now", "arguments": {}}]'

    async def scenario() -> None:
        async with served(api, loopback, checkpoint, output=call) as (client, _):
            answer = await client.responses.create(model="tiny", input="hi", tools=tools)
            (item,) = answer.output
            assert item.type == "function_call"
            assert (item.name, item.arguments) == ("now", "{}")
            result: Any = {"type": "function_call_output", "call_id": item.call_id, "output": "noon"}
            follow: Any = [{"role": "user", "content": "hi"}, item, result]
            assert (await client.responses.create(model="tiny", input=follow, tools=tools)).status == "completed"
            kinds = [
                event.type
                async for event in await client.responses.create(model="tiny", input="hi", tools=tools, stream=True)
            ]
            assert "response.function_call_arguments.done" in kinds

    run(scenario())


def test_the_table_of_requests_and_a_cancellation(api: Any, run: Any, loopback: Any, checkpoint: Path) -> None:
    async def scenario() -> None:
        options = {"never_ends": True, "step_s": 0.002, "max_num_seqs": 1}
        async with served(api, loopback, checkpoint, **options) as (client, engine_client):
            create = client.chat.completions.create
            asked = [asyncio.create_task(create(model="tiny", messages=MESSAGES, max_tokens=2000)) for _ in range(2)]
            rows: list[Any] = []
            while [row["blocking_reason"] for row in rows] != [None, "seats"]:
                table = await client._client.get(str(client.base_url) + "requests")
                rows = table.json()["data"]
            assert rows[1]["requests_ahead"] == 0
            for row in rows:
                gone = await client._client.post(str(client.base_url) + f"requests/{row['id']}/cancel")
                assert gone.json()["cancelled_choices"] == 1
            for answer in await asyncio.gather(*asked, return_exceptions=True):
                assert isinstance(answer, openai.BadRequestError)
                assert answer.code == "request_cancelled"
            while engine_client.stats.num_used_blocks:
                await asyncio.sleep(0.005)

    run(scenario())
