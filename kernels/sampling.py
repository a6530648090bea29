"""Draws tokens with Gumbel noise from logits that exist, tile by tile, and merges the tiles of a row.

Knows nothing of truncation, penalties or requests.  A draw depends on (seed, sample_index, position), the token ids and
the row's own logits: never on the row's place in the batch, the tile a token falls into, or how many rows run.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from persimmon.kernels.launch import Limits, launch_options, next_power_of_2
from persimmon.kernels.operands import DrawInputs

LIMITS = {
    "_logits_kernel": Limits(registers=76, shared_bytes=64),
    "_merge_kernel": Limits(registers=112, shared_bytes=64),
}
"""Most that the machine code may take."""

LOG2_E = tl.constexpr(1.4426950408889634)
NO_TOKEN = tl.constexpr(2**31 - 1)


@dataclass(frozen=True, slots=True)
class SamplingConfig:
    """Launch settings.

    None changes a token drawn from the same logits; `head_tokens` and `slice_tokens` change how log-probabilities
    round.

    Attributes:
        head_tokens: token ids of one tile of the output projection.
        head_depth_bytes: bytes of a weight row that one step of the projection's loop takes.
        head_rows: maximum rows of one tile.
        head_stages: steps of the loop that are in flight.
        head_warps: of a program of the projection with up to 32 rows; one with more has twice as many.
        slice_tokens: token ids of one program that reads logits.
        slice_warps: of such a program.
        merge_warps: of a program that merges a row's tiles.
    """

    head_tokens: int = 128
    head_depth_bytes: int = 128
    head_rows: int = 64
    head_stages: int = 4
    head_warps: int = 4
    slice_tokens: int = 4096
    slice_warps: int = 8
    merge_warps: int = 4

    def __post_init__(self) -> None:
        """Refuses tiles that the kernels cannot add up without overflow."""
        if not 16 <= self.head_tokens <= 1024:
            raise ValueError(f"head_tokens is {self.head_tokens}; a tile holds 16 to 1024 token ids")
        if not 16 <= self.slice_tokens <= 4096:
            raise ValueError(f"slice_tokens is {self.slice_tokens}; a slice holds 16 to 4096 token ids")


@dataclass(frozen=True, slots=True)
class Workspace:
    """What tiles leave for the merge, and the results; static, so that CUDA graphs can hold its addresses.

    A tile of a row leaves its best token's score (logit + temperature * noise), id and logit, its highest logit, and
    the sum of exp(logit - highest).

    Attributes:
        scores, winner_logits, maxima, sums: [rows * tiles] float32.
        ids: [rows * tiles] int32.
        tokens: [rows] int64, the tokens drawn last.
        logprobs: [rows] float32, their log-probabilities.
    """

    scores: torch.Tensor
    ids: torch.Tensor
    winner_logits: torch.Tensor
    maxima: torch.Tensor
    sums: torch.Tensor
    tokens: torch.Tensor
    logprobs: torch.Tensor

    @classmethod
    def allocate(
        cls, rows: int, vocab_size: int, device: torch.device, config: SamplingConfig | None = None
    ) -> "Workspace":
        """For calls of at most this many rows."""
        entries = rows * _most_tiles(vocab_size, config or SamplingConfig())
        scores, winner_logits, maxima, sums = (torch.empty(entries, device=device) for _ in range(4))
        ids = torch.empty(entries, dtype=torch.int32, device=device)
        tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        return cls(
            scores=scores,
            ids=ids,
            winner_logits=winner_logits,
            maxima=maxima,
            sums=sums,
            tokens=tokens,
            logprobs=torch.zeros(rows, device=device),
        )

    @staticmethod
    def bytes(rows: int, vocab_size: int, config: SamplingConfig | None = None) -> int:
        """What `allocate` takes."""
        return rows * (20 * _most_tiles(vocab_size, config or SamplingConfig()) + 12)


def _most_tiles(vocab_size: int, config: SamplingConfig) -> int:
    return -(-vocab_size // min(config.head_tokens, config.slice_tokens))


def sample_logits(
    logits: torch.Tensor,
    draw: DrawInputs,
    live: torch.Tensor,
    workspace: Workspace,
    *,
    config: SamplingConfig | None = None,
    pdl: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A token a row from logits that exist: the draws of `head.sample_head`, where a plain matmul serves better.

    Reads R * vocab_size * itemsize bytes, and writes and reads back 20 * R * ceil(vocab_size / slice_tokens).

    Args:
        logits: [R, vocab_size] contiguous, float16, bfloat16 or float32.
        draw: R rows of it; wants_logits does not matter.
        live, workspace, config, pdl: as in `head.sample_head`.

    Returns:
        What `sample_head` does.
    """
    config = config or SamplingConfig()
    rows, vocab_size = logits.shape
    check_rows(rows, workspace)
    slices = triton.cdiv(vocab_size, config.slice_tokens)
    launch = launch_options(pdl)
    _logits_kernel[(slices, rows)](
        logits,
        draw.temperature,
        draw.seed,
        draw.sample_index,
        draw.position,
        live,
        workspace.scores,
        workspace.ids,
        workspace.winner_logits,
        workspace.maxima,
        workspace.sums,
        vocab_size,
        slices,
        SLICE=config.slice_tokens,
        PDL=pdl,
        num_warps=config.slice_warps,
        **launch,
    )
    return merge(workspace, None, live, rows, slices, config=config, pdl=pdl)


def check_rows(rows: int, workspace: Workspace) -> None:
    """Refuses more rows than there is room for."""
    if rows > len(workspace.tokens):
        raise ValueError(f"{rows} rows, but the workspace has room for {len(workspace.tokens)}")


def merge(
    workspace: Workspace,
    active: torch.Tensor | None,
    live: torch.Tensor,
    rows: int,
    tiles: int,
    *,
    config: SamplingConfig,
    pdl: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's tiles into its token and log-probability.

    Reads 20 * rows * tiles bytes, writes 12 * rows.

    Args:
        workspace: with rows * tiles tiles in it.
        active: [R] int32, zero where a row's result must not change; None for all rows.
        live: [1] int32; rows from there on are not changed.
        rows, tiles: how the tiles lie in the workspace.
        config: launch settings.
        pdl: whether the launch overlaps the end of its predecessor.

    Returns:
        The workspace's tokens and log-probabilities of these rows.
    """
    launch = launch_options(pdl)
    _merge_kernel[(rows,)](
        workspace.scores,
        workspace.ids,
        workspace.winner_logits,
        workspace.maxima,
        workspace.sums,
        active,
        live,
        workspace.tokens,
        workspace.logprobs,
        tiles,
        TILES=next_power_of_2(tiles),
        PDL=pdl,
        num_warps=config.merge_warps,
        **launch,
    )
    return workspace.tokens[:rows], workspace.logprobs[:rows]


@triton.jit
def gumbel_from_word(word):
    """32 random bits into Gumbel noise; see `reference_sampling.gumbel`."""
    uniform = tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    rest = 1.0 - uniform
    exponential = (uniform - (1.0 - rest)) - tl.log(rest)
    return -tl.log(exponential)


@triton.jit
def logits_tile(logits, row, first, vocab_size, SLICE: tl.constexpr):
    """A slice of a row of logits as float32, and its ids; what is NaN or lies beyond the row is -inf, -0 is 0."""
    ids = first + tl.arange(0, SLICE)
    x = tl.load(logits + row.to(tl.int64) * vocab_size + ids, mask=ids < vocab_size, other=float("-inf"))
    x = x.to(tl.float32)
    return tl.where(x == x, x + 0.0, float("-inf")), ids


@triton.jit
def store_tile(x, score, ids, row, tile, tiles, scores, winner_ids, winner_logits, maxima, sums, SLICE: tl.constexpr):
    """Writes what a slice of one row leaves for the merge; `score` is -inf where a token may not win."""
    entry = row.to(tl.int64) * tiles + tile
    best = tl.max(score, axis=0)
    winner = tl.min(tl.where(score == best, ids, NO_TOKEN), axis=0)
    maximum = tl.max(x, axis=0)
    tl.store(scores + entry, best)
    tl.store(winner_ids + entry, winner)
    tl.store(winner_logits + entry, tl.max(tl.where(ids == winner, x, float("-inf")), axis=0))
    tl.store(maxima + entry, maximum)
    # Where a slice has no finite logit, its highest is -inf, and -inf - -inf would be NaN.
    tl.store(sums + entry, tl.sum(tl.where(x == maximum, 1.0, tl.exp2((x - maximum) * LOG2_E)), axis=0))


@triton.jit
def slice_noise(first, seed, sample_index, position, SLICE: tl.constexpr):
    """The noise of SLICE ids of one draw, from `first`, a multiple of four."""
    group = first // 4 + tl.arange(0, SLICE // 4)
    w0, w1, w2, w3 = tl.philox(seed, group, position, sample_index, tl.zeros_like(group))
    # [group, low bit of the word's number, high bit] -> id = 4 * group + word.
    words = tl.join(tl.join(w0, w1), tl.join(w2, w3))
    return gumbel_from_word(tl.reshape(tl.permute(words, (0, 2, 1)), (SLICE,)))


@triton.jit
def _logits_kernel(
    logits,
    temperature,
    seed,
    sample_index,
    position,
    live,
    scores,
    winner_ids,
    winner_logits,
    maxima,
    sums,
    vocab_size,
    slices,
    SLICE: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    tile = tl.program_id(0)
    row = tl.program_id(1)
    if row >= tl.load(live):
        return
    x, ids = logits_tile(logits, row, tile * SLICE, vocab_size, SLICE)
    noise = slice_noise(tile * SLICE, tl.load(seed + row), tl.load(sample_index + row), tl.load(position + row), SLICE)
    score = x + tl.load(temperature + row) * noise
    store_tile(x, score, ids, row, tile, slices, scores, winner_ids, winner_logits, maxima, sums, SLICE)


@triton.jit
def _merge_kernel(
    scores,
    winner_ids,
    winner_logits,
    maxima,
    sums,
    active,
    live,
    tokens,
    logprobs,
    tiles,
    TILES: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0)
    if row >= tl.load(live):
        return
    is_active = True if active is None else tl.load(active + row) != 0
    if not is_active:
        return
    tile = tl.arange(0, TILES)
    inside = tile < tiles
    entry = row.to(tl.int64) * tiles + tile
    score = tl.load(scores + entry, mask=inside, other=float("-inf"))
    ids = tl.load(winner_ids + entry, mask=inside, other=NO_TOKEN)
    winner_logit = tl.load(winner_logits + entry, mask=inside, other=float("-inf"))
    tile_maximum = tl.load(maxima + entry, mask=inside, other=float("-inf"))
    total = tl.load(sums + entry, mask=inside, other=0.0)

    winner = tl.min(tl.where(score == tl.max(score, axis=0), ids, NO_TOKEN), axis=0)
    logit = tl.max(tl.where(ids == winner, winner_logit, float("-inf")), axis=0)
    maximum = tl.max(tile_maximum, axis=0)
    share = tl.where(tile_maximum == maximum, 1.0, tl.exp2((tile_maximum - maximum) * LOG2_E))
    below = tl.where(logit == maximum, 0.0, logit - maximum)
    tl.store(tokens + row, winner.to(tl.int64))
    tl.store(logprobs + row, below - tl.log(tl.sum(share * total, axis=0)))
