"""A fake model for tests of everything above the runner, and a fake engine process around it.

Owns: ``FakeScript`` (what the fake is to do, as data), ``FakeRunner`` (a ``Runner`` without a tensor),
``fake_parts`` (the runner with its scheduler and vocabulary) and ``python -m mixtral_serve.engine.fakes --fd N
--script JSON``, an engine process that ``EngineClient`` can launch.

The runner is *KV-honest*: a KV slot stores the token id that was written to it, and the next token is a hash of the
tokens gathered back **through the block table**. So an aliased block, a wrong slot, a stale cache hit or a
lost block changes the output, and ``FakeRunner.reference`` (which never saw a block) is the oracle for all of
them. A scripted output keeps its words but is checked against the same gathered tokens.

Its vocabulary: id 0 ``<unk>``, 1 ``<s>``, 2 ``</s>`` (special; 2 ends a text), then the 256 bytes from id 3 on:
token ``3 + b`` is byte ``b``, so that every character beyond ASCII spans several tokens.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import socket
import struct
import sys
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Final

import msgspec

from mixtral_serve.contract import ModelInfo, RunBatch, SamplingParams, TokenMask
from mixtral_serve.engine.errors import EngineStartError
from mixtral_serve.engine.memory import MemoryWatch, Watermarks, limit_data
from mixtral_serve.engine.process import EngineParts, run_engine
from mixtral_serve.machine import process_memory
from mixtral_serve.text.detokenizer import TokenBytes
from mixtral_serve.text.tokenizer import load_tokenizer
from scheduler.accountant import MemoryAccountant
from scheduler.config import SchedulerConfig
from scheduler.events import TokenLogprob
from scheduler.lifecycle import FinishReason
from scheduler.plan import ScheduledSlice, SliceResult, StepResult
from scheduler.policies import POLICIES
from scheduler.request import TOKEN_TYPECODE
from scheduler.scheduler import Scheduler

BOS_TOKEN_ID: Final = 1
EOS_TOKEN_ID: Final = 2
FIRST_BYTE_TOKEN_ID: Final = 3
FAKE_VOCAB_SIZE: Final = FIRST_BYTE_TOKEN_ID + 256
_EMBEDDING_SIZE: Final = 8


class Fault(Enum):
    """What can go wrong on purpose."""

    RAISE = "raise"
    """The step raises."""
    NAN = "nan"
    """The request fails as with non-finite logits; the step goes on. In a step's fault: all its requests."""
    EXIT = "exit"
    """The process ends on the spot with ``exit_code``."""
    HANG = "hang"
    """The step does not come back."""
    ALLOCATE = "allocate"
    """The step asks for ``allocate_bytes`` of memory and fails if it does not get them."""


class FakeScript(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a fake engine is and does. Read from JSON by the fake engine process."""

    num_blocks: int = 256
    block_size: int = 16
    max_model_len: int = 4096
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_waiting: int = 4096
    requests_budget_bytes: int | None = None
    """What the accountant allows for the structures of live requests; None: no limit."""
    policy: str = "fcfs"
    cache: bool = True
    tokenizer: str | None = None
    """Directory of a checkpoint whose tokenizer is used; None: the byte vocabulary."""

    output: str | None = None
    """What every request says, then end-of-sequence; None: tokens hashed from the prompt."""
    output_ids: tuple[int, ...] | None = None
    """The same as token ids."""
    echo: bool = False
    """Every request says its prompt again, less the first token, then end-of-sequence."""
    never_ends: bool = False
    """Hashed tokens are never end-of-sequence."""

    step_s: float = 0.0
    """Model time of a step."""
    token_s: float = 0.0
    """Model time of each token of a step, on top."""
    load_s: float = 0.0
    load_error: str | None = None
    """The engine says that it cannot start, and why."""
    load_crash: bool = False
    """Loading raises what nobody foresaw."""
    faults: dict[int, Fault] = {}
    """By step, counted from 1 in each process."""
    poison: dict[int, Fault] = {}
    """By token id: what a request with this token in its prompt causes in the step that has all of its prompt."""
    exit_code: int = 3
    allocate_bytes: int = 1 << 30
    data_headroom_bytes: int | None = None
    """How much private writable memory the process may take beyond what it has when it is built; None: no limit."""
    high_water_bytes: int | None = None
    """From so much memory on the process is under pressure; None: nobody watches."""


def _wait_for_ever() -> None:
    threading.Event().wait()


class FakeRunner:
    """A ``Runner`` whose tokens are a function of the tokens in its KV slots."""

    def __init__(
        self,
        script: FakeScript = FakeScript(),  # noqa: B008 - frozen
        *,
        vocab_size: int = FAKE_VOCAB_SIZE,
        output_ids: Sequence[int] | None = None,
        hang: Callable[[], None] = _wait_for_ever,
    ) -> None:
        """``output_ids`` stands for ``script.output`` under another vocabulary; ``hang`` is what hangs a step."""
        self.script = script
        self.num_steps = 0
        self._hang = hang
        self._output_ids = _script_ids(script) if output_ids is None else tuple(output_ids)
        self._slots = array(TOKEN_TYPECODE, bytes(4 * script.num_blocks * script.block_size))
        self._info = ModelInfo(
            name="fake",
            fingerprint="fp_fake",
            vocab_size=vocab_size,
            max_model_len=script.max_model_len,
            eos_token_ids=(EOS_TOKEN_ID,),
            num_blocks=script.num_blocks,
            block_size=script.block_size,
            weights_bytes=0,
            kv_cache_bytes=4 * len(self._slots),
            hidden_size=_EMBEDDING_SIZE,
        )

    @property
    def info(self) -> ModelInfo:
        return self._info

    def run(self, batch: RunBatch) -> StepResult:
        """Write the slices' tokens to their slots, read them back, and make up what follows."""
        self.num_steps += 1
        script = self.script
        duration_s = script.step_s + script.token_s * batch.plan.num_tokens
        if duration_s > 0:
            time.sleep(duration_s)
        step_fault = script.faults.get(self.num_steps)
        self._commit(step_fault)
        results = []
        masks = batch.masks or (None,) * len(batch.plan.slices)
        for (scheduled, sampling), mask in zip(batch.rows(), masks, strict=True):
            self._write(scheduled)
            fault = Fault.NAN if step_fault is Fault.NAN else self._poison(scheduled)
            if fault is Fault.NAN:
                results.append(_error(scheduled, "non-finite logits"))
                continue
            self._commit(fault)
            results.append(self._masked(self._compute(scheduled, sampling), mask))
        return StepResult(tuple(results))

    def reference(self, prompt: Sequence[int], sampling: SamplingParams, max_tokens: int) -> list[int]:
        """What a request must come to, whatever its batch-mates, chunks, blocks and preemptions."""
        tokens = array(TOKEN_TYPECODE, prompt)
        output: list[int] = []
        while len(output) < max_tokens:
            token_id = self._next_token(tokens, len(prompt), sampling)
            output.append(token_id)
            tokens.append(token_id)
            if token_id == EOS_TOKEN_ID:
                break
        return output

    def _compute(self, scheduled: ScheduledSlice, sampling: SamplingParams) -> SliceResult:
        seen = self._gather(scheduled)
        num_prompt_tokens = len(scheduled.tokens) - scheduled.num_output_tokens
        if self._output_ids is not None or self.script.echo:
            expected = array(TOKEN_TYPECODE, scheduled.tokens[: len(seen)])
            if seen != expected:
                return _error(scheduled, "the KV cache does not hold the request's tokens")
        token_id = self._next_token(seen, num_prompt_tokens, sampling) if scheduled.samples else None
        wants_logprob = token_id is not None and sampling.logprobs is not None
        return SliceResult(
            scheduled.request_id,
            token_id=token_id,
            logprob=self._logprob(token_id, sampling.logprobs or 0) if wants_logprob and token_id is not None else None,
            prompt_logprobs=self._prompt_logprobs(scheduled, num_prompt_tokens, sampling.prompt_logprobs or 0),
            embedding=_embedding(scheduled) if scheduled.pools else None,
        )

    def _masked(self, result: SliceResult, mask: TokenMask | None) -> SliceResult:
        """The same with a token that is allowed, chosen by its own, where ``mask`` forbids its own."""
        if mask is None or result.token_id is None:
            return result
        try:
            bits = int.from_bytes(mask.bits(), "little")
        except Exception as error:  # noqa: BLE001 - as a real runner: it ends this row only
            return SliceResult(result.request_id, finish=FinishReason.ERROR, error=f"the token mask failed: {error}")
        if bits >> result.token_id & 1:
            return result
        allowed = [token_id for token_id in range(self._info.vocab_size) if bits >> token_id & 1]
        return result._replace(token_id=allowed[result.token_id % len(allowed)])

    def _next_token(self, tokens: array[int], num_prompt_tokens: int, sampling: SamplingParams) -> int:
        position = len(tokens) - num_prompt_tokens
        if self.script.echo:
            said = tokens[1:num_prompt_tokens]
            return said[position] if position < len(said) else EOS_TOKEN_ID
        if self._output_ids is not None:
            return self._output_ids[position] if position < len(self._output_ids) else EOS_TOKEN_ID
        digest = hashlib.blake2b(tokens.tobytes(), digest_size=8)
        if sampling.temperature > 0:
            digest.update(struct.pack("<QIi", sampling.seed & (2**64 - 1), sampling.choice, position))
        token_id = int.from_bytes(digest.digest(), "little") % self._info.vocab_size
        return FIRST_BYTE_TOKEN_ID if token_id == EOS_TOKEN_ID and self.script.never_ends else token_id

    def _logprob(self, token_id: int, num_top: int) -> TokenLogprob:
        top = tuple(((token_id + i) % self._info.vocab_size, -0.5 * (i + 1)) for i in range(num_top))
        return TokenLogprob(token_id, -0.5, top)

    def _prompt_logprobs(
        self, scheduled: ScheduledSlice, num_prompt_tokens: int, num_top: int
    ) -> tuple[TokenLogprob, ...]:
        if scheduled.num_logits < scheduled.num_tokens or scheduled.num_output_tokens:
            return ()
        first = scheduled.start + 1
        end = min(scheduled.start + scheduled.num_tokens + 1, num_prompt_tokens)
        return tuple(self._logprob(scheduled.tokens[position], num_top) for position in range(first, end))

    def _write(self, scheduled: ScheduledSlice) -> None:
        size = self.script.block_size
        for position in range(scheduled.start, scheduled.start + scheduled.num_tokens):
            slot = scheduled.block_table[position // size] * size + position % size
            self._slots[slot] = scheduled.tokens[position]

    def _gather(self, scheduled: ScheduledSlice) -> array[int]:
        size = self.script.block_size
        end = scheduled.start + scheduled.num_tokens
        gathered: array[int] = array(TOKEN_TYPECODE)
        for block_id in scheduled.block_table[: -(-end // size)]:
            gathered += self._slots[block_id * size : (block_id + 1) * size]
        return gathered[:end]

    def _poison(self, scheduled: ScheduledSlice) -> Fault | None:
        is_part = scheduled.start + scheduled.num_tokens < len(scheduled.tokens)
        if not self.script.poison or is_part:
            return None
        num_prompt_tokens = len(scheduled.tokens) - scheduled.num_output_tokens
        for token_id in scheduled.tokens[:num_prompt_tokens]:
            if token_id in self.script.poison:
                return self.script.poison[token_id]
        return None

    def _commit(self, fault: Fault | None) -> None:
        if fault is Fault.RAISE:
            raise RuntimeError("the fake step failed, as it was told to")
        if fault is Fault.EXIT:
            os._exit(self.script.exit_code)
        if fault is Fault.HANG:
            self._hang()
        if fault is Fault.ALLOCATE:
            bytearray(self.script.allocate_bytes)


def byte_vocabulary() -> TokenBytes:
    """The fake vocabulary: three special tokens and the bytes."""
    pieces = {0: b"<unk>", BOS_TOKEN_ID: b"<s>", EOS_TOKEN_ID: b"</s>"}
    pieces |= {FIRST_BYTE_TOKEN_ID + byte: bytes([byte]) for byte in range(256)}
    return TokenBytes(pieces, special_ids=(0, BOS_TOKEN_ID, EOS_TOKEN_ID))


def byte_ids(text: str) -> tuple[int, ...]:
    """Ids of ``text`` in the fake vocabulary: one per UTF-8 byte."""
    return tuple(FIRST_BYTE_TOKEN_ID + byte for byte in text.encode())


def fake_parts(script: FakeScript) -> EngineParts:
    """A fake runner with a real scheduler, as an engine is built of.

    Raises:
        EngineStartError: the script says so.
    """
    if script.load_s:
        time.sleep(script.load_s)
    if script.load_error is not None:
        raise EngineStartError(script.load_error)
    if script.load_crash:
        raise RuntimeError("loading crashed, as it was told to")
    config = SchedulerConfig(
        num_blocks=script.num_blocks,
        block_size=script.block_size,
        max_num_seqs=script.max_num_seqs,
        max_num_batched_tokens=script.max_num_batched_tokens,
        max_model_len=script.max_model_len,
        max_waiting=script.max_waiting,
        enable_prefix_caching=script.cache,
    )
    budget_bytes = script.requests_budget_bytes
    accountant = None if budget_bytes is None else MemoryAccountant(budget_bytes)
    scheduler = Scheduler(config, POLICIES[script.policy](), accountant=accountant)
    if script.tokenizer is None:
        return EngineParts(FakeRunner(script), scheduler, byte_vocabulary())
    tokenizer = load_tokenizer(Path(script.tokenizer))
    output_ids = None if script.output is None else tokenizer.encode(script.output, add_bos=False)
    runner = FakeRunner(script, vocab_size=tokenizer.vocab_size, output_ids=output_ids)
    return EngineParts(runner, scheduler, tokenizer.token_bytes)


def _script_ids(script: FakeScript) -> tuple[int, ...] | None:
    if script.output_ids is not None:
        return script.output_ids
    return None if script.output is None else byte_ids(script.output)


def _error(scheduled: ScheduledSlice, message: str) -> SliceResult:
    return SliceResult(scheduled.request_id, finish=FinishReason.ERROR, error=message)


def _embedding(scheduled: ScheduledSlice) -> tuple[float, ...]:
    """Mean of one made-up vector per token: partial sums in between, as a real runner keeps them."""
    so_far = scheduled.embedding
    sums = list(so_far) if isinstance(so_far, tuple) else [0.0] * _EMBEDDING_SIZE
    for token_id in scheduled.tokens[scheduled.start : scheduled.start + scheduled.num_tokens]:
        for i in range(_EMBEDDING_SIZE):
            sums[i] += ((token_id >> i) & 1) * 1.0
    end = scheduled.start + scheduled.num_tokens
    return tuple(sums) if end < len(scheduled.tokens) else tuple(value / end for value in sums)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a fake engine process; returns its exit code."""
    parser = argparse.ArgumentParser(description="an engine process with a fake model")
    parser.add_argument("--fd", type=int, required=True, help="file descriptor of the socket to the API process")
    parser.add_argument("--script", default="{}", help="a FakeScript as JSON")
    options = parser.parse_args(arguments)
    script = msgspec.json.decode(options.script, type=FakeScript)

    def build() -> EngineParts:
        parts = fake_parts(script)
        memory = process_memory()
        if script.data_headroom_bytes is not None and memory is not None:
            limit_data(memory.data_bytes + script.data_headroom_bytes)
        high_bytes = script.high_water_bytes
        return parts if high_bytes is None else parts._replace(memory=MemoryWatch(Watermarks(high_bytes, high_bytes)))

    return run_engine(socket.socket(fileno=options.fd), build)


if __name__ == "__main__":
    sys.exit(main())
