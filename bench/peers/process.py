"""A worker as a process: started, asked, put to sleep, ended.

Owns: ``Worker``. It stands in a process group of its own, so that whatever a peer starts beside it sleeps and ends with
it. A sleeping worker is stopped by signal: peers' idle threads may spin, and must not disturb who is measured.

Invariant: after ``close`` nothing of the worker is left.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_READ_BYTES = 1 << 16


class WorkerError(Exception):
    """A worker failed; the message is its own first line, or its last words. The worker may be alive."""


class WorkerUnavailableError(WorkerError):
    """The worker says that it cannot be measured here."""


class Worker:
    """Starts ``command`` and waits until it is loaded.

    Args:
        command: program and arguments.
        environment: variables of its environment, all of them.
        log: takes its standard error, from the beginning.
        patience_s: most seconds for loading, and for every answer.

    Raises:
        WorkerError: it did not come up.
        WorkerUnavailableError: it said why it cannot.
        OSError: it could not be started.
    """

    def __init__(self, command: Sequence[str], *, environment: Mapping[str, str], log: Path, patience_s: float) -> None:
        self._log = log
        self.patience_s = patience_s
        """May be changed between questions."""
        self._unread = b""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=dict(environment),
                start_new_session=True,
            )
        try:
            self.facts: dict[str, Any] = self._take("ready")
        except BaseException:  # an interrupt as well: nobody else could end it
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Of its first process, which leads its group."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether it can be asked."""
        return self._process.poll() is None

    @property
    def resident_bytes(self) -> int:
        """Memory of the worker's first process now, mapped file pages included; 0 where the system does not tell."""
        try:
            fields = Path(f"/proc/{self._process.pid}/statm").read_text("ascii").split()
        except OSError:
            return 0
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")

    def ask(self, command: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
        """Its answer to one command.

        Raises:
            WorkerError: it reported an error, ended, or stayed silent and was ended.
        """
        assert self._process.stdin is not None, "it was opened as a pipe"
        try:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self._last_words()) from None
        return self._take("answer")

    def sleep(self) -> None:
        """Stop all its threads where they are."""
        self._signal(signal.SIGSTOP)

    def wake(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """End it and all that it started."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None, "they were opened as pipes"
            with contextlib.suppress(BrokenPipeError):  # a command it never read
                pipe.close()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _take(self, expected: str) -> dict[str, Any]:
        """What stands under ``expected`` in its next message."""
        message: dict[str, Any] = json.loads(self._line())
        if "unavailable" in message:
            raise WorkerUnavailableError(message["unavailable"])
        if expected not in message:
            raise WorkerError(str(message.get("error", f"said {message}")))
        found: dict[str, Any] = message[expected]
        return found

    def _line(self) -> bytes:
        assert self._process.stdout is not None, "it was opened as a pipe"
        deadline_s = time.monotonic() + self.patience_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if not selector.select(max(0.0, deadline_s - time.monotonic())):
                    self.close()
                    raise WorkerError(f"no answer within {self.patience_s:g} s")
                read = os.read(self._process.stdout.fileno(), _READ_BYTES)
                if not read:
                    raise WorkerError(self._last_words())
                self._unread += read
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _last_words(self) -> str:
        """How it ended, and its last line of complaint."""
        self._process.wait()
        lines = self._log.read_text("utf-8", "replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        code = self._process.returncode
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"{how}: {last}" if last else how
