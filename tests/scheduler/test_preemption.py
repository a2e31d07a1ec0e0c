"""Who gives way when blocks run out, and why everybody ends all the same (I20 to I22)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from scheduler import FCFSPolicy, FinishReason, PriorityPolicy, RequestId, RequestView, Resumed
from scheduler.events import Admitted, Event, Preempted, PrefixHit
from scheduler.request import RequestKind
from scheduler.testing import ErraticPolicy, StarvingPolicy, World, make_request

NewWorld = Callable[..., World]


def crowded(new_world: NewWorld, *, policy: object = None, **fields: object) -> World:
    """Two requests that start together and cannot both be finished with four blocks."""
    world = new_world(policy, **{"num_blocks": 5, "block_size": 2, "max_num_seqs": 2, **fields})
    world.add(make_request("old", [1, 1], max_tokens=5))
    world.add(make_request("young", [2, 2], max_tokens=5))
    return world


def of_type(world: World, kind: type[Event]) -> list[str]:
    return [event.request_id for event in world.trace if isinstance(event, kind)]  # type: ignore[union-attr]


def test_i22_the_latest_arrival_gives_way_and_comes_back(new_world: NewWorld) -> None:
    world = crowded(new_world)
    world.settle()
    assert of_type(world, Preempted) == ["young"]
    assert of_type(world, Resumed) == ["young"]


def test_i22_a_policy_may_choose_another_victim_but_never_the_oldest(new_world: NewWorld) -> None:
    world = new_world(StarvingPolicy(), num_blocks=7, block_size=1, max_num_seqs=3, max_overtakes=0)
    for name in ("old", "middle", "young"):
        world.add(make_request(name, [len(name)], max_tokens=4))
    world.settle()
    assert of_type(world, Preempted)[0] == "middle"
    assert "old" not in of_type(world, Preempted)


def test_priority_sends_the_least_urgent_away(new_world: NewWorld) -> None:
    world = new_world(PriorityPolicy(), num_blocks=7, block_size=1, max_num_seqs=3)
    world.add(make_request("old", [1], max_tokens=4))
    world.add(make_request("idle", [2], max_tokens=4, priority=5))
    world.add(make_request("urgent", [3], max_tokens=4, priority=-5))
    world.settle()
    assert of_type(world, Preempted)[0] == "idle"


def test_nobody_new_starts_in_a_step_that_preempted_and_the_preempted_go_first_afterwards(new_world: NewWorld) -> None:
    world = crowded(new_world, max_num_seqs=3)
    while not of_type(world, Preempted):
        world.step()
    assert of_type(world, Admitted) == ["old", "young"]
    world.add(make_request("new", [2], max_tokens=1))
    world.settle()
    starts = [e.request_id for e in world.trace if isinstance(e, Admitted | Resumed)]
    assert starts == ["old", "young", "young", "new"]


def test_a_resumed_request_finds_its_own_prefix_in_the_cache(new_world: NewWorld) -> None:
    world = new_world(num_blocks=8, block_size=2, max_num_seqs=2)
    world.add(make_request("old", [1] * 4, max_tokens=8))
    world.add(make_request("young", [2] * 4, max_tokens=8))
    world.settle()
    hits = [e for e in world.trace if isinstance(e, PrefixHit) and not e.first]
    assert hits
    assert all(hit.num_hit_tokens <= hit.num_queried_tokens - 1 for hit in hits)
    assert world.reach.counts["resumed from the cache"]


@pytest.mark.parametrize("max_preemptions", [0, 1, 2])
def test_i22_after_its_last_preemption_a_request_is_pledged_all_it_can_need(
    new_world: NewWorld, max_preemptions: int
) -> None:
    world = new_world(StarvingPolicy(), num_blocks=9, block_size=1, max_num_seqs=4, max_preemptions=max_preemptions)
    for index in range(6):
        world.add(make_request(f"r{index}", [index + 1, index + 1], max_tokens=5))
    world.settle()
    worst = max(history.num_preemptions for history in world.histories.values())
    assert worst == max_preemptions
    if max_preemptions == 0:
        assert not of_type(world, Preempted)


def test_i22_not_even_a_policy_that_hounds_one_request_can_preempt_it_for_ever(new_world: NewWorld) -> None:
    class Hounding(FCFSPolicy):
        def victim(self, running: Sequence[RequestView], now: float) -> RequestView:  # noqa: ARG002 - at any time
            return max(running, key=lambda request: (request.num_preemptions, request.serial))

    world = new_world(Hounding(), num_blocks=12, block_size=1, max_num_seqs=3, max_preemptions=1)
    world.add(make_request("old", [1, 1], max_tokens=3))
    world.add(make_request("middle", [2, 2, 2], max_tokens=6))
    world.add(make_request("young", [3], max_tokens=4))
    world.settle()
    assert of_type(world, Preempted) == ["young"], "once preempted, it comes back with a pledge and is left alone"


class Scripted(FCFSPolicy):
    """Sends away whom the script names, in its order."""

    def __init__(self, *script: str) -> None:
        super().__init__()
        self.script = list(script)

    def victim(self, running: Sequence[RequestView], now: float) -> RequestView:  # noqa: ARG002 - at any time
        name = self.script.pop(0)
        return next(request for request in running if request.id == name)


def test_nobody_comes_back_in_the_step_that_preempted_even_if_there_is_room(new_world: NewWorld) -> None:
    world = new_world(Scripted("r1", "r3"), num_blocks=10, block_size=1, max_num_seqs=4)
    for index, num_prompt_tokens in enumerate((1, 1, 1, 5)):
        world.add(make_request(f"r{index}", [index + 1] * num_prompt_tokens, max_tokens=3))
    world.step()
    kinds = [type(event) for event in world.step()]
    assert kinds.count(Preempted) == 2
    assert Resumed not in kinds
    assert world.scheduler.stats().num_pledged_blocks == 0
    world.settle()


def test_i22_pledges_may_fill_the_pool_exactly_and_owe_nothing_besides(new_world: NewWorld) -> None:
    world = new_world(num_blocks=10, block_size=1, max_num_seqs=4, max_preemptions=0)
    for index in range(4):
        world.add(make_request(f"r{index}", [index + 1], max_tokens=2))
    world.step()
    stats = world.scheduler.stats()
    assert (stats.num_running, stats.num_used_blocks + stats.num_pledged_blocks) == (3, 9)
    world.settle()


def test_i22_a_pledge_covers_the_rest_of_a_prompt_and_is_not_counted_twice(new_world: NewWorld) -> None:
    world = new_world(num_blocks=9, block_size=1, max_num_seqs=2, max_preemptions=0, max_prefill_chunk=2)
    world.add(make_request("long", [1] * 4, max_tokens=1))
    world.add(make_request("short", [2] * 2, max_tokens=1))
    world.step()
    assert of_type(world, Admitted) == ["long", "short"], "five blocks and three are the whole pool"
    world.settle()


def test_a_resume_leaves_the_first_hit_as_it_was(new_world: NewWorld) -> None:
    world = crowded(new_world)
    world.settle()
    finished = world.histories[RequestId("young")].finished
    assert finished is not None
    assert finished.num_cached_tokens == 0


def test_a_victim_that_had_its_share_gives_it_back_to_the_step(new_world: NewWorld) -> None:
    # "young" decodes and is planned first; then "old", whose prompt continues, needs the block that young holds.
    world = new_world(num_blocks=6, block_size=2, max_num_batched_tokens=4, max_num_seqs=2, max_prefill_chunk=3)
    world.add(make_request("old", [1] * 8, max_tokens=1))
    world.step()
    world.add(make_request("young", [2], max_tokens=5))
    while world.scheduler.has_work:
        world.step()
    world.settle()
    assert world.histories[RequestId("old")].finished.reason is FinishReason.LENGTH  # type: ignore[union-attr]


def test_i25_an_interrupted_embedding_begins_again(new_world: NewWorld) -> None:
    for seed_blocks in range(8, 12):
        world = new_world(
            ErraticPolicy(), num_blocks=seed_blocks, block_size=1, max_num_batched_tokens=4, max_num_seqs=4
        )
        for index in range(4):
            world.add(make_request(f"g{index}", [index + 1], max_tokens=6))
            world.add(make_request(f"e{index}", [index + 1] * 7, kind=RequestKind.EMBED, max_tokens=0))
        world.settle()


def test_row43_a_storm_of_preemptions_ends_with_every_output_right(new_world: NewWorld) -> None:
    world = new_world(num_blocks=7, block_size=2, max_num_seqs=5, max_waiting=100)
    for index in range(50):
        world.add(make_request(f"r{index}", [1 + index % 3] * (1 + index % 4), max_tokens=7, stop_token_ids=[0]))
    world.settle()
    assert world.reach.counts["preempted"] >= 10
    reasons = {history.finished.reason for history in world.histories.values() if history.finished}
    assert reasons == {FinishReason.LENGTH, FinishReason.STOP}


def test_row42_growth_past_the_pool_ends_with_length_and_no_livelock(new_world: NewWorld) -> None:
    world = new_world(num_blocks=5, block_size=2, max_num_seqs=3)
    for name in ("a", "b", "c"):
        world.add(make_request(name, [ord(name)], max_tokens=7))
    world.settle()
    assert {h.finished.reason for h in world.histories.values() if h.finished} == {FinishReason.LENGTH}
    assert all(len(h.token_ids) == 7 for h in world.histories.values())
