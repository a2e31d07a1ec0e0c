"""The command line: ``mixtral-serve serve``, ``doctor`` and ``--version``.

Owns what people type and the exit codes they get: 0 for success, 2 for a wrong command line or setting, 78 for a
configuration that cannot be served (``EX_CONFIG``: restarting does not help), 1 for everything else. Errors
are one line on standard error; a traceback means a defect of ours.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Final

from mixtral_serve import __version__, settings
from mixtral_serve.compose.doctor import examine
from mixtral_serve.compose.server import run_server
from mixtral_serve.settings import ResolvedSettings, SettingsError

EXIT_USAGE: Final = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code."""
    parser = build_parser()
    arguments = vars(parser.parse_args(argv))
    command = arguments.pop("command")
    print_config = arguments.pop("print_config", False)
    config_file = arguments.pop("config")
    try:
        resolved = settings.resolve(arguments, os.environ, config_file)
    except SettingsError as error:
        sys.stderr.write(f"mixtral-serve: {error}\n")
        return EXIT_USAGE
    if print_config:
        sys.stdout.write(resolved.table() + "\n")
        return 0
    return _COMMANDS[command](resolved)


def build_parser() -> argparse.ArgumentParser:
    """All commands and flags."""
    parser = argparse.ArgumentParser(prog="mixtral-serve", description="Serve Mixtral on a CPU behind the OpenAI API.")
    parser.add_argument("--version", action="version", version=f"mixtral-serve {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="load a model and serve it", description=_SERVE)
    serve.add_argument("--print-config", action="store_true", help="print each setting and its source, then exit")
    doctor = commands.add_parser("doctor", help="look at the machine and the configuration", description=_DOCTOR)
    for command in (serve, doctor):
        settings.add_flags(command)
    return parser


def _doctor(resolved: ResolvedSettings) -> int:
    report = examine(resolved.settings)
    sys.stdout.write(report.text() + "\n")
    return report.exit_code


def _serve(resolved: ResolvedSettings) -> int:
    return run_server(resolved.settings)


_COMMANDS: Final = {"serve": _serve, "doctor": _doctor}

_SERVE: Final = """Load a model and serve it. Every flag is also a key of the TOML file given by --config (with
underscores) and an environment variable (MIXTRAL_SERVE_ and the key in capitals); a flag wins over a variable, a
variable over the file."""
_DOCTOR: Final = """Look at the machine, the checkpoint and the memory plan without loading the model. Takes the flags
of serve."""


if __name__ == "__main__":
    sys.exit(main())
