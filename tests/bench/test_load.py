"""The load test against a server that misbehaves as told."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from bench.completions import CompletionsClient, Outcome
from bench.http_client import Target
from bench.load import LoadError, closed_loop, main, open_loop, parse, run

Serving = Callable[..., Any]
RunAsync = Callable[..., None]


@pytest.mark.parametrize(
    ("behaviour", "kind"),
    [
        ("right", None),
        ("busy", "http_429"),
        ("garbage", "malformed"),
        ("error_event", "stream_error"),
        ("cut", "connection_lost"),
        ("short", "wrong_token_count"),
        ("no_usage", "no_usage"),
        ("no_done", "incomplete"),
        ("unfinished", "incomplete"),
        ("mute", "no_text"),
        ("silent", "timeout"),
    ],
)
def test_each_way_to_fail_is_an_error_of_its_kind(
    behaviour: str, kind: str | None, serving: Serving, run_async: RunAsync
) -> None:
    async def story() -> None:
        async with serving(behaviour) as server:
            client = CompletionsClient(Target.parse(server.base_url), model="m", timeout_s=0.5)
            outcome = await client.complete([300, 301], 4)
            assert outcome.error == kind, outcome.detail
            assert (outcome.num_output_tokens == 4) == (kind is None)

    run_async(story())


def test_a_right_answer_is_timed(serving: Serving, run_async: RunAsync) -> None:
    async def story() -> None:
        async with serving() as server:
            client = CompletionsClient(Target.parse(server.base_url), model="m", api_key="sk-1", extra={"top_k": 5})
            due_s = time.monotonic() - 2.0
            outcome = await client.complete([300, 301], 6, due_s=due_s)
            assert outcome.error is None
            assert outcome.ttft_s is not None
            assert 2.0 <= outcome.send_lag_s <= outcome.ttft_s <= outcome.e2e_s, "lateness counts"
            assert len(outcome.gaps_s) == 5
            assert outcome.num_cached_tokens == 16
            body = server.bodies[0]
            assert body["prompt"] == [300, 301]
            assert (body["max_tokens"], body["ignore_eos"], body["stream"], body["top_k"]) == (6, True, True, 5)
            assert body["stream_options"] == {"include_usage": True}
            assert server.authorizations == ["Bearer sk-1"]

    run_async(story())


def test_an_open_loop_does_not_wait_for_answers(run_async: RunAsync) -> None:
    async def story() -> None:
        all_sent = asyncio.Event()
        due: list[float] = []

        async def send(_index: int, due_s: float) -> Outcome:
            due.append(due_s)
            if len(due) == 5:
                all_sent.set()
            await all_sent.wait()  # nobody is answered before everybody has been sent
            return Outcome(due_s)

        outcomes = await open_loop(send, [0.0, 0.001, 0.002, 0.003, 0.004], max_in_flight=10)
        assert len(outcomes) == 5
        assert [round(b - a, 6) for a, b in pairwise(due)] == [0.001] * 4

    run_async(story())


def test_an_open_loop_is_bounded_and_says_what_it_did_not_send(run_async: RunAsync) -> None:
    async def story() -> None:
        release = asyncio.Event()

        async def send(_index: int, due_s: float) -> Outcome:
            await release.wait()
            return Outcome(due_s)

        arrivals_s = [0.0, 0.0, 0.0, 0.0, 0.02]
        asyncio.get_running_loop().call_later(0.01, release.set)
        outcomes = await open_loop(send, arrivals_s, max_in_flight=2)
        assert sorted(outcome.error or "" for outcome in outcomes) == ["", "", "", "not_sent", "not_sent"]

    run_async(story())


def test_a_closed_loop_keeps_its_clients_busy_and_no_more(serving: Serving, run_async: RunAsync) -> None:
    async def story() -> None:
        async with serving() as server:
            client = CompletionsClient(Target.parse(server.base_url), model="m")
            outcomes = await closed_loop(
                lambda index, due_s: client.complete([300 + index], 3, due_s=due_s),
                concurrency=4,
                duration_s=20,
                max_requests=30,
            )
            assert len(outcomes) == 30
            assert server.most_open <= 4
            assert sorted(body["prompt"][0] for body in server.bodies) == list(range(300, 330))

    run_async(story())


def test_a_run_reports_what_the_issue_of_figures_needs(serving: Serving, run_async: RunAsync) -> None:
    async def story() -> None:
        async with serving({3: "busy", 4: "short"}) as server:
            arguments = ["--base-url", server.base_url, "--rate", "200", "--duration", "0.2", "--requests", "8"]
            arguments += ["--seed", "5", "--warmup", "1", "--output-tokens", "4"]
            report, outcomes = await run(parse(arguments))
            assert len(outcomes) == report.requests == 8
            assert report.errors == 2
            assert report.errors_by_kind == {"http_429": 1, "wrong_token_count": 1}
            figures = report.to_json()
            for key in ("ttft_s", "itl_s", "e2e_s"):
                quantiles = figures[key]
                assert isinstance(quantiles, dict)
                assert set(quantiles) == {"p50", "p95", "p99"}
                assert all(value > 0 for value in quantiles.values())
            assert {"requests", "errors", "requests_per_s", "output_tokens_per_s"} <= set(figures)
            assert report.output_tokens_per_s == pytest.approx(4 * report.requests_per_s)
            assert report.cached_tokens_per_request == 16
            assert report.parameters["model"] == "fake-model"
            warm_up, *measured = (body["prompt"] for body in server.bodies)
            assert all(len(prompt) == 512 for prompt in measured)
            assert all(prompt[:480] == warm_up[:480] for prompt in measured), "the warm-up primes the prefix"
            assert "http_429: 1" in report.table()

    run_async(story())


def test_equal_seeds_ask_the_same_questions_at_the_same_times(serving: Serving, run_async: RunAsync) -> None:
    async def story() -> None:
        asked = []
        for seed in ("5", "5", "6"):
            async with serving() as server:
                arguments = ["--base-url", server.base_url, "--rate", "100", "--duration", "0.1", "--seed", seed]
                _, outcomes = await run(parse([*arguments, "--shape", "fresh", "--output-tokens", "2"]))
                offsets = sorted(round(o.due_s - outcomes[0].due_s, 6) for o in outcomes)
                asked.append((sorted(body["prompt"] for body in server.bodies), offsets))
        assert asked[0] == asked[1]
        assert asked[0] != asked[2]

    run_async(story())


def test_a_server_that_fails_the_warm_up_is_not_measured(serving: Serving, run_async: RunAsync) -> None:
    async def story() -> None:
        async with serving("busy") as server:
            with pytest.raises(LoadError, match="http_429"):
                await run(parse(["--base-url", server.base_url, "--rate", "1"]))

    run_async(story())


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--rate", "1", "--concurrency", "1"],
        ["--rate", "0"],
        ["--rate", "nan"],
        ["--rate", "1", "--duration", "1e9"],
        ["--rate", "1", "--base-url", "http://example.com"],
        ["--rate", "1", "--base-url", "nonsense"],
        ["--rate", "1", "--prompt-tokens", "10", "--shared-prefix-tokens", "10"],
        ["--rate", "1", "--token-ids", "9:9"],
        ["--rate", "1", "--extra-body", "[]"],
    ],
)
def test_options_that_make_no_sense_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(arguments)
    assert caught.value.code == 2
    assert "error" in capsys.readouterr().err


def test_another_machine_is_measured_only_on_demand() -> None:
    assert parse(["--rate", "1", "--base-url", "http://example.com", "--allow-remote"]).target.host == "example.com"


def test_nobody_there_is_one_line_and_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--base-url", "http://127.0.0.1:9", "--rate", "1"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("bench.load: the server does not say which models it has")
    assert message.count("\n") == 1


def test_figures_and_picture_are_written(
    serving: Serving, run_async: RunAsync, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def story() -> None:
        async with serving({5: "cut"}) as server:
            arguments = ["--base-url", server.base_url, "--concurrency", "3", "--requests", "20", "--duration", "5"]
            arguments += ["--shape", "fresh", "--output-tokens", "5", "--json", str(tmp_path / "found.json")]
            assert await asyncio.to_thread(main, arguments) == 0

    run_async(story())
    figures = json.loads((tmp_path / "found.json").read_text())
    assert (figures["requests"], figures["errors"]) == (20, 1)
    assert figures["machine"]["num_cpus"] >= 1
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
    assert "time to first token" in capsys.readouterr().out
