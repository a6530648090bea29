"""The pickle reader: plain data reads as pickle itself reads it, and nothing in a file is ever called or looked up."""

import argparse
import collections
import contextlib
import io
import os
import pickle
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persimmon.model import pickle_reader
from persimmon.model.pickle_reader import Global, PickleError, Record, read_pickle


def no_reference(identity: Any) -> Any:
    raise PickleError(f"unexpected reference {identity}")


def read(content: bytes) -> Any:
    return read_pickle(io.BytesIO(content), {}, no_reference)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
PLAIN = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner) | st.lists(inner)
    ),
    max_leaves=12,
)


@given(PLAIN, st.integers(2, 5))
def test_plain_data_reads_as_pickle_reads_it(data, protocol):
    if protocol == 2:  # bytes are a call of _codecs.encode there
        data = repr(data)
    assert read(pickle.dumps(data, protocol)) == data


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_every_protocol_is_read(protocol):
    data = {"a": [1, -2.5, True, None, 2**70], "b": ("x", ["y"]), "c": {"d": ()}, "shared": ["z"] * 3}
    assert read(pickle.dumps(data, protocol)) == data


def test_sets_are_read():
    assert read(pickle.dumps({"a": {1, 2}, "b": frozenset({"x"})}, 4)) == {"a": {1, 2}, "b": frozenset({"x"})}


def test_the_stream_is_left_behind_the_pickle():
    stream = io.BytesIO(pickle.dumps(1) + pickle.dumps("two") + b"rest")
    assert [read_pickle(stream, {}, no_reference) for _ in range(2)] == [1, "two"]
    assert stream.read() == b"rest"


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_an_object_becomes_a_record_of_its_attributes(protocol):
    record = read(pickle.dumps(argparse.Namespace(num_layers=36, pos_emb="rotary"), protocol))
    assert isinstance(record, Record)
    assert record.attributes == {"num_layers": 36, "pos_emb": "rotary"}


def test_a_record_keeps_what_was_put_into_it():
    record = read(pickle.dumps(collections.OrderedDict(a=1, b=[2])))
    assert record.callee == Global("collections", "OrderedDict")
    assert record.items == [("a", 1), ("b", [2])]


def test_a_known_name_is_made_by_its_constructor_alone():
    content = pickle.dumps(collections.OrderedDict(a=1))
    made = read_pickle(io.BytesIO(content), {Global("collections", "OrderedDict"): lambda _: {}}, no_reference)
    assert made == {"a": 1}


class Malicious:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduction = function, arguments

    def __reduce__(self) -> Any:
        return self.reduction


def hostile(target: str) -> dict[str, bytes]:
    """Pickles that would write a file if any of them were loaded, in every way the language has to call something."""
    command = f"touch {target}"
    text = f"S{command!r}\n".encode()
    short = struct.pack("<B", len(command)) + command.encode()
    return {
        "os.system": pickle.dumps(Malicious(os.system, command)),
        "os.system in a list": pickle.dumps([1, {"x": Malicious(os.system, command)}]),
        "os.system, protocol 0": pickle.dumps(Malicious(os.system, command), 0),
        "eval": pickle.dumps(Malicious(eval, f"open({target!r}, 'w')")),
        "exec": pickle.dumps(Malicious(exec, f"open({target!r}, 'w')")),
        "open": pickle.dumps(Malicious(open, target, "w")),
        "a chain of getattr": b"cbuiltins\ngetattr\n(cos\nenviron\nS'system'\ntR(" + text + b"tR.",
        "INST": b"(" + text + b"ios\nsystem\n.",
        "OBJ": b"(cos\nsystem\n" + text + b"o.",
        "NEWOBJ": b"\x80\x02csubprocess\nPopen\n(" + text + b"t\x81.",
        "NEWOBJ_EX": b"\x80\x04\x8c\x0asubprocess\x8c\x05Popen\x93(" + text + b"t}\x92.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c" + short + b"\x85R.",
        "BUILD with __setstate__": b"(dS'__setstate__'\ncos\nsystem\nsb" + text + b"b.",
        "BUILD on a class": b"\x80\x02ccollections\nOrderedDict\n}S'__init__'\ncos\nsystem\nsb)R" + text + b"b.",
        "BUILD with slots": b"\x80\x02ccollections\nOrderedDict\nN}S'__call__'\ncos\nsystem\ns\x86b(" + text + b"tR.",
        "an extension": b"\x80\x02\x82\x01" + text + b"\x85R.",
    }


@pytest.fixture(scope="module")
def audited():
    """Names of what Python reports as dangerous, while it is asked to."""
    events: list[str] = []
    state = {"watching": False}
    dangerous = {"os.system", "subprocess.Popen", "exec", "compile", "import", "open", "pickle.find_class"}

    def hook(event: str, _: Any) -> None:
        if state["watching"] and event in dangerous:
            events.append(event)

    @contextlib.contextmanager
    def watch():
        events.clear()
        state["watching"] = True
        try:
            yield events
        finally:
            state["watching"] = False

    sys.addaudithook(hook)  # there for good: Python has no way to remove one
    return watch


@pytest.mark.parametrize("kind", hostile("x"))
def test_nothing_in_a_pickle_is_executed(kind, tmp_path, audited):
    target = tmp_path / "executed"
    content = hostile(str(target))[kind]
    with audited() as events, contextlib.suppress(PickleError):
        read(content)
    assert not events
    assert not target.exists()


def test_the_audit_sees_what_pickle_does(tmp_path, audited):
    content = pickle.dumps(Malicious(os.system, "true"))
    with audited() as events:
        pickle.loads(content)
    assert "os.system" in events


def test_the_hostile_pickles_do_harm_where_pickle_loads_them(tmp_path):
    # Else the test above would prove nothing.
    target = tmp_path / "executed"
    for kind in ("os.system", "INST", "OBJ", "STACK_GLOBAL"):
        pickle.loads(hostile(str(target))[kind])
        target.unlink()


def test_a_module_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "a_module_nobody_has.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(str(tmp_path))
    record = read(b"ca_module_nobody_has\nthing\n(tR.")
    assert record.callee == Global("a_module_nobody_has", "thing")
    assert "a_module_nobody_has" not in sys.modules


@pytest.mark.parametrize(
    "content",
    [
        b"\x8e" + struct.pack("<Q", 1 << 60) + b"x.",  # BINBYTES8
        b"\x96" + struct.pack("<Q", 1 << 60) + b"x.",  # BYTEARRAY8
        b"\x8d" + struct.pack("<Q", 1 << 40) + b"x.",  # BINUNICODE8
        b"\x8b" + struct.pack("<i", (1 << 31) - 1) + b"x.",  # LONG4
        b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b".",  # FRAME
        b"Nr" + struct.pack("<I", (1 << 32) - 1) + b"",  # LONG_BINPUT, which must not lead to a large table
        b"I" + b"9" * 100_000 + b"\n.",
    ],
)
def test_a_length_in_a_pickle_allocates_nothing(content):
    with pytest.raises(PickleError):
        read(content)


def test_a_pickle_of_endless_containers_is_refused(monkeypatch):
    monkeypatch.setattr(pickle_reader, "MAX_BYTES", 1000)
    with pytest.raises(PickleError, match="longer than"):
        read(b"}" * 1001 + b".")


def test_nested_tuples_as_a_key_are_refused_before_they_are_hashed():
    # Each level has the one before it twice: 2^60 leaves for the hash to visit.
    content = b"})" + b"2\x86" * 60 + b"Ns."
    with pytest.raises(PickleError, match="key"):
        read(content)


def test_deep_nesting_is_read_without_recursion():
    read(b"]" * 200_000 + b"a" * 199_999 + b".")


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_cut_pickle_is_an_error(cut):
    content = pickle.dumps({"a": [1, 2], "b": ("c", argparse.Namespace(d=4))})
    with pytest.raises(PickleError):
        read(content[:-cut])


@given(st.binary(max_size=200))
def test_any_bytes_are_data_or_an_error(content):
    with contextlib.suppress(PickleError):
        read(content)


OPERATIONS = [bytes([code]) for code in b"().012]}lNRQabdeostu\x81\x85\x86\x87\x88\x8f\x90\x91\x93\x94"]


@given(st.lists(st.sampled_from(OPERATIONS)))
def test_any_operations_are_data_or_an_error(operations):
    with contextlib.suppress(PickleError):
        read(b"".join([b"N(]}", *operations, b"."]))


def test_the_reader_has_no_way_to_import():
    source = Path(pickle_reader.__file__).read_text()
    for word in ("find_class", "__import__", "import_module", "getattr(", "setattr(", "eval(", "exec("):
        assert word not in source
