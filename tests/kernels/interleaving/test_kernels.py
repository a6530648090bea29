"""The kernels on the interleaving interpreter: the same bits in every order, no race, no address outside a tensor.

More schedules of the same: tests/exhaustive/test_many_schedules.py.
"""

import importlib
import pkgutil
import random
from collections.abc import Mapping
from functools import lru_cache
from types import ModuleType

import pytest
import torch

import persimmon.kernels
from persimmon.kernels import decode_attention, invariant_attention, layer_norm, projection_ends, sampling
from tests.kernels.interleaving.address_space import AddressError
from tests.kernels.interleaving.cases import CASES, MERGES, Outcome
from tests.kernels.interleaving.happens_before import DataRaceError
from tests.kernels.interleaving.machine import Machine, interleaved
from tests.kernels.interleaving.rewritten import rewritten

# numpy warns where a GPU does not: of log(0), and of 0 / 0 that is then not chosen.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SEEDS = {
    "projections": (2, 8),
    "decode attention": (4, 0, 5),
    "batch-invariant decode": (1, 0),
    "decode attention over 8 bits": (1,),
    "rows of one sequence": (1,),
    "prefill over 8 bits": (1,),
}
"""Of MERGES, with which several programs meet; the first, which costs least, is used for planted faults."""

EVERY_CASE = [(name, seed) for name in CASES for seed in SEEDS.get(name, range(2))]

MODULES: dict[str, ModuleType] = {
    "projections": projection_ends,
    "decode attention": decode_attention,
    "batch-invariant decode": invariant_attention,
}
"""Where the kernels of MERGES are."""

NO_BARRIER = {r"tl\.debug_barrier\(\)": "pass"}
NO_RELEASE = {'sem="acq_rel"': 'sem="acquire"'}
NO_ACQUIRE = {'sem="acq_rel"': 'sem="release"'}
NO_FRESH_LOADS = {r', cache_modifier="\.cg"': ""}
FAULTS = {
    "no barrier": NO_BARRIER,
    "no release": NO_RELEASE,
    "neither acquire nor fresh loads": NO_ACQUIRE | NO_FRESH_LOADS,
    "scope of the program": {'scope="gpu"': 'scope="cta"'},
}


ASTRAY = {
    "partial sums of rows that do not exist": (
        ("projections", projection_ends),
        (r", mask=is_live\[:, None\] & known\[None, :\]\)", ")"),
    ),
    "the block after a sequence's last": (
        ("decode attention", decode_attention),
        (r"tl\.load\(table \+ position // S\)", "tl.load(table + position // S + 1)"),
    ),
    "columns after the end of a row": (
        ("elementwise", layer_norm),
        (r"tl\.load\(x \+ row \+ columns, mask=known, other=0\.0\)", "tl.load(x + row + columns)"),
    ),
    "logits after those of the last row": (
        ("sampling", sampling),
        (r'ids, mask=ids < vocab_size, other=float\("-inf"\)\)', "ids)"),
    ),
}
"""What a kernel touches outside its tensor once its module is changed: the case that shows it, and the change."""


@lru_cache
def ordinary(name: str, seed: int) -> Outcome:
    """What the case leaves in Triton's own interpreter, where one program runs after the other."""
    return CASES[name](random.Random(seed))


def run(name: str, seed: int, *, find_races: bool = True) -> tuple[Outcome, Machine]:
    with interleaved(seed, find_races=find_races) as machine:
        return CASES[name](random.Random(seed)), machine


run_once = lru_cache(run)


def is_right(outcome: Outcome, expected: Outcome) -> bool:
    """The same bits, and counters at zero."""
    pairs = zip(outcome.results, expected.results, strict=True)
    same = all(torch.equal(*(each.contiguous().view(torch.uint8) for each in pair)) for pair in pairs)
    return same and not any(counter.any() for counter in outcome.counters)


@pytest.mark.parametrize(("name", "seed"), EVERY_CASE)
def test_no_schedule_changes_a_bit_or_leaves_a_tensor(name: str, seed: int) -> None:
    outcome, _ = run_once(name, seed)
    assert is_right(outcome, ordinary(name, seed))


def test_every_kernel_has_a_case() -> None:
    modules = [
        importlib.import_module(f"persimmon.kernels.{found.name}")
        for found in pkgutil.iter_modules(persimmon.kernels.__path__)
        if not found.ispkg
    ]
    bounded = {key.partition(",")[0] for module in modules for key in getattr(module, "LIMITS", {})}
    launched = set[str]().union(*(run_once(name, seed)[1].kernels for name, seed in EVERY_CASE))
    assert bounded
    assert bounded <= launched


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("name", MERGES)
class TestFaults:
    def test_shows_in_the_results(self, name: str, fault: Mapping[str, str]) -> None:
        expected = ordinary(name, SEEDS[name][0])
        with rewritten(MODULES[name], fault):
            outcome, _ = run(name, SEEDS[name][0], find_races=False)
        assert not is_right(outcome, expected)

    def test_is_a_race_in_any_schedule(self, name: str, fault: Mapping[str, str]) -> None:
        with rewritten(MODULES[name], fault), pytest.raises(DataRaceError, match="without a barrier"):
            run(name, SEEDS[name][0])


@pytest.mark.parametrize("less", [NO_ACQUIRE, NO_FRESH_LOADS], ids=["no acquire", "no fresh loads"])
@pytest.mark.parametrize("name", MERGES)
def test_either_an_acquire_or_fresh_loads_suffice(name: str, less: Mapping[str, str]) -> None:
    expected = ordinary(name, SEEDS[name][0])
    with rewritten(MODULES[name], less):
        outcome, _ = run(name, SEEDS[name][0], find_races=False)
    assert is_right(outcome, expected)


def test_rows_of_one_sequence_are_stored_before_any_is_read() -> None:
    both_at_once = {r"stores = \(length > 0\) & \(part != _ATTEND\)": "stores = length > 0"}
    with rewritten(decode_attention, both_at_once), pytest.raises(DataRaceError):
        run("rows of one sequence", SEEDS["rows of one sequence"][0])


@pytest.mark.parametrize(("where", "change"), ASTRAY.values(), ids=ASTRAY)
def test_an_address_outside_its_tensor_is_found(where: tuple[str, ModuleType], change: tuple[str, str]) -> None:
    name, module = where

    def run_some() -> None:
        for seed in range(8):
            run(name, seed, find_races=False)

    with rewritten(module, dict([change])), pytest.raises(AddressError, match=r"after its end|before its beginning"):
        run_some()
