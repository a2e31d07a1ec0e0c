from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtral_serve.text.errors import TokenizerError
from mixtral_serve.text.fakes import write_tiny_tokenizer
from mixtral_serve.text.tokenizer import Tokenizer, load_tokenizer

TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=80)
PROSE = st.text(alphabet=" \n\tabcdeHTI.,!?<>[]/s0123456789éß漢😀", max_size=80)

# From the SentencePiece library itself.
GOLDEN = {
    "Hello, world!": [22557, 28725, 1526, 28808],
    "[INST] What is the capital of France? [/INST]": (
        [733, 16289, 28793, 1824, 349, 272, 5565, 302, 4843, 28804, 733, 28748, 16289, 28793]
    ),
    " two  spaces ": [28705, 989, 28705, 10599, 28705],
    "naïve café — “quotes”": [1879, 28920, 333, 28345, 1040, 981, 364, 4769, 28838],
    "日本語 😀🏳️\u200d🌈": (
        [28705, 29142, 29119, 30321, 28705, 30575, 243, 162, 146, 182, 29096, 29274, 243, 162, 143, 139]
    ),
    "def f(x):\n\treturn x  # 12345": (
        [801, 285, 28732, 28744, 1329, 13, 12, 807, 1318, 28705, 422, 28705, 28740, 28750, 28770, 28781, 28782]
    ),
    "</s><s>": [1867, 28713, 3409, 28713, 28767],
    "▁odd": [28705, 6939],
}


@pytest.mark.parametrize("text", GOLDEN)
def test_mixtrals_ids_are_those_of_sentencepiece(mixtral: Tokenizer, text: str) -> None:
    assert mixtral.encode(text, add_bos=False).tolist() == GOLDEN[text]
    assert mixtral.encode(text, add_bos=True).tolist() == [1, *GOLDEN[text]]


@settings(deadline=None)
@given(text=TEXT | PROSE)
def test_encoding_agrees_with_sentencepiece(mixtral: Tokenizer, sentencepiece_model: Any, text: str) -> None:
    assert mixtral.encode(text, add_bos=False).tolist() == sentencepiece_model.encode(text)


@given(text=TEXT | PROSE)
def test_decoding_undoes_encoding(mixtral: Tokenizer, tiny: Tokenizer, text: str) -> None:
    for tokenizer in (mixtral, tiny):
        ids = tokenizer.encode(text, add_bos=True)
        # SentencePiece writes "▁" for a space, so that a "▁" in the text comes back as one.
        assert tokenizer.decode(ids) == text.replace("▁", " ")
        assert max(ids) < tokenizer.vocab_size


@given(text=TEXT | PROSE)
def test_the_lower_bound_of_the_number_of_tokens_holds(mixtral: Tokenizer, text: str) -> None:
    assert mixtral.min_num_tokens(text) <= len(mixtral.encode(text, add_bos=False))


CONTROLS = st.sampled_from(["<s>", "</s>", "<unk>", "[INST]", "[/INST]", "<<SYS>>", "<", "s>", "/", "x", " "])


@given(parts=st.lists(CONTROLS, max_size=12))
def test_row11_no_text_is_encoded_to_a_control_token(mixtral: Tokenizer, tiny: Tokenizer, parts: list[str]) -> None:
    text = "".join(parts)
    for tokenizer in (mixtral, tiny):
        ids = tokenizer.encode(text, add_bos=False)
        assert not set(ids) & {0, 1, 2}
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("piece", ["a", "<", " ", "😀", "the quick ", "▁", "\n"])
def test_row21_half_a_megabyte_of_one_thing_is_encoded_in_bounded_time(mixtral: Tokenizer, piece: str) -> None:
    text = piece * (512_000 // len(piece.encode()))
    start = time.perf_counter()
    ids = mixtral.encode(text, add_bos=False)
    assert time.perf_counter() - start < 5.0  # some 0.3 s; the machine may be busy
    assert len(ids) >= mixtral.min_num_tokens(text)


def test_lone_surrogates_are_refused(tiny: Tokenizer) -> None:
    with pytest.raises(ValueError, match="Unicode"):
        tiny.encode("a\ud800b", add_bos=False)


def test_named_tokens_are_known(tiny: Tokenizer) -> None:
    assert (tiny.bos_token_id, tiny.eos_token_id) == (1, 2)
    assert tiny.named_tokens["unk_token"] == "<unk>"
    assert tiny.decode([1, 2], skip_special_tokens=False) == "<s></s>"


def test_a_template_is_split_at_its_control_strings(tiny: Tokenizer) -> None:
    assert list(tiny.split_control("<s>a </s> b")) == ["", 1, "a ", 2, " b"]


def change(directory: Path, name: str, edit: Any) -> Path:
    write_tiny_tokenizer(directory)
    path = directory / name
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))
    return path


def test_tokens_that_swallow_white_space_do(tmp_path: Path) -> None:
    change(tmp_path, "tokenizer.json", lambda d: d["added_tokens"][2].update(lstrip=True, rstrip=True))
    tokenizer = load_tokenizer(tmp_path)
    assert list(tokenizer.split_control("a </s> b")) == ["a", 2, "b"]


def test_row11_added_tokens_that_are_not_special_are_control_tokens_too(tmp_path: Path) -> None:
    def add(description: Any) -> None:
        marker = description["added_tokens"][2] | {"id": 377, "content": "[TOOL]", "special": False}
        description["added_tokens"].append(marker)

    change(tmp_path, "tokenizer.json", add)
    tokenizer = load_tokenizer(tmp_path)
    assert 377 not in tokenizer.encode("a [TOOL] b", add_bos=False)
    assert list(tokenizer.split_control("a[TOOL]b")) == ["a", 377, "b"]
    assert tokenizer.decode([377]) == "[TOOL]", "it is not special, so it is shown"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_row56_a_missing_or_broken_file_is_named(tmp_path: Path, name: str, content: bytes | None) -> None:
    write_tiny_tokenizer(tmp_path)
    path = tmp_path / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TokenizerError, match=name) as caught:
        load_tokenizer(tmp_path)
    assert caught.value.path == path


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d["model"].update(type="Unigram"), "byte-fallback BPE"),
        (lambda d: d["model"].update(byte_fallback=False), "byte-fallback BPE"),
        (lambda d: d.update(decoder={"type": "ByteLevel"}), "ByteLevel"),
        (lambda d: d.update(added_tokens=[{}]), "not tokens"),
        (lambda d: d["model"].update(merges=["zz zz"]), "is not a tokenizer"),
    ],
)
def test_a_tokenizer_of_another_kind_is_refused(tmp_path: Path, edit: Any, message: str) -> None:
    change(tmp_path, "tokenizer.json", edit)
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(bos_token="<nope>"), "names a bos_token"),
        (lambda c: c.update(eos_token=7), "names a eos_token"),
        (lambda c: c.pop("eos_token"), "names no eos_token"),
    ],
)
def test_named_tokens_must_exist(tmp_path: Path, edit: Any, message: str) -> None:
    change(tmp_path, "tokenizer_config.json", edit)
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(tmp_path)


def test_named_tokens_may_be_described_by_objects(tmp_path: Path) -> None:
    change(tmp_path, "tokenizer_config.json", lambda c: c.update(bos_token={"content": "<s>"}))
    assert load_tokenizer(tmp_path).bos_token_id == 1
