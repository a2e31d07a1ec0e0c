"""Mixtral's own format against its makers' reference, ``mistral-common`` with the real 32k vocabulary."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from mixtral_serve.text.conversation import ChatMessage, FunctionCall, Role
from mixtral_serve.text.errors import ChatTemplateError
from mixtral_serve.text.fakes import write_tiny_tokenizer
from mixtral_serve.text.instruct import MixtralInstruct, repaired
from mixtral_serve.text.tokenizer import Tokenizer, load_tokenizer

KINDS: dict[str, Any] = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}
ROLES: list[Role] = ["system", "user", "assistant"]
CONTROL = ["<s>", "</s>", "<unk>", "[INST]", "[/INST]", " [INST] ", "<<SYS>>", "<0x0A>", "▁", "</S>", "< s>"]
WORDS = ["Hello", "the answer is 42", "def f(x):\n    return x", "1,234.56", "`a`", '{"a": [1, 2]}', "."]
UNUSUAL = ["\n", "\n\n", " ", "  ", "\t", "é", "日本語", "😀", "👩\u200d👩\u200d👧", "\u202eabc", "e\u0301", "\x07"]
FRAGMENTS = CONTROL + WORDS + UNUSUAL
NUM_CONVERSATIONS = 900


def conversations(num: int) -> list[list[ChatMessage]]:
    """Every order of roles, and texts of every kind: empty, blank, long, with control strings, beyond ASCII."""
    rng = Random(8)
    made = []
    for _ in range(num):
        length = rng.choice((1, 1, 2, 3, 3, 4, 5, 6, 8, 12))
        alternating = rng.random() < 0.5
        length += alternating and length % 2 == 0 and rng.random() < 0.7  # ends with the user
        made.append(
            [
                ChatMessage(
                    ROLES[1 + index % 2] if alternating else rng.choice(ROLES),
                    "".join(rng.choices(FRAGMENTS, k=rng.choice((0, 1, 1, 2, 3, 8, 20)))),
                )
                for index in range(length)
            ]
        )
    return made


class Reference:
    """The package's own version 1, over its own vocabulary file."""

    def __init__(self) -> None:
        self._tokenizer = MistralTokenizer.v1()

    def encode(self, messages: list[ChatMessage], *, prefix: bool = False) -> list[int] | None:
        """Ids of the conversation, or None where it is refused."""
        given = [KINDS[message.role](content=message.content) for message in messages]
        if prefix:
            given[-1].prefix = True
        try:
            return list(self._tokenizer.encode_chat_completion(ChatCompletionRequest(messages=given)).tokens)
        except MistralCommonException:
            return None


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


@pytest.fixture(scope="module")
def instruct(mixtral: Tokenizer) -> MixtralInstruct:
    return MixtralInstruct(mixtral)


def test_where_the_reference_has_an_answer_the_ids_are_the_same(
    instruct: MixtralInstruct, mixtral: Tokenizer, reference: Reference
) -> None:
    strict = MixtralInstruct(mixtral, strict=True)
    num_answers = num_with_system = num_joined = 0
    for messages in conversations(NUM_CONVERSATIONS):
        expected = reference.encode(messages)
        if expected is None:
            continue
        assert instruct.encode(messages).tolist() == expected, messages
        assert strict.encode(messages).tolist() == expected, messages
        roles = [message.role for message in messages]
        num_answers += 1
        num_with_system += "system" in roles
        num_joined += any(left == right for left, right in pairwise(roles))
    assert num_answers >= 300
    assert min(num_with_system, num_joined) >= 50


def test_what_the_reference_refuses_is_repaired_into_what_it_takes_or_refused_where_strict(
    instruct: MixtralInstruct, mixtral: Tokenizer, reference: Reference
) -> None:
    strict = MixtralInstruct(mixtral, strict=True)
    num_refused = 0
    for messages in conversations(NUM_CONVERSATIONS):
        mended = repaired(messages)
        if reference.encode(messages) is not None:
            assert mended == messages
            continue
        num_refused += 1
        assert instruct.encode(messages).tolist() == reference.encode(mended), messages
        contents = [message.content for message in messages if message.content]
        assert [message.content for message in mended if message.content] == contents, "no text is lost"
        with pytest.raises(ChatTemplateError):
            strict.encode(messages)
    assert num_refused >= 100


def test_a_continued_answer_is_the_references_prefix(instruct: MixtralInstruct, reference: Reference) -> None:
    num_answers = 0
    for messages in conversations(600):
        if messages[-1].role != "assistant":
            continue
        expected = reference.encode(messages, prefix=True)
        if expected is not None:
            num_answers += 1
            ids = instruct.encode(messages, add_generation_prompt=False, continue_final_message=True)
            assert ids.tolist() == expected, messages
    assert num_answers >= 50


REPAIRS: list[tuple[list[tuple[Role, str]], str]] = [
    ([("assistant", "b")], "<s> [INST]  [/INST] b</s> [INST]  [/INST]"),
    ([("user", "a"), ("assistant", "b")], "<s> [INST] a [/INST] b</s> [INST]  [/INST]"),
    ([("user", "a"), ("assistant", ""), ("user", "c")], "<s> [INST] a\n\nc [/INST]"),
    ([("user", "a"), ("assistant", "b"), ("system", "y")], "<s> [INST] a [/INST] b</s> [INST] y [/INST]"),
    (
        [("user", "a"), ("assistant", "b"), ("system", "y"), ("user", "c")],
        "<s> [INST] a [/INST] b</s> [INST] y\n\nc [/INST]",
    ),
    ([("assistant", "")], "<s> [INST]  [/INST]"),
]


@pytest.mark.parametrize(("turns", "text"), REPAIRS)
def test_repairs_read_as_documented(
    instruct: MixtralInstruct, mixtral: Tokenizer, turns: list[tuple[Role, str]], text: str
) -> None:
    ids = instruct.encode([ChatMessage(role, content) for role, content in turns])
    assert mixtral.decode(ids, skip_special_tokens=False) == text


def test_an_answer_is_left_open_or_closed_as_asked(instruct: MixtralInstruct, mixtral: Tokenizer) -> None:
    messages = [ChatMessage("user", "a"), ChatMessage("assistant", "The capital ")]
    for flags, text in (
        ({"add_generation_prompt": False}, "<s> [INST] a [/INST] The capital </s>"),
        ({"add_generation_prompt": False, "continue_final_message": True}, "<s> [INST] a [/INST] The capital "),
    ):
        assert mixtral.decode(instruct.encode(messages, **flags), skip_special_tokens=False) == text
    nothing_yet = [ChatMessage("user", "a"), ChatMessage("assistant", "")]
    ids = instruct.encode(nothing_yet, continue_final_message=True, add_generation_prompt=False)
    assert ids == instruct.encode(nothing_yet[:1])
    for messages in ([], [ChatMessage("user", "a")]):
        with pytest.raises(ChatTemplateError, match="continue"):
            instruct.encode(messages, continue_final_message=True)


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
SPELLED = st.lists(st.sampled_from([*FRAGMENTS, "<", "/", "s>", "[", "INST", "]", "\\"]), max_size=8).map("".join)


@given(texts=st.lists(SPELLED, min_size=5, max_size=5))
def test_nothing_that_people_write_becomes_a_control_token(
    instruct: MixtralInstruct, mixtral: Tokenizer, texts: list[str]
) -> None:
    """In every place where a client can put text: messages of each role, definitions, arguments and results."""
    system, user, argument, result, description = texts
    tool = {"type": "function", "function": {"name": "f", "description": description, "parameters": {user: system}}}
    messages = [
        ChatMessage("system", system),
        ChatMessage("user", user),
        ChatMessage("assistant", result, calls=(FunctionCall("f", f'{{"x": "{argument}"}}'),)),
        ChatMessage("tool", result, tool_name="f"),
    ]
    ids = instruct.encode(messages, tools=[tool]).tolist()
    assert [token_id for token_id in ids if token_id < 3] == [1, 2]
    assert ids[0] == 1
    shown = result.replace("▁", " ")  # which the vocabulary does not tell apart
    assert mixtral.decode(ids).count(f"Result of f: {shown} [/INST]") == 1


def test_tools_stand_at_the_end_of_the_system_message(instruct: MixtralInstruct, mixtral: Tokenizer) -> None:
    described = '[{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]'
    messages = [ChatMessage("system", "Be kind."), ChatMessage("user", "a")]
    assert mixtral.decode(instruct.encode(messages, tools=[TOOL])) == (
        f"[INST] Be kind.\n\nYou can call these functions: {described}\n\na [/INST]"
    )


def test_a_vocabulary_without_the_beginning_of_sequence_is_refused(tmp_path: Path) -> None:
    write_tiny_tokenizer(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"bos_token": "<s>", ', ""))
    with pytest.raises(ChatTemplateError, match="bos_token"):
        MixtralInstruct(load_tokenizer(tmp_path))
