import pytest

from tests.end_to_end.serving import Server, serving


@pytest.fixture(scope="session")
def demo():
    """The server as `make serve` starts it, with a cache small enough to be fought over."""
    with serving("--kv-cache-memory", "26MB", "--max-num-seqs", "32", "--max-num-queued-reqs", "400") as server:
        yield server


@pytest.fixture
def fresh():
    """A server of the test's own, to be killed."""
    with serving("--kv-cache-memory", "64MB") as server:
        yield server


__all__ = ["Server"]
