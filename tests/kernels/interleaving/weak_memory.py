"""Global memory of one kernel launch, as weak as a GPU's: what each program may see of the others' stores.

Knows nothing of Triton, schedules or bounds.

    store    waits in its program's buffer; single elements become visible at any time, in any order
    barrier  covers the program's stores so far: only these are published by its next release
    atomic   acts on the L2 cache; a release first makes what is covered visible, an acquire empties the L1 cache
    load     finds its own program's stores; of others' it may find any version since the program's last acquire (a line
             that stayed in L1), or, fresh (`.cg`), what is visible now
    end      a kernel boundary makes everything visible

A program is many threads, and which of them stores an element is the compiler's choice.  So a release by one thread
covers another's store only through a barrier, and a program's own store is certain to be found by its own loads only
behind one.  The names are PTX's (memory consistency model, "Release and Acquire Patterns", "Causality Order").
"""

from dataclasses import dataclass, field

import numpy as np
import torch


class Storage:
    """The bytes behind one or more tensors, and which of them this launch has stored.

    Attributes:
        data: uint8, the memory itself.
        element_bytes: uint8, for each byte the size of the element that the launch has stored there; 0 for none.
    """

    def __init__(self, data: np.ndarray) -> None:
        self.data = data
        self.element_bytes = np.zeros(len(data), np.uint8)
        self._views: dict[int, np.ndarray] = {}

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Storage":
        """The storage of a tensor on the CPU, without a copy."""
        return cls(torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy())

    def elements(self, size: int) -> np.ndarray:
        """The memory as unsigned numbers of that many bytes."""
        if size not in self._views:
            self._views[size] = self.data[: len(self.data) // size * size].view(f"u{size}")
        return self._views[size]


@dataclass(frozen=True, slots=True)
class Elements:
    """What one operation touches: elements of `size` bytes of a storage.

    Attributes:
        storage: where they are.
        offsets: [n] int64, in bytes, each a multiple of `size`.
        size: 1, 2, 4 or 8.
    """

    storage: Storage
    offsets: np.ndarray
    size: int

    @property
    def values(self) -> np.ndarray:
        """[n] unsigned, a copy of what is visible now."""
        return self.storage.elements(self.size)[self.offsets // self.size]

    def __getitem__(self, which: np.ndarray) -> "Elements":
        return Elements(self.storage, self.offsets[which], self.size)

    def find(self, other: "Elements") -> tuple[np.ndarray, np.ndarray]:
        """Where each of the other's elements is among these, sorted; and whether it is there at all."""
        if other.storage is not self.storage or not len(self.offsets):
            return np.zeros(len(other.offsets), np.int64), np.zeros(len(other.offsets), bool)
        place = np.minimum(np.searchsorted(self.offsets, other.offsets), len(self.offsets) - 1)
        return place, self.offsets[place] == other.offsets


@dataclass(slots=True, eq=False)
class _Stored:
    """Elements, sorted, that a program has stored; `waiting` are those that no other program can see."""

    elements: Elements
    values: np.ndarray
    waiting: np.ndarray
    covered: bool = False


@dataclass(slots=True, eq=False)
class Agent:
    """One program's side of the memory.

    Attributes:
        acquired: how many changes of memory had happened when its L1 cache was last emptied.  Zero at first: lines that
            earlier programs of the launch left in L1 may be as old as the launch.
        stored: its stores that are not all visible yet, oldest first.
    """

    acquired: int = 0
    stored: list[_Stored] = field(default_factory=list)


@dataclass(frozen=True, slots=True, eq=False)
class _Change:
    """Elements, sorted, that became visible, and the values that they had before."""

    agent: Agent
    elements: Elements
    old: np.ndarray


class WeakMemory:
    """The memory of one launch; where a GPU leaves the outcome open, the generator decides."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._changes: list[_Change] = []
        self._busy: list[Agent] = []
        # By launch, stores become visible soon, at times, or only when they must; together or one by one.
        self._drain_probability = float(rng.choice([0.0, 0.05, 0.5]))
        self._drain_share = float(rng.choice([0.1, 0.5, 1.0]))

    def load(self, agent: Agent, elements: Elements, *, fresh: bool) -> np.ndarray:
        """[n] unsigned: a value for each element that the program may find there."""
        values = elements.values
        sizes = elements.storage.element_bytes[elements.offsets]
        (touched,) = sizes.nonzero()
        if len(touched):
            some = elements[touched]
            _check_sizes(some, sizes[touched])
            found = values[touched]
            if not fresh:
                self._read_stale(agent, some, found)
            self._read_own(agent, some, found)
            values[touched] = found
        return values

    def store(self, agent: Agent, elements: Elements, values: np.ndarray) -> None:
        """Values [n] unsigned to n elements; of two for the same element the last one counts."""
        if not len(values):
            return
        offsets, last = np.unique(elements.offsets[::-1], return_index=True)
        values = values[::-1][last]
        elements = Elements(elements.storage, offsets, elements.size)
        self._mark(elements)
        # Two stores of a program to the same place become visible in its order.
        self._publish_own(agent, elements)
        agent.stored.append(_Stored(elements, values, np.ones(len(offsets), bool)))
        if agent not in self._busy:
            self._busy.append(agent)

    def barrier(self, agent: Agent) -> None:
        """What the program's threads stored so far is ordered before what any of them does next."""
        for stored in agent.stored:
            stored.covered = True

    def before_atomic(self, agent: Agent, elements: Elements, *, release: bool) -> None:
        """Comes before an operation on the visible elements; `release` is one for the GPU or more."""
        for stored in list(agent.stored):
            if release and stored.covered:
                self._publish(agent, stored, stored.waiting.copy())
        self._mark(elements)
        self._publish_own(agent, elements)
        elements = Elements(elements.storage, np.unique(elements.offsets), elements.size)
        self._changes.append(_Change(agent, elements, elements.values))

    def after_atomic(self, agent: Agent, *, acquire: bool) -> None:
        """Comes after the operation; `acquire` is one for the GPU or more."""
        if acquire:
            agent.acquired = len(self._changes)

    def drain(self) -> None:
        """Makes some stores of a program visible, at times."""
        if self._busy and self._rng.random() < self._drain_probability:
            agent = self._busy[self._rng.integers(len(self._busy))]
            stored = agent.stored[self._rng.integers(len(agent.stored))]
            self._publish(agent, stored, stored.waiting & (self._rng.random(len(stored.waiting)) < self._drain_share))

    def finish(self) -> None:
        """The end of the launch, at which all stores become visible."""
        while self._busy:
            agent = self._busy[self._rng.integers(len(self._busy))]
            self._publish(agent, agent.stored[0], agent.stored[0].waiting.copy())

    def _read_stale(self, agent: Agent, elements: Elements, values: np.ndarray) -> None:
        """Takes values back to versions that may still be in L1: as old as possible, or any."""
        undecided = np.ones(len(values), bool)
        oldest = self._rng.random() < 0.5
        for change in reversed(self._changes[agent.acquired :]):
            place, hit = change.elements.find(elements)
            hit &= undecided
            if not hit.any():
                continue
            if change.agent is not agent:
                back = hit if oldest else hit & (self._rng.random(len(hit)) < 0.5)
                values[back] = change.old[place[back]]
                hit &= ~back
            undecided &= ~hit

    def _read_own(self, agent: Agent, elements: Elements, values: np.ndarray) -> None:
        for stored in agent.stored:
            place, hit = stored.elements.find(elements)
            hit &= stored.waiting[place]
            if not stored.covered:
                # One of the program's threads stored it; whether that is the one that loads is not known here.
                hit &= self._rng.random(len(hit)) < 0.5
            values[hit] = stored.values[place[hit]]

    def _publish_own(self, agent: Agent, elements: Elements) -> None:
        for stored in list(agent.stored):
            _, again = elements.find(stored.elements)
            self._publish(agent, stored, again & stored.waiting)

    def _publish(self, agent: Agent, stored: _Stored, which: np.ndarray) -> None:
        if which.any():
            elements = stored.elements[which]
            self._changes.append(_Change(agent, elements, elements.values))
            elements.storage.elements(elements.size)[elements.offsets // elements.size] = stored.values[which]
            stored.waiting &= ~which
        if not stored.waiting.any():
            agent.stored.remove(stored)
            if not agent.stored:
                self._busy.remove(agent)

    @staticmethod
    def _mark(elements: Elements) -> None:
        marks = elements.storage.element_bytes
        sizes = marks[elements.offsets]
        _check_sizes(elements[sizes != 0], sizes[sizes != 0])
        for byte in range(elements.size):
            marks[elements.offsets + byte] = elements.size


def _check_sizes(elements: Elements, sizes: np.ndarray) -> None:
    if (sizes != elements.size).any():
        raise ValueError(
            f"a launch stores elements of {sizes[sizes != elements.size][0]} bytes and touches the same memory "
            f"{elements.size} bytes at a time: this memory follows elements of one size only"
        )
