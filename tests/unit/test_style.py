"""The prose of the code: what can be counted is held here; the rest is for readers."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import meristem

FILES = sorted(Path(meristem.__file__).parent.rglob("*.py"))
COMPREHENSIONS = (ast.ListComp, ast.DictComp, ast.SetComp, ast.GeneratorExp)


def docstring_lines(tree: ast.AST) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines.update(range(node.lineno, (node.end_lineno or 0) + 1))
    return lines


def code_lines(node: ast.AST, text: str, docs: set[int]) -> int:
    count = 0
    lines = text.splitlines()
    for number in range(node.lineno, node.end_lineno + 1):  # type: ignore[attr-defined]
        line = lines[number - 1].strip()
        count += bool(line) and not line.startswith("#") and number not in docs
    return count


def simple_statements(tree: ast.AST) -> Iterator[ast.stmt]:
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt) and not hasattr(node, "body"):
            yield node


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_prose(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    docs = docstring_lines(tree)
    for number, line in enumerate(text.splitlines(), 1):
        assert len(line) <= 100, f"line {number} has {len(line)} columns"
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            size = code_lines(node, text, docs)
            assert size <= 50, f"{node.name} has {size} lines of code"
        if isinstance(node, ast.ClassDef):
            size = node.end_lineno - node.lineno + 1  # type: ignore[operator]
            assert size <= 300, f"{node.name} has {size} lines"
        if isinstance(node, ast.IfExp):
            inner = [n for n in ast.walk(node) if isinstance(n, ast.IfExp)]
            assert len(inner) == 1, f"line {node.lineno}: a condition in a condition"
    for statement in simple_statements(tree):
        found = [n for n in ast.walk(statement) if isinstance(n, COMPREHENSIONS)]
        assert len(found) <= 2, f"line {statement.lineno}: {len(found)} comprehensions"
