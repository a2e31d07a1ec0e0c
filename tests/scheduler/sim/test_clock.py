"""``VirtualClock`` moves only when told, and only forward."""

from __future__ import annotations

import pytest

from scheduler.sim import VirtualClock


def test_it_stands_still_until_it_is_moved() -> None:
    clock = VirtualClock(2.0)
    assert (clock(), clock()) == (2.0, 2.0)
    clock.advance(0.5)
    assert clock() == 2.5
    clock.advance_to(2.5)
    assert clock() == 2.5
    assert VirtualClock()() == 0.0


def test_it_does_not_go_back() -> None:
    clock = VirtualClock(2.0)
    with pytest.raises(ValueError, match=r"stands at 2\.0, it does not go back to 1\.0"):
        clock.advance_to(1.0)
    with pytest.raises(ValueError, match="does not go back"):
        clock.advance(-0.1)
    assert clock() == 2.0
