"""Which statements count as a GPU's, and which of them a run has executed."""

from pathlib import Path
from types import ModuleType

import pytest

from tests.fake_cuda.gpu_code import executed_lines, gpu_statements

SOURCE = '''
def upload(device, wanted):
    """Not a statement."""
    if device.type != "cuda":
        return "a CPU's"
    if wanted:
        copied = "a GPU's"
    else:
        raise ValueError("never counts")
    return copied


def free(device):
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    return "a CPU's"


def both(device):
    if device.type == "cuda":
        found = 1
    else:
        found = 2
    return found


def plain():
    return 1


@triton.jit
def kernel():
    tl.extra.cuda.gdc_wait()
'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "module.py"
    path.write_text(SOURCE)
    return path


def test_a_gpu_s_statements_are_those_of_functions_that_name_it_but_for_other_devices_branches(file: Path) -> None:
    assert list(gpu_statements(file).values()) == [
        'if device.type != "cuda":',
        "if wanted:",
        'copied = "a GPU\'s"',
        "return copied",
        'if device.type == "cuda":',
        "return torch.cuda.mem_get_info(device)",
        'if device.type == "cuda":',
        "found = 1",
        "return found",
    ]
    assert "return 1" in gpu_statements(file, whole=True).values()


def test_it_is_seen_which_of_them_have_run(file: Path) -> None:
    module = ModuleType("module")
    exec(compile(SOURCE.replace("@triton.jit", ""), str(file), "exec"), vars(module))
    with executed_lines([file]) as found:
        module.both(type("Device", (), {"type": "cuda"}))
    run = [text for lines, text in gpu_statements(file).items() if found[file.resolve()].intersection(lines)]
    assert run == ['if device.type == "cuda":', "found = 1", "return found"]
