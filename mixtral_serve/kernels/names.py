"""Names of the backends, and the probe's exit code, for those that must not import a tensor library."""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

BackendName: TypeAlias = Literal["native", "torch", "reference"]
KernelChoice: TypeAlias = Literal["auto", "native", "torch", "reference"]
"""What an operator asks for; ``auto`` takes the fastest that is there."""

EXIT_LESSER_INSTRUCTIONS: Final = 3
"""Of ``kernels.probe``: something would compute, but not with the best instructions of this CPU."""
