"""The bundled demo model: a real but small Mixtral and everything that makes it.

Owns the location of the shipped checkpoint and nothing else; importing this
package loads neither PyTorch nor Transformers.
"""

from importlib.resources import files
from pathlib import Path

__all__ = ["checkpoint_path"]


def checkpoint_path() -> Path:
    """Return the directory of the bundled checkpoint, laid out as on the Hugging Face Hub."""
    return Path(str(files(__name__) / "checkpoint"))
