"""Reading the files of a packed checkpoint: their headers when it is opened, every byte when it is loaded.

Owns: ``check_weights``, which looks at sizes and headers only, and ``read_weights``, which reads each file once,
straight into the memory where the weights stay, and hashes what it read. Several files are read at once; reading and
hashing release the interpreter lock. Imports no tensor library.

Invariants: no file stays mapped or open, so what happens to it afterwards cannot reach the process; when
``read_weights`` returns, every byte of every file has entered a hash that is the manifest's.

Rejected: mapping the files (a file that is truncated later kills the process with SIGBUS, and the page cache is not
in anybody's memory plan); hashing in a second pass (the first one has the bytes in the processor's cache).
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from io import FileIO
from pathlib import Path
from typing import Final, TypeAlias

from mixtral_serve.model.errors import CheckpointError
from mixtral_serve.model.manifest import MANIFEST, WEIGHTS_SUFFIX, FileRecord, Manifest, changed
from mixtral_serve.model.packed_layout import PackedFile, StoredTensor, packed_files
from mixtral_serve.model.shape import ModelShape

Destination: TypeAlias = Callable[[StoredTensor], memoryview]
"""Where a tensor's bytes go: as many writable bytes as it has."""

_PIECE_BYTES: Final = 256 << 10
"""Read and hashed at once: small enough to stay in a core's own cache between the two."""


def check_weights(directory: Path, shape: ModelShape, manifest: Manifest) -> tuple[PackedFile, ...]:
    """The files with weights, after a look at their names, sizes and headers.

    Raises:
        CheckpointError: the manifest is another model's, or a file's header is not the one it must have.
    """
    if manifest.shape != shape:
        raise CheckpointError(MANIFEST, "is that of another model: its shape is not the one of config.json")
    listed = [file for file in manifest.files if file.endswith(WEIGHTS_SUFFIX)]
    if len(listed) != shape.num_layers + 1:
        raise CheckpointError(MANIFEST, f"lists {len(listed)} files with weights, {shape.num_layers + 1} belong here")
    files = tuple(packed_files(shape, manifest.weights))
    for file in files:
        record = manifest.files.get(file.name)
        if record is None:
            raise CheckpointError(file.name, f"is not listed in {MANIFEST}")
        if record.num_bytes != file.num_bytes:
            raise CheckpointError(file.name, f"has {record.num_bytes} bytes, {file.num_bytes} belong there")
        try:
            with (directory / file.name).open("rb") as opened:
                header = opened.read(len(file.header))
        except OSError as error:
            raise CheckpointError(file.name, f"cannot be read: {error.strerror}") from None
        _check_header(file, header)
    return files


def read_weights(
    directory: Path,
    files: Sequence[PackedFile],
    manifest: Manifest,
    destination: Destination,
    *,
    num_threads: int,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> None:
    """Read every file into its tensors' destinations and compare its hash with the manifest's.

    ``on_bytes`` is called with the size of each finished file, in the thread of the caller. After an error the
    contents of the destinations are undefined.

    Raises:
        CheckpointError: a file cannot be read, or is not the one that the manifest lists.
    """
    stop = threading.Event()
    pool = ThreadPoolExecutor(min(num_threads, len(files)), thread_name_prefix="load")
    try:
        reading = {
            pool.submit(_read_file, directory / file.name, file, manifest.files[file.name], destination, stop): file
            for file in files
        }
        for future in as_completed(reading):
            future.result()
            on_bytes(reading[future].num_bytes)
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _read_file(
    path: Path, file: PackedFile, record: FileRecord, destination: Destination, stop: threading.Event
) -> None:
    """One file, from its first byte to its last; ends early, without a word, when ``stop`` is set."""
    try:
        with path.open("rb", buffering=0) as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            header = opened.read(len(file.header))
            _check_header(file, header)
            digest = hashlib.sha256(header)
            for tensor in file.tensors:
                place = destination(tensor)
                assert place.nbytes == tensor.num_bytes, f"{tensor.name} has no place of its size"
                if not _fill(place, opened, digest, stop):
                    return
            is_longer = bool(opened.read(1))
    except EOFError:
        raise CheckpointError(file.name, f"ends before its {file.num_bytes} bytes") from None
    except OSError as error:
        raise CheckpointError(file.name, f"cannot be read: {error.strerror}") from None
    if is_longer:
        raise CheckpointError(file.name, f"goes on after its {file.num_bytes} bytes")
    if digest.hexdigest() != record.sha256:
        raise CheckpointError(file.name, changed(record.sha256))


def _fill(place: memoryview, opened: FileIO, digest: hashlib._Hash, stop: threading.Event) -> bool:
    """Read as many bytes as ``place`` has and hash them; whether it was allowed to come to the end."""
    begin = 0
    while begin < place.nbytes:
        if stop.is_set():
            return False
        num_bytes = opened.readinto(place[begin : begin + _PIECE_BYTES])
        if not num_bytes:
            raise EOFError
        digest.update(place[begin : begin + num_bytes])
        begin += num_bytes
    return True


def _check_header(file: PackedFile, header: bytes) -> None:
    if header != file.header:
        raise CheckpointError(file.name, "does not begin with the header that this model and packing give it")
