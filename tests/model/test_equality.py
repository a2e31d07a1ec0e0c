"""Greedy output is Transformers' greedy output, token for token, however a step cuts and mixes the requests.

The reference is ``MixtralForCausalLM.generate`` with eager attention and eager experts in fp32, loaded by
Transformers itself from the same files, one request at a time. Ours runs many requests through the real
scheduler on a pool small enough to preempt, with prompts that share prefixes.

Two correct computations round differently, so a comparison must stop where the reference itself hangs on a
rounding error: where its two best logits, or two router scores around the cut, are closer than ``TIE``. Such
stops are counted and must be rare.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import MixtralForCausalLM

from mixtral_serve.model.shape import ModelShape
from mixtral_serve.model.synthetic import write_synthetic_checkpoint
from scheduler.plan import ScheduledSlice

TIE = 1e-4
LOGITS_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Reference:
    """What Transformers says about one prompt."""

    tokens: list[int]
    logits: torch.Tensor
    """[output tokens, vocab]"""
    num_comparable: int
    """Output tokens before the first near-tie."""


@dataclass
class Tally:
    num_sequences: int = 0
    num_stopped: int = 0
    num_tokens: int = 0
    num_preemptions: int = 0
    num_hit_tokens: int = 0
    num_windowed: int = 0
    num_tied: int = 0
    worst_logit: float = 0.0


def random_shape(rng: random.Random) -> ModelShape:
    num_kv_heads = rng.choice([1, 2, 3])
    num_experts = rng.choice([2, 4, 5, 8])
    hidden_size = rng.choice([24, 36, 40, 52, 64])
    return ModelShape(
        vocab_size=rng.choice([61, 97, 130, 256]),
        hidden_size=hidden_size,
        intermediate_size=rng.choice([16, 28, 40, 64]),
        num_layers=rng.choice([1, 2, 3]),
        num_query_heads=num_kv_heads * rng.choice([1, 2, 4]),
        num_kv_heads=num_kv_heads,
        head_dim=rng.choice([6, 8, 10, 16]),
        num_experts=num_experts,
        num_experts_per_token=min(num_experts, rng.choice([1, 2, 2, 2, 3])),
        max_model_len=128,
        sliding_window=rng.choice([None, None, 3, 7, 16, 40]),
        rope_theta=rng.choice([100.0, 10000.0, 1e6]),
        rms_norm_eps=rng.choice([1e-5, 1e-6]),
        tied=rng.random() < 0.3,
    )


def random_prompts(rng: random.Random, vocab_size: int) -> list[list[int]]:
    """Prompts of ragged lengths; about half begin like another one."""
    stems = [[rng.randrange(vocab_size) for _ in range(rng.randint(6, 30))] for _ in range(2)]
    prompts = []
    for _ in range(rng.randint(4, 7)):
        stem = rng.choice(stems)
        prefix = stem[: rng.randint(0, len(stem))] if rng.random() < 0.5 else []
        prompts.append([*prefix, *(rng.randrange(vocab_size) for _ in range(rng.randint(1, 12)))])
    return prompts


def ask_transformers(model: MixtralForCausalLM, prompt: Sequence[int], max_tokens: int) -> Reference:
    with torch.inference_mode():
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),  # it would take id 0 for padding
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        sequence = output.sequences
        routed = model(sequence, use_cache=False, output_router_logits=True).router_logits
    logits = torch.stack(output.logits)[:, 0]
    best = logits.topk(2).values
    close_tokens = (best[:, 0] - best[:, 1] < TIE).nonzero().flatten().tolist()
    close_routes: list[int] = []
    k = model.config.num_experts_per_tok
    for scores in routed:
        if scores.shape[-1] > k:
            ranked = scores.sort(dim=-1, descending=True).values
            close_routes += (ranked[:, k - 1] - ranked[:, k] < TIE).nonzero().flatten().tolist()
    # The row at position p yields output token p - len(prompt) + 1 and is read by all later ones.
    stops = [*close_tokens, *(max(0, position - len(prompt) + 1) for position in close_routes), max_tokens]
    return Reference(sequence[0, len(prompt) :].tolist(), logits, min(stops))


def compare_one_model(seed: int, directory: Path, tally: Tally, *, make_runner, make_request, drive) -> None:
    rng = random.Random(seed)
    shape = random_shape(rng)
    path = directory / f"model{seed}"
    write_synthetic_checkpoint(path, shape, seed=seed, weights="fp32", max_shard_bytes=rng.choice([1 << 30, 30_000]))
    model = MixtralForCausalLM.from_pretrained(
        path, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    ).eval()
    prompts = random_prompts(rng, shape.vocab_size)
    lengths = [rng.randint(3, 14) for _ in prompts]
    references = [ask_transformers(model, *pair) for pair in zip(prompts, lengths, strict=True)]

    seen: dict[tuple[str, int], torch.Tensor] = {}

    def listen(slices: Sequence[ScheduledSlice], logits: torch.Tensor) -> None:
        for part, row in zip(slices, logits, strict=True):
            seen[part.request_id, part.num_output_tokens] = row.clone()

    block_size = rng.choice([1, 2, 4, 5, 16])
    longest = max(len(prompt) + length for prompt, length in zip(prompts, lengths, strict=True))
    least = -(-longest // block_size) + 1
    runner = make_runner(
        path,
        num_blocks=rng.randint(least, 3 * least),
        block_size=block_size,
        logits_listener=listen,
    )
    driven = drive(
        runner,
        [
            make_request(f"r{i}", prompt, max_tokens=length)
            for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
        ],
        arrivals=[rng.randint(0, 12) for _ in prompts],
        max_num_seqs=rng.randint(1, 6),
        max_num_batched_tokens=rng.randint(6, 40),
        max_prefill_chunk=rng.choice([None, 1, 3, 8]),
    )
    tally.num_preemptions += driven.num_preemptions
    tally.num_hit_tokens += driven.num_hit_tokens
    tally.num_windowed += shape.sliding_window is not None
    tally.num_tied += shape.tied
    for i, reference in enumerate(references):
        num = reference.num_comparable
        tally.num_sequences += 1
        tally.num_stopped += num < len(reference.tokens)
        tally.num_tokens += num
        ours = driven.tokens[f"r{i}"]
        assert len(ours) == len(reference.tokens)
        assert ours[:num] == reference.tokens[:num], f"model {seed} ({shape}), request {i}"
        for index in range(num):
            error = float((seen[f"r{i}", index] - reference.logits[index]).abs().max())
            tally.worst_logit = max(tally.worst_logit, error)
            assert error < LOGITS_TOLERANCE, f"model {seed} ({shape}), request {i}, token {index}"


def compare_models(seeds: range, directory: Path, **tools: object) -> Tally:
    tally = Tally()
    for seed in seeds:
        compare_one_model(seed, directory, tally, **tools)
    logging.getLogger(__name__).info("%d models: %s", len(seeds), tally)
    assert tally.num_stopped < 0.05 * tally.num_sequences, tally
    assert tally.num_preemptions > 0, "nothing was preempted: the pools are too large to prove anything"
    assert tally.num_hit_tokens > 0, "no prefix was found: the prompts share too little"
    assert 0 < tally.num_windowed < len(seeds)
    assert 0 < tally.num_tied < len(seeds)
    return tally


def test_greedy_output_equals_transformers_on_ten_random_models(tmp_path, make_runner, make_request, drive) -> None:
    compare_models(range(10), tmp_path, make_runner=make_runner, make_request=make_request, drive=drive)


@pytest.mark.slow
def test_greedy_output_equals_transformers_on_two_hundred_random_models(
    tmp_path, make_runner, make_request, drive
) -> None:
    tally = compare_models(range(1000, 1200), tmp_path, make_runner=make_runner, make_request=make_request, drive=drive)
    assert tally.num_sequences > 1000
    assert tally.num_tokens > 8000
