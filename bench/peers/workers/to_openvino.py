"""A Mixtral checkpoint in the Hub's layout as an OpenVINO model with 4- or 8-bit weights.

``python -m bench.peers.workers.to_openvino CHECKPOINT DIRECTORY int4``; runs in OpenVINO's environment. The compression
is what ``optimum-cli export openvino --weight-format`` does by default.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path


def export(checkpoint: Path, directory: Path, weights: str) -> None:
    """Write ``directory``; it gets its name when it is complete.

    Raises:
        subprocess.CalledProcessError: the exporter failed; it has said why.
    """
    partial = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    command = [str(Path(sys.executable).with_name("optimum-cli")), "export", "openvino", f"--model={checkpoint}"]
    subprocess.run(
        [*command, "--task=text-generation-with-past", f"--weight-format={weights}", str(partial)], check=True
    )
    partial.rename(directory)


def main() -> int:
    """Export; the exporter's exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers.workers.to_openvino", description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("directory", type=Path)
    parser.add_argument("weights", choices=("int4", "int8"))
    options = parser.parse_args()
    try:
        export(options.checkpoint, options.directory, options.weights)
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
