"""``manifest.json`` of a packed checkpoint: what it was made from, and the size and SHA-256 of each of its files.

Owns: the manifest's form, and every check of a packed directory that needs no weights: the manifest itself, the list
of files, their sizes, and the hashes of the small ones (configuration and tokenizer). The weights are hashed while
they are loaded (``packed``).

Invariants: there is one way to write a manifest down, and it ends with a digest of the rest; whatever differs in a
single bit is refused. What is in the directory and what is in the manifest is the same, except for names that begin
with a dot, where downloaders keep their state and which nothing here reads.

This finds damage and mix-ups. Whoever can write the files can also write a manifest for them: it is no signature.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from mixtral_serve.model.config_file import CONFIG, GENERATION_CONFIG, read_json
from mixtral_serve.model.errors import CheckpointError
from mixtral_serve.model.packed_layout import FORMAT_VERSION
from mixtral_serve.model.shape import ModelShape, Packing

MANIFEST: Final = "manifest.json"
JOURNAL: Final = ".quantize.jsonl"
"""Where ``quantize`` keeps what it has finished; gone when the manifest is there."""
FORMAT: Final = "mixtral-serve packed checkpoint"
COMPANIONS: Final = (
    CONFIG,
    GENERATION_CONFIG,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
"""Files besides the weights that a packed checkpoint takes over from its source, where that has them."""
WEIGHTS_SUFFIX: Final = ".safetensors"

_PIECE_BYTES: Final = 1 << 20


class FileRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Size and SHA-256 (hexadecimal) of a file."""

    num_bytes: Annotated[int, Meta(ge=0)]
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a packed checkpoint was made from."""

    revision: str | None
    """As the operator or the place it came from names it; None where nobody did."""
    files: dict[str, int]
    """Name and bytes of each file that was read."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The contents of ``manifest.json``."""

    format: Literal["mixtral-serve packed checkpoint"] = FORMAT
    version: Literal[2] = FORMAT_VERSION
    tool: str
    """Program and version that wrote it."""
    weights: Packing
    shape: ModelShape
    source: Source
    files: dict[Annotated[str, Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")], FileRecord]
    """All files but this one."""

    def encode(self) -> bytes:
        """The one way to write it down, digest included."""
        # The standard library's encoder: its output has been the same for years, and must stay so.
        fields = msgspec.to_builtins(self)
        fields["digest"] = _digest(fields)
        return (json.dumps(fields, indent=1) + "\n").encode()


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of a packed checkpoint; None: the directory is none.

    Raises:
        CheckpointError: the manifest is damaged, of an unknown version, or missing because ``quantize`` did not finish.
    """
    if not (directory / MANIFEST).exists():
        if (directory / JOURNAL).exists():
            problem = "is missing: quantize has not finished here; the same command again continues it"
            raise CheckpointError(MANIFEST, problem)
        return None
    fields = read_json(directory, MANIFEST)
    if fields.get("format") != FORMAT:
        raise CheckpointError(MANIFEST, f"must be {FORMAT!r}", subject="format")
    if fields.get("version") != FORMAT_VERSION:
        version = str(fields.get("version"))[:20]
        problem = f"is {version}; this server reads version {FORMAT_VERSION}: quantize the original again"
        raise CheckpointError(MANIFEST, problem, subject="version")
    digest = fields.pop("digest", None)
    try:
        manifest = msgspec.convert(fields, Manifest)
    except msgspec.ValidationError as error:
        raise CheckpointError(MANIFEST, f"is not as quantize writes it: {error}") from None
    if digest != _digest(fields) or manifest.encode() != (directory / MANIFEST).read_bytes():
        raise CheckpointError(MANIFEST, "has changed since quantize wrote it")
    return manifest


def verified_manifest(directory: Path) -> Manifest | None:
    """The manifest, after every check of the directory that needs no weights; None: not a packed checkpoint.

    Raises:
        CheckpointError: also where a file is missing, not listed, of another size or, if it holds no weights, changed.
    """
    manifest = read_manifest(directory)
    if manifest is None:
        return None
    for entry in sorted(os.listdir(directory)):
        if entry not in manifest.files and entry != MANIFEST and not entry.startswith("."):
            raise CheckpointError(entry, f"is not listed in {MANIFEST}; a packed checkpoint holds nothing else")
    for file, record in manifest.files.items():
        if not file.endswith(WEIGHTS_SUFFIX) and file not in COMPANIONS:
            raise CheckpointError(MANIFEST, "is not a file of a packed checkpoint", subject=file)
        try:
            num_bytes = (directory / file).stat().st_size
        except FileNotFoundError:
            raise CheckpointError(file, f"is missing, although {MANIFEST} lists it") from None
        if num_bytes != record.num_bytes:
            raise CheckpointError(file, f"has {num_bytes} bytes, {MANIFEST} says {record.num_bytes}")
        if file in COMPANIONS and file_sha256(directory / file) != record.sha256:
            raise CheckpointError(file, changed(record.sha256))
    return manifest


def verify_files(directory: Path, manifest: Manifest, *, num_threads: int) -> None:
    """Hash every file and compare, without keeping anything: what loading does, for a copy that is not to be loaded.

    Raises:
        CheckpointError: a file cannot be read, or is not the one that is listed.
    """

    def verify(item: tuple[str, FileRecord]) -> None:
        if file_sha256(directory / item[0]) != item[1].sha256:
            raise CheckpointError(item[0], changed(item[1].sha256))

    with ThreadPoolExecutor(num_threads, thread_name_prefix="verify") as pool:
        list(pool.map(verify, manifest.files.items()))


def changed(sha256: str) -> str:
    """What is wrong with a file whose hash is not the listed one."""
    return f"is not the file that {MANIFEST} lists (its SHA-256 should begin with {sha256[:12]})"


def file_sha256(path: Path) -> str:
    """Hash of a whole file, read piece by piece.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        with path.open("rb", buffering=0) as file:
            digest, piece = hashlib.sha256(), memoryview(bytearray(_PIECE_BYTES))
            while num_bytes := file.readinto(piece):
                digest.update(piece[:num_bytes])
    except OSError as error:
        raise CheckpointError(path.name, f"cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def _digest(fields: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
