"""Constrained answers of the bundled model: nearly all end by themselves, and every one that does validates."""

from __future__ import annotations

from random import Random

import pytest
from jsonschema import Draft202012Validator

from bench.mixtral_pieces import mixtral_token_bytes
from bench.random_schemas import random_schema
from bench.structured_answers import Answer, answers, summary
from mixtral_serve.text.grammar import json_schema_grammar
from mixtral_serve.text.grammar_vocabulary import Vocabulary


@pytest.mark.slow
def test_nine_in_ten_answers_to_random_schemas_end_with_stop_and_each_of_these_validates() -> None:
    found = answers(500, seed=1, num_threads=1)
    outcome = summary(found, took_s=0.0)
    assert outcome.finish_reasons["stop"] >= 0.9 * len(found)
    assert outcome.num_valid == outcome.finish_reasons["stop"]
    assert len({answer.text for answer in found}) > 300


def test_an_answer_is_valid_only_where_its_text_is_json_that_validates() -> None:
    schema = {"type": "integer", "minimum": 3}
    texts = {"3": True, "2": False, "3.5": False, '"3"': False, "3 ": True, "": False, "3, 4": False}
    for text, is_valid in texts.items():
        assert Answer(schema, text, "stop", 1).is_valid is is_valid


def test_random_schemas_are_schemas_differ_and_compile_over_the_published_vocabulary() -> None:
    table = mixtral_token_bytes()
    assert (len(table), table[0], table[28705], table[13]) == (32_000, b"<unk>", b" ", b"\n")
    vocabulary = Vocabulary(table, eos_token_ids=(2,), vocab_size=len(table))
    schemas = [random_schema(Random(seed)) for seed in range(60)]
    assert schemas == [random_schema(Random(seed)) for seed in range(60)]
    assert len({str(schema) for schema in schemas}) > 50
    for schema in schemas:
        Draft202012Validator.check_schema(schema)
        vocabulary.compile(json_schema_grammar(schema, after_space=True))
