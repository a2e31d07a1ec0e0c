"""What the measurement and a worker say to each other."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from bench.peers.protocol import (
    Facts,
    UnavailableError,
    WorkerOptions,
    decode_prompt,
    first_line,
    fresh_prompt,
    serve_commands,
)


class Fake:
    """A contender whose times are told beforehand; fails for batches above 64."""

    def __init__(self) -> None:
        self.prompts: list[list[int]] = []

    @property
    def facts(self) -> Facts:
        return Facts("fake 1.0", {"threads": 2})

    def decode(self, batch: int, steps: int, context: int) -> float:
        if batch > 64:
            raise ValueError("too many\nsecond line")
        return 0.25 * steps + context / 1000

    def prefill(self, prompt: list[int]) -> float:
        self.prompts.append(prompt)
        return 2.0


def said(commands: list[dict[str, Any]], load: Any = Fake) -> list[dict[str, Any]]:
    answers = io.StringIO()
    serve_commands(load, io.StringIO("".join(json.dumps(command) + "\n" for command in commands)), answers)
    return [json.loads(line) for line in answers.getvalue().splitlines()]


def test_a_worker_says_who_it_is_and_answers_each_command_in_one_line() -> None:
    decode = {"decode": {"batch": 16, "steps": 8, "context": 32}}
    assert said([decode, {"prefill": {"tokens": 512, "serial": 7}}]) == [
        {"ready": {"version": "fake 1.0", "details": {"threads": 2}}},
        {"answer": {"seconds": 2.032, "tokens": 128}},
        {"answer": {"seconds": 2.0, "tokens": 512}},
    ]


def test_a_command_that_fails_is_answered_with_its_error_and_the_next_one_is_obeyed() -> None:
    answers = said(
        [
            {"decode": {"batch": 65, "steps": 1, "context": 1}},
            {"dance": {}},
            {"prefill": {"tokens": 8, "serial": 0}},
        ]
    )
    assert answers[1:] == [
        {"error": "ValueError: too many"},
        {"error": "ValueError: unknown command 'dance'"},
        {"answer": {"seconds": 2.0, "tokens": 8}},
    ]


def test_a_contender_that_is_not_available_says_why_and_obeys_nothing() -> None:
    def load() -> Fake:
        raise UnavailableError("needs a compiler")

    assert said([{"prefill": {"tokens": 8, "serial": 0}}], load) == [{"unavailable": "needs a compiler"}]


def test_a_contender_that_cannot_be_loaded_tells_its_error_before_it_ends() -> None:
    answers = io.StringIO()

    def load() -> Fake:
        raise MemoryError

    with pytest.raises(MemoryError):
        serve_commands(load, io.StringIO(""), answers)
    assert json.loads(answers.getvalue()) == {"error": "MemoryError"}


def test_every_contender_decodes_the_same_prompts_and_no_two_sequences_are_alike() -> None:
    prompts = [decode_prompt(sequence, 17) for sequence in range(64)]
    assert prompts == [decode_prompt(sequence, 17) for sequence in range(64)]
    assert len({tuple(prompt) for prompt in prompts}) == 64
    assert all(300 <= token < 32000 for prompt in prompts for token in prompt)


def test_fresh_prompts_share_no_beginning() -> None:
    beginnings = {tuple(fresh_prompt(serial, 512)[:2]) for serial in range(-1, 50)}
    assert len(beginnings) == 51


def test_the_command_line_of_a_worker_can_be_read_back() -> None:
    options = WorkerOptions(model=Path("/models/a b"), variant="Q4_0", threads=2, sequences=64, positions=520)
    assert WorkerOptions.parse(options.arguments()) == options


def test_an_error_without_words_is_its_class() -> None:
    assert first_line(ZeroDivisionError()) == "ZeroDivisionError"
    assert first_line(RuntimeError("\n  first \nsecond")) == "RuntimeError: first"
