"""The rules that keep the house readable, as far as a program can tell. Each failure names file and line."""

from __future__ import annotations

import ast
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("scheduler", "mixtral_serve", "bench")
FILES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 7
MANY_PARAMETERS = ("mixtral_serve/api/schemas/", "mixtral_serve/settings")
"""Schemas and settings mirror what people send; their width is not ours to choose."""
FOREIGN_SIGNATURES = {"paged_attention_forward": "Transformers calls it"}
"""Functions whose parameters somebody else has fixed."""
PRINTS = ("bench/", "mixtral_serve/cli")
"""Commands talk to people."""

CLOCKS = {"time", "datetime", "random", "secrets", "logging", "threading", "asyncio", "multiprocessing", "os", "socket"}
MAY_BE_RANDOM = ("scheduler/sim/", "scheduler/testing/")
"""Seeded generators only; ``from random import Random`` and nothing else."""

NEEDS_A_REASON = re.compile(r"#\s*(noqa|type:\s*ignore|pragma:\s*no cover)")
HAS_A_REASON = re.compile(
    r"#\s*(noqa:\s*[A-Z]+\d+(,\s*[A-Z]+\d+)*|type:\s*ignore\[[\w, -]+\]|pragma: no cover)\s+[-–#(]\s*\w+"
)


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def functions(file: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def imports(file: Path) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    """Line, module, and the names taken from it (empty for a plain import)."""
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, ()
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or "", tuple(alias.name for alias in node.names)


def test_the_packages_are_found() -> None:
    assert {file.relative_to(ROOT).parts[0] for file in FILES} == set(PACKAGES)


def test_no_file_is_longer_than_400_lines() -> None:
    lengths = {name_of(file): len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert not {name: length for name, length in lengths.items() if length > MAX_FILE_LINES}


def test_no_function_is_longer_than_60_lines() -> None:
    lengths = {
        f"{name_of(file)}:{function.lineno} {function.name}": (function.end_lineno or 0) - function.lineno + 1
        for file in FILES
        for function in functions(file)
    }
    assert not {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES}


def test_no_function_takes_more_than_7_parameters() -> None:
    wide = {}
    for file in FILES:
        if name_of(file).startswith(MANY_PARAMETERS):
            continue
        for function in functions(file):
            parameters = function.args
            names = [a.arg for a in (*parameters.posonlyargs, *parameters.args, *parameters.kwonlyargs)]
            names += [a.arg for a in (parameters.vararg, parameters.kwarg) if a is not None]
            own = [name for name in names if name not in ("self", "cls")]
            if len(own) > MAX_PARAMETERS and function.name not in FOREIGN_SIGNATURES:
                wide[f"{name_of(file)}:{function.lineno} {function.name}"] = len(own)
    assert not wide


def test_there_is_no_global_statement() -> None:
    found = [
        f"{name_of(file)}:{node.lineno}"
        for file in FILES
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.Global)
    ]
    assert not found


def test_only_commands_print() -> None:
    found = [
        f"{name_of(file)}:{node.lineno}"
        for file in FILES
        if not name_of(file).startswith(PRINTS)
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not found


def test_the_scheduler_knows_no_clock_no_chance_no_thread_and_no_log() -> None:
    found = []
    for file in FILES:
        name = name_of(file)
        if not name.startswith("scheduler/"):
            continue
        for line, module, names in imports(file):
            seeded = name.startswith(MAY_BE_RANDOM) and (module, names) == ("random", ("Random",))
            if module.partition(".")[0] in CLOCKS and not seeded:
                found.append(f"{name}:{line} {module}")
    assert not found


def test_there_is_no_drawer_for_odds_and_ends() -> None:
    assert not [name_of(file) for file in FILES if file.stem in ("utils", "util", "helpers", "misc", "common_utils")]
    classes = [
        f"{name_of(file)}:{node.lineno} {node.name}"
        for file in FILES
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.ClassDef) and (re.match(r"Base[A-Z]", node.name) or node.name.endswith("Factory"))
    ]
    assert not classes


def test_every_module_says_what_it_owns() -> None:
    silent = [
        name_of(file)
        for file in FILES
        if file.read_text(encoding="utf-8").strip() and not ast.get_docstring(tree_of(file))
    ]
    assert not silent


def suppressions(file: Path) -> Iterator[tuple[int, str]]:
    """Comments that switch a check off."""
    with file.open("rb") as stream:
        for token in tokenize.tokenize(stream.readline):
            if token.type == tokenize.COMMENT and NEEDS_A_REASON.search(token.string):
                yield token.start[0], token.string


def test_every_check_that_is_switched_off_says_why() -> None:
    unexplained = [
        f"{name_of(file)}:{line} {comment}"
        for file in FILES
        for line, comment in suppressions(file)
        if not HAS_A_REASON.search(comment)
    ]
    assert not unexplained


@pytest.mark.parametrize(
    ("comment", "explained"),
    [
        ("# noqa: ARG002 - time makes it no kinder", True),
        ("# noqa: ARG002", False),
        ("# noqa: BLE001 (the consumer raises it)", True),
        ("# noqa", False),
        ("# type: ignore[arg-type]  # the stub is wrong", True),
        ("# type: ignore[arg-type]", False),
    ],
)
def test_the_rule_about_reasons_knows_a_reason_when_it_sees_one(comment: str, explained: bool) -> None:
    assert bool(HAS_A_REASON.search(comment)) is explained
