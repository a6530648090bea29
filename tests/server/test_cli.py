"""What commands import before they do anything, which is what a person waits for."""

import subprocess
import sys

import pytest

HEAVY = {"fastapi", "huggingface_hub", "jinja2", "numpy", "pydantic", "tokenizers", "torch", "uvicorn", "zmq"}


def imported(program: str) -> set[str]:
    """The modules that a program has imported when it ends."""
    program = f"import sys\ntry:\n    {program}\nfinally:\n    print(*sys.modules, file=sys.stderr)"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(ended.stderr.split())


def command(*arguments: str) -> str:
    return f"from persimmon.server.cli import main; main({list(arguments)})"


def test_the_package_imports_none_of_its_parts_and_has_its_public_names():
    modules = imported("import persimmon; print(dir(persimmon))")
    assert {name for name in modules if name.startswith("persimmon")} == {"persimmon"}
    assert "importlib.metadata" not in modules


def test_a_public_name_is_imported_when_it_is_used_and_another_is_an_error():
    program = "import persimmon; assert issubclass(persimmon.CheckpointError, ValueError); persimmon.nothing"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "AttributeError: module 'persimmon' has no attribute 'nothing'" in ended.stderr


@pytest.mark.parametrize("arguments", [["--version"], ["--help"]])
def test_the_version_and_the_list_of_commands_import_no_command(arguments):
    modules = imported(command(*arguments))
    assert modules.isdisjoint(HEAVY)
    assert {name for name in modules if name.startswith("persimmon.server.commands.")} == {
        "persimmon.server.commands.run"
    }


@pytest.mark.parametrize("name", ["serve", "generate", "bench", "convert"])
def test_a_commands_help_imports_that_command_and_nothing_that_it_runs_with(name):
    modules = imported(command(name, "--help"))
    assert modules.isdisjoint(HEAVY - {"pydantic"})
    assert {name for name in modules if name.startswith("persimmon.server.commands.")} == {
        "persimmon.server.commands.run",
        f"persimmon.server.commands.{name}",
    }
