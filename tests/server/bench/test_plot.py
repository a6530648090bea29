from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from persimmon.server.bench.plot import Point, draw, plot
from persimmon.server.bench.report import Distribution

SLOW, SLOWER = (
    Distribution(mean=1.0, median=2.0, p90=3.0, p99=4.0, max=5.0),
    Distribution(mean=2.0, median=4.0, p90=6.0, p99=8.0, max=10.0),
)
POINTS = [Point(load=1.0, ttft=SLOW, itl=SLOW, e2e=SLOW), Point(load=2.0, ttft=SLOWER, itl=None, e2e=SLOWER)]


def lines(axes: Axes) -> dict[str, list[list[float]]]:
    return {str(line.get_label()): np.asarray(line.get_data()).tolist() for line in axes.get_lines()}


def test_each_latency_has_a_panel_with_its_percentiles_against_the_load() -> None:
    panels = draw(POINTS, "requests/s", "title").axes
    assert [axes.get_title() for axes in panels] == ["time to first token", "inter-token latency", "whole answer"]
    assert lines(panels[0]) == {"p50": [[1, 2], [2, 4]], "p90": [[1, 2], [3, 6]], "p99": [[1, 2], [4, 8]]}
    assert np.isnan(lines(panels[1])["p50"][1][1])


def test_a_plot_is_a_png(tmp_path: Path) -> None:
    plot(POINTS, "requests/s", "title", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
