"""What the API process must never load."""

from __future__ import annotations

import subprocess
import sys


def test_the_api_process_loads_neither_pytorch_nor_transformers() -> None:
    code = "import sys, mixtral_serve.cli; print([m for m in ('torch', 'transformers', 'accelerate') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
