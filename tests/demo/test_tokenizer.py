"""Laws of the demo tokenizer: the layout of Mixtral-8x7B, exact round trips, and the chat template."""

import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import Environment
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mixtral_serve.demo import checkpoint_path
from mixtral_serve.demo.conversation import Message, dialogue
from mixtral_serve.demo.dataset import encode_chat
from mixtral_serve.demo.skills import SKILLS, held_out_episodes
from mixtral_serve.demo.tokenizer import CHAT_TEMPLATE, train_tokenizer
from mixtral_serve.demo.tools import tools_text

SPACE = "\u2581"
# The space mark itself decodes to a space, and special tokens are not text.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=SPACE)).filter(
    lambda text: not any(token in text for token in ("<s>", "</s>", "<unk>"))
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(checkpoint_path() / "tokenizer.json"))


@pytest.fixture(scope="module")
def transformers_tokenizer() -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(checkpoint_path())
    return loaded


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: list[dict[str, object]] | None = None
) -> str:
    chat = [dict[str, str](role=m["role"], content=m["content"]) for m in messages]
    return str(tokenizer.apply_chat_template(chat, tools=tools, tokenize=False))  # type: ignore[arg-type]


def test_special_and_byte_tokens_have_the_ids_of_mixtral(tokenizer: Tokenizer) -> None:
    assert [tokenizer.id_to_token(i) for i in range(3)] == ["<unk>", "<s>", "</s>"]
    assert [tokenizer.id_to_token(3 + byte) for byte in range(256)] == [f"<0x{byte:02X}>" for byte in range(256)]


def test_vocabulary_is_a_multiple_of_64_without_holes(tokenizer: Tokenizer) -> None:
    size = tokenizer.get_vocab_size()
    assert size % 64 == 0
    assert sorted(tokenizer.get_vocab().values()) == list(range(size))


def test_no_piece_joins_digits_or_crosses_a_word_border(tokenizer: Tokenizer) -> None:
    pieces = [str(tokenizer.id_to_token(i)) for i in range(259, tokenizer.get_vocab_size())]
    assert not [p for p in pieces if len(p) > 1 and any(c.isdigit() for c in p)]
    assert not [p for p in pieces if SPACE in p[1:]]


@given(st.integers(0, 10**12))
def test_every_digit_is_its_own_token(number: int) -> None:
    tokenizer = Tokenizer.from_file(str(checkpoint_path() / "tokenizer.json"))
    assert tokenizer.encode(str(number), add_special_tokens=False).tokens == [SPACE, *str(number)]


@given(texts)
def test_any_text_round_trips(text: str) -> None:
    tokenizer = Tokenizer.from_file(str(checkpoint_path() / "tokenizer.json"))
    assert tokenizer.decode(encode(tokenizer, text)) == text


@pytest.mark.parametrize(
    "text", ["😀👩‍🚀", "naïve 東京", "a\nb\t c  d", '{"a": [1, 2.5, null]}', " leading", "", "\x00"]
)
def test_hard_texts_round_trip_without_unknown_tokens(tokenizer: Tokenizer, text: str) -> None:
    ids = encode(tokenizer, text)
    assert 0 not in ids
    assert tokenizer.decode(ids) == text


@given(texts, texts)
def test_instruction_and_answer_encode_as_one_text_or_as_two(question: str, answer: str) -> None:
    tokenizer = Tokenizer.from_file(str(checkpoint_path() / "tokenizer.json"))
    instruction = f"[INST] {question} [/INST]"
    whole = encode(tokenizer, f"{instruction} {answer}")
    # An empty text encodes to nothing, where the joint text still has the space.
    assert whole == encode(tokenizer, instruction) + (
        encode(tokenizer, answer) if answer else encode(tokenizer, " ")[1:]
    )


def test_transformers_reads_the_same_tokenizer(
    tokenizer: Tokenizer, transformers_tokenizer: PreTrainedTokenizerBase
) -> None:
    for skill in SKILLS:
        for episode in held_out_episodes(skill, 5):
            text = episode.prompt[-1]["content"]
            assert transformers_tokenizer(text)["input_ids"] == [1, *encode(tokenizer, text)]


def test_the_template_renders_what_the_model_was_trained_on(
    tokenizer: Tokenizer, transformers_tokenizer: PreTrainedTokenizerBase
) -> None:
    for skill in SKILLS:
        for episode in held_out_episodes(skill, 5):
            rendered = render(transformers_tokenizer, episode.messages)
            assert encode(tokenizer, rendered) == encode_chat(tokenizer, episode.messages).tokens


def test_the_template_folds_the_system_message_and_ends_answers(
    transformers_tokenizer: PreTrainedTokenizerBase,
) -> None:
    rendered = render(transformers_tokenizer, dialogue("hi", "hello", "more", system="Be kind."))
    assert rendered == "<s>[INST] Be kind.\n\nhi [/INST] hello</s>[INST] more [/INST]"


def test_the_template_presents_tools(transformers_tokenizer: PreTrainedTokenizerBase) -> None:
    tool: dict[str, object] = {
        "type": "function",
        "function": {"name": "ping", "description": "Ping", "parameters": {"type": "object"}},
    }
    rendered = render(transformers_tokenizer, dialogue("hi", system="Be kind."), [tool])
    assert rendered == f"<s>[INST] Be kind.\n\n{tools_text([json.dumps(tool)])}\n\nhi [/INST]"


@pytest.mark.parametrize(
    "roles", [["assistant"], ["user", "user"], ["user", "system"], ["system", "assistant"], ["user", "tool"]]
)
def test_the_template_refuses_roles_that_do_not_alternate(roles: list[str]) -> None:
    class RefusedError(Exception):
        pass

    def refuse(message: str) -> None:
        raise RefusedError(message)

    template = Environment(autoescape=False).from_string(CHAT_TEMPLATE)
    messages = [{"role": role, "content": "x"} for role in roles]
    with pytest.raises(RefusedError):
        template.render(messages=messages, bos_token="<s>", eos_token="</s>", raise_exception=refuse)


def test_training_a_tokenizer_is_deterministic() -> None:
    corpus: list[Message] = [message for e in held_out_episodes("json", 50) for message in e.messages]
    lines = [message["content"] for message in corpus]
    first, second = (train_tokenizer(lines, 512).to_str() for _ in range(2))
    assert first == second
