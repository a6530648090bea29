import json
from typing import Any

import pytest

from benchmarks.roofline_quantized import CACHES, GPUS, RESULTS, Facts, Launch, loop_instructions, predictions
from tests.kernels.machine_code.compiled import Compiled


def launch_of(recorded: dict[str, Any]) -> Launch:
    return Launch(**{**recorded, "facts": Facts(**recorded["facts"])})


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(RESULTS.read_text())
    return content


def test_the_recorded_predictions_follow_from_the_recorded_code(recorded: dict[str, Any]) -> None:
    code = {name: [launch_of(launch) for launch in step] for name, step in recorded["code"].items()}
    attended = {name: launch_of(launch) for name, launch in recorded["attention_code"].items()}
    assert predictions(code, attended) == (recorded["predicted"], recorded["attention"])


def test_a_cache_of_8_bits_is_half_as_much_to_read(recorded: dict[str, Any]) -> None:
    read = {name: launch["memory_bytes"] for name, launch in recorded["attention_code"].items()}
    for gpu in GPUS:
        own, int8, fp8 = (read[f"{gpu.capability} {cache} 64"] for cache in CACHES)
        assert fp8 * 2 == own
        assert int8 == fp8 * (1 + 2 / 64)  # a scale of 2 bytes for 64 numbers


def test_loops_are_found_by_what_they_hold_the_smallest_first() -> None:
    lines = [
        "MOV R1, R2 ;",
        "LDGSTS.E [R1], [R2.64] ;",
        "LDGSTS.E [R1], [R2.64] ;",
        "@P0 BRA 0x20 ;",
        "FADD R1, R2, R3 ;",
        "@P1 BRA 0x0 ;",
        "EXIT ;",
    ]
    sass = "\n".join(f"/*{place * 16:04x}*/ {line}" for place, line in enumerate(lines))
    kernel = Compiled("a", registers=0, stack=0, shared_bytes=0, num_warps=4, programs=1, ttgir="", ptx="", sass=sass)
    assert loop_instructions(kernel, "LDGSTS") == [2, 6]
    with pytest.raises(ValueError, match="a has no loop with HGMMA"):
        loop_instructions(kernel)
