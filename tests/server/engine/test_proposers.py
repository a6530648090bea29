"""Proposers: what followed the last tokens earlier, as a search through the whole sequence finds it."""

from collections.abc import Sequence as Ids
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from persimmon.server.engine.acceptance import KIND_OF, Acceptance, first_rates
from persimmon.server.engine.guess_memory import MAX_INDEXED, GuessMemory
from persimmon.server.engine.proposers import Lookup, LookupProposer
from persimmon.server.engine.token_index import MAX_PLACES, TokenIndex

VOCABULARY = 3
TOKENS = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=40)
PIECES = st.lists(TOKENS, min_size=1, max_size=8)
LOOKUPS = st.builds(
    lambda most, shortest, more, as_many: Lookup(most, shortest, shortest + more, as_many),
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(0, 5),
    st.booleans(),
)


def common(token_ids: Ids[int], end: int, most: int) -> int:
    """How many of the last tokens, at most, stand before a place too."""
    count = 0
    while count < min(end, most) and token_ids[end - 1 - count] == token_ids[len(token_ids) - 1 - count]:
        count += 1
    return count


def continued(token_ids: Ids[int], end: int, count: int) -> list[int]:
    """What follows from `end` on; the sequence itself goes on as it does from there."""
    known = list(token_ids)
    for place in range(count):
        known.append(known[end + place])
    return known[len(token_ids) :]


def best_place(token_ids: Ids[int], places: range, longest: int) -> tuple[int, int]:
    """Of some places, the one that most of the last tokens precede, among the last few where two of them do."""
    matched = {end: common(token_ids, end, longest) for end in reversed(places)}
    pairs = [end for end in matched if matched[end] >= 2][:MAX_PLACES]
    singles = [end for end in matched if matched[end] >= 1]
    found = max(pairs, key=lambda end: (matched[end], end)) if pairs else (singles or [0])[0]
    return found, matched.get(found, 0)


@dataclass
class Searching:
    """A proposer by definition, which searches through the sequence."""

    lookup: Lookup
    prompt_length: int
    known: int = 0
    place: int = 0
    matched: int = 0

    def propose(self, token_ids: list[int], count: int) -> list[int]:
        known = max(self.known, self.prompt_length)
        for position in range(known, len(token_ids)):
            if self.matched:
                self.follow(token_ids, position)
        if not self.matched and len(token_ids) > known:
            self.find(token_ids)
        self.known = len(token_ids)
        if self.matched < self.lookup.shortest:
            return []
        most = min(self.lookup.max_guesses, count, self.matched if self.lookup.as_many_as_matched else count)
        return continued(token_ids, self.place, most)

    def follow(self, token_ids: list[int], position: int) -> None:
        right = token_ids[self.place] == token_ids[position]
        self.place += 1
        self.matched = min(self.matched + 1, self.lookup.longest) if right else 0

    def find(self, token_ids: list[int]) -> None:
        longest = self.lookup.longest
        self.place, self.matched = best_place(token_ids, range(self.prompt_length + 1, len(token_ids)), longest)
        place, matched = best_place(token_ids, range(1, self.prompt_length + 1), longest)
        if matched > self.matched:
            self.place, self.matched = place, matched


def proposer_of(
    lookup: Lookup, memory: GuessMemory, prompt_length: int = 0, acceptance: Acceptance | None = None
) -> LookupProposer:
    """With room for 1,024 tokens of prompt and answer each, so that no place is replaced by another."""
    prompt = memory.index(1024)
    return LookupProposer(
        lookup, memory, prompt=prompt, prompt_length=prompt_length, max_tokens=1024, acceptance=acceptance
    )


@given(prompt=st.just([]) | TOKENS, pieces=PIECES, lookup=LOOKUPS, count=st.integers(1, 9))
def test_what_followed_the_last_tokens_earlier_is_proposed(
    prompt: list[int], pieces: list[list[int]], lookup: Lookup, count: int
) -> None:
    proposer = proposer_of(lookup, GuessMemory(8, 4096), len(prompt))
    expected = Searching(lookup, len(prompt))
    known = list(prompt)
    for piece in pieces:
        known += piece
        assert list(proposer.propose(known, count).token_ids) == expected.propose(known, count)


@given(size=st.sampled_from([1, 2, 8, 32]), pieces=PIECES, prompt_length=st.integers(0, 30))
def test_a_small_index_forgets_but_proposes_only_what_followed(
    size: int, pieces: list[list[int]], prompt_length: int
) -> None:
    token_ids = [token_id for piece in pieces for token_id in piece]
    prompt_length = min(prompt_length, len(token_ids) - 1)
    memory = GuessMemory(8, size)
    proposer = LookupProposer(
        Lookup(5), memory, prompt=memory.index(size), prompt_length=prompt_length, max_tokens=size
    )
    for end in range(prompt_length + 1, len(token_ids) + 1):
        known = token_ids[:end]
        proposed = proposer.propose(known, 5)
        if proposed.token_ids:
            places = [place for place in range(1, end) if common(known, place, 32) >= proposed.matched]
            assert proposed.token_ids in [continued(known, place, 5) for place in places]


def test_it_prefers_what_followed_lately() -> None:
    proposer = proposer_of(Lookup(3), GuessMemory(8, 4096))
    known = [1, 2, 3, 1, 2]
    assert list(proposer.propose(known, 1).token_ids) == [3]
    known += [4, 1, 2]
    assert list(proposer.propose(known, 1).token_ids) == [4]


def test_nothing_is_proposed_where_nothing_repeats() -> None:
    assert list(proposer_of(Lookup(5), GuessMemory(8, 4096)).propose(list(range(50)), 5).token_ids) == []


def test_steps_take_in_a_long_prompt_piece_by_piece() -> None:
    memory = GuessMemory(8, 2 * MAX_INDEXED)
    known = [*range(MAX_INDEXED + 3), 5, 6, 7]
    proposer = LookupProposer(
        Lookup(3), memory, prompt=memory.index(len(known)), prompt_length=len(known) - 1, max_tokens=8
    )
    assert list(proposer.propose(known, 3).token_ids) == []
    memory.begin_step()
    assert list(proposer.propose(known, 3).token_ids) == [8, 9, 10]


def test_samples_of_a_prompt_take_it_in_once() -> None:
    memory = GuessMemory(8, 2048)
    known = [*range(1000), 5, 6, 7]
    prompt = memory.index(1002)
    samples = [LookupProposer(Lookup(3), memory, prompt=prompt, prompt_length=1002, max_tokens=8) for _ in range(2)]
    assert [list(sample.propose(known, 3).token_ids) for sample in samples] == [[8, 9, 10]] * 2
    assert memory.left == MAX_INDEXED - 1002 - 2


def test_it_learns_whether_the_expected_tokens_come() -> None:
    acceptance = Acceptance(first_rates())
    proposer = proposer_of(Lookup(4), GuessMemory(8, 4096), acceptance=acceptance)
    known = [1, 2, 3, 4] * 3
    proposer.propose(known, 4)
    before = list(acceptance.rates)
    known += [1, 2]
    proposer.propose(known, 4)
    assert acceptance.rates[KIND_OF[8]] > before[KIND_OF[8]], "what was expected came"
    before = list(acceptance.rates)
    known += [7]
    proposer.propose(known, 4)
    assert acceptance.rates[KIND_OF[10]] < before[KIND_OF[10]], "something else came"


def test_an_index_takes_no_memory_before_it_has_a_token() -> None:
    index = TokenIndex(1 << 20)
    assert index.find([1], [1], 1, 4) == (0, 0)
    assert vars(index)["_pairs"].buffer_info()[1] == 0
