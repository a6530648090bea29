"""The programs of one launch: threads that hand over to each other at memory operations, in a seeded random order.

Knows memory and addresses, but nothing of Triton.
"""

import threading
from collections.abc import Callable

import numpy as np

from tests.kernels.interleaving.address_space import AddressSpace
from tests.kernels.interleaving.happens_before import HappensBefore
from tests.kernels.interleaving.weak_memory import Agent, WeakMemory

Place = tuple[int, int, int]
"""A program's place in the grid."""


class _Abandoned(BaseException):
    """Ends the thread of a program whose launch has failed elsewhere."""


class _Program:
    """One program, and the thread that runs it from its first turn on."""

    def __init__(self, number: int, place: Place) -> None:
        self.number, self.place = number, place
        self.agent = Agent()
        self.turn = threading.Semaphore(0)
        self.thread: threading.Thread | None = None


class Launch:
    """The programs of one launch, of which one at a time runs, and the memory that they share.

    Attributes:
        schedule: the program of each memory operation.
    """

    def __init__(self, grid: Place, space: AddressSpace, rng: np.random.Generator, *, find_races: bool) -> None:
        self.schedule: list[int] = []
        self._space, self._rng = space, rng
        self._memory = WeakMemory(rng)
        places: list[Place] = [(x, y, z) for x in range(grid[0]) for y in range(grid[1]) for z in range(grid[2])]
        self._order = HappensBefore(len(places)) if find_races else None
        self._programs = [_Program(number, place) for number, place in enumerate(places)]
        self._unfinished = list(self._programs)
        self._current = self._programs[0]
        self._ended = threading.Event()
        self._error: BaseException | None = None
        # By launch, programs run alone for long, or take turns.
        self._switch_probability = float(rng.choice([0.02, 0.3, 1.0]))

    def run(self, kernel: Callable[[], object], resume: Callable[[Place], None]) -> None:
        """Runs every program to its end.

        Args:
            kernel: a program, which asks this launch for memory.
            resume: called before a program goes on, with its place.

        Raises:
            What the first program that failed has raised, or what interrupted the wait; the others are abandoned.
        """
        self._kernel, self._resume = kernel, resume
        self._hand_over(self._any())
        try:
            self._ended.wait()
        except BaseException as error:  # noqa: BLE001  Ctrl-C, or a test's time limit; raised below
            # No program may run on when the interpreter's own memory operations are back: its addresses are artificial.
            self._error = error
            for program in self._programs:
                program.turn.release()
        # A program that was running when the wait was interrupted may since have started another one.
        joined: set[threading.Thread] = set()
        while threads := {own.thread for own in self._programs if own.thread and own.thread.ident} - joined:
            for thread in threads:
                thread.join()
            joined |= threads
        if self._error is not None:
            raise self._error
        self._memory.finish()

    def load(self, addresses: np.ndarray, dtype: np.dtype, *, fresh: bool) -> np.ndarray:
        """[n] values at addresses [n]."""
        program = self._take_turn()
        values = np.empty(len(addresses), dtype)
        for which, elements in self._space.find(addresses, dtype.itemsize):
            if self._order:
                self._order.load(program.number, elements)
            values[which] = self._memory.load(program.agent, elements, fresh=fresh).view(dtype)
        return values

    def store(self, addresses: np.ndarray, values: np.ndarray) -> None:
        """Values [n] to addresses [n]."""
        program = self._take_turn()
        raw = values.view(f"u{values.itemsize}")
        for which, elements in self._space.find(addresses, values.itemsize):
            if self._order:
                self._order.store(program.number, elements)
            self._memory.store(program.agent, elements, raw[which])

    def atomic(
        self, addresses: np.ndarray, size: int, act: Callable[[np.ndarray], np.ndarray], *, release: bool, acquire: bool
    ) -> np.ndarray:
        """`act` on the addresses [n] that the elements have in the machine's own memory, and what it returns."""
        program = self._take_turn()
        parts = [elements for _, elements in self._space.find(addresses, size)]
        if len(parts) > 1:
            raise ValueError(f"one atomic operation on {len(parts)} tensors: one is supported")
        for elements in parts:
            if self._order:
                self._order.atomic(program.number, elements, release=release, acquire=acquire)
            self._memory.before_atomic(program.agent, elements, release=release)
        result = act(self._space.real(addresses))
        self._memory.after_atomic(program.agent, acquire=acquire)
        return result

    def barrier(self) -> None:
        """The program's threads wait for each other."""
        program = self._take_turn()
        if self._order:
            self._order.barrier(program.number)
        self._memory.barrier(program.agent)

    def _take_turn(self) -> _Program:
        """The program that runs, once other programs have done what they do before its memory operation."""
        program = self._current
        if self._error is not None:
            raise _Abandoned
        self._memory.drain()
        if len(self._unfinished) > 1 and self._rng.random() < self._switch_probability:
            other = self._any()
            if other is not program:
                self._hand_over(other)
                program.turn.acquire()
                if self._error is not None:
                    raise _Abandoned
                self._resume(program.place)
        self.schedule.append(program.number)
        return program

    def _any(self) -> _Program:
        return self._unfinished[int(self._rng.integers(len(self._unfinished)))]

    def _hand_over(self, program: _Program) -> None:
        self._current = program
        if program.thread is None:
            program.thread = threading.Thread(target=self._live, args=(program,), daemon=True)
            program.thread.start()
        else:
            program.turn.release()

    def _live(self, program: _Program) -> None:
        try:
            if self._error is not None:
                raise _Abandoned
            self._resume(program.place)
            self._kernel()
        except _Abandoned:
            return
        except BaseException as error:  # noqa: BLE001  raised again where the launch was made
            self._error = self._error or error
        self._unfinished.remove(program)
        if self._error is not None:
            for other in self._unfinished:
                other.turn.release()
            self._ended.set()
        elif self._unfinished:
            self._hand_over(self._any())
        else:
            self._ended.set()
