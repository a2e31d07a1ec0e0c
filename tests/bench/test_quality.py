"""What smaller weights cost: perplexity and exact match of the demo model, on every backend that runs here."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from bench.quality import Engine, combinations, main, measure
from mixtral_serve.demo.evaluate import exact_match
from mixtral_serve.demo.perplexity import held_out_chats, perplexity
from mixtral_serve.kernels import native
from mixtral_serve.kernels.registry import BACKENDS
from mixtral_serve.model.runner import Numerics

RUNNABLE = [
    Numerics(weights=kind, kernels=name)
    for name, make in BACKENDS.items()
    for kind in ("int8", "int4")
    if make().missing(kind) is None
]
if native.is_available():
    RUNNABLE.append(Numerics(weights="int8", kernels="native", kv_cache_dtype="int8"))
MOST_LOSS = {"int8": 0.005, "int4": 0.04}
"""Of perplexity, relative to fp32."""
MOST_POINTS = {"int8": 0.01, "int4": 0.03}
"""Of exact match, over all skills."""
packed = pytest.mark.parametrize(
    "numerics", RUNNABLE, ids=lambda numerics: f"{numerics.weights}-{numerics.kernels}-kv-{numerics.kv_cache_dtype}"
)


@pytest.fixture(scope="module")
def fp32_perplexity() -> float:
    return perplexity(Engine(Numerics()).score, held_out_chats(12))


@pytest.mark.slow
@packed
def test_perplexity_stays_within_the_bound_of_its_weights(numerics: Numerics, fp32_perplexity: float) -> None:
    found = perplexity(Engine(numerics).score, held_out_chats(12))
    assert abs(found / fp32_perplexity - 1) < MOST_LOSS[numerics.weights]


@pytest.mark.slow
@packed
def test_simple_skills_are_kept(numerics: Numerics) -> None:
    rates = exact_match(Engine(numerics).answer, 15, seed=9, skills=("facts", "sums", "greetings"))
    assert min(rates.values()) > 0.85


@pytest.mark.slow
@pytest.mark.timeout(900)
@packed
def test_exact_match_over_all_skills_stays_within_the_bound_of_its_weights(numerics: Numerics) -> None:
    options = argparse.Namespace(threads=1, chats=1, count=100, seed=2)
    baseline, found = measure(Numerics(), options), measure(numerics, options)
    assert baseline.mean_match - found.mean_match <= MOST_POINTS[numerics.weights]


def test_perplexity_counts_the_answers_only() -> None:
    chats = held_out_chats(1)

    def score(sequences: list[list[int]]) -> list[list[float]]:
        answers = [chat.is_answer[1:] for chat in chats]
        assert [len(sequence) - 1 for sequence in sequences] == [len(each) for each in answers]
        return [[-0.5 if is_answer else -100.0 for is_answer in each] for each in answers]

    assert perplexity(score, chats) == pytest.approx(2.718281828**0.5)


def test_all_combinations_are_measured_and_those_that_cannot_run_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "quality.json"
    asked = ["--weights", "int8", "int4", "--kernels", "torch", "--chats", "1", "--count", "0", "--json", str(file)]
    assert main(asked) == 0
    printed = capsys.readouterr().out
    assert "| int8 | torch | " in printed
    assert "left out: kernels = torch, weights = int4: int4 weights need the compiled kernels" in printed
    written = json.loads(file.read_text())
    assert [(row["weights"], row["kernels"]) for row in written["rows"]] == [("int8", "torch")]
    assert written["baseline"]["perplexity"] == pytest.approx(written["rows"][0]["perplexity"], rel=0.02)


def test_bf16_has_no_kernels_to_choose_from() -> None:
    asked = combinations(["bf16", "int8"], ["native", "torch"])
    assert [(each.weights, each.kernels) for each in asked] == [
        ("bf16", "auto"),
        ("int8", "native"),
        ("int8", "torch"),
    ]


def test_every_kind_of_kv_cache_is_measured_with_every_kind_of_weights() -> None:
    asked = combinations(["fp32", "int4"], ["native"], ["bf16", "int8"])
    assert [(each.weights, each.kv_cache_dtype) for each in asked] == [
        ("fp32", "bf16"),
        ("fp32", "int8"),
        ("int4", "bf16"),
        ("int4", "int8"),
    ]
