"""What the API process must never load."""

from __future__ import annotations

import subprocess
import sys


def test_the_api_process_loads_neither_pytorch_nor_transformers() -> None:
    heavy = ("torch", "transformers", "accelerate")
    code = f"import sys, mixtral_serve.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
