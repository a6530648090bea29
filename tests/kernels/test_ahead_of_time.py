"""The kernels' machine code for three generations of GPUs, which need not be there."""

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from persimmon.kernels.launch import Limits

CAPABILITIES = (80, 90, 100)
MODULES = {
    f"tests.kernels.production_calls_{name}": f"persimmon.kernels.{name}"
    for name in ("decode_attention", "prefill_attention", "projection", "layer_norm", "sampling", "truncation")
}
CALLS = [(module, call) for module in MODULES for call in importlib.import_module(module).CALLS]
SCALAR_16_BIT_LOAD = re.compile(r"LDG\.E\.U16(\.CONSTANT)? ")


def compile_all(capability: int, out: Path, cache: Path) -> dict[tuple[str, str], list[dict]]:
    """What each call's wrapper would launch on a GPU, by module and call, from a process of its own."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.kernels.ahead_of_time", *MODULES),
            *(f"--capability={capability}", f"--json={out}"),
        ],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: dict[tuple[str, str], list[dict]] = {}
    for kernel in json.loads(out.read_text()):
        found.setdefault((kernel["module"], kernel["call"]), []).append(kernel)
    return found


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory, triton_cache: Path) -> Iterator[dict[int, Future]]:
    """By capability, what `compile_all` finds; as many at once as there are cores that no other tests run on."""
    folder = tmp_path_factory.mktemp("ahead-of-time")
    cores = (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    with ThreadPoolExecutor(max(1, cores)) as pool:
        yield {
            capability: pool.submit(compile_all, capability, folder / f"{capability}.json", triton_cache)
            for capability in CAPABILITIES
        }


def bounds(module: str, call: str, kernel: str, capability: int) -> Limits | None:
    """The most specific ones written next to the kernel; None if the kernel belongs to another module."""
    table: dict[str, Limits] = importlib.import_module(MODULES[module]).LIMITS
    kind = getattr(importlib.import_module(module), "KINDS", {}).get(call)
    names = [f"{kernel}, {kind}", kernel] if kind else [kernel]
    keys = [key for name in names for key in (f"{name}, sm_{capability}", name)]
    return next((table[key] for key in keys if key in table), None)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("module", "call"), CALLS)
class TestMachineCode:
    def test_keeps_its_bounds_and_spills_nothing(self, compiled, module: str, call: str, capability: int) -> None:
        bounded = []
        for kernel in compiled[capability].result()[module, call]:
            name = kernel["kernel"]
            assert kernel["stack"] == 0, f"{name} spills {kernel['stack']} bytes"
            limits = bounds(module, call, name, capability)
            if limits is not None:
                bounded.append(name)
                assert kernel["registers"] <= limits.registers
                assert kernel["shared_bytes"] <= limits.shared_bytes
        assert bounded

    def test_loads_no_tensor_of_16_bit_numbers_one_by_one(self, compiled, module, call, capability) -> None:
        for kernel in compiled[capability].result()[module, call]:
            assert not SCALAR_16_BIT_LOAD.search(kernel["sass"]), kernel["kernel"]


@pytest.mark.parametrize(("module", "call"), [(m, c) for m, c in CALLS if importlib.import_module(m).EXPECTED.get(c)])
def test_machine_code_for_sm_90_holds_what_its_speed_rests_on(compiled, module: str, call: str) -> None:
    machine_code = "\n".join(kernel["sass"] for kernel in compiled[90].result()[module, call])
    for pattern in importlib.import_module(module).EXPECTED[call]:
        assert re.search(pattern, machine_code), pattern
