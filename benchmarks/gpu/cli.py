"""Everything that only a GPU can tell, in one command: are the kernels right, how fast are they, and whole steps.

    python -m benchmarks.gpu [--sections checks,steps] [--out FILE]

Prints as it goes, and keeps a JSON file that holds what has been found so far.  Each section runs in a process of its
own, within a time limit: a kernel that hangs or breaks the device costs its section and no other.  Sections that are
not asked for stay in the file as they were, if it is of the same device and software.

--device cpu --shape tiny takes the same way through the code in Triton's interpreter; its times mean nothing.
"""

import argparse
import importlib
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.gpu.report import Report, ResultFile, now

RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the suite.

    Attributes:
        module: of this package; its `run` takes a setting and a report.
        limit_s: time after which it is terminated, in seconds.
        is_default: whether it runs unless others are asked for.
    """

    module: str
    limit_s: float
    is_default: bool = True


SECTIONS = {
    "ceilings": Section("ceilings", 40),
    "checks": Section("checks", 180),
    "steps": Section("steps", 180),
    "kernels": Section("speed", 130),
    "step-checks": Section("checks_steps", 100),
    "request-checks": Section("checks_requests", 40),
    "peer": Section("peer", 80),
    "sweep": Section("sweep", 300, is_default=False),
}
"""In the order they run."""

LIMIT_S = 475.0
"""Of a run on a GPU, whatever its sections may take: just under eight minutes."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a figure has to reach, on an H100."""

    figure: str
    bound: float
    at_least: bool = True

    def reached(self, measured: float | None) -> bool | None:
        """None where nothing was measured."""
        if measured is None:
            return None
        return measured >= self.bound if self.at_least else measured <= self.bound


TARGETS = (
    Target("batch 1 dense, tokens/s", 165),
    Target("batch 1 at 90% zeros, tokens/s", 225),
    Target("decode attention at 64 x 512, share of the copy rate", 0.88),
    Target("step at 64 x 512, ms", 14, at_least=False),
    Target("prefill at 2k, share of the matmul rate", 0.6),
    Target("sampling, share of a step at 64 x 512", 0.03, at_least=False),
)


def judged(figures: dict[str, float]) -> list[dict[str, Any]]:
    """The targets with what was measured; `reached` is None where nothing was."""
    return [
        {
            "figure": target.figure,
            "target": f"{'at least' if target.at_least else 'at most'} {target.bound:g}",
            "measured": figures.get(target.figure),
            "reached": target.reached(figures.get(target.figure)),
        }
        for target in TARGETS
    ]


def failures(sections: dict[str, Any]) -> list[str]:
    """What is wrong, by section: checks that failed, and errors."""
    found = []
    for name, section in sections.items():
        found += [f"{name}: {check['name']}" for check in section["checks"] if not check["passed"]]
        found += [f"{name}: error in {error['in']}" for error in section["errors"]]
    return found


def run_section(name: str, shape: str, device: str, seed: int, out: Path) -> None:
    """Runs one section in this process and writes what it finds into the file."""
    report = Report(ResultFile(out), name)
    with report.attempt(name):
        import torch

        from benchmarks.gpu.suite import SUITES, Setting

        # As the server has it: split products are added up in float32.
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False

        setting = Setting(SUITES[shape], torch.device(device), seed)
        importlib.import_module(f"benchmarks.gpu.{SECTIONS[name].module}").run(setting, report)
    report.end()


def _in_own_process(name: str, shape: str, device: str, seed: int, out: Path, limit_s: float) -> None:
    """Runs a section; writes down how its process ended if it did not end well."""
    process = multiprocessing.get_context("spawn").Process(target=_child, args=(name, shape, device, seed, out))
    process.start()
    process.join(limit_s)
    ended = None
    if process.is_alive():
        process.kill()
        process.join()
        ended = f"ended after its limit of {limit_s:.0f} s"
    elif process.exitcode:
        ended = f"its process ended with code {process.exitcode}"
    if ended is None:
        return
    print(f"ERROR {name}: {ended}", flush=True)
    file = ResultFile(out)
    found = {"started": now(), "figures": {}, "rows": [], "checks": [], "errors": []} | file.section(name)
    found["errors"].append({"in": name, "traceback": ended})
    file.content["sections"][name] = found
    file.save()


def _child(name: str, shape: str, device: str, seed: int, out: Path) -> None:
    if device == "cpu":
        # The interpreter's products depend on their shapes and know no bfloat16; the tests have some that do not.
        import pytest

        from tests.interpreter import multiply_as_matrix_units

        multiply_as_matrix_units(pytest.MonkeyPatch())
    run_section(name, shape, device, seed, out)


def description(device: str, shape: str) -> dict[str, Any]:
    """The device and the software; what a file must agree on to keep older sections."""
    import torch

    found: dict[str, Any] = {"device": "cpu (interpreter): times are not figures", "shape": shape}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "driver": _nvidia_smi("driver_version"),
            "cuda": torch.version.cuda,
        }
    packages = {name: _version(name) for name in ("triton", "transformers")}
    return found | {"python": platform.python_version(), "torch": torch.__version__} | packages


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def clocks() -> dict[str, str | None]:
    """What the card says of its clocks, power and heat, now."""
    names = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")
    return {name: _nvidia_smi(name) for name in names}


def _nvidia_smi(query: str) -> str | None:
    """One value of the first card; None where the tool cannot tell."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    return answer[0].strip() if answer else None


def run(sections: Sequence[str], shape: str, device: str, seed: int, out: Path) -> bool:
    """Runs sections one after the other.

    Returns:
        Whether every check passed and nothing went wrong.
    """
    described = description(device, shape)
    file = ResultFile(out)
    if file.content.get("description") != described:
        file.content = {"description": described}
    file.content |= {"started": now(), "seed": seed, "clocks_before": clocks()}
    file.save()
    print("\n".join(f"{key}: {value}" for key, value in described.items()), flush=True)
    begin = time.monotonic()
    for name, section in SECTIONS.items():
        if name not in sections:
            continue
        # The interpreter takes its time, and holds no card that others wait for.
        limit = 600.0 if device == "cpu" else min(section.limit_s, LIMIT_S - (time.monotonic() - begin))
        _in_own_process(name, shape, device, seed, out, max(1.0, limit))
    file = ResultFile(out)
    file.content |= {
        "ended": now(),
        "clocks_after": clocks(),
        "targets": judged(file.figures if device == "cuda" else {}),
    }
    file.save()
    return _summary(file, sections)


def _summary(file: ResultFile, sections: Sequence[str]) -> bool:
    print("\n== targets, on an H100")
    for target in file.content["targets"]:
        reached = {None: "not measured", True: "reached", False: "missed"}[target["reached"]]
        print(f"{reached:<12}  {target['figure']}: {target['measured']} ({target['target']})")
    wrong = failures({name: file.section(name) for name in sections})
    checks = sum(len(file.section(name)["checks"]) for name in sections)
    print(f"\n{checks} checks, {len(wrong)} failures; {file.path}")
    print("\n".join(wrong))
    return not wrong


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Check and measure the GPU kernels.")
    default = ",".join(name for name, section in SECTIONS.items() if section.is_default)
    parser.add_argument(
        "--sections", default=default, help=f"of {', '.join(SECTIONS)}, separated by commas [default: %(default)s]"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="[default: %(default)s]")
    parser.add_argument("--shape", choices=("8b", "tiny"), default="8b", help="[default: %(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of all random inputs [default: %(default)s]")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the JSON file [default: benchmarks/results/gpu_DEVICE.json]"
    )
    return parser


def main() -> int:
    parser = _parser()
    arguments = parser.parse_args()
    sections = arguments.sections.split(",")
    if unknown := [name for name in sections if name not in SECTIONS]:
        parser.error(f"--sections: there is no {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    if arguments.device == "cpu" and arguments.shape != "tiny":
        parser.error("--device cpu interprets every kernel, which the 8B shape would take days for: add --shape tiny")
    if arguments.device == "cpu":
        # Read when kernels are defined, here and in the sections' processes.
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        name = str(description(arguments.device, arguments.shape)["device"]).partition(" (")[0]
    except (RuntimeError, AssertionError) as error:
        print(f"no CUDA device: {error}", file=sys.stderr)
        return 1
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    out = arguments.out or RESULTS / f"gpu_{slug}.json"
    return 0 if run(sections, arguments.shape, arguments.device, arguments.seed, out) else 1
