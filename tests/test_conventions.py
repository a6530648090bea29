"""Conventions of the code that no linter checks."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_POSITIONAL = 3


def long_positional_calls(source: str) -> list[tuple[int, str]]:
    """Lines on which a class is called with more than MAX_POSITIONAL positional arguments, and its name."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or len(node.args) <= MAX_POSITIONAL:
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name[:1].isupper() and not name.isupper():
            found.append((node.lineno, name))
    return found


@pytest.mark.parametrize("folder", ["server", "model", "kernels", "persimmon", "benchmarks", "tools", "examples"])
def test_constructors_with_more_than_three_arguments_get_names(folder: str) -> None:
    found = {
        str(path.relative_to(ROOT)): calls
        for path in sorted((ROOT / folder).rglob("*.py"))
        if (calls := long_positional_calls(path.read_text()))
    }
    assert not found


def test_a_positional_call_is_found() -> None:
    assert long_positional_calls("x = 1\ny = m.Step(1, 2, 3, 4)\nz = Step(1, 2, 3)\nf(1, 2, 3, 4)") == [(2, "Step")]
