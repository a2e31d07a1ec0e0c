"""What researchers import is pinned: a name that appears or vanishes is a decision, and this test is where it shows."""

from __future__ import annotations

import subprocess
import sys

import scheduler
import scheduler.policies
import scheduler.sim

PUBLIC = """
    POLICIES AccountingError AdmissionError Admitted BlockEvicted BlockId Blocking Census CensusEntry ConfigError
    DuplicateRequestError Event FCFSPolicy FinishReason Finished IllegalTransitionError InvalidRequestError KVLayout
    MemoryAccountant MemoryFullError MemoryPlan MemoryStats OrderedPolicy PlanError Policy Preempted PrefixHit
    PriorityPolicy PromptScored ProtocolError QueueFullError Request RequestId RequestKind RequestStatus
    RequestTooLargeError RequestView Resumed ScheduledSlice Scheduler SchedulerConfig SchedulerError SchedulerStats
    SliceResult StepPlan StepResult StopRule TokenLogprob TokensCommitted plan_memory request_bytes
""".split()  # noqa: SIM905 - a list literal would be fifty lines

KIT = """
    BEHAVIOURS ErraticPolicy Fault History HonestModel KVHonestRunner Reach SchedulerMachine StarvingPolicy StepCrash
    World compact configs four_bit_digest hash_functions make_request reference_output requests scheduler_machine
    storm
""".split()  # noqa: SIM905 - a list literal would be fifty lines


def test_the_library_exports_exactly_its_public_names() -> None:
    assert sorted(scheduler.__all__) == sorted(PUBLIC)
    assert all(hasattr(scheduler, name) for name in PUBLIC)


def test_the_kit_exports_exactly_its_public_names() -> None:
    import scheduler.testing as kit  # noqa: PLC0415 - the import itself is under test

    assert sorted(kit.__all__) == sorted(KIT)
    assert all(hasattr(kit, name) for name in KIT)


def test_policies_are_found_by_the_names_that_settings_use() -> None:
    assert sorted(scheduler.POLICIES) == ["fcfs", "priority"]


def test_importing_the_library_loads_neither_the_kit_nor_anything_foreign() -> None:
    program = (
        "import sys; before = set(sys.modules); import scheduler;"
        "loaded = {name.partition('.')[0] for name in set(sys.modules) - before};"
        "print(*sorted(loaded - set(sys.stdlib_module_names)));"
        "print('scheduler.testing' in sys.modules, 'scheduler.sim' in sys.modules, 'random' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["scheduler", "False False False"]
