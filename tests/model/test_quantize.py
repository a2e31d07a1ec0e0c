"""Packing a checkpoint: what is written, what is refused, and what an interrupted run leaves and takes up again."""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixtral_serve import __version__
from mixtral_serve.model.checkpoint import Checkpoint, open_checkpoint
from mixtral_serve.model.errors import CheckpointError, DestinationError
from mixtral_serve.model.manifest import JOURNAL, MANIFEST, file_sha256
from mixtral_serve.model.packed_layout import ENDS_FILE, FORMAT_VERSION, layer_file
from mixtral_serve.model.quantize import quantize_checkpoint
from mixtral_serve.model.shape import ModelShape, Packing
from mixtral_serve.model.synthetic import write_synthetic_checkpoint

NUM_KILLS = 5
HEAD = "lm_head.weight"
BF16_NAN = b"\xc0\x7f"


@pytest.fixture
def source(tiny_shape: ModelShape, tmp_path: Path) -> Checkpoint:
    """Sharded; a test may break it."""
    write_synthetic_checkpoint(tmp_path / "source", tiny_shape, seed=1, weights="bf16", max_shard_bytes=40_000)
    return open_checkpoint(tmp_path / "source")


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def pack(source: Checkpoint, destination: Path, weights: Packing = "int4", **options) -> dict[str, bytes]:
    quantize_checkpoint(source, destination, weights, **{"num_workers": 2, **options})
    return contents(destination)


def interrupted(source: Checkpoint, destination: Path, at: str = HEAD) -> None:
    """A destination that a run left behind which got as far as the tensor ``at``."""
    shard = next(shard.path for shard in source.shards if at in shard.tensors)
    whole, status = shard.read_bytes(), shard.stat()
    header_bytes = 8 + int.from_bytes(whole[:8], "little")
    begin = header_bytes + json.loads(whole[8:header_bytes])[at]["data_offsets"][0]
    for data, ends in ((whole[:begin] + BF16_NAN + whole[begin + 2 :], True), (whole, False)):
        shard.write_bytes(data)
        os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
        if ends:
            with pytest.raises(CheckpointError, match="not finite"):
                pack(source, destination)
    assert not (destination / MANIFEST).exists()


def refusal(attempt: Callable[[], object]) -> str:
    with pytest.raises(DestinationError) as caught:
        attempt()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_the_number_of_workers_changes_no_byte(source: Checkpoint, weights: Packing, tmp_path: Path) -> None:
    one = pack(source, tmp_path / "one", weights, num_workers=1)
    assert pack(source, tmp_path / "five", weights, num_workers=5) == one
    assert set(one) == {
        *(MANIFEST, ENDS_FILE, layer_file(0), layer_file(1)),
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    }


def test_the_manifest_holds_hashes_sizes_source_and_tool(source: Checkpoint, tmp_path: Path) -> None:
    manifest = quantize_checkpoint(source, tmp_path / "packed", "int8", num_workers=1, revision="v0.1")
    for name, record in manifest.files.items():
        assert file_sha256(tmp_path / "packed" / name) == record.sha256
        assert (tmp_path / "packed" / name).stat().st_size == record.num_bytes
    assert manifest.files.keys() | {MANIFEST} == set(contents(tmp_path / "packed"))
    assert manifest.source.revision == "v0.1"
    assert manifest.source.files == {path.name: path.stat().st_size for path in source.path.iterdir()}
    assert manifest.tool == f"mixtral-serve {__version__}"


def test_a_revision_of_any_bytes_is_noted_as_text(source: Checkpoint, tmp_path: Path) -> None:
    manifest = quantize_checkpoint(source, tmp_path / "packed", "int8", num_workers=1, revision="v\udcff")
    assert manifest.source.revision == "v?"
    assert open_checkpoint(tmp_path / "packed").manifest == manifest


def test_the_thread_count_of_the_process_is_as_before(source: Checkpoint, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    pack(source, tmp_path / "packed")
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_a_finished_destination_is_left_as_it_is(source: Checkpoint, tmp_path: Path) -> None:
    first = pack(source, tmp_path / "packed")
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "packed").iterdir()}
    assert pack(source, tmp_path / "packed") == first
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "packed").iterdir()} == times


def test_row57_a_kill_between_manifest_and_the_end_of_the_journal_is_taken_up(source: Checkpoint, tmp_path) -> None:
    whole = pack(source, tmp_path / "packed")
    (tmp_path / "packed" / JOURNAL).write_text("{}\n")
    assert pack(source, tmp_path / "packed") == whole


@pytest.mark.parametrize(
    ("at", "finished"),
    [
        ("model.layers.0.self_attn.q_proj.weight", []),
        ("model.layers.1.block_sparse_moe.experts.3.w2.weight", [layer_file(0)]),
        (HEAD, [layer_file(0), layer_file(1)]),
    ],
)
def test_row57_a_run_is_continued_where_it_was_interrupted(source, tmp_path: Path, at: str, finished) -> None:
    whole = pack(source, tmp_path / "whole")
    destination = tmp_path / "packed"
    interrupted(source, destination, at)
    assert sorted(path.name for path in destination.glob("*.safetensors")) == finished
    kept = {name: (destination / name).stat().st_ino for name in finished}
    assert pack(source, destination) == whole
    assert {name: (destination / name).stat().st_ino for name in kept} == kept, "what was finished is not made again"


@pytest.mark.parametrize("cut", [1, 30, -1])
def test_row57_a_line_of_the_journal_that_was_cut_short_counts_for_nothing(source, tmp_path: Path, cut: int) -> None:
    whole = pack(source, tmp_path / "whole")
    interrupted(source, tmp_path / "packed")
    journal = tmp_path / "packed" / JOURNAL
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:-1]) + lines[-1][:cut])
    assert pack(source, tmp_path / "packed") == whole


def test_row57_a_kill_before_the_first_line_is_whole_begins_anew(source: Checkpoint, tmp_path: Path) -> None:
    whole = pack(source, tmp_path / "whole")
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / JOURNAL).write_bytes(b'{"tool": "mixt')
    assert pack(source, tmp_path / "packed") == whole


def test_row57_a_finished_file_that_was_damaged_since_is_made_again(source: Checkpoint, tmp_path: Path) -> None:
    whole = pack(source, tmp_path / "whole")
    interrupted(source, tmp_path / "packed")
    data = bytearray((tmp_path / "packed" / layer_file(1)).read_bytes())
    data[-1] ^= 1
    (tmp_path / "packed" / layer_file(1)).write_bytes(data)
    assert pack(source, tmp_path / "packed") == whole


def test_a_run_begun_in_another_version_of_the_format_is_not_continued(source: Checkpoint, tmp_path: Path) -> None:
    interrupted(source, tmp_path / "packed")
    journal = tmp_path / "packed" / JOURNAL
    begun = journal.read_text()
    assert f'"format_version":{FORMAT_VERSION},' in begun
    journal.write_text(begun.replace(f'"format_version":{FORMAT_VERSION},', '"format_version":1,'))
    assert "version 1 of the format" in refusal(lambda: pack(source, tmp_path / "packed"))


def test_another_job_is_not_mixed_into_an_unfinished_one(source: Checkpoint, tmp_path: Path) -> None:
    interrupted(source, tmp_path / "packed")
    before = contents(tmp_path / "packed")
    attempts = {
        "was begun with --weights int4": lambda: pack(source, tmp_path / "packed", "int8"),
        "was begun from revision unknown": lambda: pack(source, tmp_path / "packed", revision="v2"),
        "was begun from a model of another shape": lambda: pack(
            replace(source, shape=replace(source.shape, rms_norm_eps=1e-6)), tmp_path / "packed"
        ),
    }
    for said, attempt in attempts.items():
        assert said in refusal(attempt)
        assert refusal(attempt).endswith("quantize in the same way to finish it, or delete it to begin again")
    assert contents(tmp_path / "packed") == before


def test_a_source_that_changed_since_is_noticed_and_named(source: Checkpoint, tmp_path: Path) -> None:
    interrupted(source, tmp_path / "packed")
    shard = source.shards[1].path
    os.utime(shard, ns=(0, shard.stat().st_mtime_ns + 1))
    assert f"from a source whose {shard.name} was another file" in refusal(lambda: pack(source, tmp_path / "packed"))


def test_a_finished_checkpoint_is_not_overwritten_by_another(source: Checkpoint, tmp_path: Path) -> None:
    whole = pack(source, tmp_path / "packed")
    said = refusal(lambda: pack(source, tmp_path / "packed", "int8"))
    assert "holds a finished int4 checkpoint" in said
    assert contents(tmp_path / "packed") == whole


def test_a_directory_with_other_files_is_not_written_into(source: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    assert refusal(lambda: pack(source, tmp_path / "full")).endswith(
        "holds thesis.tex already; name a directory that is new or empty"
    )
    assert set(contents(tmp_path / "full")) == {"thesis.tex"}


@pytest.mark.parametrize("place", [".", "inside", ".."])
def test_source_and_destination_must_be_apart(source: Checkpoint, place: str) -> None:
    assert refusal(lambda: pack(source, source.path / place)).endswith("must be apart")


def test_a_disk_that_is_too_small_is_refused_before_anything_is_read(source: Checkpoint, tmp_path: Path) -> None:
    huge = replace(source, shape=replace(source.shape, intermediate_size=1 << 31))
    assert " GB free" in refusal(lambda: pack(huge, tmp_path / "packed"))
    assert set(contents(tmp_path / "packed")) == {JOURNAL}


def test_row62_a_disk_that_refuses_is_one_line_and_the_run_goes_on_later(source: Checkpoint, tmp_path: Path) -> None:
    whole = pack(source, tmp_path / "whole")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole[layer_file(0)]) - 1, before[1]))
    try:
        said = refusal(lambda: pack(source, tmp_path / "packed"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert said.startswith(f"{tmp_path / 'packed'}: File too large")
    assert pack(source, tmp_path / "packed") == whole


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named_with_its_file(source: Checkpoint, tmp_path: Path, value: float) -> None:
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    shard = next(shard.path for shard in source.shards if name in shard.tensors)
    tensors = {key: tensor.clone() for key, tensor in load_file(shard).items()}
    tensors[name][3, 5] = value
    save_file(tensors, shard)
    with pytest.raises(CheckpointError, match=f"{shard.name}: {name}: holds values that are not finite"):
        pack(open_checkpoint(source.path), tmp_path / "packed")
    assert not list((tmp_path / "packed").glob(f"{layer_file(1)}"))


def test_a_source_that_is_packed_already_is_refused(source: Checkpoint, tmp_path: Path) -> None:
    pack(source, tmp_path / "packed")
    with pytest.raises(CheckpointError, match=r"manifest\.json: the source is packed already, as int4"):
        pack(open_checkpoint(tmp_path / "packed"), tmp_path / "again")


_CHILD = """
import sys
from pathlib import Path
from mixtral_serve.model.checkpoint import open_checkpoint
from mixtral_serve.model.quantize import quantize_checkpoint
source = open_checkpoint(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
quantize_checkpoint(source, Path(sys.argv[2]), "int4", num_workers=2)
"""


@pytest.mark.slow
def test_row57_a_run_that_is_killed_at_any_time_ends_with_the_same_bytes(tmp_path: Path, tiny_shape) -> None:
    shape = replace(tiny_shape, vocab_size=1000, hidden_size=512, intermediate_size=1024, num_layers=16)
    write_synthetic_checkpoint(tmp_path / "source", shape, weights="bf16")
    whole = pack(open_checkpoint(tmp_path / "source"), tmp_path / "whole")
    chance = random.Random(57)
    num_killed = 0
    for _ in range(NUM_KILLS):
        with subprocess.Popen(
            [sys.executable, "-c", _CHILD, str(tmp_path / "source"), str(tmp_path / "packed")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            child.stdin.write("\n")
            child.stdin.flush()
            try:
                child.wait(chance.uniform(0.0, 0.3))
            except subprocess.TimeoutExpired:
                child.kill()
                num_killed += 1
        if not (tmp_path / "packed" / MANIFEST).exists() and (tmp_path / "packed").exists():
            with pytest.raises(CheckpointError):
                open_checkpoint(tmp_path / "packed")
    assert num_killed > 0
    assert pack(open_checkpoint(tmp_path / "source"), tmp_path / "packed") == whole


_MEASURE = """
import resource, sys
from pathlib import Path
from mixtral_serve.model.checkpoint import open_checkpoint
from mixtral_serve.model.quantize import quantize_checkpoint
source = open_checkpoint(Path(sys.argv[1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
quantize_checkpoint(source, Path(sys.argv[2]), "int8", num_workers=4)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_the_memory_it_takes_is_that_of_a_slab_per_worker(tmp_path: Path, tiny_shape) -> None:
    true_width = replace(tiny_shape, hidden_size=4096, intermediate_size=14336, num_layers=1, num_experts=2)
    write_synthetic_checkpoint(tmp_path / "source", true_width, weights="bf16", max_shard_bytes=400 << 20)
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 1
    measured = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path / "source"), str(tmp_path / "packed")],
        capture_output=True,
        text=True,
        check=True,
    )
    grown_bytes = 1024 * int(measured.stdout)
    assert grown_bytes < 300e6, "the file that was written has 0.36 GB, the source 0.72 GB"
