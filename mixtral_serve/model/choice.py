"""One token per row of final logits: in the compiled kernels where they are, else with PyTorch's operators.

Owns: that choice, for the whole process, and ``choose_natively`` and ``choose_with_operators``, which do the same. A
token drawn by the one may, once in a great while, not be the one drawn by the other: weights differ in their last bits.

Invariant: a row's token is a function of that row alone.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import chain
from typing import Final

import torch

from mixtral_serve.kernels import native
from mixtral_serve.kernels.native_choice import NOT_FINITE, NUM_ASKED
from mixtral_serve.model.draws import Asked, draw
from mixtral_serve.model.likeliest import largest
from mixtral_serve.model.wide_rows import finite_rows

_IS_NATIVE: Final = native.is_available()
_choose_tokens: Final = torch.ops.mixtral_serve.choose_tokens.default


def choose(logits: torch.Tensor, asked: Sequence[Asked], *, is_raw: bool) -> list[int | None]:
    """A token per row, or None where the row is not finite.

    Args:
        logits: fp32 [rows, vocab].
        asked: how, aligned.
        is_raw: whether the logits are the model's. Else they are known to hold no NaN, and minus infinity where a token
            is forbidden, but not everywhere.
    """
    return (choose_natively if _IS_NATIVE else choose_with_operators)(logits, asked, is_raw=is_raw)


def choose_natively(logits: torch.Tensor, asked: Sequence[Asked], *, is_raw: bool) -> list[int | None]:
    """See ``choose``."""
    if not asked:
        return []
    table = torch.frombuffer(array("d", chain.from_iterable(asked)), dtype=torch.float64).view(-1, NUM_ASKED)
    tokens: list[int] = _choose_tokens(logits.contiguous(), table, is_raw).tolist()
    return [None if token == NOT_FINITE else token for token in tokens]


def choose_with_operators(logits: torch.Tensor, asked: Sequence[Asked], *, is_raw: bool) -> list[int | None]:
    """See ``choose``."""
    able = [i for i, ok in enumerate(finite_rows(logits)) if ok or not is_raw]
    tokens: list[int | None] = [None] * len(asked)
    greedy = [i for i in able if asked[i].temperature == 0]
    if greedy:
        for i, token in zip(greedy, largest(logits[greedy]).tolist(), strict=True):
            tokens[i] = token
    drawn = [i for i in able if asked[i].temperature != 0]
    if drawn:
        for i, token in zip(drawn, draw(logits[drawn], [asked[i] for i in drawn]), strict=True):
            tokens[i] = token
    return tokens
