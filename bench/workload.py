"""What a load test sends, and when: shapes, prompts, arrival times. Everything is a function of a seed.

Owns: ``Shape`` and the named shapes, ``PromptMaker``, ``poisson_arrivals``.

Prompts are token ids, so that their length is exact whatever the tokenizer. All prompts of a run begin with the same
``shared_prefix_tokens`` ids; the rest differs from prompt to prompt, and from run to run with another seed: a
seed that is used twice on one server finds its own prompts in the prefix cache.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Shape:
    """The size of every request of a run, in tokens.

    Raises:
        ValueError: the prefix is not shorter than the prompt, or a count is too small.
    """

    prompt_tokens: int
    shared_prefix_tokens: int
    output_tokens: int

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.output_tokens < 1 or self.shared_prefix_tokens < 0:
            raise ValueError("a prompt and an output have at least one token")
        if self.shared_prefix_tokens >= self.prompt_tokens:
            raise ValueError("the shared prefix is shorter than the prompt: at least one token is always computed")


SHAPES: Final = {
    "standard": Shape(prompt_tokens=512, shared_prefix_tokens=480, output_tokens=32),
    "fresh": Shape(prompt_tokens=64, shared_prefix_tokens=0, output_tokens=32),
}


class PromptMaker:
    """Prompts of one shape: the same prefix, then tokens that no other prompt has in this order."""

    def __init__(self, shape: Shape, *, token_ids: range, seed: int) -> None:
        self._num_own = shape.prompt_tokens - shape.shared_prefix_tokens
        self._token_ids = token_ids
        self._seed = seed
        self._prefix = random.Random(f"{seed}/prefix").choices(token_ids, k=shape.shared_prefix_tokens)

    def prompt(self, index: int) -> list[int]:
        """The prompt with this number; negative numbers are for warming up."""
        own = random.Random(f"{self._seed}/{index}").choices(self._token_ids, k=self._num_own)
        return self._prefix + own


def poisson_arrivals(rate_per_s: float, duration_s: float, seed: int) -> list[float]:
    """Arrival times in [0, duration_s), ascending: independent exponential gaps with mean ``1 / rate_per_s``."""
    generator = random.Random(f"{seed}/arrivals")
    arrivals: list[float] = []
    at_s = generator.expovariate(rate_per_s)
    while at_s < duration_s:
        arrivals.append(at_s)
        at_s += generator.expovariate(rate_per_s)
    return arrivals
