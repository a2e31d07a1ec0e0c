"""The runner answers a plan: tokens, scores and embeddings equal plain Transformers, and a bad request fails alone."""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import MixtralForCausalLM

from mixtral_serve.contract import RunBatch, Runner, SamplingParams
from mixtral_serve.model.logit_processors import SampleRow
from mixtral_serve.model.runner import MixtralRunner
from mixtral_serve.model.sampler import NON_FINITE, prepare, sample
from mixtral_serve.model.synthetic import write_synthetic_checkpoint
from scheduler.lifecycle import FinishReason
from scheduler.plan import ScheduledSlice, SliceResult, StepPlan, StepResult
from scheduler.request import BlockId, RequestId, RequestKind

GREEDY = SamplingParams(temperature=0)


@pytest.fixture(scope="module")
def transformers_model(tiny_checkpoint) -> MixtralForCausalLM:
    return MixtralForCausalLM.from_pretrained(
        tiny_checkpoint, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    ).eval()


def random_tokens(num: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(97) for _ in range(num)]


def make_slice(
    name: str, tokens: Sequence[int], span: tuple[int, int], table: Sequence[int], **fields: object
) -> ScheduledSlice:
    """The tokens ``span`` of a request whose known tokens are ``tokens``; samples if it reaches their end."""
    start, end = span
    known: dict[str, Any] = {
        "num_logits": int(end == len(tokens)),
        "samples": end == len(tokens),
        "num_output_tokens": 0,
    }
    blocks = [BlockId(block) for block in table]
    return ScheduledSlice(RequestId(name), start, end - start, array("i", tokens), blocks, **known | fields)


def run(runner: Runner, *slices: ScheduledSlice, params: SamplingParams = GREEDY) -> tuple[SliceResult, ...]:
    plan = StepPlan(0, slices, ())
    return runner.run(RunBatch(plan, (params,) * len(slices))).results


def test_an_empty_plan_has_an_empty_result(make_runner) -> None:
    assert make_runner().run(RunBatch(StepPlan(0, (), ()), ())) == StepResult(())


def test_info_tells_what_was_loaded(make_runner, tiny_shape) -> None:
    runner = make_runner(num_blocks=20, block_size=8)
    info = runner.info
    assert (info.name, info.vocab_size, info.max_model_len) == ("tiny", 97, 256)
    assert (info.num_blocks, info.block_size, info.eos_token_ids) == (20, 8, (2,))
    assert info.weights_bytes == tiny_shape.weights_bytes("fp32")
    assert info.kv_cache_bytes == runner.cache.num_bytes == 20 * 8 * 2 * 2 * 2 * 10 * 4
    assert info.fingerprint.startswith("tiny-fp32-kvfp32-torch")
    assert info.fingerprint.endswith("-batchvariant")
    assert "bf16" in make_runner(weights="bf16").info.fingerprint


def test_slices_may_come_in_any_order_and_mix(make_runner, transformers_model) -> None:
    """Five requests at different stages in one plan, in several orders: results stand in the plan's order."""
    runner = make_runner(num_blocks=64)
    prompts = [random_tokens(num, seed) for seed, num in enumerate((9, 1, 17, 30, 5))]
    tables = [list(range(1 + 9 * i, 10 + 9 * i)) for i in range(5)]
    with torch.inference_mode():
        wanted = [int(transformers_model(torch.tensor([p])).logits[0, -1].argmax()) for p in prompts]
    computed = [8, 0, 4, 29, 0]
    before = [
        make_slice(f"r{i}", prompts[i], (0, num), tables[i], num_logits=0, samples=False)
        for i, num in enumerate(computed)
        if num
    ]
    rng = random.Random(1)
    for _ in range(6):
        order = rng.sample(range(5), 5)
        assert all(result.token_id is None for result in run(runner, *rng.sample(before, len(before))))
        step = [make_slice(f"r{i}", prompts[i], (computed[i], len(prompts[i])), tables[i]) for i in order]
        results = run(runner, *step)
        assert [r.request_id for r in results] == [f"r{i}" for i in order]
        assert [r.token_id for r in results] == [wanted[i] for i in order]


def test_a_stored_prefix_gives_the_same_result_as_computing_it(make_runner) -> None:
    seen: list[torch.Tensor] = []
    runner = make_runner(logits_listener=lambda _, logits: seen.append(logits.clone()))
    prompt = random_tokens(22)
    run(runner, make_slice("first", prompt, (0, 22), [4, 8, 15, 16, 23, 42]))
    # Another request found the first five blocks in the cache and computes only the rest, into a block of its own.
    run(runner, make_slice("second", prompt, (20, 22), [4, 8, 15, 16, 23, 50]))
    run(runner, make_slice("third", prompt, (20, 21), [4, 8, 15, 16, 23, 51], num_logits=0, samples=False))
    run(runner, make_slice("third", prompt, (21, 22), [4, 8, 15, 16, 23, 51]))
    assert torch.allclose(seen[1], seen[0], atol=1e-4)
    assert torch.allclose(seen[2], seen[0], atol=1e-4)


def test_row40_stale_nan_in_reused_blocks_reaches_nobody(make_runner, make_request, drive) -> None:
    requests = [make_request(f"r{i}", random_tokens(5 + 4 * i, i), max_tokens=9) for i in range(4)]
    clean = drive(make_runner(num_blocks=40), requests, max_prefill_chunk=5)
    runner = make_runner(num_blocks=40)
    runner.cache.keys.fill_(math.nan)  # every block, the null block included
    runner.cache.values.fill_(math.nan)
    poisoned = drive(runner, requests, max_prefill_chunk=5)
    assert poisoned.tokens == clean.tokens
    assert {event.reason for event in poisoned.finished.values()} == {FinishReason.LENGTH}


def test_row40_a_request_whose_keys_are_nan_fails_alone(make_runner) -> None:
    runner = make_runner()
    prompts = [random_tokens(7, seed) for seed in range(3)]
    tables = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    for i in range(3):
        run(runner, make_slice(f"r{i}", prompts[i], (0, 6), tables[i], num_logits=0, samples=False))
    step = [make_slice(f"r{i}", prompts[i], (6, 7), tables[i]) for i in range(3)]
    healthy = run(runner, *step)
    runner.cache.values[:, 4, 2] = math.nan
    results = run(runner, *step)
    assert results[1] == SliceResult(RequestId("r1"), finish=FinishReason.ERROR, error=NON_FINITE)
    assert (results[0], results[2]) == (healthy[0], healthy[2])


class PoisoningRunner:
    """Runs the real one and, after each step, ruins the keys of one request."""

    def __init__(self, inner: MixtralRunner, victim: str) -> None:
        self._inner = inner
        self._victim = victim
        self.info = inner.info

    def run(self, batch: RunBatch) -> StepResult:
        result = self._inner.run(batch)
        for part in batch.plan.slices:
            if part.request_id == self._victim:
                self._inner.cache.keys[:, list(part.block_table)] = math.nan
        return result


def test_row40_the_blocks_of_a_failed_request_serve_others_after_it(make_runner, make_request, drive) -> None:
    requests = [make_request(f"r{i}", random_tokens(9, i), max_tokens=12) for i in range(8)]
    world = {"arrivals": [0, 0, 0, 4, 5, 6, 7, 8], "max_num_seqs": 3, "max_prefill_chunk": 4}
    clean = drive(make_runner(num_blocks=20), requests, **world)
    driven = drive(PoisoningRunner(make_runner(num_blocks=20), "r1"), requests, **world)
    assert driven.finished["r1"].reason is FinishReason.ERROR
    assert driven.finished["r1"].error == NON_FINITE
    survivors = {f"r{i}" for i in range(8)} - {"r1"}
    assert {name: driven.tokens[name] for name in survivors} == {name: clean.tokens[name] for name in survivors}


def test_row40_scores_and_embeddings_of_nan_are_errors_too(make_runner) -> None:
    runner = make_runner()
    prompt = random_tokens(8)
    run(runner, make_slice("r", prompt, (0, 4), [1, 2], num_logits=0, samples=False))
    runner.cache.values[:, 1] = math.nan
    scored = make_slice("r", prompt, (4, 8), [1, 2], num_logits=4, samples=False)
    pooled = make_slice("e", prompt, (0, 4), [3, 4], num_logits=0, samples=False, pools=True)
    partial = run(runner, pooled)[0].embedding
    poisoned = make_slice("e", prompt, (4, 8), [1, 2], num_logits=0, samples=False, pools=True, embedding=partial)
    score, embedding = run(runner, scored, poisoned)
    assert (score.finish, score.prompt_logprobs) == (FinishReason.ERROR, ())
    assert (embedding.finish, embedding.embedding) == (FinishReason.ERROR, None)


@pytest.mark.parametrize("chunk", [None, 1, 3, 7])
def test_prompt_scores_equal_transformers_under_any_chunking(
    make_runner, make_request, drive, transformers_model, chunk
) -> None:
    prompts = {"score": random_tokens(23, 1), "both": random_tokens(14, 2), "short": random_tokens(1, 3)}
    requests = [
        make_request("score", prompts["score"], kind=RequestKind.SCORE),
        make_request("both", prompts["both"], max_tokens=5, prompt_logprobs=True),
        make_request("short", prompts["short"], kind=RequestKind.SCORE),
        make_request("plain", random_tokens(20, 4), max_tokens=6),
    ]
    sampling = {"score": SamplingParams(prompt_logprobs=0), "both": replace(GREEDY, prompt_logprobs=3, logprobs=2)}
    driven = drive(make_runner(num_blocks=24), requests, sampling=sampling, max_prefill_chunk=chunk)
    assert "short" not in driven.prompt_logprobs
    for name, num_top in (("score", 0), ("both", 3)):
        tokens = prompts[name] + driven.tokens.get(name, [])
        with torch.inference_mode():
            expected = torch.log_softmax(transformers_model(torch.tensor([tokens])).logits[0], dim=-1)
        entries = driven.prompt_logprobs[name]
        assert [entry.token_id for entry in entries] == prompts[name][1:]
        for position, entry in enumerate(entries):
            assert entry.logprob == pytest.approx(float(expected[position, entry.token_id]), abs=1e-4)
            best = expected[position].topk(num_top) if num_top else None
            assert [i for i, _ in entry.top] == (best.indices.tolist() if best else [])
        for index, sampled in enumerate(driven.logprobs.get(name, ())):
            row = expected[len(prompts[name]) - 1 + index]
            assert sampled.logprob == pytest.approx(float(row[sampled.token_id]), abs=1e-4)
            assert sampled.token_id == int(row.argmax())
            assert len(sampled.top) == 2
    assert driven.finished["score"].reason is FinishReason.LENGTH


def test_output_tokens_that_are_computed_again_are_not_scored(make_runner) -> None:
    """A preempted request computes prompt and output in one slice; only prompt tokens get an entry."""
    prompt, output = random_tokens(10), [5, 6, 7]
    fields = {"num_logits": 13, "samples": True, "num_output_tokens": 3}
    result = run(make_runner(), make_slice("r", prompt + output, (0, 13), [1, 2, 3, 4], **fields))[0]
    assert [entry.token_id for entry in result.prompt_logprobs] == prompt[1:]
    assert result.token_id is not None


def test_a_long_vocabulary_is_scored_in_pieces(make_runner, make_request, drive, tiny_shape, tmp_path) -> None:
    """Eight million logits are computed at once: here 40 rows of them, so that a prompt of 100 takes three pieces."""
    shape = replace(tiny_shape, vocab_size=200_000, hidden_size=8, num_layers=1, num_query_heads=2, num_kv_heads=1)
    write_synthetic_checkpoint(tmp_path / "wide", shape)
    prompt = random_tokens(100, 5)
    entries = []
    for chunk in (None, 13):
        runner = make_runner(tmp_path / "wide", num_blocks=40)
        driven = drive(
            runner,
            [make_request("r", prompt, kind=RequestKind.SCORE)],
            max_num_batched_tokens=128,
            max_prefill_chunk=chunk,
        )
        entries.append(driven.prompt_logprobs["r"])
    assert [e.token_id for e in entries[0]] == prompt[1:]
    assert [e.logprob for e in entries[0]] == pytest.approx([e.logprob for e in entries[1]], abs=1e-4)


@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_embeddings_equal_transformers_under_chunking_and_preemption(
    make_runner, make_request, drive, transformers_model, chunk
) -> None:
    prompts = {f"e{i}": random_tokens(5 + 9 * i, i) for i in range(4)}
    requests = [make_request(name, prompt, kind=RequestKind.EMBED) for name, prompt in prompts.items()]
    requests += [make_request(f"g{i}", random_tokens(8, 9 + i), max_tokens=20) for i in range(3)]
    driven = drive(make_runner(num_blocks=18), requests, max_num_batched_tokens=24, max_prefill_chunk=chunk)
    for name, prompt in prompts.items():
        with torch.inference_mode():
            states = transformers_model.model(torch.tensor([prompt])).last_hidden_state[0]
        embedding = driven.finished[name].embedding
        assert isinstance(embedding, tuple)
        assert torch.allclose(torch.tensor(embedding), states.mean(dim=0), atol=1e-5)


def test_sampled_output_does_not_depend_on_chunks_batch_mates_or_preemption(make_runner, make_request, drive) -> None:
    requests = [make_request(f"r{i}", random_tokens(11, 7), max_tokens=12) for i in range(4)]
    sampling = {f"r{i}": SamplingParams(temperature=0.8, top_p=0.9, seed=42, choice=i) for i in range(4)}
    worlds = [
        {"max_num_seqs": 1},
        {"max_num_seqs": 4, "max_prefill_chunk": 2},
        {"max_num_seqs": 4, "max_num_batched_tokens": 7},
    ]
    runs = [
        drive(make_runner(num_blocks=num_blocks), requests, sampling=sampling, **world)
        for world, num_blocks in zip(worlds, (64, 64, 14), strict=True)
    ]
    assert runs[2].num_preemptions > 0
    assert runs[0].tokens == runs[1].tokens == runs[2].tokens
    assert len({tuple(tokens) for tokens in runs[0].tokens.values()}) == 4


def test_each_output_position_has_a_random_number_of_its_own(make_runner) -> None:
    logits: list[torch.Tensor] = []
    runner = make_runner(logits_listener=lambda _, rows: logits.append(rows.clone()))
    params = SamplingParams(temperature=2.0, seed=3)
    prompt = random_tokens(5)
    drawn = []
    for position in range(20):
        part = make_slice("r", prompt, (0, 5), [1, 2], num_output_tokens=position)
        drawn.append(run(runner, part, params=params)[0].token_id)
    assert drawn == [sample(logits[0], prepare([SampleRow(params, position)]))[0].token_id for position in range(20)]
    assert len(set(drawn)) > 3


class OnlyEven:
    def bits(self) -> memoryview:
        return memoryview(b"\x55" * 16)


def test_masks_reach_the_slices_they_belong_to(make_runner) -> None:
    runner = make_runner()
    slices = [make_slice(f"r{i}", random_tokens(4, i), (0, 4), [1 + i]) for i in range(8)]
    masks = tuple(OnlyEven() if i % 2 else None for i in range(8))
    batch = RunBatch(StepPlan(0, tuple(slices), ()), (GREEDY,) * 8, masks)
    free = run(runner, *slices)
    masked = runner.run(batch).results
    assert all(r.token_id % 2 == 0 for r in masked[1::2])
    assert masked[0::2] == free[0::2]
    assert any(r.token_id % 2 for r in free[1::2])


def test_bf16_runs_and_stays_near_fp32(make_runner, make_request, drive) -> None:
    logits: dict[str, torch.Tensor] = {}
    prompt = random_tokens(30, 3)
    for weights in ("fp32", "bf16"):

        def listen(_: Sequence[ScheduledSlice], rows: torch.Tensor, name: str = weights) -> None:
            logits.setdefault(name, rows[0].clone())

        runner = make_runner(weights=weights, logits_listener=listen)
        driven = drive(runner, [make_request("r", prompt, max_tokens=8)], max_prefill_chunk=9)
        assert len(driven.tokens["r"]) == 8
    assert logits["bf16"].dtype == torch.float32
    assert torch.cosine_similarity(logits["fp32"], logits["bf16"], dim=0) > 0.98


@pytest.mark.parametrize("window", [1, 3, 8])
def test_a_sliding_window_is_transformers_window(
    make_runner, make_request, drive, tiny_shape, tmp_path, window
) -> None:
    path = tmp_path / "windowed"
    write_synthetic_checkpoint(path, replace(tiny_shape, sliding_window=window), seed=2, weights="fp32")
    reference = MixtralForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32).eval()
    prompt = random_tokens(25, 6)
    driven = drive(make_runner(path), [make_request("r", prompt, max_tokens=15)], max_prefill_chunk=6)
    tokens = torch.tensor([prompt + driven.tokens["r"]])
    with torch.inference_mode():
        wanted = reference(tokens, use_cache=False).logits[0].argmax(dim=-1).tolist()
    assert driven.tokens["r"] == wanted[24:-1]


def test_what_follows_a_slices_tokens_in_a_shared_array_is_not_read(make_runner) -> None:
    runner = make_runner()
    prompt = random_tokens(6)
    exact = run(runner, make_slice("r", prompt, (0, 6), [1, 2]))[0]
    longer = make_slice("r", [*prompt, 5, 6, 7], (0, 6), [1, 2, 3, 60], num_logits=1, samples=True)
    assert run(runner, longer)[0].token_id == exact.token_id
