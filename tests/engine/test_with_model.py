"""The engine with a real model: scores and embeddings are Transformers' own, sampled text depends on nobody else.

Plain fp32 models are compared with ``MixtralForCausalLM``; the law of equal texts is played on the demo model with
int8 weights on the native kernels, where it is promised.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import MixtralForCausalLM

from mixtral_serve.contract import SamplingParams
from mixtral_serve.demo import checkpoint_path
from mixtral_serve.engine.fakes import FakeScript, byte_vocabulary
from mixtral_serve.kernels import native
from mixtral_serve.model.logit_processors import ALL_FORBIDDEN
from mixtral_serve.model.runner import MixtralRunner, Numerics, load_runner
from mixtral_serve.model.shape import ModelShape
from mixtral_serve.model.synthetic import write_synthetic_checkpoint
from scheduler.request import RequestKind

BLOCK_SIZE = 4
TINY = ModelShape(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=40,
    num_layers=2,
    num_query_heads=4,
    num_kv_heads=2,
    head_dim=10,
    num_experts=4,
    num_experts_per_token=2,
    max_model_len=256,
    rope_theta=10000.0,
)


@pytest.fixture(scope="module", autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["tiny", "demo"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "demo":
        return checkpoint_path()
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    write_synthetic_checkpoint(path, TINY, seed=3, weights="fp32")
    return path


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> MixtralForCausalLM:
    return MixtralForCausalLM.from_pretrained(
        checkpoint, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def runner_of(checkpoint: Path) -> Callable[[int], MixtralRunner]:
    """A runner in fp32 with so many blocks."""

    def make(num_blocks: int) -> MixtralRunner:
        return load_runner(
            checkpoint, Numerics(weights="fp32"), num_blocks=num_blocks, block_size=BLOCK_SIZE, num_threads=1
        )

    return make


def script_of(num_blocks: int, *, max_num_batched_tokens: int, max_num_seqs: int = 4) -> FakeScript:
    return FakeScript(
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=200,
    )


def prompts_of(count: int, vocab_size: int, longest: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[1, *(rng.randrange(3, vocab_size) for _ in range(rng.randint(3, longest)))] for _ in range(count)]


def assert_scores_equal(entries: Sequence, expected: torch.Tensor, targets: Sequence[int], num_top: int) -> None:
    """``entries`` against rows of Transformers' log-probabilities [positions, vocab]."""
    assert [entry.token_id for entry in entries] == list(targets)
    for entry, row in zip(entries, expected, strict=True):
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
        assert [logprob for _, logprob in entry.top] == pytest.approx(row.topk(num_top).values.tolist(), abs=1e-4)
        for token_id, logprob in entry.top:
            assert logprob == pytest.approx(float(row[token_id]), abs=1e-4)


@pytest.mark.parametrize("max_num_batched_tokens", [7, 512])
def test_scores_with_their_alternatives_are_transformers_log_softmax(
    new_driver, runner_of, reference, max_num_batched_tokens
):
    runner = runner_of(60)
    script = script_of(60, max_num_batched_tokens=max_num_batched_tokens)
    driver = new_driver(script, runner=runner, table=byte_vocabulary())
    prompts = prompts_of(3, runner.info.vocab_size, 30)
    asked = {
        "score": {"kind": RequestKind.SCORE, "max_tokens": 0, "sampling": SamplingParams(prompt_logprobs=20)},
        "only": {"max_tokens": 0, "sampling": SamplingParams(prompt_logprobs=5)},
        "both": {"max_tokens": 6, "sampling": SamplingParams(temperature=0.0, prompt_logprobs=3, logprobs=4)},
    }
    for (name, fields), prompt in zip(asked.items(), prompts, strict=True):
        driver.submit(name, prompt, ignore_eos=True, **fields)
    driver.run()
    for (name, fields), prompt in zip(asked.items(), prompts, strict=True):
        assert driver.end(name) == "length"
        known = prompt + driver.tokens(name)
        with torch.inference_mode():
            expected = torch.log_softmax(reference(torch.tensor([known])).logits[0], dim=-1)
        scored = [entry for delta in driver.deltas[name] for entry in delta.prompt_logprobs]
        num_top = fields["sampling"].prompt_logprobs
        assert_scores_equal(scored, expected[: len(prompt) - 1], prompt[1:], num_top)
        sampled = [entry for delta in driver.deltas[name] for entry in delta.logprobs]
        assert_scores_equal(sampled, expected[len(prompt) - 1 : -1], driver.tokens(name), 4)


def test_embeddings_are_the_mean_of_transformers_last_hidden_states(new_driver, runner_of, reference):
    """In chunks, and interrupted by preemptions."""
    runner = runner_of(22)
    driver = new_driver(script_of(22, max_num_batched_tokens=9, max_num_seqs=6), runner=runner, table=byte_vocabulary())
    vocab_size = runner.info.vocab_size
    for i, prompt in enumerate(prompts_of(4, vocab_size, 9, seed=2)):
        driver.submit(f"g{i}", prompt, max_tokens=24, ignore_eos=True)
    driver.tick()
    prompts = prompts_of(4, vocab_size, 40, seed=1)
    for i, prompt in enumerate(prompts):
        driver.submit(f"e{i}", prompt, kind=RequestKind.EMBED, max_tokens=0)
    driver.run()
    assert driver.last_tick.stats.num_preemptions > 0
    for i, prompt in enumerate(prompts):
        assert driver.end(f"e{i}") == "stop"
        with torch.inference_mode():
            states = reference.model(torch.tensor([prompt])).last_hidden_state[0]
        assert torch.allclose(torch.tensor(driver.last(f"e{i}").embedding), states.mean(dim=0), atol=1e-4)


def test_a_warmed_prompt_answers_as_a_cold_one(new_driver, runner_of):
    runner = runner_of(60)
    prompt = prompts_of(1, runner.info.vocab_size, 30, seed=5)[0]
    answers = []
    for warm in (False, True):
        driver = new_driver(script_of(60, max_num_batched_tokens=8), runner=runner, table=byte_vocabulary())
        if warm:
            driver.submit("warm", prompt, max_tokens=0)
            driver.run()
            assert (driver.end("warm"), driver.tokens("warm")) == ("length", [])
        driver.submit("r", prompt, max_tokens=8, ignore_eos=True)
        driver.run()
        assert driver.last("r").num_cached_tokens == (len(prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE * warm
        answers.append(driver.tokens("r"))
    assert answers[0] == answers[1]


def test_a_request_that_forbids_everything_ends_alone(new_driver, runner_of):
    runner = runner_of(60)
    prompt = prompts_of(1, runner.info.vocab_size, 30, seed=6)[0]
    answers = []
    for beside in ({}, {"bad": SamplingParams(allowed_token_ids=(5, 6), bad_words=((5,), (6,)))}):
        driver = new_driver(script_of(60, max_num_batched_tokens=64), runner=runner, table=byte_vocabulary())
        for name, sampling in {"good": SamplingParams(seed=4, presence_penalty=1.0), **beside}.items():
            driver.submit(name, prompt, max_tokens=9, ignore_eos=True, sampling=sampling)
        driver.run()
        answers.append((driver.tokens("good"), driver.end("good")))
    assert (driver.end("bad"), driver.last("bad").error) == ("error", ALL_FORBIDDEN)
    assert answers[0] == answers[1]


def test_no_stop_token_is_sampled_before_min_tokens(new_driver, runner_of):
    runner = runner_of(60)
    vocab_size = runner.info.vocab_size
    driver = new_driver(script_of(60, max_num_batched_tokens=64), runner=runner, table=byte_vocabulary())
    stops = tuple(range(3, vocab_size, 2))
    # Nearly every token ends the request, so it ends with the first token that may.
    eager = SamplingParams(temperature=1.0, logit_bias=tuple((token_id, 20.0) for token_id in stops))
    for min_tokens in (0, 1, 5):
        for i, prompt in enumerate(prompts_of(3, vocab_size, 12, seed=8)):
            key = f"{min_tokens}-{i}"
            driver.submit(key, prompt, max_tokens=12, min_tokens=min_tokens, stop_token_ids=stops, sampling=eager)
            driver.run()
            assert (len(driver.tokens(key)), driver.end(key)) == (min_tokens + 1, "stop")
            assert not set(driver.tokens(key)[:-1]) & {*stops, *runner.info.eos_token_ids}


def random_params(rng: random.Random, vocab_size: int) -> SamplingParams:
    """Everything that changes logits, at random."""
    return SamplingParams(
        temperature=rng.choice([0.0, 0.7, 1.3]),
        top_p=rng.choice([1.0, 0.9]),
        top_k=rng.choice([0, 20]),
        min_p=rng.choice([0.0, 0.02]),
        seed=rng.getrandbits(64),
        choice=rng.randrange(3),
        logprobs=rng.choice([None, 3]),
        presence_penalty=rng.choice([0.0, 1.1]),
        frequency_penalty=rng.choice([0.0, 0.7]),
        repetition_penalty=rng.choice([1.0, 1.3]),
        logit_bias=tuple((rng.randrange(vocab_size), rng.uniform(-5, 5)) for _ in range(rng.choice([0, 40]))),
        bad_words=tuple((rng.randrange(vocab_size),) for _ in range(rng.choice([0, 5]))),
    )


Said = tuple[list[int], list[tuple], str]
"""Tokens, log-probabilities and the reason of the end."""


@dataclass
class Play:
    """What the asked requests said, and what they met."""

    said: dict[str, Said]
    num_preemptions: int
    num_hit_tokens: int


def play(new_driver, runner: MixtralRunner, rng: random.Random, asked: dict[str, dict], num_others: int) -> Play:
    """Run the ``asked`` requests among ``num_others`` random ones."""
    script = script_of(
        runner.info.num_blocks, max_num_batched_tokens=rng.choice([8, 16, 64]), max_num_seqs=rng.randint(4, 8)
    )
    driver = new_driver(script, runner=runner, table=byte_vocabulary())
    coming: list[tuple[str, dict]] = list(asked.items())
    for i, prompt in enumerate(prompts_of(num_others, runner.info.vocab_size, 30, seed=rng.getrandbits(32))):
        params = random_params(rng, runner.info.vocab_size)
        begins_alike = rng.choice([[], next(iter(asked.values()))["prompt"]])
        fields = {
            "prompt": begins_alike + prompt,
            "max_tokens": rng.randint(0, 40),
            "sampling": params,
            "ignore_eos": True,
        }
        coming.append((f"other{i}", fields))
    rng.shuffle(coming)
    for name, fields in coming:
        driver.submit(name, **fields)
        for _ in range(rng.choice([0, 0, 0, 3])):
            driver.tick()
        if rng.random() < 0.1:
            driver.cancel(f"other{rng.randrange(max(1, num_others))}")
    driver.run()
    said = {
        name: (driver.tokens(name), [d.logprobs for d in driver.deltas[name] if d.logprobs], driver.end(name))
        for name in asked
    }
    stats = driver.last_tick.stats
    return Play(said, stats.num_preemptions, stats.num_prefix_hit_tokens)


def check_equal_texts(new_driver, *, num_asked: int, num_loads: int) -> None:
    rng = random.Random(7)
    runner = load_runner(checkpoint_path(), Numerics(weights="int8"), num_blocks=28, block_size=4, num_threads=1)
    asked = {
        f"r{i}": {
            "prompt": prompt,
            "max_tokens": 24,
            "ignore_eos": True,
            "sampling": random_params(rng, runner.info.vocab_size),
        }
        for i, prompt in enumerate(prompts_of(num_asked, runner.info.vocab_size, 30, seed=11))
    }
    alone: dict[str, Said] = {}
    for name, fields in asked.items():
        alone |= play(new_driver, runner, rng, {name: fields}, 0).said
    assert {end for _, _, end in alone.values()} <= {"stop", "length"}
    loads = [play(new_driver, runner, rng, asked, rng.randint(5, 15)) for _ in range(num_loads)]
    for load in loads:
        assert load.said == alone
    assert sum(load.num_preemptions for load in loads) > 0, "a load that preempts nobody proves little"
    assert sum(load.num_hit_tokens for load in loads) > 0


@pytest.mark.skipif(not native.is_available(), reason="the compiled kernels are not installed")
def test_sampled_text_is_a_function_of_prompt_parameters_seed_and_choice(new_driver):
    check_equal_texts(new_driver, num_asked=4, num_loads=2)


@pytest.mark.slow
@pytest.mark.skipif(not native.is_available(), reason="the compiled kernels are not installed")
def test_sampled_text_keeps_its_bytes_under_much_random_load(new_driver):
    check_equal_texts(new_driver, num_asked=12, num_loads=20)
