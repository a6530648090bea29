"""Penalties, and draws from only the most probable tokens of a row, found without a sort and without a float atomic.

Knows nothing of requests.  The rules and their order are those of `reference_sampling`; the threshold of a row is found
by a radix search in which every program of the row merges what the pass before counted.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from persimmon.kernels.launch import Limits, launch_options, next_power_of_2
from persimmon.kernels.operands import DrawInputs, PenaltyInputs, TruncationInputs
from persimmon.kernels.sampling import (
    SamplingConfig,
    Workspace,
    check_rows,
    logits_tile,
    merge,
    slice_noise,
    store_tile,
)

__all__ = [
    "LIMITS",
    "PenaltyInputs",
    "TruncationInputs",
    "TruncationWorkspace",
    "apply_penalties",
    "sample_truncated",
]

LIMITS = {
    "_penalty_kernel": Limits(registers=40, shared_bytes=64),
    "_maximum_kernel": Limits(registers=32, shared_bytes=64),
    "_search_kernel": Limits(registers=116, shared_bytes=19_000),
    "_draw_kernel": Limits(registers=128, shared_bytes=1_200),
}
"""Most that the machine code may take."""

_PENALTY_PROGRAMS = 8
_PENALTY_ENTRIES = 256

_LOG2_E = tl.constexpr(1.4426950408889634)
_DIGIT_BITS = tl.constexpr(4)
_DIGITS = tl.constexpr(16)
_PASSES = 7

# Noise lies between -2.9 and 23, so a token whose tempered logit is 32 below the highest cannot win: gaps end there.
_GAP_ONE = tl.constexpr(2.0**23)
_GAP_END = tl.constexpr(2**28)
_NO_LIMIT = tl.constexpr(2**62)
_LIMIT_UNKNOWN = tl.constexpr(-1)

# A token of the row's highest logit weighs 2**36, and a slice holds at most 2**12 tokens: what a digit of a slice
# weighs stays within 2**48, and how many tokens it has stands above that in the same integer.
_WEIGHT_ONE = tl.constexpr(2.0**36)
_COUNT_SHIFT = tl.constexpr(49)
_COUNT_ONE = tl.constexpr(2**49)

_FIELDS = tl.constexpr(8)
_PREFIX = tl.constexpr(0)
_LIMIT = tl.constexpr(1)
_CUTOFF = tl.constexpr(2)
_TIES = tl.constexpr(3)
_SURPLUS = tl.constexpr(4)


@dataclass(frozen=True, slots=True)
class TruncationWorkspace:
    """What the passes of a search leave for each other; static, so that CUDA graphs can hold its addresses.

    Attributes:
        maxima: [rows * slices] float32, the highest logit of each slice.
        digits: [2, rows * slices * 16] int64, count and weight of each digit's tokens; passes take turns.
        searches: [2, rows, 8] int64, how far each row's search was when the pass that wrote `digits` began.
    """

    maxima: torch.Tensor
    digits: torch.Tensor
    searches: torch.Tensor

    @classmethod
    def allocate(
        cls, rows: int, vocab_size: int, device: torch.device, config: SamplingConfig | None = None
    ) -> "TruncationWorkspace":
        """For calls of at most this many rows."""
        slices = -(-vocab_size // (config or SamplingConfig()).slice_tokens)
        return cls(
            torch.empty(rows * slices, device=device),
            torch.empty(2, rows * slices * 16, dtype=torch.int64, device=device),
            torch.empty(2, rows, 8, dtype=torch.int64, device=device),
        )

    @staticmethod
    def bytes(rows: int, vocab_size: int, config: SamplingConfig | None = None) -> int:
        """What `allocate` takes."""
        slices = -(-vocab_size // (config or SamplingConfig()).slice_tokens)
        return rows * (slices * 260 + 128)


def apply_penalties(logits: torch.Tensor, penalties: PenaltyInputs, live: torch.Tensor, *, pdl: bool = False) -> None:
    """Lowers, in place, the logits of tokens that a row has seen; the maths is `reference_sampling.apply_penalties`.

    Reads and writes 4 bytes of logits and reads 8 bytes for each entry, of rows that have any.

    Args:
        logits: [R, vocab_size] float32 contiguous.
        penalties: R rows of it; ids outside the vocabulary are passed over.
        live: [1] int32; rows from there on are not changed.
        pdl: whether the launch overlaps the end of its predecessor.
    """
    rows, vocab_size = logits.shape
    launch = launch_options(pdl)
    _penalty_kernel[(_PENALTY_PROGRAMS, rows)](
        logits,
        penalties.offsets,
        penalties.token_ids,
        penalties.output_counts,
        penalties.repetition,
        penalties.frequency,
        penalties.presence,
        live,
        vocab_size,
        BLOCK=_PENALTY_ENTRIES,
        PROGRAMS=_PENALTY_PROGRAMS,
        PDL=pdl,
        num_warps=4,
        **launch,
    )


def sample_truncated(
    logits: torch.Tensor,
    draw: DrawInputs,
    truncation: TruncationInputs,
    live: torch.Tensor,
    workspace: Workspace,
    search: TruncationWorkspace,
    *,
    config: SamplingConfig | None = None,
    pdl: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws the active rows anew, each from the tokens it keeps; all others keep what the workspace holds.

    min-p, then top-k, then top-p, each on what the one before kept; `reference_sampling.kept` is the definition.  The
    noise is that of `head.sample_head`, so a row that keeps every token draws the same one again.

    Each rule keeps a first part of the tokens ordered by gap, (highest - logit) / temperature, and id: one gap, and how
    many of the tokens that have it, say what is kept.  A gap is 28 bits in units of 2**-23 (closer ones count as
    equal), searched from the top, four bits a pass: a pass finds, for each digit, how many tokens share the bits known
    so far, or what they weigh, which is exp(-gap) in units of 2**-36.  All sums are of integers, so their order cannot
    matter; weights are exact to the rounding of exp.

    17 launches whatever the rows ask for.  Reads 4 * vocab_size bytes of an active row's logits twice, seven times
    more for top-k and again for top-p, from the L2 cache where the active rows fit it, and for each slice of a row and
    pass 128 * ceil(vocab_size / slice_tokens) bytes of what the pass before left.

    Args:
        logits: [R, vocab_size] float32 contiguous.
        draw: R rows of it; wants_logits does not matter.
        truncation: R rows of it.
        live: [1] int32; rows from there on are not changed.
        workspace: that of the step's `sample_head` or `sample_logits`.
        search: for R rows or more.
        config: launch settings, those that both workspaces were allocated with; the defaults where None.
        pdl: whether the launches overlap the ends of their predecessors.

    Returns:
        The workspace's tokens [R] int64 and log-probabilities [R] float32.  The latter are under softmax(logits):
        without temperature and truncation, but of penalised logits where penalties came before.
    """
    config = config or SamplingConfig()
    rows, vocab_size = logits.shape
    check_rows(rows, workspace)
    slices = triton.cdiv(vocab_size, config.slice_tokens)
    launch = launch_options(pdl)
    shape = {"SLICE": config.slice_tokens, "PDL": pdl, "num_warps": config.slice_warps, **launch}
    slices_padded = next_power_of_2(slices)
    grid = (slices, rows)
    _maximum_kernel[grid](logits, truncation.active, live, search.maxima, vocab_size, slices, **shape)
    for step in range(2 * _PASSES):
        _search_kernel[grid](
            logits,
            draw.temperature,
            truncation.active,
            truncation.top_k,
            truncation.top_p,
            truncation.min_p,
            live,
            search.maxima,
            search.digits[(step + 1) % 2],
            search.searches[(step + 1) % 2],
            search.digits[step % 2],
            search.searches[step % 2],
            4 * (_PASSES - 1 - step % _PASSES),
            vocab_size,
            slices,
            SLICES=slices_padded,
            BY_WEIGHT=step >= _PASSES,
            FIRST=step % _PASSES == 0,
            **shape,
        )
    _draw_kernel[grid](
        logits,
        draw.temperature,
        draw.seed,
        draw.sample_index,
        draw.position,
        truncation.active,
        truncation.top_k,
        truncation.top_p,
        truncation.min_p,
        live,
        search.maxima,
        search.digits[(_PASSES - 1) % 2],
        search.searches[(_PASSES - 1) % 2],
        search.digits[(2 * _PASSES - 1) % 2],
        search.searches[(2 * _PASSES - 1) % 2],
        workspace.scores,
        workspace.ids,
        workspace.winner_logits,
        workspace.maxima,
        workspace.sums,
        vocab_size,
        slices,
        SLICES=slices_padded,
        **shape,
    )
    return merge(workspace, truncation.active, live, rows, slices, config=config, pdl=pdl)


@triton.jit
def _penalty_kernel(
    logits,
    offsets,
    token_ids,
    output_counts,
    repetition,
    frequency,
    presence,
    live,
    vocab_size,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(1)
    if row >= tl.load(live):
        return
    repeated = tl.load(repetition + row)
    per_count = tl.load(frequency + row)
    once = tl.load(presence + row)
    end = tl.load(offsets + row + 1)
    first = tl.load(offsets + row) + tl.program_id(0) * BLOCK
    while first < end:
        entry = first + tl.arange(0, BLOCK)
        id_ = tl.load(token_ids + entry, mask=entry < end, other=-1)
        count = tl.load(output_counts + entry, mask=entry < end, other=0)
        known = (id_ >= 0) & (id_ < vocab_size)
        place = logits + row.to(tl.int64) * vocab_size + id_
        x = tl.load(place, mask=known, other=0.0).to(tl.float32)
        x = tl.where(x > 0, tl.div_rn(x, repeated), x * repeated)
        x -= per_count * count.to(tl.float32) + tl.where(count > 0, once, 0.0)
        tl.store(place, x, mask=known)
        first += PROGRAMS * BLOCK


@triton.jit
def _maximum_kernel(logits, active, live, maxima, vocab_size, slices, SLICE: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    tile = tl.program_id(0)
    row = tl.program_id(1)
    if row >= tl.load(live):
        return
    if tl.load(active + row) == 0:
        return
    x, _ids = logits_tile(logits, row, tile * SLICE, vocab_size, SLICE)
    tl.store(maxima + row * slices + tile, tl.max(x, axis=0))


@triton.jit
def _row_maximum(maxima, row, slices, SLICES: tl.constexpr):
    tile = tl.arange(0, SLICES)
    return tl.max(tl.load(maxima + row * slices + tile, mask=tile < slices, other=float("-inf")), axis=0)


@triton.jit
def _gap(x, maximum, temperature):
    """How far a logit, tempered, lies below the highest: as it is, and as a whole number that ends at _GAP_END."""
    # Rounded to nearest, as the reference's: Triton's `/` may be 2 ulp off, enough to change sides of a cut.
    gap = tl.where(x == maximum, 0.0, tl.div_rn(maximum - x, temperature))
    return gap, (tl.minimum(gap, _GAP_END / _GAP_ONE) * _GAP_ONE).to(tl.int32)


@triton.jit
def _weight(gap):
    return (tl.exp2(gap.to(tl.float32) * (-_LOG2_E / _GAP_ONE)) * _WEIGHT_ONE).to(tl.int64)


@triton.jit
def _survives_min_p(gap, min_p):
    return gap <= -tl.log(min_p)


@triton.jit
def _bound(top_p, total):
    """A token is kept if the weight before it is less than this; the most probable one always is."""
    return tl.maximum(tl.ceil(top_p.to(tl.float64) * total.to(tl.float64)).to(tl.int64), 1)


@triton.jit
def _descend(digits, search, top_p, row, slices, SLICES: tl.constexpr, BY_WEIGHT: tl.constexpr):
    """One digit further: the one that holds the last token with less than the limit before it.

    Reads what a pass left: the digits of each slice, and the search as it was before, which is the bits known then and
    the limit, in tokens or in weight, within them.

    Returns:
        The bits known now, the limit within them, and how many tokens share them.
    """
    prefix = tl.load(search + row * _FIELDS + _PREFIX)
    limit = tl.load(search + row * _FIELDS + _LIMIT)
    tile = tl.arange(0, SLICES)
    digit = tl.arange(0, _DIGITS)
    packed = tl.load(
        digits + (row * slices + tile)[:, None] * _DIGITS + digit[None, :], mask=(tile < slices)[:, None], other=0
    )
    counts = tl.sum(packed >> _COUNT_SHIFT, axis=0)
    amounts = counts
    if BY_WEIGHT:
        amounts = tl.sum(packed & (_COUNT_ONE - 1), axis=0)
        surplus = tl.load(search + row * _FIELDS + _SURPLUS)
        bound = _bound(top_p, tl.sum(amounts, axis=0) - surplus)
        limit = tl.where(limit == _LIMIT_UNKNOWN, bound, limit)
    before = tl.sum(tl.where(digit[None, :] < digit[:, None], amounts[None, :], 0), axis=1)
    chosen = tl.max(tl.where((before < limit) & (counts > 0), digit, 0), axis=0)
    limit -= tl.sum(tl.where(digit == chosen, before, 0), axis=0)
    count = tl.sum(tl.where(digit == chosen, counts, 0), axis=0)
    return prefix * _DIGITS + chosen, limit, count


@triton.jit(do_not_specialize=["shift"])
def _search_kernel(
    logits,
    temperature,
    active,
    top_k,
    top_p,
    min_p,
    live,
    maxima,
    digits_before,
    search_before,
    digits,
    search,
    shift,
    vocab_size,
    slices,
    SLICE: tl.constexpr,
    SLICES: tl.constexpr,
    BY_WEIGHT: tl.constexpr,
    FIRST: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    tile = tl.program_id(0)
    row = tl.program_id(1)
    if row >= tl.load(live):
        return
    own_k = tl.load(top_k + row)
    own_p = tl.load(top_p + row)
    wanted = (own_p < 1.0) if BY_WEIGHT else (own_k > 0)
    if (tl.load(active + row) == 0) | (wanted == 0):
        return

    # The search for top-p's last token sees what top-k kept: gaps up to `cutoff`, of which `ties` tokens have that one.
    # It counts them all, because more of them cannot change what comes before; `surplus` is what the rest weighs.
    cutoff = tl.full((), _GAP_END - 1, tl.int64)
    ties = tl.full((), _NO_LIMIT, tl.int64)
    surplus = tl.full((), 0, tl.int64)
    if FIRST:
        prefix = tl.full((), 0, tl.int64)
        limit = own_k.to(tl.int64)
        if BY_WEIGHT:
            limit = tl.full((), _LIMIT_UNKNOWN, tl.int64)
            if own_k > 0:
                cutoff, remaining, count = _descend(
                    digits_before, search_before, own_p, row, slices, SLICES, BY_WEIGHT=False
                )
                ties = tl.minimum(remaining, count)
                surplus = (count - ties) * _weight(cutoff)
    else:
        prefix, limit, _count = _descend(digits_before, search_before, own_p, row, slices, SLICES, BY_WEIGHT)
        if BY_WEIGHT:
            cutoff = tl.load(search_before + row * _FIELDS + _CUTOFF)
            ties = tl.load(search_before + row * _FIELDS + _TIES)
    if tile == 0:
        tl.store(search + row * _FIELDS + _PREFIX, prefix)
        tl.store(search + row * _FIELDS + _LIMIT, limit)
        tl.store(search + row * _FIELDS + _CUTOFF, cutoff)
        tl.store(search + row * _FIELDS + _TIES, ties)
        tl.store(search + row * _FIELDS + _SURPLUS, surplus)

    x, ids = logits_tile(logits, row, tile * SLICE, vocab_size, SLICE)
    exact, gap = _gap(x, _row_maximum(maxima, row, slices, SLICES), tl.load(temperature + row))
    counted = (ids < vocab_size) & (gap <= cutoff.to(tl.int32)) & _survives_min_p(exact, tl.load(min_p + row))
    if not FIRST:
        counted &= (gap >> (shift + _DIGIT_BITS)) == prefix.to(tl.int32)
    digit = tl.arange(0, _DIGITS)
    sums = tl.zeros((_DIGITS,), dtype=tl.int64)
    # In the later passes most slices hold none of the few tokens that are left.
    if tl.max(counted.to(tl.int32), axis=0) > 0:
        here = tl.where(counted, (gap >> shift) & (_DIGITS - 1), -1)[None, :] == digit[:, None]
        if BY_WEIGHT:
            packed = _weight(gap) + _COUNT_ONE
            sums = tl.sum(tl.where(here, packed[None, :], 0), axis=1)
        else:
            sums = tl.sum(here.to(tl.int32), axis=1).to(tl.int64) * _COUNT_ONE
    tl.store(digits + (row * slices + tile) * _DIGITS + digit, sums)


@triton.jit
def _draw_kernel(
    logits,
    temperature,
    seed,
    sample_index,
    position,
    active,
    top_k,
    top_p,
    min_p,
    live,
    row_maxima,
    digits_by_count,
    search_by_count,
    digits_by_weight,
    search_by_weight,
    scores,
    winner_ids,
    winner_logits,
    maxima,
    sums,
    vocab_size,
    slices,
    SLICE: tl.constexpr,
    SLICES: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    tile = tl.program_id(0)
    row = tl.program_id(1)
    if row >= tl.load(live):
        return
    if tl.load(active + row) == 0:
        return
    own_k = tl.load(top_k + row)
    own_p = tl.load(top_p + row)
    last = tl.full((), _GAP_END - 1, tl.int64)
    ties = tl.full((), _NO_LIMIT, tl.int64)
    digits = digits_by_count
    if own_p < 1.0:
        digits = digits_by_weight
        last, remaining, _count = _descend(digits, search_by_weight, own_p, row, slices, SLICES, BY_WEIGHT=True)
        each = _weight(last)
        if each > 0:
            ties = (remaining + each - 1) // each
        if last == tl.load(search_by_weight + row * _FIELDS + _CUTOFF):
            ties = tl.minimum(ties, tl.load(search_by_weight + row * _FIELDS + _TIES))
    elif own_k > 0:
        last, ties, _count = _descend(digits, search_by_count, own_p, row, slices, SLICES, BY_WEIGHT=False)

    x, ids = logits_tile(logits, row, tile * SLICE, vocab_size, SLICE)
    own_temperature = tl.load(temperature + row)
    exact, gap = _gap(x, _row_maximum(row_maxima, row, slices, SLICES), own_temperature)
    survives = _survives_min_p(exact, tl.load(min_p + row))
    # Of the tokens with the last gap the first `ties` are kept; those of earlier slices were counted by the last pass.
    tied = survives & (gap == last.to(tl.int32))
    before = tl.full((), 0, tl.int64)
    if ties < _NO_LIMIT:
        earlier = tl.arange(0, SLICES)
        counts = digits + (row * slices + earlier) * _DIGITS + (last % _DIGITS)
        before = tl.sum(tl.load(counts, mask=earlier < tile, other=0) >> _COUNT_SHIFT, axis=0)
    place = before + tl.cumsum(tied.to(tl.int32), axis=0)
    keep = survives & (gap < last.to(tl.int32)) | tied & (place <= ties)
    noise = slice_noise(tile * SLICE, tl.load(seed + row), tl.load(sample_index + row), tl.load(position + row), SLICE)
    score = tl.where(keep, x + own_temperature * noise, float("-inf"))
    store_tile(x, score, ids, row, tile, slices, scores, winner_ids, winner_logits, maxima, sums, SLICE)
