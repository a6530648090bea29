"""What the GPU suite runs: the network's shape and the sizes of every section, as data.

Knows no kernel.  The tiny suite takes the same way through the code as the full one, in the Triton interpreter.
"""

import multiprocessing.synchronize
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
        max_num_seqs: sequences that buffers are made for; the same in all sections, and so are their kernels.
        copy_bytes, l2_bytes, matmul_size, rotated_bytes: of the ceilings; and how much memory calls take turns in, so
            that no cache holds it.
        seconds_per_figure: how long one variant is timed.
        other_dtypes: the types that are checked in addition to float16.  Triton's interpreter truncates to bfloat16
            instead of rounding, so the tiny suite has none.
        check_block_sizes: of decode attention.
        check_lengths: contexts that every attention check holds; random ones are added up to `check_batch`.
        check_batch: rows of the largest step of the checks.
        check_rows: batch sizes of the projections' checks.
        check_repeats: runs of a kernel that must all give the same bits.
        check_chunks: (context, new tokens) of the prompt checks.
        smoke_layers: of the network in the checks of whole steps.
        smoke_replays: replays of a step that must all give the same bits.
        smoke_chain: steps that feed each other.
        smoke_grid: (batch, context) of the steps whose time is predicted.
        smoke_prompt: its length.
        rows: batch sizes of the projections.
        zero_fractions: of the planted activations, those that the targets need first.
        decode_grid: (batch, context) of decode attention by itself.
        chunk_grid: (context, new tokens) of prompt attention by itself.
        sample_rows: batch sizes of the samplers.
        sweep_rows: batch sizes of the sweep over launch settings.
        step_grid: (batch, context) of decode steps, those that the targets need first.
        sparse_batches: of the steps that are compared with and without skipping.
        sparse_context: their context.
        guess_grid: (batch, context) of the steps with guesses.
        guess_widths: tokens of a sequence in those steps: the last known token and its guesses.
        chain_batches, chain_steps, chain_rounds: of the consecutive steps: batch sizes, how many follow each other, and
            how often.
        prompts: lengths.
        chunk: most tokens of a prompt that run in one step.
        engine_layers: of the engine's network.
        engine_block_size: tokens of its blocks.
        engine_requests: of the mixed load.
        engine_prompt, engine_answer: the longest of each.
        engine_running: most sequences that run at once.
        peer_batches, peer_prompt, peer_tokens, peer_prefill: decode batches of Hugging Face's model, their prompts'
            length, the tokens they get, and the length of its measured prompt.
    """

    config: PersimmonConfig
    block_size: int
    max_num_seqs: int
    copy_bytes: int
    l2_bytes: int
    matmul_size: int
    rotated_bytes: int
    seconds_per_figure: float
    other_dtypes: tuple[torch.dtype, ...]
    check_block_sizes: tuple[int, ...]
    check_lengths: tuple[int, ...]
    check_batch: int
    check_rows: tuple[int, ...]
    check_repeats: int
    check_chunks: tuple[tuple[int, int], ...]
    smoke_layers: int
    smoke_replays: int
    smoke_chain: int
    smoke_grid: tuple[tuple[int, int], ...]
    smoke_prompt: int
    rows: tuple[int, ...]
    zero_fractions: tuple[float, ...]
    decode_grid: tuple[tuple[int, int], ...]
    chunk_grid: tuple[tuple[int, int], ...]
    sample_rows: tuple[int, ...]
    sweep_rows: tuple[int, ...]
    step_grid: tuple[tuple[int, int], ...]
    sparse_batches: tuple[int, ...]
    sparse_context: int
    guess_grid: tuple[tuple[int, int], ...]
    guess_widths: tuple[int, ...]
    chain_batches: tuple[int, ...]
    chain_steps: int
    chain_rounds: int
    prompts: tuple[int, ...]
    chunk: int
    engine_layers: int
    engine_block_size: int
    engine_requests: int
    engine_prompt: int
    engine_answer: int
    engine_running: int
    peer_batches: tuple[int, ...]
    peer_prompt: int
    peer_tokens: int
    peer_prefill: int

    @property
    def max_model_len(self) -> int:
        """Tokens of a sequence that buffers are made for."""
        return self.config.max_position_embeddings


SUITES = {
    "8b": Suite(
        config=PERSIMMON_8B,
        block_size=32,
        max_num_seqs=256,
        copy_bytes=4 << 30,
        l2_bytes=16 << 20,
        matmul_size=8192,
        rotated_bytes=256 << 20,
        seconds_per_figure=0.04,
        other_dtypes=(torch.bfloat16, torch.float32),
        check_block_sizes=(32, 16, 64),
        check_lengths=(1, 2, 31, 32, 33, 255, 256, 257, 513, 1000, 2049, 4097, 16000),
        check_batch=64,
        check_rows=(1, 16, 64),
        check_repeats=200,
        check_chunks=((0, 2048), (0, 1), (1000, 5), (777, 130), (4090, 640), (0, 77)),
        smoke_layers=2,
        smoke_replays=300,
        smoke_chain=4,
        smoke_grid=((1, 512), (8, 512), (64, 512)),
        smoke_prompt=2048,
        rows=(1, 16, 64, 8, 32, 128),
        zero_fractions=(0.0, 0.9),
        decode_grid=((64, 512), (1, 512), (1, 2048), (1, 16384), (8, 2048), (64, 2048), (256, 512)),
        chunk_grid=((0, 2048), (14336, 2048), (0, 512), (0, 8192), (2048, 2048)),
        sample_rows=(64, 1, 128),
        sweep_rows=(64, 1, 16),
        step_grid=((1, 128), (64, 512), (1, 512), (8, 512), (1, 2048), (1, 8192), (16, 512), (64, 1024), (128, 512)),
        sparse_batches=(1, 4, 16),
        sparse_context=128,
        guess_grid=((1, 250), (8, 509), (1, 8190), (8, 2045)),
        guess_widths=(1, 2, 3, 4, 6, 8),
        chain_batches=(64, 1),
        chain_steps=24,
        chain_rounds=3,
        prompts=(2048, 512, 8192),
        chunk=2048,
        engine_layers=4,
        engine_block_size=32,
        engine_requests=200,
        engine_prompt=600,
        engine_answer=32,
        engine_running=64,
        peer_batches=(1, 8),
        peer_prompt=128,
        peer_tokens=48,
        peer_prefill=2048,
    ),
    "tiny": Suite(
        config=TINY_NETWORK,
        block_size=32,
        max_num_seqs=12,
        copy_bytes=1 << 14,
        l2_bytes=1 << 14,
        matmul_size=64,
        rotated_bytes=0,
        seconds_per_figure=0.0,
        other_dtypes=(),
        check_block_sizes=(32,),
        check_lengths=(1, 33, 257),
        check_batch=3,
        check_rows=(3,),
        check_repeats=2,
        check_chunks=((0, 20), (10, 3)),
        smoke_layers=2,
        smoke_replays=2,
        smoke_chain=2,
        smoke_grid=((1, 20),),
        smoke_prompt=20,
        rows=(1, 17),
        zero_fractions=(0.0, 0.9),
        decode_grid=((1, 40), (2, 257)),
        chunk_grid=((0, 20),),
        sample_rows=(2,),
        sweep_rows=(1,),
        step_grid=((1, 40), (2, 20)),
        sparse_batches=(2,),
        sparse_context=20,
        guess_grid=((2, 254),),
        guess_widths=(1, 4),
        chain_batches=(1,),
        chain_steps=2,
        chain_rounds=1,
        prompts=(32,),
        chunk=16,
        engine_layers=1,
        engine_block_size=16,
        engine_requests=4,
        engine_prompt=32,
        engine_answer=3,
        engine_running=3,
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
        compiled: set once the kernels of the first sections are compiled; None where nothing compiles them.
    """

    suite: Suite
    device: torch.device
    seed: int
    compiled: "multiprocessing.synchronize.Event | None" = None

    @property
    def on_gpu(self) -> bool:
        """Whether times mean something."""
        return self.device.type == "cuda"

    def wait_for_kernels(self, seconds: float) -> bool:
        """Waits until the first sections' kernels are compiled, but no longer than this; whether they are."""
        return self.compiled is None or self.compiled.wait(seconds)

    def generator(self) -> torch.Generator:
        """A new generator on the device."""
        return torch.Generator(self.device).manual_seed(self.seed)
