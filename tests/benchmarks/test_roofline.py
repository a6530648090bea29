import json
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.roofline import ASSUMED, CARDS, RESULTS, Launch, predict, waits_before
from tests.kernels.machine_code.compiled import Compiled

H100, H200 = CARDS
LAUNCH = Launch(
    "a projection",
    memory_bytes=100e6,
    l2_bytes=110e6,
    shared_bytes=220e6,
    in_flight=64e3,
    busy=132,
    instructions=60,
    waits=0,
)


@pytest.mark.parametrize(
    "worse",
    [
        {"memory_bytes": 200e6},
        {"l2_bytes": 300e6},
        {"shared_bytes": 4e9},
        {"in_flight": 8e3},
        {"busy": 20},
        {"instructions": 600},
        {"waits": 1},
        {"merged_bytes": 1e3},
    ],
)
def test_a_launch_that_moves_more_or_asks_later_takes_longer(worse: dict[str, Any]) -> None:
    assert replace(LAUNCH, **worse).us(H100) > LAUNCH.us(H100)


def test_memory_is_the_limit_until_too_little_is_asked_for_at_once() -> None:
    enough = H200.memory_tb_s * 1e6 * ASSUMED.memory_latency_us / 132
    assert LAUNCH.streams(H200)["bytes in flight"] < LAUNCH.streams(H200)["memory"]
    starved = replace(LAUNCH, in_flight=enough / 2).streams(H200)
    assert starved["bytes in flight"] == pytest.approx(2 * starved["memory"])


def test_what_attention_prefetches_is_not_read_from_memory_again() -> None:
    attention = replace(LAUNCH, name="attention", memory_bytes=8e6, waits=4)
    alone, ahead = (
        predict(H100, 1, [replace(attention, prefetches=prefetches), LAUNCH])[1]["us"] for prefetches in (False, True)
    )
    assert isinstance(alone, float)
    assert isinstance(ahead, float)
    assert ahead < alone


def test_waits_are_the_longest_chain_of_loads_that_an_instruction_needs() -> None:
    lines = [
        "LDG.E R2, desc[UR4][R8.64] ;",
        "LDG.E.64 R4, desc[UR4][R10.64] ;",
        "IADD3 R6, R2, R5, RZ ;",
        "LDG.E R7, desc[UR4][R6.64] ;",
        "ISETP.GE.AND P0, PT, R7, R9, PT ;",
        "@P0 LDGSTS.E.128 [R20], desc[UR4][R30.64] ;",
    ]
    sass = "\n".join(f"/*{place * 16:04x}*/ {line}" for place, line in enumerate(lines))
    kernel = Compiled("", registers=0, stack=0, shared_bytes=0, num_warps=4, programs=1, ttgir="", ptx="", sass=sass)
    assert [waits_before(kernel, place) for place in range(len(lines))] == [0, 0, 1, 1, 2, 2]


def test_the_recorded_predictions_follow_from_the_recorded_code() -> None:
    recorded = json.loads(RESULTS.read_text())
    predicted = [
        row
        for card in CARDS
        for batch, step in recorded["code"].items()
        for row in predict(card, int(batch), [Launch(**launch) for launch in step])
    ]
    assert [{name: row[name] for name in row if name != "before_us"} for row in recorded["predicted"]] == predicted
