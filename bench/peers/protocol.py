"""What the measurement and a worker say to each other: one JSON object per line, over the worker's pipes.

    worker    {"ready": {"version": "1.2.3", "details": {...}}}
    command   {"decode": {"batch": 16, "steps": 8, "context": 16}}
    command   {"prefill": {"tokens": 512, "serial": 7}}
    worker    {"answer": {"seconds": 0.81, "tokens": 128}}
    worker    {"error": "RuntimeError: the first line of what went wrong"}
    worker    {"unavailable": "the reason why this contender cannot be measured"}

Owns: these messages, ``run_worker`` (the worker's side) and its command line, and the tokens that every contender is
asked to work on, so that all do the same work. Standard library only: it runs in every peer's environment.

Invariants: nothing but messages goes to the pipe, whatever a peer's libraries print; a command is answered by
exactly one line; a worker ends when its input does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol

VOCAB_SIZE = 32000
_FIRST_TOKEN_ID = 300
"""Control tokens and bytes stand below it."""


class UnavailableError(Exception):
    """This contender cannot be measured here, and that is not a fault: the message says why."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a loaded contender says of itself."""

    version: str
    details: dict[str, object] = field(default_factory=dict)


class Contender(Protocol):
    """A loaded server, driven at the level of its steps."""

    @property
    def facts(self) -> Facts:
        """Constant once loaded."""
        ...

    def decode(self, batch: int, steps: int, context: int) -> float:
        """Seconds that ``steps`` decode steps of ``batch`` sequences took.

        Each sequence holds ``context`` tokens of ``decode_prompt`` and at least one that was decoded before the clock
        starts; every step picks a token for every sequence, greedily, and does not stop at the end-of-sequence token.
        """
        ...

    def prefill(self, prompt: list[int]) -> float:
        """Seconds from handing ``prompt`` over until its next token is picked; nothing of it was seen before."""
        ...


def decode_prompt(sequence: int, num_tokens: int) -> list[int]:
    """The prompt of a decoding sequence: the same for every contender and round."""
    return _tokens(f"decode {sequence}", num_tokens)


def fresh_prompt(serial: int, num_tokens: int) -> list[int]:
    """A prompt that shares no beginning with any other."""
    return _tokens(f"fresh {serial}", num_tokens)


def _tokens(seed: str, num_tokens: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(_FIRST_TOKEN_ID, VOCAB_SIZE) for _ in range(num_tokens)]


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """What a worker is started with."""

    model: Path
    """In the form that this contender reads."""
    variant: str
    """Which of its number formats."""
    threads: int
    sequences: int
    """Most that decode at once."""
    positions: int
    """Most of one sequence, prompts included."""

    def arguments(self) -> list[str]:
        """As ``run_worker`` reads them."""
        values = {name: getattr(self, name) for name in ("model", "variant", "threads", "sequences", "positions")}
        return [f"--{name}={value}" for name, value in values.items()]

    @classmethod
    def parse(cls, arguments: Sequence[str] | None = None) -> WorkerOptions:
        """From a command line."""
        parser = argparse.ArgumentParser(description="A worker of bench.peers; see bench/peers/protocol.py.")
        parser.add_argument("--model", type=Path, required=True)
        parser.add_argument("--variant", required=True)
        for name in ("threads", "sequences", "positions"):
            parser.add_argument(f"--{name}", type=int, required=True)
        return cls(**vars(parser.parse_args(arguments)))


def run_worker(load: Callable[[WorkerOptions], Contender]) -> None:
    """The whole life of a worker process: load, say so, obey until the input ends."""
    options = WorkerOptions.parse()
    with _private_stdout() as answers:
        serve_commands(lambda: load(options), sys.stdin, answers)
    sys.stderr.flush()
    os._exit(0)  # peers leave threads behind that an orderly exit would wait for


def serve_commands(load: Callable[[], Contender], commands: IO[str], answers: IO[str]) -> None:
    """Load, then answer one command after another. A command that fails is answered with its error."""
    try:
        contender = load()
        _say(answers, {"ready": {"version": contender.facts.version, "details": contender.facts.details}})
    except UnavailableError as error:
        _say(answers, {"unavailable": str(error)})
        return
    except Exception as error:
        _say(answers, {"error": first_line(error)})
        raise
    for line in commands:
        try:
            _say(answers, {"answer": _obey(contender, json.loads(line))})
        except Exception as error:  # noqa: BLE001 - as above; the worker may well go on
            _say(answers, {"error": first_line(error)})


def first_line(error: BaseException) -> str:
    """The class of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


def _obey(contender: Contender, command: dict[str, dict[str, int]]) -> dict[str, float]:
    """Carry one command out."""
    ((verb, arguments),) = command.items()
    if verb == "decode":
        seconds = contender.decode(**arguments)
        return {"seconds": seconds, "tokens": arguments["batch"] * arguments["steps"]}
    if verb == "prefill":
        prompt = fresh_prompt(arguments["serial"], arguments["tokens"])
        return {"seconds": contender.prefill(prompt), "tokens": len(prompt)}
    raise ValueError(f"unknown command {verb!r}")


def _say(answers: IO[str], message: dict[str, object]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


@contextlib.contextmanager
def _private_stdout() -> Iterator[IO[str]]:
    """Standard output for messages alone; what libraries print there goes to standard error."""
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        yield answers
