"""What computes is what was asked for by name, or the start is refused with the setting's name."""

from __future__ import annotations

import pytest

from mixtral_serve.compose.plan import plan_serving
from mixtral_serve.settings import Settings, SettingsError, resolve
from scheduler.errors import ConfigError


@pytest.mark.parametrize("kernels", ["native", "reference"])
@pytest.mark.parametrize("weights", ["fp32", "bf16", "auto"])
def test_kernels_beside_weights_that_they_do_not_compute_with_are_refused(weights, kernels) -> None:
    with pytest.raises(ConfigError, match=f"kernels: {kernels} computes with int8 and int4 weights"):
        plan_serving(Settings(weights=weights, kernels=kernels))


@pytest.mark.parametrize("kernels", ["auto", "native", "torch", "reference"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_packed_weights_are_planned_for_with_any_kernels(weights, kernels) -> None:
    assert plan_serving(Settings(weights=weights, kernels=kernels)).weights == weights


def test_int8_keys_and_values_beside_bf16_weights_are_refused() -> None:
    with pytest.raises(ConfigError, match="kv_cache_dtype: int8 goes with activations in fp32"):
        plan_serving(Settings(weights="bf16", kv_cache_dtype="int8"))


def test_unknown_kernels_are_refused_by_name() -> None:
    with pytest.raises(SettingsError, match=r"kernels = 'cuda' \(environment\)"):
        resolve({}, {"MIXTRAL_SERVE_KERNELS": "cuda"})
