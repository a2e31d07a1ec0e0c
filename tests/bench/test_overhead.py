"""The measurement of what serving costs: its arithmetic, and that it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.live_streams import OverheadError, Phase, StepRecorder, compare, measure_live_streams
from bench.outside_forward import PARTS, SAMPLINGS, measure_outside_forward
from bench.overhead import main
from mixtral_serve.engine.messages import Delta, EngineStats, StepTiming, Tick
from mixtral_serve.model.synthetic import DEMO_SIZED, write_synthetic_checkpoint


def phase(step_s: float, num_steps: int = 9) -> Phase:
    return Phase([step_s * 0.9] * num_steps, [step_s] * num_steps, [step_s * 1.1] * num_steps, 0.001)


def test_each_phase_with_streams_is_compared_with_its_neighbours() -> None:
    # The machine becomes slower all the time; streams cost a tenth.
    found = compare([phase(1.0), phase(1.5 * 1.1), phase(2.0), phase(2.5 * 1.1), phase(3.0)])
    assert found.ratio == found.run_ratio == found.period_ratio == pytest.approx(1.1)
    assert found.ratios == pytest.approx((1.1, 1.1))
    assert (found.step_alone_s, found.step_streams_s) == pytest.approx((2.0, 2.2))
    assert found.num_steps == 45


def tick(num_tokens: int, num_slices: int, *ends: str, timed: bool = True) -> Tick:
    deltas = tuple(Delta(request_id=f"r{i}", finish_reason=reason) for i, reason in enumerate(ends))
    timing = StepTiming(1, num_tokens, num_slices, schedule_s=0.1, run_s=0.5, total_s=0.7)
    return Tick(deltas=deltas, stats=EngineStats(), timing=timing if timed else None)


def test_only_steps_in_which_all_decode_are_counted() -> None:
    recorder = StepRecorder(num_running=4)
    for at_s, seen in enumerate(
        [tick(64, 4), tick(4, 4), tick(4, 4), tick(3, 3), tick(0, 0, timed=False), tick(4, 4), tick(4, 1)]
    ):
        recorder.on_tick(seen, float(at_s))
    assert recorder.phase.step_s == [0.7] * 3
    assert recorder.phase.run_s == [0.5] * 3
    assert recorder.phase.period_s == [1.0], "between neighbours only"


def test_requests_that_do_not_end_as_asked_are_failures() -> None:
    recorder = StepRecorder(num_running=4)
    recorder.on_tick(tick(4, 4, "length", "error", "cancelled"), 0.0)
    assert recorder.num_failed == 2


@pytest.mark.parametrize("name", SAMPLINGS)
def test_every_part_outside_the_forward_is_measured(name: str) -> None:
    cost = measure_outside_forward(4, 10, SAMPLINGS[name])
    assert tuple(cost.parts_s) == PARTS
    assert all(value > 0 for value in cost.parts_s.values())
    assert cost.total_s == pytest.approx(sum(cost.parts_s.values()), rel=0.5)


def test_the_command_prints_a_table_and_writes_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "overhead.json"
    assert main(["--running", "2", "--steps", "5", "--skip-streams", "--threads", "1", "--json", str(path)]) == 0
    found: dict[str, Any] = json.loads(path.read_text())
    assert found["outside_forward_s"] > 0
    assert set(found["parts_s"]) == set(SAMPLINGS)
    assert found["parameters"]["running"] == 2
    assert "outside the forward, 2 running" in capsys.readouterr().out


@pytest.mark.slow
def test_steps_are_compared_with_and_without_live_streams(tmp_path: Path, run_async: Any) -> None:
    async def story() -> None:
        write_synthetic_checkpoint(tmp_path / "random", DEMO_SIZED)
        found = await measure_live_streams(tmp_path / "random", num_running=4, rounds=1, output_tokens=40, threads=1)
        assert found.ratio > 0
        assert found.num_steps > 3 * 8
        assert len(found.ratios) == 1
        assert 0 < found.step_alone_s < 5

    run_async(story())


@pytest.mark.slow
def test_an_engine_that_cannot_start_is_one_line(tmp_path: Path, run_async: Any) -> None:
    async def story() -> None:
        write_synthetic_checkpoint(tmp_path / "random", DEMO_SIZED)
        (tmp_path / "random" / "model.safetensors").unlink()
        with pytest.raises(OverheadError, match="did not start: code 78"):
            await measure_live_streams(tmp_path / "random", num_running=4, rounds=1, output_tokens=9, threads=1)

    run_async(story())
