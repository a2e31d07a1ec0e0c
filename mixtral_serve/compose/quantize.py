"""``run_quantize``: what ``mixtral-serve quantize`` does, and the exit code it ends with.

Exit codes: 0 when the packed checkpoint is complete; 78 for a source that cannot be packed, as when it is to be served;
1 for a destination that cannot be written; 130 after Ctrl-C. After the last two the same command continues.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

from mixtral_serve.demo import checkpoint_path
from mixtral_serve.engine.errors import EXIT_CONFIG
from mixtral_serve.model.checkpoint import open_checkpoint
from mixtral_serve.model.errors import CheckpointError, DestinationError
from mixtral_serve.model.quantize import quantize_checkpoint
from mixtral_serve.model.shape import Packing
from mixtral_serve.model.threads import plan_threads
from mixtral_serve.observe.logs import configure_logging

EXIT_DESTINATION: Final = 1
EXIT_INTERRUPTED: Final = 130


def run_quantize(
    source: str, destination: Path, weights: Packing, *, num_workers: int | None = None, revision: str | None = None
) -> int:
    """Pack the checkpoint ``source`` (a directory, or ``demo``) into ``destination``. Returns the exit code.

    ``num_workers`` defaults to the CPUs that this process may use.
    """
    configure_logging()
    num_workers = num_workers or plan_threads(os.cpu_count() or 1).num_threads
    try:
        opened = open_checkpoint(checkpoint_path() if source == "demo" else Path(source))
        manifest = quantize_checkpoint(opened, destination, weights, num_workers=num_workers, revision=revision)
    except CheckpointError as error:
        return _end(f"{source}: {error}", EXIT_CONFIG)
    except DestinationError as error:
        return _end(str(error), EXIT_DESTINATION)
    except KeyboardInterrupt:
        return _end("interrupted; the same command continues", EXIT_INTERRUPTED)
    num_bytes = sum(record.num_bytes for record in manifest.files.values())
    revision = manifest.source.revision or "unknown (--revision states it)"
    sys.stdout.write(
        f"{destination}: {manifest.weights}, {num_bytes / 1e9:.2f} GB in {len(manifest.files)} files, "
        f"source revision {revision}\nServe it with: mixtral-serve serve --model {destination}\n"
    )
    return 0


def _end(message: str, exit_code: int) -> int:
    sys.stderr.write(f"mixtral-serve: {message}\n")
    return exit_code
