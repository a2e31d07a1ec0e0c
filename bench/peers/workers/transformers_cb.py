"""Transformers' continuous batching, as ``transformers serve`` runs it: its manager, with every token streamed.

Its generation loop is a thread of its own, so a step is timed from outside: from the moment that every sequence has
its second token to the moment that every sequence has ``steps`` more. The experts are computed as Transformers
chooses by default.

Runs in the environment of Transformers.
"""

from __future__ import annotations

import time
from collections import Counter

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from bench.peers.protocol import Facts, WorkerOptions, decode_prompt, run_worker

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_PAGE_SIZE = 256
_MAX_BATCH_TOKENS = 2048
_NO_TOKEN = -1
_PATIENCE_S = 600.0


class ContinuousBatchingError(Exception):
    """The manager failed or fell silent."""


class TransformersContinuousBatching:
    """Implements ``bench.peers.protocol.Contender``."""

    def __init__(self, options: WorkerOptions) -> None:
        torch.set_num_threads(options.threads)
        self._model = AutoModelForCausalLM.from_pretrained(
            options.model, dtype=_DTYPES[options.variant], attn_implementation="sdpa"
        )
        blocks = (options.sequences + 1) * -(-options.positions // _PAGE_SIZE)
        config = ContinuousBatchingConfig(
            page_size=_PAGE_SIZE,
            num_blocks=blocks,
            max_batch_tokens=max(_MAX_BATCH_TOKENS, options.sequences),
            max_requests_per_batch=options.sequences + 1,
        )
        greedy = GenerationConfig(  # type: ignore[no-untyped-call] # Transformers does not annotate it
            do_sample=False, eos_token_id=_NO_TOKEN, max_new_tokens=1
        )
        self._manager = self._model.init_continuous_batching(
            generation_config=greedy,
            continuous_batching_config=config,
        )
        self._manager.start()

    @property
    def facts(self) -> Facts:
        """See ``Contender``."""
        config = self._model.config
        details: dict[str, object] = {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "experts": str(getattr(config, "_experts_implementation", None)),
            "attention": str(getattr(config, "_attn_implementation", None)),
        }
        return Facts(f"transformers {transformers.__version__}", details)

    def decode(self, batch: int, steps: int, context: int) -> float:
        """See ``Contender``."""
        num_tokens = steps + 2
        for sequence in range(batch):
            self._add(decode_prompt(sequence, context), num_tokens)
        seen: Counter[str] = Counter()
        self._collect(seen, batch, 2)
        began_s = time.perf_counter()
        self._collect(seen, batch, num_tokens)
        return time.perf_counter() - began_s

    def prefill(self, prompt: list[int]) -> float:
        """See ``Contender``."""
        began_s = time.perf_counter()
        self._add(prompt, 1)
        self._collect(Counter(), 1, 1)
        return time.perf_counter() - began_s

    def _add(self, prompt: list[int], num_tokens: int) -> None:
        self._manager.add_request(prompt, max_new_tokens=num_tokens, streaming=True, eos_token_id=_NO_TOKEN)

    def _collect(self, seen: Counter[str], num_requests: int, num_tokens: int) -> None:
        """Read until ``num_requests`` have ``num_tokens`` each.

        Raises:
            ContinuousBatchingError: a request failed, or nothing came for long.
        """
        while len(seen) < num_requests or min(seen.values()) < num_tokens:
            output = self._manager.get_result(timeout=_PATIENCE_S)
            if output is None:
                raise ContinuousBatchingError("no output: the generation loop has ended")
            if output.error is not None:
                raise ContinuousBatchingError(str(output.error))
            seen[output.request_id] = len(output.generated_tokens)


if __name__ == "__main__":
    run_worker(TransformersContinuousBatching)
