"""The full-size measurement on a small model: its weights, its grid, the engine around it, and the whole of it."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.full_size.__main__ import main
from bench.full_size.allowance import Allowance
from bench.full_size.engine import EnginePlan, LoadedEngine, build_engine, plan_engine
from bench.full_size.extrapolation import Target
from bench.full_size.figures import figures
from bench.full_size.fixed_costs import measure_fixed_costs
from bench.full_size.grid import measure_grid
from bench.full_size.measurement import measure
from bench.full_size.memory import MemoryWatch
from bench.full_size.points import Blocks, Point, batch_of, points
from bench.full_size.report import table
from bench.full_size.routing import ExpertCounter
from bench.full_size.serving import Wanted
from bench.full_size.synthetic import QUANT_STD, fill_synthetic
from bench.full_size.work import WorkSizes
from mixtral_serve.kernels.formats import Kind, PackedMatrix, dequantize, integers
from mixtral_serve.model.loader import build_empty
from mixtral_serve.model.quantized import hold_packed, packed_places
from mixtral_serve.model.synthetic import DEMO_SIZED
from mixtral_serve.settings import Settings
from scheduler.config import SchedulerConfig
from scheduler.errors import PlanError

KINDS: tuple[Kind, ...] = ("int4", "int8")
SETTINGS = Settings(
    model="mixtral-8x7b",
    weights="int8",
    kernels="torch",
    threads=1,
    max_model_len=1024,
    max_num_seqs=8,
    max_num_batched_tokens=64,
    memory_cap_bytes=4_000_000_000,
    kv_cache_memory_bytes=20_000_000,
)


def small_plan(num_layers: int = 2) -> EnginePlan:
    return plan_engine(SETTINGS, DEMO_SIZED, num_layers)


@pytest.fixture(scope="module")
def engine() -> LoadedEngine:
    return build_engine(small_plan())


# Weights


@pytest.mark.parametrize("kind", KINDS)
def test_synthetic_weights_have_mean_0_and_keep_the_size_of_activations(kind: Kind) -> None:
    matrix = PackedMatrix.empty(kind, 512, 1024, num_matrices=2)
    assert fill_synthetic([("model.layers.0.block_sparse_moe.experts.w1", matrix)])
    for one in (matrix[0], matrix[1]):
        values = integers(one).double()
        assert abs(values.mean().item()) < 0.02 * QUANT_STD[kind]
        assert values.std().item() == pytest.approx(QUANT_STD[kind], rel=0.01)
        assert (dequantize(one).std() * 1024**0.5).item() == pytest.approx(1.0, rel=0.03)
    assert not torch.equal(matrix.quants[0], matrix.quants[1])


def test_weights_with_padding_are_refused() -> None:
    with pytest.raises(ValueError, match=r"lm_head \[100, 64\] has padding"):
        fill_synthetic([("lm_head", PackedMatrix.empty("int8", 100, 64))])


def test_filling_ends_when_the_time_is_over() -> None:
    answers = iter([True, False])
    places = [(name, torch.zeros(8)) for name in ("first", "second", "third")]
    assert not fill_synthetic(places, go_on=lambda: next(answers))
    assert [bool(place.any()) for _, place in places] == [True, False, False]


def test_every_place_of_a_model_is_filled_with_finite_values() -> None:
    model = build_empty(replace(DEMO_SIZED, num_layers=1))
    hold_packed(model, "int4")
    fill_synthetic(packed_places(model))
    for name, place in packed_places(model):
        tensors = (place.quants, place.scales) if isinstance(place, PackedMatrix) else (place,)
        for tensor in tensors:
            assert bool(torch.isfinite(tensor.float()).all()), name
            assert tensor.float().std() > 0, name


# The grid


def test_the_points_are_distinct_and_begin_with_the_most_important() -> None:
    found = list(points())
    assert len(found) == len(set(found)) == len({str(point) for point in found})
    assert found[0] == Point(1, 512)
    standard, fresh = Point(chunk=32, chunk_context=480), Point(chunk=64)
    assert {standard, fresh} <= set(found[:12])
    assert {point.num_decodes for point in found} >= {1, 2, 4, 8, 16, 32, 64}
    assert {point.chunk for point in found} >= {32, 64, 128, 256, 512}
    assert {point.context for point in found} >= {64, 512, 4096}


def test_a_point_becomes_a_step_whose_requests_have_blocks_of_their_own() -> None:
    point = Point(3, 40, 20, 33)
    batch = batch_of(point, Blocks(100, 16), vocab_size=1000)
    assert [(part.start, part.num_tokens) for part in batch.plan.slices] == [(40, 1)] * 3 + [(33, 20)]
    used = [block for part in batch.plan.slices for block in part.block_table]
    assert len(used) == len(set(used)) == point.num_blocks(16) == 3 * 3 + 4
    assert 0 not in used, "the null block is nobody's"
    assert all(len(part.tokens) == part.start + part.num_tokens for part in batch.plan.slices)
    assert len(batch.sampling) == len(batch.plan.slices)


@pytest.mark.parametrize(
    ("point", "reason"),
    [
        (Point(8, 64, 64), "a step has at most 64 tokens"),
        (Point(9, 64), "at most 8 requests run at once"),
        (Point(1, 1024), "a request has at most 1024 tokens"),
        (Point(8, 900), "it takes 456 blocks of KV cache, there are 399"),
        (Point(7, 900), None),
    ],
)
def test_a_step_that_the_engine_could_not_run_is_left_out_with_the_reason(point: Point, reason: str | None) -> None:
    config = SchedulerConfig(num_blocks=400, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=1024)
    assert point.obstacle(config) == reason


@pytest.mark.parametrize(("num_looks", "num_runs"), [(2, [1, 1]), (5, [2, 2, 1]), (99, [7, 7, 7])])
def test_steps_are_measured_in_turns_until_the_time_is_over(
    num_looks: int, num_runs: list[int], engine: LoadedEngine
) -> None:
    counter = ExpertCounter(engine.model, engine.plan.shape)
    config, sizes = engine.plan.config, WorkSizes(engine.plan.shape, "int8", "bf16")
    looks: list[None] = []
    grid = measure_grid(
        engine.runner,
        [Point(2, 50), Point(65, 8), Point(4, 16, 20, 32), Point(chunk=10)],
        config=config,
        counter=counter,
        sizes=sizes,
        is_over=lambda: len(looks) >= num_looks,
        on_step=lambda: looks.append(None),
    )
    assert [one.num_runs for one in grid.measured] == num_runs
    expected = [Point(2, 50), Point(4, 16, 20, 32), Point(chunk=10)]
    assert [one.point for one in grid.measured] == expected[: len(num_runs)]
    reasons = [str(Point(65, 8)), *map(str, expected[len(num_runs) :])]
    assert list(grid.left_out) == reasons
    assert grid.left_out[reasons[0]] == "a step has at most 64 tokens"
    assert set(grid.left_out.values()) <= {"a step has at most 64 tokens", "there was no time left"}
    for one in grid.measured:
        assert 0 < one.least_s <= one.median_s
        assert 2 <= one.touched_experts <= min(8, 2 * one.point.num_rows)
    popularity = counter.popularity()
    assert [len(layer) for layer in popularity.shares] == [8, 8]
    assert [sum(layer) for layer in popularity.shares] == pytest.approx([2.0, 2.0])


@pytest.mark.slow
def test_what_a_step_and_a_layer_cost_in_any_case_is_measured_apart() -> None:
    found = measure_fixed_costs(SETTINGS, DEMO_SIZED, "torch")
    assert 0 <= found.step_s < 1
    assert 0 < found.layer_s < 1


# The engine


def test_the_real_engine_serves_requests_with_synthetic_weights(engine: LoadedEngine) -> None:
    wanted = [Wanted(0.01 * number, list(range(300, 320)), 4) for number in range(3)]
    timings = []
    served = engine.run(wanted, primed=wanted[0], on_step=timings.append)
    assert all(one.is_complete and len(one.token_s) == 4 for one in served)
    assert [one.num_cached_tokens for one in served] == [16, 16, 16]
    assert all(one.ttft_s > 0 for one in served)
    assert timings


def test_fewer_layers_get_the_kv_cache_that_the_grid_needs_and_the_whole_model_what_the_cap_leaves() -> None:
    settings = Settings(model="mixtral-8x7b", weights="int8", memory_cap_bytes=2_000_000_000)
    shape = replace(DEMO_SIZED, max_model_len=32_768)
    part, whole = plan_engine(settings, shape, 1), plan_engine(settings, shape, 4)
    assert part.serving.memory.num_kv_tokens == 64 * (4096 + 16)
    assert not part.is_whole
    assert whole.is_whole
    assert whole.serving.memory.num_kv_tokens > part.serving.memory.num_kv_tokens
    assert part.of_full_model().num_blocks > whole.config.num_blocks, "under the whole cap"


def test_what_does_not_fit_is_refused_with_the_plan() -> None:
    settings = Settings(model="mixtral-8x7b", weights="int8", memory_cap_bytes=500_000_000)
    with pytest.raises(PlanError, match=r"weights \(int8\)"):
        plan_engine(settings, DEMO_SIZED, 4)


def test_memory_is_watched_from_the_files_of_the_kernel(tmp_path: Path) -> None:
    status = tmp_path / "status"

    def now(anon_kb: int, high_kb: int) -> None:
        status.write_text(f"Name:\tx\nVmHWM:\t{high_kb} kB\nRssAnon:\t{anon_kb} kB\nVmData:\t9 kB\n")

    watch = MemoryWatch(status)
    now(100, 200)
    watch.loaded()
    for anon_kb in (300, 250):
        now(anon_kb, 400)
        watch.look()
    peak = watch.peak()
    assert (peak.loaded_anon_bytes, peak.peak_anon_bytes, peak.high_water_bytes) == (102_400, 307_200, 409_600)
    assert peak.num_looks == 3
    assert MemoryWatch(tmp_path / "absent").peak().peak_anon_bytes is None


# The command


def test_a_machine_without_the_memory_gets_the_plan_and_code_78(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--weights", "int4", "--memory-cap-bytes", "20000000000"]) == 78
    said = capsys.readouterr().err
    assert "weights (int4)" in said
    assert "MISSING" in said


@pytest.mark.parametrize(
    "arguments", [["--layers", "33"], ["--weights", "int4", "--kernels", "torch", "--layers", "1"]]
)
def test_what_cannot_be_is_refused_before_anything_is_allocated(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 78
    assert capsys.readouterr().err.startswith("bench.full_size: ")


@pytest.mark.parametrize(
    "arguments", [["--seconds", "5"], ["--layers", "0"], ["--target", "8x80"], ["--weights", "bf16"]]
)
def test_options_out_of_bounds_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.slow
def test_all_stages_run_within_their_time_and_everything_found_is_told() -> None:
    allowance = Allowance(40.0, began_s=time.monotonic())
    plan = plan_engine(
        Settings(
            model="mixtral-8x7b",
            weights="int8",
            kernels="torch",
            threads=1,
            memory_cap_bytes=4_000_000_000,
            kv_cache_memory_bytes=100_000_000,
        ),
        DEMO_SIZED,
        2,
    )
    said: list[str] = []
    found = measure(plan, allowance, targets=[Target.parse("8:80")], seed=1, say=said.append)
    assert allowance.used_s < 40
    assert set(allowance.spent_s) == {"build", "grid", "bursts", "rates", "load"}
    assert found.costs is not None
    assert found.memory is not None
    assert found.memory.peak_anon_bytes is not None
    assert found.memory.peak_anon_bytes > 0
    assert found.confirmation is not None
    assert found.confirmation.measured.num_complete > 0
    for kind in ("standard", "fresh"):
        assert kind in found.capacities or any(f"the rate of {kind}" in line for line in found.cut)
    text = table(found)
    for heading in ("memory", "one step", "cost model", "load of"):
        assert heading in text
    assert "nan" not in text
    assert all(line in text for line in found.cut)
    told = json.loads(json.dumps(figures(found, allowance, {"seed": 1})))
    assert len(told["grid"]) == len(found.grid.measured)
    assert told["grid"][0]["per_layer_s"] == pytest.approx(found.grid.measured[0].median_s / 2)
    assert len(told["whole_model"]["machines"]) == len(found.expected)
    assert told["not_measured"] == found.cut
    assert told["memory"]["cap_bytes"] == 4_000_000_000
    assert told["versions"]["torch"] == torch.__version__
