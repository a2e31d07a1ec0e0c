"""Random lives of an engine in a tiny world: whatever comes in whatever order, the laws hold.

The world is small on purpose: six tokens, so that prefixes collide and texts end by themselves, and few
blocks, so that requests are preempted. The runner is KV-honest, so any block that was mixed up shows in an output.
"""

from __future__ import annotations

import msgspec
from hypothesis import event, given, settings
from hypothesis import strategies as st

from mixtral_serve.contract import SamplingParams
from mixtral_serve.engine.fakes import EOS_TOKEN_ID, FakeRunner, FakeScript, Fault, byte_vocabulary

VOCAB_SIZE = 6
TABLE = byte_vocabulary()


class Ask(msgspec.Struct, frozen=True):
    prompt: tuple[int, ...]
    max_tokens: int
    min_tokens: int
    seed: int | None
    stop: tuple[str, ...]
    lives_s: float | None


class Leave(msgspec.Struct, frozen=True):
    who: int


class Steps(msgspec.Struct, frozen=True):
    count: int


asks = st.builds(
    Ask,
    prompt=st.lists(st.integers(3, 5), min_size=1, max_size=14).map(tuple),
    max_tokens=st.integers(0, 10),
    min_tokens=st.integers(0, 2),
    seed=st.none() | st.integers(0, 2),
    stop=st.lists(st.text("\x00\x01\x02", min_size=1, max_size=3), max_size=2).map(tuple),
    lives_s=st.none() | st.floats(0.0, 0.3),
)
lives = st.lists(asks | asks | st.builds(Leave, st.integers(0, 20)) | st.builds(Steps, st.integers(1, 4)), max_size=30)
worlds = st.builds(
    FakeScript,
    num_blocks=st.integers(6, 14),
    block_size=st.integers(1, 4),
    max_num_seqs=st.integers(1, 4),
    max_num_batched_tokens=st.integers(4, 10),
    max_model_len=st.integers(10, 40),
    max_waiting=st.integers(2, 8),
    cache=st.booleans(),
    policy=st.sampled_from(["fcfs", "priority"]),
    faults=st.dictionaries(st.integers(1, 40), st.sampled_from([Fault.RAISE, Fault.NAN]), max_size=2),
)


def decode(token_ids: list[int]) -> str:
    return b"".join(TABLE[token_id] for token_id in token_ids if not TABLE.is_special(token_id)).decode()


def sampling_of(ask: Ask) -> SamplingParams:
    return SamplingParams(temperature=0.0) if ask.seed is None else SamplingParams(seed=ask.seed)


def reference_of(runner: FakeRunner, ask: Ask) -> list[int]:
    """The tokens of a request that lives alone, as far as ``max_tokens`` and end-of-sequence go."""
    tokens = runner.reference(ask.prompt, sampling_of(ask), ask.max_tokens)
    if EOS_TOKEN_ID in tokens and len(tokens) < max(1, ask.min_tokens):
        return []  # end-of-sequence did not count yet: what follows is checked by its length and text only
    return tokens


def check_outcome(driver, name: str, ask: Ask) -> None:
    last = driver.last(name)
    tokens = driver.tokens(name)
    reason = last.finish_reason
    event(f"ends by {last.refusal or reason}")
    assert len(tokens) <= ask.max_tokens, "I28"
    if last.refusal is None:
        assert last.num_output_tokens == len(tokens), "I27"
    reference = reference_of(driver.fake, ask)
    if reference:
        assert tokens == reference[: len(tokens)], "I25"
        if reason == "length" or (reason == "stop" and not ask.stop):
            assert tokens == reference
    said, text = decode(tokens), driver.text(name)
    assert said.startswith(text)
    if not ask.stop or reason == "length":
        assert text == said, "I28"
    if ask.min_tokens == 0:
        assert not any(stop in text for stop in ask.stop), "I28"


@settings(max_examples=300, deadline=None)
@given(world=worlds, life=lives)
def test_i24_i25_i26_i27_i28_i29_every_request_ends_once_with_the_output_it_would_have_alone(new_driver, world, life):
    driver = new_driver(world, runner=FakeRunner(world, vocab_size=VOCAB_SIZE))
    asked: dict[str, Ask] = {}
    for act in life:
        if isinstance(act, Ask):
            name = f"r{len(asked)}"
            asked[name] = act
            driver.submit(
                name,
                act.prompt,
                max_tokens=act.max_tokens,
                min_tokens=min(act.min_tokens, act.max_tokens),
                sampling=sampling_of(act),
                stop=act.stop,
                priority=len(act.prompt) % 3,
                report_progress=len(act.prompt) % 2 == 0,
                deadline_s=None if act.lives_s is None else driver.now + act.lives_s,
            )
        elif isinstance(act, Leave):
            driver.cancel(f"r{act.who}")
        else:
            for _ in range(act.count):
                driver.tick()
    driver.run()
    assert driver.deltas.keys() == asked.keys()
    for name, ask in asked.items():
        check_outcome(driver, name, ask)
