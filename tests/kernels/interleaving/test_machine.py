"""The interleaving interpreter itself: small kernels whose outcomes the memory model decides."""

import threading

import pytest
import torch
import triton
import triton.language as tl

from tests.kernels.interleaving.address_space import AddressError
from tests.kernels.interleaving.happens_before import DataRaceError
from tests.kernels.interleaving.launch import Launch
from tests.kernels.interleaving.machine import interleaved

PROGRAMS, WIDTH = 4, 8
SEEDS = range(12)


@triton.jit  # type: ignore[untyped-decorator]
def last_one_sums(
    total,
    parts,
    counter,
    BARRIER: tl.constexpr,
    SEM: tl.constexpr,
    SCOPE: tl.constexpr,
    CACHE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Every program leaves WIDTH ones; the one that arrives last adds all of them up."""
    column = tl.arange(0, WIDTH)
    tl.store(parts + tl.program_id(0) * WIDTH + column, 1.0)
    if BARRIER:
        tl.debug_barrier()
    arrived = tl.atomic_add(counter, 1, sem=SEM, scope=SCOPE)
    if arrived == tl.num_programs(0) - 1:
        found = tl.zeros((WIDTH,), tl.float32)
        for program in range(tl.num_programs(0)):
            found += tl.load(parts + program * WIDTH + column, cache_modifier=CACHE)
        tl.store(total, tl.sum(found))
        tl.store(counter, 0)


def sums(
    seed: int,
    *,
    barrier: bool = True,
    sem: str = "acq_rel",
    scope: str = "gpu",
    cache: str = "",
    find_races: bool = False,
) -> list[float]:
    """What the last program of each of two launches on the same buffers has found."""
    parts, counter = torch.zeros(PROGRAMS, WIDTH), torch.zeros(1, dtype=torch.int32)
    found = []
    with interleaved(seed, find_races=find_races):
        for _ in range(2):
            total = torch.zeros(1)
            last_one_sums[(PROGRAMS,)](total, parts, counter, barrier, sem, scope, cache, WIDTH)
            found.append(float(total))
            parts.zero_()
            assert int(counter) == 0
    return found


RIGHT = [float(PROGRAMS * WIDTH)] * 2


class TestWeakMemory:
    @pytest.mark.parametrize("cache", ["", ".cg"])
    @pytest.mark.parametrize("scope", ["gpu", "sys"])
    def test_release_and_acquire_behind_a_barrier_pass_on_all_stores(self, scope: str, cache: str) -> None:
        for seed in SEEDS:
            assert sums(seed, scope=scope, cache=cache, find_races=True) == RIGHT

    def test_a_fresh_load_needs_no_acquire(self) -> None:
        for seed in SEEDS:
            assert sums(seed, sem="release", cache=".cg") == RIGHT

    @pytest.mark.parametrize(
        "fault",
        [
            {"barrier": False, "cache": ".cg"},
            {"sem": "acquire", "cache": ".cg"},
            {"sem": "relaxed", "cache": ".cg"},
            {"scope": "cta", "cache": ".cg"},
            {"sem": "release"},
        ],
        ids=str,
    )
    def test_without_one_of_them_stores_are_missed(self, fault: dict) -> None:
        assert any(sums(seed, **fault) != RIGHT for seed in SEEDS)


@triton.jit  # type: ignore[untyped-decorator]
def take_numbers(numbers, taken, next_number, lock, BARRIER: tl.constexpr, SEM: tl.constexpr):
    """Every program takes the next number, one after the other, because a lock keeps out the others."""
    while tl.atomic_cas(lock, 0, 1, sem=SEM, scope="gpu") != 0:
        pass
    number = tl.load(next_number)
    tl.store(next_number, number + 1)
    tl.store(numbers + tl.program_id(0), number)
    tl.store(taken + number, 1)
    if BARRIER:
        tl.debug_barrier()
    tl.atomic_xchg(lock, 0, sem="release", scope="gpu")


class TestLocks:
    def numbers(self, seed: int, *, barrier: bool = True, sem: str = "acquire", find_races: bool = False) -> list[int]:
        buffers = [torch.zeros(size, dtype=torch.int32) for size in (PROGRAMS, PROGRAMS, 1, 1)]
        with interleaved(seed, find_races=find_races):
            take_numbers[(PROGRAMS,)](*buffers, barrier, sem)
        return sorted(buffers[0].tolist())

    def test_let_programs_change_memory_one_after_the_other(self) -> None:
        for seed in SEEDS:
            assert self.numbers(seed, find_races=True) == list(range(PROGRAMS))

    @pytest.mark.parametrize("fault", [{"barrier": False}, {"sem": "relaxed"}], ids=str)
    def test_are_in_vain_without_barrier_or_acquire(self, fault: dict) -> None:
        assert any(self.numbers(seed, **fault) != list(range(PROGRAMS)) for seed in SEEDS)
        with pytest.raises(DataRaceError):
            self.numbers(0, find_races=True, **fault)


class TestHappensBefore:
    @pytest.mark.parametrize(
        "fault",
        [{"barrier": False}, {"sem": "acquire"}, {"sem": "release"}, {"sem": "relaxed"}, {"scope": "cta"}],
        ids=str,
    )
    def test_finds_what_is_not_ordered_whether_or_not_it_shows(self, fault: dict) -> None:
        for seed in SEEDS:
            with pytest.raises(DataRaceError, match=r"program \d (loads what|stores an element)"):
                sums(seed, cache=".cg", find_races=True, **fault)


@triton.jit  # type: ignore[untyped-decorator]
def copy(target, source, count, FIRST: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """Elements FIRST, FIRST + 1 and so on; with a mask only the first `count` of them."""
    lane = tl.arange(0, BLOCK)
    place = tl.program_id(0) * BLOCK + lane
    inside = (place < (count if MASKED else tl.num_programs(0) * BLOCK)) & (count > 0)
    tl.store(target + place, tl.load(source + FIRST + place, mask=inside, other=7))


class TestAddresses:
    BLOCK = 4

    def copy(self, source: torch.Tensor, count: int = 8, *, first: int = 0, masked: bool = False) -> list[int]:
        target = torch.zeros(8, dtype=source.dtype)
        with interleaved(0):
            copy[(2,)](target, source, count, first, masked, self.BLOCK)
        return target.tolist()

    def test_inside_a_tensor_are_free(self) -> None:
        assert self.copy(torch.arange(8)) == list(range(8))
        assert self.copy(torch.arange(9), first=1) == list(range(1, 9))

    def test_masked_off_are_not_touched(self) -> None:
        assert self.copy(torch.arange(6), count=6, masked=True) == [0, 1, 2, 3, 4, 5, 7, 7]

    @pytest.mark.parametrize(
        ("first", "message"),
        [
            (1, r"8 bytes at offset 64 of `source` \(\[8\] torch.int64\), 0 bytes after its end"),
            (-1, r"8 bytes at offset -8 of .* 8 bytes before its beginning"),
            (2**31, "after its end"),
            (-(2**31), "before its beginning"),
        ],
    )
    def test_outside_are_refused(self, first: int, message: str) -> None:
        with pytest.raises(AddressError, match=message):
            self.copy(torch.arange(8), first=first)

    def test_of_a_part_of_a_tensor_end_with_the_part(self) -> None:
        whole = torch.arange(10)
        assert self.copy(whole[1:9]) == list(range(1, 9))
        for first in (-1, 1):
            with pytest.raises(AddressError):
                self.copy(whole[1:9], first=first)

    def test_in_a_neighbour_are_outside(self) -> None:
        pair = torch.zeros(2, 8, dtype=torch.int64)
        with interleaved(0), pytest.raises(AddressError, match="of `source`"):
            copy[(2,)](pair[1], pair[0], 8, 8, False, self.BLOCK)

    def test_must_be_multiples_of_the_element(self) -> None:
        view = torch.zeros(100, dtype=torch.uint8).numpy()[1:65].view("int64")
        with pytest.raises(AddressError, match="not aligned"):
            self.copy(torch.from_numpy(view))


class TestSchedules:
    def test_repeat_with_their_seed(self) -> None:
        def schedules(seed: int) -> list[list[int]]:
            parts, counter, total = torch.zeros(PROGRAMS, WIDTH), torch.zeros(1, dtype=torch.int32), torch.zeros(1)
            with interleaved(seed) as machine:
                for _ in range(3):
                    last_one_sums[(PROGRAMS,)](total, parts, counter, True, "acq_rel", "gpu", "", WIDTH)
            return machine.schedules

        assert schedules(1) == schedules(1)
        assert schedules(1) != schedules(2)
        assert any(schedule != sorted(schedule) for schedule in schedules(1))

    def test_no_program_runs_on_after_an_interrupt(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Interrupted(threading.Event):
            def wait(self, timeout: float | None = None) -> bool:
                raise KeyboardInterrupt

        make = Launch.__init__

        def make_interrupted(launch: Launch, *arguments: object, **options: object) -> None:
            make(launch, *arguments, **options)  # type: ignore[arg-type]
            launch._ended = Interrupted()

        monkeypatch.setattr(Launch, "__init__", make_interrupted)
        before = threading.active_count()
        with pytest.raises(KeyboardInterrupt):
            sums(0)
        assert threading.active_count() == before
