"""What ``quantize`` has finished, kept so that a killed run can be continued.

Owns: the journal in the destination directory. Its first line is the job - what is made from what -, each further line
a file that is complete, with its hash. A line is on the disk before the next file counts as begun, and a line that a
kill cut short is as good as none: that file is made again.

Invariants: one process at a time writes into a destination (the journal is locked); a journal of another job is never
continued, or files made from different sources would end up side by side. The journal goes when the manifest is there.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Final, Self

import msgspec

from mixtral_serve.model.errors import DestinationError
from mixtral_serve.model.manifest import JOURNAL, FileRecord
from mixtral_serve.model.shape import ModelShape, Packing

PART_SUFFIX: Final = ".part"
"""Of a file that is not complete."""


class SourceFile(msgspec.Struct, frozen=True):
    """What tells that a file of the source is still the same one."""

    num_bytes: int
    modified_ns: int


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What is made from what; files of different jobs must not be mixed."""

    tool: str
    format_version: int
    """Of what is written."""
    weights: Packing
    revision: str | None
    shape: ModelShape
    files: dict[str, SourceFile]
    """Name -> every file of the source that is read."""

    def difference(self, begun: Job) -> str | None:
        """What is different in the job that was ``begun``, in words; None: it is the same."""
        if begun.weights != self.weights:
            return f"with --weights {begun.weights}"
        if begun.revision != self.revision:
            return f"from revision {begun.revision or 'unknown'}"
        if (begun.tool, begun.format_version) != (self.tool, self.format_version):
            return f"by {begun.tool}, in version {begun.format_version} of the format"
        if begun.shape != self.shape:
            return "from a model of another shape"
        changed = sorted(name for name in self.files | begun.files if self.files.get(name) != begun.files.get(name))
        return f"from a source whose {changed[0]} was another file" if changed else None


class _Entry(msgspec.Struct, frozen=True):
    file: str
    record: FileRecord


class Journal:
    """The locked journal of one destination. A context manager."""

    def __init__(self, path: Path, handle: int, job: Job, finished: dict[str, FileRecord]) -> None:
        self._path = path
        self._job = job
        self._handle = handle
        self._finished = finished

    @classmethod
    def open(cls, directory: Path, job: Job) -> Self:
        """Begin ``job`` in ``directory``, or continue it.

        Raises:
            DestinationError: somebody else writes there, another job was begun there, or it holds other files.
        """
        path = directory / JOURNAL
        directory.mkdir(parents=True, exist_ok=True)
        strangers = [name for name in sorted(os.listdir(directory)) if not name.startswith(".")]
        if strangers and not path.exists():
            raise DestinationError(f"{directory} holds {strangers[0]} already; name a directory that is new or empty")
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return cls(path, handle, job, _take_up(path, handle, job))
        except BlockingIOError:
            os.close(handle)
            raise DestinationError(f"another process is writing into {directory}") from None
        except BaseException:
            os.close(handle)
            raise

    @property
    def job(self) -> Job:
        """What is made."""
        return self._job

    @property
    def finished(self) -> dict[str, FileRecord]:
        """Files that are complete."""
        return self._finished

    def add(self, file: str, record: FileRecord) -> None:
        """``file`` is complete and in its place."""
        _append(self._handle, msgspec.json.encode(_Entry(file, record)))
        self._finished[file] = record

    def remove(self) -> None:
        """The job is done."""
        self._path.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)


def _take_up(path: Path, handle: int, job: Job) -> dict[str, FileRecord]:
    """What the journal says is finished; a new one is begun with the job."""
    lines = path.read_bytes().split(b"\n")
    # What comes after the last line end was cut short.
    os.ftruncate(handle, sum(len(line) + 1 for line in lines[:-1]))
    os.lseek(handle, 0, os.SEEK_END)
    if len(lines) == 1:
        _append(handle, msgspec.json.encode(job))
        return {}
    try:
        begun = msgspec.json.decode(lines[0], type=Job)
        entries = [msgspec.json.decode(line, type=_Entry) for line in lines[1:-1]]
    except msgspec.DecodeError:
        raise DestinationError(f"{path} is damaged; delete {path.parent} to begin again") from None
    if difference := job.difference(begun):
        raise DestinationError(
            f"{path.parent} was begun {difference}; quantize in the same way to finish it, or delete it to begin again"
        )
    return {entry.file: entry.record for entry in entries}


def _append(handle: int, line: bytes) -> None:
    os.write(handle, line + b"\n")
    os.fsync(handle)


def put_in_place(part: Path, path: Path) -> None:
    """Give a written and synchronised file its name, for good."""
    part.replace(path)
    sync_directory(path.parent)


def write_durably(path: Path, data: bytes) -> None:
    """Write a small file so that after a crash it is there whole, or not at all."""
    part = path.with_name(path.name + PART_SUFFIX)
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    put_in_place(part, path)


def sync_directory(directory: Path) -> None:
    """Make names that were given or taken in ``directory`` last."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
