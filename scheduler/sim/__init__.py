"""Ground for simulations: a virtual clock and an event heap."""

from scheduler.sim.clock import Clock, VirtualClock
from scheduler.sim.event_heap import EventHeap

__all__ = ["Clock", "EventHeap", "VirtualClock"]
