"""Where no compiler was: int8 is served with what PyTorch brings, int4 is refused, and nothing else changes."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from mixtral_serve.kernels.torch_backend import TorchBackend

PROGRAM = """
import json, logging, sys
from importlib.machinery import ModuleSpec

class Hidden:
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, None) if name == "mixtral_serve.kernels._native" else None

sys.meta_path.insert(0, Hidden())
lines = []
class Lines(logging.Handler):
    def emit(self, record):
        lines.append(record.getMessage())
logging.getLogger("mixtral_serve.kernels").addHandler(Lines())
logging.getLogger("mixtral_serve.kernels").setLevel("INFO")

from array import array
from mixtral_serve.contract import RunBatch, SamplingParams
from mixtral_serve.demo import checkpoint_path
from mixtral_serve.kernels import native
from mixtral_serve.model.runner import Numerics, load_runner
from scheduler.config import SchedulerConfig
from scheduler.events import TokensCommitted
from scheduler.policies.fcfs import FCFSPolicy
from scheduler.request import Request, RequestId, StopRule
from scheduler.scheduler import Scheduler

assert not native.is_available()
found = {}
for weights, kv in (("int4", "auto"), ("int8", "int8"), ("int8", "auto")):
    try:
        numerics = Numerics(weights=weights, kv_cache_dtype=kv)
        runner = load_runner(checkpoint_path(), numerics, num_blocks=32, block_size=16, num_threads=1)
    except Exception as error:
        found[f"{weights} {kv}"] = f"{type(error).__name__}: {error}"
found["fingerprint"] = runner.info.fingerprint
scheduler = Scheduler(SchedulerConfig(num_blocks=32, block_size=16), FCFSPolicy())
scheduler.add(Request(RequestId("r"), array("i", range(300, 340)), StopRule(5), 0.0), 0.0)
tokens = []
while scheduler.has_work:
    plan = scheduler.step(0.0)
    result = runner.run(RunBatch(plan, (SamplingParams(temperature=0),) * len(plan.slices)))
    tokens += [event.token_id for event in scheduler.commit(result, 0.0) if isinstance(event, TokensCommitted)]
print(json.dumps(found | {"num_tokens": len(tokens), "lines": lines}))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What a process without the compiled library makes of the demo model."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    values: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return values


@pytest.mark.skipif(TorchBackend().missing("int8") is not None, reason="this PyTorch has no FBGEMM")
@pytest.mark.slow
def test_int8_runs_on_torch_and_one_line_says_why(found: dict[str, Any]) -> None:
    assert "-int8-kvbf16-torch" in found["fingerprint"]
    assert found["fingerprint"].endswith("-batchvariant")
    assert found["num_tokens"] == 5
    line = found["lines"][-1]
    assert line.startswith(f"kernels: {TorchBackend().label}, the only one for int8 weights here; native cannot: the ")
    assert "the compiled kernels were not built" in line
    assert "install a C++ compiler" in line


@pytest.mark.slow
def test_int4_and_an_int8_cache_are_refused_with_what_to_install(found: dict[str, Any]) -> None:
    assert found["int4 auto"].startswith("KernelsUnavailableError: weights = int4: the compiled kernels were not built")
    assert found["int8 int8"].startswith("NativeUnavailableError: ")
