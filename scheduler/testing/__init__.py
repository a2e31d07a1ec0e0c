"""The public kit for testing schedulers and policies. Needs ``pytest`` and ``hypothesis``.

scheduler_machine    a Hypothesis state machine that checks every law against a policy of yours
World                one scheduler with an honest runner and the laws, for hand-written tests
KVHonestRunner       the fake model that betrays every KV mistake; ``reference_output`` is its oracle
configs, requests    strategies for small, crowded worlds
"""

from scheduler.testing.fake_runner import Fault, HonestModel, KVHonestRunner, StepCrash, reference_output
from scheduler.testing.machine import SchedulerMachine, scheduler_machine
from scheduler.testing.strategies import configs, four_bit_digest, hash_functions, requests
from scheduler.testing.world import History, World, compact

__all__ = [
    "Fault",
    "History",
    "HonestModel",
    "KVHonestRunner",
    "SchedulerMachine",
    "StepCrash",
    "World",
    "compact",
    "configs",
    "four_bit_digest",
    "hash_functions",
    "reference_output",
    "requests",
    "scheduler_machine",
]
