"""The environment that the server gives its engine, for programs that measure the engine's work themselves."""

from __future__ import annotations

import os
import sys

from mixtral_serve.compose.server import ENGINE_ENVIRONMENT


def run_as_engine() -> None:
    """Start this program over unless its environment is the engine's.

    How threads wait is read when PyTorch is loaded: too late for a program that has begun.
    """
    if any(os.environ.get(name) != value for name, value in ENGINE_ENVIRONMENT.items()):
        os.execve(sys.executable, sys.orig_argv, os.environ | ENGINE_ENVIRONMENT)
