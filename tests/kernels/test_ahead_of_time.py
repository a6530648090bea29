"""The kernels' machine code for three generations of GPUs, which need not be there.

tests/exhaustive/test_machine_code.py reads the whole matrix.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.machine_code import latency, lint
from tests.kernels.machine_code.compiled import Matrix, compile_apart
from tests.kernels.machine_code.figures import bounds, faults
from tests.kernels.machine_code.latency import MIN_BYTES_IN_FLIGHT, MULTIPROCESSORS, PROJECTIONS, projection_kernel
from tests.kernels.production import CAPABILITIES, MODULES, calls_of, selected

PLACES = [(c, module, call) for c in CAPABILITIES for module in MODULES for call in selected(module, c, whole=False)]


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory, triton_cache: Path) -> Matrix:
    return compile_apart(CAPABILITIES, tmp_path_factory.mktemp("ahead-of-time") / "matrix.json", triton_cache)


@pytest.mark.parametrize(("capability", "module", "call"), PLACES)
def test_machine_code_keeps_its_bounds_and_holds_what_its_speed_rests_on(
    matrix: Matrix, capability: int, module: str, call: str
) -> None:
    assert faults(capability, module, call, matrix[capability, module, call]) == []


def test_a_bound_that_is_missed_is_a_fault(matrix: Matrix) -> None:
    place = 90, "projection", "query_key_value_fp16_16"
    [kernel] = matrix[place]
    limits = bounds(*place, kernel.kernel)
    assert limits is not None
    over = replace(
        kernel,
        registers=limits.registers + 1,
        stack=8,
        shared_bytes=limits.shared_bytes + 1,
        sass="LDG.E.U16 R2, [R4.64] ;",
    )
    assert faults(*place, [over]) == [
        "projection_kernel spills 8 bytes",
        f"projection_kernel takes {over.registers} registers, more than {limits.registers}",
        f"projection_kernel takes {over.shared_bytes} bytes of shared memory, more than {limits.shared_bytes}",
        "projection_kernel loads a tensor of 16-bit numbers one by one",
        *(f"no instruction is {pattern}" for pattern in calls_of("projection").EXPECTED[place[2]]),
    ]
    assert faults(*place, [replace(kernel, kernel="another")]) == [
        "none of another has a bound in persimmon.kernels.projection.LIMITS"
    ]


@pytest.mark.parametrize("rule", lint.RULES)
def test_machine_code_keeps_the_rule(matrix: Matrix, rule: str) -> None:
    assert lint.violations(matrix, rule) == {}


# The kernel of a call as Triton made it, and one change to its PTX or to its SASS.
BROKEN = [
    ("merge_protocol", "projection", "attention_out_fp16_16", "ptx", r"bar\.sync\s+0;", ""),
    ("merge_protocol", "projection", "attention_out_fp16_16", "ptx", "acq_rel", "relaxed"),
    ("merge_protocol", "projection", "attention_out_fp16_16", "ptx", r"ld\.global\.cg", "ld.global"),
    ("merge_protocol", "decode_attention", "decode, blocks of 32", "ptx", r"ld\.global\.cg", "ld.global"),
    ("no_non_coherent_load", "layer_norm", "merged_norm_fp16", "sass", r"LDG\.E\.128", "LDG.E.128.CONSTANT"),
    ("proxy_fence", "projection", "mlp_down_fp16_64", "ptx", r"fence\.proxy\.async\S*;", ""),
    ("proxy_fence", "prefill_attention", "prompts", "ptx", r"fence\.proxy\.async\S*;", ""),
    ("barrier_before_shared_stores", "head", "head, 64 rows", "sass", r"BAR\.SYNC\S*", "NOP"),
    ("nothing_before_grid_wait", "decode_attention", "decode, dependent", "ptx", "(griddepcontrol.wait)", r"@%p1 \1"),
]


@pytest.mark.parametrize(("rule", "module", "call", "code", "pattern", "instead"), BROKEN)
def test_one_change_to_a_real_kernel_breaks_the_rule(
    matrix: Matrix, rule: str, module: str, call: str, code: str, pattern: str, instead: str
) -> None:
    kernel = next(kernel for kernel in matrix[90, module, call] if re.search(pattern, getattr(kernel, code)))
    assert lint.RULES[rule](kernel) == []
    changed: dict[str, Any] = {code: re.sub(pattern, instead, getattr(kernel, code))}
    assert lint.RULES[rule](replace(kernel, **changed)) != []


def test_statistics_are_summed_in_one_order_for_every_number_of_rows(matrix: Matrix) -> None:
    assert lint.reduction_layouts(matrix) == []
    [kernel] = matrix[90, "projection", "attention_out_fp16_64"]
    other = replace(kernel, ttgir=kernel.ttgir.replace("threadsPerWarp = [4, 8]", "threadsPerWarp = [2, 16]"))
    assert lint.reduction_layouts({**matrix, (90, "projection", "attention_out_fp16_64"): [other]}) != []


def test_guesses_are_computed_by_the_very_code_of_decodes(matrix: Matrix) -> None:
    [with_guesses] = matrix[90, "decode_attention", "decode, guesses"]
    [decode] = matrix[90, "decode_attention", "decode, blocks of 32"]
    assert with_guesses.ptx == decode.ptx


MAX_INSTRUCTIONS = 60
"""Before the first request of a weight: a longer prologue leaves memory idle in each of a step's 144 projections."""


@pytest.mark.parametrize(("projection", "rows"), PROJECTIONS)
def test_enough_bytes_of_a_weight_are_in_flight(matrix: Matrix, projection: str, rows: int) -> None:
    assert latency.bytes_in_flight(projection_kernel(matrix, projection, rows)) >= MIN_BYTES_IN_FLIGHT


@pytest.mark.parametrize(("projection", "rows"), PROJECTIONS)
def test_weights_are_asked_for_at_once(matrix: Matrix, projection: str, rows: int) -> None:
    before = latency.instructions_before(projection_kernel(matrix, projection, rows))
    assert before is not None
    assert before <= MAX_INSTRUCTIONS


def test_fewer_programs_and_a_longer_prologue_are_seen(matrix: Matrix) -> None:
    kernel = projection_kernel(matrix, "mlp_down", 16)
    assert latency.bytes_in_flight(replace(kernel, programs=MULTIPROCESSORS // 3)) < MIN_BYTES_IN_FLIGHT
    before = latency.instructions_before(kernel)
    assert before is not None
    assert latency.instructions_before(replace(kernel, sass=f"/*0000*/ NOP ;\n{kernel.sass}")) == before + 1
