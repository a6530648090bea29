"""The device tensors that hold keys and values, in blocks.  Which block is whose is decided elsewhere."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from persimmon.kernels import LayerCache
from persimmon.kernels.cache_types import allocate_layer, row_bytes
from persimmon.kernels.cpu.pages import advise_large_pages, populate
from persimmon.kernels.launch import upload
from persimmon.model.config import PersimmonConfig
from persimmon.model.shard import ONLY, Shard


def block_bytes(config: PersimmonConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block: keys and values of `block_size` tokens in every layer, with their scales, on all ranks."""
    rows = config.num_hidden_layers * block_size * config.num_attention_heads
    return 2 * rows * row_bytes(dtype, config.head_dim)


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys and values of every layer, each [num_blocks, heads, block_size, head_dim], with scales if they have any."""

    layers: list[LayerCache]

    @classmethod
    def allocate(
        cls,
        config: PersimmonConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        shard: Shard = ONLY,
    ) -> "KVCache":
        """Blocks with nothing in them: no kernel reads a row that its sequence has not written.

        `dtype` is that of keys and values, one that `Kernels.cache_dtypes` offers; the heads are those of `shard`.

        On a CPU the system hands out the memory as it is first written, or as `populate` asks for it.
        """
        shape = (num_blocks, shard.num_heads(config), block_size, config.head_dim)

        def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            tensor = torch.empty(shape, dtype=dtype, device=device)
            return advise_large_pages(tensor) if device.type == "cpu" else tensor

        return cls([allocate_layer(shape, dtype, empty) for _ in range(config.num_hidden_layers)])

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All tensors of all layers, each with `num_blocks` blocks."""
        return [tensor for layer in self.layers for tensor in layer.tensors]

    def populate(self, threads: int) -> None:
        """Makes the system allocate all of the memory on a CPU, in background threads, the first blocks first."""
        populate(self.tensors, threads)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies whole blocks in every layer, all of them as they were before: (from, to) pairs, no two to the same."""
        places = upload(np.array(pairs, dtype=np.int64), self.device)
        for tensor in self.tensors:
            # As bytes what torch may not index.
            own = tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
            own[places[:, 1]] = own[places[:, 0]]

    @property
    def num_blocks(self) -> int:
        """Blocks in the cache."""
        return self.layers[0].keys.shape[0]

    @property
    def num_heads(self) -> int:
        """Attention heads, each with its own keys and values."""
        return self.layers[0].keys.shape[1]

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self.layers[0].block_size

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self.layers[0].keys.dtype

    @property
    def device(self) -> torch.device:
        """Where the cache lies."""
        return self.layers[0].keys.device
