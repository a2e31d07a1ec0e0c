"""The command, as far as it needs no model of true width; and our own worker on a small one."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.peers.__main__ import main
from bench.peers.contenders import CONTENDERS, Entry
from bench.peers.launch import Launcher
from bench.peers.protocol import VOCAB_SIZE
from bench.peers.results import Plan, Row
from bench.peers.rounds import Fleet, measure
from mixtral_serve.model.shape import ModelShape
from mixtral_serve.model.synthetic import write_synthetic_checkpoint

SHAPE = ModelShape(
    vocab_size=VOCAB_SIZE,
    hidden_size=64,
    intermediate_size=64,
    num_layers=1,
    num_query_heads=2,
    num_kv_heads=1,
    head_dim=32,
    num_experts=4,
    num_experts_per_token=2,
    max_model_len=2048,
)
PLAN = Plan((Row("decode", 1), Row("decode", 4), Row("prefill", 40)), 2, context=17, seconds=0.05)


def launcher(entry: Entry, directory: Path) -> Launcher:
    return Launcher(
        [entry],
        PLAN,
        checkpoint=directory / "small",
        environments=directory / "environments",
        logs=directory / "logs",
        num_threads=1,
        patience_s=120.0,
    )


def test_an_unknown_contender_ends_the_command_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--only", "tgi", "--work-dir", str(tmp_path / "work")]) == 2
    assert "no contender is called 'tgi'" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("arguments", [["--batches", "1,0"], ["--batches", "a"], ["--rounds", "0"]])
def test_sizes_that_make_no_sense_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)


@pytest.mark.parametrize("entry", [entry for entry in CONTENDERS if not entry.is_ours], ids=lambda entry: entry.name)
def test_a_peer_that_is_not_installed_says_how_to(entry: Entry, tmp_path: Path) -> None:
    reason = launcher(entry, tmp_path).prepare(entry, SHAPE, 10**12)
    assert reason == f"not installed: python -m bench.peers.setup {entry.environment}"


def test_a_conversion_that_fails_is_the_reason_with_its_last_line(tmp_path: Path) -> None:
    entry = next(entry for entry in CONTENDERS if entry.worker == "llama_cpp")
    python = tmp_path / "environments" / str(entry.environment) / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho starting\necho no room on disk\nexit 9\n")
    python.chmod(0o755)
    assert launcher(entry, tmp_path).prepare(entry, SHAPE, 10**12) == "failed: conversion: no room on disk"


def test_a_conversion_that_would_not_fit_into_memory_is_not_begun(tmp_path: Path) -> None:
    entry = next(entry for entry in CONTENDERS if entry.worker == "openvino_genai")
    python = tmp_path / "environments" / str(entry.environment) / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    need = entry.converter_bytes(SHAPE)
    reason = launcher(entry, tmp_path).prepare(entry, SHAPE, need - 1)
    assert reason is not None
    assert reason.startswith("not converted: needs about ")
    assert not (tmp_path / "logs").exists()


@pytest.mark.slow
def test_our_own_worker_is_measured_in_every_row(tmp_path: Path) -> None:
    write_synthetic_checkpoint(tmp_path / "small", SHAPE)
    entry = Entry("ours fp32", "ours", "fp32", 4)
    starting = launcher(entry, tmp_path)
    assert starting.prepare(entry, SHAPE, 10**12) is None
    fleet = Fleet(starting.start, frozenset({entry.name}))
    try:
        results = measure(PLAN, [entry.name], fleet, read_bandwidth=lambda: 1.0)
    finally:
        fleet.close()
    assert not results.failures
    assert not results.row_failures
    for row in PLAN.rows:
        assert [sample.round for sample in results.samples[entry.name, row]] == [0, 1]
        assert (results.tokens_per_s(entry.name, row) or 0) > 1
    assert "fp32" in results.facts[entry.name]["details"]["fingerprint"]


@pytest.mark.slow
def test_weights_that_do_not_exist_are_not_available(tmp_path: Path) -> None:
    entry = Entry("ours int2", "ours", "int2", 0.3)
    results = measure(PLAN, [entry.name], Fleet(launcher(entry, tmp_path).start, frozenset()), read_bandwidth=float)
    assert results.failures[entry.name].startswith("not available: there are no int2 weights, only ")
