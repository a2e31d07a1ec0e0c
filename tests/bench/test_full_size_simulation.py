"""The arithmetic of the full-size measurement: time, work, cost, serving on a virtual clock, rates."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.full_size.allowance import ENDS, Allowance, NoTimeError, process_began_s
from bench.full_size.bursts import BURSTS, NUM_OUTPUT_TOKENS, measure_bursts
from bench.full_size.capacity import Load, Tail, capacity, highest_rate, index_of, nth_rate
from bench.full_size.confirmation import Confirmation, confirm
from bench.full_size.cost_model import (
    BANDWIDTH_BOUND,
    CORE_BOUND,
    FITTED,
    OVERLAPS,
    CostModel,
    FixedCosts,
    fit,
    fit_error,
)
from bench.full_size.engine import made_up_words
from bench.full_size.extrapolation import Extrapolator, StepCosts, Target
from bench.full_size.points import Blocks, Point, batch_of
from bench.full_size.routing import Popularity
from bench.full_size.serving import GoOn, Latencies, OnStep, Served, Timepiece, Wanted, serve
from bench.full_size.simulation import PricedRunner, SimulatedEngine
from bench.full_size.work import Work, WorkSizes
from bench.workload import SHAPES, Shape
from mixtral_serve.compose.known_models import KNOWN_MODELS
from mixtral_serve.contract import ModelInfo
from mixtral_serve.engine.core import EngineCore
from mixtral_serve.engine.messages import StepTiming
from scheduler.config import SchedulerConfig
from scheduler.plan import StepPlan
from scheduler.policies import POLICIES
from scheduler.scheduler import Scheduler
from scheduler.sim import VirtualClock

VOCAB = 1000
CONFIG = SchedulerConfig(num_blocks=4000, max_num_seqs=64, max_num_batched_tokens=512, max_model_len=4096)
INFO = ModelInfo("none", "none", VOCAB, 4096, (2,), CONFIG.num_blocks, CONFIG.block_size, 0, 0)
TABLE = made_up_words(VOCAB)

pytestmark = pytest.mark.slow


def simulated(step_s: Callable[[StepPlan], float]) -> SimulatedEngine:
    return SimulatedEngine(CONFIG, INFO, step_s, TABLE)


def a_second(_: StepPlan) -> float:
    return 1.0


def test_what_a_stage_leaves_belongs_to_the_next() -> None:
    clock = VirtualClock(100.0)
    allowance = Allowance(1000.0, began_s=90.0, clock=clock)
    assert allowance.left_s("build") == pytest.approx(ENDS["build"] * 1000 - 10)
    clock.advance(50.0)
    allowance.end("build")
    assert allowance.left_s("grid") == pytest.approx(ENDS["grid"] * 1000 - 60)
    clock.advance(ENDS["grid"] * 1000)
    assert allowance.is_over("grid")
    assert not allowance.is_over("load")
    allowance.end("grid")
    assert allowance.spent_s == {"build": 60.0, "grid": ENDS["grid"] * 1000}
    assert allowance.used_s == pytest.approx(60 + ENDS["grid"] * 1000)


def test_stages_end_one_after_the_other_and_before_the_time_is_over() -> None:
    assert list(ENDS.values()) == sorted(ENDS.values())
    assert max(ENDS.values()) < 1


def test_the_time_counts_from_the_start_of_the_process() -> None:
    first, second = process_began_s(), process_began_s()
    assert first == pytest.approx(second, abs=0.1)
    assert first < Allowance(1.0, began_s=0.0).used_s


def test_tokens_come_at_the_ends_of_steps_and_latency_counts_from_when_a_request_was_due() -> None:
    wanted = [Wanted(0.0, [5] * 10, 3), Wanted(0.5, [6] * 10, 2), Wanted(10.25, [7] * 10, 1)]
    first, second, late = simulated(a_second).run(wanted)
    assert first.token_s == [1.0, 2.0, 3.0]
    assert second.token_s == [2.0, 3.0]
    assert (second.ttft_s, second.gaps_s, second.e2e_s) == (1.5, [1.0], 2.5)
    assert (late.due_s, late.token_s) == (10.25, [11.25])
    found = Latencies.of([first, second, late])
    assert (found.num_complete, found.num_requests, found.e2e_s.p50) == (3, 3, 2.5)


def test_a_run_that_is_stopped_cancels_what_lives_and_leaves_out_what_was_not_due() -> None:
    wanted = [Wanted(0.0, [5] * 10, 2), Wanted(0.0, [6] * 10, 50), Wanted(40.0, [7] * 10, 1)]
    ended, cancelled, never = simulated(a_second).run(wanted, go_on=lambda ended: not ended)
    assert [one.is_complete for one in (ended, cancelled, never)] == [True, False, False]
    assert cancelled.finish_reason == "cancelled"
    assert (never.finish_reason, never.token_s) == (None, [])
    assert Latencies.of([ended, cancelled, never]).num_complete == 1


def test_the_shared_prefix_of_a_primed_engine_is_not_computed_again() -> None:
    rows: list[int] = []

    def note(plan: StepPlan) -> float:
        rows.append(plan.num_tokens)
        return 1.0

    load = Load(SHAPES["standard"], vocab_size=VOCAB, seed=1)
    (served,) = simulated(note).run(load.crowd(1), primed=load.primed)
    assert served.num_cached_tokens == 480
    assert rows[:2] == [512, 1]
    assert rows[32:34] == [32, 1]


def test_the_driver_runs_a_core_whatever_its_clock() -> None:
    clock = VirtualClock(7.0)
    core = EngineCore(
        Scheduler(CONFIG, POLICIES["fcfs"]()), PricedRunner(INFO, clock, lambda _: 0.5), TABLE, clock=clock
    )
    timings = []
    (served,) = serve(core, [Wanted(1.0, [4], 2)], Timepiece(clock, clock.advance_to), on_step=timings.append)
    assert served.token_s == [8.5, 9.0]
    assert [timing.run_s for timing in timings] == [0.5, 0.5]


# Work and its cost

WIDE = KNOWN_MODELS["mixtral-8x7b"]
SIZES = {kind: WorkSizes(WIDE, kind, "bf16") for kind in ("int4", "int8")}


def plan_of(point: Point) -> StepPlan:
    return batch_of(point, Blocks(CONFIG.num_blocks * 16, 16), vocab_size=VOCAB).plan


@pytest.mark.parametrize("kind", SIZES)
def test_a_step_that_touches_all_experts_reads_all_packed_weights(kind: str) -> None:
    work = SIZES[kind].of(plan_of(Point(64, 512)), 8.0)
    unpacked = 2 * WIDE.vocab_size * 4096 + 4 * 4096 * (1 + 32 * (2 + 8))  # embedding; norms and routers
    assert work.weight_bytes == WIDE.weights_bytes(kind) - unpacked


def test_the_work_of_a_step_is_what_its_tokens_and_contexts_say() -> None:
    work = SIZES["int4"].of(plan_of(Point(2, 100, 32, 480)), lambda num_rows: num_rows / 10)
    assert (work.layers, work.sampled) == (32, 3)
    assert work.weight_bytes == 32 * (3.4 * SIZES["int4"].expert_bytes + SIZES["int4"].attention_bytes) + (
        SIZES["int4"].head_bytes
    )
    assert work.kv_bytes == 131_072 * (101 + 101 + 512)
    assert work.pairs == 32 * (2 * 101 + sum(range(481, 513)))
    per_token = 12.9e9 * 2 - 2 * 2 * 32000 * 4096  # operations of 12.9 billion weights, less embedding and head
    assert work.operations == pytest.approx(34 * per_token + 3 * 2 * 32000 * 4096, rel=0.01)


def test_a_batch_touches_experts_as_chance_has_it() -> None:
    even = Popularity.even(32, 8, 2)
    assert [even.touched(n) for n in (1, 4, 8)] == pytest.approx([2, 8 * (1 - 0.75**4), 8 * (1 - 0.75**8)])
    skewed = Popularity([[1.0, 1.0, 0, 0], [0.5] * 4])
    assert skewed.touched(100) == pytest.approx(3.0)
    assert skewed.most_popular == 1.0


def some_works() -> list[Work]:
    points = [Point(batch, context) for batch in (1, 2, 8, 32, 64) for context in (64, 512, 4096)]
    points += [Point(chunk=chunk, chunk_context=context) for chunk in (32, 128, 512) for context in (0, 1024)]
    even = Popularity.even(32, 8, 2)
    return [SIZES["int4"].of(plan_of(point), even.touched) for point in points]


FIXED = FixedCosts(step_s=0.001, layer_s=50e-6)
TRUE = CostModel(FIXED, dict(zip(FITTED, (1 / 150e9, 1 / 2e12, 1 / 100e9, 1e-9, 200e-6), strict=True)), overlap=2.0)


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_a_fit_finds_the_rates_and_the_overlap_that_made_the_times(overlap: float) -> None:
    works, true = some_works(), replace(TRUE, overlap=overlap)
    seconds = [true.seconds(work) for work in works]
    found = fit(works, seconds, FIXED)
    assert found.overlap == overlap
    assert found.seconds_per == pytest.approx(true.seconds_per, rel=0.02)
    assert fit_error(found, works, seconds).worst < 0.002


def test_a_few_points_that_lie_far_off_hardly_move_the_fit() -> None:
    works = some_works()
    seconds = [TRUE.seconds(work) * (2.0 if number % 7 == 3 else 1.0) for number, work in enumerate(works)]
    found = fit(works, seconds, FIXED)
    error = fit_error(found, works, seconds)
    assert error.median < 0.05
    assert error.worst == pytest.approx(0.5, abs=0.1)
    worst = works[error.worst_index], seconds[error.worst_index]
    assert abs(found.seconds(worst[0]) / worst[1] - 1) == error.worst


def test_a_term_that_has_no_share_is_0_and_none_is_negative() -> None:
    works = some_works()
    true = replace(TRUE, seconds_per={**TRUE.seconds_per, "pairs": 0.0, "sampled": 0.0})
    found = fit(works, [true.seconds(work) for work in works], FIXED)
    assert min(found.seconds_per.values()) >= 0
    assert found.seconds_per["pairs"] == 0
    assert found.seconds_per["weight_bytes"] == pytest.approx(1 / 150e9, rel=0.02)


def test_reading_and_computing_take_between_the_larger_of_them_and_their_sum() -> None:
    (work, *_) = some_works()
    nothing = dict.fromkeys(FITTED, 0.0)
    names = ("weight_bytes", "operations")
    parts = [replace(TRUE, seconds_per={**nothing, name: TRUE.seconds_per[name]}) for name in names]
    fixed_s = FIXED.step_s + 32 * FIXED.layer_s
    reading, computing = (part.seconds(work) - fixed_s for part in parts)
    both = replace(TRUE, seconds_per={**nothing, **{name: TRUE.seconds_per[name] for name in names}})
    assert replace(both, overlap=1.0).seconds(work) - fixed_s == pytest.approx(reading + computing)
    assert max(reading, computing) < both.seconds(work) - fixed_s < reading + computing


def test_on_another_machine_reading_scales_with_bandwidth_and_computing_with_cores() -> None:
    scaled = TRUE.scaled(bandwidth=4.0, cores=2.0)
    assert {name for name in FITTED if scaled.seconds_per[name] == TRUE.seconds_per[name] / 4} == set(BANDWIDTH_BOUND)
    assert {name for name in FITTED if scaled.seconds_per[name] == TRUE.seconds_per[name] / 2} == set(CORE_BOUND)
    assert (scaled.fixed, scaled.overlap) == (TRUE.fixed, TRUE.overlap)


# Rates


def test_the_rates_that_two_digits_name_are_numbered_in_their_order() -> None:
    assert [nth_rate(index) for index in (0, 1, 89, 90, 91, -1, -90)] == [1.0, 1.1, 9.9, 10.0, 11.0, 0.99, 0.1]


@given(st.integers(-270, 269), st.floats(0, 0.999))
def test_every_rate_has_the_number_of_the_highest_name_below_it(index: int, share: float) -> None:
    low, high = nth_rate(index), nth_rate(index + 1)
    assert index_of(low) == index
    assert index_of(low + share * 0.99 * (high - low)) == index


@given(st.floats(-2.9, 2.9), st.floats(-2.9, 2.9))
def test_the_highest_rate_is_found_from_wherever_one_begins(threshold: float, first: float) -> None:
    most = 10.0**threshold
    found = highest_rate(lambda rate: Tail(0.1, 1.0 if rate <= most else 2.0), first=10.0**first, limit_s=1.5)
    assert found is not None
    assert found[0] == nth_rate(index_of(most))


def test_where_no_rate_keeps_the_limit_none_is_named() -> None:
    assert highest_rate(lambda _: None, first=1.0, limit_s=1.5) is None


def test_an_engine_whose_step_is_constant_takes_what_its_seats_allow() -> None:
    # 64 seats and 32 steps of 10 ms: 200 requests per second at most, and 0.32 s each while seats are free.
    shape = Shape(prompt_tokens=4, shared_prefix_tokens=0, output_tokens=32)
    found = capacity(simulated(lambda _: 0.01), Load(shape, vocab_size=VOCAB, seed=3), num_requests=300)
    assert found.alone_s == pytest.approx(0.32)
    assert 120 < found.saturated_per_s < 200
    assert found.rate_per_s > 120
    assert found.p95_s is not None
    assert found.p95_s <= 1.5


def test_where_one_request_alone_takes_too_long_the_rate_is_0_and_the_reason_said() -> None:
    shape = Shape(prompt_tokens=4, shared_prefix_tokens=0, output_tokens=32)
    found = capacity(simulated(lambda _: 0.05), Load(shape, vocab_size=VOCAB, seed=3), num_requests=50)
    assert (found.rate_per_s, found.p95_s) == (0.0, None)
    assert found.reason == "one request alone takes 1.60 s"
    assert found.saturated_per_s > 0


def test_where_two_requests_at_once_take_too_long_the_rate_is_that_at_which_they_rarely_meet() -> None:
    shape = Shape(prompt_tokens=4, shared_prefix_tokens=0, output_tokens=32)
    engine = simulated(lambda plan: 0.04 * len(plan.slices))
    found = capacity(engine, Load(shape, vocab_size=VOCAB, seed=3), num_requests=200)
    assert found.alone_s == pytest.approx(1.28)
    assert 0 < found.rate_per_s < 0.2


# Bursts and other machines


class Watched:
    """A simulation in place of the real engine; each run takes so many seconds of ``left_s``."""

    def __init__(self, engine: SimulatedEngine, seconds: float, run_s: float = 0.0) -> None:
        self.engine = engine
        self.left_s = seconds
        self._run_s = run_s

    def run(self, wanted: list[Wanted], *, go_on: GoOn, on_step: OnStep) -> list[Served]:
        self.left_s -= self._run_s
        on_step(StepTiming(0, 1, 1, schedule_s=0.001, run_s=0.01, total_s=0.013))
        return self.engine.run(wanted, go_on=go_on)


def test_bursts_are_measured_beside_their_prediction_and_not_begun_where_time_is_short() -> None:
    slow, fast = simulated(lambda _: 0.02), simulated(lambda _: 0.01)
    watched = Watched(slow, 0.4)
    found = measure_bursts(watched, fast, vocab_size=VOCAB, left_s=lambda: watched.left_s)
    assert len(found.bursts) + len(found.left_out) == len(BURSTS)
    assert found.left_out, "a crowd of long prompts does not fit the time"
    assert all("would take" in reason for reason in found.left_out.values())
    for one in found.bursts:
        assert one.measured.num_complete == one.measured.num_requests >= one.num_requests
        assert one.measured.e2e_s.p50 == pytest.approx(2 * (one.predicted.e2e_s.p50 or math.nan))
    assert NUM_OUTPUT_TOKENS >= 16, "gaps enough for a 95th percentile"


def test_a_burst_that_takes_longer_than_there_is_time_is_no_measurement() -> None:
    engine = simulated(lambda _: 0.01)
    watched = Watched(engine, 10.0, run_s=4.0)
    found = measure_bursts(watched, engine, vocab_size=VOCAB, left_s=lambda: watched.left_s)
    assert not found.bursts, "the first is run three times"
    assert next(iter(found.left_out.values())).endswith("and did not end in time")
    assert found.outside_runner_s == pytest.approx(0.003)


def test_the_search_for_a_rate_is_given_up_when_the_time_is_over() -> None:
    asked: list[None] = []

    def is_over() -> bool:
        asked.append(None)
        return len(asked) > 500

    load = Load(SHAPES["fresh"], vocab_size=VOCAB, seed=1)
    with pytest.raises(NoTimeError):
        capacity(simulated(lambda _: 0.01), load, num_requests=50, is_over=is_over)
    assert len(asked) < 600, "it is asked between steps"


class Loaded(Watched):
    """In place of the real engine, under load: time passes as the steps say, until there is none left."""

    def run(self, wanted: list[Wanted], *, primed: Wanted, go_on: GoOn, on_step: OnStep) -> list[Served]:
        on_step(StepTiming(0, 1, 1, schedule_s=0.0, run_s=0.0, total_s=0.0))
        return self.engine.run(wanted, primed=primed, go_on=go_on)


def test_a_load_is_predicted_for_the_very_requests_that_were_measured() -> None:
    engine = Loaded(simulated(lambda _: 0.02), 20.0)
    load = Load(SHAPES["standard"], vocab_size=VOCAB, seed=1)
    found = confirm(
        engine, simulated(lambda _: 0.01), load, kind="standard", rate_per_s=5.0, left_s=lambda: engine.left_s
    )
    assert isinstance(found, Confirmation)
    assert 50 < found.measured.num_complete == found.predicted.num_complete
    assert found.num_cut == 0
    assert found.measured.e2e_s.p50 == pytest.approx(0.64 + 0.01, abs=0.02), "a request waits for the step before it"
    assert found.predicted.e2e_s.p50 == pytest.approx(0.32 + 0.005, abs=0.01)


def test_requests_that_were_not_answered_when_the_time_was_over_are_counted() -> None:
    steps: list[None] = []

    def half_a_second(_: StepPlan) -> float:
        steps.append(None)
        return 0.5

    engine = Loaded(simulated(half_a_second), 20.0)
    load = Load(SHAPES["fresh"], vocab_size=VOCAB, seed=1)
    found = confirm(
        engine,
        simulated(lambda _: 0.01),
        load,
        kind="fresh",
        rate_per_s=2.0,
        left_s=lambda: engine.left_s if len(steps) < 60 else 0.0,
    )
    assert isinstance(found, Confirmation)
    assert 0 < found.num_cut == found.measured.num_requests - found.measured.num_complete


def test_a_load_ends_when_enough_requests_came() -> None:
    """What is predicted of them is found after the load, and must not take long."""
    engine = Loaded(simulated(lambda _: 0.01), 1000.0)
    load = Load(SHAPES["fresh"], vocab_size=VOCAB, seed=1)
    found = confirm(
        engine, simulated(lambda _: 0.01), load, kind="fresh", rate_per_s=20.0, left_s=lambda: engine.left_s
    )
    assert isinstance(found, Confirmation)
    assert found.duration_s == 20.0
    assert 300 < found.predicted.num_requests < 500


def test_a_load_that_there_is_no_time_for_is_not_begun() -> None:
    engine = Loaded(simulated(a_second), 3.0)
    load = Load(SHAPES["fresh"], vocab_size=VOCAB, seed=1)
    found = confirm(engine, simulated(lambda _: 0.01), load, kind="fresh", rate_per_s=1.0, left_s=lambda: engine.left_s)
    assert found == "3 s were left, too few for 5 fresh requests"


@pytest.mark.parametrize("text", ["8", "0:10", "8:0", "8:x", "8:10 ", "-1:5", "8:1e3"])
def test_a_target_is_cores_and_bandwidth(text: str) -> None:
    with pytest.raises(ValueError, match="is not CORES:GIGABYTES_PER_SECOND"):
        Target.parse(text)


def test_the_measured_machine_extrapolates_to_itself_and_a_faster_one_is_faster() -> None:
    costs = StepCosts(TRUE, SIZES["int4"], Popularity.even(32, 8, 2), 0.001)
    extrapolator = Extrapolator(costs, CONFIG, INFO, TABLE, num_threads=4, bandwidth_bytes_per_s=50e9)
    load = Load(Shape(prompt_tokens=8, shared_prefix_tokens=0, output_tokens=8), vocab_size=VOCAB, seed=1)
    here = extrapolator.at(extrapolator.here, {"small": load}, num_requests=20)
    assert here.decode_s[8] == pytest.approx(
        TRUE.seconds(SIZES["int4"].of(plan_of(Point(8, 512)), costs.popularity.touched))
    )
    faster = extrapolator.at(Target.parse("8:100"), {"small": load}, num_requests=20)
    fixed_s = FIXED.step_s + 32 * FIXED.layer_s
    for batch, seconds in here.decode_s.items():
        assert faster.decode_s[batch] == pytest.approx((seconds - fixed_s) / 2 + fixed_s)
    assert faster.capacities["small"].rate_per_s > here.capacities["small"].rate_per_s
    hurried = extrapolator.at(extrapolator.here, {"small": load}, num_requests=20, is_over=lambda: True)
    assert (hurried.decode_s, hurried.capacities) == (here.decode_s, {})
