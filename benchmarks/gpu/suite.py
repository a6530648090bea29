"""What the GPU suite runs: the network's shape and the sizes of every section, as data.

Knows no kernel.  The tiny suite takes the same way through the code as the full one, in the Triton interpreter.
"""

from dataclasses import dataclass

import torch

from benchmarks.floors import PERSIMMON_8B
from persimmon.model.config import PersimmonConfig

TINY_NETWORK = PersimmonConfig(
    vocab_size=200,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=1024,
)


@dataclass(frozen=True, slots=True)
class Suite:
    """The sizes of every section.

    Attributes:
        config: the network.
        block_size: tokens of a KV block, where not all block sizes are compared.
        copy_bytes, matmul_size, rotated_bytes: of the ceilings; and how much memory calls take turns in, so that no
            cache holds it.
        seconds_per_figure: how long one variant is timed.
        check_dtypes: the types that kernels are checked in; bit for bit only in the first.  Triton's interpreter
            truncates to bfloat16 instead of rounding, so the tiny suite has none.
        check_block_sizes: of decode attention.
        check_lengths: contexts that every attention check holds; random ones are added up to `check_batch`.
        check_batch: rows of the largest step of the checks.
        check_rows: batch sizes of the projections' checks.
        check_repeats: runs of a kernel that must all give the same bits.
        check_layers: of the network in the whole-step checks.
        check_chunks: (context, new tokens) of the prompt checks.
        rows: batch sizes of the projections.
        zero_fractions: of the planted activations, those that targets speak of first.
        decode_grid: (batch, context) of decode attention by itself.
        chunk_grid: (context, new tokens) of prompt attention by itself.
        sample_rows: batch sizes of the samplers.
        sweep_rows: batch sizes of the sweep over launch settings.
        step_grid: (batch, context) of decode steps; the first that memory does not hold and all like it are left out.
        sparse_batches: of the steps that are compared with and without skipping.
        sparse_context: their context.
        chain_batches, chain_steps, chain_rounds: of the consecutive steps: batch sizes, how many follow each other, and
            how often.
        prompts: lengths.
        chunk: most tokens of a prompt that run in one step.
        peer_batches, peer_prompt, peer_tokens, peer_prefill: decode batches of Hugging Face's model, their prompts'
            length, the tokens they get, and the length of its measured prompt.
    """

    config: PersimmonConfig
    block_size: int
    copy_bytes: int
    matmul_size: int
    rotated_bytes: int
    seconds_per_figure: float
    check_dtypes: tuple[torch.dtype, ...]
    check_block_sizes: tuple[int, ...]
    check_lengths: tuple[int, ...]
    check_batch: int
    check_rows: tuple[int, ...]
    check_repeats: int
    check_layers: int
    check_chunks: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    zero_fractions: tuple[float, ...]
    decode_grid: tuple[tuple[int, int], ...]
    chunk_grid: tuple[tuple[int, int], ...]
    sample_rows: tuple[int, ...]
    sweep_rows: tuple[int, ...]
    step_grid: tuple[tuple[int, int], ...]
    sparse_batches: tuple[int, ...]
    sparse_context: int
    chain_batches: tuple[int, ...]
    chain_steps: int
    chain_rounds: int
    prompts: tuple[int, ...]
    chunk: int
    peer_batches: tuple[int, ...]
    peer_prompt: int
    peer_tokens: int
    peer_prefill: int


SUITES = {
    "8b": Suite(
        config=PERSIMMON_8B,
        block_size=32,
        copy_bytes=4 << 30,
        matmul_size=8192,
        rotated_bytes=256 << 20,
        seconds_per_figure=0.06,
        check_dtypes=(torch.float16, torch.bfloat16, torch.float32),
        check_block_sizes=(16, 32, 64),
        check_lengths=(1, 2, 31, 32, 33, 255, 256, 257, 513, 1000, 2049, 4097, 16384),
        check_batch=64,
        check_rows=(1, 16, 64),
        check_repeats=200,
        check_layers=3,
        check_chunks=((0, 2048), (0, 1), (1000, 5), (777, 130), (4090, 640), (0, 77)),
        rows=(1, 2, 4, 8, 16, 32, 64, 128, 256),
        zero_fractions=(0.0, 0.9, 0.5),
        decode_grid=(
            (1, 128),
            (1, 512),
            (1, 2048),
            (1, 8192),
            (1, 16384),
            (8, 2048),
            (64, 512),
            (64, 2048),
            (256, 512),
        ),
        chunk_grid=((0, 512), (0, 2048), (0, 8192), (0, 16384), (2048, 2048), (6144, 2048), (14336, 2048)),
        sample_rows=(1, 8, 64, 128),
        sweep_rows=(1, 16, 64),
        step_grid=(
            (1, 128),
            (64, 512),
            (1, 2048),
            (1, 8192),
            (1, 16384),
            (2, 512),
            (4, 512),
            (8, 512),
            (8, 2048),
            (16, 512),
            (16, 2048),
            (64, 128),
            (64, 1024),
            (128, 128),
            (128, 512),
        ),
        sparse_batches=(1, 2, 4, 8, 16),
        sparse_context=128,
        chain_batches=(1, 64),
        chain_steps=24,
        chain_rounds=5,
        prompts=(512, 2048, 8192),
        chunk=2048,
        peer_batches=(1, 8),
        peer_prompt=128,
        peer_tokens=48,
        peer_prefill=2048,
    ),
    "tiny": Suite(
        config=TINY_NETWORK,
        block_size=32,
        copy_bytes=1 << 14,
        matmul_size=64,
        rotated_bytes=0,
        seconds_per_figure=0.0,
        check_dtypes=(torch.float16,),
        check_block_sizes=(32,),
        check_lengths=(1, 33, 257),
        check_batch=3,
        check_rows=(3,),
        check_repeats=2,
        check_layers=1,
        check_chunks=((0, 20), (10, 3)),
        rows=(1, 17),
        zero_fractions=(0.0, 0.9),
        decode_grid=((1, 40), (2, 257)),
        chunk_grid=((0, 20),),
        sample_rows=(2,),
        sweep_rows=(1,),
        step_grid=((1, 40), (2, 20)),
        sparse_batches=(2,),
        sparse_context=20,
        chain_batches=(1,),
        chain_steps=2,
        chain_rounds=1,
        prompts=(20,),
        chunk=16,
        peer_batches=(1,),
        peer_prompt=4,
        peer_tokens=3,
        peer_prefill=8,
    ),
}


@dataclass(frozen=True, slots=True)
class Setting:
    """Where a section runs, and on what.

    Attributes:
        suite: the sizes.
        device: a GPU; or a CPU, where Triton interprets and no time is a figure.
        seed: of every random input.
    """

    suite: Suite
    device: torch.device
    seed: int

    @property
    def on_gpu(self) -> bool:
        """Whether times mean something."""
        return self.device.type == "cuda"

    def generator(self) -> torch.Generator:
        """A new generator on the device."""
        return torch.Generator(self.device).manual_seed(self.seed)
