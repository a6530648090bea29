"""What the plan of the engine's memory leaves to the other processes."""

from dataclasses import replace

import psutil
import pytest

from persimmon.model.config import PersimmonConfig
from persimmon.server.memory_need import ENGINE_BYTES_PER_TOKEN, WORKER_BYTES_PER_TOKEN, still_to_be_taken
from persimmon.server.settings.engine import BODIES_TOGETHER, EngineSettings
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
