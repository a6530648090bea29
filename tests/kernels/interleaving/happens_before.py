"""Finds data races of a launch: two programs at one element, one of them storing, and nothing that orders them.

Knows nothing of Triton, schedules or values.

Vector clocks after FastTrack (Flanagan, Freund: FastTrack: Efficient and Precise Dynamic Race Detection, 2009), with
two differences of a GPU's programs: a release publishes what the program knew at its last barrier, because only a
barrier orders one thread's release behind another thread's stores; and a program that loads or stores again what it has
stored since its last barrier races with itself, because the compiler may give the element to another thread.

What is found depends little on the schedule: an unordered pair is seen whichever of the two comes first.  Of the
programs that read an element only the last is remembered, so a store that races only with an earlier reader can be
missed in one schedule and found in the next.
"""

import numpy as np

from tests.kernels.interleaving.weak_memory import Elements, Storage


class DataRaceError(Exception):
    """Two accesses to one element of which one is a store, and no barrier, release and acquire between them."""


class _Accesses:
    """The last accesses to each byte of a storage: the program that made it, counted from 1, and its clock then."""

    def __init__(self, storage: Storage) -> None:
        size = len(storage.data)
        self.writer, self.written = np.zeros(size, np.int32), np.zeros(size, np.int32)
        self.reader, self.read = np.zeros(size, np.int32), np.zeros(size, np.int32)
        self.atomic = np.zeros(size, np.int32)


class HappensBefore:
    """The order that barriers and atomics give to the accesses of one launch's programs, numbered from 0."""

    def __init__(self, num_programs: int) -> None:
        # A row for each program: how far it knows each other program's stores, and its own clock.
        self._known = np.eye(num_programs, dtype=np.int32)
        self._covered = np.zeros((num_programs, num_programs), np.int32)
        self._released: dict[tuple[Storage, int], np.ndarray] = {}
        self._accesses: dict[Storage, _Accesses] = {}

    def barrier(self, program: int) -> None:
        """Orders what the program's threads have done before what they do next."""
        self._covered[program] = self._known[program]
        self._known[program, program] += 1

    def load(self, program: int, elements: Elements) -> None:
        """Raises DataRaceError where a store is not ordered before the load."""
        accesses, offsets = self._of(elements), elements.offsets
        self._check(program, accesses.writer, accesses.written, elements, "loads what", "stored")
        self._check_atomics(program, accesses, elements, "loads")
        accesses.reader[offsets] = program + 1
        accesses.read[offsets] = self._known[program, program]

    def store(self, program: int, elements: Elements) -> None:
        """Raises DataRaceError where an access is not ordered before the store."""
        accesses, offsets = self._of(elements), elements.offsets
        self._check(program, accesses.writer, accesses.written, elements, "stores where", "stored")
        # What a program stores where it has loaded depends on what it loaded, so every thread is past its load.
        self._check(program, accesses.reader, accesses.read, elements, "stores where", "loaded", own=False)
        self._check_atomics(program, accesses, elements, "stores")
        accesses.writer[offsets] = program + 1
        accesses.written[offsets] = self._known[program, program]

    def atomic(self, program: int, elements: Elements, *, release: bool, acquire: bool) -> None:
        """Orders what is released here before what another program does after it has acquired here.

        Raises:
            DataRaceError: a plain store to the element is not ordered before it.
        """
        accesses = self._of(elements)
        self._check(program, accesses.writer, accesses.written, elements, "changes atomically what", "stored")
        accesses.atomic[elements.offsets] = (program + 1) if acquire else -1
        for offset in elements.offsets.tolist():
            place = (elements.storage, offset)
            before = self._released.get(place, np.zeros_like(self._covered[program]))
            if release:
                self._released[place] = np.maximum(before, self._covered[program])
            if acquire:
                own = self._known[program, program]
                np.maximum(self._known[program], before, out=self._known[program])
                self._known[program, program] = own

    def _of(self, elements: Elements) -> _Accesses:
        if elements.storage not in self._accesses:
            self._accesses[elements.storage] = _Accesses(elements.storage)
        return self._accesses[elements.storage]

    def _check(
        self,
        program: int,
        by: np.ndarray,
        when: np.ndarray,
        elements: Elements,
        does: str,
        did: str,
        *,
        own: bool = True,
    ) -> None:
        others = by[elements.offsets]
        if not others.any():
            return
        ordered = self._known[program].copy()
        if own:
            ordered[program] = self._covered[program, program]
        unordered = (others > 0) & (ordered[others - 1] < when[elements.offsets])
        if unordered.any():
            other = int(others[unordered][0]) - 1
            whose = "it" if other == program else f"program {other}"
            needs = "a barrier" if other == program else "a barrier, a release by the one and an acquire by the other"
            raise DataRaceError(
                f"program {program} {does} {whose} has {did}, {int(unordered.sum())} elements, without {needs} between"
            )

    def _check_atomics(self, program: int, accesses: _Accesses, elements: Elements, does: str) -> None:
        by = accesses.atomic[elements.offsets]
        if ((by != 0) & (by != program + 1)).any():
            raise DataRaceError(
                f"program {program} {does} an element that other programs change atomically: only the program whose "
                "acquire came last may do so"
            )
