"""``examine``: would this configuration serve on this machine? Looks, loads nothing, changes nothing.

Owns the list of findings. A finding is ok, a warning (it would serve, but not as one may hope) or a failure (it
would not start); the exit code is 78 if anything failed.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from mixtral_serve import __version__, machine
from mixtral_serve.compose.limits import tightest_limit
from mixtral_serve.compose.plan import ServingPlan, plan_serving, scheduler_config
from mixtral_serve.engine.errors import EXIT_CONFIG
from mixtral_serve.kernels.names import EXIT_LESSER_INSTRUCTIONS, KernelChoice
from mixtral_serve.model.checkpoint import open_checkpoint
from mixtral_serve.model.errors import CheckpointError
from mixtral_serve.model.manifest import verify_files
from mixtral_serve.model.shape import Weights
from mixtral_serve.settings import Settings
from mixtral_serve.text.chat_format import load_chat_format
from mixtral_serve.text.errors import TextError
from mixtral_serve.text.tokenizer import load_tokenizer
from scheduler.errors import ConfigError, PlanError

Verdict = Literal["ok", "warning", "failure"]
_MARKS: Final[dict[Verdict, str]] = {"ok": "ok  ", "warning": "warn", "failure": "FAIL"}
_PACKAGES: Final = ("torch", "transformers", "accelerate", "tokenizers", "fastapi", "uvicorn")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    verdict: Verdict
    subject: str
    detail: str


@dataclass(frozen=True, slots=True)
class Report:
    """All findings, in the order of the examination."""

    findings: tuple[Finding, ...]

    @property
    def exit_code(self) -> int:
        """0, or 78 if something failed."""
        return EXIT_CONFIG if any(finding.verdict == "failure" for finding in self.findings) else 0

    def text(self) -> str:
        """For people: one line per finding; further lines of a detail are indented below it."""
        width = max(len(finding.subject) for finding in self.findings)
        indent = "\n" + " " * (width + 8)
        return "\n".join(
            f"{_MARKS[finding.verdict]}  {finding.subject:<{width}}  {finding.detail.replace(chr(10), indent)}"
            for finding in self.findings
        )


def examine(settings: Settings, *, verify: bool = False, meminfo: Path = machine.MEMINFO) -> Report:
    """Look at the installation, the machine, the kernels, the checkpoint, the plan and the port.

    ``verify`` reads every byte of a packed checkpoint and compares it with the manifest.
    """
    findings = [_installation(), _processors(settings)]
    plan = _plan(settings, meminfo)
    if isinstance(plan, Finding):
        findings.append(plan)
    else:
        findings += [
            Finding("ok", "model", f"{plan.model_names[0]}: {plan.shape.num_parameters:,} parameters"),
            _checked("weights", lambda: _weights(plan, verify=verify)),
            _kernels(plan.weights, settings.kernels),
            _checked("tokenizer", lambda: _tokenizer(settings, plan)),
            Finding("ok", "memory plan", plan.memory.table().strip()),
            _checked("schedule", lambda: _schedule(settings, plan)),
            _machine_memory(plan, meminfo),
        ]
    findings.append(_port(settings))
    return Report(tuple(findings))


def _installation() -> Finding:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES)
    return Finding("ok", "installation", f"mixtral-serve {__version__}, Python {platform.python_version()}, {versions}")


def _processors(settings: Settings) -> Finding:
    usable = len(os.sched_getaffinity(0))
    if usable < settings.threads:
        return Finding(
            "warning", "processors", f"{usable} usable, {settings.threads} configured: {usable} will be used"
        )
    return Finding("ok", "processors", f"{usable} usable, {settings.threads} configured")


def _kernels(weights: Weights, asked: KernelChoice) -> Finding:
    """What computes with the weights; found out in a process of its own, which may import PyTorch."""
    if weights not in ("int8", "int4"):
        return Finding("ok", "kernels", f"PyTorch's own, for {weights} weights")
    probe = subprocess.run(
        [sys.executable, "-m", "mixtral_serve.kernels.probe", weights, asked],
        capture_output=True,
        text=True,
        check=False,
    )
    return kernels_finding(probe.returncode, probe.stdout.strip() or probe.stderr.strip())


def kernels_finding(exit_code: int, said: str) -> Finding:
    """What the end of ``kernels.probe`` means. Its last line is the outcome, and comes first here."""
    verdicts: dict[int, Verdict] = {0: "ok", EXIT_LESSER_INSTRUCTIONS: "warning"}
    *before, outcome = said.splitlines() or [f"the probe ended with {exit_code}"]
    detail = "\n".join((outcome.removeprefix("kernels: "), *before))
    return Finding(verdicts.get(exit_code, "failure"), "kernels", detail)


def _plan(settings: Settings, meminfo: Path) -> ServingPlan | Finding:
    try:
        return plan_serving(settings, tightest_limit(settings.memory_cap_bytes, meminfo=meminfo))
    except CheckpointError as error:
        return Finding("failure", "model", f"{settings.model}: {error}")
    except PlanError as error:
        return Finding("failure", "memory plan", str(error))
    except ConfigError as error:
        return Finding("failure", "settings", str(error))


def _weights(plan: ServingPlan, *, verify: bool) -> str:
    checkpoint = open_checkpoint(plan.checkpoint)
    found = f"{checkpoint.num_tensors:,} tensors in {len(checkpoint.shards):,} files, all there and of the right shape"
    if checkpoint.manifest is None:
        return f"{found}; there is no manifest to verify them against" if verify else found
    if not verify:
        return f"{found}, packed as {checkpoint.manifest.weights}; they are verified when they are loaded"
    verify_files(checkpoint.path, checkpoint.manifest, num_threads=len(os.sched_getaffinity(0)))
    return f"{found}, packed as {checkpoint.manifest.weights} and verified"


def _tokenizer(settings: Settings, plan: ServingPlan) -> str:
    tokenizer = load_tokenizer(plan.checkpoint)
    chat = load_chat_format(plan.checkpoint, tokenizer, choice=settings.chat_template, strict=settings.strict_chat)
    kind = "no chat template: chat requests are refused" if chat is None else f"chat by {chat.description}"
    return f"{tokenizer.vocab_size:,} pieces, {kind}"


def _schedule(settings: Settings, plan: ServingPlan) -> str:
    config = scheduler_config(settings, plan)
    return (
        f"{config.max_num_seqs} requests at once, {config.max_num_batched_tokens} tokens per step, "
        f"at most {config.max_tokens_per_request:,} tokens per request"
    )


def _checked(subject: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding("ok", subject, look())
    except (CheckpointError, TextError, ConfigError) as error:
        return Finding("failure", subject, str(error))


def _machine_memory(plan: ServingPlan, meminfo: Path) -> Finding:
    memory = machine.machine_memory(meminfo)
    if memory is None:
        return Finding("warning", "machine memory", "the kernel does not say how much there is")
    planned_bytes = plan.memory.planned_bytes
    detail = f"{memory.available_bytes / 1e9:.1f} GB available, {planned_bytes / 1e9:.1f} GB planned"
    return Finding("ok" if memory.available_bytes >= planned_bytes else "warning", "machine memory", detail)


def _port(settings: Settings) -> Finding:
    where = f"{settings.host}:{settings.port}"
    try:
        family, kind, *_, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return Finding("failure", "port", f"{where}: {error.strerror}")
    return Finding("ok", "port", f"{where} is free")
