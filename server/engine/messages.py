"""What crosses the process boundary between API workers and the engine: msgspec structs, encoded as msgpack.

An API worker speaks first (`Hello`), then submits and aborts sequences.  The engine answers with one `Ready` per
`Hello` and, after each step, at most one `StepOutput` per worker; where there are several engines, also with what
enters and leaves their prefix indexes (`PrefixChange`).  Text never crosses: only token ids do.
"""

import struct
from bisect import bisect_right
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec

from persimmon.model.sampling_params import SamplingParams
from persimmon.model.token_logprobs import TokenLogprobs

Pooling = Literal["last", "sum", "all"]
"""What is reported of a prompt's final hidden states, or of a classifier's scores: the last one, their sum, or all."""


class PromptSpan(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """Tokens of a prompt that something other than the embedding table embeds.

    Attributes:
        start: the first of them.
        length: how many; at least one.
        content: identifies what is embedded there, a hash of it for example: spans with different contents never share
            a block of the prefix cache, though their token ids are equal.
        pixels: of an image's patches, one a token, the numbers of each in the order height, width, channel: uint8,
            length * `VisionConfig.patch_numbers` bytes.
    """

    start: int
    length: int
    content: bytes
    pixels: bytes = b""

    @property
    def end(self) -> int:
        """The token after the last of them."""
        return self.start + self.length


def spans_within(spans: Sequence[PromptSpan], start: int, end: int) -> Sequence[PromptSpan]:
    """Those of a prompt's spans, which are in order, that overlap its tokens from `start` to `end`."""
    first = bisect_right(spans, start, key=lambda span: span.end)
    stop = first
    while stop < len(spans) and spans[stop].start < end:
        stop += 1
    return spans[first:stop]


def bytes_of_spans(spans: Sequence[PromptSpan], start: int, end: int) -> bytes:
    """What overlaps a block, as bytes that differ if a span, or its place in the block, does; see `hash_block`."""
    return b"".join(
        struct.pack("<qqq", span.start - start, span.length, len(span.content)) + span.content
        for span in spans_within(spans, start, end)
    )


class Submit(msgspec.Struct, frozen=True, array_like=True, kw_only=True, tag="submit"):
    """One prompt, and what is wanted of it: samples that continue it, what the model says of it, or both.

    Attributes:
        token_ids: the prompt, at least one id, each below the vocabulary size.
        spans: the parts of the prompt that the embedding table does not embed, in order and apart from each other.
        max_tokens: at most this many new tokens a sample; prompt and new tokens together fit max_model_len.  0 only
            computes the prompt.
        stop_token_ids: a new token among these ends the sequence; it is reported, and counted as output.
        sampling: how tokens are drawn; samples differ in their index only.
        samples: how many continuations.
        sequence_id: of the first sample, the others' follow it.  `EngineClient` chooses it, so that they are unique
            among the worker's live sequences.
        prompt_logprobs: report the log-probability of each prompt token but the first, and those of this number of most
            probable tokens in its place, to the first sample; None for none.
        pooling: report the prompt's pooled states to the first sample; None for none.
        scores: the states to pool are a classifier's scores of its final hidden states.
        priority: a lower one goes first, and gives its blocks up last.
        cache_salt: prompts share their prefixes in the cache only with those of the same salt.
        request_id: what logs call the request that it belongs to.
        speculate: whether its next tokens may be guessed, where the engine does so.
        owner: the client that asks, which shares the engine with the others: the name of its API key.
        weight: of that client's share; one of weight 2 gets twice as much as one of weight 1.
    """

    token_ids: list[int]
    spans: list[PromptSpan] = []
    max_tokens: int
    stop_token_ids: list[int] = []
    sampling: SamplingParams = msgspec.field(default_factory=SamplingParams)
    samples: Annotated[int, msgspec.Meta(ge=1)] = 1
    sequence_id: int = 0
    prompt_logprobs: int | None = None
    pooling: Pooling | None = None
    scores: bool = False
    priority: int = 0
    cache_salt: bytes = b""
    request_id: str = ""
    speculate: bool = True
    owner: str = ""
    weight: Annotated[int, msgspec.Meta(ge=1)] = 1

    @property
    def sequence_ids(self) -> range:
        """Of all samples, in their order."""
        return range(self.sequence_id, self.sequence_id + self.samples)

    @property
    def reads_cache(self) -> bool:
        """Whether blocks of the prompt may come from the prefix cache: not where its tokens are reported on."""
        return self.prompt_logprobs is None and self.pooling in (None, "last")


class Abort(msgspec.Struct, frozen=True, array_like=True, tag="abort"):
    """Aborts these sequences. Unknown and finished ids are ignored: an abort may race a finish."""

    sequence_ids: list[int]


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="hello"):
    """An API worker has connected and asks for a `Ready`."""


class SequenceOutput(msgspec.Struct, frozen=True, array_like=True):
    """What one step did for one sequence.

    Attributes:
        sequence_id: the worker's own id.
        token_ids: new tokens, in order; empty when the step computed a part of the prompt, or the sequence ended
            without one.
        finish_reason: None while it runs; "stop" (a stop token came), "length", "error", or "expired" (it has waited
            too long, or there is no room for its images, and was not begun).
        cached_tokens: prompt tokens served from the prefix cache; meaningful from the first token on.
        error: with finish_reason "error" or "expired", a sentence for the client.
        logprobs: one for each of token_ids where the sequence asked for them, else empty.
        prompt_logprobs: of the next prompt tokens.
        pooled: a row for each of the next prompt tokens, their sum, or the last token's row, as `pooling` asks:
            float32, little-endian.
        queue_seconds: how long it waited for the first step that computed a part of it.
    """

    sequence_id: int
    token_ids: list[int]
    finish_reason: str | None = None
    cached_tokens: int = 0
    error: str | None = None
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[TokenLogprobs] = []
    pooled: bytes = b""
    queue_seconds: float = 0.0


STEP_SECONDS = (0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.12, 0.25, 0.5, 1, 2, 5, 15, 60)
"""Steps are counted by how long they took, up to each of these and beyond."""

STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Steps are counted by how many tokens they computed, up to each of these and beyond; the bounds are vLLM's."""


class EngineStats(msgspec.Struct, frozen=True, array_like=True):
    """The engine's state after a step.  The first group are levels, the second totals since the start.

    Attributes:
        running: sequences that hold KV blocks.
        waiting: sequences queued for admission, preempted ones among them.
        free_blocks: KV blocks that no sequence holds (prefix-cached but unheld ones count as free).
        total_blocks: KV blocks in the pool.
        steps: steps run.
        prompt_tokens: prompt tokens of admitted sequences, prefix hits included, each counted once.
        generated_tokens: tokens sampled.
        cached_tokens: tokens taken from the prefix cache at admission instead of being computed.
        queried_tokens: tokens looked up in the prefix cache at admission.
        preemptions: times a sequence lost its blocks to others and was queued again.
        recomputed_tokens: computed tokens that preemptions threw away.
        drafts: times that a step computed guesses at what a sequence gets next.
        draft_tokens: guesses that were computed.
        accepted_tokens: guesses that were right: the sequence got these tokens.
        graph_replays: steps that were CUDA graphs.
        step_seconds: what all steps took together.
        step_counts: how many took up to each of STEP_SECONDS and more than the one before it, and how many longer.
        step_tokens: what all steps computed together.
        step_token_counts: how many computed up to each of STEP_TOKENS and more than the one before it; how many more.
    """

    running: int
    waiting: int
    free_blocks: int
    total_blocks: int
    steps: int
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int
    queried_tokens: int
    preemptions: int
    recomputed_tokens: int
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    graph_replays: int = 0
    step_seconds: float = 0.0
    step_counts: tuple[int, ...] = (0,) * (len(STEP_SECONDS) + 1)
    step_tokens: int = 0
    step_token_counts: tuple[int, ...] = (0,) * (len(STEP_TOKENS) + 1)


class StepOutput(msgspec.Struct, frozen=True, array_like=True, tag="step"):
    """The results of a step for one worker's sequences; without outputs, only the engine's state."""

    outputs: list[SequenceOutput]
    stats: EngineStats


MAX_PREFIXES_SENT = 1024
"""Hashes in one message, so that a worker's event loop has its turn between two of them."""


class PrefixChange(msgspec.Struct, frozen=True, array_like=True, tag="prefixes"):
    """What has changed in an engine's prefix index; sent only where there are several engines to choose from.

    After its `Ready`, a worker gets the whole index in pieces; then, before each step's output, what the step changed.

    Attributes:
        entered: hashes of blocks that can be found now, each of HASH_BYTES.
        left: hashes of blocks that cannot be found any more.
    """

    entered: list[bytes]
    left: list[bytes] = []


class Ready(msgspec.Struct, frozen=True, array_like=True, tag="ready"):
    """The engine has loaded the model, run it once and serves.

    Attributes:
        max_model_len: prompt and output tokens of one sequence together are at most this.
        block_size: tokens in a KV block.
        total_blocks: KV blocks in the pool.
        device: for people, like "cpu" or "cuda:0 (NVIDIA H100)".
        dtype: "float32", "float16" or "bfloat16".
        stats: the engine's state now.
        weights: how they are quantized, for people, like "int4 in groups of 32 and int8"; empty where they are not.
        cache_dtype: the value of --kv-cache-dtype that the KV cache follows.
        rope_limit: prompts longer than this share blocks only with prompts of their own length; None for no such limit.
    """

    max_model_len: int
    block_size: int
    total_blocks: int
    device: str
    dtype: str
    stats: EngineStats
    weights: str = ""
    cache_dtype: str = "auto"
    rope_limit: int | None = None


ToEngine = Hello | Submit | Abort
FromEngine = Ready | StepOutput | PrefixChange
