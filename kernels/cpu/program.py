"""Operations in a row, which one call runs on all threads.  Knows no network: it holds what it is given."""

import ctypes
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from persimmon.kernels.cpu import library, pages

SCRATCH = "scratch"
"""Name of the buffer that operations use within themselves."""


class Program:
    """Operations recorded once, with the buffers between them, to be run on many steps.

    Args:
        functions: the library's, see `library.load`.
        max_tokens: rows of the buffers, and so the most tokens of a step.
    """

    def __init__(self, functions: ctypes.CDLL, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._functions = functions
        self._operations: list[library.Operation] = []
        self._operands: list[Sequence[object]] = []
        self._buffers: dict[str, torch.Tensor] = {}
        self._ready: tuple[ctypes.Array[library.Operation], torch.Tensor, int, int] | None = None
        self._cuts: list[int] = []

    def buffer(self, name: str, width: int) -> torch.Tensor:
        """[max_tokens, width] float32, the same for the same name; only what is written takes memory."""
        if name not in self._buffers:
            self._buffers[name] = pages.empty((self.max_tokens, width), torch.float32)
        return self._buffers[name]

    def append(self, operation: library.Operation, operands: Sequence[object]) -> None:
        """Adds an operation.

        Args:
            operation: to run after the others.
            operands: what it points at, to be kept alive.
        """
        self._operations.append(operation)
        self._operands.append(operands)
        self._ready = None

    def part(self, wanted: Callable[[library.Operation], bool]) -> "Program":
        """Some of the operations, on the same buffers: to measure what each takes."""
        part = Program(self._functions, self.max_tokens)
        part._buffers = self._buffers
        for operation, operands in zip(self._operations, self._operands, strict=True):
            if wanted(operation):
                part.append(operation, operands)
        return part

    def cut(self) -> None:
        """Begins another of `parts` with the operation that comes next."""
        self._cuts.append(len(self._operations))

    def parts(self) -> "list[Program]":
        """The operations between the cuts, as programs on the same buffers: something else happens between them."""
        borders = [0, *self._cuts, len(self._operations)]
        parts = []
        for first, end in pairwise(borders):
            part = Program(self._functions, self.max_tokens)
            part._buffers = self._buffers
            for place in range(first, end):
                part.append(self._operations[place], self._operands[place])
            parts.append(part)
        return parts

    def of_wanted_rows(self, spare: torch.Tensor) -> "Program":
        """The same for steps of which few rows are wanted: after the last attention it computes those alone.

        Of a prompt that is the last token, so nearly all of the last layer's MLP is saved.  Rows keep their bits.

        Args:
            spare: [*] float32, a buffer of which half a step's rows leave a row's width at both ends once the last
                attention has read it.

        Returns:
            A program on the same buffers, for steps with `row_ids`, of at most half of `max_tokens` rows.
        """
        kinds = [operation.kind for operation in self._operations]
        last = len(kinds) - 1 - kinds[::-1].index(library.ATTENTION)
        # What the last attention has made, which is used up first, and the residual stream: nothing else goes on.
        first = self._operations[last + 1]
        attended, residual = spare, spare[-(self.max_tokens // 2) * first.out :]
        taken = {first.input: attended.data_ptr(), first.output: residual.data_ptr()}
        rows = Program(self._functions, self.max_tokens)
        rows._buffers = self._buffers
        for place, (operation, operands) in enumerate(zip(self._operations, self._operands, strict=True)):
            if place == last + 1:
                for (source, to), width in zip(taken.items(), (first.in_, first.out), strict=True):
                    rows.append(library.Operation(kind=library.TAKE_ROWS, in_=width, input=source, output=to), (spare,))
            own = library.Operation.from_buffer_copy(operation)
            if place > last:
                own.of_rows = 1
                own.input, own.output = taken.get(own.input, own.input), taken.get(own.output, own.output)
            rows.append(own, operands)
        return rows

    def run(self, step: library.Step) -> None:
        """Runs all operations, on as many threads as torch uses.

        Args:
            step: of at most `max_tokens` tokens.

        Raises:
            ValueError: the step is too large.
        """
        if step.tokens > self.max_tokens:
            raise ValueError(f"a step of {step.tokens} tokens does not fit into a program for {self.max_tokens}")
        operations, scratch, inputs, threads = self._prepare()
        self._functions.persimmon_run(
            operations, len(operations), ctypes.byref(step), scratch.data_ptr(), inputs, threads
        )

    def _prepare(self) -> "tuple[ctypes.Array[library.Operation], torch.Tensor, int, int]":
        threads = torch.get_num_threads()
        if self._ready is None or self._ready[3] != threads:
            # Of a row more: rounded inputs come with scales, and lists of those that are not zero.
            widest = max(operation.in_ for operation in self._operations)
            inputs = (self.max_tokens + 1) * -(-widest // 32) * 32
            size = self._functions.persimmon_scratch_bytes(inputs, threads)
            operations = (library.Operation * len(self._operations))(*self._operations)
            scratch = self._buffers.get(SCRATCH)
            if scratch is None or len(scratch) != size:
                # torch aligns what it allocates to 64 bytes, as the scratch memory's parts are.
                scratch = self._buffers[SCRATCH] = torch.empty(size, dtype=torch.uint8)
            self._ready = operations, scratch, inputs, threads
        return self._ready


def step_of(
    tokens: int,
    *,
    token_ids: torch.Tensor | None = None,
    sampled: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
    drawn: torch.Tensor | None = None,
) -> library.Step:
    """A step, which points at these tensors and does not keep them; network.h says what they are."""
    step = library.Step(tokens=tokens)
    for name, tensor in {
        "token_ids": token_ids,
        "sampled": sampled,
        "row_ids": rows,
        "hidden": hidden,
        "drawn": drawn,
    }.items():
        if tensor is not None:
            setattr(step, name, tensor.data_ptr())
    if hidden is not None:
        step.rows = len(hidden)
    return step
