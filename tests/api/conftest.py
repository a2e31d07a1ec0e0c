"""A scripted engine, an application over it, and ways to speak to it: raw ASGI and a loopback server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.types import ASGIApp, Message

from mixtral_serve.api.app import create_app
from mixtral_serve.api.connection import guarded_protocol
from mixtral_serve.api.deps import ApiSettings, Dependencies
from mixtral_serve.contract import ModelInfo
from mixtral_serve.engine.admission import check_submits, decode_prompt
from mixtral_serve.engine.errors import EngineError, RequestFailed
from mixtral_serve.engine.inspection import RequestTable
from mixtral_serve.engine.listener import EngineState
from mixtral_serve.engine.messages import Delta, Submit
from mixtral_serve.engine.stream import TokenStream
from mixtral_serve.text.chat_template import load_chat_template
from mixtral_serve.text.fakes import write_tiny_tokenizer
from mixtral_serve.text.tokenizer import Tokenizer, load_tokenizer
from scheduler.census import Census
from scheduler.events import TokenLogprob
from scheduler.request import RequestKind

MODEL = "tiny"


@dataclass
class ScriptedEngine:
    """An engine in this process that says what the test tells it to."""

    tokenizer: Tokenizer
    state: EngineState = EngineState.READY
    is_ready: bool = True
    info: ModelInfo | None = None
    answer: str | None = "hello world"
    """What every request says at once, one delta per character; None leaves the streams to the test."""
    scores_itself: bool = True
    """Whether scored prompts get made-up log-probabilities at once."""
    refusal: EngineError | None = None
    embedding: tuple[float, ...] | None = (3.0, 4.0, 0.0, 12.0)
    """What every text is embedded as; None leaves the streams to the test."""
    table: RequestTable | None = None
    submits: list[Submit] = field(default_factory=list)
    streams: dict[str, TokenStream] = field(default_factory=dict)
    cancelled: list[str] = field(default_factory=list)
    on_submit: asyncio.Event = field(default_factory=asyncio.Event)
    on_cancel: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.info = ModelInfo(
            name="tiny",
            fingerprint="fp_test",
            vocab_size=self.tokenizer.vocab_size,
            max_model_len=512,
            eos_token_ids=(2,),
            num_blocks=1025,
            block_size=16,
            weights_bytes=0,
            kv_cache_bytes=0,
            hidden_size=4,
        )

    def submit(self, requests: Sequence[Submit]) -> tuple[TokenStream, ...]:
        if self.refusal is not None:
            raise self.refusal
        assert self.info is not None
        check_submits(requests, self.info)
        streams = []
        for request in requests:
            stream = TokenStream(request.request_id, self._cancel, self._to_error)
            self.submits.append(request)
            self.streams[request.request_id] = stream
            streams.append(stream)
            if request.sampling.prompt_logprobs is not None and self.scores_itself:
                self._score(request)
            if request.kind is RequestKind.EMBED:
                self._embed(request.request_id)
            elif request.max_tokens == 0:
                self.end(request.request_id, "length")
            elif self.answer is not None:
                self.say(request.request_id, self.answer)
        self.on_submit.set()
        return tuple(streams)

    def _embed(self, request_id: str) -> None:
        if self.embedding is not None:
            delta = Delta(request_id=request_id, finish_reason="stop", embedding=self.embedding)
            self.streams[request_id].push(delta)

    async def inspect(self, tenant: str) -> RequestTable:
        if self.refusal is not None:
            raise self.refusal
        return self.table or RequestTable(Census(tenant, (), 0, 0, 0), ())

    def say(self, request_id: str, text: str, *, reason: str | None = "stop") -> None:
        """One delta per character, and the end."""
        stream = self.streams[request_id]
        num_top = next(submit for submit in self.submits if submit.request_id == request_id).sampling.logprobs
        logprobs = () if num_top is None else (_logprob(300, num_top),)
        for character in text:
            stream.push(Delta(request_id=request_id, text=character, token_ids=(300,), logprobs=logprobs))
        if reason is not None:
            self.end(request_id, reason, num_output_tokens=len(text) + 1)

    def end(self, request_id: str, reason: str, *, num_output_tokens: int = 0, error: str | None = None) -> None:
        delta = Delta(
            request_id=request_id,
            finish_reason=reason,
            num_output_tokens=num_output_tokens,
            num_cached_tokens=3,
            error=error,
        )
        self.streams[request_id].push(delta)

    @property
    def last(self) -> Submit:
        return self.submits[-1]

    def _score(self, request: Submit) -> None:
        """One delta with the log-probabilities of all prompt tokens but the first."""
        ids = decode_prompt(request.prompt)[1:]
        scores = tuple(_logprob(token_id, request.sampling.prompt_logprobs or 0) for token_id in ids)
        self.streams[request.request_id].push(Delta(request_id=request.request_id, prompt_logprobs=scores))

    def _cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)
        self.on_cancel.set()

    @staticmethod
    def _to_error(delta: Delta) -> EngineError:
        return RequestFailed("it failed", detail=delta.error or "")


def _logprob(token_id: int, num_top: int) -> TokenLogprob:
    """Made up: the token itself is the likeliest, the next ids follow."""
    return TokenLogprob(token_id, -0.25, tuple((token_id + i, -0.25 * (i + 1)) for i in range(num_top)))


@dataclass
class Reply:
    """A whole HTTP answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The envelope's inside, checked for its form."""
        value = self.json()
        assert list(value) == ["error"]
        error: dict[str, Any] = value["error"]
        assert sorted(error) == ["code", "message", "param", "type"]
        assert all(isinstance(error[key], str) for key in ("code", "message", "type"))
        assert error["param"] is None or isinstance(error["param"], str)
        assert self.headers["content-type"] == "application/json"
        assert len(self.body) < 2000
        return error

    @property
    def events(self) -> list[Any]:
        """The stream's events; ``[DONE]`` as itself."""
        assert self.headers["content-type"].startswith("text/event-stream")
        blocks = self.body.decode().split("\n\n")
        assert blocks.pop() == ""
        assert all(block.startswith("data: ") for block in blocks)
        return [block[6:] if block == "data: [DONE]" else json.loads(block[6:]) for block in blocks]


@dataclass
class Exchange:
    """One scripted ASGI exchange that the test can leave at any moment."""

    app: ASGIApp
    scope: dict[str, Any]
    body: bytes
    sent: list[Message] = field(default_factory=list)
    left: asyncio.Event = field(default_factory=asyncio.Event)
    on_send: asyncio.Event = field(default_factory=asyncio.Event)

    def start(self) -> asyncio.Task[None]:
        async def run() -> None:
            await self.app(self.scope, self._receive, self._send)

        return asyncio.create_task(run())

    async def _receive(self) -> Message:
        if self.body is not None:
            body, self.body = self.body, None  # type: ignore[assignment]
            return {"type": "http.request", "body": body, "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        self.sent.append(message)
        self.on_send.set()

    def reply(self) -> Reply:
        start = self.sent[0]
        headers = {name.decode().lower(): value.decode() for name, value in start["headers"]}
        body = b"".join(message.get("body", b"") for message in self.sent[1:])
        return Reply(start["status"], headers, body)


def exchange(
    app: ASGIApp, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
) -> Exchange:
    sent = {"content-type": "application/json"} | (headers or {})
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "scheme": "http",
        "query_string": b"",
        "server": ("127.0.0.1", 80),
        "client": ("127.0.0.1", 1234),
        "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in sent.items()],
    }
    return Exchange(app, scope, body)


@dataclass
class Api:
    """The application under test."""

    app: ASGIApp
    engine: ScriptedEngine
    deps: Dependencies

    async def send(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Reply:
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        call = exchange(self.app, method, path, data, headers)
        await call.start()
        return call.reply()

    def call(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Reply:
        """One exchange on an event loop of its own."""
        return asyncio.run(asyncio.wait_for(self.send(method, path, body, headers), 20))

    def chat(self, **fields: Any) -> Reply:
        base = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
        return self.call("POST", "/v1/chat/completions", base | fields)

    def complete(self, **fields: Any) -> Reply:
        return self.call("POST", "/v1/completions", {"model": MODEL, "prompt": "hello"} | fields)

    def assert_alive(self) -> None:
        """The canary: an ordinary request works."""
        before = len(self.engine.submits)
        reply = self.chat()
        assert reply.status == 200, reply.body
        assert reply.json()["choices"][0]["message"]["content"] == self.engine.answer
        assert len(self.engine.submits) == before + 1

    def with_settings(self, **changes: Any) -> Api:
        return self.with_deps(settings=ApiSettings(**changes))

    def with_deps(self, **changes: Any) -> Api:
        deps = replace(self.deps, **changes)
        return Api(create_app(deps), self.engine, deps)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    write_tiny_tokenizer(directory)
    return directory


@pytest.fixture
def api(checkpoint: Path) -> Api:
    return _new_api(checkpoint)


@pytest.fixture(scope="module")
def shared_api(checkpoint: Path) -> Api:
    """One application for many tests that look at nothing but their own requests."""
    return _new_api(checkpoint)


def _new_api(checkpoint: Path) -> Api:
    tokenizer = load_tokenizer(checkpoint)
    engine = ScriptedEngine(tokenizer)
    deps = Dependencies(
        engine=engine,
        tokenizer=tokenizer,
        chat_template=load_chat_template(checkpoint, tokenizer),
        model_names=(MODEL, "org/tiny"),
        render_metrics=lambda: b"# nothing\n",
        version="0.0.0",
        wall_clock=lambda: 1_700_000_000.0,
    )
    return Api(create_app(deps), engine, deps)


class _QuietServer(uvicorn.Server):
    @asynccontextmanager
    async def running(self) -> AsyncIterator[int]:
        task = asyncio.create_task(self.serve())
        while not self.started:
            await asyncio.sleep(0.005)
        try:
            yield self.servers[0].sockets[0].getsockname()[1]
        finally:
            self.should_exit = True
            await task


Loopback = Callable[..., Any]


@pytest.fixture
def loopback() -> Loopback:
    """``async with loopback(app) as port``: the application behind uvicorn, as it is served."""

    def serve(app: ASGIApp, *, client_turn_s: float = 30.0, stall_s: float = 60.0) -> Any:
        config = uvicorn.Config(
            app,
            host="127.0.0.1",
            port=0,
            http=guarded_protocol(client_turn_s=client_turn_s, stall_s=stall_s),
            ws="none",
            lifespan="off",
            h11_max_incomplete_event_size=65_536,
            access_log=False,
            log_config=None,
            timeout_graceful_shutdown=1,
        )
        return _QuietServer(config).running()

    return serve


@pytest.fixture
def run() -> Callable[[Coroutine[Any, Any, Any]], Any]:
    """Run a coroutine to its end, in bounded time."""

    def runner(work: Coroutine[Any, Any, Any]) -> Any:
        async def bounded() -> Any:
            async with asyncio.timeout(30):
                return await work

        return asyncio.run(bounded())

    return runner


@pytest.fixture
def start_exchange() -> Callable[..., Exchange]:
    """Build an ``Exchange``."""
    return exchange
