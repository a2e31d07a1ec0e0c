"""Which backend is taken: what was asked for or nothing, and never the oracle by itself."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import pytest
import torch

from mixtral_serve.kernels import native
from mixtral_serve.kernels.backend import Backend, ExpertsOp, LinearOp
from mixtral_serve.kernels.formats import Kind, PackedMatrix
from mixtral_serve.kernels.names import BackendName
from mixtral_serve.kernels.probe import main as probe
from mixtral_serve.kernels.registry import BACKENDS, KernelsUnavailableError, choose, measure
from mixtral_serve.kernels.torch_backend import TorchBackend

SMALL = (64, 64)
has_native = pytest.mark.skipif(not native.is_available(), reason="the compiled kernels are not installed")
has_fbgemm = pytest.mark.skipif(TorchBackend().missing("int8") is not None, reason="this PyTorch has no FBGEMM")


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("name", sorted(BACKENDS))
def test_what_is_asked_for_is_taken_or_refused(kind, name) -> None:
    missing = BACKENDS[name]().missing(kind)
    if missing is None:
        assert choose(kind, name).name == name
    else:
        with pytest.raises(KernelsUnavailableError) as caught:
            choose(kind, name)
        assert str(caught.value) == f"kernels = {name}, weights = {kind}: {missing}"


def test_int4_on_torch_is_refused_with_what_to_install() -> None:
    with pytest.raises(KernelsUnavailableError, match=r"install a C\+\+ compiler \(g\+\+\)"):
        choose("int4", "torch")


@has_native
@has_fbgemm
def test_where_several_can_they_are_measured_and_one_line_says_so(caplog) -> None:
    with caplog.at_level(logging.INFO, logger="mixtral_serve.kernels"):
        chosen = choose("int8", dims=SMALL)
    (line,) = [record.message for record in caplog.records]
    assert chosen.name in ("native", "torch")
    assert line.startswith(f"kernels: {chosen.label} for int8 weights; ms for 1 and 16 rows times 64 x 64: native ")
    assert ", torch " in line


class Clock:
    """Seconds that pass only where somebody lets them."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def lasting(clock: Clock, seconds: float) -> LinearOp:
    """A product that takes so long, and ten times as long in the first call."""
    calls = iter([10.0])

    def multiply(x: torch.Tensor) -> torch.Tensor:
        clock.now_s += seconds * x.shape[0] * next(calls, 1.0)
        return x

    return multiply


class FakeBackend:
    """As fast as is said, or missing something."""

    is_row_invariant = False

    def __init__(
        self, name: BackendName, *, clock: Clock | None = None, seconds: float = 0.0, missing: str | None = None
    ) -> None:
        self.name = name
        self._clock, self._seconds = clock or Clock(), seconds
        self._missing = missing

    @property
    def label(self) -> str:
        return self.name

    def missing(self, _: Kind) -> str | None:
        return self._missing

    def linear(self, _: PackedMatrix) -> LinearOp:
        return lasting(self._clock, self._seconds)

    def experts(self, *_: PackedMatrix) -> ExpertsOp:
        raise AssertionError("nobody measures experts")


def among(*fakes: FakeBackend) -> dict[BackendName, Callable[[], Backend]]:
    return {fake.name: lambda fake=fake: fake for fake in fakes}


def test_without_compiled_kernels_int8_falls_back_to_torch_and_one_line_says_so(caplog) -> None:
    backends = among(FakeBackend("native", missing="install a compiler"), FakeBackend("torch"))
    with caplog.at_level(logging.INFO, logger="mixtral_serve.kernels"):
        assert choose("int8", dims=SMALL, backends=backends).name == "torch"
    (line,) = [record.message for record in caplog.records]
    assert line == "kernels: torch, the only one for int8 weights here; native cannot: install a compiler"


def test_where_nothing_can_the_refusal_says_what_the_best_backend_misses() -> None:
    backends = among(FakeBackend("native", missing="install a compiler"), FakeBackend("torch", missing="give up"))
    with pytest.raises(KernelsUnavailableError, match=r"^weights = int4: install a compiler$"):
        choose("int4", backends=backends)


@pytest.mark.parametrize(("native_s", "taken"), [(0.0005, "native"), (0.00114, "native"), (0.00116, "torch")])
def test_the_native_kernels_stay_unless_another_is_clearly_faster(native_s: float, taken: str) -> None:
    clock = Clock()
    backends = among(
        FakeBackend("native", clock=clock, seconds=native_s), FakeBackend("torch", clock=clock, seconds=0.001)
    )
    assert choose("int8", dims=SMALL, backends=backends, clock=clock).name == taken


@has_native
def test_int4_is_computed_with_the_native_kernels(caplog) -> None:
    with caplog.at_level(logging.INFO, logger="mixtral_serve.kernels"):
        assert choose("int4", dims=SMALL).name == "native"
    instructions = native.best_isa().name.lower()
    (line,) = [record.message for record in caplog.records]
    assert line == f"kernels: native ({instructions}), the only one for int4 weights here"


def test_of_each_product_the_least_time_counts_and_the_first_call_does_not() -> None:
    clock = Clock()
    operations = [lasting(clock, 0.001), lasting(clock, 0.002)]
    assert measure(operations, 8, clock) == [pytest.approx((0.001, 0.016)), pytest.approx((0.002, 0.032))]


def test_a_slow_machine_is_measured_twice_and_not_longer() -> None:
    clock = Clock()
    measure([lasting(clock, 1.0)], 8, clock)
    assert clock.now_s == pytest.approx((1 + 16) * 2 + 9 * 1)


def test_what_is_measured_are_rows_of_normal_numbers() -> None:
    """How long a product takes may depend on the numbers: AVX2 takes twice as long for 16 rows of ones."""
    seen: list[torch.Tensor] = []

    def record(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return x

    measure([record], 4096, time.perf_counter)
    for x in seen:
        assert torch.allclose(x.std(dim=1), torch.ones(len(x)), atol=0.1)
        assert torch.allclose(x.mean(dim=1), torch.zeros(len(x)), atol=0.1)
    assert {len(x) for x in seen} == {1, 16}


@has_native
def test_the_probe_says_in_one_line_what_would_compute_or_why_nothing_would(capsys) -> None:
    assert probe(["int8", "reference"]) == 0
    assert probe(["int4", "torch"]) == 1
    assert "int4 weights need the compiled kernels" in capsys.readouterr().out
