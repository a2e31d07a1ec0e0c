"""Grammars over a vocabulary: which tokens may come next.

Owns: ``Vocabulary``, a tokenizer's table as the grammar library (llguidance) wants it, which compiles grammars and
computes masks; and ``Matcher``, how far one answer has come in its grammar.

The library gets bytes per token and no encoder: it never forces tokens (see ``grammar``). Where two tokens stand for
the same bytes the one with the larger id is kept: a byte token is there for what has no piece of its own, and models
never learn it in the piece's place. Control tokens stand for no text; end of sequence is allowed exactly where the
grammar accepts.

Bounds: the library's limits hold for compiling and for every mask. Measured over hostile grammars, compiling takes at
most some tenths of a second and some ten megabytes. What grows while an answer is generated are the lexer's states;
they are limited so that a matcher holds about ``MATCHER_BYTES`` at most. States of a client's regular expressions weigh
more than those of plain schemas, of which a long string with a ``maxLength`` takes one per character. A grammar that
goes beyond ends its own request.

Invariants: a mask never allows what ``Matcher.consume`` then refuses; a matcher that failed yields errors, never a
mask. All calls release the interpreter lock while they compute. A ``Matcher`` is not thread-safe, a ``Vocabulary`` is.

Rejected: the library's messages for clients (they repeat the input); one Python call per mask (32 of them retake the
interpreter lock 32 times beside a running forward).
"""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Iterable, Sequence
from typing import Final

from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from mixtral_serve.text.detokenizer import TokenBytes
from mixtral_serve.text.errors import GrammarError

MATCHER_BYTES: Final = 24 << 20
"""What one matcher may come to hold. Measured at 32,000 tokens: 0.03 to 0.2 MB with ordinary schemas, up to 23 MB with
ninety ambiguous terminals of a client's grammar."""
_MAX_PLAIN_STATES: Final = 8_000
_MAX_REGEX_STATES: Final = 3_300
_MAX_GRAMMAR_SIZE: Final = 50_000
_MAX_STEP_ITEMS: Final = 10_000
_WORD_BITS: Final = 32

_MAX_MESSAGE_CHARS: Final = 2_048
"""Looked at, of what the library says: it may repeat names of the client's at any length."""
_TOO_COMPLEX: Final = "it is too complex"
_REASONS: Final = (
    (r"look-?around", "regular expressions with look-around or word boundaries are not supported"),
    (r"backreferences", "regular expressions with back-references are not supported"),
    (r"regex parse error|invalid regex", "a regular expression is not valid"),
    (r"(?i)unsatisfiable|NoExtension", "nothing satisfies it"),
    (r"(?i)panic|fuel|limit|too (big|large|many|complex|deeply)|Unable to determine|items; max", _TOO_COMPLEX),
    (r"Unimplemented keys", "it has a keyword that is not supported"),
    (r"Unknown format|format", "a 'format' is not supported"),
    (r"circular", "a '$ref' that leads back to itself is not supported beside other keywords"),
    (r"Expected .* for '", "a bound in it is not a number, or is one of the wrong kind"),
    (r"\$ref|[Rr]eference|[Pp]ointer|Resource|json-schema:", "a '$ref' leads nowhere in the schema"),
    (r"oneOf", "'oneOf' is supported where its branches exclude each other; 'anyOf' always is"),
    (r"(min|max)Properties", "'minProperties' and 'maxProperties' are supported where all 'properties' are required"),
    (r"at \d+\(\d+\)", "it is not a valid grammar"),
)
"""What the library says -> what a client reads. The first that is found holds."""


class _Wrapped:
    """The attributes that the library's tokenizer wrapper reads; it is never called to encode."""

    bos_token_id: int | None = None

    def __init__(self, tokens: Sequence[bytes], special_token_ids: Sequence[int], eos_token_id: int) -> None:
        self.tokens = tokens
        self.special_token_ids = special_token_ids
        self.eos_token_id = eos_token_id

    def __call__(self, text: str) -> list[int]:
        raise TypeError(f"this vocabulary does not encode, not even {len(text)} characters")


class Matcher:
    """One answer's place in its grammar."""

    __slots__ = ("_inner",)

    def __init__(self, inner: LLMatcher) -> None:
        self._inner = inner

    @property
    def is_complete(self) -> bool:
        """The grammar is satisfied and nothing can follow."""
        return self._inner.is_stopped() and not self._inner.is_error() and self._inner.is_accepting()

    @property
    def is_accepting(self) -> bool:
        """The grammar is satisfied: the answer may end here."""
        return not self._inner.is_error() and self._inner.is_accepting()

    def consume(self, token_id: int) -> None:
        """Go on by a token that was sampled.

        Raises:
            GrammarError: the grammar does not allow it here, or its limits are reached.
        """
        if not self._inner.consume_token(token_id):
            raise GrammarError(_reason(self._inner.get_error()))

    def allows(self, token_id: int) -> bool:
        """Whether the token may come next."""
        return self._inner.validate_tokens([token_id]) == 1

    def check(self) -> None:
        """Raises ``GrammarError`` if it failed earlier."""
        if self._inner.is_error():
            raise GrammarError(_reason(self._inner.get_error()))

    def copy(self) -> Matcher:
        """One that goes its own way from here on."""
        return Matcher(self._inner.deep_copy())

    @property
    def inner(self) -> LLMatcher:
        """The library's object, for ``Vocabulary``."""
        return self._inner


class Vocabulary:
    """A vocabulary that grammars are compiled against."""

    def __init__(self, token_bytes: TokenBytes, *, eos_token_ids: Iterable[int], vocab_size: int) -> None:
        """``vocab_size``: rows of the model's head; ids that the table lacks are never allowed."""
        eos = sorted(eos_token_ids)
        pieces = [b"" if token_bytes.is_special(i) else token_bytes[i] for i in range(vocab_size)]
        kept = {piece: token_id for token_id, piece in enumerate(pieces)}
        pieces = [piece if kept[piece] == token_id else b"" for token_id, piece in enumerate(pieces)]
        controls = sorted({i for i in range(vocab_size) if token_bytes.is_special(i)}.union(eos))
        for control in controls:
            pieces[control] = token_bytes[control]
        wrapper = TokenizerWrapper(_Wrapped(pieces, controls, eos[0]))
        self._tokenizer = LLTokenizer(wrapper, n_vocab=vocab_size, eos_token=list(eos))
        self._plain_limits = _limits(_MAX_PLAIN_STATES)
        self._regex_limits = _limits(_MAX_REGEX_STATES)
        self.num_words: Final = -(-vocab_size // _WORD_BITS)
        """32-bit words of one mask."""
        self._space_token_id = kept.get(b" ")
        self._lock = threading.Lock()
        self._executor: LLExecutor | None = None

    def compile(self, grammar: str) -> Matcher:
        """A matcher at the beginning of ``grammar``.

        Raises:
            GrammarError: it is not valid, beyond the limits, or nothing satisfies it.
        """
        limits = self._regex_limits if _has_regex(grammar) else self._plain_limits
        matcher = Matcher(LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits))
        matcher.check()
        # Computing may find what compiling does not: at the beginning, and after the space of a chat answer.
        probes = [matcher.copy()]
        if self._space_token_id is not None and matcher.allows(self._space_token_id):
            probes.append(matcher.copy())
            probes[-1].consume(self._space_token_id)
        for mask in self.fill(probes):
            if isinstance(mask, GrammarError):
                raise mask
        return matcher

    def fill(self, matchers: Sequence[Matcher]) -> list[memoryview | GrammarError]:
        """For each matcher the mask of its next token: bit ``i`` of the little-endian bits is token ``i``.

        [``num_words``] 32-bit words each, in one buffer; an error in the place of a matcher that cannot go on.
        """
        size = self.num_words * (_WORD_BITS // 8)
        buffer = bytearray(size * len(matchers))
        address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        places = [(matcher.inner, index) for index, matcher in enumerate(matchers)]
        with self._lock:
            if self._executor is None:
                # One thread: it computes beside a forward that has all the others.
                self._executor = LLExecutor(num_threads=1)
        self._executor.unsafe_compute_mask_ptr(places, address, size, len(matchers))
        view = memoryview(buffer)
        masks: list[memoryview | GrammarError] = []
        for index, matcher in enumerate(matchers):
            try:
                matcher.check()
            except GrammarError as error:
                masks.append(error)
            else:
                masks.append(view[index * size : (index + 1) * size])
        return masks


def _limits(max_lexer_states: int) -> LLParserLimits:
    return LLParserLimits(
        max_lexer_states=max_lexer_states,
        max_grammar_size=_MAX_GRAMMAR_SIZE,
        step_max_items=_MAX_STEP_ITEMS,
        verbose_errors=False,
    )


def _has_regex(grammar: str) -> bool:
    """Whether a client's regular expression may be in it; a schema that merely mentions one counts as well."""
    return grammar.count('"lark_grammar"') > 1 or '"pattern' in grammar or '"format"' in grammar


def _reason(message: str) -> str:
    """What the library says, in our words."""
    line = message[:_MAX_MESSAGE_CHARS].partition("<non-verbose/>")[0]
    return next((reason for pattern, reason in _REASONS if re.search(pattern, line)), "it is not supported")
