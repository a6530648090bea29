from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from persimmon.server.engine.messages import Ready
from persimmon.server.http.endpoints.service import Service
from tests.server.http.fake_engine import STATS

READY = Ready(64, block_size=32, total_blocks=9, device="cpu", dtype="float32", stats=STATS)


def fingerprint(info: Ready) -> str:
    service: Any = SimpleNamespace(engine=SimpleNamespace(info=info), served_model_name="demo")
    return str(vars(Service)["system_fingerprint"].fget(service))


@pytest.mark.parametrize(
    "changed", [{"device": "cuda:0"}, {"dtype": "float16"}, {"weights": "int8"}, {"cache_dtype": "int8"}]
)
def test_the_fingerprint_changes_with_what_computes(changed: dict[str, str]) -> None:
    assert fingerprint(msgspec.structs.replace(READY, **changed)) != fingerprint(READY)
    assert fingerprint(msgspec.structs.replace(READY, total_blocks=1)) == fingerprint(READY)
