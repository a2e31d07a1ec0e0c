"""``/openapi.json`` is true: it lists what there is, and what is answered is what it says."""

from __future__ import annotations

from typing import Any

import pytest
from jsonschema import Draft202012Validator

from mixtral_serve.api.openapi import OPERATIONS, openapi_document

MESSAGES = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "name": "now", "parameters": {"type": "object"}}
EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        {"model": "tiny", "messages": MESSAGES, "n": 2, "logprobs": True, "top_logprobs": 1, "seed": None},
        {"model": "tiny", "messages": MESSAGES, "best_of": 1, "store": False},
    ],
    "/v1/completions": [{"model": "tiny", "prompt": ["a", "b"], "logprobs": 1, "echo": True}],
    "/v1/responses": [
        {"model": "tiny", "input": "hello", "truncation": "disabled"},
        {"model": "tiny", "input": [{"role": "user", "content": "x"}], "tools": [TOOL]},
    ],
    "/v1/embeddings": [{"model": "tiny", "input": ["a", [5]]}, {"model": "tiny", "input": "a", "dimensions": 2}],
    "/tokenize": [{"prompt": "x", "return_token_strs": True}, {"messages": MESSAGES}],
    "/detokenize": [{"tokens": []}],
    "/apply-template": [{"messages": MESSAGES}],
}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return openapi_document("1.2.3")


def validator(document: dict[str, Any], schema: Any) -> Draft202012Validator:
    return Draft202012Validator({**schema, "components": document["components"]})


def body_schema(document: dict[str, Any], path: str) -> Any:
    return document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]


def test_it_is_served_and_says_what_it_is(api: Any) -> None:
    answer = api.call("GET", "/openapi.json").json()
    assert answer["openapi"] == "3.1.0"
    assert answer["info"] == {"title": "mixtral-serve", "version": "0.0.0"}
    assert set(answer["paths"]) == {operation.path for operation in OPERATIONS}


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    def references(value: Any) -> set[str]:
        if isinstance(value, dict):
            own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
            return own.union(*map(references, value.values()))
        return set().union(*map(references, value)) if isinstance(value, list) else set()

    known = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert references(document) <= known


def test_every_schema_is_one(document: dict[str, Any]) -> None:
    for schema in document["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("path", EXAMPLES)
def test_what_is_sent_and_answered_is_what_it_describes(api: Any, document: dict[str, Any], path: str) -> None:
    for body in EXAMPLES[path]:
        assert not list(validator(document, body_schema(document, path)).iter_errors(body)), body
        reply = api.call("POST", path, body)
        assert reply.status == 200, reply.body
        described = document["paths"][path]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
        assert not list(validator(document, described).iter_errors(reply.json()))


@pytest.mark.parametrize("operation", [each for each in OPERATIONS if each.method == "get"], ids=lambda each: each.path)
def test_what_is_answered_without_a_body_is_what_it_describes(
    api: Any, document: dict[str, Any], operation: Any
) -> None:
    reply = api.call("GET", operation.path.replace("{model_id}", "tiny"))
    assert reply.status == 200
    content = document["paths"][operation.path]["get"]["responses"]["200"]["content"]
    assert reply.headers["content-type"].partition(";")[0] in content
    if "application/json" in content:
        assert not list(validator(document, content["application/json"]["schema"]).iter_errors(reply.json()))


@pytest.mark.parametrize("path", EXAMPLES)
def test_it_forbids_what_is_refused(api: Any, document: dict[str, Any], path: str) -> None:
    check = validator(document, body_schema(document, path))
    for wrong in ({"colour": 1}, {"model": 5}, {"model": ""}, {"messages": 5}, {"tokens": [-1]}, {"input": []}):
        body = EXAMPLES[path][0] | wrong
        assert check.is_valid(body) is False, body
        assert api.call("POST", path, body).status == 400
