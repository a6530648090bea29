"""Runs a benchmark on two checkouts of this project in turns, and compares their figures.

A machine that slows down slows both alike, since neither runs twice in a row.  Knows nothing of what is measured: it
compares every number in the JSON that the benchmark writes.

    python -m benchmarks.in_turns --before ../old --turns 3 engine --running 64 256
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import write_figures

HERE = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of the benchmark's, over all turns.

    Attributes:
        name: where it is in the JSON, such as "budgets.1.total".
        before, after: what each turn measured.
    """

    name: str
    before: list[float]
    after: list[float]

    @property
    def ratio(self) -> float:
        """The median after, as a multiple of the median before."""
        return statistics.median(self.after) / statistics.median(self.before)


def numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """All measured numbers in a JSON document, with their places; settings, which are whole numbers, are left out."""
    if isinstance(value, dict):
        for key, own in value.items():
            yield from numbers(own, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for index, own in enumerate(value):
            yield from numbers(own, f"{name}.{index}" if name else str(index))
    elif isinstance(value, float):
        yield name, value


def run(checkout: Path, module: str, arguments: list[str]) -> dict[str, Any]:
    """What a benchmark of a checkout measures.

    Raises:
        subprocess.CalledProcessError: it failed; what it printed has been shown.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        command = [sys.executable, "-m", f"benchmarks.{module}", *arguments, "--out", str(out)]
        environment = os.environ | {"PYTHONPATH": str(checkout)}
        subprocess.run(command, cwd=checkout, env=environment, check=True, stdout=sys.stderr)
        return dict(json.loads(out.read_text()))


def compare(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[Figure]:
    """The numbers that all turns of both sides have, but for those of the machine."""
    turns = [
        [dict(numbers({key: own[key] for key in own if key != "device"})) for own in side] for side in (before, after)
    ]
    common = set.intersection(*(set(own) for side in turns for own in side))
    names = [name for name in turns[0][0] if name in common and all(own[name] for own in turns[0])]
    return [Figure(name, [own[name] for own in turns[0]], [own[name] for own in turns[1]]) for name in names]


def table(figures: list[Figure]) -> str:
    """The figures for people: median and minimum of each side, and the ratio of the medians."""
    lines = ["| figure | before | after | after / before |", "| --- | --- | --- | --- |"]
    for own in figures:
        sides = [f"{statistics.median(side):.4g} (min {min(side):.4g})" for side in (own.before, own.after)]
        lines.append(f"| {own.name} | {sides[0]} | {sides[1]} | {own.ratio:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.in_turns", description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, metavar="FOLDER", help="the checkout to compare with")
    parser.add_argument("--after", type=Path, default=HERE, metavar="FOLDER", help="[default: this one]")
    parser.add_argument("--turns", type=int, default=3, help="runs of each [default: %(default)s]")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write all results as JSON; comes before the benchmark"
    )
    parser.add_argument("benchmark", help="module in benchmarks/, such as engine")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    arguments = parser.parse_args()
    before, after = [], []
    for _ in range(arguments.turns):
        before.append(run(arguments.before.resolve(), arguments.benchmark, arguments.arguments))
        after.append(run(arguments.after.resolve(), arguments.benchmark, arguments.arguments))
    figures = compare(before, after)
    print(table(figures))
    record = {
        "benchmark": [arguments.benchmark, *arguments.arguments],
        "turns": arguments.turns,
        "figures": [asdict(own) | {"ratio": own.ratio} for own in figures],
    }
    write_figures(arguments.out, record)


if __name__ == "__main__":
    main()
