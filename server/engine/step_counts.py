"""How long an engine's steps took and how many tokens they computed, for metrics."""

from bisect import bisect_left

from persimmon.server.engine.messages import STEP_SECONDS, STEP_TOKENS


class StepCounts:
    """How long steps took and how many tokens they computed.

    Attributes:
        seconds: of all steps together.
        by_seconds: as `EngineStats.step_counts` has them.
        tokens: of all steps together.
        by_tokens: as `EngineStats.step_token_counts` has them.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.by_seconds = [0] * (len(STEP_SECONDS) + 1)
        self.tokens = 0
        self.by_tokens = [0] * (len(STEP_TOKENS) + 1)

    def add(self, seconds: float, tokens: int) -> None:
        """Counts one more step."""
        self.seconds += seconds
        self.by_seconds[bisect_left(STEP_SECONDS, seconds)] += 1
        self.tokens += tokens
        self.by_tokens[bisect_left(STEP_TOKENS, tokens)] += 1
