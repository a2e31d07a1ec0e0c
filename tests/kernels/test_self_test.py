"""An instruction set that computes something else than portable C++ on this CPU is not used, and a warning says so."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mixtral_serve.compose.doctor import Finding, kernels_finding
from mixtral_serve.kernels import native
from mixtral_serve.kernels.names import EXIT_LESSER_INSTRUCTIONS
from mixtral_serve.kernels.native import Isa, active_isa, best_isa, limited_to, trust
from mixtral_serve.kernels.probe import main as probe
from mixtral_serve.kernels.self_test import best_passing, failed_kernels
from mixtral_serve.kernels.trials import Trial, all_trials

pytestmark = pytest.mark.skipif(not native.is_available(), reason="the compiled kernels were not built")
is_portable_only = native.is_available() and best_isa() is Isa.PORTABLE


@pytest.fixture(autouse=True)
def _trust_again() -> Iterator[None]:
    yield
    trust(max(Isa))


def wrong_on(*isas: Isa, kernel: str = "linear_int8") -> Trial:
    """A kernel that is off by the last bit of one number where these instructions compute."""
    right = torch.linspace(-1, 1, 100)
    wrong = right.clone()
    wrong[99] = torch.nextafter(right[99], torch.tensor(2.0))
    return Trial(kernel, lambda: [torch.ones(3), wrong if active_isa() in isas else right])


def test_every_instruction_set_of_this_cpu_computes_what_portable_code_does(caplog: pytest.LogCaptureFixture) -> None:
    best = best_isa()
    for isa in Isa:
        if isa <= best:
            assert failed_kernels(isa, all_trials()) == []
    with caplog.at_level(logging.INFO, logger="mixtral_serve.kernels"):
        assert best_passing() is best
    assert best_isa() is active_isa() is best
    assert [record.levelno for record in caplog.records] == [logging.INFO] * (best > Isa.PORTABLE)


@pytest.mark.skipif(is_portable_only, reason="this CPU has nothing else")
def test_a_set_that_computes_otherwise_is_not_used_any_more_and_a_warning_says_which_kernels(
    caplog: pytest.LogCaptureFixture,
) -> None:
    best = best_isa()
    lesser = Isa(best - 1)
    trials = [wrong_on(best), wrong_on(), wrong_on(best, kernel="route"), wrong_on(best)]
    with caplog.at_level(logging.WARNING, logger="mixtral_serve.kernels"):
        assert best_passing(lambda: trials) is lesser
    assert best_isa() is active_isa() is lesser
    (line,) = caplog.messages
    assert line == (
        f"self-test: {best.name.lower()} does not compute on this CPU what portable C++ does (linear_int8, route): "
        f"it is not used, {lesser.name.lower()} is next"
    )
    with limited_to(best):
        assert active_isa() is lesser, "asking for it does not bring it back"
    assert active_isa() is lesser


def test_where_every_set_computes_otherwise_portable_code_is_left(caplog: pytest.LogCaptureFixture) -> None:
    best = best_isa()
    with caplog.at_level(logging.WARNING, logger="mixtral_serve.kernels"):
        assert best_passing(lambda: [wrong_on(*(isa for isa in Isa if isa > Isa.PORTABLE))]) is Isa.PORTABLE
    assert active_isa() is Isa.PORTABLE
    assert len(caplog.messages) == best


def test_portable_code_is_not_put_on_trial() -> None:
    def no_trials() -> Iterator[Trial]:
        raise AssertionError("nothing to compare with")

    trust(Isa.PORTABLE)
    assert best_passing(no_trials) is Isa.PORTABLE


def test_numbers_that_are_not_finite_are_compared_by_their_bits() -> None:
    same = Trial("route", lambda: [torch.tensor([torch.nan, torch.inf])])
    other = Trial("route", lambda: [torch.tensor([0.0 if active_isa() is Isa.PORTABLE else -0.0])])
    assert failed_kernels(best_isa(), [same]) == []
    assert failed_kernels(best_isa(), [other]) == (["route"] if best_isa() > Isa.PORTABLE else [])


def test_all_kernels_are_tried_on_numbers_that_do_not_change() -> None:
    seen = set()
    for trial in all_trials():
        seen.add(trial.kernel)
        first, again = trial.compute(), trial.compute()
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
        assert all(bool(torch.isfinite(tensor).all()) for tensor in first)
        assert any(bool((tensor != tensor.flatten()[0]).any()) for tensor in first), "not all alike"
    kinds = ("int8", "int4")
    assert seen == {
        *(f"{name}_{kind}" for name in ("linear", "experts", "quantize") for kind in kinds),
        *("rms_norm", "route", "paged_attention", "chunk_maxima", "finite_rows", "choose_tokens"),
    }


def test_products_are_tried_with_blocks_of_all_sizes() -> None:
    for kind in ("int8", "int4"):
        trials = [trial for trial in all_trials() if trial.kernel == f"linear_{kind}"]
        assert {len(result) for trial in trials for result in trial.compute()} >= set(range(1, 34))


def test_a_limit_inside_another_ends_where_it_began() -> None:
    with limited_to(Isa.PORTABLE):
        assert failed_kernels(best_isa(), [wrong_on()]) == []
        assert active_isa() is Isa.PORTABLE
        with limited_to(best_isa()):
            assert active_isa() is best_isa()
        assert active_isa() is Isa.PORTABLE
    assert active_isa() is best_isa()


LOAD = """
from mixtral_serve.demo import checkpoint_path
from mixtral_serve.model.runner import Numerics, load_runner
load_runner(checkpoint_path(), Numerics(weights="int8"), num_blocks=8, block_size=4, num_threads=1)
"""
PACK = """
from mixtral_serve.demo import checkpoint_path
from mixtral_serve.model.checkpoint import open_checkpoint
from mixtral_serve.model.quantize import quantize_checkpoint
quantize_checkpoint(open_checkpoint(checkpoint_path()), Path(sys.argv[1]), "int8", num_workers=1)
"""
NAME = """
from mixtral_serve.kernels.probe import main
assert main(["int4", "auto"]) == 0
"""


@pytest.mark.skipif(is_portable_only, reason="this CPU has nothing else")
@pytest.mark.parametrize(("script", "then"), [(LOAD, "kernels: "), (PACK, "wrote "), (NAME, "kernels: ")])
def test_the_sets_are_tried_before_anything_is_computed(script: str, then: str, tmp_path: Path) -> None:
    begin = "import logging, sys\nfrom pathlib import Path\nlogging.basicConfig(level=20, format='%(message)s')"
    command = [sys.executable, "-c", begin + script, str(tmp_path / "packed")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines()
    tried = [line for line in said if line.startswith("self-test: ")]
    assert tried == [f"self-test: {best_isa().name.lower()} computes on this CPU what portable C++ does"]
    assert any(line.startswith(then) for line in said[said.index(tried[0]) + 1 :])
    assert not any(line.startswith(then) for line in said[: said.index(tried[0])])


def test_who_asks_what_would_compute_hears_that_it_is_not_the_best() -> None:
    assert probe(["int4", "native"], settle=lambda: False) == EXIT_LESSER_INSTRUCTIONS
    assert probe(["int4", "torch"], settle=lambda: False) == 1


def test_the_doctor_warns_of_lesser_instructions() -> None:
    tried, taken = "self-test: amx does not compute what it should", "native (avx512_vnni), as configured"
    finding = kernels_finding(EXIT_LESSER_INSTRUCTIONS, f"{tried}\nkernels: {taken}")
    assert finding == Finding("warning", "kernels", f"{taken}\n{tried}")
    assert kernels_finding(0, "kernels: native").verdict == "ok"
    assert kernels_finding(1, "int4 weights need a compiler").verdict == "failure"
    assert kernels_finding(-4, "") == Finding("failure", "kernels", "the probe ended with -4")
