"""Which replica gets a prompt: the one that has computed its longest beginning, unless that one is busier by more.

Plain Python: knows bytes, and neither Ray nor HTTP nor tokens.

The rule: a replica costs the bytes of the prompt that it would have to compute, and REQUEST_BYTES for each request that
it is answering, but for those that the least busy one has too, and SLACK_REQUESTS; the cheapest one is chosen.  Between
equal ones it is the least busy, and then a hash of the prompt's beginning decides, so that proxies that do not know of
each other choose the same.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

REQUEST_BYTES = 512
"""What a request that is being answered costs the next one, in bytes of a prompt: about 128 tokens of English."""

SLACK_REQUESTS = 1
"""A proxy learns a moment late that a request has ended; a conversation's next turn may come first."""

BYTES_PER_TOKEN = 4
"""Of English text, about."""

MAX_PROMPT_BYTES = 256 * 1024
"""Prompts that are equal so far are taken for equal; 64k tokens of English."""

_FIRST_BYTES = 64
_KEY_BYTES = 8


def _ends() -> Iterator[int]:
    """Where the beginnings end: at first every 64 bytes, about a block of the cache; later every eighth of the way."""
    end = _FIRST_BYTES
    while end <= MAX_PROMPT_BYTES:
        yield end
        end += max(_FIRST_BYTES, end // 8 // _FIRST_BYTES * _FIRST_BYTES)


ENDS = tuple(_ends())
"""Bytes of the beginnings that have a key, in order."""


def prefix_keys(prompt: bytes, salt: bytes = b"") -> list[str]:
    """The keys of a prompt's beginnings, one for each of ENDS that is not beyond its end.

    Two prompts have equal keys as far as they are equal, in every process.

    Args:
        prompt: its text, as the request has it.
        salt: what else must be equal for the prompts to share a cache.
    """
    state = blake2b(salt, digest_size=_KEY_BYTES)
    state.update(len(salt).to_bytes(8, "little"))
    keys, start = [], 0
    view = memoryview(prompt)
    for end in ENDS:
        if end > len(prompt):
            break
        state.update(view[start:end])
        keys.append(state.copy().hexdigest())
        start = end
    return keys


class RecentPrefixes:
    """The beginnings of prompts that an engine has probably cached; the least recently used are forgotten.

    Args:
        max_bytes: of all beginnings together, what several prompts share counted once.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._sizes: OrderedDict[str, int] = OrderedDict()

    def add(self, keys: Sequence[str]) -> None:
        """The engine computes a prompt with these keys."""
        # The shortest beginning last: it is a part of all the others, and so the last to be forgotten.
        for index in reversed(range(min(len(keys), len(ENDS)))):
            key = keys[index]
            if key not in self._sizes:
                size = ENDS[index] - (ENDS[index - 1] if index else 0)
                self._sizes[key] = size
                self._bytes += size
            self._sizes.move_to_end(key)
        while self._bytes > self._max_bytes:
            _, size = self._sizes.popitem(last=False)
            self._bytes -= size

    def __contains__(self, key: str) -> bool:
        return key in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def latest(self, count: int) -> list[str]:
        """The keys used last, at most `count`, the last one first."""
        return [key for key, _ in zip(reversed(self._sizes), range(count), strict=False)]


def known_bytes(keys: Sequence[str], known: Iterable[RecentPrefixes | frozenset[str]]) -> int:
    """Bytes of the longest beginning that is known.

    Args:
        keys: of the prompt.
        known: places to look, each of which may know it.
    """
    places = list(known)
    for index in reversed(range(min(len(keys), len(ENDS)))):
        if any(keys[index] in place for place in places):
            return ENDS[index]
    return 0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replica that a prompt may go to.

    Attributes:
        name: unique among the candidates.
        known_bytes: of the prompt's beginning that it has computed.
        requests: that it is answering.
    """

    name: str
    known_bytes: int
    requests: int


def ranked(candidates: Iterable[Candidate], first_key: str) -> list[Candidate]:
    """The candidates, the best first.

    Args:
        candidates: in any order.
        first_key: of the prompt's shortest beginning, or anything that belongs to the request.
    """
    candidates = list(candidates)
    free = min((candidate.requests for candidate in candidates), default=0) + SLACK_REQUESTS

    def cost(candidate: Candidate) -> tuple[int, int, bytes]:
        busier = max(0, candidate.requests - free)
        tie = blake2b(f"{first_key} {candidate.name}".encode(), digest_size=_KEY_BYTES).digest()
        return busier * REQUEST_BYTES - candidate.known_bytes, candidate.requests, tie

    return sorted(candidates, key=cost)
