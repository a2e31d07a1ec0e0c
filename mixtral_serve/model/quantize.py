"""``quantize_checkpoint``: a checkpoint in the Hub's layout -> a packed one, piece by piece, on all cores.

Owns: what may be written where, and the order of the work. Files are made one after another, each by all workers
(``packed_writer``); while one is brought to the disk and hashed, the next is worked on. What is finished is noted in a
journal (``quantize_journal``), so that a killed run can be continued.

Invariants: a file has its name only when it is complete and on the disk; the manifest comes last. What is written
is a function of the source and the packing: not of the number of workers, nor of how often the run was interrupted.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch

from mixtral_serve import __version__
from mixtral_serve.kernels.self_test import settle_isa
from mixtral_serve.model.checkpoint import INDEX, Checkpoint
from mixtral_serve.model.errors import CheckpointError, DestinationError
from mixtral_serve.model.manifest import (
    COMPANIONS,
    JOURNAL,
    MANIFEST,
    FileRecord,
    Manifest,
    Source,
    file_sha256,
    verified_manifest,
)
from mixtral_serve.model.packed_layout import FORMAT_VERSION, PackedFile, packed_files
from mixtral_serve.model.packed_writer import PackedWriter, work_for
from mixtral_serve.model.progress import BYTES, Progress, progress
from mixtral_serve.model.quantize_journal import (
    PART_SUFFIX,
    Job,
    Journal,
    SourceFile,
    sync_directory,
    write_durably,
)
from mixtral_serve.model.shape import Packing
from mixtral_serve.model.source_revision import find_revision

_log = logging.getLogger(__name__)

TOOL: Final = f"mixtral-serve {__version__}"


def quantize_checkpoint(
    source: Checkpoint, destination: Path, weights: Packing, *, num_workers: int, revision: str | None = None
) -> Manifest:
    """Write ``source`` into the directory ``destination`` with its large matrices packed, or finish writing it.

    PyTorch's thread count is one while this runs: the workers are the parallelism.

    Args:
        source: as ``open_checkpoint`` returned it.
        destination: new, empty, or left behind by an interrupted run of the same job.
        weights: the packing.
        num_workers: slabs that are quantised at once.
        revision: of the source; default: what the directory says of itself.

    Raises:
        CheckpointError: the source cannot be read, or holds values that are not finite.
        DestinationError: the destination cannot be used: it belongs to another job or the disk is full.
    """
    if source.manifest is not None:
        raise CheckpointError(MANIFEST, f"the source is packed already, as {source.manifest.weights}")
    _check_apart(source.path, destination)
    revision = revision or find_revision(source.path)
    if revision is not None:
        revision = revision.encode("utf-8", "replace").decode()  # an argument may hold what is no text
    job = _job(source, weights, revision)
    if (destination / MANIFEST).exists():
        return _accept(destination, job)
    started_s = time.monotonic()
    try:
        with Journal.open(destination, job) as journal, _single_threaded():
            settle_isa()
            missing = _missing(destination, source, journal, num_workers)
            _check_space(destination, missing)
            _make(source, destination, missing, journal, num_workers=num_workers)
            if _job(source, weights, job.revision) != job:
                raise CheckpointError(
                    ".", f"{source.path} changed while it was read; delete {destination} and begin again"
                )
            manifest = _finish(source.path, destination, journal)
            journal.remove()
            sync_directory(destination)
    except OSError as error:
        raise DestinationError(f"{destination}: {error.strerror or error}") from error
    took_s = time.monotonic() - started_s
    _log.info("wrote %d of %d files in %.1f s", len(missing), source.shape.num_layers + 1, took_s)
    return manifest


def _check_apart(source: Path, destination: Path) -> None:
    there, here = source.resolve(), destination.resolve()
    if here == there or there in here.parents or here in there.parents:
        raise DestinationError(f"{destination} and the source {source} must be apart")


def _job(source: Checkpoint, weights: Packing, revision: str | None) -> Job:
    names = [shard.path.name for shard in source.shards]
    names += [name for name in (INDEX, *COMPANIONS) if (source.path / name).exists()]
    files = {}
    for name in sorted(names):
        status = (source.path / name).stat()
        files[name] = SourceFile(status.st_size, status.st_mtime_ns)
    return Job(
        tool=TOOL,
        format_version=FORMAT_VERSION,
        weights=weights,
        revision=revision,
        shape=source.shape,
        files=files,
    )


def _accept(destination: Path, job: Job) -> Manifest:
    """A destination that is complete, if it is what was asked for."""
    finished = verified_manifest(destination)
    assert finished is not None, "the caller has seen it"
    if (finished.weights, finished.shape, finished.source) != (job.weights, job.shape, _source(job)):
        raise DestinationError(
            f"{destination} holds a finished {finished.weights} checkpoint of "
            f"{finished.source.revision or 'another source'}; name another directory, or delete it"
        )
    (destination / JOURNAL).unlink(missing_ok=True)
    _log.info("%s is complete already, from files of the same names and sizes", destination)
    return finished


def _source(job: Job) -> Source:
    return Source(job.revision, {name: file.num_bytes for name, file in job.files.items()})


def _missing(destination: Path, source: Checkpoint, journal: Journal, num_workers: int) -> tuple[PackedFile, ...]:
    """Files that are still to be made; what an earlier run finished is looked at again, byte for byte."""
    for part in destination.glob(f"*{PART_SUFFIX}"):
        part.unlink()

    def is_whole(file: PackedFile) -> bool:
        record = journal.finished.get(file.name)
        path = destination / file.name
        return record is not None and path.exists() and file_sha256(path) == record.sha256

    files = tuple(packed_files(source.shape, journal.job.weights))
    with ThreadPoolExecutor(num_workers, thread_name_prefix="verify") as pool:
        missing = tuple(file for file, whole in zip(files, pool.map(is_whole, files), strict=True) if not whole)
    if len(missing) < len(files):
        _log.info("continuing: %d of %d files are finished", len(files) - len(missing), len(files))
    return missing


def _check_space(destination: Path, missing: Sequence[PackedFile]) -> None:
    needed_bytes = sum(file.num_bytes for file in missing)
    free_bytes = shutil.disk_usage(destination).free
    if needed_bytes > free_bytes:
        raise DestinationError(
            f"{destination} needs {needed_bytes / 1e9:.2f} GB, its file system has {free_bytes / 1e9:.2f} GB free"
        )


def _make(
    source: Checkpoint, destination: Path, files: Sequence[PackedFile], journal: Journal, *, num_workers: int
) -> None:
    """Write the files, in order; whatever exception comes ends it early, and no thread is left behind."""
    shard_of = {name: shard.path for shard in source.shards for name in shard.tensors}
    total = sum(tensor.num_bytes for file in files for tensor in file.tensors)
    workers = ThreadPoolExecutor(num_workers, thread_name_prefix="quantize")
    finisher = ThreadPoolExecutor(1, thread_name_prefix="finish")
    finishing: Future[None] | None = None
    try:
        with progress(f"quantizing {source.path.name}", total=max(total, 1), unit=BYTES) as report:
            for file in files:
                writer = PackedWriter(destination / file.name, file)
                _fill(writer, work_for(writer, journal.job.weights, shard_of), workers, report)
                if finishing is not None:
                    finishing.result()
                finishing = finisher.submit(_complete, writer, journal)
            if finishing is not None:
                finishing.result()
    finally:
        workers.shutdown(cancel_futures=True)
        finisher.shutdown()


def _fill(
    writer: PackedWriter, work: Iterable[Callable[[], int]], workers: ThreadPoolExecutor, report: Progress
) -> None:
    """Have all pieces done; after an exception none is under way any more and the file is closed."""
    pieces = [workers.submit(piece) for piece in work]
    try:
        for piece in as_completed(pieces):
            report.advance(piece.result())
    except BaseException:
        for piece in pieces:
            piece.cancel()
        wait(pieces)
        writer.close()
        raise


def _complete(writer: PackedWriter, journal: Journal) -> None:
    journal.add(writer.file.name, writer.finish())


@contextmanager
def _single_threaded() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _finish(source: Path, destination: Path, journal: Journal) -> Manifest:
    """Take over configuration and tokenizer, and write the manifest."""
    job, records = journal.job, dict(sorted(journal.finished.items()))
    for name in COMPANIONS:
        if name in job.files:
            data = (source / name).read_bytes()
            write_durably(destination / name, data)
            records[name] = FileRecord(len(data), hashlib.sha256(data).hexdigest())
    manifest = Manifest(tool=TOOL, weights=job.weights, shape=job.shape, source=_source(job), files=records)
    write_durably(destination / MANIFEST, manifest.encode())
    return manifest
