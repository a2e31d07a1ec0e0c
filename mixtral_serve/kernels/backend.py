"""``Backend``: what can multiply by quantised weights, as the model room sees it.

A backend is asked once per matrix, when the model is loaded, and answers with an operation that is called in every
step. It may keep the packed matrix as it is, or make of it what its own library wants.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

import torch

from mixtral_serve.kernels.formats import Kind, PackedMatrix

LinearOp: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""[rows, num_cols] fp32 -> [rows, num_rows of the matrix] fp32."""
ExpertsOp: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(hidden states [rows, hidden] fp32, expert ids [rows, k], their weights [rows, k] fp32) -> [rows, hidden] fp32."""


class Backend(Protocol):
    """One way of computing with packed matrices."""

    @property
    def name(self) -> str:
        """``native``, ``torch`` or ``reference``."""
        ...

    @property
    def label(self) -> str:
        """The name, and what an operator may want to know besides."""
        ...

    @property
    def is_row_invariant(self) -> bool:
        """Whether a row's result has the same bits whatever else is in the batch and for any number of threads."""
        ...

    def missing(self, kind: Kind) -> str | None:
        """None if this backend can compute with ``kind`` here; else a sentence that says what it takes."""
        ...

    def linear(self, weight: PackedMatrix) -> LinearOp:
        """The product with one matrix."""
        ...

    def experts(self, w1: PackedMatrix, w2: PackedMatrix, w3: PackedMatrix) -> ExpertsOp:
        """Mixtral's experts: ``w2(silu(w1 x) * (w3 x))`` of the chosen ones, weighted and added in ascending id.

        Each argument holds all experts of a layer along its leading dimension.
        """
        ...
