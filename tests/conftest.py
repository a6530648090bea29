"""What tests of several folders share: checkpoints and models that are made once a run.

Imports torch only inside the fixtures that need it, so that tests of the torch-free parts start at once.
"""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# The models here are too small to gain from a second thread, and idle OpenMP threads spin: on a busy machine one
# thread is ten times as fast.  Read when torch is first imported, and inherited by the servers that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton kernels run in its interpreter, which is chosen when they are defined; the tests that compile them do so in
# processes of their own.
os.environ["TRITON_INTERPRET"] = "1"
# How long an example takes says nothing where as many tests run at once as there are cores.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture(scope="session")
def demo_checkpoint() -> Path:
    """The checkpoint that comes with the project: trained weights, stored in float16."""
    from tests.model.checkpoints import DEMO

    return DEMO


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random checkpoint whose norms and biases are far from ones and zeros; not to be changed."""
    from tests.model.checkpoints import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("random-checkpoint"))


@pytest.fixture(scope="session")
def triton_cache(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where compiled kernels lie, for all processes and for later runs: what has been compiled once need not be again.

    Triton finds them by their source, their arguments, its own version and the compiler's.
    """
    cache = getattr(pytestconfig, "cache", None)  # there is none with -p no:cacheprovider
    folder: Path = tmp_path_factory.mktemp("triton") if cache is None else cache.mkdir("triton")
    return folder
