"""Everything that only a GPU can show, in one command: whether kernels, steps and engine are right, and how fast.

    python -m benchmarks.gpu [--budget SECONDS] [--sections smoke,steps] [--out FILE]

The most informative sections run first, and nothing starts that would not fit the budget.  The table of targets comes
last.  Prints as it goes, and keeps a JSON file that holds what has been found so far.  A kernel
that hangs or breaks the device costs its own part and no other.  Sections that are not asked for stay in the file as
they were, if it is of the same device and software.

--device cpu --shape tiny runs the same code in Triton's interpreter; its times mean nothing.
"""

import argparse
import math
import os
import re
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu import targets
from benchmarks.gpu.compile_pool import CompilePool
from benchmarks.gpu.machine import NoDeviceError, clocks, description
from benchmarks.gpu.report import ResultFile, now
from benchmarks.gpu.sections import BUDGET_S, RESERVE_S, SECTIONS, START_S
from benchmarks.gpu.supervisor import run_sections
from benchmarks.gpu.worker import Job, StartMethod

RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line asks for; see `_parser`."""

    sections: Sequence[str]
    device: str
    shape: str
    seed: int
    budget_s: float
    out: Path


def run(options: Options, described: dict[str, Any], start_method: StartMethod = "spawn") -> bool:
    """Runs sections, each when those before it have ended.

    Args:
        options: of the command line.
        described: the device and the software.
        start_method: of processes.

    Returns:
        Whether every check passed and nothing went wrong.
    """
    began = time.monotonic()
    on_gpu = options.device == "cuda"
    file = ResultFile(options.out)
    if file.content.get("description") != described:
        file.content = {"description": described}
    for name in options.sections:
        file.content.get("sections", {}).pop(name, None)
    file.content |= {"started": now(), "seed": options.seed, "budget_s": options.budget_s, "clocks_before": clocks()}
    file.save()
    print("\n".join(f"{key}: {value}" for key, value in described.items()), flush=True)
    print(f"clocks: {file.content['clocks_before']}", flush=True)
    job = Job(
        sections={name: section for name, section in SECTIONS.items() if name in options.sections},
        shape=options.shape,
        device=options.device,
        seed=options.seed,
        out=options.out,
        start_method=start_method,
        # The interpreter is slow, and occupies no card that others wait for.
        ends_at=began + options.budget_s - RESERVE_S if on_gpu else math.inf,
        **({} if on_gpu else {"limit_s": None}),
    )
    pool = CompilePool(described["compute_capability"], options.shape, options.sections) if on_gpu else None
    with pool or nullcontext():
        run_sections(job if pool is None else pool.attached(job))
    file = ResultFile(options.out)
    file.content |= {"ended": now(), "clocks_after": clocks(), "targets": _targets(file, on_gpu)}
    file.save()
    return _summary(file, options.sections)


def _targets(file: ResultFile, on_gpu: bool) -> list[dict[str, Any]]:
    if not on_gpu:
        return targets.judged({}, {})
    figures = file.figures
    about: dict[str, str] = {}
    for section in file.content.get("sections", {}).values():
        about |= section.get("about", {})
    if (nominal := targets.nominal_bytes(file.content["description"]["device"])) and targets.COPY in figures:
        figures[targets.COPY_OF_NOMINAL] = figures[targets.COPY] / nominal
    return targets.judged(figures, about)


def failures(sections: dict[str, Any]) -> list[str]:
    """What is wrong, by section: checks that failed, errors, and what was not reached."""
    found = []
    for name, section in sections.items():
        found += [f"{name}: {check['name']}" for check in section["checks"] if not check["passed"]]
        found += [f"{name}: error in {error['in']}" for error in section["errors"]]
    return found


def _summary(file: ResultFile, sections: Sequence[str]) -> bool:
    found = {name: file.section(name) for name in sections}
    wrong = failures(found)
    checks = sum(len(section["checks"]) for section in found.values())
    print(f"\n{checks} checks, {len(wrong)} failures", *wrong, sep="\n")
    for name, section in found.items():
        if "started" not in section:
            print(f"{name}: not started, the time was over")
        elif left_out := section.get("left_out"):
            print(f"{name}: left out for lack of time: {', '.join(left_out)}")
    print(f"\n{targets.table(file.content['targets'], file.content['description']['device'])}\n{file.path}", flush=True)
    return not wrong


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Check and measure the GPU kernels, the most informative parts first.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="sections, in the order in which they run:\n"
        + "\n".join(f"  {name:<9} {section.about}" for name, section in SECTIONS.items()),
    )
    default = ",".join(name for name, section in SECTIONS.items() if section.is_default)
    parser.add_argument("--sections", default=default, help="separated by commas [default: %(default)s]")
    parser.add_argument(
        "--budget",
        type=float,
        default=BUDGET_S,
        metavar="SECONDS",
        help="of the whole run, shared between the sections; what does not fit is left out [default: %(default)g]",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="[default: %(default)s]")
    parser.add_argument("--shape", choices=("8b", "tiny"), default="8b", help="[default: %(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of all random inputs [default: %(default)s]")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the JSON file of results; on a borrowed machine, a path that you keep "
        "[default: benchmarks/results/gpu_DEVICE.json]",
    )
    return parser


def main() -> int:
    parser = _parser()
    arguments = parser.parse_args()
    sections = arguments.sections.split(",")
    if unknown := [name for name in sections if name not in SECTIONS]:
        parser.error(f"--sections: unknown: {', '.join(unknown)}; choose from {', '.join(SECTIONS)}")
    if arguments.device == "cpu" and arguments.shape != "tiny":
        parser.error("--device cpu interprets every kernel, which the 8B shape would take days for: add --shape tiny")
    if not START_S + RESERVE_S <= arguments.budget < math.inf:  # nan is neither
        parser.error(
            f"--budget {arguments.budget:g}: give seconds, at least {START_S + RESERVE_S:g}, which a run takes to start"
        )
    if arguments.out is not None:
        try:
            ResultFile(arguments.out)
        except ValueError:
            parser.error(f"--out {arguments.out}: the file is there and is not JSON; give another name")
    if arguments.device == "cpu":
        # Read when kernels are defined, in the sections' processes.
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        described = description(arguments.device, arguments.shape)
    except NoDeviceError as error:
        print(f"no CUDA device: {error}", file=sys.stderr)
        return 1
    slug = re.sub(r"[^a-z0-9]+", "-", str(described["device"]).partition(" (")[0].lower()).strip("-")
    options = Options(
        sections=sections,
        device=arguments.device,
        shape=arguments.shape,
        seed=arguments.seed,
        budget_s=arguments.budget,
        out=arguments.out or RESULTS / f"gpu_{slug}.json",
    )
    return 0 if run(options, described) else 1
