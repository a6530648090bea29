"""What this machine's CPU can do at best, measured: bytes read and multiplications a second, and the floor they set.

    python -m benchmarks.machine

A decode step cannot end before every weight has been read once and every row multiplied by it; a prompt not before its
rows are multiplied.  Also names the machine in files of figures.  Knows nothing of servers.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from persimmon import kernels
from persimmon.kernels.cpu import library
from persimmon.kernels.cpu.native import NativeKernels
from persimmon.kernels.cpu.pages import advise_large_pages
from persimmon.model.config import PersimmonConfig

READ_BYTES = 1 << 30
"""More than the caches of any processor hold."""

MATMUL_SIZE = 1536
TRIES = 7


@dataclass(frozen=True)
class Rates:
    """The best of some tries, on all cores.

    Attributes:
        read_gb_s: 10^9 bytes of memory read a second, in one stretch or in two at once, whichever is faster.
        matmul_gflop_s: 10^9 multiplications and additions a second in products of large matrices, torch's or those of
            the C kernels, whichever are faster: on some processors torch's libraries do not use the widest vectors.
        dtype: of those matrices.
    """

    read_gb_s: float
    matmul_gflop_s: float
    dtype: str


def measure_rates(dtype: torch.dtype, build: str | None = None) -> Rates:
    """Reads and multiplies for about a second.

    Args:
        dtype: of the matrices.
        build: of the C kernels that alone multiply, to know what its instructions allow; None takes the fastest build,
            or torch.
    """
    # Pages that were never written are all one page of zeros, which stays in a cache.
    memory = advise_large_pages(torch.empty(READ_BYTES // 4)).fill_(1)
    first, second = memory.view(2, -1)
    left, right = (torch.randn(MATMUL_SIZE, MATMUL_SIZE).to(dtype) for _ in range(2))
    read = READ_BYTES / min(_best_seconds(lambda: memory.sum()), _best_seconds(lambda: first.dot(second)))
    seconds = [_best_seconds(lambda: left @ right)] if build is None else []
    operations = NativeKernels(build, dtype) if build else kernels.for_device(torch.device("cpu"), dtype)
    if isinstance(operations, NativeKernels):
        packed, rows = operations.prepare_weight(right), left.float()
        seconds.append(_best_seconds(lambda: operations.logits(rows, packed)))
    multiplied = 2 * MATMUL_SIZE**3 / min(seconds)
    return Rates(round(read / 1e9, 1), round(multiplied / 1e9, 1), str(dtype).removeprefix("torch."))


def floor_tokens_per_s(
    config: PersimmonConfig,
    rates: Rates,
    *,
    weight_bytes: float,
    head_bytes: float | None = None,
    streams: int,
    input_len: float,
    output_len: float,
) -> float:
    """The most output tokens a second that these rates allow, prompts included, attention and all else for nothing.

    Args:
        config: the network.
        rates: the machine's.
        weight_bytes: of one weight.
        head_bytes: of one weight of lm_head, where they differ.
        streams: sequences that decode together.
        input_len: tokens of a prompt, on average.
        output_len: and of an answer.
    """
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    body, head = layers * hidden * (4 * hidden + 2 * inner), hidden * config.vocab_size
    flops = rates.matmul_gflop_s * 1e9
    step_bytes = body * weight_bytes + head * (weight_bytes if head_bytes is None else head_bytes)
    step = max(step_bytes / (rates.read_gb_s * 1e9), 2 * (body + head) * streams / flops)
    prompt = 2 * (body * input_len + head) / flops
    return streams / (step + streams * prompt / output_len)


def device() -> dict[str, Any]:
    """The machine, as far as it explains figures."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    flags = library.processor_flags()
    return {
        "cpu": ", ".join(sorted(names)) or "unknown",
        "cores": len(os.sched_getaffinity(0)),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "integer and matrix instructions": sorted(flags & {"avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8"}),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": sys.version.split()[0],
        "torch": version("torch"),
    }


def write_figures(out: Path | None, figures: Mapping[str, Any]) -> None:
    """Writes figures as JSON, behind what the machine is.

    Args:
        out: the file, whose folder is made if need be; None writes nothing.
        figures: by name.
    """
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"device": device(), **figures}, indent=2) + "\n")


def _best_seconds(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(TRIES):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.machine", description=(__doc__ or "").splitlines()[0])
    parser.parse_args()
    for dtype in (torch.float32, torch.bfloat16):
        print(json.dumps(asdict(measure_rates(dtype))))


if __name__ == "__main__":
    main()
