"""The pickle language read as data: containers, numbers and text, and records of everything else.

Nothing that a file names is imported or called, whatever the file says.  Knows nothing of tensors: its caller
says what the few names it knows stand for.
"""

import pickletools
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

MAX_BYTES = 8 << 20
"""The longest pickle that is read.  A checkpoint's, without its tensors, has well under one MiB."""

_MAX_LINE = 64 << 10


class PickleError(ValueError):
    """The bytes are not a pickle, or one that holds more than data."""


@dataclass(frozen=True)
class Global:
    """A name in a module, as a pickle gives it; what it stands for elsewhere is not looked up."""

    module: str
    name: str


@dataclass(eq=False)
class Record:
    """What remains of an object whose class is not known here: its parts, and no behaviour.

    Attributes:
        callee: what the pickle would have called to make it, most often its class.
        arguments: what it would have called that with.
        attributes: what it would have set on the object.
        items: what it would have put into it; pairs of key and value where it looks like a mapping.
    """

    callee: Any
    arguments: tuple[Any, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)
    items: list[Any] = field(default_factory=list)


Constructor = Callable[[tuple[Any, ...]], Any]
"""Makes a value from the arguments in a file; it has to check them, and raises PickleError."""


def read_pickle(stream: BinaryIO, constructors: Mapping[Global, Constructor], persistent: Callable[[Any], Any]) -> Any:
    """Reads one pickle, of any protocol, and leaves the stream behind it.

    The language is a stack machine's (documented in Python's `pickletools`, which splits it into operations
    here).  Each of its operations that would call something makes a `Record` instead, unless a constructor is
    known for the name.  The buffers of protocol 5 and the extension registry are refused.

    Args:
        stream: at the pickle's beginning.
        constructors: values for the names that the caller knows.
        persistent: value of a persistent id; raises PickleError for one it does not know.

    Raises:
        PickleError: see there.  The memory used is bounded by MAX_BYTES, not by what the file asks for.
    """
    machine = _Machine(constructors, persistent)
    try:
        for operation, argument, _ in pickletools.genops(_Bounded(stream)):  # type: ignore[arg-type]
            machine.run(operation.name, argument)
        return machine.result()
    except PickleError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise PickleError(f"not a pickle, or a damaged one: {type(error).__name__}: {error}") from error


class _Bounded:
    """The part of a stream that one pickle may take up.  A length in it is believed only up to that."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._left = MAX_BYTES

    def read(self, count: int) -> bytes:
        return self._taken(self._stream.read, count)

    def readline(self) -> bytes:
        return self._taken(self._stream.readline, min(_MAX_LINE, self._left))

    def _taken(self, read: Callable[[int], bytes], count: int) -> bytes:
        if count > self._left:
            raise PickleError(f"the pickle in it is longer than {MAX_BYTES >> 20} MiB")
        taken = read(count)
        self._left -= len(taken)
        return taken


_LITERALS = frozenset(
    {
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    }
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_SHORT_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_IGNORED = frozenset({"PROTO", "FRAME", "STOP"})


class _Machine:
    """The stack, the marks in it and the memo, as the pickle language defines them."""

    def __init__(self, constructors: Mapping[Global, Constructor], persistent: Callable[[Any], Any]) -> None:
        self._constructors = constructors
        self._persistent = persistent
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def result(self) -> Any:
        return self._stack.pop()

    def run(self, name: str, argument: Any) -> None:
        """One operation, by its name in pickletools, with its operand."""
        if name in _LITERALS:
            self._stack.append(argument)
        elif name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            self._stack.append(_EMPTY[name]())
        elif name in _SHORT_TUPLES:
            self._stack.append(tuple(self._popped(_SHORT_TUPLES[name])))
        elif name not in _IGNORED:
            self._structure(name, argument)

    def _structure(self, name: str, argument: Any) -> None:
        stack, pop, push = self._stack, self._stack.pop, self._stack.append
        match name:
            case "MARK":
                self._marks.append(len(stack))
            case "POP":
                if self._marks and self._marks[-1] == len(stack):
                    self._marks.pop()
                else:
                    pop()
            case "POP_MARK":
                self._popped_to_mark()
            case "DUP":
                push(stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                push(self._memo[argument])
            case "LIST":
                push(self._popped_to_mark())
            case "TUPLE":
                push(tuple(self._popped_to_mark()))
            case "DICT":
                push(dict(_pairs(self._popped_to_mark())))
            case "FROZENSET":
                push(frozenset(map(_key, self._popped_to_mark())))
            case "APPEND":
                values = self._popped(1)
                _extend(stack[-1], values)
            case "APPENDS" | "ADDITEMS":
                values = self._popped_to_mark()
                _extend(stack[-1], values)
            case "SETITEM":
                values = self._popped(2)
                _update(stack[-1], values)
            case "SETITEMS":
                values = self._popped_to_mark()
                _update(stack[-1], values)
            case _:
                self._object(name, argument)

    def _object(self, name: str, argument: Any) -> None:
        """The operations that make objects; here none of them calls what the file names."""
        pop, push = self._stack.pop, self._stack.append
        match name:
            case "GLOBAL":
                push(Global(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                push(Global(*self._popped(2)))
            case "REDUCE" | "NEWOBJ":
                callee, arguments = self._popped(2)
                push(self._made(callee, arguments))
            case "NEWOBJ_EX":
                callee, arguments, named = self._popped(3)
                push(Record(callee, (*arguments, named)))
            case "INST":
                push(self._made(Global(*argument.split(" ", 1)), tuple(self._popped_to_mark())))
            case "OBJ":
                callee, *arguments = self._popped_to_mark()
                push(self._made(callee, tuple(arguments)))
            case "BUILD":
                state = pop()
                if isinstance(self._stack[-1], Record):
                    _set_attributes(self._stack[-1], state)
            case "PERSID":
                push(self._persistent(argument))
            case "BINPERSID":
                push(self._persistent(pop()))
            case _:
                raise PickleError(f"the pickle in it uses {name}, which plain data never needs")

    def _made(self, callee: Any, arguments: Any) -> Any:
        if not isinstance(arguments, tuple):
            raise PickleError(f"damaged: arguments are a {type(arguments).__name__}")
        constructor = self._constructors.get(callee) if isinstance(callee, Global) else None
        return Record(callee, arguments) if constructor is None else constructor(arguments)

    def _popped(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise PickleError("damaged: its stack is empty")
        values = self._stack[-count:]
        del self._stack[-count:]
        return values

    def _popped_to_mark(self) -> list[Any]:
        mark = self._marks.pop()
        values = self._stack[mark:]
        del self._stack[mark:]
        return values


def _key(value: Any) -> Hashable:
    """A key or a set's element.  Only flat ones: the hash of nested tuples can take forever."""
    for part in value if isinstance(value, tuple) else (value,):
        if not isinstance(part, str | bytes | int | float | Record | Global | None):
            raise PickleError(
                f"it has a {type(value).__name__} as a key; expected plain keys, like the names of tensors"
            )
    return value  # type: ignore[no-any-return]


def _pairs(values: list[Any]) -> list[tuple[Hashable, Any]]:
    if len(values) % 2:
        raise PickleError("damaged: a key without a value")
    return [(_key(key), value) for key, value in zip(values[::2], values[1::2], strict=True)]


def _extend(target: Any, values: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(values)
    elif isinstance(target, set):
        target.update(map(_key, values))
    elif isinstance(target, Record):
        target.items.extend(values)
    else:
        raise PickleError(f"damaged: it appends to a {type(target).__name__}")


def _update(target: Any, values: list[Any]) -> None:
    if isinstance(target, dict):
        target.update(_pairs(values))
    elif isinstance(target, Record):
        target.items.extend(_pairs(values))
    else:
        raise PickleError(f"damaged: it sets items of a {type(target).__name__}")


def _set_attributes(record: Record, state: Any) -> None:
    """A state is a mapping of attributes, a pair of such mappings (the second for slots), or the class's own."""
    parts = state if isinstance(state, tuple) and len(state) == 2 else (state,)
    for part in parts:
        if isinstance(part, dict):
            record.attributes.update({key: value for key, value in part.items() if isinstance(key, str)})
