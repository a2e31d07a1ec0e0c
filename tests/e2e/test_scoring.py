"""Evaluation harnesses score prompts by ``echo``: their requests, their reading of the answers, and exact numbers.

lm-eval's ``local-completions`` sends token ids with ``echo``, ``logprobs`` 1, ``max_tokens`` 1 and ``temperature`` 0,
and reads each choice's lists from the end of the context to the token before the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from mixtral_serve.demo import checkpoint_path
from mixtral_serve.text.tokenizer import load_tokenizer

TOLERANCE = 1e-4
PAIRS = [
    ("What is the capital of France?", " Paris"),
    ("One two three", " four five six"),
    ("Once upon a time there was a", " little girl who lived in a house by the sea." * 8),
    ("x", " été 😀 ~~"),
]
"""(context, continuation). The third is longer than one step of the shared server takes."""


def load_model() -> Any:
    """Transformers' own, in fp32. Both libraries are heavy, and only this slow test needs them."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.MixtralForCausalLM
    return model.from_pretrained(checkpoint_path(), attn_implementation="eager", dtype=torch.float32).eval()


def reference(model: Any, tokens: Sequence[int]) -> Any:
    """Log-probabilities [position, vocabulary] of what follows each position."""
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([list(tokens)])).logits[0].float(), dim=-1)


def harness_payload(prompts: list[list[int]], model: str, **changes: Any) -> dict[str, Any]:
    asked = {"model": model, "prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234}
    return asked | {"echo": True} | changes


def harness_reading(answer: dict[str, Any], num_context_tokens: list[int], *, end: int | None) -> list[Any]:
    """(sum of log-probabilities, whether each token was the likeliest) per choice."""
    results = []
    for choice, start in zip(
        sorted(answer["choices"], key=lambda choice: choice["index"]), num_context_tokens, strict=True
    ):
        values = choice["logprobs"]["token_logprobs"][start:end]
        tops = choice["logprobs"]["top_logprobs"][start:end]
        greedy = all(value == max(top.values()) for value, top in zip(values, tops, strict=True))
        results.append((sum(values), greedy))
    return results


@pytest.mark.slow
def test_a_harness_reads_transformers_own_numbers(quiet_server: Any) -> None:
    tokenizer = load_tokenizer(checkpoint_path())
    name = quiet_server.client().models.list().data[0].id
    prompts, starts, expected = [], [], []
    model = load_model()
    contexts = [tokenizer.encode(context, add_bos=True).tolist() for context, _ in PAIRS]
    continuations = [tokenizer.encode(text, add_bos=False).tolist() for _, text in PAIRS]
    # What the model itself would say: the one continuation that is greedy.
    context = contexts[0]
    said = [*context]
    for _ in range(6):
        said.append(int(reference(model, said)[-1].argmax()))
    contexts.append(context)
    continuations.append(said[len(context) :])
    for context, continuation in zip(contexts, continuations, strict=True):
        prompts.append(context + continuation)
        starts.append(len(context))
        logprobs = reference(model, prompts[-1])
        rows = range(len(context) - 1, len(prompts[-1]) - 1)
        values = [float(logprobs[row, prompts[-1][row + 1]]) for row in rows]
        greedy = all(int(logprobs[row].argmax()) == prompts[-1][row + 1] for row in rows)
        expected.append((sum(values), greedy, len(values)))
    assert [greedy for _, greedy, _ in expected[1:]] == [False, False, False, True]
    for changes, end in (({}, -1), ({"max_tokens": 0}, None)):
        reply = httpx.post(
            quiet_server.base_url + "/v1/completions", json=harness_payload(prompts, name, **changes), timeout=60.0
        )
        assert reply.status_code == 200, reply.text
        for read, (total, greedy, count) in zip(harness_reading(reply.json(), starts, end=end), expected, strict=True):
            assert read[1] == greedy
            assert abs(read[0] - total) <= TOLERANCE * count
    for choice, prompt in zip(reply.json()["choices"], prompts, strict=True):
        told = choice["logprobs"]
        assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
        assert len(told["tokens"]) == len(told["text_offset"]) == len(prompt)
        logprobs = reference(model, prompt)
        for position in range(1, len(prompt)):
            value = float(logprobs[position - 1, prompt[position]])
            assert abs(told["token_logprobs"][position] - value) <= TOLERANCE
            best = max(told["top_logprobs"][position].values())
            assert abs(best - float(logprobs[position - 1].max())) <= TOLERANCE


def test_a_warmed_prompt_is_found_in_the_cache(quiet_server: Any) -> None:
    create = quiet_server.client().completions.create
    name = quiet_server.client().models.list().data[0].id
    prompt = list(range(300, 364))
    asked: dict[str, Any] = {"model": name, "prompt": prompt, "extra_body": {"cache_salt": "warm"}}
    warmed = create(**asked, max_tokens=0)
    assert (warmed.choices[0].text, warmed.choices[0].finish_reason) == ("", "length")
    usage = create(**asked, max_tokens=1).usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert (usage.prompt_tokens_details.cached_tokens or 0) >= 48
