"""The metrics of sequences that ended by themselves: their sizes and how long their parts took.

Knows what is observed of a sequence, not when it ends.
"""

from collections.abc import Callable
from dataclasses import dataclass

from persimmon.server import vllm_metrics
from persimmon.server.histogram import LocalHistogram, merged

INTER_TOKEN_SECONDS = merged(
    (0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 10),
    vllm_metrics.INTER_TOKEN_SECONDS,
)
"""Bounds of times between tokens: finer than vLLM's, because small models are fast."""

_PHASE_SECONDS = merged((0.01, 0.03, 0.1), vllm_metrics.REQUEST_SECONDS)


@dataclass(frozen=True, slots=True)
class FinishedSequence:
    """A sequence that ended by itself.  Times are of one clock, in seconds.

    Attributes:
        prompt_tokens: tokens of its prompt.
        cached_tokens: of these, found in the prefix cache.
        generated_tokens: tokens of its output.
        max_tokens: the most that it might have had.
        scheduled: when the first step that computed a part of it began.
        first_token: when its first token came.
        last_token: when its last token came.
    """

    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    max_tokens: int
    scheduled: float
    first_token: float
    last_token: float


class FinishedHistograms:
    """The histograms of sequences that ended by themselves.

    Args:
        histogram: makes one of a name, a help text and bounds.
    """

    def __init__(self, histogram: Callable[[str, str, tuple[float, ...]], LocalHistogram]) -> None:
        tokens = vllm_metrics.REQUEST_TOKENS
        self.prompt_tokens = histogram("persimmon_request_prompt_tokens", "Prompt tokens of a sequence.", tokens)
        self.computed_prompt_tokens = histogram(
            "persimmon_request_computed_prompt_tokens",
            "Prompt tokens of a sequence that were not in the prefix cache.",
            tokens,
        )
        self.generated_tokens = histogram(
            "persimmon_request_generated_tokens", "Tokens that a sequence generated.", tokens
        )
        self.max_generated_tokens = histogram(
            "persimmon_request_max_generated_tokens", "Tokens of the longest of a prompt's samples.", tokens
        )
        self.max_tokens = histogram(
            "persimmon_request_max_tokens", "Maximum number of tokens that a sequence may generate.", tokens
        )
        self.n = histogram("persimmon_request_n", "Requested samples per prompt.", vllm_metrics.SAMPLES)
        self.prefill_time = histogram(
            "persimmon_request_prefill_time_seconds",
            "Time from the first step that computed a part of a sequence to its first token.",
            _PHASE_SECONDS,
        )
        self.decode_time = histogram(
            "persimmon_request_decode_time_seconds",
            "Time from a sequence's first token to its last.",
            _PHASE_SECONDS,
        )
        self.inference_time = histogram(
            "persimmon_request_inference_time_seconds",
            "Time from the first step that computed a part of a sequence to its last token.",
            _PHASE_SECONDS,
        )
        self.time_per_output_token = histogram(
            "persimmon_request_time_per_output_token_seconds",
            "Mean time per token after a sequence's first; 0 if there is only one.",
            INTER_TOKEN_SECONDS,
        )

    def observe_sequence(self, own: FinishedSequence) -> None:
        """Records a sequence's sizes and times."""
        decode = own.last_token - own.first_token
        self.prompt_tokens.observe(own.prompt_tokens)
        self.computed_prompt_tokens.observe(own.prompt_tokens - own.cached_tokens)
        self.generated_tokens.observe(own.generated_tokens)
        self.max_tokens.observe(own.max_tokens)
        self.prefill_time.observe(own.first_token - own.scheduled)
        self.decode_time.observe(decode)
        self.inference_time.observe(own.last_token - own.scheduled)
        self.time_per_output_token.observe(decode / (own.generated_tokens - 1) if own.generated_tokens > 1 else 0.0)
