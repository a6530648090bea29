"""The network's operations in C: each as a call of its own, or recorded as a program that one call runs.

Shapes and maths are those of `persimmon.kernels.reference`, except that activations are float32 whatever the weights'
dtype, and that a block's keys lie in the cache dimension by dimension.  A row's result has the same bits whatever is
computed beside it.
"""

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from persimmon.kernels.cpu import library, pages
from persimmon.kernels.cpu.program import Program, step_of
from persimmon.kernels.launch import KernelsUnavailableError
from persimmon.kernels.operands import Activation, LayerCache, Linear, Norm, Residual, Rotary, StepLimits
from persimmon.kernels.quantized import QuantizedFormat, QuantizedMatrix

RESIDUAL_BUFFER = "x"
"""Name of a program's buffer that holds the residual stream."""

PRODUCT_BUFFER = "product"
"""Name of a program's buffer for a product that is summed over ranks before it is added to the residual stream."""

LAYER_BUFFER = "layer"
"""Name of a program's buffer for what a layer makes on the way."""

QuantizedActivations = Literal["auto", "float", "int8"]
"""What products of quantized weights multiply: see `NativeKernels`."""

_LAYER_BUFFERS = ("projected", "attended", "inner")
"""Names of what a layer makes between its additions to the residual stream."""

_HALVES = (torch.float16, torch.bfloat16)
_TYPES = {torch.float32: library.FLOAT32, torch.float16: library.FLOAT16, torch.bfloat16: library.BFLOAT16}


@dataclass(frozen=True, slots=True)
class NativePlan:
    """A step's sequences as the kernels read them.

    Attributes:
        starts: [B] int32, position of each sequence's first token.
        firsts: [B + 1] int32, the row of each one's first token, and T.
        tables: [*] int32, the sequences' blocks, one list after the other.
        table_firsts: [B] int32, where each one's list begins.
    """

    starts: np.ndarray
    firsts: np.ndarray
    tables: np.ndarray
    table_firsts: np.ndarray

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.firsts[-1])


@dataclass(frozen=True, slots=True)
class NativeWeight:
    """The matrix of a product as the C kernels read it.

    Attributes:
        data: its numbers, in the order of the format.
        shape: (out, in).
        format: "panels" as linear.h has them; "panels of pairs" for inputs rounded to bfloat16; "quantized panels" as
            packing.h has them, with their scales; "rows" is [out, in], an embedding that is also the head, which torch
            multiplies unless it is quantized.
        sparse_input: whether it is multiplied by squared ReLU, which is never negative and mostly zero.
        quantized: what quantized panels are made of, or rows of 8 bits.
        scales: of quantized rows, [out, 1].
    """

    data: torch.Tensor
    shape: tuple[int, int]
    format: Literal["panels", "panels of pairs", "quantized panels", "rows"]
    sparse_input: bool = False
    quantized: QuantizedFormat | None = None
    scales: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers and scales."""
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)


class NativeKernels:
    """Implements `kernels.Kernels` for a CPU.

    Args:
        build: one of `library.builds()`.
        dtype: the network's.  With bfloat16, a processor that multiplies such numbers as they are gets inputs rounded
            to bfloat16, as in torch; all other products are made in float32.
        quantized_activations: what quantized weights are multiplied by.  "int8" rounds inputs to 8 bits with a scale
            for each 64 of them (or each group of the weight, where those are smaller) and sums integers; "float"
            leaves them as they are; "auto" is the faster one on this build.
    """

    def __init__(
        self,
        build: str,
        dtype: torch.dtype = torch.float32,
        quantized_activations: QuantizedActivations = "auto",
    ) -> None:
        self.build = build
        self.dtype = dtype
        self.rounds_activations = quantized_activations != "float"
        self.library = library.load(build)
        self._rounds = dtype == torch.bfloat16 and bool(self.library.persimmon_multiplies_bfloat16())

    def workspace_bytes(self, limits: StepLimits) -> int:
        """Bytes of the buffers of a recorded program, and of a product's inputs next to them."""
        hidden, attended, inner = limits.hidden_size, limits.num_heads * limits.head_dim, limits.intermediate_size
        # x, then what a layer makes; then the widest input once more.
        per_token = hidden + layer_width(attended, inner) + max(hidden, inner)
        if attended < hidden:  # one of several ranks
            per_token += hidden
        return limits.max_num_batched_tokens * per_token * torch.float32.itemsize

    def reserve(self, limits: StepLimits) -> None:
        """Makes nothing: a program's buffers are its own."""
        del limits

    def stored_dtype(self, stored: torch.dtype, dtype: torch.dtype) -> torch.dtype:
        """As `reference.stored_dtype`; but 16 bits stay in a float32 network: kernels widen them exactly."""
        return stored if dtype == torch.float32 and stored in _TYPES else dtype

    def cache_dtypes(self, dtype: torch.dtype) -> Sequence[torch.dtype]:
        """As `reference.cache_dtypes`: a float32 network's may have 16 bits, since attention widens what it reads."""
        return (dtype, *(_HALVES if dtype == torch.float32 else ()), torch.int8)

    def prepare_bias(self, bias: torch.Tensor) -> torch.Tensor:
        """In float32, like all activations."""
        return bias.float()

    def prepare_weight(self, weight: torch.Tensor | QuantizedMatrix, *, sparse_input: bool = False) -> NativeWeight:
        """A [out, in] weight in panels, see linear.h; a quantized one in those of packing.h.

        Raises:
            KernelsUnavailableError: the groups are of a size that these kernels do not read.
        """
        if isinstance(weight, QuantizedMatrix):
            return self._prepare_quantized(weight, sparse_input)
        weight = weight.contiguous()
        rows, columns = weight.shape
        pairs = self._rounds and weight.dtype == torch.bfloat16 and columns % 2 == 0
        packed = pages.advise_large_pages(pages.empty((rows * columns,), weight.dtype))
        size, threads = weight.dtype.itemsize, torch.get_num_threads()
        self.library.persimmon_pack(weight.data_ptr(), packed.data_ptr(), rows, columns, size, int(pairs), threads)
        return NativeWeight(
            data=packed,
            shape=(rows, columns),
            format="panels of pairs" if pairs else "panels",
            sparse_input=sparse_input,
        )

    def tied_weight(self, table: torch.Tensor | QuantizedMatrix) -> NativeWeight:
        """As `reference.tied_weight`.

        Raises:
            KernelsUnavailableError: the table is not of 8 bits with a scale a row.
        """
        if isinstance(table, QuantizedMatrix):
            _check_table(table)
            return NativeWeight(table.numbers, table.shape, "rows", quantized=table.format, scales=table.scales)
        return NativeWeight(table, (table.shape[0], table.shape[1]), "rows")

    def tied_bytes(self, shape: tuple[int, int], stored: torch.dtype | QuantizedFormat) -> int:
        """As `reference.tied_bytes`."""
        del shape, stored
        return 0

    def _prepare_quantized(self, weight: QuantizedMatrix, sparse_input: bool) -> NativeWeight:
        operation = self._quantized_operation(weight.shape, weight.format, sparse_input)
        size = self.library.persimmon_packed_bytes(ctypes.byref(operation))
        packed = pages.advise_large_pages(pages.empty((size,), torch.uint8))
        numbers, scales = weight.numbers.contiguous(), weight.scales.contiguous()
        self.library.persimmon_pack_quantized(
            ctypes.byref(operation), numbers.data_ptr(), scales.data_ptr(), packed.data_ptr(), torch.get_num_threads()
        )
        return NativeWeight(
            data=packed,
            shape=weight.shape,
            format="quantized panels",
            sparse_input=sparse_input,
            quantized=weight.format,
        )

    def _quantized_operation(
        self, shape: tuple[int, int], quantized: QuantizedFormat, sparse_input: bool
    ) -> library.Operation:
        """What a product with a quantized weight has in common with all others."""
        rows, columns = shape
        group_size = quantized.group_size or columns
        if group_size != columns and group_size % 8:
            raise KernelsUnavailableError(
                f"the C kernels do not read groups of {group_size} quantized weights; expected one scale for each "
                f"output, or groups of a multiple of 8"
            )
        return library.Operation(
            kind=library.LINEAR,
            type=library.INT8 if quantized.bits == 8 else library.INT4,
            sparse=int(sparse_input),
            in_=columns,
            out=rows,
            group=group_size,
            scale_type=_TYPES[quantized.scale_dtype],
            integer=int(self.rounds_activations),
        )

    def weight_bytes(self, shape: tuple[int, int], stored: torch.dtype | QuantizedFormat) -> int:
        """As `reference.weight_bytes`; quantized panels are padded to whole ones.

        Raises:
            KernelsUnavailableError: as `prepare_weight`.
        """
        if isinstance(stored, QuantizedFormat):
            operation = self._quantized_operation(shape, stored, sparse_input=False)
            return int(self.library.persimmon_packed_bytes(ctypes.byref(operation)))
        return math.prod(shape) * stored.itemsize

    def plan_attention(
        self,
        block_tables: Sequence[Sequence[int]],
        starts: Sequence[int],
        counts: Sequence[int],
        *,
        num_blocks: int,
        num_heads: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> NativePlan:
        """As `reference.plan_attention`; best sorted by length, because the last sequences are begun first."""
        del num_blocks, num_heads, block_size, dtype, device
        lengths = [len(table) for table in block_tables]
        return NativePlan(
            starts=np.array(starts, dtype=np.int32),
            firsts=np.cumsum([0, *counts], dtype=np.int32),
            tables=np.fromiter(chain.from_iterable(block_tables), dtype=np.int32, count=sum(lengths)),
            table_firsts=np.cumsum([0, *lengths[:-1]], dtype=np.int32),
        )

    def rotary_at(self, table: Rotary, plan: NativePlan) -> Rotary:
        """The whole table: kernels look their tokens' positions up themselves."""
        del plan
        return table

    def embed(
        self,
        token_ids: torch.Tensor,
        sampled: torch.Tensor | None,
        table: torch.Tensor | QuantizedMatrix,
        plan: NativePlan,
    ) -> Residual:
        """As `reference.embed`.

        Raises:
            KernelsUnavailableError: a quantized table is not of 8 bits with a scale a row.
        """
        x = self._buffer(RESIDUAL_BUFFER, plan.num_tokens, table.shape[1])
        operation = library.Operation(kind=library.EMBED, out=table.shape[1], output=x.data_ptr())
        if isinstance(table, QuantizedMatrix):
            _check_table(table)
            operation.type, operation.weight = library.INT8, table.numbers.data_ptr()
            operation.scale_type, operation.scales = _TYPES[table.scales.dtype], table.scales.data_ptr()
        else:
            operation.type, operation.weight = _TYPES[table.dtype], table.data_ptr()
        self._run(operation, step_of_plan(plan, token_ids=token_ids, sampled=sampled), table, x)
        return Residual(x)

    def norm_linear(self, x: Residual, norm: Norm, linear: Linear[NativeWeight], plan: NativePlan) -> torch.Tensor:
        """As `reference.norm_linear`."""
        out = self._buffer("projected", plan.num_tokens, linear.weight.shape[0])
        self._linear(x.values, norm, linear, out, library.STORE, step_of_plan(plan))
        return out

    def attention(
        self,
        qkv: torch.Tensor,
        qk_norm: Norm | None,
        rotary: Rotary,
        cache: LayerCache,
        plan: NativePlan,
        *,
        ahead: Linear[NativeWeight] | None = None,
    ) -> torch.Tensor:
        """As `reference.attention`."""
        del ahead
        _, heads, _, head_dim = qkv.shape
        out = self._buffer("attended", plan.num_tokens, heads * head_dim)
        operation = library.Operation(
            kind=library.ATTENTION,
            type=library.INT8 if cache.keys.dtype == torch.int8 else _TYPES[cache.keys.dtype],
            heads=heads,
            head_dim=head_dim,
            rotary=2 * rotary.cos.shape[1],
            block_size=cache.block_size,
            input=qkv.data_ptr(),
            output=out.data_ptr(),
            cosine=rotary.cos.data_ptr(),
            sine=rotary.sin.data_ptr(),
            keys=cache.keys.data_ptr(),
            values=cache.values.data_ptr(),
        )
        if cache.scales is not None:
            operation.cache_scales = cache.scales.data_ptr()
        if qk_norm is not None:
            operation.norm_weight, operation.norm_bias = qk_norm.weight.data_ptr(), qk_norm.bias.data_ptr()
            operation.eps = qk_norm.eps
        by_token = rotary if rotary.by_token else None
        self._run(operation, step_of_plan(plan, by_token), qkv, qk_norm, rotary, cache, out)
        return out

    def norm_linear_relu_squared(
        self, x: Residual, norm: Norm, linear: Linear[NativeWeight], plan: NativePlan
    ) -> Activation:
        """As `reference.norm_linear_relu_squared`."""
        inner = self._buffer("inner", plan.num_tokens, linear.weight.shape[0])
        self._linear(x.values, norm, linear, inner, library.STORE_RELU_SQUARED, step_of_plan(plan))
        return Activation(inner)

    def product(self, inputs: Activation, linear: Linear[NativeWeight]) -> torch.Tensor:
        """As `reference.product`; with few rows, inputs of a sparse weight that are zero in all are left out."""
        rows = len(inputs.values)
        out = self._buffer(PRODUCT_BUFFER, rows, linear.weight.shape[0])
        self._linear(inputs.values, None, linear, out, library.STORE, step_of(rows))
        return out

    def add_(self, x: Residual, update: torch.Tensor, plan: NativePlan) -> None:
        """As `reference.add_`."""
        del plan
        x.values += update

    def add_product_(self, x: Residual, inputs: Activation, linear: Linear[NativeWeight], plan: NativePlan) -> None:
        """As `reference.add_product_`, in one operation."""
        self._linear(inputs.values, None, linear, x.values, library.ADD, step_of_plan(plan))

    def norm_rows(self, x: Residual, norm: Norm, rows: torch.Tensor | None) -> torch.Tensor:
        """As `reference.norm_rows`."""
        hidden = torch.empty(len(x.values) if rows is None else len(rows), x.values.shape[1])
        operation = library.Operation(kind=library.NORM_ROWS, in_=x.values.shape[1], input=x.values.data_ptr())
        operation.norm_weight, operation.norm_bias, operation.eps = (
            norm.weight.data_ptr(),
            norm.bias.data_ptr(),
            norm.eps,
        )
        self._run(operation, step_of(len(x.values), rows=rows, hidden=hidden), x.values, norm)
        return hidden

    def logits(self, hidden: torch.Tensor, head: NativeWeight) -> torch.Tensor:
        """As `reference.logits`."""
        if head.format == "rows" and head.quantized is None:
            return F.linear(hidden.to(head.data.dtype), head.data).float()
        out = torch.empty(len(hidden), head.shape[0])
        self._linear(hidden.contiguous(), None, Linear(head, None), out, library.STORE, step_of(len(out)))
        return out

    def draw(self, logits: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
        """A token a row, by the inverse of its cumulative distribution, see sampling.h.

        Args:
            logits: [R, vocab_size] float32, contiguous.
            draws: [R] of `library.DRAWS`.

        Returns:
            [R] int64.
        """
        rows, vocab_size = logits.shape
        tokens = torch.empty(rows, dtype=torch.int64)
        # Its input is also what a thread needs memory for: weights, and an id and a logit for each.
        operation = library.Operation(kind=library.DRAW, in_=vocab_size, input=logits.data_ptr())
        step = step_of(rows, drawn=tokens)
        step.draws = draws.ctypes.data
        program = Program(self.library, max(rows, 3 * torch.get_num_threads()))
        program.append(operation, ())
        program.run(step)
        return tokens

    def _linear(
        self,
        values: torch.Tensor,
        norm: Norm | None,
        linear: Linear[NativeWeight],
        out: torch.Tensor,
        finish: int,
        step: library.Step,
    ) -> None:
        weight = linear.weight
        if weight.quantized is None:
            operation = library.Operation(
                kind=library.LINEAR,
                type=_TYPES[weight.data.dtype],
                rounds=int(weight.format == "panels of pairs"),
                sparse=int(weight.sparse_input),
                in_=values.shape[1],
                out=out.shape[1],
            )
        else:
            operation = self._quantized_operation(weight.shape, weight.quantized, weight.sparse_input)
            operation.scales = None if weight.scales is None else weight.scales.data_ptr()
        operation.finish, operation.weight = finish, weight.data.data_ptr()
        operation.input, operation.output = values.data_ptr(), out.data_ptr()
        operation.bias = None if linear.bias is None else linear.bias.data_ptr()
        if norm is not None:
            operation.norm_weight, operation.norm_bias = norm.weight.data_ptr(), norm.bias.data_ptr()
            operation.eps = norm.eps
        self._run(operation, step, values, norm, linear, out)

    def record(
        self, max_tokens: int, forward: Callable[["NativeKernels", NativePlan], object], width: int = 0
    ) -> Program:
        """Records the operations that `forward` asks for.

        Args:
            max_tokens: of the steps that the program is for.
            forward: one pass of the network through the kernels it is given.  It gets a plan that stands for all, and
                returns nothing that means anything.  Only what the kernels do becomes part of the program; `add_` is
                where one of its `parts` ends, and is left to the caller that runs those.
            width: of what a layer makes, see `layer_width`; 0 where nothing but products are recorded.
        """
        program = Program(self.library, max_tokens)
        nothing = np.zeros(1, dtype=np.int32)
        forward(
            _Recorder(self, program, width),
            NativePlan(starts=nothing, firsts=nothing, tables=nothing, table_firsts=nothing),
        )
        return program

    def _buffer(self, name: str, rows: int, width: int) -> torch.Tensor:
        """Where a result goes: [rows, width] float32; `name` says what for."""
        del name
        return torch.empty(rows, width)

    def _run(self, operation: library.Operation, step: library.Step, *operands: object) -> None:
        """Runs one operation; `operands` are what it points at."""
        program = Program(self.library, step.tokens)
        program.append(operation, operands)
        program.run(step)


class _Recorder(NativeKernels):
    """Writes down what it is asked to do."""

    def __init__(self, kernels: NativeKernels, program: Program, width: int) -> None:
        super().__init__(kernels.build, kernels.dtype, "int8" if kernels.rounds_activations else "float")
        self._program = program
        self._width = width

    def _buffer(self, name: str, rows: int, width: int) -> torch.Tensor:
        del rows
        if name not in _LAYER_BUFFERS:
            return self._program.buffer(name, width)
        # The MLP's inner values lie where qkv and what attention has made of it were: both have been used by then.
        layer, size = self._program.buffer(LAYER_BUFFER, self._width).view(-1), self._program.max_tokens * width
        place = layer[-size:] if name == "attended" else layer[:size]
        return place.view(-1, width)

    def add_(self, x: Residual, update: torch.Tensor, plan: NativePlan) -> None:
        del x, update, plan
        self._program.cut()

    def _run(self, operation: library.Operation, step: library.Step, *operands: object) -> None:
        del step
        self._program.append(operation, operands)


def layer_width(attended: int, inner: int) -> int:
    """Numbers of a token that a layer has at once: qkv and what attention makes of it, or the MLP's inner values.

    Args:
        attended: of what attention makes, all heads together; qkv has three times as many.
        inner: of the MLP's inner values.
    """
    return max(3 * attended + attended, inner)


def _check_table(table: QuantizedMatrix) -> None:
    if table.bits != 8 or table.group_size != table.shape[1]:
        raise KernelsUnavailableError(
            f"the C kernels do not look embeddings up in {table.format}; expected int8, a scale for each output"
        )


def step_of_plan(plan: NativePlan, rotary: Rotary | None = None, **tensors: torch.Tensor | None) -> library.Step:
    """A step of a plan's sequences; `rotary`: its tokens' angles, where they are not those of their positions."""
    step = step_of(plan.num_tokens, **tensors)
    step.sequences = len(plan.starts)
    if rotary is not None:
        step.cosine, step.sine = rotary.cos.data_ptr(), rotary.sin.data_ptr()
    for name in ("starts", "firsts", "tables", "table_firsts"):
        setattr(step, name, getattr(plan, name).ctypes.data)
    return step
