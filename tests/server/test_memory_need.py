"""What the plan of the engine's memory leaves to the other processes."""

from dataclasses import replace

import psutil
import pytest

from persimmon.model.config import PersimmonConfig
from persimmon.model.memory_limits import MemoryLeft
from persimmon.server.memory_need import (
    ENGINE_BYTES,
    ENGINE_BYTES_PER_TOKEN,
    SUPERVISOR_BYTES,
    WORKER_BYTES_PER_TOKEN,
    check_memory,
    share_of_memory,
    still_to_be_taken,
    within_share,
)
from persimmon.server.settings.engine import BODIES_TOGETHER, EngineSettings
from persimmon.server.settings.section import SettingsError
from tests.model.checkpoints import DEMO

CONFIG = PersimmonConfig.from_folder(DEMO)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other process has taken any memory yet."""
    monkeypatch.setattr(psutil.Process, "parent", lambda process: None)


@pytest.mark.parametrize("api_workers", [0, 1, 3])
def test_each_worker_has_room_for_the_bodies_that_it_may_receive_at_once(api_workers: int) -> None:
    without = still_to_be_taken(CONFIG, api_workers, 0)
    assert still_to_be_taken(CONFIG, api_workers, 2**25) == without + api_workers * BODIES_TOGETHER * 2**25


def test_the_engine_knows_how_long_a_body_may_be() -> None:
    assert "max_body_size" in EngineSettings.model_fields


@pytest.mark.parametrize("api_workers", [0, 2])
def test_a_larger_vocabulary_takes_more_in_the_engine_than_in_each_worker(api_workers: int) -> None:
    larger = replace(CONFIG, vocab_size=CONFIG.vocab_size + 1000)
    more = still_to_be_taken(larger, api_workers, 0) - still_to_be_taken(CONFIG, api_workers, 0)
    assert more == 1000 * (ENGINE_BYTES_PER_TOKEN + api_workers * WORKER_BYTES_PER_TOKEN)


@pytest.mark.parametrize("engines", [2, 3])
def test_engines_share_what_is_left_after_the_workers(engines: int) -> None:
    left = MemoryLeft(10 * 2**30)
    one = share_of_memory(CONFIG, 1, 1, 2, 2**25, left)
    share = share_of_memory(CONFIG, engines, 1, 2, 2**25, left)
    own = still_to_be_taken(CONFIG, 0, 0) - SUPERVISOR_BYTES + ENGINE_BYTES  # what each takes beyond its plan
    assert engines * (share + own) == pytest.approx(one + own, abs=engines)
    assert share_of_memory(CONFIG, engines, 2, 2, 2**25, left) < share - ENGINE_BYTES  # two processes each
    assert share_of_memory(CONFIG, engines, 1, 2, 2**25, MemoryLeft(2**20)) == 0


def test_processes_that_cannot_all_start_are_refused() -> None:
    with pytest.raises(SettingsError, match="not enough memory: 2 engines and 1 API worker take about"):
        check_memory(CONFIG, 1, MemoryLeft(2 * ENGINE_BYTES), engines=2)
    check_memory(CONFIG, 1, MemoryLeft(2 * ENGINE_BYTES))


@pytest.mark.parametrize(("share", "planned"), [(None, 1000), (2000, 1000), (500, 400), (50, 0)])
def test_an_engine_plans_with_no_more_than_its_share(share: int | None, planned: int) -> None:
    assert within_share(MemoryLeft(1000), share, reserved=100).bytes == planned
