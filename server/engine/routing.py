"""Which of several engines gets a prompt: the one that will have computed it first, as far as that can be known.

Knows which block hashes each engine has in its prefix index, and how much each engine has to do; no clock, no sockets.

The rule: a prompt goes to the engine where the fewest tokens are to be computed until its own are: those of the prompts
before it, and those of its own that are not cached there.  So it goes where its longest prefix is cached, unless that
engine is the busier one by more than the prefix saves.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest

from persimmon.server.engine.blocks import block_hashes
from persimmon.server.engine.messages import PromptSpan, bytes_of_spans

SEQUENCE_TOKENS = 64
"""What a sequence in an engine counts for, in prompt tokens to compute: the tokens that it will still get, about.

Without it, all requests with a common prefix would go to the one engine that has it cached, though the others are idle.
"""

MAX_BLOCKS = 1 << 18
"""Blocks that are known of each engine, in some 30 MB of memory; of a larger index, the rest is not known."""


def tokens_to_compute(prompt_tokens: int, sequences: int) -> int:
    """What an engine has to do before a new prompt's tokens, in prompt tokens to compute.

    Args:
        prompt_tokens: of the prompts there, those that are not cached.
        sequences: there.
    """
    return prompt_tokens + SEQUENCE_TOKENS * sequences


@dataclass(eq=False, slots=True)
class Route:
    """The engine that is chosen for a prompt.

    Attributes:
        engine: its number.
        cached_tokens: tokens of the prompt that are cached there, or will be when the prompt's turn comes.
        token_ids: the prompt's.
        missing: the hash of the first block that no engine has cached; None where there is none.
        spans: start, length and content of the prompt's; it keeps no pixels, since a request may take minutes.
    """

    engine: int
    cached_tokens: int
    token_ids: Sequence[int]
    missing: bytes | None
    spans: Sequence[tuple[int, int, bytes]] = ()


class Router:
    """Chooses engines for the prompts of one API worker.

    Args:
        num_engines: how many engines there are.
        block_size: tokens in a block.
        first: the engine that is preferred at first where nothing else decides; workers should differ in it.
        max_blocks: blocks that are known of each engine.
    """

    def __init__(self, num_engines: int, block_size: int, first: int = 0, max_blocks: int = MAX_BLOCKS) -> None:
        self._num_engines = num_engines
        self._block_size = block_size
        self._max_blocks = max_blocks
        self._next = first % num_engines
        self._cached: list[set[bytes]] = [set() for _ in range(num_engines)]
        # Prompts that are being computed, or wait to be: by the first block that was cached nowhere, then by engine.
        self._coming: dict[bytes, dict[int, Route]] = {}

    def change(self, engine: int, entered: Iterable[bytes], left: Iterable[bytes]) -> None:
        """Takes notice of blocks that have entered or left an engine's prefix index."""
        cached = self._cached[engine]
        cached.difference_update(left)
        for block_hash in entered:
            if len(cached) >= self._max_blocks:
                return
            cached.add(block_hash)

    def forget(self, engine: int) -> None:
        """An engine has ended, and its cache with it."""
        self._cached[engine] = set()
        for missing in list(self._coming):
            coming = self._coming[missing]
            coming.pop(engine, None)
            if not coming:
                del self._coming[missing]

    def route(
        self,
        token_ids: Sequence[int],
        loads: Mapping[int, int],
        salt: bytes = b"",
        spans: Sequence[PromptSpan] = (),
    ) -> Route:
        """Chooses the engine for a prompt.

        Args:
            token_ids: the prompt's, as far as they may come from the prefix cache.  The last one is always computed.
            loads: of each engine that serves, the tokens that it has to compute before this prompt.
            salt: stands before the prompt's first block in the prefix cache.
            spans: the parts of the prompt that the embedding table does not embed, in order.

        Raises:
            ValueError: no engine serves.
        """
        if not loads:
            raise ValueError("no engine serves; at least one is expected in loads")
        cached, missing = self._lookup(token_ids, loads.keys(), salt, spans)

        def cost(engine: int) -> tuple[int, int, int]:
            load = loads[engine]
            return load - cached[engine], load, (engine - self._next) % self._num_engines

        engine = min(loads, key=cost)
        self._next = (engine + 1) % self._num_engines
        return Route(
            engine=engine,
            cached_tokens=cached[engine],
            token_ids=token_ids,
            missing=missing,
            spans=_without_pixels(spans),
        )

    def begin(self, route: Route) -> None:
        """The prompt of a route has been submitted: others with its prefix may follow it."""
        if route.missing is not None:
            self._coming.setdefault(route.missing, {}).setdefault(route.engine, route)

    def end(self, route: Route) -> None:
        """The request of a prompt has ended: what it left is in the engine's index, or nowhere."""
        if route.missing is None:
            return
        coming = self._coming.get(route.missing)
        if coming is not None and coming.get(route.engine) is route:
            del coming[route.engine]
            if not coming:
                del self._coming[route.missing]

    def _lookup(
        self, token_ids: Sequence[int], engines: Collection[int], salt: bytes, spans: Sequence[PromptSpan]
    ) -> tuple[dict[int, int], bytes | None]:
        """The tokens that each engine has cached, or will have; and the hash of the first block that none has."""
        size = self._block_size
        reusable = max(0, len(token_ids) - 1) // size * size
        cached = dict.fromkeys(engines, reusable)
        having = [(engine, self._cached[engine]) for engine in engines]
        tokens = 0
        for block_hash in block_hashes(token_ids, size, salt, partial(bytes_of_spans, spans) if spans else None):
            for _, known in having:
                if block_hash not in known:
                    break
            else:  # most blocks: those engines that have had all so far have this one too
                tokens += size
                continue
            for engine, known in having:
                if block_hash not in known:
                    cached[engine] = tokens
            having = [(engine, known) for engine, known in having if block_hash in known]
            if not having:
                for engine, other in self._coming.get(block_hash, {}).items():
                    if engine in cached:
                        common = _common_tokens(token_ids, other.token_ids, tokens, size)
                        differ = _first_difference(_without_pixels(spans), other.spans)
                        cached[engine] = min(common, reusable, common if differ is None else differ // size * size)
                return cached, block_hash
            tokens += size
        return cached, None


def _without_pixels(spans: Sequence[PromptSpan]) -> Sequence[tuple[int, int, bytes]]:
    return [(span.start, span.length, span.content) for span in spans]


def _first_difference(one: Sequence[tuple[int, int, bytes]], other: Sequence[tuple[int, int, bytes]]) -> int | None:
    """The first token from which two prompts have different spans; None where they have none."""
    for own, its in zip_longest(one, other):
        if own != its:
            return min(span[0] for span in (own, its) if span is not None)
    return None


def _common_tokens(one: Sequence[int], other: Sequence[int], begin: int, block_size: int) -> int:
    """Tokens in the blocks that two prompts have in common; they are equal up to `begin`, the begin of a block."""
    for place in range(begin, min(len(one), len(other)) - block_size + 1, block_size):
        if one[place : place + block_size] != other[place : place + block_size]:
            return place
    return max(begin, min(len(one), len(other)) // block_size * block_size)
