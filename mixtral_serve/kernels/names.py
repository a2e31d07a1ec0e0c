"""Names of the backends, for those that must not import a tensor library to check a setting."""

from __future__ import annotations

from typing import Literal, TypeAlias

BackendName: TypeAlias = Literal["native", "torch", "reference"]
KernelChoice: TypeAlias = Literal["auto", "native", "torch", "reference"]
"""What an operator asks for; ``auto`` takes the fastest that is there."""
