"""Plants faults in kernels: loads a module's source with some of it replaced.  Knows no kernel."""

import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

import pytest
from triton.runtime.interpreter import InterpretedFunction


@contextmanager
def rewritten(module: ModuleType, replacements: Mapping[str, str]) -> Iterator[None]:
    """In the block, launches are of kernels in whose source every `replacements` key is replaced.

    That holds for the module and for those that have imported its functions.

    Args:
        module: one with Triton kernels, or with functions that they call.
        replacements: regular expressions and what stands in their place.

    Raises:
        ValueError: an expression is not found: the kernel has changed, and the test has to follow.
    """
    source = Path(str(module.__file__)).read_text()
    for pattern, replacement in replacements.items():
        source, count = re.subn(pattern, replacement, source)
        if not count:
            raise ValueError(f"{module.__name__} has nothing like {pattern!r}, so this fault cannot be planted")
    name = f"{module.__name__}_rewritten"
    # The interpreter reads a kernel's source from its file when it first runs.
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        file = Path(folder) / f"{name}.py"
        file.write_text(source)
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None:
            raise ImportError(f"cannot load {file}")
        faulty = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, name, faulty)
        spec.loader.exec_module(faulty)
        for attribute, kernel in vars(faulty).items():
            if isinstance(kernel, InterpretedFunction) and hasattr(module, attribute):
                original = getattr(module, attribute)
                for user in [own for title, own in sys.modules.items() if title.startswith("persimmon.kernels.")]:
                    if vars(user).get(attribute) is original:
                        patch.setattr(user, attribute, kernel)
        yield
