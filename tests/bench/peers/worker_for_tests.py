"""A worker over the real protocol that computes nothing; its variant says how it behaves."""

from __future__ import annotations

import os
import signal
import sys

from bench.peers.protocol import Facts, UnavailableError, WorkerOptions, run_worker


class Scripted:
    """Prints where it must not; decodes as its variant says."""

    def __init__(self, options: WorkerOptions) -> None:
        self._options = options
        if options.variant == "unavailable":
            raise UnavailableError("no such weights here")
        if options.variant == "broken":
            raise ImportError("libfast.so: cannot open shared object file")
        sys.stdout.write("a library's banner on standard output\n")
        os.system("echo and one from a child process")

    @property
    def facts(self) -> Facts:
        return Facts("scripted", {"threads": self._options.threads})

    def decode(self, batch: int, steps: int, context: int) -> float:
        if batch == 2:
            raise RuntimeError("cannot decode two")
        if batch == 3:
            os.write(2, b"out of luck\n")
            os._exit(3)
        if batch == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        if batch == 5:
            signal.pause()
        return steps * 0.5 + context

    def prefill(self, prompt: list[int]) -> float:
        return len(prompt) / 1000


if __name__ == "__main__":
    run_worker(Scripted)
