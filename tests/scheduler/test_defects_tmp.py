from __future__ import annotations
import gc
from scheduler.config import SchedulerConfig
from scheduler.policies import FCFSPolicy
from scheduler.testing.build import make_request
from scheduler.testing.hostile import StarvingPolicy
from scheduler.testing import World
from scheduler.request import RequestId, RequestState


def test_i23() -> None:
    world = World(SchedulerConfig(num_blocks=100, block_size=4, max_num_seqs=1, max_overtakes=1), StarvingPolicy())
    world.add(make_request("running", [1], max_tokens=20))
    world.step()
    for i in range(4):
        world.add(make_request(f"z{i}", [1]))
    world.add(make_request("r1", [1]))
    for i in range(4):
        world.finish(RequestId(f"z{i}"))
    world.add(make_request("r2", [1]))
    for i in range(8):
        world.add(make_request(f"n{i}", [1]))
    world.settle()


def test_leader() -> None:
    config = SchedulerConfig(num_blocks=100, block_size=4, max_num_seqs=8)
    world = World(config, FCFSPolicy())
    prompt = [1] * 9
    world.add(make_request("first", prompt[:5], max_tokens=1))
    world.step()
    world.add(make_request("scored", prompt, max_tokens=50, prompt_logprobs=True))
    world.add(make_request("waiter", prompt, max_tokens=1))
    for _ in range(4):
        world.step()
    assert RequestId("waiter") not in world.live


def test_deadline_leak() -> None:
    config = SchedulerConfig(num_blocks=100, block_size=4, max_num_seqs=8)
    world = World(config, FCFSPolicy())
    gc.collect()
    for i in range(200):
        world.add(make_request(f"r{i}", [1, 2], max_tokens=1, deadline_s=1e9))
        world.step()
    gc.collect()
    assert sum(isinstance(o, RequestState) for o in gc.get_objects()) <= 70
