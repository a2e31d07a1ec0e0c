"""``settle_isa``: no instruction set serves here before it has given the right results on this very CPU.

Owns the power-on self-test of the compiled kernels. All instruction sets give the same bits, so each is held against
portable C++, whose instructions a compiler chose. One line says what passed. What fails is left alone for the life of
the process, a warning says so, and the next lesser set is tried. Tests run where the project is built; this runs where
it serves, be it on a CPU, a microcode, a hypervisor or an emulator that nobody has tried before.

Invariants: portable C++ is always trusted; a set is not tried where a better one passed. It takes some 0.3 s of one
core and 20 MB, before weights are loaded. It finds what is wrong every time: not a fault that comes and goes, nor one
core of many, nor what both sides share (a fused multiply-add is the CPU's in portable C++, too).

Rejected: answers written down (to be made anew with every change, and they would prove no more); a process of its own,
to survive instructions that do not exist (the CPU and the operating system are asked for each set).
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterable
from typing import Final

import torch

from mixtral_serve.kernels.native import Isa, best_isa, is_available, limited_to, trust
from mixtral_serve.kernels.trials import Trial, all_trials

_log = logging.getLogger(__name__)

_settling: Final = threading.Lock()


def settle_isa() -> bool:
    """Before anything is computed for anybody: put the instruction sets on trial, once per process.

    For a moment when no other thread computes.

    Returns:
        Whether the best set of this CPU passed. True where there are no compiled kernels.
    """
    with _settling:
        return _is_best_settled()


@functools.cache
def _is_best_settled() -> bool:
    return not is_available() or best_isa() is best_passing()


def best_passing(trials: Callable[[], Iterable[Trial]] = all_trials) -> Isa:
    """The best instruction set that passes ``trials``; none above it is used from now on."""
    for isa in sorted((isa for isa in Isa if Isa.PORTABLE < isa <= best_isa()), reverse=True):
        failed = failed_kernels(isa, trials())
        name = isa.name.lower()
        if not failed:
            _log.info("self-test: %s computes on this CPU what portable C++ does", name)
            return isa
        lesser = Isa(isa - 1)
        trust(lesser)
        _log.warning(
            "self-test: %s does not compute on this CPU what portable C++ does (%s): it is not used, %s is next",
            name,
            ", ".join(failed),
            lesser.name.lower(),
        )
    return Isa.PORTABLE


def failed_kernels(isa: Isa, trials: Iterable[Trial]) -> list[str]:
    """Those whose results with ``isa`` have other bits than with portable C++, each named once."""
    failed: dict[str, None] = {}
    for trial in trials:
        with limited_to(Isa.PORTABLE):
            wanted = trial.compute()
        with limited_to(isa):
            found = trial.compute()
        if not all(_same_bits(one, other) for one, other in zip(wanted, found, strict=True)):
            failed[trial.kernel] = None
    return list(failed)


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(*(tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other)))
