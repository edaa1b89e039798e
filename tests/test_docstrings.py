"""Docstrings say what a thing is or does, not what it answers."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import layerpipe
import layerpipe_kernels

QUESTIONS = {"What", "Whatever", "Whether", "How", "Which", "Who", "Whoever", "Whose", "Why", "Where", "When"}


def docstrings(package: Path) -> Iterator[tuple[str, str]]:
    """Every docstring of a package's modules, classes and functions, with its place."""
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text:
                    yield f"{path.relative_to(package)}:{getattr(node, 'lineno', 1)}", text


@pytest.mark.parametrize("package", [layerpipe_kernels, layerpipe], ids=lambda package: package.__name__)
def test_no_docstring_begins_as_a_question(package: object) -> None:
    root = Path(package.__file__).parent  # type: ignore[attr-defined]
    asked = [f"{place}: {text.splitlines()[0]}" for place, text in docstrings(root)
             if text.split()[0].rstrip(":,") in QUESTIONS]  # fmt: skip
    assert not asked, "\n".join(asked)
