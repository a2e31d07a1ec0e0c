"""What the model room raises at operators.

    ModelError
    ├── CheckpointError     a checkpoint directory that must not be served
    └── DestinationError    a directory that a checkpoint cannot be written into

The message is one line for the person who started the server: it names the file and, where one is at fault,
the tensor or field. Paths are relative to the checkpoint, so that a message may be shown anywhere.
"""

from __future__ import annotations

EXIT_CODE_CHECKPOINT = 78
"""What a process that cannot load its checkpoint exits with (``EX_CONFIG`` of sysexits.h)."""


class ModelError(Exception):
    """Root of what this room raises on purpose."""


class CheckpointError(ModelError):
    """A checkpoint was refused; nothing of it is in use.

    ``file`` is the file at fault, relative to the checkpoint directory ("." for the directory itself);
    ``subject`` the tensor or field in it, where there is one.
    """

    def __init__(self, file: str, problem: str, *, subject: str | None = None) -> None:
        where = file if subject is None else f"{file}: {subject}"
        super().__init__(" ".join(f"{where}: {problem}".split()))
        self.file = file
        self.subject = subject


class DestinationError(ModelError):
    """A packed checkpoint cannot be written where it was to be; what was finished before is kept.

    The message is one line that says what to do.
    """
