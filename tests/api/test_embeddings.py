"""``POST /v1/embeddings``: every form of input, vectors of length one, scheduled and cancelled like any request."""

from __future__ import annotations

import asyncio
import base64
import math
from array import array
from dataclasses import replace
from typing import Any

import pytest

from mixtral_serve.engine.messages import Delta
from scheduler.request import RequestKind

PATH = "/v1/embeddings"


def embed(api: Any, **fields: Any) -> Any:
    return api.call("POST", PATH, {"model": "tiny", "input": "hello"} | fields)


def prompts(api: Any) -> list[list[int]]:
    return [list(array("i", submit.prompt)) for submit in api.engine.submits]


def test_a_text_becomes_a_vector_of_length_one(api: Any) -> None:
    reply = embed(api)
    assert reply.status == 200
    answer = reply.json()
    num_tokens = len(api.deps.tokenizer.encode("hello", add_bos=True))
    assert answer == {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": [3 / 13, 4 / 13, 0.0, 12 / 13]}],
        "model": "tiny",
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }
    submit = api.engine.last
    assert (submit.kind, submit.max_tokens, submit.request_id[:5]) == (RequestKind.EMBED, 0, "embd-")


@pytest.mark.parametrize(
    ("given", "num_inputs"),
    [("a", 1), (["a"], 1), (["a", "b", "c"], 3), ([5, 6], 1), ([[5, 6], [7]], 2), (["a", [7, 8]], 2)],
)
def test_every_form_of_input_is_taken(api: Any, given: Any, num_inputs: int) -> None:
    answer = embed(api, input=given).json()
    assert [item["index"] for item in answer["data"]] == list(range(num_inputs))
    assert len(api.engine.submits) == num_inputs


def test_ids_are_taken_as_they_are_and_texts_begin_a_sequence(api: Any) -> None:
    embed(api, input=["hello", [7, 8]])
    assert prompts(api) == [list(api.deps.tokenizer.encode("hello", add_bos=True)), [7, 8]]


def test_fewer_dimensions_are_the_leading_ones_of_length_one_again(api: Any) -> None:
    (item,) = embed(api, dimensions=2).json()["data"]
    assert item["embedding"] == pytest.approx([0.6, 0.8])
    whole = embed(api, dimensions=4).json()["data"][0]["embedding"]
    assert math.hypot(*whole) == pytest.approx(1.0)
    api.engine.embedding = (0.0, 0.0, 0.0, 1.0)
    assert embed(api, dimensions=2).json()["data"][0]["embedding"] == [0.0, 0.0], "there is nothing to stretch"


def test_base64_is_little_endian_32_bit_floats(api: Any) -> None:
    (item,) = embed(api, encoding_format="base64").json()["data"]
    data = base64.b64decode(item["embedding"])
    assert data[8:12] == b"\0\0\0\0"
    assert list(array("f", data)) == pytest.approx([3 / 13, 4 / 13, 0.0, 12 / 13], rel=1e-6)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"input": ""}, "input", "empty_string"),
        ({"input": []}, "input", "empty_array"),
        ({"input": [[]]}, "input", "empty_array"),
        ({"input": ["a", ""]}, "input", "empty_string"),
        ({"input": [1, "a"]}, "input", "invalid_type"),
        ({"input": [True]}, "input", "invalid_type"),
        ({"input": {"a": 1}}, "input", "invalid_type"),
        ({"input": [-1]}, "input", "invalid_value"),
        ({"input": [2**31]}, "input", "invalid_value"),
        ({"input": [100_000]}, "input", "invalid_value"),
        ({"input": ["a"] * 2049}, "input", "array_above_max_length"),
        ({"input": [5] * 513}, "input", "context_length_exceeded"),
        ({"input": "x " * 20_000}, "input", "context_length_exceeded"),
        ({"input": None}, "input", "missing_required_parameter"),
        ({"model": None}, "model", "missing_required_parameter"),
        ({"dimensions": 0}, "dimensions", "integer_below_min_value"),
        ({"dimensions": 5}, "dimensions", "integer_above_max_value"),
        ({"encoding_format": "hex"}, "encoding_format", "invalid_value"),
        ({"normalize": False}, "normalize", "unsupported_parameter"),
        ({"colour": "red"}, "colour", "unknown_parameter"),
    ],
)
def test_what_cannot_be_is_refused_by_name(api: Any, fields: dict[str, Any], param: str, code: str) -> None:
    reply = embed(api, **fields)
    assert (reply.status, reply.error["param"], reply.error["code"]) == (400, param, code)
    assert embed(api).status == 200


def test_an_unknown_model_and_a_model_without_embeddings_are_told_apart(api: Any) -> None:
    assert embed(api, model="other").error["code"] == "model_not_found"
    api.engine.info = replace(api.engine.info, hidden_size=0)
    assert embed(api).error["code"] == "unsupported_parameter"


def test_many_inputs_are_computed_a_few_at_a_time_and_answered_in_order(api: Any, run: Any) -> None:
    api.engine.embedding = None

    async def scenario() -> None:
        asked = asyncio.create_task(api.send("POST", PATH, {"model": "tiny", "input": [[i + 3] for i in range(150)]}))
        num_ended, waves = 0, []
        while not asked.done():
            while not asked.done() and len(api.engine.submits) == num_ended:
                await asyncio.sleep(0)
            wave = api.engine.submits[num_ended:]
            num_ended += len(wave)
            waves.append(len(wave))
            for submit in reversed(wave):
                vector = (float(array("i", submit.prompt)[0]), 1.0)
                delta = Delta(request_id=submit.request_id, finish_reason="stop", embedding=vector)
                api.engine.streams[submit.request_id].push(delta)
        assert waves[:3] == [64, 64, 22]
        data = (await asked).json()["data"]
        ratios = [item["embedding"][0] / item["embedding"][1] for item in data]
        assert ratios == pytest.approx([float(i + 3) for i in range(150)])

    run(scenario())


def test_leaving_cancels_what_is_under_way_and_nothing_more_begins(api: Any, run: Any, start_exchange: Any) -> None:
    api.engine.embedding = None

    async def scenario() -> None:
        body = b'{"model": "tiny", "input": [%b]}' % b",".join(b"[%d]" % (i + 3) for i in range(100))
        call = start_exchange(api.app, "POST", PATH, body)
        task = call.start()
        await api.engine.on_submit.wait()
        call.left.set()
        await task
        assert len(api.engine.cancelled) == len(api.engine.submits) == 64

    run(scenario())


def test_a_model_that_fails_is_an_error_and_the_rest_is_cancelled(api: Any, run: Any) -> None:
    api.engine.embedding = None

    async def scenario() -> None:
        asked = asyncio.create_task(api.send("POST", PATH, {"model": "tiny", "input": [[3], [4]]}))
        await api.engine.on_submit.wait()
        api.engine.end(api.engine.submits[0].request_id, "error", error="at /home")
        reply = await asked
        assert (reply.status, reply.error["code"]) == (500, "generation_failed")
        assert api.engine.cancelled == [api.engine.submits[1].request_id]

    run(scenario())
