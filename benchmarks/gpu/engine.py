"""Checks that no optimisation of the engine changes tokens, and measures what its own work adds to a step.

Scheduler, engine loop and runner, as the server wires them, on a few layers of the network: mixed requests with each
feature on, then with one off at a time.  Greedy tokens must be equal, or differ first where two tokens are tied within
rounding: prompts and steps of more than 64 tokens go through cuBLAS, whose sums depend on how many tokens there are.
In batch-invariant mode they must be equal.
"""

from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

from benchmarks.gpu.engine_variants import Variant, modes, variants
from benchmarks.gpu.report import Report
from benchmarks.gpu.suite import Setting

if TYPE_CHECKING:
    from benchmarks.gpu.engine_bench import EngineBench, Outcome

NEEDS = {"msgspec": "msgspec", "pyzmq": "zmq"}
"""Packages of the engine that the other sections do without, and the modules they are imported as."""


def run(setting: Setting, report: Report) -> None:
    """All features on, then one off at a time."""
    missing = [package for package, module in NEEDS.items() if find_spec(module) is None]
    if missing:
        report.note(f"skipped: needs {' and '.join(missing)}")
        return
    from benchmarks.gpu.engine_bench import EngineBench

    for mode in modes(setting):
        bench = report.prepare(f"{mode.prefix}weights and graphs", partial(EngineBench, setting, mode))
        usual, *others = variants(setting)
        # It also loads what the runs that are timed launch.
        expected = report.prepare(f"{mode.prefix}first run", partial(bench.run, usual))
        for variant in (usual, *others) if setting.on_gpu else others:
            call = partial(_compare, bench, report, variant, expected)
            report.attempt(f"{mode.prefix}{variant.name}", call, seconds=3)


def _measure(bench: "EngineBench", report: Report, variant: Variant) -> "Outcome":
    """Runs all requests; what must hold of each variant by itself."""
    outcome, name = bench.run(variant), f"{bench.mode.prefix}{variant.name}"
    stats, seconds = outcome.stats, outcome.seconds
    report.row(
        "engine",
        what=name,
        requests=len(outcome.answers),
        steps=stats.steps,
        steps_s=stats.steps / seconds,
        tokens_s=stats.generated_tokens / seconds,
        host_ms_a_step=1e3 * outcome.host_seconds / stats.steps,
        graph_replays=stats.graph_replays,
        preemptions=stats.preemptions,
        cached_tokens=stats.cached_tokens,
    )
    broken = outcome.broken()
    report.check(f"{name}: every request is answered in full", not broken, broken=len(broken), first=broken[:1])
    held = stats.total_blocks - stats.free_blocks
    report.check(f"{name}: every block is free again", held == 0, held=held)
    for what, applies, happened in (
        ("graphs are replayed", bench.captures and variant.graphs, stats.graph_replays > 0),
        ("prompts share blocks", variant.prefix_caching, stats.cached_tokens > 0),
        ("sequences are preempted", variant.scarce, stats.preemptions > 0),
    ):
        if applies:
            report.check(f"{name}: {what}", happened)
    return outcome


def _compare(bench: "EngineBench", report: Report, variant: Variant, expected: "Outcome") -> None:
    """Greedy tokens against those of the usual engine."""
    outcome = _measure(bench, report, variant)
    ties, wrong = 0, []
    compared: Sequence[int] = [key for key in outcome.answers if bench.is_greedy(key)]
    for key in compared:
        ours, theirs = outcome.answers[key].tokens, expected.answers[key].tokens
        if ours == theirs:
            continue
        if not bench.mode.exact and bench.is_tie(key, ours, theirs):
            ties += 1
        else:
            wrong.append(key)
    report.check(
        f"{bench.mode.prefix}{variant.name}: greedy tokens as usual",
        not wrong,
        compared=len(compared),
        tied=ties,
        different=len(wrong),
        first=wrong[:1],
    )
