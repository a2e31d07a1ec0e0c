"""The tokenizer of a checkpoint: text to ids, and the id -> bytes table.

Owns: ``Tokenizer`` and ``load_tokenizer``, over the ``tokenizers`` package, which reads ``tokenizer.json``;
``tokenizer_config.json`` says which tokens begin and end a sequence.

Invariants: ``encode`` never yields a control token, whatever the text says: the control strings of the
vocabulary (``<s>``, ``</s>``, ...) are encoded as the characters they are. Control tokens come from the server
alone: the beginning of a sequence by ``add_bos``, those of a chat template by ``split_control``.

Only the kind of tokenizer that Mixtral has is accepted (byte-fallback BPE over "▁"); anything else is refused
at start-up instead of being decoded wrongly.

Rejected: Transformers' tokenizer classes. They import the model library into the API process, parse special
tokens in user text, and decode by a black box that cannot work incrementally.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import tokenizers

from mixtral_serve.text.detokenizer import IncrementalDetokenizer, TokenBytes
from mixtral_serve.text.errors import TokenizerError

TOKENIZER_FILE: Final = "tokenizer.json"
CONFIG_FILE: Final = "tokenizer_config.json"
_SPACE: Final = "▁"
_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_NAMED_TOKENS: Final = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True, slots=True)
class ControlToken:
    """A token of the vocabulary that no text is ever encoded to."""

    token_id: int
    content: str
    special: bool
    """Whether it is left out of the text that a client reads."""
    strips_left: bool = False
    """Swallows white space before it where a template writes it."""
    strips_right: bool = False


class Tokenizer:
    """Turns text into ids and ids into text. Immutable and safe to use from several threads."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        token_bytes: TokenBytes,
        controls: Iterable[ControlToken],
        named_tokens: Mapping[str, str],
    ) -> None:
        """Use ``load_tokenizer``. ``named_tokens`` maps "bos_token" and the like to their strings."""
        self._backend = backend
        self.token_bytes: Final = token_bytes
        self._controls: Final = {control.content: control for control in controls}
        longest_first = sorted(self._controls, key=len, reverse=True)
        # A pattern that matches nothing where a vocabulary has no control tokens.
        self.control_pattern: Final = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self.named_tokens: Final = dict(named_tokens)
        self.bos_token_id: Final = self._id_of("bos_token")
        self.eos_token_id: Final = self._id_of("eos_token")

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return len(self.token_bytes)

    def encode(self, text: str, *, add_bos: bool) -> array[int]:
        """Ids of ``text``, after the beginning-of-sequence token where ``add_bos`` asks for it.

        Linear in the text, some 2 to 4 MB/s; releases the interpreter lock meanwhile.

        Raises:
            ValueError: the text has lone surrogates.
        """
        ids = array("i")
        if add_bos and self.bos_token_id is not None:
            ids.append(self.bos_token_id)
        try:
            (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):
            # The binding reports a string that is not valid Unicode as an input of the wrong type.
            raise ValueError("the text is not valid Unicode") from None
        ids.extend(encoding.ids)
        return ids

    def min_num_tokens(self, text: str) -> int:
        """A lower bound of ``len(encode(text))`` that costs next to nothing."""
        return -(-len(text) // self.token_bytes.max_bytes)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True, strip_leading_space: bool = True) -> str:
        """Text of ``ids``. By default the inverse of ``encode``: the leading space it adds is dropped."""
        detokenizer = IncrementalDetokenizer(
            self.token_bytes, skip_special_tokens=skip_special_tokens, strip_leading_space=strip_leading_space
        )
        return "".join([detokenizer.push(token_id) for token_id in ids]) + detokenizer.flush()

    def split_control(self, text: str) -> Iterator[str | int]:
        """Split a template's output at its control strings: text pieces, and ids for the strings between them."""
        end = 0
        strip_right = False
        for match in self.control_pattern.finditer(text):
            control = self._controls[match.group()]
            piece = text[end : match.start()]
            piece = piece.lstrip() if strip_right else piece
            yield piece.rstrip() if control.strips_left else piece
            yield control.token_id
            end, strip_right = match.end(), control.strips_right
        yield text[end:].lstrip() if strip_right else text[end:]

    def _id_of(self, name: str) -> int | None:
        content = self.named_tokens.get(name)
        return None if content is None else self._backend.token_to_id(content)


def load_tokenizer(checkpoint: Path) -> Tokenizer:
    """Read the tokenizer of a checkpoint directory.

    Raises:
        TokenizerError: a file is missing, is not what it should be, or describes another kind of tokenizer.
    """
    path = checkpoint / TOKENIZER_FILE
    description = read_json(path)
    _require_mixtral_kind(path, description)
    controls = _controls(path, description)
    for added in description["added_tokens"]:
        # The backend looks for added tokens in text unless they are special: none of them is to be found there.
        added["special"] = True
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(description))
    except Exception as error:  # noqa: BLE001 (the binding raises bare Exception)
        raise TokenizerError(path, f"is not a tokenizer: {error}") from None
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    named = _named_tokens(checkpoint / CONFIG_FILE, backend)
    controls = [
        ControlToken(c.token_id, c.content, c.special or c.content in named.values(), c.strips_left, c.strips_right)
        for c in controls
    ]
    table = _token_bytes(backend.get_vocab(with_added_tokens=True), controls)
    return Tokenizer(backend, token_bytes=table, controls=controls, named_tokens=named)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of the checkpoint.

    Raises:
        TokenizerError: there is no such file, or it holds something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise TokenizerError(path, "is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(path, f"cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise TokenizerError(path, "does not hold a JSON object")
    return value


def _require_mixtral_kind(path: Path, description: dict[str, Any]) -> None:
    model = description.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise TokenizerError(path, "is not a byte-fallback BPE tokenizer, the kind that Mixtral has")
    if '"ByteLevel"' in json.dumps([description.get("pre_tokenizer"), description.get("decoder")]):
        raise TokenizerError(path, "spells bytes as characters (ByteLevel), which Mixtral's tokenizer does not")


def _controls(path: Path, description: dict[str, Any]) -> list[ControlToken]:
    try:
        return [
            ControlToken(
                token_id=int(added["id"]),
                content=str(added["content"]),
                special=bool(added["special"]),
                strips_left=bool(added.get("lstrip")),
                strips_right=bool(added.get("rstrip")),
            )
            for added in description.setdefault("added_tokens", [])
        ]
    except (KeyError, TypeError, ValueError):
        raise TokenizerError(path, "has added_tokens that are not tokens") from None


def _named_tokens(path: Path, backend: tokenizers.Tokenizer) -> dict[str, str]:
    config = read_json(path)
    named: dict[str, str] = {}
    for name in _NAMED_TOKENS:
        value = config.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if content is None:
            continue
        if not isinstance(content, str) or backend.token_to_id(content) is None:
            raise TokenizerError(path, f"names a {name} that {TOKENIZER_FILE} does not have")
        named[name] = content
    if "eos_token" not in named:
        raise TokenizerError(path, "names no eos_token")
    return named


def _token_bytes(vocab: Mapping[str, int], controls: Iterable[ControlToken]) -> TokenBytes:
    pieces: dict[int, bytes] = {}
    for piece, token_id in vocab.items():
        byte = _BYTE_TOKEN.fullmatch(piece)
        pieces[token_id] = bytes([int(byte[1], 16)]) if byte else piece.replace(_SPACE, " ").encode()
    pieces |= {control.token_id: control.content.encode() for control in controls}
    return TokenBytes(pieces, (control.token_id for control in controls if control.special))
