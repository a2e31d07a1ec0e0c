"""The command line: ``mixtral-serve serve``, ``plan``, ``doctor``, ``quantize`` and ``--version``.

Owns what people type and the exit codes they get: 0 for success, 2 for a wrong command line or setting, 78 for a
configuration that cannot be served (``EX_CONFIG``: restarting does not help), 130 for a long piece of work that was
interrupted and can be continued, 1 for everything else. Errors are one line on standard error; a traceback means a
defect of ours.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, get_args

from mixtral_serve import __version__, settings
from mixtral_serve.compose.doctor import examine
from mixtral_serve.compose.plan_command import make_plan
from mixtral_serve.compose.server import run_server
from mixtral_serve.model.shape import Packing
from mixtral_serve.settings import ResolvedSettings, SettingsError

EXIT_USAGE: Final = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code."""
    parser = build_parser()
    arguments = vars(parser.parse_args(argv))
    command = arguments.pop("command")
    if command == "quantize":
        return _quantize(**arguments)
    print_config = arguments.pop("print_config", False)
    as_json = arguments.pop("as_json", False)
    verify = arguments.pop("verify", False)
    config_file = arguments.pop("config")
    try:
        resolved = settings.resolve(arguments, os.environ, config_file)
    except SettingsError as error:
        sys.stderr.write(f"mixtral-serve: {error}\n")
        return EXIT_USAGE
    if print_config:
        sys.stdout.write(resolved.table() + "\n")
        return 0
    if command == "plan":
        return _plan(resolved, as_json=as_json)
    return _doctor(resolved, verify=verify) if command == "doctor" else run_server(resolved.settings)


def build_parser() -> argparse.ArgumentParser:
    """All commands and flags."""
    parser = argparse.ArgumentParser(prog="mixtral-serve", description="Serve Mixtral on a CPU behind the OpenAI API.")
    parser.add_argument("--version", action="version", version=f"mixtral-serve {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="load a model and serve it", description=_SERVE)
    serve.add_argument("--print-config", action="store_true", help="print each setting and its source, then exit")
    doctor = commands.add_parser("doctor", help="look at the machine and the configuration", description=_DOCTOR)
    doctor.add_argument(
        "--verify",
        action="store_true",
        help="also hash every file of a packed checkpoint and compare with its manifest",
    )
    plan = commands.add_parser("plan", help="show what a model needs and what the rest buys", description=_PLAN)
    plan.add_argument("--json", dest="as_json", action="store_true", help="print the plan as JSON")
    for command in (serve, plan, doctor):
        settings.add_flags(command)
    _add_quantize(commands.add_parser("quantize", help="pack a checkpoint into int4 or int8", description=_QUANTIZE))
    return parser


def _add_quantize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="checkpoint directory, or 'demo' for the bundled model")
    parser.add_argument("destination", metavar="DST", type=Path, help="directory that becomes the packed checkpoint")
    parser.add_argument("--weights", required=True, choices=get_args(Packing), help="how weights are packed")
    parser.add_argument(
        "--workers", dest="num_workers", metavar="N", type=_at_least_one, help="threads (default: the CPUs it may use)"
    )
    parser.add_argument(
        "--revision", metavar="TEXT", help="revision of the source, for the manifest (default: as the directory tells)"
    )


def _at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _doctor(resolved: ResolvedSettings, *, verify: bool) -> int:
    report = examine(resolved.settings, verify=verify)
    sys.stdout.write(report.text() + "\n")
    return report.exit_code


def _quantize(
    source: str, destination: Path, weights: Packing, *, num_workers: int | None, revision: str | None
) -> int:
    from mixtral_serve.compose.quantize import run_quantize  # noqa: PLC0415 - it imports PyTorch; serving must not

    return run_quantize(source, destination, weights, num_workers=num_workers, revision=revision)


def _plan(resolved: ResolvedSettings, *, as_json: bool) -> int:
    report = make_plan(resolved.settings)
    sys.stdout.write(report.rendered(as_json=as_json))
    return report.exit_code


_SERVE: Final = """Load a model and serve it. Every flag is also a key of the TOML file given by --config (with
underscores) and an environment variable (MIXTRAL_SERVE_ and the key in capitals); a flag wins over a variable, a
variable over the file."""
_PLAN: Final = """Show what a model would need under the memory cap, how many tokens of KV cache the rest buys and how
many requests those are. Loads nothing. The model is a checkpoint directory, demo, mixtral-8x7b or mixtral-8x22b. Takes
the flags of serve. Exits with 78 if it does not fit."""
_QUANTIZE: Final = """Pack a checkpoint's large matrices and write a manifest with the SHA-256 of every file. Starting
from the result takes seconds. A run that was interrupted is continued by the same command."""
_DOCTOR: Final = """Look at the machine, the checkpoint and the memory plan without loading the model. Takes the flags
of serve."""


if __name__ == "__main__":
    sys.exit(main())
