"""Stop strings: where a text that comes in pieces ends, and how much of it is certain before that.

Knows nothing of tokens or requests.
"""

from collections import deque
from collections.abc import Sequence


class StopStrings:
    """The strings that end a text, as an automaton that all of a request's samples share.

    The automaton is Aho and Corasick's (1975).  A state stands for the longest end of the text so far that begins
    some stop string; state 0 for the empty one.

    Args:
        strings: none of them empty.  With no strings nothing ever matches.

    Attributes:
        depths: for each state, the characters of the text that it stands for.
        match_lengths: for each state, the length of the longest stop string that ends there, or 0.
        beginnings: the strings' first characters.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        if not all(strings):
            raise ValueError("a stop string is empty and would end every answer before its first character")
        self._next: list[dict[str, int]] = [{}]
        self._fallbacks = [0]
        self.depths = [0]
        self.match_lengths = [0]
        for string in strings:
            self._add(string)
        self._link()
        self.beginnings = frozenset(self._next[0])

    def __bool__(self) -> bool:
        return len(self.depths) > 1

    def step(self, state: int, character: str) -> int:
        """The state after one more character."""
        while (after := self._next[state].get(character)) is None:
            if state == 0:
                return 0
            state = self._fallbacks[state]
        return after

    def _add(self, string: str) -> None:
        state = 0
        for depth, character in enumerate(string, 1):
            after = self._next[state].get(character)
            if after is None:
                after = self._next[state][character] = len(self._next)
                self._next.append({})
                self._fallbacks.append(0)
                self.depths.append(depth)
                self.match_lengths.append(0)
            state = after
        self.match_lengths[state] = len(string)

    def _link(self) -> None:
        # By growing depth: a state's fallback is shallower, so its own fallback and match are already known.
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            for character, after in self._next[state].items():
                self._fallbacks[after] = self.step(self._fallbacks[state], character)
                queue.append(after)
            self.match_lengths[state] = self.match_lengths[state] or self.match_lengths[self._fallbacks[state]]


class StopChecker:
    """Finds where one text ends while it arrives, and lets through only what is certain to be part of it.

    The match that is complete first wins; of those complete at the same character, the one that began first.
    What comes out, all together, is the text before that match, or the whole text if there is none.  Held
    back is the longest end of the text that begins a stop string, and nothing else.

    Args:
        strings: shared by all samples of a request.

    Attributes:
        matched: whether a stop string has come; the text has ended then.
    """

    def __init__(self, strings: StopStrings) -> None:
        self.matched = False
        self._strings = strings
        self._state = 0
        self._held = ""

    @property
    def held(self) -> str:
        """What was taken in and not let out: a proper beginning of a stop string."""
        return self._held

    def push(self, text: str) -> str:
        """Takes the next piece of the text; what is certain now, perhaps nothing."""
        if self.matched:
            return ""
        strings = self._strings
        if not strings:
            return text
        state = self._state
        if state == 0 and strings.beginnings.isdisjoint(text):
            return text  # as most do, and this is several times faster than the loop
        known = self._held + text
        for end, character in enumerate(text, len(self._held) + 1):
            state = strings.step(state, character)
            if length := strings.match_lengths[state]:
                self.matched = True
                self._held = ""
                return known[: end - length]
        self._state = state
        certain = len(known) - strings.depths[state]
        self._held = known[certain:]
        return known[:certain]

    def finish(self) -> str:
        """The text has ended without a further piece; what was held back."""
        held, self._held = self._held, ""
        return held
