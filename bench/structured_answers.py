"""Whether constrained answers keep to their schemas: ``python -m bench.structured_answers --json FILE``.

The bundled model answers one chat per random bounded schema, sampled at temperature 1, through the real scheduler,
engine core and runner. Counted are how the answers ended, and among the complete ones those that validate with
``jsonschema``, which knows nothing of grammars.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

from jsonschema import Draft202012Validator

from bench.measure import Machine
from bench.random_schemas import random_schema
from mixtral_serve.contract import SamplingParams
from mixtral_serve.demo import checkpoint_path
from mixtral_serve.engine.core import EngineCore
from mixtral_serve.engine.messages import Submit
from mixtral_serve.model.runner import Numerics, load_runner
from mixtral_serve.text.chat_template import load_chat_template
from mixtral_serve.text.conversation import ChatMessage
from mixtral_serve.text.grammar import json_schema_grammar
from mixtral_serve.text.tokenizer import load_tokenizer
from scheduler.config import SchedulerConfig
from scheduler.policies.fcfs import FCFSPolicy
from scheduler.scheduler import Scheduler

MAX_TOKENS: Final = 512
_BLOCK_SIZE: Final = 16
_NUM_BLOCKS: Final = 4096
_MAX_NUM_SEQS: Final = 64
_QUESTIONS: Final = (
    "Answer with JSON.",
    "Extract the name and the city: Anna lives in Paris.",
    "Tell me about the weather.",
    "List three colours.",
)


@dataclass(frozen=True, slots=True)
class Answer:
    """One schema, and what the model made of it."""

    schema: Mapping[str, Any]
    text: str
    finish_reason: str
    num_tokens: int

    @property
    def is_valid(self) -> bool:
        """Whether the text is JSON that validates."""
        try:
            value = json.loads(self.text)
        except ValueError:
            return False
        return bool(Draft202012Validator(self.schema).is_valid(value))


@dataclass(frozen=True, slots=True)
class Summary:
    """What became of all answers."""

    num_answers: int
    finish_reasons: dict[str, int]
    num_valid: int
    """Of those that ended with "stop"."""
    num_tokens: int
    took_s: float


def answers(num_schemas: int, *, seed: int = 0, num_threads: int = 2) -> list[Answer]:
    """Have the bundled model answer ``num_schemas`` random schemas."""
    checkpoint = checkpoint_path()
    tokenizer = load_tokenizer(checkpoint)
    template = load_chat_template(checkpoint, tokenizer)
    assert template is not None, "the bundled model chats"
    runner = load_runner(
        checkpoint, Numerics(), num_blocks=_NUM_BLOCKS, block_size=_BLOCK_SIZE, num_threads=num_threads
    )
    config = SchedulerConfig(
        num_blocks=_NUM_BLOCKS,
        block_size=_BLOCK_SIZE,
        max_num_seqs=_MAX_NUM_SEQS,
        max_model_len=runner.info.max_model_len,
        max_waiting=num_schemas,
    )
    core = EngineCore(Scheduler(config, FCFSPolicy()), runner, tokenizer.token_bytes)
    prompts = [template.encode([ChatMessage("user", question)]).tobytes() for question in _QUESTIONS]
    schemas = [random_schema(Random(f"{seed}/{index}")) for index in range(num_schemas)]
    core.handle(
        Submit(
            request_id=str(index),
            prompt=prompts[index % len(prompts)],
            arrival_s=0.0,
            max_tokens=MAX_TOKENS,
            strip_leading_space=True,
            sampling=SamplingParams(seed=index),
            grammar=json_schema_grammar(schema, after_space=True),
        )
        for index, schema in enumerate(schemas)
    )
    return _collected(core, schemas)


def summary(found: Sequence[Answer], took_s: float) -> Summary:
    """Counts over the answers."""
    return Summary(
        num_answers=len(found),
        finish_reasons=dict(Counter(answer.finish_reason for answer in found)),
        num_valid=sum(answer.finish_reason == "stop" and answer.is_valid for answer in found),
        num_tokens=sum(answer.num_tokens for answer in found),
        took_s=took_s,
    )


def _collected(core: EngineCore, schemas: Sequence[Mapping[str, Any]]) -> list[Answer]:
    """Tick until every request has ended. A grammar that is still being compiled is asked for again and again."""
    texts = [""] * len(schemas)
    found: dict[int, Answer] = {}
    while len(found) < len(schemas):
        tick = core.tick()
        for delta in () if tick is None else tick.deltas:
            index = int(delta.request_id)
            texts[index] += delta.text
            if delta.finish_reason is not None:
                reason = delta.finish_reason if delta.error is None else f"{delta.finish_reason}: {delta.error}"
                found[index] = Answer(schemas[index], texts[index], reason, delta.num_output_tokens)
    return [found[index] for index in range(len(schemas))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write. Returns 1 where an answer that ended does not validate, or too few ended."""
    parser = argparse.ArgumentParser(prog="python -m bench.structured_answers", description=__doc__)
    parser.add_argument("--schemas", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, required=True, help="file for the results")
    options = parser.parse_args(arguments)
    began_s = time.perf_counter()
    found = answers(options.schemas, seed=options.seed, num_threads=options.threads)
    outcome = summary(found, time.perf_counter() - began_s)
    for answer in found:
        if answer.finish_reason != "stop" or not answer.is_valid:
            print(f"{answer.finish_reason}: {json.dumps(answer.schema)[:300]} -> {answer.text[:200]!r}")
    num_stopped = outcome.finish_reasons.get("stop", 0)
    print(
        f"{num_stopped} of {outcome.num_answers} ended with stop, {outcome.num_valid} of these validate, "
        f"{outcome.num_tokens} tokens in {outcome.took_s:.1f} s"
    )
    options.json.write_text(json.dumps({"machine": asdict(Machine.this()), **asdict(outcome)}, indent=2) + "\n")
    return 0 if outcome.num_valid == num_stopped and num_stopped >= 0.9 * outcome.num_answers else 1


if __name__ == "__main__":
    sys.exit(main())
