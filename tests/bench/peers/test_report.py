"""What comes out: ratios, the table, the figures, the picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.peers.chart import draw
from bench.peers.contenders import Entry
from bench.peers.report import figures, table
from bench.peers.results import Plan, Results, Row, Sample

ONE, PROMPT = Row("decode", 1), Row("prefill", 512)
PLAN = Plan((ONE, PROMPT), 3, context=17, seconds=2.0)
OURS = Entry("mixtral-serve int4", "ours", "int4", 0.6)
INT8 = Entry("mixtral-serve int8", "ours", "int8", 1.1)
PEER = Entry("llama.cpp Q4_0", "llama_cpp", "Q4_0", 0.6, "llama")
ABSENT = Entry("vLLM bf16", "vllm_cpu", "bf16", 2.0, "vllm")
ENTRIES = (OURS, INT8, PEER, ABSENT)


@pytest.fixture
def results() -> Results:
    """Ours twice as fast in each of three rounds, while the machine becomes four times slower; int8 failed."""
    found = Results(bandwidth=[30e9, 20e9, 25e9])
    for number, speed in enumerate((100.0, 50.0, 25.0)):
        found.samples.setdefault((OURS.name, ONE), []).append(Sample(number, 10 / speed, 10))
        found.samples.setdefault((PEER.name, ONE), []).append(Sample(number, 20 / speed, 10))
    found.samples[PEER.name, PROMPT] = [Sample(0, 4.0, 512)]
    found.row_failures[OURS.name, PROMPT] = "failed: MemoryError"
    found.failures[ABSENT.name] = "not installed: python -m bench.peers.setup vllm"
    found.failures[INT8.name] = "failed: ImportError: no"
    found.facts[PEER.name] = {"version": "llama-cpp-python 1", "details": {"threads": 2}}
    found.resident_bytes[PEER.name] = 5
    return found


def test_a_ratio_is_taken_within_rounds(results: Results) -> None:
    # A round that only one of them has does not count.
    results.samples[PEER.name, ONE].append(Sample(3, 0.001, 10))
    assert results.ratio(OURS.name, PEER.name, ONE) == pytest.approx(2.0)
    assert results.ratio(PEER.name, OURS.name, ONE) == pytest.approx(0.5)
    assert results.ratio(OURS.name, PEER.name, PROMPT) is None
    assert results.tokens_per_s(OURS.name, ONE) == pytest.approx(50.0)
    assert results.tokens_per_s(ABSENT.name, ONE) is None


def test_the_reason_of_one_who_failed_in_every_row_is_that_of_a_row() -> None:
    found = Results(row_failures={("a", ONE): "failed: first"})
    assert found.reason("a") == "failed: first"
    assert found.reason("b") == "not measured"


def test_the_table_shows_speeds_ratios_and_reasons(results: Results) -> None:
    lines = table(PLAN, ENTRIES, results).splitlines()
    assert lines[0].split() == ["tokens", "per", "second", "batch", "1", "prefill", "512"]
    assert lines[1].split() == ["mixtral-serve", "int4", "50.0", "failed"]
    assert lines[2] == "mixtral-serve int8      failed: ImportError: no"
    assert lines[3].split() == ["llama.cpp", "Q4_0", "25.0", "128.0"]
    assert lines[4].endswith("not installed: python -m bench.peers.setup vllm")
    start = lines.index(next(line for line in lines if line.startswith("mixtral-serve int4 to")))
    assert lines[start + 1].split() == ["llama.cpp", "Q4_0", "2.00x", "-"]
    assert "mixtral-serve int8 to" not in "\n".join(lines)
    assert "plain read of memory: 25.0 GB/s" in lines
    assert lines[-1] == "mixtral-serve int4, prefill 512: failed: MemoryError"
    results.failures[PEER.name] = "failed: killed by SIGKILL"
    assert table(PLAN, ENTRIES, results).splitlines()[-1] == "llama.cpp Q4_0, later: failed: killed by SIGKILL"


def test_the_figures_hold_every_round_and_survive_json(results: Results) -> None:
    found = json.loads(json.dumps(figures(PLAN, ENTRIES, results)))
    decode, prefill = found["rows"]
    assert (decode["row"], decode["kind"], decode["size"]) == ("batch 1", "decode", 1)
    ours = decode["measured"][OURS.name]
    assert ours["tokens_per_s"] == pytest.approx(50.0)
    assert [one["tokens_per_s"] for one in ours["rounds"]] == pytest.approx([100.0, 50.0, 25.0])
    assert decode["ratios"] == {OURS.name: {PEER.name: pytest.approx(2.0)}, INT8.name: {}}
    assert prefill["failed"] == {OURS.name: "failed: MemoryError"}
    by_name = {entry["name"]: entry for entry in found["contenders"]}
    assert by_name[PEER.name]["version"] == "llama-cpp-python 1"
    assert by_name[PEER.name]["missing_because"] is None
    assert by_name[ABSENT.name]["missing_because"].startswith("not installed")
    assert found["read_bandwidth_bytes_per_s"]["median"] == 25e9


def test_the_picture_is_a_png_even_of_nothing(results: Results, tmp_path: Path) -> None:
    for name, found in (("all", results), ("nothing", Results())):
        path = tmp_path / f"{name}.png"
        draw(path, PLAN, ENTRIES, found, title="two layers")
        assert path.read_bytes().startswith(b"\x89PNG")
