"""The compiled kernels: finding the library, giving it PyTorch's threads, and calling it.

The library is plain C++ behind a C interface: built once, it works with every PyTorch. It brings no thread pool;
the OpenMP runtime that PyTorch is linked to is handed over, so that one pool of threads does all the work of the
process.

Invariants: without the library (no compiler when the package was installed) everything here still imports;
``library()`` then raises ``NativeUnavailableError``, whose message says what to install.

Rejected: PyTorch's C++ interface (ties a build to one PyTorch and pulls a second one into it); an OpenMP of our own
(two pools on the same cores).
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import torch


class NativeUnavailableError(RuntimeError):
    """The compiled kernels are not there; the message says what would help."""


class Isa(IntEnum):
    """Instruction sets of the compiled kernels; all give the same bits."""

    PORTABLE = 0
    AVX2 = 1
    AVX512_VNNI = 2
    AMX = 3


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library, on PyTorch's threads.

    Raises:
        NativeUnavailableError: it was not built, or cannot be loaded here.
    """
    spec = importlib.util.find_spec("mixtral_serve.kernels._native")
    if spec is None or spec.origin is None:
        raise NativeUnavailableError(
            "the compiled kernels were not built: install a C++ compiler (g++) and install the package again"
        )
    try:
        loaded = ctypes.CDLL(spec.origin)
    except OSError as error:
        raise NativeUnavailableError(f"the compiled kernels cannot be loaded: {error}") from None
    loaded.mixtral_set_runtime.argtypes = [ctypes.c_void_p] * 2
    loaded.mixtral_set_runtime.restype = None
    loaded.mixtral_set_runtime(*_openmp_of_torch())
    return loaded


def is_available() -> bool:
    """Whether ``library()`` would answer."""
    try:
        library()
    except NativeUnavailableError:
        return False
    return True


def best_isa() -> Isa:
    """The best instruction set of this CPU that is trusted."""
    return Isa(library().mixtral_best_isa())


def active_isa() -> Isa:
    """The one in use: the best one, or a lesser one inside ``limited_to``."""
    return Isa(library().mixtral_active_isa())


def trust(isa: Isa) -> None:
    """Use nothing above ``isa`` in this process from now on; see ``self_test``."""
    library().mixtral_trust_isa(int(isa))


@contextmanager
def limited_to(isa: Isa) -> Iterator[None]:
    """Use at most ``isa`` inside the block, for trials, tests and measurements. Not for two threads at once."""
    before = library().mixtral_limit_isa(int(isa))
    try:
        yield
    finally:
        library().mixtral_limit_isa(before)


def _openmp_of_torch() -> tuple[int | None, int | None]:
    """Addresses of GOMP_parallel and omp_get_thread_num in the runtime PyTorch is linked to."""
    linked = ctypes.CDLL(torch._C.__file__)  # a symbol is looked up in all that it depends on, too
    names = ("GOMP_parallel", "omp_get_thread_num")
    try:
        found = [ctypes.cast(getattr(linked, name), ctypes.c_void_p).value for name in names]
    except AttributeError:
        return None, None
    return found[0], found[1]
