"""Who is measured, and who fits into memory beside whom."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench.peers.contenders import (
    CONTENDERS,
    RATED,
    Entry,
    SelectionError,
    conversion_of,
    model_of,
    python_of,
    residents,
    select,
)
from bench.peers.setup import RECIPES
from bench.peers.slice import slice_shape

ROOT = Path(__file__).parents[3]
BY_NAME = {entry.name: entry for entry in CONTENDERS}


def test_every_contender_has_a_worker_and_a_recipe() -> None:
    assert len(BY_NAME) == len(CONTENDERS)
    for entry in CONTENDERS:
        assert (ROOT / "bench" / "peers" / "workers" / f"{entry.worker}.py").exists()
        assert entry.environment is None or entry.environment in RECIPES
    assert set(RATED) <= {entry.name for entry in CONTENDERS if entry.is_ours}


def test_contenders_are_chosen_by_words_of_their_names() -> None:
    assert select([]) == CONTENDERS
    assert [entry.name for entry in select(["LLAMA.cpp"])] == ["llama.cpp Q4_0", "llama.cpp Q8_0"]
    assert [entry.name for entry in select(["serve int4", "vllm"])] == ["mixtral-serve int4", "vLLM bf16"]
    with pytest.raises(SelectionError, match="no contender is called 'tgi'; there are mixtral-serve int4, "):
        select(["vllm", "tgi"])


def test_a_contender_reads_the_checkpoint_or_its_own_form_of_it() -> None:
    checkpoint = Path("/models/mixtral-2-layers")
    assert model_of(BY_NAME["vLLM bf16"], checkpoint) == checkpoint
    assert conversion_of(BY_NAME["vLLM bf16"], checkpoint) == []
    llama = BY_NAME["llama.cpp Q4_0"]
    assert model_of(llama, checkpoint) == Path("/models/mixtral-2-layers-gguf/Q4_0.gguf")
    assert conversion_of(llama, checkpoint)[-1] == "Q4_0"
    openvino = BY_NAME["OpenVINO int4"]
    assert conversion_of(openvino, checkpoint)[1:] == [str(checkpoint), str(model_of(openvino, checkpoint)), "int4"]


def test_peers_run_in_their_own_environments_and_we_in_this_one() -> None:
    assert python_of(BY_NAME["mixtral-serve int4"], Path("/envs")) == Path(sys.executable)
    assert python_of(BY_NAME["llama.cpp Q4_0"], Path("/envs")) == Path("/envs/llama/bin/python")


def test_memory_follows_the_size_of_the_model() -> None:
    entry = Entry("x", "x", "bf16", 2.0)
    two, four = (entry.memory_bytes(slice_shape(layers)) for layers in (2, 4))
    per_layer = 8 * 3 * 4096 * 14336 + 4096 * 4096 * 5 // 2 + 8 * 4096 + 2 * 4096
    assert (four - two) / (2 * 2) == pytest.approx(per_layer)


def test_all_stay_loaded_when_all_fit() -> None:
    assert residents({"a": 3, "b": 4}, 7) == (frozenset({"a", "b"}), {})


def test_the_smaller_stay_and_leave_room_for_the_largest_other() -> None:
    staying, refused = residents({"small": 2, "middle": 6, "large": 12, "other": 3}, 18)
    assert staying == {"small", "other"}
    assert not refused


def test_nobody_stays_when_the_largest_needs_everything() -> None:
    assert residents({"a": 5, "b": 10}, 10) == (frozenset(), {})


def test_who_never_fits_is_refused_and_takes_no_room_from_others() -> None:
    staying, refused = residents({"a": 5_000_000_000, "b": 20_000_000_000}, 10_000_000_000)
    assert staying == {"a"}
    assert refused == {"b": "needs about 20.0 GB of memory, the budget is 10.0 GB"}
