"""The public kit for testing schedulers and policies. Needs ``pytest`` and ``hypothesis``.

scheduler_machine    a Hypothesis state machine that checks every law against a policy of yours
storm                a long, crowded, seeded play of the same laws
World                one scheduler with an honest runner and the laws, for hand-written tests
make_request         a request in one line
KVHonestRunner       the fake model that betrays every KV mistake; ``reference_output`` is its oracle
configs, requests    strategies for small, crowded worlds
StarvingPolicy, ErraticPolicy   policies that mean harm
"""

from scheduler.testing.build import make_request
from scheduler.testing.fake_runner import Fault, HonestModel, KVHonestRunner, StepCrash, reference_output
from scheduler.testing.hostile import ErraticPolicy, StarvingPolicy
from scheduler.testing.machine import SchedulerMachine, scheduler_machine
from scheduler.testing.reach import BEHAVIOURS, Reach
from scheduler.testing.storm import storm
from scheduler.testing.strategies import configs, four_bit_digest, hash_functions, requests
from scheduler.testing.world import History, World, compact

__all__ = [
    "BEHAVIOURS",
    "ErraticPolicy",
    "Fault",
    "History",
    "HonestModel",
    "KVHonestRunner",
    "Reach",
    "SchedulerMachine",
    "StarvingPolicy",
    "StepCrash",
    "World",
    "compact",
    "configs",
    "four_bit_digest",
    "hash_functions",
    "make_request",
    "reference_output",
    "requests",
    "scheduler_machine",
    "storm",
]
