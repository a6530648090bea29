"""How results are compared: with exact ones within what rounding explains, and with each other bit for bit.

Knows no kernel.
"""

from collections.abc import Callable, Sequence

import torch

from benchmarks.gpu.report import Report
from benchmarks.gpu.suite import Setting
from persimmon.kernels.launch import supports_pdl

FLOAT32_UNIT = 2.0**-24


def type_name(dtype: torch.dtype) -> str:
    """As titles have it."""
    return str(dtype).removeprefix("torch.")


def unit(dtype: torch.dtype) -> float:
    """The most that one rounding changes a number by, as a share of it."""
    return torch.finfo(dtype).eps / 2


def rounded(reference: torch.Tensor, dtype: torch.dtype, spread: torch.Tensor | float) -> torch.Tensor:
    """What a result may be off by: one rounding of itself, and `spread` for what happened before it."""
    least = torch.finfo(dtype).smallest_normal * unit(dtype)
    return reference.abs() * unit(dtype) * 1.001 + spread + least


def product_spread(x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What a product x @ weight.T of float64 may be off by when its inputs were rounded and its sums are float32.

    Errors of single terms add up like a random walk, hence the root of the squares: one unit of it for inputs that
    two roundings of the same number put on two sides, and for the sum 32 units of float32 for the root of its length:
    matrix units cut sums off instead of rounding them.
    """
    walk: torch.Tensor = (x.square() @ weight.square().t()).sqrt()
    share: float = unit(dtype) + 32 * FLOAT32_UNIT * x.shape[1] ** 0.5
    return walk * share


def compare(report: Report, name: str, out: torch.Tensor, reference: torch.Tensor, allowed: torch.Tensor) -> None:
    """Checks that a result is as close to the exact one as allowed.

    Args:
        report: gets the largest error as a multiple of what is allowed there, and the error's norm over the result's.
        name: of the check.
        out: the result.
        reference: the exact one, float64, of the same shape.
        allowed: what each number may be off by.
    """
    error = (out.double() - reference).abs()
    ratio = (error / allowed).max().item()
    relative = (error.norm() / reference.norm()).item()
    finite = bool(torch.isfinite(out).all())
    report.check(name, finite and ratio <= 1, error_over_bound=ratio, relative_error=relative, finite=finite)


def _differences(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """How many bytes differ; stays on the device."""
    return (one.contiguous().view(torch.uint8) != other.contiguous().view(torch.uint8)).sum()


def check_same(
    report: Report, name: str, outputs: Sequence[torch.Tensor], others: Sequence[torch.Tensor], **details: object
) -> None:
    """Checks that all outputs of two ways to the same result are the same bits."""
    differing = sum(int(_differences(one, other)) for one, other in zip(outputs, others, strict=True))
    report.check(name, differing == 0, differing_bytes=differing, **details)


def check_repeats(report: Report, name: str, call: Callable[[], Sequence[torch.Tensor]], repeats: int) -> None:
    """Checks that a call gives the same bits every time: programs that meet in a race would not."""
    first = [output.clone() for output in call()]
    differing = torch.zeros((), dtype=torch.int64, device=first[0].device)
    for _ in range(repeats):
        for one, other in zip(first, call(), strict=True):
            differing += _differences(one, other)
    report.check(name, differing.item() == 0, differing_bytes=int(differing), runs=repeats)


def check_graph(report: Report, name: str, call: Callable[[], Sequence[torch.Tensor]]) -> None:
    """Checks that a captured call gives the bits of a direct one; GPUs only."""
    direct = [output.clone() for output in call()]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for output in captured:
        output.fill_(1)
    graph.replay()
    torch.cuda.synchronize()
    check_same(report, name, direct, captured)


def check_launches(
    setting: Setting,
    report: Report,
    name: str,
    call: Callable[[bool], Sequence[torch.Tensor]],
    repeats: int | None = None,
) -> None:
    """Checks that a call gives the same bits every time, captured, and launched dependently.

    Args:
        setting: where it runs.
        report: gets the outcome.
        name: of the call.
        call: takes whether it is to be launched dependently.
        repeats: runs; the suite's number if not given.
    """
    check_repeats(
        report, f"{name}: the same bits every time", lambda: call(False), repeats or setting.suite.check_repeats
    )
    if setting.on_gpu:
        check_graph(report, f"{name}: graph = eager", lambda: call(False))
    if supports_pdl(setting.device):
        plain = [output.clone() for output in call(False)]
        check_same(report, f"{name}: dependent launch = plain", plain, call(True))
