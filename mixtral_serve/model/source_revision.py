"""Which revision of a model a directory holds, as far as the place it came from says.

Owns: where downloaders and version control leave that: the cache of the Hugging Face Hub (the directory is named after
the commit), a directory that the Hub's tools downloaded into (a note beside each file), and a git work tree. Only
small text files are read, and git itself is not run: a foreign directory's configuration is nothing to execute.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

_COMMIT: Final = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
_REFERENCE: Final = re.compile(r"ref: (refs/[\w./-]+)")
_NOTE_BYTES: Final = 1 << 20


def find_revision(directory: Path) -> str | None:
    """``REPOSITORY@COMMIT`` or a commit; None where nothing says it."""
    directory = directory.absolute()
    return _of_hub_cache(directory) or _of_hub_download(directory) or _of_git(directory)


def _of_hub_cache(directory: Path) -> str | None:
    """``models--OWNER--NAME/snapshots/COMMIT``."""
    repository, snapshots = directory.parent.parent.name, directory.parent.name
    if snapshots != "snapshots" or not repository.startswith("models--") or not _COMMIT.fullmatch(directory.name):
        return None
    return f"{repository.removeprefix('models--').replace('--', '/')}@{directory.name}"


def _of_hub_download(directory: Path) -> str | None:
    """The first line of each file's note is the commit; they must agree."""
    notes = (directory / ".cache" / "huggingface" / "download").glob("*.metadata")
    commits = {_text(note).partition("\n")[0].strip() for note in notes}
    commit = commits.pop() if len(commits) == 1 else ""
    return commit if _COMMIT.fullmatch(commit) else None


def _of_git(directory: Path) -> str | None:
    """What HEAD points at, as a loose or a packed reference."""
    git = directory / ".git"
    commit = _text(git / "HEAD").strip()
    if named := _REFERENCE.fullmatch(commit):
        if ".." in named[1]:
            return None
        packed = re.search(rf"^([0-9a-f]+) {re.escape(named[1])}$", _text(git / "packed-refs"), re.MULTILINE)
        commit = _text(git / named[1]).strip() or (packed[1] if packed else "")
    return commit if _COMMIT.fullmatch(commit) else None


def _text(path: Path) -> str:
    """The beginning of a text file; empty where there is none."""
    try:
        with path.open("rb") as file:
            return file.read(_NOTE_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""
