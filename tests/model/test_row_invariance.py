"""The law of equal bits: on the native kernels a row's logits are a function of the row's own tokens.

Whole models, int4 and int8. Each request is first computed alone: its prompt in one step, on one thread, without a
cache to hit. Then the same requests are run together through the real scheduler in many ways: arriving at different
times, on pools small enough to preempt, with prompts cut into chunks, with shared prefixes, with other block sizes and
from 1 to 8 threads. Every row of logits must come back with the same bits.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import MixtralForCausalLM

from mixtral_serve.contract import ModelInfo
from mixtral_serve.demo import checkpoint_path
from mixtral_serve.demo.skills import SKILLS, held_out_episodes
from mixtral_serve.kernels import native
from mixtral_serve.kernels.formats import Kind
from mixtral_serve.kernels.native_backend import NativeBackend
from mixtral_serve.model.checkpoint import open_checkpoint
from mixtral_serve.model.kv_cache import allocate_kv_cache
from mixtral_serve.model.loader import load_model
from mixtral_serve.model.runner import MixtralRunner
from mixtral_serve.model.shape import KVDtype, ModelShape
from mixtral_serve.model.synthetic import write_synthetic_checkpoint
from mixtral_serve.text.chat_template import load_chat_template
from mixtral_serve.text.conversation import ChatMessage
from mixtral_serve.text.tokenizer import load_tokenizer
from scheduler.plan import ScheduledSlice

pytestmark = pytest.mark.skipif(not native.is_available(), reason="the compiled kernels are not installed")

Rows = dict[tuple[str, int], torch.Tensor]
"""(request, output tokens before) -> logits."""


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Loaded:
    model: MixtralForCausalLM
    shape: ModelShape
    kv_dtype: KVDtype

    @classmethod
    def of(cls, path: Path, kind: Kind, kv_dtype: KVDtype = "bf16") -> Loaded:
        checkpoint = open_checkpoint(path)
        return cls(load_model(checkpoint, kind, NativeBackend()), checkpoint.shape, kv_dtype)

    def runner(self, rows: Rows, *, num_blocks: int, block_size: int) -> MixtralRunner:
        """Computes with as many threads as PyTorch has now; notes all logits in ``rows``."""

        def listen(slices: Sequence[ScheduledSlice], logits: torch.Tensor) -> None:
            for part, row in zip(slices, logits, strict=True):
                rows[part.request_id, part.num_output_tokens] = row.clone()

        cache = allocate_kv_cache(
            self.shape,
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=self.kv_dtype,
            compute_dtype=torch.float32,
            is_native=True,
        )
        info = ModelInfo(
            name="m",
            fingerprint="f",
            vocab_size=self.shape.vocab_size,
            max_model_len=self.shape.max_model_len,
            eos_token_ids=self.shape.eos_token_ids,
            num_blocks=num_blocks,
            block_size=block_size,
            weights_bytes=0,
            kv_cache_bytes=cache.num_bytes,
        )
        return MixtralRunner(self.model, self.shape, cache=cache, info=info, logits_listener=listen)


@dataclass
class Tally:
    num_rows: int = 0
    num_preemptions: int = 0
    num_hit_tokens: int = 0


@dataclass(frozen=True)
class Workload:
    prompts: list[list[int]]
    lengths: list[int]

    @property
    def longest(self) -> int:
        return max(len(prompt) + length for prompt, length in zip(self.prompts, self.lengths, strict=True))


Law = Callable[..., Tally]


@pytest.fixture
def check_law(drive, make_request) -> Law:
    """Run a workload alone and then in ``num_ways`` ways together; every logit must be the same, bit for bit."""

    def requests(work: Workload) -> list[object]:
        pairs = enumerate(zip(work.prompts, work.lengths, strict=True))
        return [make_request(f"r{i}", prompt, max_tokens=length) for i, (prompt, length) in pairs]

    def alone(loaded: Loaded, work: Workload) -> Rows:
        torch.set_num_threads(1)
        rows: Rows = {}
        runner = loaded.runner(rows, num_blocks=work.longest + 2, block_size=1)
        for request in requests(work):
            drive(runner, [request], max_num_batched_tokens=work.longest)
        return rows

    def check(loaded: Loaded, work: Workload, rng: random.Random, num_ways: int) -> Tally:
        expected = alone(loaded, work)
        tally = Tally(num_rows=len(expected))
        assert all(bool(row.isfinite().all()) for row in expected.values())
        for way in range(num_ways):
            torch.set_num_threads(1 + way % 8)
            rows: Rows = {}
            block_size = rng.choice([1, 2, 3, 4, 8, 16])
            least = -(-work.longest // block_size) + 1
            runner = loaded.runner(rows, num_blocks=rng.randint(least, 2 * least), block_size=block_size)
            driven = drive(
                runner,
                requests(work),
                arrivals=[rng.randint(0, 12) for _ in work.prompts],
                max_num_seqs=rng.randint(1, len(work.prompts)),
                max_num_batched_tokens=rng.choice([7, 13, 40, 3 * work.longest]),
                max_prefill_chunk=rng.choice([None, 1, 3, 8, 64]),
            )
            tally.num_preemptions += driven.num_preemptions
            tally.num_hit_tokens += driven.num_hit_tokens
            assert rows.keys() == expected.keys()
            for key, row in rows.items():
                assert torch.equal(row, expected[key]), (
                    f"way {way}: {key} is off by {float((row - expected[key]).abs().max()):g}"
                )
        return tally

    return check


def random_shape(rng: random.Random) -> ModelShape:
    num_kv_heads = rng.choice([1, 2, 3])
    num_experts = rng.choice([2, 4, 5, 8])
    return ModelShape(
        vocab_size=rng.choice([61, 97, 130, 256]),
        hidden_size=rng.choice([24, 36, 40, 52, 64, 96]),
        intermediate_size=rng.choice([16, 28, 40, 64, 80]),
        num_layers=rng.choice([1, 2, 3]),
        num_query_heads=num_kv_heads * rng.choice([1, 2, 4]),
        num_kv_heads=num_kv_heads,
        head_dim=rng.choice([6, 8, 10, 16, 32]),
        num_experts=num_experts,
        num_experts_per_token=min(num_experts, rng.choice([1, 2, 2, 2, 3])),
        max_model_len=128,
        sliding_window=rng.choice([None, None, 3, 7, 16, 40]),
        rope_theta=rng.choice([100.0, 10000.0, 1e6]),
        tied=rng.random() < 0.3,
    )


def random_workload(rng: random.Random, vocab_size: int) -> Workload:
    """Prompts of ragged lengths; about half begin like another one."""
    stems = [[rng.randrange(vocab_size) for _ in range(rng.randint(6, 30))] for _ in range(2)]
    prompts = []
    for _ in range(rng.randint(4, 7)):
        prefix = rng.choice(stems) if rng.random() < 0.5 else []
        prompts.append([*prefix, *(rng.randrange(vocab_size) for _ in range(rng.randint(1, 12)))])
    return Workload(prompts, [rng.randint(3, 10) for _ in prompts])


def check_random_models(seeds: range, num_ways: int, directory: Path, check_law: Law) -> None:
    total = Tally()
    for seed in seeds:
        rng = random.Random(seed)
        shape = random_shape(rng)
        write_synthetic_checkpoint(directory / f"m{seed}", shape, seed=seed)
        kind: Kind = "int4" if seed % 2 else "int8"
        kv_dtype: KVDtype = rng.choice(["fp32", "bf16", "int8"])
        loaded = Loaded.of(directory / f"m{seed}", kind, kv_dtype)
        tally = check_law(loaded, random_workload(rng, shape.vocab_size), rng, num_ways)
        total.num_rows += tally.num_rows
        total.num_preemptions += tally.num_preemptions
        total.num_hit_tokens += tally.num_hit_tokens
    assert total.num_preemptions > 0, "nothing was preempted: the pools are too large to prove anything"
    assert total.num_hit_tokens > 0, "no prefix was found: the prompts share too little"


@pytest.mark.slow
def test_rows_of_three_random_models_keep_their_bits_in_any_schedule(tmp_path, check_law) -> None:
    check_random_models(range(3), 8, tmp_path, check_law)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_rows_of_forty_random_models_keep_their_bits_in_any_schedule(tmp_path, check_law) -> None:
    check_random_models(range(100, 140), 8, tmp_path, check_law)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_rows_of_contexts_longer_than_one_split_keep_their_bits(tmp_path, check_law, tiny_shape, kind) -> None:
    """Keys are split at every 512 positions; decodes share splits among threads, prefills do not."""
    rng = random.Random(5)
    shape = ModelShape(**{name: getattr(tiny_shape, name) for name in tiny_shape.__slots__} | {"max_model_len": 2048})
    write_synthetic_checkpoint(tmp_path / "long", shape, seed=5)
    prompts = [[rng.randrange(shape.vocab_size) for _ in range(length)] for length in (1100, 530, 40)]
    check_law(Loaded.of(tmp_path / "long", kind), Workload(prompts, [5, 5, 5]), rng, 4)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_rows_of_the_demo_model_keep_their_bits_in_any_schedule(check_law, kind) -> None:
    tokenizer = load_tokenizer(checkpoint_path())
    template = load_chat_template(checkpoint_path(), tokenizer)
    assert template is not None
    episodes = [held_out_episodes(skill, 1)[0] for skill in sorted(SKILLS)[:6]]
    prompts = [
        list(template.encode([ChatMessage(message["role"], message["content"]) for message in episode.prompt]))
        for episode in episodes
    ]
    tally = check_law(Loaded.of(checkpoint_path(), kind), Workload(prompts, [8] * 6), random.Random(1), 4)
    assert tally.num_rows >= 40


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_rows_have_the_same_bits_on_every_instruction_set(kind, drive, make_request) -> None:
    loaded = Loaded.of(checkpoint_path(), kind)
    prompt = list(range(300, 420))
    seen: list[Rows] = []
    for isa in native.Isa:
        with native.limited_to(isa):
            seen.append({})
            runner = loaded.runner(seen[-1], num_blocks=20, block_size=16)
            drive(runner, [make_request("r", prompt, max_tokens=6)], max_num_batched_tokens=200)
    for rows in seen[1:]:
        assert all(torch.equal(row, seen[0][key]) for key, row in rows.items())
        assert rows.keys() == seen[0].keys()
