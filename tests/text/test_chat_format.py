from __future__ import annotations

import json
from pathlib import Path

import pytest

from mixtral_serve.demo import checkpoint_path
from mixtral_serve.demo import tools as demo_tools
from mixtral_serve.text import tool_text
from mixtral_serve.text.chat_format import AUTO, CHECKPOINT, MIXTRAL, ChatEncoder, load_chat_format
from mixtral_serve.text.chat_template import MAX_RENDERED_CHARS, ChatTemplate
from mixtral_serve.text.conversation import ChatMessage, FunctionCall
from mixtral_serve.text.errors import ChatTemplateError, TokenizerError
from mixtral_serve.text.fakes import TINY_CHAT_TEMPLATE, write_tiny_tokenizer
from mixtral_serve.text.instruct import MixtralInstruct
from mixtral_serve.text.tokenizer import Tokenizer, load_tokenizer

NEWER_TEMPLATE = (
    "{{- bos_token }}{%- for m in messages %}"
    "{%- if m.role == 'user' %}{{- ' [INST] ' + m.content + ' [/INST]' }}{%- else %}{{- ' ' + m.content + eos_token}}"
    "{%- endif %}{%- endfor %}"
)
"""A space before ``[INST]``, as in what the Hub holds now."""
OTHER_TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
TOOLS_TEMPLATE = "{{ bos_token }}{{ tools | tojson }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
TOOL = {"type": "function", "function": {"name": "f", "description": "</s> & <é>"}}
TALK = [ChatMessage("user", "one"), ChatMessage("assistant", "two"), ChatMessage("user", "three")]


def loaded(directory: Path, template: str | None, **options: object) -> ChatEncoder | None:
    write_tiny_tokenizer(directory, chat_template=template)
    return load_chat_format(directory, load_tokenizer(directory), **options)  # type: ignore[arg-type]


def text_of(encoder: ChatEncoder | None, directory: Path, messages: list[ChatMessage]) -> str:
    assert encoder is not None
    return load_tokenizer(directory).decode(encoder.encode(messages), skip_special_tokens=False)


@pytest.mark.parametrize(
    ("choice", "template", "is_mixtrals"),
    [
        (AUTO, NEWER_TEMPLATE, True),
        (AUTO, TINY_CHAT_TEMPLATE, True),
        (AUTO, OTHER_TEMPLATE, False),
        (AUTO, TOOLS_TEMPLATE, False),
        (AUTO, "{{ raise_exception('no') }}", False),
        (CHECKPOINT, NEWER_TEMPLATE, False),
        (MIXTRAL, OTHER_TEMPLATE, True),
        (MIXTRAL, None, True),
    ],
)
def test_the_format_is_chosen_by_the_operator_or_by_what_the_template_writes(
    tmp_path: Path, choice: str, template: str | None, is_mixtrals: bool
) -> None:
    assert isinstance(loaded(tmp_path, template, choice=choice), MixtralInstruct) == is_mixtrals


def test_a_base_model_has_no_chat_unless_the_operator_says_so(tmp_path: Path) -> None:
    assert loaded(tmp_path, None) is None
    with pytest.raises(TokenizerError, match="no chat_template"):
        loaded(tmp_path, None, choice=CHECKPOINT)


def test_the_operators_file_wins_over_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text(OTHER_TEMPLATE, encoding="utf-8")
    encoder = loaded(tmp_path, TINY_CHAT_TEMPLATE, choice=str(path))
    assert "<|user|>one<|assistant|>two" in text_of(encoder, tmp_path, TALK)


@pytest.mark.parametrize("source", [None, b"{% if %}", b"\xff"])
def test_a_file_that_is_no_template_is_refused_at_start(tmp_path: Path, source: bytes | None) -> None:
    path = tmp_path / "mine.jinja"
    if source is not None:
        path.write_bytes(source)
    with pytest.raises(TokenizerError, match=r"mine\.jinja"):
        loaded(tmp_path, TINY_CHAT_TEMPLATE, choice=str(path))


def test_mixtrals_format_needs_the_tokens_that_it_writes(tmp_path: Path) -> None:
    write_tiny_tokenizer(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"bos_token": "<s>", ', ""))
    with pytest.raises(TokenizerError, match="bos_token"):
        load_chat_format(tmp_path, load_tokenizer(tmp_path), choice=MIXTRAL)


def test_strict_leaves_conversations_as_they_are(tmp_path: Path) -> None:
    twice = [ChatMessage("user", "a"), ChatMessage("user", "b")]
    for choice, late in ((CHECKPOINT, twice), (AUTO, [*TALK, ChatMessage("assistant", "x")])):
        mended = loaded(tmp_path, TINY_CHAT_TEMPLATE, choice=choice)
        strict = loaded(tmp_path, TINY_CHAT_TEMPLATE, choice=choice, strict=True)
        assert mended is not None
        assert strict is not None
        mended.encode(late)
        with pytest.raises(ChatTemplateError):
            strict.encode(late)
        assert strict.encode(TALK) == mended.encode(TALK)


def test_a_template_that_knows_tools_is_given_them(tiny: Tokenizer) -> None:
    template = ChatTemplate(TOOLS_TEMPLATE, tiny)
    assert template.knows_tools
    ids = template.encode([ChatMessage("user", "x")], tools=[TOOL]).tolist()
    text = tiny.decode(ids)
    assert text == json.dumps([TOOL], ensure_ascii=False) + "user: x\n"
    assert [token_id for token_id in ids if token_id < 3] == [1], "also a definition makes no control token"


def test_a_template_without_tools_gets_them_in_the_system_message(tiny: Tokenizer) -> None:
    template = ChatTemplate(TINY_CHAT_TEMPLATE, tiny)
    assert not template.knows_tools
    messages = [
        ChatMessage("system", "s"),
        ChatMessage("user", "u"),
        ChatMessage("assistant", "so:", calls=(FunctionCall("f", '{"a":"é"}'), FunctionCall("g", "no json"))),
        ChatMessage("tool", "r", tool_name="f"),
    ]
    calls = '[{"name": "f", "arguments": {"a": "é"}}, {"name": "g", "arguments": "no json"}]'
    assert tiny.decode(template.encode(messages, tools=[TOOL])) == (
        f"[INST] s\n\n{tool_text.tools_text([TOOL])}\n\nu [/INST] so:\n\n{calls} [INST] Result of f: r [/INST]"
    )


def test_the_bundled_model_reads_tools_as_it_was_taught() -> None:
    """Byte for byte, by its own template, which ``auto`` leaves in place."""
    checkpoint = checkpoint_path()
    tokenizer = load_tokenizer(checkpoint)
    encoder = load_chat_format(checkpoint, tokenizer)
    assert isinstance(encoder, ChatTemplate)
    ids = encoder.encode([ChatMessage("system", "Be kind."), ChatMessage("user", "x")], tools=[TOOL])
    presented = demo_tools.tools_text([json.dumps(TOOL, ensure_ascii=False)])
    assert tokenizer.decode(ids) == f"[INST] Be kind.\n\n{presented}\n\nx [/INST]"
    assert tool_text.tools_text([TOOL]) == presented
    assert tool_text.calls_text([FunctionCall("f", '{"a":1}')]) == json.dumps([{"name": "f", "arguments": {"a": 1}}])


@pytest.mark.parametrize("content", ["The capital ", "", "ends </s>", "  "])
def test_a_template_leaves_the_final_message_open_where_it_is_continued(tiny: Tokenizer, content: str) -> None:
    template = ChatTemplate(TINY_CHAT_TEMPLATE, tiny)
    messages = [ChatMessage("user", "a"), ChatMessage("assistant", content)]
    ids = template.encode(messages, continue_final_message=True).tolist()
    assert tiny.decode(ids, skip_special_tokens=False) == f"<s> [INST] a [/INST] {content}"
    assert [token_id for token_id in ids if token_id < 3] == [1]
    assert template.encode(messages)[-1] == tiny.eos_token_id


def test_what_cannot_be_continued_is_refused(tiny: Tokenizer) -> None:
    with pytest.raises(ChatTemplateError, match="no final assistant message"):
        ChatTemplate(TINY_CHAT_TEMPLATE, tiny).encode([ChatMessage("user", "a")], continue_final_message=True)
    hides = ChatTemplate("{{ messages[0].content }}", tiny)
    with pytest.raises(ChatTemplateError, match="does not show"):
        hides.encode([ChatMessage("user", "a"), ChatMessage("assistant", "b")], continue_final_message=True)


def test_a_template_that_runs_wild_is_stopped(tiny: Tokenizer) -> None:
    source = "{% for i in range(90000) %}{% for j in range(90000) %}" + "x" * 1000 + "{% endfor %}{% endfor %}"
    with pytest.raises(ChatTemplateError, match=str(MAX_RENDERED_CHARS)):
        ChatTemplate("{% if messages | length > 1 %}" + source + "{% endif %}", tiny).encode(TALK)
