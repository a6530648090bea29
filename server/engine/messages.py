"""What crosses the process boundary between API workers and the engine: msgspec structs, encoded as msgpack.

An API worker speaks first (`Hello`), then submits and aborts sequences.  The engine answers with one `Ready` per
`Hello` and, after each step, at most one `StepOutput` per worker.  Text never crosses: only token ids do.
"""

import msgspec


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """How one sequence draws its tokens.

    Attributes:
        temperature: 0 takes the most probable token (ties go to the lowest id); at most 2.
        top_p: nucleus: the smallest set of tokens whose probabilities reach this sum; 1 keeps all.
        top_k: keeps this many of the most probable tokens; 0 keeps all.
        min_p: drops tokens less probable than this share of the most probable one; 0 keeps all.
        seed: with `sample_index` and a token's output position it determines the random draw, whatever else
            runs beside the sequence.  0 <= seed < 2**63.
        sample_index: which of a request's `n` samples this is.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    sample_index: int = 0


class Submit(msgspec.Struct, frozen=True, array_like=True, tag="submit"):
    """One sequence to generate.

    Attributes:
        sequence_id: chosen by the API worker, unique among its live sequences.
        token_ids: the prompt, at least one id, each below the vocabulary size.
        max_tokens: at most this many new tokens, at least 1; prompt and new tokens together fit max_model_len.
        stop_token_ids: a new token among these ends the sequence; it is reported, and counted as output.
        sampling: how tokens are drawn.
    """

    sequence_id: int
    token_ids: list[int]
    max_tokens: int
    stop_token_ids: list[int]
    sampling: Sampling


class Abort(msgspec.Struct, frozen=True, array_like=True, tag="abort"):
    """These sequences are wanted no more.  Unknown and finished ids are ignored: an abort may race a finish."""

    sequence_ids: list[int]


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="hello"):
    """An API worker has connected and asks for a `Ready`."""


class SequenceOutput(msgspec.Struct, frozen=True, array_like=True):
    """What one step did for one sequence.

    Attributes:
        sequence_id: the worker's own id.
        token_ids: new tokens, in order; empty only when the sequence ended without one.
        finish_reason: None while it runs; "stop" (a stop token came), "length", or "error".
        cached_tokens: prompt tokens served from the prefix cache; meaningful from the first output on.
        error: with finish_reason "error", a sentence for the client.
    """

    sequence_id: int
    token_ids: list[int]
    finish_reason: str | None = None
    cached_tokens: int = 0
    error: str | None = None


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
        preemptions: times a sequence lost its blocks to older ones.
        recomputed_tokens: computed tokens that preemptions threw away.
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


class StepOutput(msgspec.Struct, frozen=True, array_like=True, tag="step"):
    """All that a step did for one worker's sequences; with no outputs, news of the engine's state alone."""

    outputs: list[SequenceOutput]
    stats: EngineStats


class Ready(msgspec.Struct, frozen=True, array_like=True, tag="ready"):
    """The engine has loaded the model, run it once and serves.

    Attributes:
        max_model_len: prompt and output tokens of one sequence together are at most this.
        block_size: tokens in a KV block.
        total_blocks: KV blocks in the pool.
        device: for people, like "cpu" or "cuda:0 (NVIDIA H100)".
        dtype: "float32", "float16" or "bfloat16".
        stats: the engine's state now.
    """

    max_model_len: int
    block_size: int
    total_blocks: int
    device: str
    dtype: str
    stats: EngineStats


ToEngine = Hello | Submit | Abort
FromEngine = Ready | StepOutput
