"""Blind mutations: small changes that an editor's slip could make, at every place where they fit.

``sites`` lists all of them for a folder, ``sample_sites`` draws some with a seed, ``apply_site`` makes one. Operators:

    compare     < for <=, == for !=, is for is not, in for not in, and back
    arithmetic  + for -, * for //, and back
    boolean     and for or; ``not x`` becomes ``x``; a condition is negated; True for False
    number      n becomes n + 1
    statement   an expression statement, assignment to an attribute, or ``del`` is left out; break for continue
    result      ``return x`` returns None

Written by ourselves: 200 lines that know this library's layout beat the packages, which want their own layout, run the
whole suite per mutant, and mutate what only speaks to people (docstrings, messages of errors).
"""

from __future__ import annotations

import ast
import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

SKIPPED_FOLDERS = ("testing", "sim")
"""The kit is the judge, and the simulator's ground is not the scheduler."""
SKIPPED_FILES = ("__init__.py", "errors.py", "invariants.py", "base.py")
"""Names, messages and types; and the laws, which judge."""

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
}


@dataclass(frozen=True, slots=True)
class Site:
    """One mutation: in ``path``, apply ``operator`` to the node with this index in ``ast.walk`` order."""

    path: str
    line: int
    node_index: int
    operator: str
    text: str
    """The line of source, numbered where a line has several such places."""

    @property
    def name(self) -> str:
        """Stable while the line is not edited; line numbers are left out on purpose."""
        return f"{self.path} [{self.operator}] {self.text}"


def sites(folder: Path) -> Iterator[Site]:
    """Every mutation of the library in ``folder``, in the order of its source."""
    for file in sorted(folder.rglob("*.py")):
        path = file.relative_to(folder)
        if path.parts[0] in SKIPPED_FOLDERS or path.name in SKIPPED_FILES:
            continue
        source = file.read_text(encoding="utf-8")
        lines = source.splitlines()
        tree = ast.parse(source)
        silent = set(_silent_nodes(tree))
        seen: Counter[tuple[str, str]] = Counter()
        for index, node in enumerate(ast.walk(tree)):
            if node not in silent:
                line = getattr(node, "lineno", 1)
                for operator in _operators(node):
                    text = lines[line - 1].strip()
                    seen[operator, text] += 1
                    number = f" #{seen[operator, text]}" if seen[operator, text] > 1 else ""
                    yield Site(str(path), line, index, operator, text + number)


def sample_sites(everything: Sequence[Site], size: int, seed: int) -> list[Site]:
    """``size`` different sites, the same for the same source and seed."""
    return Random(seed).sample(everything, min(size, len(everything)))


def apply_site(site: Site, folder: Path) -> None:
    """Make the mutation in the copy in ``folder``."""
    file = folder / site.path
    tree = ast.parse(file.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree))
    mutated = _mutate(nodes[site.node_index], site.operator)
    changed = _Replace(nodes[site.node_index], mutated).visit(tree)
    file.write_text(ast.unparse(ast.fix_missing_locations(changed)), encoding="utf-8")


def known_survivors() -> set[str]:
    """Names explained in survivors.md: its list items in backquotes."""
    text = (Path(__file__).parent / "survivors.md").read_text(encoding="utf-8")
    entries = (line for line in text.splitlines() if line.startswith("- ``"))
    return {line.removeprefix("- ``").split("``")[0].strip() for line in entries}


def _silent_nodes(tree: ast.Module) -> Iterator[ast.AST]:
    """Nodes whose change nobody could observe: types, docstrings, assertions of our own, messages of errors."""
    for node in ast.walk(tree):
        hidden: list[ast.AST | None] = []
        if isinstance(node, ast.AnnAssign | ast.arg):
            hidden = [node.annotation]
        elif isinstance(node, ast.FunctionDef):
            hidden = [node.returns, *node.decorator_list]
        elif isinstance(node, ast.ClassDef):
            hidden = [*node.decorator_list]
        elif isinstance(node, ast.Assert):
            hidden = [node]
        elif isinstance(node, ast.Raise):
            hidden = [node.exc]
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            hidden = [node]
        for root in hidden:
            if root is not None:
                yield from ast.walk(root)


def _operators(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Compare(ops=[op]) if type(op) in COMPARISONS:
            yield "compare"
        case ast.BinOp(op=op) | ast.AugAssign(op=op) if type(op) in ARITHMETIC:
            yield "arithmetic"
        case ast.BoolOp():
            yield "boolean"
        case ast.UnaryOp(op=ast.Not()):
            yield "boolean"
        case ast.Constant(value=bool()):
            yield "boolean"
        case ast.Constant(value=int()):
            yield "number"
        case ast.Return(value=value) if value is not None and not _is_none(value):
            yield "result"
        case ast.Expr() | ast.Delete() | ast.Break() | ast.Continue():
            yield "statement"
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield "statement"
        case _:
            pass
    if isinstance(node, ast.AugAssign):
        yield "statement"
    if isinstance(node, ast.If | ast.While | ast.IfExp):
        yield "negate"


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _mutate(node: ast.AST, operator: str) -> ast.AST:
    mutated = copy.deepcopy(node)
    match mutated, operator:
        case ast.Compare(), "compare":
            mutated.ops = [COMPARISONS[type(mutated.ops[0])]()]
        case ((ast.BinOp() | ast.AugAssign()), "arithmetic"):
            mutated.op = ARITHMETIC[type(mutated.op)]()
        case ast.BoolOp(), "boolean":
            mutated.op = ast.Or() if isinstance(mutated.op, ast.And) else ast.And()
        case ast.UnaryOp(), "boolean":
            return mutated.operand
        case ast.Constant(), "boolean":
            mutated.value = not mutated.value
        case ast.Constant(value=int(number)), "number":
            mutated.value = number + 1
        case ast.Return(), "result":
            mutated.value = ast.Constant(None)
        case ast.Break(), "statement":
            return ast.Continue()
        case ast.Continue(), "statement":
            return ast.Break()
        case _, "statement":
            return ast.Pass()
        case ((ast.If() | ast.While() | ast.IfExp()), "negate"):
            mutated.test = ast.UnaryOp(ast.Not(), mutated.test)
        case _:
            raise AssertionError(f"{operator} does not fit {ast.dump(node)}")
    return mutated


class _Replace(ast.NodeTransformer):
    """Puts one node in the place of another."""

    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self._old, self._new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self._new if node is self._old else self.generic_visit(node)
