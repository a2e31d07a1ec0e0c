"""Load test of a server with OpenAI's API: ``python -m bench.load --base-url URL --rate 10 --duration 60 --json FILE``.

Open loop (``--rate``): requests arrive as a Poisson process and are sent whether or not earlier ones were answered;
latency counts from the scheduled arrival, so a server that stalls is not spared the requests that it would have
kept waiting. Closed loop (``--concurrency``): so many clients, each sending its next request when the last is answered.

Prints a table, writes a PNG plot and JSON. Aims at this machine only, unless ``--allow-remote`` is given, and is
bounded in time and in count.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import random
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from bench.completions import CompletionsClient, Outcome, first_model
from bench.http_client import ExchangeError, Target
from bench.options import integer, number
from bench.plot import draw
from bench.report import LoadReport, summarise
from bench.workload import SHAPES, PromptMaker, Shape, poisson_arrivals

MAX_REQUESTS: Final = 100_000
MAX_DURATION_S: Final = 3600.0
MAX_RATE_PER_S: Final = 1000.0
MAX_CONCURRENCY: Final = 4096

Send = Callable[[int, float], Awaitable[Outcome]]
"""Sends the request with this number, due at this monotonic time."""


class LoadError(Exception):
    """The run cannot be made; the message is one line."""


async def open_loop(send: Send, arrivals_s: Sequence[float], *, max_in_flight: int) -> list[Outcome]:
    """Send one request at each arrival time (seconds from now) and wait for all of them.

    Beyond ``max_in_flight`` unanswered requests, an arrival becomes an error of the kind ``not_sent``.
    """
    begin_s = time.monotonic()
    outcomes: list[Outcome] = []
    in_flight: set[asyncio.Task[None]] = set()

    async def one(index: int, due_s: float) -> None:
        outcomes.append(await send(index, due_s))

    for index, arrival_s in enumerate(arrivals_s):
        due_s = begin_s + arrival_s
        await asyncio.sleep(max(0.0, due_s - time.monotonic()))
        if len(in_flight) >= max_in_flight:
            outcomes.append(Outcome(due_s, error="not_sent", detail=f"{max_in_flight} requests were unanswered"))
            continue
        task = asyncio.create_task(one(index, due_s))
        in_flight.add(task)
        task.add_done_callback(in_flight.discard)
    await asyncio.gather(*in_flight)
    return outcomes


async def closed_loop(send: Send, *, concurrency: int, duration_s: float, max_requests: int) -> list[Outcome]:
    """``concurrency`` clients, each sending one request after the other, until time or count is up.

    A client whose request failed waits a moment, so that a server that refuses is not hammered.
    """
    end_s = time.monotonic() + duration_s
    numbers = itertools.count()
    outcomes: list[Outcome] = []

    async def client() -> None:
        while time.monotonic() < end_s and (index := next(numbers)) < max_requests:
            outcome = await send(index, time.monotonic())
            outcomes.append(outcome)
            if outcome.error is not None:
                await asyncio.sleep(0.1)

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return outcomes


async def run(options: argparse.Namespace) -> tuple[LoadReport, list[Outcome]]:
    """Warm up, run, summarise.

    Raises:
        LoadError: the server does not answer, or not as asked, before the measurement began.
    """
    target: Target = options.target
    model = options.model or await _first_model(target, options.api_key)
    shape = _shape(options)
    client = CompletionsClient(
        target, model=model, api_key=options.api_key, extra=options.extra_body, timeout_s=options.timeout
    )
    prompts = PromptMaker(shape, token_ids=options.token_ids, seed=options.seed)
    for index in range(1, options.warmup + 1):
        outcome = await client.complete(prompts.prompt(-index), shape.output_tokens)
        if outcome.error is not None:
            raise LoadError(f"the warm-up request failed: {outcome.error}: {outcome.detail[:300]}")

    def send(index: int, due_s: float) -> Awaitable[Outcome]:
        return client.complete(prompts.prompt(index), shape.output_tokens, due_s=due_s)

    gc.collect()
    gc.freeze()  # what was imported is not looked at again, so collections are short
    cpu_s, begin_s = time.process_time(), time.monotonic()
    if options.rate is not None:
        arrivals_s = poisson_arrivals(options.rate, options.duration, options.seed)[: options.requests]
        outcomes = await open_loop(send, arrivals_s, max_in_flight=options.max_in_flight)
    else:
        outcomes = await closed_loop(
            send, concurrency=options.concurrency, duration_s=options.duration, max_requests=options.requests
        )
    report = summarise(
        outcomes,
        wall_s=time.monotonic() - begin_s,
        client_cpu_s=time.process_time() - cpu_s,
        parameters=_parameters(options, model, shape),
        seed=options.seed,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return report, outcomes


async def _first_model(target: Target, api_key: str | None) -> str:
    try:
        return await first_model(target, api_key)
    except (ExchangeError, ValueError) as error:
        raise LoadError(f"the server does not say which models it has: {error}") from error


def _shape(options: argparse.Namespace) -> Shape:
    named = SHAPES[options.shape]
    given = options.prompt_tokens, options.shared_prefix_tokens, options.output_tokens
    default = named.prompt_tokens, named.shared_prefix_tokens, named.output_tokens
    return Shape(*(d if g is None else g for g, d in zip(given, default, strict=True)))


def _parameters(options: argparse.Namespace, model: str, shape: Shape) -> dict[str, object]:
    names = ("base_url", "rate", "concurrency", "duration", "requests", "warmup", "timeout", "extra_body")
    return {name: getattr(options, name) for name in names} | {
        "model": model,
        "prompt_tokens": shape.prompt_tokens,
        "shared_prefix_tokens": shape.shared_prefix_tokens,
        "output_tokens": shape.output_tokens,
        "token_ids": [options.token_ids.start, options.token_ids.stop],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.load", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--base-url", default="http://127.0.0.1:11400", help="the server (default: %(default)s)")
    load = parser.add_mutually_exclusive_group(required=True)
    load.add_argument("--rate", type=number(0.001, MAX_RATE_PER_S), help="open loop: mean arrivals per second")
    load.add_argument("--concurrency", type=integer(1, MAX_CONCURRENCY), help="closed loop: clients at once")
    parser.add_argument(
        "--duration", type=number(0.1, MAX_DURATION_S), default=60.0, help="seconds of arrivals (default: 60)"
    )
    parser.add_argument(
        "--requests", type=integer(1, MAX_REQUESTS), default=MAX_REQUESTS, help="most requests (default: %(default)s)"
    )
    sizes = parser.add_argument_group("size of a request")
    sizes.add_argument(
        "--shape",
        choices=SHAPES,
        default="standard",
        help="standard: 512 prompt tokens of which 480 are a cached prefix, 32 output tokens; "
        "fresh: 64 uncached prompt tokens, 32 output tokens (default: standard)",
    )
    sizes.add_argument("--prompt-tokens", type=integer(1, 1 << 20), help="instead of the shape's")
    sizes.add_argument("--shared-prefix-tokens", type=integer(0, 1 << 20), help="instead of the shape's")
    sizes.add_argument("--output-tokens", type=integer(1, 1 << 20), help="instead of the shape's")
    sizes.add_argument(
        "--token-ids",
        type=_id_range,
        default=range(300, 900),
        metavar="FROM:TO",
        help="prompts are made of these token ids (default: 300:900, ordinary tokens in most vocabularies)",
    )
    sizes.add_argument("--seed", type=int, help="of arrivals and prompts (default: drawn, and recorded)")
    server = parser.add_argument_group("server")
    server.add_argument("--model", help="default: the first that /v1/models lists")
    server.add_argument("--api-key", help="sent as bearer token")
    server.add_argument(
        "--extra-body", type=json.loads, default={}, metavar="JSON", help="further fields of each request"
    )
    server.add_argument("--allow-remote", action="store_true", help="aim at another machine than this one")
    server.add_argument("--timeout", type=number(0.1, MAX_DURATION_S), default=120.0, help="per request (default: 120)")
    server.add_argument(
        "--max-in-flight",
        type=integer(1, MAX_CONCURRENCY),
        default=1024,
        help="open loop: more unanswered requests are not sent and count as errors (default: %(default)s)",
    )
    server.add_argument(
        "--warmup", type=integer(0, 1000), default=3, help="requests before measuring; they prime the prefix cache"
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    output.add_argument("--plot", type=Path, metavar="FILE", help="write the picture here (default: beside the JSON)")
    return parser


def _id_range(text: str) -> range:
    first, _, end = text.partition(":")
    ids = range(int(first), int(end))
    if not ids or ids.start < 0:
        raise argparse.ArgumentTypeError(f"{text} holds no token id")
    return ids


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, checked. Exits with 2 where they make no sense."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        options.target = Target.parse(options.base_url)
        _shape(options)
    except ValueError as error:
        parser.error(str(error))
    if not isinstance(options.extra_body, dict):
        parser.error("--extra-body is a JSON object")
    if not options.target.is_loopback and not options.allow_remote:
        parser.error(f"{options.target.host} is not this machine; --allow-remote says that you mean it")
    if options.seed is None:
        options.seed = random.SystemRandom().randrange(2**32)
    if options.plot is None and options.json is not None:
        options.plot = options.json.with_suffix(".png")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns 0 when any request was answered, else 1."""
    options = parse(arguments)
    try:
        report, outcomes = asyncio.run(run(options))
    except LoadError as error:
        print(f"bench.load: {error}", file=sys.stderr)
        return 1
    print(report.table())
    if options.json is not None:
        options.json.write_text(json.dumps(report.to_json(), indent=2) + "\n", "utf-8")
    if options.plot is not None:
        load = f"{options.rate:g} requests/s" if options.rate is not None else f"{options.concurrency} clients"
        size = f"{report.parameters['prompt_tokens']} prompt + {report.parameters['output_tokens']} output tokens"
        draw(options.plot, outcomes, title=f"{load}, {size}, {report.requests} requests, {report.errors} errors")
    return 0 if report.requests > report.errors else 1


if __name__ == "__main__":
    sys.exit(main())
