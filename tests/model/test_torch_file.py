"""torch.save's files: both formats read as torch.load reads them, lazily; what is damaged is one line."""

import argparse
import contextlib
import io
import os
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from persimmon.model.errors import CheckpointError
from persimmon.model.pickle_reader import Record
from persimmon.model.stored import Region, StoredTensor
from persimmon.model.torch_file import read_torch_file

FORMATS = pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])


def saved(contents: Any, path: Path, new_format: bool = True) -> Path:
    torch.save(contents, path, _use_new_zipfile_serialization=new_format)
    return path


def read(path: Path) -> Any:
    return read_torch_file(Region.of_file(path))


def loaded(tensor: StoredTensor) -> torch.Tensor:
    return tensor.rows(0, tensor.shape[0])


@FORMATS
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]
)
def test_a_tensor_of_every_type_is_what_was_saved(new_format, dtype, tmp_path):
    tensor = torch.randint(0, 2, (7, 3)).to(dtype)
    stored = read(saved({"a": tensor}, tmp_path / "file", new_format))["a"]
    assert stored.dtype == dtype
    assert torch.equal(loaded(stored), tensor)
    assert torch.equal(stored.rows(2, 5), tensor[2:5])


@FORMATS
def test_views_share_a_storage(new_format, tmp_path):
    whole = torch.arange(60.0).reshape(10, 6)
    views = {"rows": whole[3:7], "columns": whole[:, 2:4], "transposed": whole.T, "flat": whole.flatten()[5:]}
    read_views = read(saved(views, tmp_path / "file", new_format))
    for name, view in views.items():
        assert torch.equal(loaded(read_views[name]), view), name
        assert torch.equal(read_views[name].rows(1, 3), view[1:3]), name


@FORMATS
def test_parameters_and_other_objects_are_read_beside_each_other(new_format, tmp_path):
    parameter = torch.nn.Parameter(torch.randn(4, 2))
    contents: dict[str, Any] = {
        "args": argparse.Namespace(num_layers=3, params_dtype=torch.bfloat16),
        "model": torch.nn.Linear(2, 4).state_dict() | {"parameter": parameter},
        "rng_state": [{"random": (3, tuple(range(625)), None), "torch": torch.get_rng_state()}],
        "size": torch.Size([2, 3]),
    }
    read_contents = read(saved(contents, tmp_path / "file", new_format))
    assert torch.equal(loaded(read_contents["model"]["parameter"]), parameter)
    assert torch.equal(loaded(read_contents["model"]["bias"]), contents["model"]["bias"])
    assert isinstance(read_contents["args"], Record)
    assert read_contents["args"].attributes["num_layers"] == 3
    assert read_contents["rng_state"][0]["random"] == (3, tuple(range(625)), None)
    assert read_contents["size"] == (2, 3)


@FORMATS
def test_a_part_of_another_file_is_read_in_place(new_format, tmp_path):
    tensor = torch.randn(5, 4)
    content = saved({"a": tensor}, tmp_path / "file", new_format).read_bytes()
    (tmp_path / "archive").write_bytes(b"x" * 777 + content + b"y" * 99)
    stored = read_torch_file(Region(path=tmp_path / "archive", offset=777, length=len(content), member="member"))["a"]
    assert torch.equal(loaded(stored), tensor)


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16])
def test_types_without_a_storage_class_are_read(new_format, dtype, tmp_path):
    numbers = torch.arange(24, dtype=torch.uint8).view(dtype).reshape(4, -1)
    stored = read(saved({"a": numbers[1:]}, tmp_path / "file", new_format))["a"]
    assert (stored.dtype, stored.shape) == (dtype, tuple(numbers[1:].shape))
    assert torch.equal(loaded(stored).view(torch.uint8), numbers[1:].view(torch.uint8))


@FORMATS
def test_a_mapped_tensor_is_the_whole_tensor_and_leaves_the_file_alone(new_format, tmp_path):
    tensors = {
        "a": torch.randn(5, 4),
        "part": torch.randn(6, 8)[1:4, ::2],
        "scalar": torch.tensor(2.0),
        "none": torch.ones(0, 3),
    }
    path = saved(tensors, tmp_path / "file", new_format)
    before = path.read_bytes()
    for name, stored in read(path).items():
        mapped = stored.mapped()
        assert torch.equal(mapped, tensors[name])
        mapped.zero_()
    assert path.read_bytes() == before


@FORMATS
def test_only_the_rows_that_are_asked_for_are_read(new_format, tmp_path):
    path = saved({"a": torch.zeros(1000, 1000)}, tmp_path / "file", new_format)
    before = os.stat(path).st_size
    with path.open("r+b") as file:  # everything after the first rows, but for the zip's directory, could be gone
        stored = read(path)["a"]
        file.truncate(before // 2)
    assert torch.equal(stored.rows(0, 10), torch.zeros(10, 1000))
    with pytest.raises(CheckpointError, match="file"):
        stored.rows(900, 1000)


@FORMATS
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.9, 0.999])
def test_a_truncated_file_is_one_line(new_format, share, tmp_path):
    path = saved({"a": torch.randn(50, 10), "b": torch.randn(20)}, tmp_path / "weights.bin", new_format)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(CheckpointError, match=r"weights\.bin") as raised:
        read(path)
    assert "\n" not in str(raised.value)


@FORMATS
def test_damaged_bytes_are_data_or_one_line(new_format, tmp_path):
    path = saved({"a": torch.randn(3, 2), "b": argparse.Namespace(c=1)}, tmp_path / "file", new_format)
    content = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for position in torch.randperm(len(content), generator=generator)[:300].tolist():
        damaged = bytearray(content)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        with contextlib.suppress(CheckpointError):
            read(path)


def zipped(
    path: Path, content: bytes, entries: Mapping[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED
) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", content)
        for name, entry in (entries or {}).items():
            archive.writestr(f"archive/{name}", entry)
    return path


class Storage:
    """Pickles as a reference to a storage of torch."""

    def __init__(self, numel: int, name: str = "FloatStorage") -> None:
        self.identity = ("storage", getattr(torch, name), "0", "cpu", numel)


class Call:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduction = function, arguments

    def __reduce__(self) -> Any:
        return self.reduction


def pickled(contents: Any) -> bytes:
    buffer = io.BytesIO()

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return value.identity if isinstance(value, Storage) else None

    Pickler(buffer, 2).dump(contents)
    return buffer.getvalue()


def rebuilt(storage: Any, offset: Any, size: Any, stride: Any) -> Call:
    return Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, {})


@pytest.mark.parametrize(
    "tensor",
    [
        rebuilt(Storage(4), 0, (5,), (1,)),
        rebuilt(Storage(4), 3, (2,), (1,)),
        rebuilt(Storage(4), -1, (2,), (1,)),
        rebuilt(Storage(4), 0, (2,), (-1,)),
        rebuilt(Storage(4), 0, (2, 2), (1,)),
        rebuilt(Storage(4), 0, (1 << 62, 1 << 62), (1, 1)),
        rebuilt(Storage(4), 0, ("2",), (1,)),
        rebuilt(Storage(1 << 61), 0, (2,), (1,)),
        rebuilt(Storage(-4), 0, (2,), (1,)),
        rebuilt(None, 0, (2,), (1,)),
        Call(torch._utils._rebuild_tensor_v2),
    ],
)
def test_a_tensor_that_reaches_beyond_its_storage_is_refused(tensor, tmp_path):
    path = zipped(tmp_path / "file", pickled({"a": tensor}), {"data/0": b"\0" * 16})
    with pytest.raises(CheckpointError, match="file"):
        read(path)


def test_a_file_that_expands_is_refused(tmp_path):
    path = zipped(tmp_path / "file", pickled({"a": "x" * 10_000_000}), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed"):
        read(path)


def test_a_big_endian_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="big-endian"):
        read(zipped(tmp_path / "file", pickled({}), {"byteorder": b"big"}))


def test_a_zip_of_something_else_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "file", "w") as archive:
        archive.writestr("a.txt", "b")
    with pytest.raises(CheckpointError, match=r"torch\.save"):
        read(tmp_path / "file")


def test_a_zip_of_a_later_version_is_refused(tmp_path):
    path = saved({"a": torch.zeros(2)}, tmp_path / "file.pt")
    content = bytearray(path.read_bytes())
    directory_entry = content.index(b"PK\x01\x02")
    content[directory_entry + 6] = 99  # the version that is needed to extract it
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"zip file version 9\.9"):
        read(path)


def test_a_git_lfs_pointer_says_what_to_do(tmp_path):
    (tmp_path / "file").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        read(tmp_path / "file")


@FORMATS
def test_a_call_in_a_file_is_not_made(new_format, tmp_path):
    target = tmp_path / "executed"
    path = saved({"a": torch.zeros(2), "b": Call(os.system, f"touch {target}")}, tmp_path / "file", new_format)
    contents = read(path)
    assert isinstance(contents["b"], Record)
    assert torch.equal(loaded(contents["a"]), torch.zeros(2))
    assert not target.exists()


def test_a_storage_that_is_shorter_than_it_says_is_refused(tmp_path):
    path = saved({"a": torch.zeros(8)}, tmp_path / "file", new_format=False)
    content = path.read_bytes()
    path.write_bytes(content[:-40] + struct.pack("<q", 7) + content[-32:])
    with pytest.raises(CheckpointError, match="does not have the stated length"):
        read(path)
