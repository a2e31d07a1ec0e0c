"""The documents say what the code says: laws by id, the table of statuses, the example policy."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import TestCase

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from scheduler import Policy
from scheduler.events import Admitted
from scheduler.lifecycle import transition_table
from scheduler.testing import World, make_request, scheduler_machine, storm

DOCS = Path(__file__).parents[2] / "docs"
LAWS = (DOCS / "laws.md").read_text(encoding="utf-8")
GUIDE = (DOCS / "writing-a-policy.md").read_text(encoding="utf-8")
CODE_BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)


@pytest.fixture(scope="module")
def example() -> Callable[[], Policy]:
    """The policy that the guide shows, as the guide shows it."""
    namespace: dict[str, Any] = {}
    exec(compile(CODE_BLOCKS[0], "writing-a-policy.md", "exec"), namespace)
    new_policy: Callable[[], Policy] = namespace["LeastServedTenantPolicy"]
    return new_policy


def test_the_table_of_statuses_is_the_one_in_the_code() -> None:
    shown = LAWS.partition("<!-- transitions -->\n")[2].partition("\n<!-- end -->")[0]
    assert shown == transition_table()


def test_every_law_that_the_code_names_is_written_down_and_the_other_way_round() -> None:
    written = set(re.findall(r"^\| (I\d+) \|", LAWS, flags=re.MULTILINE))
    library = Path(__file__).parents[2] / "scheduler"
    sources = [*library.rglob("*.py"), *Path(__file__).parent.rglob("*.py")]
    named = {
        law.upper()
        for source in sources
        for law in re.findall(r"\"(I\d+)\"|_(i\d+)(?=_)", source.read_text(encoding="utf-8"))
        for law in law
        if law
    }
    assert named - {"I0", "I33"} <= written
    assert written - named <= {"I7", "I26"}, "a law that no test names"


def test_the_files_that_the_laws_point_at_exist() -> None:
    root = Path(__file__).parents[2]
    for name in re.findall(r"`((?:tests/\w+/)?test_\w+\.py)`", LAWS):
        if not name.startswith("tests/"):
            assert (Path(__file__).parent / name).exists(), name
        elif (root / name).parent.exists():  # a copy of this library alone has no other tests
            assert (root / name).exists(), name


def test_the_example_keeps_every_law_in_storms(example: Callable[[], Policy]) -> None:
    for seed in range(10):
        storm(example, seed)


def test_the_example_keeps_every_law_in_hypothesis_plays(example: Callable[[], Policy]) -> None:
    run_state_machine_as_test(
        scheduler_machine(example),
        settings=settings(
            max_examples=30,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        ),
    )


def test_the_example_does_what_it_says(example: Callable[[], Policy], new_world: Callable[..., World]) -> None:
    world = new_world(example(), max_num_seqs=1)
    for index in range(4):
        world.add(make_request(f"rich{index}", [1] * 5, tenant="rich"))
    world.step()
    world.add(make_request("poor", [2], tenant="poor"))
    world.settle()
    starts = [event.request_id for event in world.trace if isinstance(event, Admitted)]
    assert starts[:2] == ["rich0", "poor"]


def test_the_test_that_the_guide_shows_runs(example: Callable[[], Policy]) -> None:
    namespace: dict[str, Any] = {"LeastServedTenantPolicy": example}
    exec(compile(CODE_BLOCKS[1], "writing-a-policy.md", "exec"), namespace)
    assert issubclass(namespace["TestLeastServedTenant"], TestCase)
    assert callable(namespace["test_storms"])
