"""One sequence: its tokens, its stop rules, where its keys and values are."""

from collections.abc import Hashable
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from typing import Self

from persimmon.model.sampling_params import SamplingParams
from persimmon.server.engine.acceptance import Acceptance
from persimmon.server.engine.blocks import ROOT_HASH, hash_block
from persimmon.server.engine.grammar_proposer import ForcedTokens
from persimmon.server.engine.messages import Pooling, PromptSpan, bytes_of_spans, spans_within
from persimmon.server.engine.proposers import Proposer
from persimmon.server.engine.shares import NO_SHARE, Share


@dataclass(eq=False, slots=True, weakref_slot=True)
class Sequence:
    """A prompt and what has been generated for it so far.

    Attributes:
        key: who asked for it; unique among live sequences.
        token_ids: prompt and output, in order.
        spans: the parts of the prompt that the embedding table does not embed, in order.
        prompt_length: how many of them are the prompt.
        max_tokens: most output tokens; with 0 it ends when its prompt is computed.
        stop_token_ids: an output token among these is the last.
        sampling: for the runner.
        sample_index: which of the samples of one prompt it is.
        priority: a lower one goes first.
        owner: the client that it belongs to; clients share the engine.
        weight: of that client's share.
        share: the client's share; set by the scheduler.
        arrival: how many came before it; the scheduler counts.
        prompt_logprobs: most probable tokens to report with each prompt token; None for no report.
        pooling: what to report of the prompt's final states; None for no report.
        scores: whether to report a classifier's scores instead of the states.
        forks: further samples of the same prompt, which begin where this one's prompt ends and cost nothing before.
        leader: the sequence among whose forks it is.
        num_reported: prompt tokens that are reported or need no report, including those that running steps report.
        num_computed: the number of first tokens whose keys and values are in the blocks, or are written by the steps
            under way.
        num_pending: tokens that the steps under way will draw, not known yet; of those at guesses some may not count.
        speculate: whether its next tokens may be guessed.
        forced: finds what its grammar forces; None where nothing does.
        proposer: guesses them; None where nothing does.
        acceptance: how often the guesses are right; None where that does not count.
        row: of such a token, the place among all that its step samples.
        steps_under_way: number of running steps that may write its blocks.
        block_table: the blocks that hold its tokens, in order.
        cached_tokens: prompt tokens found in the prefix cache at the first admission; None before it.
        finish_reason: None while it lives, else "stop", "length" or "abort".
        draws_from_output: whether each draw needs the tokens before it, which no step under way may be about to sample.
        runner_state: what its runner keeps with it; only the runner reads it.
        cache_salt: stands before its first block in the prefix cache, so that it shares blocks only with those of the
            same salt.
        request_id: what logs call the request that it belongs to.
        submitted: when it came, on a clock of the engine's.
        queue_seconds: how long it waited for its first step; None before that.
    """

    key: Hashable
    token_ids: list[int]
    max_tokens: int
    stop_token_ids: frozenset[int] = frozenset()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    sample_index: int = 0
    priority: int = 0
    owner: str = ""
    weight: int = 1
    share: Share = NO_SHARE
    arrival: int = 0
    prompt_logprobs: int | None = None
    pooling: Pooling | None = None
    scores: bool = False
    forks: list["Sequence"] = field(default_factory=list)
    leader: "Sequence | None" = None
    prompt_length: int = field(init=False)
    num_reported: int = field(init=False)
    num_computed: int = 0
    num_pending: int = 0
    speculate: bool = True
    forced: ForcedTokens | None = None
    proposer: Proposer | None = None
    acceptance: Acceptance | None = None
    row: int = 0
    steps_under_way: int = 0
    block_table: list[int] = field(default_factory=list)
    cached_tokens: int | None = None
    finish_reason: str | None = None
    draws_from_output: bool = field(init=False)
    runner_state: object = None
    spans: Ids[PromptSpan] = ()
    cache_salt: bytes = ROOT_HASH
    request_id: str = ""
    submitted: float = 0.0
    queue_seconds: float | None = None
    _block_hashes: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prompt_length = len(self.token_ids)
        self.draws_from_output = self.sampling.draws_from_output
        if self.prompt_logprobs is not None or self.pooling in ("sum", "all"):
            self.num_reported = 0
        else:
            self.num_reported = self.prompt_length - (self.pooling == "last")
        for fork in self.forks:
            fork.leader = self

    @property
    def rank(self) -> tuple[int, int, int]:
        """Its place among all sequences: by priority, then in the order of arrival."""
        return self.priority, self.arrival, self.sample_index

    @property
    def age(self) -> tuple[int, int]:
        """Its place in the order of arrival."""
        return self.arrival, self.sample_index

    @property
    def wants_report(self) -> bool:
        """Whether its prompt has to be reported on."""
        return self.prompt_logprobs is not None or self.pooling is not None

    @property
    def family(self) -> list["Sequence"]:
        """It and its forks."""
        return [self, *self.forks]

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens known so far."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.prompt_length

    @property
    def num_uncomputed(self) -> int:
        """Tokens, known or pending, that no step computes yet; 1 while decoding."""
        return len(self.token_ids) + self.num_pending - self.num_computed

    @property
    def awaits_its_last_token(self) -> bool:
        """Whether a step under way samples the last token that `max_tokens` allows."""
        return self.num_pending > 0 and self.num_output_tokens + self.num_pending >= self.max_tokens

    @property
    def begun(self) -> bool:
        """Whether it, or the sequence among whose forks it is, has ever had blocks."""
        return (self.leader or self).cached_tokens is not None

    @property
    def finished(self) -> bool:
        """Whether it will get no more tokens."""
        return self.finish_reason is not None

    def check(self, max_model_len: int) -> None:
        """Makes sure that a sequence, with its forks, can ever run.

        Raises:
            ValueError: it is empty, could outgrow max_model_len, has forks but no new tokens, or has spans that are out
                of order or not within its prompt.
        """
        if self.prompt_length < 1 or self.max_tokens < 0:
            raise ValueError(
                f"{self.prompt_length} prompt tokens and {self.max_tokens} new ones; expected at least one prompt token"
            )
        if self.prompt_length + self.max_tokens > max_model_len:
            raise ValueError(
                f"{self.prompt_length} prompt tokens and {self.max_tokens} new ones "
                f"exceed the maximum length of a sequence, {max_model_len}"
            )
        if self.forks and self.max_tokens == 0:
            raise ValueError(f"{len(self.family)} samples with no new tokens; only one is allowed")
        begin = 0
        for span in self.spans:
            if span.start < begin or span.length < 1 or span.start + span.length > self.prompt_length:
                raise ValueError(
                    f"a span of {span.length} tokens from {span.start} on must hold a token, begin at {begin} or later "
                    f"and end within the {self.prompt_length} tokens of the prompt"
                )
            begin = span.start + span.length

    def hand_over(self, successor: "Sequence") -> None:
        """Gives its blocks and forks to a sequence of the same prompt; neither has output yet."""
        successor.forks, self.forks = self.forks, []
        successor.leader = None
        for fork in successor.forks:
            fork.leader = successor
        successor.block_table, self.block_table = self.block_table, []
        successor.steps_under_way, self.steps_under_way = self.steps_under_way, 0
        successor.continue_from(self)

    def continue_from(self, other: Self) -> None:
        """Takes over what is known of another sequence's prompt."""
        self.num_computed = other.num_computed
        self.cached_tokens = other.cached_tokens
        self._block_hashes = list(other._block_hashes)

    def block_hashes(self, count: int, block_size: int) -> Ids[bytes]:
        """The chain of hashes of its first `count` blocks, which must be full of known tokens."""
        hashes = self._block_hashes
        while len(hashes) < count:
            start = len(hashes) * block_size
            parent = hashes[-1] if hashes else self.cache_salt
            end = start + block_size
            spans = bytes_of_spans(self.spans, start, end) if self.spans else b""
            hashes.append(hash_block(parent, self.token_ids[start:end], spans))
        return hashes[:count]

    def spans_within(self, start: int, end: int) -> Ids[PromptSpan]:
        """The spans that overlap some of its tokens."""
        return spans_within(self.spans, start, end)

    def accept(self, drawn: list[int], guesses: Ids[int]) -> list[int]:
        """Takes the tokens drawn at the last known token and at guesses that follow it, as far as they count.

        A token counts if the guesses before it were right, and if no token before it ended the sequence.

        Args:
            drawn: one token, and one for each guess, or for the first ones.
            guesses: the tokens that were computed after the last known one.

        Returns:
            The tokens that it took, at least one.
        """
        taken = 0
        for place, token_id in enumerate(drawn):
            taken += 1
            if self.append(token_id) or place == len(guesses) or token_id != guesses[place]:
                break
        return drawn[:taken]

    def append(self, token_id: int) -> bool:
        """Takes the next sampled token and applies the stop rules; whether it was the last."""
        self.token_ids.append(token_id)
        if token_id in self.stop_token_ids:
            self.finish_reason = "stop"
        elif self.num_output_tokens >= self.max_tokens:
            self.finish_reason = "length"
        return self.finished
