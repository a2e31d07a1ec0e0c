"""How to see of each parameter that it works: what to send, and what to look at.

A probe belongs to a parameter's name, or to one endpoint's parameter (``"/v1/completions logprobs"``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mixtral_serve.contract import SamplingParams
from mixtral_serve.engine.admission import decode_prompt
from mixtral_serve.engine.messages import Submit

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
EMBEDDINGS = "/v1/embeddings"
TOKENIZE = "/tokenize"
DETOKENIZE = "/detokenize"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "seed": 1},
    COMPLETIONS: {"model": "tiny", "prompt": "hello world", "seed": 1},
    RESPONSES: {"model": "tiny", "input": "hello", "seed": 1},
    EMBEDDINGS: {"model": "tiny", "input": "hello world"},
    TOKENIZE: {"prompt": "hello world"},
    DETOKENIZE: {"tokens": [269, 274]},
}


@dataclass(frozen=True)
class Seen:
    """What came of a request: what the engine was told, and what the client was, without ids."""

    submits: list[Submit]
    answer: Any
    """A whole answer, or the list of a stream's events."""

    @property
    def submit(self) -> Submit:
        return self.submits[0]

    @property
    def prompt(self) -> list[int]:
        return decode_prompt(self.submit.prompt).tolist()

    @property
    def sampling(self) -> SamplingParams:
        return self.submit.sampling

    @property
    def choice(self) -> Any:
        return self.answer["choices"][0]


@dataclass(frozen=True)
class Probe:
    """How to see that a parameter works."""

    value: Any
    """Legal, and not the default."""
    shows: Callable[[Seen], Any]
    """Whether it did what it says: false without it, true with it."""
    base: dict[str, Any] = field(default_factory=dict)
    """Other parameters that it needs."""
    edges: list[Any] | None = None
    """Smallest and largest legal values, where the bounds depend on more than the schema."""
    beyond: list[Any] = field(default_factory=list)
    """Illegal values that the schema does not tell of."""
    template: str | None = None
    """A chat template that shows it, where Mixtral's own has no use for it."""


def sampling(name: str, value: Any, sent: Any = None) -> Probe:
    return Probe(value if sent is None else sent, lambda seen: getattr(seen.sampling, name) == value)


def submitted(name: str, value: Any, sent: Any = None, **more: Any) -> Probe:
    return Probe(value if sent is None else sent, lambda seen: getattr(seen.submit, name) == value, **more)


def names_ids(seen: Seen) -> bool:
    return "token_id:300" in str(seen.choice["logprobs"])


def repeated(name: str) -> Probe:
    """A label that the answer repeats."""
    return Probe("x", lambda seen: seen.answer.get(name) == "x")


def label(value: Any) -> Probe:
    """Without effect, which ``test_a_label_has_no_effect`` shows."""
    return Probe(value, lambda _: True)


LABELS = [(path, name) for path in (CHAT, COMPLETIONS) for name in ("user", "safety_identifier", "prompt_cache_key")]
LABELS += [
    (COMPLETIONS, "metadata"),
    (RESPONSES, "service_tier"),
    (EMBEDDINGS, "user"),
    (TOKENIZE, "model"),
    (DETOKENIZE, "model"),
]
STREAM = {"stream": True}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
USER = {"role": "user", "content": "x"}
HE = {"role": "assistant", "content": "he"}
TOOL = {"type": "function", "function": {"name": "f"}}
FUNCTION = {"type": "function", "name": "f"}
NAMED = {"type": "function", "function": {"name": "f"}}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}}
PROBES: dict[str, Probe] = {
    "add_generation_prompt": Probe(
        False, lambda seen: 370 not in seen.prompt, template="{% if add_generation_prompt %}x{% endif %}y"
    ),
    "add_special_tokens": Probe(False, lambda seen: seen.prompt == [269, 274]),
    "allowed_token_ids": Probe([5, 6], lambda seen: seen.sampling.allowed_token_ids == (5, 6), beyond=[[377], [-1]]),
    "bad_words": Probe(["hello"], lambda seen: len(seen.sampling.bad_words) == 2),
    "cache_salt": submitted("cache_salt", "s"),
    "continue_final_message": Probe(
        True,
        lambda seen: seen.prompt[-1] != 2,
        base={"messages": [USER, HE]},
    ),
    "echo": Probe(True, lambda seen: seen.choice["text"] == "hello worldhello world"),
    "frequency_penalty": sampling("frequency_penalty", 0.5),
    "ignore_eos": submitted("ignore_eos", True),
    "include_stop_str_in_output": submitted("include_stop", True),
    "logit_bias": Probe(
        {"7": -2.5},
        lambda seen: seen.sampling.logit_bias == ((7, -2.5),),
        edges=[{}, {"0": -100, "376": 100}, {str(i): 1 for i in range(377)}],
        beyond=[
            {str(i): 1 for i in range(1025)},
            5,
            {"377": 1},
            {"-1": 1},
            {"x": 1},
            {"05": 1},
            {"5": 101},
            {"5": -101},
            {"5": True},
            {"5": None},
        ],
    ),
    "max_completion_tokens": submitted("max_tokens", 7, edges=[0, 400]),
    "max_tokens": submitted("max_tokens", 7, edges=[0, 400]),
    "messages": Probe(
        [USER],
        lambda seen: seen.prompt.count(370) == 1,
        base={"messages": [USER, USER | {"role": "assistant"}, USER]},
        edges=[[USER], [{"role": "user", "content": ""}] * 128],
        beyond=[[], "x", [USER] * 1025],
    ),
    "min_p": sampling("min_p", 0.5),
    "min_tokens": submitted("min_tokens", 3, base={"max_tokens": 5}, edges=[0, 5], beyond=[6]),
    "model": Probe(
        "org/tiny",
        lambda seen: seen.answer["model"] == "org/tiny",
        edges=["tiny", "org/tiny"],
    ),
    "n": Probe(3, lambda seen: len(seen.submits) == len(seen.answer["choices"]) == 3, edges=[1, 16], beyond=[17]),
    "parallel_tool_calls": Probe(
        False,
        lambda seen: "next{" not in (seen.submit.grammar or ""),
        base={"tools": [TOOL], "tool_choice": "required"},
    ),
    "presence_penalty": sampling("presence_penalty", -0.5),
    "priority": submitted("priority", -3),
    "prompt": Probe(
        [5, 6],
        lambda seen: seen.prompt == [5, 6],
        edges=["", "x", [0], [376], ["a"] * 128, [[5], "b"]],
        beyond=[[], [[]], [-1], [377], ["a"] * 129, [1.5], 5],
    ),
    "prompt_cache_key": label("k"),
    "prompt_logprobs": sampling("prompt_logprobs", 2),
    "repetition_penalty": sampling("repetition_penalty", 1.5),
    "response_format": Probe(
        {"type": "json_object"},
        lambda seen: "json_schema" in (seen.submit.grammar or ""),
        edges=[{"type": "text"}, {"type": "json_object"}, JSON_SCHEMA],
        beyond=[{}, {"type": "x"}, {"type": "json_schema"}, 5, JSON_SCHEMA | {"type": "text"}],
    ),
    "return_token_ids": Probe(
        True, lambda seen: seen.choice.get("token_ids") == [300] * 11 and "prompt_token_ids" in str(seen.answer)
    ),
    "return_progress": submitted("report_progress", True, base=STREAM),
    "safety_identifier": label("s"),
    "seed": sampling("seed", 2),
    "skip_special_tokens": submitted("skip_special_tokens", False),
    "stop": submitted("stop", ("END",), sent="END", beyond=[""]),
    "stop_token_ids": submitted("stop_token_ids", (5,), sent=[5], beyond=[[377], [-1]]),
    "stream": Probe(True, lambda seen: isinstance(seen.answer, list)),
    "stream_options": Probe(
        {"include_usage": True},
        lambda seen: "usage" in seen.answer[-2],
        base=STREAM,
        edges=[{}, {"include_usage": False}],
        beyond=[[], {"x": 1}],
    ),
    "stream_options.continuous_usage_stats": Probe(
        True, lambda seen: all((event["usage"] or {}).get("total_tokens") for event in seen.answer[:-1]), base=USAGE
    ),
    "stream_options.include_usage": Probe(True, lambda seen: "usage" in seen.answer[-2], base=STREAM),
    "structured_outputs": Probe(
        {"regex": "a+"},
        lambda seen: "/a+/" in (seen.submit.grammar or ""),
        edges=[{"regex": "a"}, {"choice": ["x"]}, {"json": {}}, {"json_object": True}, {"grammar": 'start: "x"'}],
        beyond=[{}, {"regex": "("}, {"regex": "a", "choice": ["x"]}, {"choice": []}, {"regex": ""}, 5],
    ),
    "temperature": sampling("temperature", 0.5),
    "tool_choice": Probe(
        "required",
        lambda seen: "TEXT" not in (seen.submit.grammar or ""),
        base={"tools": [TOOL]},
        edges=["none", "auto", "required", NAMED],
        beyond=["other", 5, {}, {"type": "function", "function": {"name": "g"}}],
    ),
    "tools": Probe(
        [TOOL],
        lambda seen: seen.submit.grammar is not None,
        edges=[[], [TOOL], [{"type": "function", "function": {"name": f"f{i}"}} for i in range(4)]],
        beyond=[[TOOL, TOOL], [{}], [TOOL] * 129, [TOOL | {"type": "custom"}], 5],
    ),
    "top_k": sampling("top_k", 40),
    "top_logprobs": Probe(3, lambda seen: seen.sampling.logprobs == 3, base={"logprobs": True}),
    "top_p": sampling("top_p", 0.5),
    "truncate_prompt_tokens": Probe(2, lambda seen: len(seen.prompt) == 2, beyond=[0]),
    "truncation_side": Probe("right", lambda seen: seen.prompt[1] in (269, 282), base={"truncate_prompt_tokens": 2}),
    "user": label("u"),
    "service_tier": Probe("auto", lambda seen: seen.answer.get("service_tier") == "default"),
    CHAT + " metadata": Probe(
        {"a": "b"}, lambda seen: seen.answer.get("metadata") == {"a": "b"}, beyond=[{"k" * 65: "x"}]
    ),
    COMPLETIONS + " metadata": label({"a": "b"}),
    CHAT + " return_tokens_as_token_ids": Probe(True, names_ids, base={"logprobs": True}),
    COMPLETIONS + " return_tokens_as_token_ids": Probe(True, names_ids, base={"logprobs": 1}),
    CHAT + " logprobs": sampling("logprobs", 0, sent=True),
    COMPLETIONS + " logprobs": sampling("logprobs", 2),
    RESPONSES + " include": Probe(
        ["message.output_text.logprobs"],
        lambda seen: seen.sampling.logprobs == 0,
        edges=[[], ["reasoning.encrypted_content"] * 16],
        beyond=[["x"], [5], 5, ["reasoning.encrypted_content"] * 17],
    ),
    RESPONSES + " input": Probe(
        [USER],
        lambda seen: seen.prompt.count(370) == 1,
        edges=["x", [USER], [{"role": "user", "content": ""}] * 128],
        beyond=[[], 5, [USER] * 1025, [{"type": "x"}]],
    ),
    RESPONSES + " instructions": Probe("x", lambda seen: 370 in seen.prompt, edges=["", "x"], beyond=[5]),
    RESPONSES + " max_output_tokens": submitted("max_tokens", 7, edges=[1, 400]),
    RESPONSES + " min_tokens": submitted("min_tokens", 3, base={"max_output_tokens": 5}, edges=[0, 5], beyond=[-1]),
    RESPONSES + " prompt_cache_key": repeated("prompt_cache_key"),
    RESPONSES + " safety_identifier": repeated("safety_identifier"),
    RESPONSES + " user": repeated("user"),
    RESPONSES + " service_tier": label("auto"),
    RESPONSES + " stream_options": Probe({}, lambda _: True, base=STREAM, edges=[{}], beyond=[5, {"x": 1}]),
    RESPONSES + " metadata": Probe(
        {"a": "b"}, lambda seen: seen.answer.get("metadata") == {"a": "b"}, beyond=[{"k" * 65: "x"}]
    ),
    RESPONSES + " text": Probe(
        {"format": {"type": "json_object"}},
        lambda seen: "json_schema" in (seen.submit.grammar or ""),
        edges=[{}, {"format": {"type": "text"}}],
        beyond=[5, {"format": {"type": "x"}}, {"format": {}}, {"x": 1}],
    ),
    RESPONSES + " text.format": Probe(
        {"type": "json_object"},
        lambda seen: "json_schema" in (seen.submit.grammar or ""),
        edges=[{"type": "text"}, {"type": "json_object"}],
        beyond=[{}, {"type": "x"}, 5],
    ),
    RESPONSES + " tools": Probe(
        [FUNCTION],
        lambda seen: seen.submit.grammar is not None,
        edges=[[], [FUNCTION]],
        beyond=[[FUNCTION, FUNCTION], [{}], [FUNCTION] * 129, 5],
    ),
    RESPONSES + " tool_choice": Probe(
        "required",
        lambda seen: "TEXT" not in (seen.submit.grammar or ""),
        base={"tools": [FUNCTION]},
        edges=["none", "auto", "required", FUNCTION],
        beyond=["other", 5, {}, {"type": "function", "name": "g"}],
    ),
    RESPONSES + " parallel_tool_calls": Probe(
        False,
        lambda seen: "next{" not in (seen.submit.grammar or ""),
        base={"tools": [FUNCTION], "tool_choice": "required"},
    ),
    RESPONSES + " top_logprobs": Probe(
        3, lambda seen: seen.sampling.logprobs == 3, base={"include": ["message.output_text.logprobs"]}
    ),
    EMBEDDINGS + " dimensions": Probe(
        2, lambda seen: len(seen.answer["data"][0]["embedding"]) == 2, edges=[1, 4], beyond=[5]
    ),
    EMBEDDINGS + " encoding_format": Probe("base64", lambda seen: isinstance(seen.answer["data"][0]["embedding"], str)),
    EMBEDDINGS + " input": Probe(
        [5, 6],
        lambda seen: seen.prompt == [5, 6],
        edges=["x", [0], [376], ["a"] * 300, [[5], "b"]],
        beyond=["", [], [[]], [-1], [377], ["a"] * 2049, 5],
    ),
    TOKENIZE + " add_special_tokens": Probe(False, lambda seen: seen.answer["tokens"] == [269, 274]),
    TOKENIZE + " model": Probe("org/tiny", lambda _: True, edges=["tiny", "org/tiny"]),
    TOKENIZE + " prompt": Probe("hello", lambda seen: seen.answer["tokens"] == [1, 269], edges=["", "x"], beyond=[5]),
    TOKENIZE + " return_token_strs": Probe(True, lambda seen: seen.answer["token_strs"] == ["<s>", " hello", " world"]),
    DETOKENIZE + " model": Probe("org/tiny", lambda _: True, edges=["tiny", "org/tiny"]),
    DETOKENIZE + " tokens": Probe(
        [269], lambda seen: seen.answer["prompt"] == "hello", edges=[[], [0, 376]], beyond=[[377], [-1], ["x"], 5]
    ),
}
