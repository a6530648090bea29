"""Which statements of the project only a GPU executes, and whether a run has executed them.

Knows Python's syntax: a function that names "cuda", `torch.cuda` or pinned memory is for a GPU, except for the branches
of other devices.
"""

import ast
import sys
import threading
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

from tests.fake_cuda.device import FakeDevice

Statements = dict[range, str]
"""A statement's lines, and how the first of them reads."""


def gpu_statements(path: Path, *, whole: bool = False) -> Statements:
    """The statements of a file that a GPU must have executed.

    Args:
        path: of the file.
        whole: whether all of its functions are for a GPU.
    """
    source = path.read_text()
    lines = source.splitlines()
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    wanted = [node for node in functions if whole or (any(map(_is_for_a_gpu, node.body)) and not _is_kernel(node))]
    return {own: lines[own.start - 1].strip() for node in wanted for own in _executed(node.body)}


@contextmanager
def executed_lines(files: Collection[Path]) -> Iterator[dict[Path, set[int]]]:
    """Notes the lines of some files that are executed within the block, in this thread and those that start in it."""
    found: dict[Path, set[int]] = defaultdict(set)
    wanted = {path.resolve() for path in files}

    @cache
    def noted(name: str) -> set[int] | None:
        path = Path(name).resolve()
        return found[path] if path in wanted else None

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        lines = noted(frame.f_code.co_filename)
        if lines is None:
            return None
        if event == "line":
            lines.add(frame.f_lineno)
        return trace

    run = FakeDevice._run

    def untraced(device: FakeDevice, *arguments: Any) -> None:
        # Millions of calls in the interpreter, and none of interest.
        sys.settrace(None)
        try:
            run(device, *arguments)
        finally:
            sys.settrace(trace)

    before = sys.gettrace()
    with mock.patch.object(FakeDevice, "_run", untraced):
        sys.settrace(trace)
        threading.settrace(trace)
        try:
            yield found
        finally:
            sys.settrace(before)
            threading.settrace(before)


def _is_for_a_gpu(statement: ast.stmt) -> bool:
    for node in ast.walk(statement):
        match node:
            case ast.Constant(value="cuda") | ast.Attribute(value=ast.Name(id="torch"), attr="cuda"):
                return True
            case ast.keyword(arg="pinned" | "pin_memory"):
                return True
    return False


def _is_kernel(function: ast.FunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def _executed(body: list[ast.stmt]) -> Iterator[range]:
    for statement in body:
        match statement:
            case ast.Raise() | ast.FunctionDef() | ast.ClassDef() | ast.Pass() | ast.Expr(value=ast.Constant()):
                continue
            case ast.If(test=test, body=then, orelse=otherwise):
                yield range(statement.lineno, then[0].lineno)
                device = _device_of(test)
                if device != "another":
                    yield from _executed(then)
                if device != "a GPU":
                    yield from _executed(otherwise)
                elif isinstance(then[-1], ast.Return):
                    return
            case ast.For(body=inner) | ast.With(body=inner) | ast.Try(body=inner) | ast.While(body=inner):
                if not isinstance(statement, ast.Try):
                    yield range(statement.lineno, inner[0].lineno)
                yield from _executed(inner)
            case _:
                yield range(statement.lineno, (statement.end_lineno or statement.lineno) + 1)


def _device_of(test: ast.expr) -> str | None:
    """The device that a condition is true for, where it is about one."""
    match test:
        case ast.Compare(
            left=ast.Attribute(attr="type"), ops=[op], comparators=[ast.Constant(value="cuda" | "cpu" as kind)]
        ):
            return "a GPU" if (kind == "cuda") == isinstance(op, ast.Eq) else "another"
    return None
