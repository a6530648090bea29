from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.engine.engine_turns import House


@pytest.fixture(params=[False, True], ids=["", "overlap"])
def house(request: pytest.FixtureRequest) -> Iterator[House]:
    """An engine reached within the process, where what was sent has arrived."""
    house = House("inproc://engine", overlap=request.param)
    yield house
    house.close()


@pytest.fixture(params=["inproc", "ipc"])
def reachable_house(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[House]:
    """An engine reached within the process, or as it is in production."""
    house = House("inproc://engine" if request.param == "inproc" else f"ipc://{tmp_path}/e")
    yield house
    house.close()
