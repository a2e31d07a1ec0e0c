"""``examine``: would this configuration serve on this machine? Looks, loads nothing, changes nothing.

Owns the list of findings. A finding is ok, a warning (it would serve, but not as one may hope) or a failure (it
would not start); the exit code is 78 if anything failed.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from mixtral_serve import __version__
from mixtral_serve.compose.plan import ServingPlan, plan_serving, scheduler_config
from mixtral_serve.engine.errors import EXIT_CONFIG
from mixtral_serve.model.checkpoint import open_checkpoint
from mixtral_serve.model.errors import CheckpointError
from mixtral_serve.settings import Settings
from mixtral_serve.text.chat_template import load_chat_template
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


def examine(settings: Settings, *, meminfo: Path = Path("/proc/meminfo")) -> Report:
    """Look at the installation, the machine, the checkpoint, the plan and the port."""
    findings = [_installation(), _processors(settings)]
    plan = _plan(settings)
    if isinstance(plan, Finding):
        findings.append(plan)
    else:
        findings += [
            Finding("ok", "model", f"{plan.model_names[0]}: {plan.shape.num_parameters:,} parameters"),
            _checked("weights", lambda: _weights(plan)),
            _checked("tokenizer", lambda: _tokenizer(plan)),
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


def _plan(settings: Settings) -> ServingPlan | Finding:
    try:
        return plan_serving(settings)
    except CheckpointError as error:
        return Finding("failure", "model", f"{settings.model}: {error}")
    except PlanError as error:
        return Finding("failure", "memory plan", str(error))
    except ConfigError as error:
        return Finding("failure", "settings", str(error))


def _weights(plan: ServingPlan) -> str:
    checkpoint = open_checkpoint(plan.checkpoint)
    return f"{checkpoint.num_tensors:,} tensors in {len(checkpoint.shards):,} files, all there and of the right shape"


def _tokenizer(plan: ServingPlan) -> str:
    tokenizer = load_tokenizer(plan.checkpoint)
    template = load_chat_template(plan.checkpoint, tokenizer)
    kind = "no chat template: chat requests are refused" if template is None else "with chat template"
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
    fields = dict(line.split(":", 1) for line in meminfo.read_text("ascii").splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    detail = f"{available / 1e9:.1f} GB available, {plan.memory.planned_bytes / 1e9:.1f} GB planned"
    return Finding("ok" if available >= plan.memory.planned_bytes else "warning", "machine memory", detail)


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
