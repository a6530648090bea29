"""Draws latency against load, as a PNG, with matplotlib.

Knows nothing of how the figures came about; matplotlib is an extra and is imported where it is used.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from persimmon.server.bench.report import Distribution

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MISSING = "the plot needs matplotlib, which is not installed: pip install 'persimmon-server[bench]'"


@dataclass(frozen=True)
class Point:
    """One load and its latencies, in milliseconds.

    Attributes:
        load: streams, or requests a second.
        ttft, itl, e2e: None where nothing was answered.
    """

    load: float
    ttft: Distribution | None
    itl: Distribution | None
    e2e: Distribution | None


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def plot(points: Sequence[Point], load_title: str, title: str, path: Path) -> None:
    """Writes what `draw` draws as a PNG.

    Args:
        points: in the order of the axis.
        load_title: of the axis.
        title: above the panels.
        path: the file to write.

    Raises:
        OSError: the file cannot be written.
    """
    draw(points, load_title, title).savefig(path, format="png", dpi=150)


def draw(points: Sequence[Point], load_title: str, title: str) -> "Figure":
    """Three panels: TTFT, ITL and whole answers, each p50, p90 and p99 against the load.

    Args:
        points: in the order of the axis.
        load_title: of the axis.
        title: above the panels.
    """
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    figure = Figure(figsize=(12, 4), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    panels = {
        "time to first token": [point.ttft for point in points],
        "inter-token latency": [point.itl for point in points],
        "whole answer": [point.e2e for point in points],
    }
    loads = [point.load for point in points]
    for axes, (name, distributions) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        lines = {
            "p50": [each.median if each else float("nan") for each in distributions],
            "p90": [each.p90 if each else float("nan") for each in distributions],
            "p99": [each.p99 if each else float("nan") for each in distributions],
        }
        for label, milliseconds in lines.items():
            axes.plot(loads, milliseconds, marker="o", label=label)
        axes.set(title=name, xlabel=load_title, ylabel="ms")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure
