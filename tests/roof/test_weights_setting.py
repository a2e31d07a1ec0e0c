"""``weights``: what ``auto`` means, and that a packed checkpoint is served as it is packed."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixtral_serve.compose.plan import plan_serving
from mixtral_serve.demo import checkpoint_path
from mixtral_serve.model.checkpoint import open_checkpoint
from mixtral_serve.model.quantize import quantize_checkpoint
from mixtral_serve.settings import Settings
from scheduler.errors import ConfigError


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "demo-int4"
    quantize_checkpoint(open_checkpoint(checkpoint_path()), path, "int4", num_workers=1)
    return path


def test_auto_is_fp32_for_a_checkpoint_that_is_not_packed() -> None:
    assert Settings().weights == "auto"
    assert plan_serving(Settings()).weights == "fp32"
    assert plan_serving(Settings(weights="int8")).weights == "int8"


@pytest.mark.parametrize("weights", ["auto", "int4"])
def test_a_packed_checkpoint_is_planned_as_it_is_packed(packed: Path, weights) -> None:
    plan = plan_serving(Settings(model=str(packed), weights=weights))
    assert plan.weights == "int4"
    assert plan.demands.weights == plan.shape.weights_bytes("int4")
    assert plan.memory.layout.bytes_per_element == 2, "keys and values are bf16 beside packed weights"


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
def test_other_weights_than_the_checkpoint_has_are_a_contradiction(packed: Path, weights) -> None:
    with pytest.raises(ConfigError, match=f"weights: {weights} contradicts the checkpoint, which is packed as int4"):
        plan_serving(Settings(model=str(packed), weights=weights))
