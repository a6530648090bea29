"""A quantized conversion whose matrices are rounded to nearest -> one that is calibrated on texts, layer by layer.

What is finished is kept in files, so that a run that was cut off goes on with the next layer and makes the same bits.
"""

import functools
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from persimmon.kernels import QuantizedFormat
from persimmon.model.convert.calibration_texts import read_calibration_texts
from persimmon.model.convert.compressed_layout import stored_numbers, stored_parts
from persimmon.model.convert.sources import TensorSource
from persimmon.model.convert.writer import Conversion
from persimmon.model.errors import CheckpointError
from persimmon.model.leftovers import EMBEDDING
from persimmon.model.quantization.calibration import Calibration
from persimmon.model.quantization.rounding import quantize
from persimmon.model.safetensors_file import read_safetensors_file

_TABLE_ROWS = 4096


@dataclass(frozen=True)
class _Layers:
    """Quantizes a network's layers, each once.

    Attributes:
        original: the conversion before anything was quantized.
        forms: of the matrices, by name.
        texts: rows of the embedding.
    """

    original: Conversion
    forms: Mapping[str, QuantizedFormat]
    texts: list[list[int]]

    def quantize(self, folder: Path, print_line: Callable[[str], None]) -> None:
        """Makes the files of all layers that are not there yet."""
        layers = self.original.config.num_hidden_layers
        done = next((layer for layer in range(layers) if not _file(folder, layer).exists()), layers)
        if done == layers:
            return
        hidden = self._embedded() if done == 0 else _read(_hidden(folder, done))["hidden"]
        calibration = Calibration(self.original.config, [*map(len, self.texts)], hidden)
        print_line(
            f"calibrating on {len(self.texts):,} texts of {sum(map(len, self.texts)):,} tokens, layer {done + 1} of "
            f"{layers} first"
        )
        for layer in range(done, layers):
            prefix = f"model.layers.{layer}."
            forms = {name.removeprefix(prefix): form for name, form in self.forms.items() if name.startswith(prefix)}
            try:
                matrices = calibration.quantize_layer(functools.partial(self._tensor, prefix), forms)
            except CheckpointError as error:
                raise CheckpointError(f"tensor {prefix}{error}") from error
            if layer + 1 < layers:
                _write(_hidden(folder, layer + 1), {"hidden": calibration.hidden})
            tensors = {}
            for name, matrix in matrices.items():
                tensors[f"{prefix}{name}.numbers"] = stored_numbers(prefix + name, matrix)
                tensors[f"{prefix}{name}.scales"] = matrix.scales
            _write(_file(folder, layer), tensors)
            _hidden(folder, layer).unlink(missing_ok=True)
            print_line(f"  layer {layer + 1} of {layers} calibrated")

    def _tensor(self, prefix: str, name: str) -> torch.Tensor:
        source = self.original.tensors[prefix + name]
        return source.rows(0, source.shape[0]).to(self.original.dtype_of(prefix + name))

    def _embedded(self) -> torch.Tensor:
        """[tokens, hidden_size] float32, some rows of the table at a time; as the network will have them."""
        ids = torch.tensor([row for text in self.texts for row in text])
        table, form = self.original.tensors[EMBEDDING], self.forms.get(EMBEDDING)
        hidden = torch.empty(len(ids), table.shape[1])
        for start in range(0, table.shape[0], _TABLE_ROWS):
            places = ((ids >= start) & (ids < start + _TABLE_ROWS)).nonzero()[:, 0]
            if len(places):
                rows = table.rows(start, min(start + _TABLE_ROWS, table.shape[0])).to(self.original.dtype_of(EMBEDDING))
                values = rows.float() if form is None else quantize(rows, form, first_row=start).dequantized()
                hidden[places] = values[ids[places] - start]
        return hidden


def calibrate_conversion(
    conversion: Conversion, original: Conversion, forms: Mapping[str, QuantizedFormat], texts: Path
) -> Conversion:
    """The conversion whose layers' matrices are calibrated.

    Args:
        conversion: its matrices are rounded to nearest.
        original: the same before it was quantized.
        forms: of its matrices, by their names in the original.
        texts: a file, see `persimmon.model.convert.calibration_texts`.

    Raises:
        CheckpointError: the texts cannot be used.
    """
    rows = read_calibration_texts(texts, conversion.files, original.config)
    layers = _Layers(original=original, forms=forms, texts=rows)
    prepared: list[Path] = []

    def prepare(folder: Path, print_line: Callable[[str], None]) -> None:
        layers.quantize(folder, print_line)
        prepared.append(folder)

    def rows_of(layer: int, name: str) -> Callable[[int, int], torch.Tensor]:
        return lambda start, stop: read_safetensors_file(_file(prepared[0], layer))[name].rows(start, stop)

    tensors: dict[str, TensorSource] = dict(conversion.tensors)
    for name, form in forms.items():
        if name.startswith("model.layers."):
            layer, shape = int(name.split(".")[2]), original.tensors[name].shape
            numbers, scales = rows_of(layer, f"{name}.numbers"), rows_of(layer, f"{name}.scales")
            tensors |= stored_parts(name, shape, form, numbers, scales)
    quantized = sum(form.nbytes(_two(original.tensors[name].shape)) for name, form in forms.items())
    hidden = 2 * 4 * original.config.hidden_size * sum(map(len, rows))
    digest = hashlib.sha256(repr(rows).encode()).hexdigest()
    return replace(
        conversion,
        origin={**conversion.origin, "calibration": [texts.name, digest]},
        tensors=tensors,
        prepare=prepare,
        prepared_bytes=quantized + hidden,
    )


def _two(shape: tuple[int, ...]) -> tuple[int, int]:
    rows, columns = shape
    return rows, columns


def _file(folder: Path, layer: int) -> Path:
    return folder / f"layer-{layer:05}.safetensors"


def _hidden(folder: Path, layer: int) -> Path:
    """What a layer gets."""
    return folder / f"hidden-{layer:05}.safetensors"


def _read(path: Path) -> dict[str, torch.Tensor]:
    return {name: stored.rows(0, stored.shape[0]) for name, stored in read_safetensors_file(path).items()}


def _write(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes a file under another name, reads it back, and gives it its own.

    Raises:
        CheckpointError: what was read back differs.
        OSError: it cannot be written.
    """
    partial = path.with_name(f"{path.name}.partial")
    save_file(dict(tensors), partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # what is compared then comes from the disk
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    written = _read(partial)
    for name, tensor in tensors.items():
        if not torch.equal(written[name].view(torch.uint8), tensor.view(torch.uint8)):
            raise CheckpointError(f"{path}: {name} read back differs from what was written; the disk may be faulty")
    partial.replace(path)
