"""How long a step takes: learned from the steps that ran, as a sum of what each part of a step costs.

Plain arithmetic over figures that others measure; knows no clock, no scheduler and no device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, sqrt

MEMORY = 100
"""Further observations of the same kind after which one counts 1/e of what it did."""

GUESS_MEMORY = 256
"""Further steps without guesses after which what guesses cost counts 1/e of what it did: few trials correct it."""

ENOUGH = 8
"""Steps of a kind that must be observed before its cost is estimated."""

FIRST_CHUNK = 64
"""Tokens of chunks that run with decodes while nothing is known; then they at most double from step to step."""

OUTLIER = 4.0
"""A step's time counts up to this multiple of the expected time: if it took longer, something else was running."""

QUIET_SHARE = 0.75
"""Prompt chunks may make a step longer by this share of what it takes without them."""

PROMPTS_AS_ONE = 4
"""Up to this many prompts that are computed at once share the time of one; more get more, in proportion."""

SHARED_SECONDS = 0.2
"""Time that a step has for prompts while several clients share the engine: one that joins waits for the step's end."""

SHARED_FIXED_COSTS = 4.0
"""It has at least this multiple of what any step costs, so that a slow machine does not spend most of its time on that.
"""


@dataclass(frozen=True, slots=True)
class StepWork:
    """What a step computes.

    Attributes:
        decodes: sequences that compute one token.
        decode_context: tokens that those attend to, in all.
        chunk_tokens: tokens of prompt chunks.
        chunk_context: tokens that each of those attends to, in all.
        chunk_reach: tokens before each chunk, in all: they are read once for it, however short it is.
        guess_tokens: guesses that decoding sequences compute with their one token.
        guess_context: tokens that each of those attends to, in all.
    """

    decodes: int
    decode_context: int
    chunk_tokens: int = 0
    chunk_context: int = 0
    chunk_reach: int = 0
    guess_tokens: int = 0
    guess_context: int = 0

    @property
    def tokens(self) -> int:
        """Tokens that the step computes."""
        return self.decodes + self.chunk_tokens + self.guess_tokens


NO_WORK = StepWork(0, 0)


@dataclass(frozen=True, slots=True)
class GuessCosts:
    """What guesses cost, in seconds, and a step without them.

    Attributes:
        step, decode, decode_context: as of `StepCosts`.
        observed: whether steps with guesses were observed; else the others are 0.
        fixed: of having guesses at all.
        token: of a guess.
        context: of a token that it attends to.
    """

    step: float
    decode: float
    decode_context: float
    observed: bool = False
    fixed: float = 0.0
    token: float = 0.0
    context: float = 0.0

    def seconds(self, work: StepWork) -> float:
        """How much longer a step takes for its guesses, of which it has some."""
        return self.fixed + self.token * work.guess_tokens + self.context * work.guess_context


@dataclass(frozen=True, slots=True)
class StepCosts:
    """What the parts of a step cost, in seconds.

    Attributes:
        step: of any step.
        decode: of a sequence that decodes.
        decode_context: of a token that one of those attends to.
        chunks: of having prompt chunks at all.
        chunk_token: of a token of a chunk.
        chunk_context: of a token that one of those attends to.
        chunk_reach: of a token before a chunk.
        longest: limit on the time of a step that runs prompts with decodes; None leaves it to QUIET_SHARE.
        most_tokens: maximum tokens of chunks that run with decodes: more than twice what was tried lately would be a
            guess.
        guesses: what guesses cost; None while too little is known of steps without them.
    """

    step: float
    decode: float
    decode_context: float
    chunks: float
    chunk_token: float
    chunk_context: float
    chunk_reach: float = 0.0
    longest: float | None = None
    most_tokens: float = inf
    guesses: GuessCosts | None = None

    @property
    def shared_seconds(self) -> float:
        """The time that a step has for prompts while several clients share the engine."""
        return max(SHARED_SECONDS, SHARED_FIXED_COSTS * (self.step + self.chunks))

    def seconds(self, work: StepWork) -> float:
        """How long a step takes."""
        return (
            self.step
            + self.decode * work.decodes
            + self.decode_context * work.decode_context
            + (self.chunks if work.chunk_tokens else 0.0)
            + self.chunk_token * work.chunk_tokens
            + self.chunk_context * work.chunk_context
            + self.chunk_reach * work.chunk_reach
            + (self.guesses.seconds(work) if self.guesses is not None and work.guess_tokens else 0.0)
        )

    def chunk_tokens(self, decodes: int, prompts: int) -> float:
        """The tokens that chunks may have whatever they take; see `chunk_seconds`."""
        return self.most_tokens * self._crowding(decodes, prompts) if decodes else inf

    def chunk_seconds(self, decodes: int, decode_context: int, prompts: int) -> float:
        """The time that a step has for prompt chunks.

        Decoding sequences wait for it.  It is longer while many prompts are being computed.  If it were not, then under
        steady load prompts would pile up until few sequences decode, and on a GPU, where a step of few takes nearly as
        long as one of many, throughput would halve.

        Args:
            decodes: sequences that decode in the step.
            decode_context: tokens that those attend to, in all.
            prompts: that are being computed.
        """
        if decodes == 0:
            return inf
        quiet = self.step + self.decode * decodes + self.decode_context * decode_context
        share = QUIET_SHARE * quiet if self.longest is None else self.longest - quiet
        return share * self._crowding(decodes, prompts) - self.chunks

    def _crowding(self, decodes: int, prompts: int) -> float:
        """What the time for prompts is multiplied by.

        An explicit limit gives way only where more prompts are being computed than sequences decode: otherwise the
        first of many who come together would hold up all others.
        """
        crowding = max(1.0, prompts / decodes)
        return crowding if self.longest is not None else max(crowding, prompts / PROMPTS_AS_ONE)

    def reach(self, start: int) -> float:
        """Seconds that a chunk after `start` tokens takes however short it is."""
        return self.chunk_reach * start

    def chunk(self, tokens: float, start: int) -> float:
        """Seconds that `tokens` tokens of a chunk after `start` others take in addition to that."""
        return tokens * (self.chunk_token + self.chunk_context * (start + tokens / 2))

    def affordable(self, seconds: float, start: int) -> float:
        """How many tokens after `start` others take no longer than this, in addition to `reach`."""
        if self.chunk_token == 0 and self.chunk_context == 0:
            return inf
        if seconds <= 0:
            return 0
        half, each = self.chunk_context / 2, self.chunk_token + self.chunk_context * start
        if seconds == inf or each == 0:
            return inf
        # The positive solution of half * n^2 + each * n = seconds, in the form that does not cancel.
        return 2 * seconds / (each + sqrt(each * each + 4 * half * seconds))


class StepCostModel:
    """Learns `StepCosts` as the server runs.

    Steps without chunks and guesses teach what steps and decodes cost; steps with chunks teach, by what they take
    beyond that, what chunks cost, and steps with guesses what those cost.  Small fits instead of one large one, because
    while no prompts come theirs learns nothing and must not forget.

    Args:
        longest: see `StepCosts`.
    """

    def __init__(self, longest: float | None = None) -> None:
        self._longest = longest
        # Contexts count by the thousand, so that all figures are of similar size.
        self._quiet = LinearFit(3)
        self._chunks = LinearFit(4)
        self._guesses = LinearFit(3)
        self._most_tokens = float(FIRST_CHUNK)

    def observe(self, work: StepWork, seconds: float) -> None:
        """Takes notice of a step that ran."""
        quiet = (1.0, float(work.decodes), work.decode_context / 1000)
        if work.chunk_tokens == 0 and work.guess_tokens == 0:
            self._quiet.observe(quiet, seconds)
            self._guesses.fade(1 - 1 / GUESS_MEMORY)
            return
        expected = self._quiet.predict(quiet)
        guesses = (1.0, float(work.guess_tokens), work.guess_context / 1000)
        if work.chunk_tokens == 0:
            self._guesses.observe(guesses, max(0.0, seconds - expected), base=expected)
        else:
            if work.guess_tokens:
                expected += self._guesses.predict(guesses)
            if work.decodes > 0 and min(self._quiet.seen, self._chunks.seen) >= ENOUGH:
                self._most_tokens = max(FIRST_CHUNK, 2 * work.chunk_tokens, 0.95 * self._most_tokens)
            chunks = (1.0, float(work.chunk_tokens), work.chunk_context / 1000, work.chunk_reach / 1000)
            self._chunks.observe(chunks, max(0.0, seconds - expected), base=expected)

    @property
    def costs(self) -> StepCosts:
        """What is known now; while that is too little, the time does not count and chunks remain short."""
        guesses = self._guess_costs()
        if min(self._quiet.seen, self._chunks.seen) < ENOUGH:
            return StepCosts(
                step=0,
                decode=0,
                decode_context=0,
                chunks=0,
                chunk_token=0,
                chunk_context=0,
                most_tokens=FIRST_CHUNK,
                guesses=guesses,
            )
        step, decode, decode_context = self._quiet.coefficients
        chunks, chunk_token, chunk_context, chunk_reach = self._chunks.coefficients
        return StepCosts(
            step=step,
            decode=decode,
            decode_context=decode_context / 1000,
            chunks=chunks,
            chunk_token=chunk_token,
            chunk_context=chunk_context / 1000,
            chunk_reach=chunk_reach / 1000,
            longest=self._longest,
            most_tokens=self._most_tokens,
            guesses=guesses,
        )

    def _guess_costs(self) -> GuessCosts | None:
        if self._quiet.seen < ENOUGH:
            return None
        step, decode, context = self._quiet.coefficients
        if self._guesses.seen < ENOUGH:
            return GuessCosts(step=step, decode=decode, decode_context=context / 1000)
        fixed, token, guess_context = self._guesses.coefficients
        return GuessCosts(
            step=step,
            decode=decode,
            decode_context=context / 1000,
            observed=True,
            fixed=fixed,
            token=token,
            context=guess_context / 1000,
        )


class LinearFit:
    """Least squares of relative errors without negative coefficients; old observations fade.

    Args:
        size: coefficients.

    Attributes:
        seen: observations so far.
    """

    def __init__(self, size: int) -> None:
        self.seen = 0
        self._size = size
        self._products = [[0.0] * size for _ in range(size)]
        self._targets = [0.0] * size
        self._coefficients: list[float] | None = [0.0] * size

    @property
    def coefficients(self) -> list[float]:
        """The fit to what was seen."""
        if self._coefficients is None:
            self._coefficients = self._solve()
        return self._coefficients

    def predict(self, features: Sequence[float]) -> float:
        """What the fit expects."""
        return sum(own * feature for own, feature in zip(self.coefficients, features, strict=True))

    def observe(self, features: Sequence[float], value: float, base: float = 0.0) -> None:
        """Takes notice of a value.

        Args:
            features: what it follows from.
            value: at least 0.
            base: what it comes on top of.
        """
        if self.seen >= ENOUGH:
            value = min(value, OUTLIER * max(base + self.predict(features), 1e-6) - base)
        keep = 1 - 1 / MEMORY
        # Errors count in relation to the whole: a short step's microsecond is as good as a long one's millisecond.  The
        # base may be wrong; in relation to the value only, one that was too large would make a value of 0 count most.
        weight = 1 / max(base + value, 1e-4) ** 2
        for row, own in enumerate(features):
            products = self._products[row]
            for column, other in enumerate(features):
                products[column] = keep * products[column] + weight * own * other
            self._targets[row] = keep * self._targets[row] + weight * own * value
        self.seen += 1
        self._coefficients = None

    def fade(self, keep: float) -> None:
        """Lets what was seen count less, next to what will be."""
        self._products = [[keep * own for own in row] for row in self._products]
        self._targets = [keep * own for own in self._targets]

    def _solve(self) -> list[float]:
        """The normal equations' solution with the coefficients that would be negative left out, the worst first."""
        kept = [index for index in range(self._size) if self._products[index][index] > 0]
        while kept:
            solution = _solve([[self._products[i][j] for j in kept] for i in kept], [self._targets[i] for i in kept])
            worst = min(range(len(kept)), key=lambda index: solution[index] * self._products[kept[index]][kept[index]])
            if solution[worst] >= 0:
                found = dict(zip(kept, solution, strict=True))
                return [found.get(index, 0.0) for index in range(self._size)]
            del kept[worst]
        return [0.0] * self._size


def _solve(matrix: list[list[float]], targets: list[float]) -> list[float]:
    """Solves symmetric equations, with a little added to the diagonal for features that cannot be distinguished."""
    size = len(targets)
    rows = [[*row, target] for row, target in zip(matrix, targets, strict=True)]
    for index in range(size):
        rows[index][index] *= 1 + 1e-6
    for index in range(size):
        for below in range(index + 1, size):
            factor = rows[below][index] / rows[index][index]
            rows[below] = [own - factor * pivot for own, pivot in zip(rows[below], rows[index], strict=True)]
    solution = [0.0] * size
    for index in reversed(range(size)):
        known = sum(rows[index][column] * solution[column] for column in range(index + 1, size))
        solution[index] = (rows[index][size] - known) / rows[index][index]
    return solution
