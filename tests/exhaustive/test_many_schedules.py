"""The kernels on the interleaving interpreter, in more schedules than `make test` has the time for."""

import pytest

from tests.interpreter import keep_language_patched
from tests.kernels.interleaving.cases import CASES
from tests.kernels.interleaving.test_kernels import is_right, ordinary, run

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SEEDS = range(100, 130)


@pytest.fixture(scope="module", autouse=True)
def _fast_interpreter() -> None:
    keep_language_patched()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", CASES)
def test_no_schedule_changes_a_bit_or_leaves_a_tensor(name: str, seed: int) -> None:
    outcome, _ = run(name, seed)
    assert is_right(outcome, ordinary(name, seed))
