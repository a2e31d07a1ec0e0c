"""A model runs over any cache: in PyTorch's operators or the compiled kernels, in fp32, bf16 or int8."""

from __future__ import annotations

import random

import pytest
import torch

from mixtral_serve.contract import ModelInfo
from mixtral_serve.kernels import native
from mixtral_serve.kernels.native import NativeUnavailableError
from mixtral_serve.model.checkpoint import open_checkpoint
from mixtral_serve.model.kv_cache import PagedKVCache, allocate_kv_cache
from mixtral_serve.model.loader import load_model
from mixtral_serve.model.native_kv_cache import NativeKVCache
from mixtral_serve.model.runner import MixtralRunner
from mixtral_serve.model.sampler import NON_FINITE
from mixtral_serve.model.shape import KVDtype
from scheduler.lifecycle import FinishReason

needs_native = pytest.mark.skipif(not native.is_available(), reason="the compiled kernels were not built")


@pytest.fixture
def make(tiny_checkpoint, tiny_shape):
    """A runner in fp32 over a cache of the given kind, and its logits by request and output token."""

    def runner(dtype: KVDtype, *, is_native: bool) -> tuple[MixtralRunner, dict[tuple[str, int], torch.Tensor]]:
        seen: dict[tuple[str, int], torch.Tensor] = {}
        cache = allocate_kv_cache(
            tiny_shape, num_blocks=40, block_size=4, dtype=dtype, compute_dtype=torch.float32, is_native=is_native
        )
        assert isinstance(cache, NativeKVCache if is_native else PagedKVCache)
        info = ModelInfo("tiny", "tiny", 97, 256, (2,), 40, 4, 0, cache.num_bytes)

        def listen(slices, logits) -> None:
            for part, row in zip(slices, logits, strict=True):
                seen[part.request_id, part.num_output_tokens] = row.clone()

        model = load_model(open_checkpoint(tiny_checkpoint), "fp32")
        return MixtralRunner(model, tiny_shape, cache=cache, info=info, logits_listener=listen), seen

    return runner


def requests(make_request) -> list:
    rng = random.Random(5)
    return [make_request(f"r{i}", [rng.randrange(97) for _ in range(4 + 7 * i)], max_tokens=6) for i in range(5)]


@pytest.mark.parametrize(
    ("dtype", "is_native", "bound"),
    [
        ("bf16", False, 0.02),
        pytest.param("fp32", True, 1e-4, marks=needs_native),
        pytest.param("bf16", True, 0.02, marks=needs_native),
        pytest.param("int8", True, 0.05, marks=needs_native),
    ],
)
def test_logits_over_any_cache_are_near_those_over_fp32(make, make_request, drive, dtype, is_native, bound) -> None:
    exact, wanted = make("fp32", is_native=False)
    drive(exact, requests(make_request), max_prefill_chunk=5)
    runner, found = make(dtype, is_native=is_native)
    drive(runner, requests(make_request), max_prefill_chunk=5)
    firsts = [(f"r{i}", 0) for i in range(5)]
    errors = [float((found[key] - wanted[key]).abs().max() / wanted[key].std()) for key in firsts]
    assert max(errors) < bound


@needs_native
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_row40_stale_nan_in_a_compiled_cache_reaches_nobody_though_nothing_is_cleared(
    make, make_request, drive, dtype
) -> None:
    clean = drive(make(dtype, is_native=True)[0], requests(make_request))
    runner, _ = make(dtype, is_native=True)
    runner.cache.poison()
    poisoned = drive(runner, requests(make_request))
    assert poisoned.tokens == clean.tokens
    assert {event.reason for event in poisoned.finished.values()} == {FinishReason.LENGTH}


@needs_native
def test_row40_a_poisoned_block_ends_its_request(make, make_request, drive) -> None:
    runner, _ = make("int8", is_native=True)
    (request,) = requests(make_request)[-1:]

    class Poisoning:
        info = runner.info

        def run(self, batch):
            result = runner.run(batch)
            runner.cache.poison(list(batch.plan.slices[0].block_table))
            return result

    driven = drive(Poisoning(), [request])
    assert driven.finished["r4"].error == NON_FINITE


def test_int8_without_compiled_kernels_is_refused(tiny_shape) -> None:
    with pytest.raises(NativeUnavailableError, match="int8 need the compiled kernels"):
        allocate_kv_cache(
            tiny_shape, num_blocks=4, block_size=4, dtype="int8", compute_dtype=torch.float32, is_native=False
        )
