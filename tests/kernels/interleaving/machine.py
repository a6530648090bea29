"""Runs the programs of a Triton launch side by side in the interpreter, on a weak memory, in a seeded random order.

    with interleaved(seed) as machine:
        decode_attention(...)   # the kernels' own wrappers, unchanged

Each program is a thread, but only one of them runs: at every memory operation it may hand over to another one.  All
that is random comes from the seed, so a failure repeats.  Every address is checked against the tensor that it was
computed from, and every access against those of the other programs; what is masked off is not touched.

What it cannot see: how the compiler divides a program among threads, or moves loads and stores.  The checks of the
machine code in the ahead-of-time tests are for that.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

from tests.kernels.interleaving.address_space import AddressSpace
from tests.kernels.interleaving.launch import Launch


class Machine:
    """What the launches of one `interleaved` block share.

    Attributes:
        kernels: the names of the kernels launched.
        schedules: for each launch, the program of each memory operation.
    """

    def __init__(self, seed: int, *, find_races: bool) -> None:
        self.kernels: set[str] = set()
        self.schedules: list[list[int]] = []
        self._rng, self._find_races = np.random.default_rng(seed), find_races
        self._launch: Launch | None = None

    @property
    def launch(self) -> Launch:
        """The launch under way."""
        if self._launch is None:
            raise RuntimeError("no kernel is running")
        return self._launch

    def run(self, executor: GridExecutor, args: Sequence[Any], options: Mapping[str, Any]) -> None:
        """In the place of GridExecutor.__call__: binds the arguments and runs the launch."""
        kernel, space, builder = executor.fn, AddressSpace(), interpreter.interpreter_builder
        named = {name: value for name, value in options.items() if name in executor.arg_names}
        bound = inspect.getcallargs(kernel, *args, **named)
        patched = interpreter._patch_lang(kernel)
        try:
            arguments = {
                name: value if name in executor.constexprs else _convert(space, name, value)
                for name, value in bound.items()
            }
            grid = executor.grid(arguments) if callable(executor.grid) else executor.grid
            x, y, z = (*grid, 1, 1)[:3]
            self.kernels.add(kernel.__name__)
            if x * y * z:
                builder.set_grid_dim(x, y, z)
                self._launch = Launch((x, y, z), space, self._rng, find_races=self._find_races)
                self.schedules.append(self._launch.schedule)
                self._launch.run(lambda: kernel(**arguments), lambda place: builder.set_grid_idx(*place))
        except Exception as error:
            # The interpreter wraps what a function of the kernel raises once for each call.
            while isinstance(error, InterpreterError) and isinstance(error.__cause__, Exception):
                error = error.__cause__
            error.add_note(f"in kernel {kernel.__name__}")
            raise error from None
        finally:
            self._launch = None
            patched.restore()


def _convert(space: AddressSpace, name: str, value: Any) -> Any:
    """The argument as the interpreter takes it, every tensor in it at an address of the space."""
    with pytest.MonkeyPatch.context() as patch:
        convert = interpreter._implicit_cvt

        def at_our_address(part: Any) -> Any:
            converted = convert(part)
            if hasattr(part, "data_ptr"):
                converted.handle.data = np.array([space.place(name, part)], np.uint64)
            return converted

        # It calls itself, by this name, for what tuples and descriptors hold.
        patch.setattr(interpreter, "_implicit_cvt", at_our_address)
        return at_our_address(value)


def _mask(mask: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Booleans, which the interpreter's int1 need not be."""
    switches = mask.data if isinstance(mask, TensorHandle) else mask
    return np.broadcast_to(switches, shape).astype(bool)


def _hooks(machine: Machine) -> dict[str, Callable[..., Any]]:
    """Methods for the interpreter's builder by which all memory operations go through the machine."""
    memory_semantic, scopes = interpreter._ir.MEM_SEMANTIC, interpreter._ir.MEM_SYNC_SCOPE
    rmw, cas = InterpreterBuilder.create_atomic_rmw, InterpreterBuilder.create_atomic_cas

    def load(builder, pointers, mask, other, cache_modifier, eviction_policy, is_volatile):
        element = pointers.get_element_ty()
        dtype, shape = interpreter._get_np_dtype(element), pointers.data.shape
        values = np.zeros(shape, dtype) if other is None else np.broadcast_to(other.data, shape).astype(dtype)
        on = _mask(mask, shape)
        fresh = cache_modifier in (interpreter._ir.CACHE_MODIFIER.CG, interpreter._ir.CACHE_MODIFIER.CV)
        values[on] = machine.launch.load(pointers.data[on], dtype, fresh=fresh or bool(is_volatile))
        return TensorHandle(values, element)

    def store(builder, pointers, value, mask, cache_modifier, eviction_policy):
        on = _mask(mask, pointers.data.shape)
        dtype = interpreter._get_np_dtype(pointers.get_element_ty())
        machine.launch.store(pointers.data[on], np.broadcast_to(value.data, on.shape)[on].astype(dtype, copy=False))

    def order(sem, scope) -> dict[str, bool]:
        wide = scope != scopes.CTA
        both = sem == memory_semantic.ACQUIRE_RELEASE
        return {
            "release": wide and (both or sem == memory_semantic.RELEASE),
            "acquire": wide and (both or sem == memory_semantic.ACQUIRE),
        }

    def atomic_rmw(builder, operation, pointers, value, mask, sem, scope):
        on = _mask(mask, pointers.data.shape)

        def act(real: np.ndarray) -> np.ndarray:
            moved = pointers.data.copy()
            moved[on] = real
            handle = TensorHandle(moved, pointers.dtype)
            return rmw(builder, operation, handle, value, TensorHandle(on, mask.dtype), sem, scope).data

        size = interpreter._get_np_dtype(pointers.get_element_ty()).itemsize
        return TensorHandle(
            machine.launch.atomic(pointers.data[on], size, act, **order(sem, scope)), value.dtype.scalar
        )

    def atomic_cas(builder, pointers, compared, value, sem, scope):
        def act(real: np.ndarray) -> np.ndarray:
            handle = TensorHandle(real.reshape(pointers.data.shape), pointers.dtype)
            return cas(builder, handle, compared, value, sem, scope).data

        size = interpreter._get_np_dtype(pointers.get_element_ty()).itemsize
        everything = pointers.data.reshape(-1)
        return TensorHandle(machine.launch.atomic(everything, size, act, **order(sem, scope)), compared.dtype.scalar)

    def barrier(builder):
        machine.launch.barrier()

    return {
        "create_masked_load": load,
        "create_masked_store": store,
        "create_atomic_rmw": atomic_rmw,
        "create_atomic_cas": atomic_cas,
        "create_barrier": barrier,
    }


@contextmanager
def interleaved(seed: int, *, find_races: bool = True) -> Iterator[Machine]:
    """Launches in the block run on a machine of that seed.

    Raises, at the launch:
        AddressError: a program left its tensor.
        DataRaceError: with `find_races`, an access is not ordered behind another program's.
    """
    machine = Machine(seed, find_races=find_races)
    with pytest.MonkeyPatch.context() as patch:
        for name, hook in _hooks(machine).items():
            patch.setattr(InterpreterBuilder, name, hook)
        patch.setattr(GridExecutor, "__call__", lambda executor, *args, **kwargs: machine.run(executor, args, kwargs))
        yield machine
