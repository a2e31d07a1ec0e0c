from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from mixtral_serve.text.chat_template import ChatTemplate, load_chat_template
from mixtral_serve.text.conversation import ChatMessage, Role
from mixtral_serve.text.errors import ChatTemplateError, TokenizerError
from mixtral_serve.text.fakes import write_tiny_tokenizer
from mixtral_serve.text.tokenizer import Tokenizer, load_tokenizer

INSTRUCT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}{% endfor %}"
)
"""As Mixtral-8x7B-Instruct's first template: no system role."""
CONTROL_STRINGS = ["<s>", "</s>", "<unk>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"]


def user(content: str) -> ChatMessage:
    return ChatMessage("user", content)


def assistant(content: str) -> ChatMessage:
    return ChatMessage("assistant", content)


def system(content: str) -> ChatMessage:
    return ChatMessage("system", content)


@pytest.fixture(scope="module")
def instruct(mixtral_checkpoint: Path, mixtral: Tokenizer) -> ChatTemplate:
    template = load_chat_template(mixtral_checkpoint, mixtral)
    assert template is not None
    return template


@pytest.fixture(scope="module")
def tiny_template(tiny_checkpoint: Path, tiny: Tokenizer) -> ChatTemplate:
    template = load_chat_template(tiny_checkpoint, tiny)
    assert template is not None
    return template


@pytest.fixture(scope="module")
def reference(mixtral_checkpoint: Path) -> Any:
    return PreTrainedTokenizerFast.from_pretrained(mixtral_checkpoint)


TALK = st.lists(st.text(alphabet="abc é😀\n.?", max_size=20), min_size=1, max_size=5)


@given(turns=TALK)
def test_ids_are_those_of_transformers(instruct: ChatTemplate, reference: Any, turns: list[str]) -> None:
    roles: list[Role] = ["user", "assistant"]
    messages = [ChatMessage(roles[index % 2], turn) for index, turn in enumerate(turns)]
    expected = reference.apply_chat_template(
        [{"role": message.role, "content": message.content} for message in messages], return_dict=False
    )
    assert instruct.encode(messages).tolist() == expected


def test_row11_control_strings_in_messages_stay_text(instruct: ChatTemplate, mixtral: Tokenizer) -> None:
    """For every control string in every role: the control tokens are the template's, and the text is unchanged."""
    for typed in CONTROL_STRINGS:
        for role in (0, 1, 2):
            contents = ["one", "two", "three"]
            contents[role] = f"a{typed}b {typed}"
            messages = [user(contents[0]), assistant(contents[1]), user(contents[2])]
            ids = instruct.encode(messages).tolist()
            assert [token_id for token_id in ids if token_id < 3] == [1, 2], (typed, role)
            text = mixtral.decode(ids, skip_special_tokens=False)
            assert all(content in text for content in contents)


@given(parts=st.lists(st.sampled_from([*CONTROL_STRINGS, "<", "/", "s>", "X", "N0X", " "]), max_size=10))
def test_row11_no_mixture_of_fragments_makes_a_control_token(
    tiny_template: ChatTemplate, tiny: Tokenizer, parts: list[str]
) -> None:
    content = "".join(parts)
    plain = tiny_template.encode([user("x"), assistant("y"), user("x")])
    ids = tiny_template.encode([user(content), assistant(content), user(content)])
    assert [i for i in ids if i < 3] == [i for i in plain if i < 3]
    assert tiny.decode(ids, skip_special_tokens=False).count(content) >= 3


def test_row11_a_template_that_looks_at_its_messages_still_sees_them(tiny: Tokenizer) -> None:
    template = ChatTemplate("{{ bos_token }}{{ messages[0].content | trim | tojson }}{{ eos_token }}", tiny)
    ids = template.encode([user(' say "</s>" ')])
    assert [token_id for token_id in ids if token_id < 3] == [1, 2]
    assert tiny.decode(ids) == ' "say \\"</s>\\""'.removeprefix(" ")


ORDINARY = [
    ([user("a")], "<s>[INST] a [/INST]"),
    ([system("y"), user("a")], "<s>[INST] y\n\na [/INST]"),
    ([system("y"), system("z"), user("a")], "<s>[INST] y\n\nz\n\na [/INST]"),
    ([user("a"), user("b")], "<s>[INST] a\n\nb [/INST]"),
    ([user("a"), assistant("b"), user("c")], "<s>[INST] a [/INST]{}b</s>[INST] c [/INST]"),
    ([user("a"), assistant("b"), assistant("c"), user("d")], "<s>[INST] a [/INST]{}b\n\nc</s>[INST] d [/INST]"),
    ([user("a"), system("y"), user("b")], "<s>[INST] a\n\ny\n\nb [/INST]"),
    ([user("a"), assistant("b"), system("y")], "<s>[INST] a [/INST]{}b</s>[INST] y [/INST]"),
    ([system("y")], "<s>[INST] y [/INST]"),
    ([system("y"), assistant("b"), user("a")], None),
    ([assistant("b"), user("a")], None),
    ([assistant("b")], None),
]


@pytest.mark.parametrize(("messages", "expected"), ORDINARY)
def test_every_order_of_roles_is_accepted(
    messages: list[ChatMessage], expected: str | None, tiny_template: ChatTemplate, tiny: Tokenizer
) -> None:
    no_system = ChatTemplate(INSTRUCT_TEMPLATE, tiny)
    assert tiny_template.system_role
    assert not no_system.system_role
    for template, space in ((tiny_template, " "), (no_system, "")):
        ids = template.encode(messages)
        text = tiny.decode(ids, skip_special_tokens=False).replace("<s> ", "<s>").replace("</s> ", "</s>")
        if expected is not None:
            assert text == expected.format(space)
        places = [text.index(message.content) for message in messages]
        assert places == sorted(places), "no text is lost and the order is kept"


ROLES: list[Role] = ["system", "user", "assistant"]


@given(roles=st.lists(st.sampled_from(ROLES), min_size=1, max_size=8))
def test_no_order_of_roles_fails(instruct: ChatTemplate, tiny_template: ChatTemplate, roles: list[Role]) -> None:
    messages = [ChatMessage(role, f"m{index}") for index, role in enumerate(roles)]
    instruct.encode(messages)
    tiny_template.encode(messages)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('no cats') }}", "no cats"),
        ("{{ messages[7].content }}", "has no|no element"),
        ("{{ messages[0].content + 1 }}", "cannot render"),
        ("{{ 1 // 0 }}", "cannot render"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "immutable|unsafe|not safely"),
    ],
)
def test_what_a_template_refuses_is_one_error(tiny: Tokenizer, source: str, message: str) -> None:
    with pytest.raises(ChatTemplateError, match=message):
        ChatTemplate(source, tiny).encode([user("x")])


def test_templates_have_what_transformers_gives_them(tiny: Tokenizer) -> None:
    source = (
        "{% for m in messages %}\n  {% if loop.index > 1 %}{% break %}{% endif %}\n"
        "{% generation %}{{ {'a': '<é>'} | tojson }}{% endgeneration %}\n{% endfor %}"
    )
    assert tiny.decode(ChatTemplate(source, tiny).encode([user("x"), assistant("y")])) == '{"a": "<é>"}'


def test_the_template_is_found_where_checkpoints_keep_it(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "wrong"}, {"name": "default", "template": "from a list"}]
    for config_value, jinja_file, expected in (
        (None, None, None),
        ("from the config", None, "from the config"),
        (named, None, "from a list"),
        ("from the config", "from the file", "from the file"),
    ):
        write_tiny_tokenizer(tmp_path)
        config_path = tmp_path / "tokenizer_config.json"
        config_path.write_text(json.dumps(json.loads(config_path.read_text()) | {"chat_template": config_value}))
        if jinja_file is not None:
            (tmp_path / "chat_template.jinja").write_text(jinja_file)
        tokenizer = load_tokenizer(tmp_path)
        template = load_chat_template(tmp_path, tokenizer)
        assert (template is None) == (expected is None)
        if template is not None:
            assert tokenizer.decode(template.encode([user("x")])) == expected


@pytest.mark.parametrize("value", ["{% if %}", 7, [{"name": "other", "template": "x"}]])
def test_a_broken_template_is_refused_at_start(tmp_path: Path, value: object) -> None:
    write_tiny_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": value}))
    with pytest.raises(TokenizerError, match="template"):
        load_chat_template(tmp_path, load_tokenizer(tmp_path))


def test_a_template_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    write_tiny_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja"):
        load_chat_template(tmp_path, load_tokenizer(tmp_path))
