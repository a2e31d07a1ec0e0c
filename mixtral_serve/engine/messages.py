"""What the API process and the engine process say to each other.

Owns: the message types and their encoding (MessagePack through msgspec; never pickle). At most one message
goes each way per engine tick: a list of commands in, one ``Tick`` out. Both sides run the same code of the
same installation, so the encoding carries no version.

Clocks: every time is in seconds of ``time.monotonic``, which on Linux is one clock for all processes.
"""

from __future__ import annotations

from typing import Final, TypeAlias

import msgspec

from mixtral_serve.contract import ModelInfo, SamplingParams
from scheduler.census import Census
from scheduler.events import TokenLogprob
from scheduler.request import RequestKind


class Submit(msgspec.Struct, frozen=True, tag="submit", kw_only=True):
    """Start a request."""

    request_id: str
    """Made by the server, unique over its life."""
    prompt: bytes
    """Token ids, ``array('i')`` in native byte order."""
    arrival_s: float
    kind: RequestKind = RequestKind.GENERATE
    max_tokens: int = 0
    """Of GENERATE; with 0 the prompt is computed for the prefix cache alone."""
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    """Besides end-of-sequence, which the engine adds unless ``ignore_eos``."""
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    """Stop strings; the text ends before the first of them."""
    include_stop: bool = False
    skip_special_tokens: bool = True
    strip_leading_space: bool = False
    """Drop one space at the very start of the text: a chat answer is a new piece, a completion goes on."""
    sampling: SamplingParams = SamplingParams()
    priority: int = 0
    tenant: str = ""
    cache_salt: str = ""
    deadline_s: float | None = None
    grammar: str | None = None
    """What the output must match, as ``mixtral_serve.text.grammar`` wrote it; None: anything."""
    report_progress: bool = False
    """Tell of the prompt's progress while it is computed."""


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """End a request wherever it is. Unknown and finished ids are fine."""

    request_id: str


class Inspect(msgspec.Struct, frozen=True, tag="inspect"):
    """Tell of a tenant's requests, of at most ``most`` one by one. Answered with the next tick."""

    tenant: str
    most: int


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """End the engine process now; what still lives ends with CANCELLED."""


Command: TypeAlias = Submit | Cancel | Inspect | Shutdown


class Inbox(msgspec.Struct, frozen=True):
    """API process -> engine process."""

    commands: tuple[Command, ...]


class Delta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one tick adds to one request. The one with a ``finish_reason`` is the last."""

    request_id: str
    text: str = ""
    """Complete characters only, with nothing that may still turn out to be part of a stop string."""
    token_ids: tuple[int, ...] = ()
    """Tokens committed this tick (their text may come in a later delta, or never, if a stop string ate it)."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """Aligned with ``token_ids`` where the request asked for them."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    """"stop", "length", "cancelled", "error" or "deadline": a ``FinishReason`` value."""
    error: str | None = None
    """What failed, for the log; clients read another text."""
    refusal: str | None = None
    """Set when the scheduler refused the request: the name of the ``AdmissionError`` class."""
    num_prompt_tokens_done: int = 0
    """Prompt tokens computed or found in the cache so far, where the request asked for progress; 0: no news."""
    num_output_tokens: int = 0
    """Given with the last delta, as are the next two."""
    num_cached_tokens: int = 0
    """Given with progress, too."""
    embedding: tuple[float, ...] | None = None
    """The mean of the prompt's last hidden states, not normalised and never zero."""


class EngineMemory(msgspec.Struct, frozen=True):
    """The engine process's memory as it last looked, in bytes."""

    anon_bytes: int = 0
    data_bytes: int = 0
    """Private writable mappings: what ``RLIMIT_DATA`` counts."""
    peak_anon_bytes: int = 0
    is_under_pressure: bool = False
    """New requests are refused until some memory was given back."""
    num_sheddings: int = 0


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot after a tick. Counters run from the start of the engine process."""

    num_running: int = 0
    num_waiting: int = 0
    """Waiting, deferred and preempted requests."""
    num_blocks: int = 0
    """Usable blocks: the null block is not counted."""
    num_used_blocks: int = 0
    """Blocks that live requests hold; cached but unheld blocks are free."""
    num_preemptions: int = 0
    num_prefix_queried_tokens: int = 0
    num_prefix_hit_tokens: int = 0
    num_prompt_tokens: int = 0
    """Prompt tokens of admitted requests."""
    num_generation_tokens: int = 0
    num_steps: int = 0
    num_failed_steps: int = 0
    reserved_bytes: int = 0
    """What is set aside for the structures of live requests, on both sides."""
    memory: EngineMemory = EngineMemory()


class StepTiming(msgspec.Struct, frozen=True):
    """How long the parts of one tick took, seconds."""

    step_id: int
    num_tokens: int
    num_slices: int
    schedule_s: float
    run_s: float
    """The runner alone."""
    total_s: float
    """The whole step: planning, running, texts and commit; encoding and sending come after it."""


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The model is loaded; sent once."""

    info: ModelInfo
    load_s: float


class Tick(msgspec.Struct, frozen=True, tag="tick"):
    """Engine process -> API process, once per tick."""

    deltas: tuple[Delta, ...]
    stats: EngineStats
    timing: StepTiming | None
    """None when nothing ran."""
    censuses: tuple[Census, ...] = ()
    """What was asked for since the last tick."""


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The engine cannot start, and why: one line for the operator. It exits with ``exit_code``."""

    message: str
    exit_code: int


Outbox: TypeAlias = Ready | Tick | Failed

_encoder: Final = msgspec.msgpack.Encoder()
_inbox_decoder: Final = msgspec.msgpack.Decoder(Inbox)
_outbox_decoder: Final[msgspec.msgpack.Decoder[Outbox]] = msgspec.msgpack.Decoder(Outbox)


def encode(message: Inbox | Outbox) -> bytes:
    """One message as MessagePack bytes, without framing."""
    return _encoder.encode(message)


def decode_inbox(data: bytes | memoryview) -> Inbox:
    """Inverse of ``encode`` for the engine's side.

    Raises:
        msgspec.DecodeError, msgspec.ValidationError: not a message of this protocol.
    """
    return _inbox_decoder.decode(data)


def decode_outbox(data: bytes | memoryview) -> Outbox:
    """Inverse of ``encode`` for the API process's side. Raises as ``decode_inbox``."""
    return _outbox_decoder.decode(data)
