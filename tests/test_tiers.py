"""Which tests `make test` runs: a quick case of every invariant of the design, at least."""

from __future__ import annotations

import ast
from pathlib import Path

INVARIANTS = range(1, 9)


def marks(function: ast.FunctionDef) -> list[tuple[str, list[object]]]:
    """A test's marks, with their arguments where these are constants."""
    found = []
    for decorator in function.decorator_list:
        call = decorator if isinstance(decorator, ast.Call) else ast.Call(decorator, [], [])
        name = ast.unparse(call.func).removeprefix("pytest.mark.")
        found.append((name, [argument.value for argument in call.args if isinstance(argument, ast.Constant)]))
    return found


def test_every_invariant_has_a_case_that_is_not_slow() -> None:
    quick: set[object] = set()
    for path in Path(__file__).parent.rglob("test_*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                found = marks(node)
                if not any(name == "slow" for name, _ in found):
                    quick.update(number for name, numbers in found if name == "invariant" for number in numbers)
    assert quick == set(INVARIANTS)
