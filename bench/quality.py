"""What smaller weights, keys and values cost in quality: ``python -m bench.quality --weights int8 int4 --json FILE``.

The demo model in fp32, then with each kind of weights and of KV cache on each backend: perplexity on held-out answers,
and the share of held-out prompts answered exactly, skill by skill. Everything runs through the real scheduler and
runner, in the batches that serving would make. Combinations that cannot run here are listed with the reason.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

import torch

from bench.measure import Machine
from mixtral_serve.contract import RunBatch, Runner, SamplingParams
from mixtral_serve.demo import checkpoint_path
from mixtral_serve.demo.conversation import Message
from mixtral_serve.demo.evaluate import exact_match
from mixtral_serve.demo.perplexity import held_out_chats, perplexity
from mixtral_serve.kernels.names import BackendName, KernelChoice
from mixtral_serve.kernels.native import NativeUnavailableError
from mixtral_serve.kernels.registry import KernelsUnavailableError
from mixtral_serve.model.runner import Numerics, load_runner
from mixtral_serve.model.shape import KVDtype, Weights, kv_dtype_for
from mixtral_serve.text.chat_template import load_chat_template
from mixtral_serve.text.conversation import ChatMessage
from mixtral_serve.text.tokenizer import load_tokenizer
from scheduler.config import SchedulerConfig
from scheduler.events import Event, PromptScored, TokensCommitted
from scheduler.policies.fcfs import FCFSPolicy
from scheduler.request import Request, RequestId, RequestKind, StopRule
from scheduler.scheduler import Scheduler

KVCacheChoice: TypeAlias = Literal["auto"] | KVDtype

_BLOCK_SIZE: Final = 16
_NUM_BLOCKS: Final = 2048
_MAX_NUM_SEQS: Final = 32
_MAX_ANSWER_TOKENS: Final = 160


@dataclass(frozen=True, slots=True)
class Quality:
    """What one combination came to."""

    weights: str
    kernels: str
    kv_cache: str
    """How keys and values were held."""
    perplexity: float
    exact_match: dict[str, float]
    """By skill; empty where it was not asked for."""
    seconds: float

    @property
    def mean_match(self) -> float:
        """Over all prompts: every skill has as many."""
        return sum(self.exact_match.values()) / max(1, len(self.exact_match))


class Engine:
    """A runner and a scheduler, without the processes and HTTP around them."""

    def __init__(self, numerics: Numerics, *, num_threads: int = 1, checkpoint: Path | None = None) -> None:
        self._checkpoint = checkpoint or checkpoint_path()
        self._runner: Runner = load_runner(
            self._checkpoint,
            numerics,
            num_blocks=_NUM_BLOCKS,
            block_size=_BLOCK_SIZE,
            num_threads=num_threads,
        )

    def score(self, sequences: list[list[int]]) -> list[list[float]]:
        """See ``demo.perplexity.Score``."""
        scored: dict[str, list[float]] = {}
        params = SamplingParams(temperature=0, prompt_logprobs=0)
        events = self._run([_request(i, tokens, RequestKind.SCORE) for i, tokens in enumerate(sequences)], params)
        for event in events:
            if isinstance(event, PromptScored):
                scored.setdefault(event.request_id, []).extend(entry.logprob for entry in event.logprobs)
        return [scored[str(i)] for i in range(len(sequences))]

    def answer(self, prompts: list[list[Message]]) -> list[str]:
        """See ``demo.evaluate.Answer``: greedy."""
        tokenizer = load_tokenizer(self._checkpoint)
        template = load_chat_template(self._checkpoint, tokenizer)
        assert template is not None, "the demo model has a chat template"
        chats = [[ChatMessage(message["role"], message["content"]) for message in prompt] for prompt in prompts]
        requests = [_request(i, template.encode(chat), RequestKind.GENERATE) for i, chat in enumerate(chats)]
        given: dict[str, list[int]] = {}
        for event in self._run(requests, SamplingParams(temperature=0)):
            if isinstance(event, TokensCommitted):
                given.setdefault(event.request_id, []).append(event.token_id)
        return [tokenizer.decode(given.get(str(i), [])).strip() for i in range(len(prompts))]

    def _run(self, requests: Sequence[Request], params: SamplingParams) -> list[Event]:
        """Run to the end; all events."""
        config = SchedulerConfig(num_blocks=_NUM_BLOCKS, block_size=_BLOCK_SIZE, max_num_seqs=_MAX_NUM_SEQS)
        scheduler = Scheduler(config, FCFSPolicy())
        for request in requests:
            scheduler.add(request, 0.0)
        events: list[Event] = []
        while scheduler.has_work:
            plan = scheduler.step(0.0)
            events.extend(plan.events)
            events.extend(scheduler.commit(self._runner.run(RunBatch(plan, (params,) * len(plan.slices))), 0.0))
        return events


def _request(number: int, tokens: Sequence[int], kind: RequestKind) -> Request:
    is_scored = kind is RequestKind.SCORE
    stop = StopRule(0) if is_scored else StopRule(_MAX_ANSWER_TOKENS, frozenset({2}))
    return Request(RequestId(str(number)), array("i", tokens), stop, 0.0, kind=kind, prompt_logprobs=is_scored)


def measure(numerics: Numerics, options: argparse.Namespace) -> Quality:
    """One combination.

    Raises:
        KernelsUnavailableError, NativeUnavailableError: it cannot run here.
    """
    started_s = time.monotonic()
    engine = Engine(numerics, num_threads=options.threads)
    chats = held_out_chats(options.chats, options.seed)
    rates = exact_match(engine.answer, options.count, options.seed) if options.count else {}
    found = perplexity(engine.score, chats)
    held = kv_dtype_for(numerics.weights, numerics.kv_cache_dtype)
    return Quality(numerics.weights, numerics.kernels, held, found, rates, time.monotonic() - started_s)


def combinations(
    weights: Sequence[Weights], kernels: Sequence[BackendName], kv_caches: Sequence[KVCacheChoice] = ("auto",)
) -> list[Numerics]:
    """All of them; fp32 and bf16 have no kernels to choose from."""
    found = []
    for kind in weights:
        choices: Sequence[KernelChoice] = kernels if kind in ("int8", "int4") else ("auto",)
        for name in choices:
            found += [Numerics(weights=kind, kernels=name, kv_cache_dtype=held) for held in kv_caches]
    return found


def table(baseline: Quality, others: Sequence[Quality]) -> str:
    """Markdown: every combination against the baseline."""
    lines = [
        "| weights | kernels | KV cache | perplexity | change | exact match | change, points | worst skill, points |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in (baseline, *others):
        change = row.perplexity / baseline.perplexity - 1
        worst = min((rate - baseline.exact_match[skill] for skill, rate in row.exact_match.items()), default=0.0)
        points = 100 * (row.mean_match - baseline.mean_match)
        lines.append(
            f"| {row.weights} | {row.kernels} | {row.kv_cache} | {row.perplexity:.5f} | {change:+.3%} |"
            f" {row.mean_match:.2%} | {points:+.2f} | {100 * worst:+.1f} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--weights", nargs="+", choices=("fp32", "bf16", "int8", "int4"), default=["int8", "int4"])
    parser.add_argument(
        "--kernels", nargs="+", choices=("native", "torch", "reference"), default=["native", "torch", "reference"]
    )
    parser.add_argument(
        "--kv-cache-dtype", nargs="+", choices=("auto", "fp32", "bf16", "int8"), default=["auto"], help="default: auto"
    )
    parser.add_argument("--chats", type=int, default=60, help="chats per skill for the perplexity")
    parser.add_argument("--count", type=int, default=100, help="prompts per skill for the exact match; 0 skips it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="the demo model gains nothing from more")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    options = parser.parse_args(argv)
    baseline = measure(Numerics(), options)
    rows: list[Quality] = []
    skipped: list[str] = []
    for numerics in combinations(options.weights, options.kernels, options.kv_cache_dtype):
        try:
            rows.append(measure(numerics, options))
        except (KernelsUnavailableError, NativeUnavailableError) as error:
            skipped.append(str(error))
    print(table(baseline, rows))
    for reason in skipped:
        print(f"left out: {reason}")
    if options.json is not None:
        found = {"baseline": asdict(baseline), "rows": [asdict(row) for row in rows], "left_out": skipped}
        facts = {"torch": torch.__version__, "machine": asdict(Machine.this())}
        options.json.write_text(json.dumps(found | facts, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
