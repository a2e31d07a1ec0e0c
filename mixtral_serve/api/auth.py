"""Who asks.

Owns: ``Caller`` and the seam ``Authenticate``, which routes call before they look at a body. ``anyone`` is the
only implementation so far: one tenant, no keys, for a server that listens on the loopback interface.

Whatever implements the seam decides by headers alone, never by the address of the request, which a client can
bend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Caller:
    """The party behind a request."""

    tenant: str
    """Prefixes are shared only within one tenant."""


Authenticate: TypeAlias = Callable[[Mapping[str, str]], Caller]
"""Headers -> caller; raises an ``ApiError`` for those who may not ask."""

_ANYONE = Caller(tenant="")


def anyone(headers: Mapping[str, str]) -> Caller:
    """Everybody is the same caller."""
    del headers
    return _ANYONE
