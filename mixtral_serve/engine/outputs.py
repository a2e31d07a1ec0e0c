"""From events to deltas: text, stop strings, and one message per request per tick.

Owns: ``RequestOutput`` (a request's detokenizer, its stop strings, and what this tick has gathered for it)
and ``Outputs`` (all of them).

The order within a tick: the runner's result comes, ``decide`` turns its tokens into text and marks the
requests whose stop string appeared, the scheduler commits, ``apply`` reads its events, ``take`` hands out the
deltas. So a stop string ends its request in the very step that completed it, and the scheduler hears of it
before it commits.

Invariants: a request's texts joined are the decoding of all its tokens, cut before the first stop string (or
after it, with ``include_stop``); a stop token that ended the request has no text, unless ``include_stop``; no
part of a character and nothing that may yet become a stop string is given out before it is certain. Stop
strings, like stop tokens, count only once ``min_tokens`` were sampled. Tokens of a removed stop string are
counted and reported. A fault in one request's text ends that request alone.
"""

from __future__ import annotations

from collections.abc import Iterable

from mixtral_serve.engine.messages import Delta, Submit
from mixtral_serve.text.detokenizer import IncrementalDetokenizer, TokenBytes
from mixtral_serve.text.stop_strings import StopMatcher
from scheduler.events import Event, Finished, PromptScored, TokenLogprob, TokensCommitted
from scheduler.lifecycle import FinishReason
from scheduler.plan import SliceResult, StepPlan, StepResult
from scheduler.request import RequestId, StopRule


class RequestOutput:
    """What one live request says, and what of it the next delta will carry."""

    __slots__ = (
        "_detokenizer",
        "_include_stop",
        "_is_cut",
        "_matcher",
        "_num_found",
        "_num_told",
        "_reports_progress",
        "_stop",
        "error",
        "finished",
        "logprobs",
        "num_prompt_tokens_done",
        "prompt_logprobs",
        "text",
        "token_ids",
    )

    def __init__(self, submit: Submit, stop: StopRule, table: TokenBytes) -> None:
        self._detokenizer = IncrementalDetokenizer(
            table,
            skip_special_tokens=submit.skip_special_tokens,
            strip_leading_space=submit.strip_leading_space,
        )
        self._matcher = StopMatcher(submit.stop, include=submit.include_stop) if submit.stop else None
        self._include_stop = submit.include_stop
        self._stop = stop
        self._is_cut = False
        self._reports_progress = submit.report_progress
        self._num_told = 0
        self._num_found = 0
        self.num_prompt_tokens_done = 0
        self.text = ""
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob] = []
        self.finished: Finished | None = None
        self.error: str | None = None

    def push(self, token_id: int, index: int) -> bool:
        """Take in the token at output position ``index``. Returns whether a stop string appeared."""
        counts = index + 1 >= self._stop.min_tokens
        if counts and token_id in self._stop.stop_token_ids and not self._include_stop:
            return False  # it ends the request, silently
        return self._say(self._detokenizer.push(token_id), counts=counts)

    def advance(self, num_prompt_tokens_done: int, start: int) -> bool:
        """So much of the prompt is computed, from ``start`` on in this step. Returns whether that is news to somebody
        who wants to hear it."""
        if not self._reports_progress or num_prompt_tokens_done <= self._num_told:
            return False
        if self._num_told == 0:
            self._num_found = start  # where the first step begins, the prefix cache ended
        self.num_prompt_tokens_done = self._num_told = num_prompt_tokens_done
        return True

    def close(self) -> None:
        """Nothing follows: let go of the text that was held back."""
        if self._is_cut:
            return
        self._say(self._detokenizer.flush(), counts=True)
        if self._matcher is not None and not self._is_cut:
            self.text += self._matcher.flush()

    def delta(self, request_id: str) -> Delta:
        """What was gathered since the last one; gathering starts anew."""
        finished = self.finished
        delta = Delta(
            request_id=request_id,
            text=self.text,
            token_ids=tuple(self.token_ids),
            logprobs=tuple(self.logprobs),
            prompt_logprobs=tuple(self.prompt_logprobs),
            finish_reason=None if finished is None else self._reason(finished).value,
            error=self.error,
            num_prompt_tokens_done=self.num_prompt_tokens_done,
            num_output_tokens=0 if finished is None else finished.num_output_tokens,
            num_cached_tokens=self._num_found if finished is None else finished.num_cached_tokens,
            embedding=None if finished is None else _embedding(finished),
        )
        self.text = ""
        self.num_prompt_tokens_done = 0
        self.token_ids.clear()
        self.logprobs.clear()
        self.prompt_logprobs.clear()
        return delta

    def _reason(self, finished: Finished) -> FinishReason:
        if self.error is not None:
            return FinishReason.ERROR
        # What was left of a character at the limit can complete a stop string, after the scheduler's last word.
        cut_by_the_rest = self._is_cut and finished.reason is FinishReason.LENGTH
        return FinishReason.STOP if cut_by_the_rest else finished.reason

    def _say(self, text: str, *, counts: bool) -> bool:
        if self._matcher is None or not counts:
            self.text += text
            return False
        if not text:
            return False
        outcome = self._matcher.push(text)
        self.text += outcome.text
        self._is_cut = outcome.matched is not None
        return self._is_cut


def _embedding(finished: Finished) -> tuple[float, ...] | None:
    value = finished.embedding
    if value is None:
        return None
    assert isinstance(value, tuple), "a runner's finished embedding is a tuple of floats"
    return value


class Outputs:
    """The outputs of all live requests, and the deltas of the current tick."""

    def __init__(self, table: TokenBytes) -> None:
        self._table = table
        self._live: dict[str, RequestOutput] = {}
        self._touched: dict[str, RequestOutput] = {}
        self._refusals: list[Delta] = []

    @property
    def has_deltas(self) -> bool:
        """Whether ``take`` would return any."""
        return bool(self._touched or self._refusals)

    @property
    def live_ids(self) -> tuple[str, ...]:
        """Ids of the requests that have not ended."""
        return tuple(self._live)

    def prepare(self, submit: Submit, stop: StopRule) -> RequestOutput:
        """The output of a request that the scheduler has yet to accept. May raise; nothing has changed then."""
        return RequestOutput(submit, stop, self._table)

    def open(self, request_id: str, output: RequestOutput) -> None:
        """The scheduler accepted the request: its events may come."""
        assert request_id not in self._live, "the scheduler refuses ids that are live"
        self._live[request_id] = output

    def refuse(self, request_id: str, error: str, refusal: str | None) -> None:
        """The request came to nothing. ``refusal`` names the ``AdmissionError``, None means a fault of ours."""
        self._refusals.append(
            Delta(request_id=request_id, finish_reason=FinishReason.ERROR.value, error=error, refusal=refusal)
        )

    def decide(self, plan: StepPlan, result: StepResult) -> StepResult:
        """The runner's result with STOP where a stop string appeared and ERROR where a text could not be made."""
        replaced: dict[int, SliceResult] = {}
        for i, (scheduled, outcome) in enumerate(zip(plan.slices, result.results, strict=True)):
            token_id = outcome.token_id
            if token_id is None or outcome.finish is FinishReason.ERROR:
                continue
            try:
                stopped = self._live[scheduled.request_id].push(token_id, scheduled.num_output_tokens)
            except Exception as error:  # noqa: BLE001 - one request's text must not end another's
                replaced[i] = _failed(scheduled.request_id, f"making its text failed: {error!r}")
            else:
                if stopped:
                    replaced[i] = _stopped(outcome)
        if not replaced:
            return result
        return StepResult(tuple(replaced.get(i, outcome) for i, outcome in enumerate(result.results)))

    def apply(self, events: Iterable[Event]) -> None:
        """Gather what the events say about each request."""
        for event in events:
            if isinstance(event, TokensCommitted):
                output = self._touch(event.request_id)
                output.token_ids.append(event.token_id)
                if event.logprob is not None:
                    output.logprobs.append(event.logprob)
            elif isinstance(event, Finished):
                self._finish(event)
            elif isinstance(event, PromptScored):
                self._touch(event.request_id).prompt_logprobs.extend(event.logprobs)

    def note_progress(self, plan: StepPlan) -> None:
        """``plan`` was committed: tell those who want to know how far their prompts have come.

        The last part of a prompt is told by what comes of it; a prompt that is computed again after a preemption is no
        news.
        """
        for scheduled in plan.slices:
            done = scheduled.start + scheduled.num_tokens
            if scheduled.samples or scheduled.num_output_tokens or done == len(scheduled.tokens):
                continue
            output = self._live.get(scheduled.request_id)
            if output is not None and output.advance(done, scheduled.start):
                self._touched[scheduled.request_id] = output

    def take(self) -> tuple[Delta, ...]:
        """The deltas of this tick, at most one per request."""
        deltas = [*self._refusals, *(output.delta(key) for key, output in self._touched.items())]
        self._refusals.clear()
        self._touched.clear()
        return tuple(deltas)

    def _touch(self, request_id: str) -> RequestOutput:
        output = self._live[request_id]
        self._touched[request_id] = output
        return output

    def _finish(self, event: Finished) -> None:
        output = self._touch(event.request_id)
        del self._live[event.request_id]
        output.finished = event
        output.error = event.error
        try:
            output.close()
        except Exception as error:  # noqa: BLE001 - see decide
            output.error = output.error or f"making its text failed: {error!r}"


def _failed(request_id: RequestId, error: str) -> SliceResult:
    return SliceResult(request_id, finish=FinishReason.ERROR, error=error)


def _stopped(outcome: SliceResult) -> SliceResult:
    return SliceResult(
        outcome.request_id,
        token_id=outcome.token_id,
        logprob=outcome.logprob,
        prompt_logprobs=outcome.prompt_logprobs,
        embedding=outcome.embedding,
        finish=FinishReason.STOP,
    )
