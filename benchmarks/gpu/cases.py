"""One kernel with its inputs, to be timed: decode attention of a batch, a projection of some rows.

Successive calls use different weights and caches, in all more memory than any cache holds, as the layers of a step do.
Times nothing.
"""

from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812

from benchmarks.gpu.inputs import (
    AttentionInputs,
    Pages,
    Width,
    make_attention_inputs,
    make_pages,
    normal,
    planted_activation,
    row_statistics,
)
from benchmarks.gpu.suite import Setting
from benchmarks.gpu.timing import Call, rotate, rotations
from persimmon.kernels.decode_attention import DecodeConfig, decode_attention
from persimmon.kernels.decode_work import DecodeWorkspace, build_work_list
from persimmon.kernels.projection import project, project_add_
from persimmon.kernels.projection_config import ATTENTION_OUT, MLP_DOWN, WIDE, Norm, ProjectionConfig, Workspace

DTYPE = torch.float16


class DecodeCase:
    """Decode attention of one batch; successive calls use different sets of sequences."""

    def __init__(self, setting: Setting, batch: int, context: int, block_size: int) -> None:
        suite, config, generator = setting.suite, setting.suite.config, setting.generator()
        heads, dim, size = config.num_attention_heads, config.head_dim, DTYPE.itemsize
        per_sequence = heads * dim * size * (2 * (context - 1) + 3 + 3)
        self.moved = batch * per_sequence
        sets = rotations(self.moved, suite.rotated_bytes)
        self.inputs: AttentionInputs = make_attention_inputs(config, batch, DTYPE, generator)
        self.pages: Pages = make_pages(config, [context] * batch * sets, block_size, DTYPE, generator)
        self.lengths = torch.full((batch,), context, dtype=torch.int32, device=setting.device)
        self.tables = [self.pages.table_tensor(range(first, first + batch)) for first in range(0, batch * sets, batch)]
        self.workspace = DecodeWorkspace.allocate(suite.max_num_seqs, suite.max_model_len, heads, dim, setting.device)
        build_work_list(self.lengths, self.workspace)

    def calls(self, config: DecodeConfig) -> list[Call]:
        """One call for each set."""
        inputs = self.inputs
        return [
            partial(
                decode_attention,
                inputs.qkv,
                *inputs.norm_and_rotary,
                self.pages.cache,
                self.lengths,
                tables,
                self.workspace,
                config=config,
            )
            for tables in self.tables
        ]

    def dense_calls(self, batch: int, context: int) -> list[Call]:
        """Attention of torch over contiguous keys and values: no pages, no norms, no cache write."""
        _, heads, _, dim = self.inputs.qkv.shape
        shape = (-1, batch, heads, context, dim)
        count = batch * heads * context * dim
        sets = self.pages.keys.numel() // count
        keys, values = (cache.view(-1)[: sets * count].view(shape) for cache in (self.pages.keys, self.pages.values))
        q = self.inputs.qkv[:, :, :1].clone()
        return [
            partial(F.scaled_dot_product_attention, q, own_keys, own_values)
            for own_keys, own_values in zip(keys, values, strict=True)
        ]


class ProjectionCase:
    """One projection of some rows; successive calls use different weights."""

    def __init__(self, setting: Setting, width: Width, rows: int, *, zeros: float = 0.5, shared: bool = False) -> None:
        generator, self.width, self.rows = setting.generator(), width, rows
        self.is_down = width.name == "mlp_down"
        self.adds = width.out_features == setting.suite.config.hidden_size
        self.weight_bytes = width.in_features * width.out_features * DTYPE.itemsize

        def weight() -> torch.Tensor:
            shape = (width.in_features, width.out_features)
            return normal(generator, *(shape if self.is_down else shape[::-1]), dtype=DTYPE, deviation=0.02)

        self.bias = normal(generator, width.out_features, dtype=DTYPE)
        self.x = normal(generator, rows, width.in_features, dtype=DTYPE)
        if self.is_down:
            self.x = planted_activation(generator, rows, width.in_features, zeros, shared=shared, dtype=DTYPE)
        self.alive = (self.x != 0).any(0).to(torch.int8)
        # Rows that are not read do not evict the cache.
        read = round(self.weight_bytes * (self.alive.float().mean().item() if self.is_down else 1.0))
        self.weights = rotate(weight, read, setting.suite.rotated_bytes)
        self.out = normal(generator, rows, width.out_features, dtype=DTYPE)
        self.live = torch.tensor([rows], dtype=torch.int32, device=setting.device)
        self._statistics = row_statistics(self.x)
        self._gamma, self._beta = torch.ones_like(self.x[0]).float(), torch.zeros_like(self.x[0]).float()

    @property
    def moved(self) -> int:
        """Bytes of a dense call: the weight, what comes in, what goes out (and was there before, where it adds)."""
        out = self.out.nbytes * (2 if self.adds else 1)
        return self.weight_bytes + self.x.nbytes + out + self.bias.nbytes

    @property
    def moved_when_skipping(self) -> int:
        """Bytes where rows of the weight that meet only zeros are not read."""
        unread = 1 - self.alive.float().mean().item()
        return self.moved - round(unread * self.weight_bytes)

    @property
    def default(self) -> ProjectionConfig:
        """How the network launches it."""
        own = {"attention_out": ATTENTION_OUT, "mlp_down": MLP_DOWN}
        return own.get(self.width.name, WIDE)

    def calls(self, config: ProjectionConfig, *, skipping: bool = False) -> list[Call]:
        """One call for each weight, of what the network calls."""
        workspace = Workspace.allocate([(self.width.out_features, config)], self.rows, self.x.device)
        alive = self.alive if skipping else None
        norm = Norm(statistics=self._statistics, weight=self._gamma, bias=self._beta, eps=1e-5)
        if self.adds:
            return [
                partial(
                    project_add_,
                    self.out,
                    self.x,
                    weight,
                    self.bias,
                    transposed=self.is_down,
                    alive=alive,
                    live=self.live,
                    workspace=workspace,
                    config=config,
                )
                for weight in self.weights
            ]
        return [
            partial(
                project,
                self.x,
                weight,
                self.bias,
                norm=norm,
                live=self.live,
                workspace=workspace,
                config=config,
                activation="relu_squared" if self.width.name == "mlp_up" else "none",
            )
            for weight in self.weights
        ]

    def cublas_calls(self) -> list[Call]:
        """Only the matrix product with its bias: no norm, activation or residual."""
        return [partial(F.linear, self.x, weight.t() if self.is_down else weight, self.bias) for weight in self.weights]
