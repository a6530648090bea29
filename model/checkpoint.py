"""A folder in Hugging Face layout -> named tensors, one at a time, once all that headers can tell is checked.

Knows the names and shapes of a Persimmon network's tensors and the file formats they come in.  Knows nothing
of where they go: the network's own layout, device and type are its caller's.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from persimmon.kernels import QuantizedFormat, QuantizedMatrix
from persimmon.model.config import PersimmonConfig
from persimmon.model.errors import CheckpointError
from persimmon.model.leftovers import EMBEDDING, HEAD, settle
from persimmon.model.quantization.compressed_tensors import MatrixScheme, ModuleClass
from persimmon.model.quantization.stored_matrices import StoredMatrix, equal_matrices, take_matrices
from persimmon.model.quantization.tensors import quantize_rows, random_matrix
from persimmon.model.shard import ONLY, WHOLE, Part, Shard
from persimmon.model.stored import StoredTensor
from persimmon.model.tensor_names import PATCH_PROJECTION, module_name, network_name, stored_name
from persimmon.model.weight_files import BYTES, Header, RenamedFile, WeightFile, and_more, find_weight_files

SCORE = "score.weight"

OF_VOCABULARY = (EMBEDDING, HEAD)
"""The largest tensors: a row for each token that there is."""

_COMPARED_ROWS = 4096
_NUMBERS_DRAWN = (1 << 20) - 3
"""Random numbers of a dummy tensor.  A larger one repeats them, since a CPU would take minutes to draw those of the 8B
model.  It is a prime, so that no two rows are the same."""


def expected_shapes(config: PersimmonConfig, shard: Shard = ONLY) -> dict[str, tuple[int, ...]]:
    """The tensors of a Persimmon checkpoint, or of one rank's part of it, in the order of the network.

    They have their Hugging Face names; those of a network that reads images too are Persimmon's, see
    `persimmon.model.tensor_names`.

    Linear weights are [out, in].  The rows of query_key_value are ordered [head, {query, key, value},
    head_dim]: per head, so that a plain split into three has valid shapes and wrong contents.  With
    tie_word_embeddings there is no lm_head.weight, nor in a classifier, which has its score instead;
    `persimmon.model.leftovers` handles files that hold one.
    """
    hidden, intermediate = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def linear(name: str, width_out: int, width_in: int) -> None:
        shapes[f"{name}.weight"] = (width_out, width_in)
        shapes[f"{name}.bias"] = (width_out,)

    if config.vision is not None:
        linear(PATCH_PROJECTION, hidden, config.vision.patch_numbers)
    for layer in (f"model.layers.{number}" for number in range(config.num_hidden_layers)):
        norm(f"{layer}.input_layernorm", hidden)
        linear(f"{layer}.self_attn.query_key_value", 3 * hidden, hidden)
        if config.qk_layernorm:
            norm(f"{layer}.self_attn.q_layernorm", config.head_dim)
            norm(f"{layer}.self_attn.k_layernorm", config.head_dim)
        linear(f"{layer}.self_attn.dense", hidden, hidden)
        norm(f"{layer}.post_attention_layernorm", hidden)
        linear(f"{layer}.mlp.dense_h_to_4h", intermediate, hidden)
        linear(f"{layer}.mlp.dense_4h_to_h", hidden, intermediate)
    norm("model.final_layernorm", hidden)
    if not config.generates:
        shapes["score.weight"] = (config.num_labels, hidden)
        if config.score_bias:
            shapes["score.bias"] = (config.num_labels,)
    elif not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    parts = {name: shard.part(name, shape, config) for name, shape in shapes.items()}
    return {name: part.shape(shapes[name]) for name, part in parts.items() if part is not None}


def dummy_tensors(
    config: PersimmonConfig, dtype: torch.dtype, device: torch.device | str, seed: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Random tensors in place of a checkpoint's, to measure speed: same names, shapes and order.

    Weights and biases are drawn from N(0, 0.02²) as at the start of training, norm weights from N(1, 0.1²),
    so that nothing overflows or vanishes; a large tensor repeats a million of them.  They are made on the device, one
    at a time.

    Args:
        config: the network.
        dtype: of the tensors; a floating point type.
        device: where they are made.
        seed: the same seed makes the same tensors on the same kind of device.
    """
    generator = torch.Generator(device).manual_seed(seed)
    for name, shape in expected_shapes(config).items():
        yield name, _normal(name, shape, dtype, generator)


def dummy_parameters(
    config: PersimmonConfig,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int,
    formats: Mapping[str, QuantizedFormat],
    shard: Shard = ONLY,
) -> Iterator[tuple[str, torch.Tensor | QuantizedMatrix]]:
    """`dummy_tensors` of which those with a format are quantized: made so, not rounded, which takes seconds only.

    They come in the order of `Checkpoint.parameters`: quantized ones first, and the largest of each.  Several ranks
    have the same norms, and what is divided among them is any numbers.
    """
    generator = torch.Generator(device).manual_seed(seed)
    shapes = expected_shapes(config, shard)
    for name in largest_first([name for name in formats if name in shapes], shapes):
        rows, columns = shapes[name]
        yield name, random_matrix((rows, columns), formats[name], generator)
    dense = [name for name in shapes if name not in formats]
    places = {name: place for place, name in enumerate(expected_shapes(config))}
    for name in sorted(dense, key=lambda name: name not in OF_VOCABULARY):
        if shard.size > 1 and "norm" in name:
            generator.manual_seed((seed + places[name]) % 2**63)
        yield name, _normal(name, shapes[name], dtype, generator)


def _normal(name: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    mean, deviation = (1.0, 0.1) if name.endswith("layernorm.weight") else (0.0, 0.02)
    tensor = torch.empty(shape, dtype=dtype, device=generator.device)
    flat = tensor.view(-1)
    drawn = flat[:_NUMBERS_DRAWN].normal_(mean, deviation, generator=generator)
    for start in range(_NUMBERS_DRAWN, len(flat), _NUMBERS_DRAWN):
        rest = flat[start : start + _NUMBERS_DRAWN]
        rest.copy_(drawn[: len(rest)])
    return tensor


def scheme_of(config: PersimmonConfig, name: str) -> MatrixScheme | None:
    """How config.json says that a tensor is quantized, by its name; None where it is not."""
    if config.quantization is None or not name.endswith(".weight") or "norm" in name:
        return None
    kind: ModuleClass = "Embedding" if name == EMBEDDING else "Linear"
    return config.quantization.scheme(module_name(name.removesuffix(".weight"), config), kind)


@dataclass(frozen=True)
class Checkpoint:
    """The weight files of a checkpoint that holds the tensors its network needs.

    Attributes:
        config: the network: what config.json says, except where the files say otherwise, see `notes`.
        files: the weight files, in the order they are read.
        names: the network's name of each tensor that is read, by its name in the files; without quantized matrices.
        matrices: the quantized matrices, by the network's names.
        stored: the dtype or format of each tensor, by the network's names.
        total_bytes: the size of all, in the types they are stored in.
        dtype: the widest of those types.
        notes: a line for people on each thing that is ignored, or used although config.json says otherwise.
    """

    config: PersimmonConfig
    files: tuple[WeightFile, ...]
    names: Mapping[str, str]
    matrices: Mapping[str, StoredMatrix]
    stored: Mapping[str, torch.dtype | QuantizedFormat]
    total_bytes: int
    dtype: torch.dtype
    notes: tuple[str, ...]

    @classmethod
    def open(cls, folder: Path, config: PersimmonConfig) -> "Checkpoint":
        """Finds a folder's weight files and compares their headers with the network.

        Reads no tensor, except the scales of quantized matrices, and the embedding and lm_head.weight where config.json
        ties them and the files hold both.

        Args:
            folder: a checkpoint in Hugging Face layout.
            config: what its config.json says.

        Raises:
            CheckpointError: a file is missing, truncated, damaged or holds more than tensors; a tensor is
                missing, unexpected, in two shards, of another shape or type; a scale is not finite.
        """
        listing, files, index = find_weight_files(folder)
        if config.vision is not None:
            files = tuple(RenamedFile(file, lambda stored: network_name(stored, config)) for file in files)
            index = {network_name(stored, config): shard for stored, shard in index.items()}
        found: dict[str, tuple[WeightFile, Header]] = {}
        for file in files:
            headers = file.headers()
            for name, header in headers.items():
                if name in found:
                    raise CheckpointError(f"{file.path}: tensor {name} is also in {found[name][0].path.name}")
                found[name] = (file, header)
            absent = [name for name, shard in index.items() if shard == file.path.name and name not in headers]
            if absent:
                raise CheckpointError(
                    f"{file.path}: tensor {absent[0]} is missing, although {listing.name} places it here"
                    f"{and_more(absent)}"
                )

        # Of a tied network too: files may hold an lm_head all the same.
        untied = expected_shapes(replace(config, tie_word_embeddings=False))
        matrices = take_matrices(found, untied, lambda name: scheme_of(config, name))

        def same_head() -> bool:
            if HEAD in matrices and EMBEDDING in matrices:
                return equal_matrices(matrices[HEAD], matrices[EMBEDDING])
            return (
                HEAD in found
                and EMBEDDING in found
                and found[HEAD][1].shape == found[EMBEDDING][1].shape
                and equal_rows(*(_read(found[name][0], name) for name in (HEAD, EMBEDDING)))
            )

        settled = settle([*found, *matrices], config, same_head)
        read = {name: found[name] for name in settled.names if name in found}
        quantized = {settled.names[name]: matrix for name, matrix in matrices.items() if name in settled.names}
        _check_table(quantized, listing)
        if f"{PATCH_PROJECTION}.weight" in quantized:
            raise CheckpointError(
                f"{listing}: vision_embed_tokens is quantized; expected its weight in {', '.join(BYTES)}: put it under "
                f"ignore when you quantize"
            )
        places = {settled.names[name]: place for name, place in read.items()}
        _compare(listing, places, settled.config, quantized)
        widest = max((header.dtype for _, header in read.values()), key=BYTES.__getitem__)
        stored: dict[str, torch.dtype | QuantizedFormat]
        stored = {name: getattr(torch, header.dtype) for name, (_, header) in places.items()}
        stored |= {name: matrix.format for name, matrix in quantized.items()}
        dense_bytes = sum(header.bytes for _, header in read.values())
        return cls(
            config=settled.config,
            files=files,
            names={name: settled.names[name] for name in read},
            matrices=quantized,
            stored=stored,
            total_bytes=dense_bytes + sum(matrix.nbytes for matrix in quantized.values()),
            dtype=getattr(torch, widest),
            notes=settled.notes + _notes(quantized),
        )

    def parameters(
        self,
        formats: Mapping[str, QuantizedFormat] | None = None,
        without: Collection[str] = (),
        shard: Shard = ONLY,
    ) -> Iterator[tuple[str, torch.Tensor | QuantizedMatrix]]:
        """Every tensor once, except those left out, quantized ones first; the others in the order of the files.

        Quantized matrices have memory of their own, and are read and rounded a few rows at a time.  The largest of each
        come first: while kernels lay one of them out, it is in memory twice, and little else is.  A classifier's score
        is computed in float32, so it comes as such where it is stored quantized.

        Args:
            formats: by name, of tensors that are not stored quantized, and become so.
            without: names of tensors that are left out; none of them has a format.
            shard: the part that is wanted of each; the rest of dense tensors is not read.

        Raises:
            CheckpointError: a file has become unreadable since `open`, or a weight cannot be quantized.
        """
        formats = formats or {}
        sources = self._sources(formats)
        shapes: dict[str, tuple[int, ...]] = {
            name: matrix.shape for name, matrix in self.matrices.items() if name not in without
        }
        shapes |= {name: source.shape for name, source in sources.items()}
        for name in largest_first(shapes, shapes):
            part = shard.part(name, shapes[name], self.config) or WHOLE  # no matrix is left out
            matrix = (
                self.matrices[name].read(part)
                if name in self.matrices
                else quantize_rows(sources[name], formats[name], name, part)
            )
            yield name, matrix.dequantized() if name == SCORE else matrix
            del matrix
        others = {stored for stored, name in self.names.items() if name not in formats and name not in without}
        large = {stored for stored in others if self.names[stored] in OF_VOCABULARY}
        for names in (large, others - large):
            for name, tensor in self._dense(frozenset(names)):
                own = shard.part(name, tuple(tensor.shape), self.config)
                if own is not None:
                    yield name, _view(tensor, own)
                del tensor

    def mapped_embedding(self, shard: Shard = ONLY) -> torch.Tensor | QuantizedMatrix:
        """The embedding [vocab_size, hidden], where it lies in its file and in the form that it has there.

        A row takes memory once it is read, and the system may take that back.  While the result is in use, the file
        must not be written to, and must not become shorter: that would end the process.

        Args:
            shard: the rank whose rows are wanted.

        Raises:
            CheckpointError: rows cannot be looked up in the form that the file has, or the file cannot be mapped.
        """
        matrix = self.matrices.get(EMBEDDING)
        source = self._sources({EMBEDDING})[EMBEDDING] if matrix is None else matrix.numbers
        problem = None
        if matrix is not None and matrix.scheme.packed:
            problem = "is packed into int32 (pack-quantized), and only int-quantized rows can be looked up there"
        elif source.stride != (source.shape[1], 1):
            problem = "is not stored row by row"
        elif source.address % source.dtype.itemsize:
            problem = f"begins at byte {source.address:,}, not at a multiple of {source.dtype.itemsize}"
        if problem:
            raise CheckpointError(
                f"--embedding-table is file, but in {source.region} {EMBEDDING} {problem}: use --embedding-table memory"
            )
        rows = shard.vocabulary(self.config)
        table = source.mapped(scattered=True)[rows.start : rows.stop]
        if matrix is None:
            return table
        scales = matrix.scales.rows(rows.start, rows.stop)
        return QuantizedMatrix(numbers=table, scales=scales, bits=8, group_size=matrix.shape[1])

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor that is not quantized, once, by name, in the order they lie in the files.

        Each is on the CPU, in its stored type, and reads its pages from the file when it is used.  The reader
        copies it to where it belongs and drops it; only then the next one is made.  (A pickled file stays
        mapped until it is read through; one from before PyTorch 1.6 cannot be mapped and is read as a whole.)

        Raises:
            CheckpointError: a file has become unreadable since `open`.
        """
        yield from self._dense(frozenset(self.names))

    def _dense(self, names: frozenset[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for file in self.files:
            for name, tensor in file.tensors(names):
                yield self.names[name], tensor
                del tensor

    def _sources(self, names: Collection[str]) -> dict[str, StoredTensor]:
        """Tensors to be read row by row, by the network's names."""
        found = {}
        for file in self.files if names else ():
            for stored, source in file.stored().items():
                if self.names.get(stored) in names:
                    found[self.names[stored]] = source
        return found


def largest_first(names: Iterable[str], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Names of matrices in the order in which loading them takes least memory."""
    return sorted(names, key=lambda name: -math.prod(shapes[name]))


def equal_rows(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors of one shape hold the same numbers, whatever their types; a few rows at a time."""
    return all(
        torch.equal(one.float(), other.float())
        for one, other in zip(torch.split(first, _COMPARED_ROWS), torch.split(second, _COMPARED_ROWS), strict=True)
    )


def _stored_name(name: str, config: PersimmonConfig) -> str:
    """The name under which files hold a tensor, or the first of a quantized one's."""
    scheme = scheme_of(config, name)
    return stored_name(f"{name}_packed" if scheme and scheme.packed else name, config)


def _view(tensor: torch.Tensor, part: Part) -> torch.Tensor:
    """A part of a tensor that is read from its file when it is used, of which the rest is not."""
    rows = tensor if part.rows is None else tensor[part.rows.start : part.rows.stop]
    return rows if part.columns is None else rows[:, part.columns.start : part.columns.stop]


def _read(file: WeightFile, name: str) -> torch.Tensor:
    return next(tensor for _, tensor in file.tensors(frozenset([name])))


def _check_table(matrices: Mapping[str, StoredMatrix], listing: Path) -> None:
    """Raises CheckpointError where kernels cannot look embeddings up as they are stored."""
    if EMBEDDING not in matrices:
        return
    scheme = matrices[EMBEDDING].scheme
    if scheme.bits != 8 or scheme.group_size is not None:
        raise CheckpointError(
            f"{listing}: {EMBEDDING.removesuffix('.weight')} is quantized to {scheme}; expected int8 with a scale for "
            f"each row, the only quantized embedding that is supported"
        )


def _notes(matrices: Mapping[str, StoredMatrix]) -> tuple[str, ...]:
    rounded = sum(matrix.scheme.rounds_inputs for matrix in matrices.values())
    if not rounded:
        return ()
    return (
        f"config.json asks for 8-bit activations in {rounded} matrices: weights are used as they are, and "
        f"--quantized-activations decides whether activations are rounded",
    )


def _compare(
    listing: Path,
    found: Mapping[str, tuple[WeightFile, Header]],
    config: PersimmonConfig,
    quantized: Collection[str],
) -> None:
    """Raises CheckpointError unless exactly the network's tensors were found, of their shapes, in floats."""
    expected = expected_shapes(config)
    missing = [_stored_name(name, config) for name in expected if name not in found and name not in quantized]
    if missing:
        raise CheckpointError(f"{listing}: tensor {missing[0]} is missing{and_more(missing)}")
    unexpected = [name for name in found if name not in expected]
    if unexpected:
        name = unexpected[0]
        raise CheckpointError(f"{found[name][0].path}: tensor {name} is unexpected{and_more(unexpected)}")
    for name, (file, header) in found.items():
        if header.shape != expected[name]:
            raise CheckpointError(
                f"{file.path}: tensor {name} has shape {list(header.shape)}, config.json needs {list(expected[name])}"
            )
        if header.dtype not in BYTES:
            raise CheckpointError(f"{file.path}: tensor {name} is {header.dtype}; expected one of {', '.join(BYTES)}")
