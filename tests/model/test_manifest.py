"""A packed checkpoint that is not the one that was written is refused, in a line that names the file at fault."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixtral_serve.model.checkpoint import open_checkpoint
from mixtral_serve.model.errors import CheckpointError
from mixtral_serve.model.manifest import JOURNAL, MANIFEST, Manifest, read_manifest
from mixtral_serve.model.packed_layout import ENDS_FILE, layer_file
from mixtral_serve.model.quantize import quantize_checkpoint
from mixtral_serve.model.synthetic import write_synthetic_checkpoint


@pytest.fixture(scope="module")
def whole(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed once; nobody changes it."""
    path = tmp_path_factory.mktemp("packed") / "tiny-int4"
    quantize_checkpoint(open_checkpoint(tiny_checkpoint), path, "int4", num_workers=1)
    return path


@pytest.fixture
def packed(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return shutil.copytree(whole, tmp_path / "copy")


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def rewrite(packed: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest's fields and leave its digest as it was."""
    fields = json.loads((packed / MANIFEST).read_bytes())
    change(fields)
    (packed / MANIFEST).write_text(json.dumps(fields, indent=1) + "\n")


def forge(packed: Path, **changes: Any) -> None:
    """A manifest with other contents and a digest that fits them."""
    manifest = read_manifest(packed)
    assert manifest is not None
    fields = {name: changes.get(name, getattr(manifest, name)) for name in Manifest.__struct_fields__}
    (packed / MANIFEST).write_bytes(Manifest(**fields).encode())


def test_a_whole_packed_checkpoint_is_accepted_and_says_how_it_is_packed(packed, tiny_shape) -> None:
    opened = open_checkpoint(packed)
    assert opened.shape == tiny_shape
    assert opened.manifest is not None
    assert opened.manifest.weights == "int4"
    assert opened.manifest.source.files["model.safetensors"] > 0
    assert [shard.path.name for shard in opened.shards] == [layer_file(0), layer_file(1), ENDS_FILE]


def test_a_directory_without_a_manifest_is_no_packed_checkpoint(tiny_checkpoint) -> None:
    assert read_manifest(tiny_checkpoint) is None
    assert open_checkpoint(tiny_checkpoint).manifest is None


def test_row54_any_flipped_bit_of_the_manifest_is_noticed(packed) -> None:
    data = (packed / MANIFEST).read_bytes()
    chance = random.Random(54)
    for bit in chance.sample(range(8 * len(data)), 400):
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        (packed / MANIFEST).write_bytes(broken)
        with pytest.raises(CheckpointError, match=r"^manifest\.json"):
            read_manifest(packed)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_row54_any_flipped_bit_of_configuration_and_tokenizer_is_noticed(packed, file) -> None:
    data = (packed / file).read_bytes()
    for bit in random.Random(file).sample(range(8 * len(data)), 40):
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        (packed / file).write_bytes(broken)
        assert refusal(packed).startswith(f"{file}: is not the file that manifest.json lists")


@pytest.mark.parametrize("file", [layer_file(0), layer_file(1), ENDS_FILE])
def test_row54_any_flipped_bit_of_a_header_is_noticed_without_reading_the_weights(packed, file) -> None:
    data = (packed / file).read_bytes()
    header_bytes = 8 + int.from_bytes(data[:8], "little")
    for bit in random.Random(file).sample(range(8 * header_bytes), 60):
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        (packed / file).write_bytes(broken)
        assert refusal(packed).startswith(f"{file}: does not begin with the header")


@pytest.mark.parametrize("header_bytes", [0, 1 << 40, (1 << 64) - 1])
def test_row54_an_absurd_header_length_is_refused_and_not_believed(packed, header_bytes) -> None:
    with (packed / ENDS_FILE).open("r+b") as file:
        file.write(header_bytes.to_bytes(8, "little"))
    assert refusal(packed).startswith(f"{ENDS_FILE}: does not begin with the header")


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
@pytest.mark.parametrize("file", [layer_file(1), "tokenizer.json"])
def test_row54_a_truncated_file_is_named(packed, file, keep) -> None:
    data = (packed / file).read_bytes()
    (packed / file).write_bytes(data[:keep])
    assert refusal(packed).startswith(f"{file}: has ")


def test_row54_a_file_with_bytes_after_its_end_is_named(packed) -> None:
    with (packed / layer_file(0)).open("ab") as file:
        file.write(b"\0")
    assert refusal(packed).startswith(f"{layer_file(0)}: has ")


@pytest.mark.parametrize("file", [layer_file(0), ENDS_FILE, "tokenizer.json", "generation_config.json"])
def test_row54_row56_a_missing_file_is_named(packed, file) -> None:
    (packed / file).unlink()
    assert refusal(packed) == f"{file}: is missing, although manifest.json lists it"


def test_row54_swapped_files_are_named(packed) -> None:
    first, second = packed / layer_file(0), packed / layer_file(1)
    assert first.stat().st_size == second.stat().st_size
    first.rename(packed / "aside")
    second.rename(first)
    (packed / "aside").rename(second)
    assert refusal(packed).startswith(f"{layer_file(0)}: does not begin with the header")


@pytest.mark.parametrize("name", ["extra.safetensors", "model.safetensors", "notes.txt", "layer-00002.safetensors"])
def test_row54_a_file_that_the_manifest_does_not_list_is_named(packed, name) -> None:
    (packed / name).write_bytes(b"")
    assert refusal(packed).startswith(f"{name}: is not listed in manifest.json")


def test_what_downloaders_leave_behind_under_names_with_a_dot_is_passed_over(packed) -> None:
    (packed / ".cache" / "huggingface").mkdir(parents=True)
    (packed / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    open_checkpoint(packed)


def test_row24_a_file_that_may_carry_code_refuses_a_packed_checkpoint_too(packed) -> None:
    (packed / ".cache").mkdir()
    (packed / ".cache" / "model.py").write_text("")
    assert refusal(packed).startswith(".cache/model.py: may carry code")


def test_row54_a_manifest_of_another_packing_is_refused(packed, tiny_checkpoint, tmp_path) -> None:
    quantize_checkpoint(open_checkpoint(tiny_checkpoint), tmp_path / "int8", "int8", num_workers=1)
    shutil.copy(tmp_path / "int8" / MANIFEST, packed / MANIFEST)
    assert "has " in refusal(packed)
    assert refusal(packed).split(":")[0] in {layer_file(0), layer_file(1), ENDS_FILE}


def test_row54_a_manifest_of_another_model_is_refused(packed, tiny_shape, tmp_path) -> None:
    write_synthetic_checkpoint(tmp_path / "m", tiny_shape, seed=2, weights="fp32")
    (tmp_path / "m" / "tokenizer.json").write_bytes((tmp_path / "m" / "tokenizer.json").read_bytes() + b"\n")
    quantize_checkpoint(open_checkpoint(tmp_path / "m"), tmp_path / "other", "int4", num_workers=1)
    shutil.copy(tmp_path / "other" / MANIFEST, packed / MANIFEST)
    assert refusal(packed).startswith("tokenizer.json: has ")


def test_row54_a_manifest_whose_shape_is_not_the_configs_is_refused(packed, tiny_shape) -> None:
    manifest = read_manifest(packed)
    assert manifest is not None
    fields = {name: getattr(tiny_shape, name) for name in tiny_shape.__slots__}
    forge(packed, shape=type(tiny_shape)(**fields | {"rms_norm_eps": 1e-6}))
    assert refusal(packed).startswith("manifest.json: is that of another model")


def test_row54_a_manifest_that_lists_fewer_layers_than_the_config_is_refused(packed) -> None:
    manifest = read_manifest(packed)
    assert manifest is not None
    (packed / layer_file(1)).unlink()
    forge(packed, files={name: record for name, record in manifest.files.items() if name != layer_file(1)})
    assert refusal(packed) == "manifest.json: lists 2 files with weights, 3 belong here"


@pytest.mark.parametrize("name", ["../config.json", "/etc/passwd", "a/b.safetensors", ".hidden", ""])
def test_a_manifest_cannot_name_files_elsewhere(packed, name) -> None:
    manifest = read_manifest(packed)
    assert manifest is not None
    forge(packed, files=manifest.files | {name: manifest.files["config.json"]})
    assert refusal(packed).startswith("manifest.json: is not as quantize writes it")


def test_a_manifest_cannot_name_files_of_other_kinds(packed) -> None:
    manifest = read_manifest(packed)
    assert manifest is not None
    (packed / "notes.txt").write_bytes((packed / "config.json").read_bytes())
    forge(packed, files=manifest.files | {"notes.txt": manifest.files["config.json"]})
    assert refusal(packed).startswith("manifest.json: notes.txt: is not a file of a packed checkpoint")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.update(version=1), "manifest.json: version: is 1; this server reads version 2: quantize the orig"),
        (lambda m: m.update(format="other"), "manifest.json: format: must be "),
        (lambda m: m.update(weights="int2"), "manifest.json: is not as quantize writes it: "),
        (lambda m: m.pop("files"), "manifest.json: is not as quantize writes it: "),
        (lambda m: m.update(extra=1), "manifest.json: is not as quantize writes it: "),
        (lambda m: m["shape"].update(num_layers="2"), "manifest.json: is not as quantize writes it: "),
        (lambda m: m["shape"].update(extra=2), "manifest.json: has changed since quantize wrote it"),
        (lambda m: m["source"].update(revision="\ud800"), "manifest.json: has changed since quantize wrote it"),
        (lambda m: m.pop("digest"), "manifest.json: has changed since quantize wrote it"),
        (lambda m: m.update(tool="another 1.0"), "manifest.json: has changed since quantize wrote it"),
    ],
)
def test_row54_a_manifest_that_was_edited_is_refused(packed, change, said) -> None:
    rewrite(packed, change)
    assert refusal(packed).startswith(said)


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000])
def test_row54_a_manifest_that_is_no_json_object_is_refused(packed, data) -> None:
    (packed / MANIFEST).write_bytes(data)
    assert refusal(packed).startswith("manifest.json: is not ")


def test_row54_a_manifest_of_absurd_size_is_not_read(packed) -> None:
    os.truncate(packed / MANIFEST, 1 << 27)
    assert refusal(packed).startswith("manifest.json: is larger than")


def test_row57_what_an_interrupted_run_left_behind_is_never_loaded(packed) -> None:
    (packed / MANIFEST).unlink()
    (packed / JOURNAL).write_text("{}\n")
    assert refusal(packed).startswith("manifest.json: is missing: quantize has not finished here")
