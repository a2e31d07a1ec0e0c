"""The measurement of a scheduler step: that it runs, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.scheduler_step import main, measure_steps


def test_every_measured_step_has_everybody_decoding() -> None:
    durations_s = measure_steps(num_running=5, num_waiting=7, num_steps=40)
    assert len(durations_s) == 40
    assert min(durations_s) > 0


def test_the_figures_are_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new folder" / "step.json"
    assert main(["--running", "3", "--waiting", "9", "--steps", "5", "--no-table", "--json", str(file)]) == 0
    figures: dict[str, Any] = json.loads(file.read_text("utf-8"))
    assert set(figures["step_s"]) == {"p50", "p95", "p99"}
    assert (figures["running"], figures["waiting"], figures["growth"]) == (3, 9, [])
    assert "3 running, 9 waiting" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [["--running", "0"], ["--steps", "0"], ["--waiting", "-1"]])
def test_nonsense_is_refused(wrong: list[str]) -> None:
    with pytest.raises(SystemExit):
        main(wrong)
