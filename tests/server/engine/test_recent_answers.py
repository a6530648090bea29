"""Recent answers: what followed the last tokens in an answer of the same cache salt, and of no other."""

import tracemalloc
from collections.abc import Sequence as Ids

from hypothesis import given, settings
from hypothesis import strategies as st

from persimmon.server.engine import recent_answers, token_index
from persimmon.server.engine.blocks import BlockPool
from persimmon.server.engine.guess_memory import MAX_INDEXED, MAX_SALTS, GuessMemory
from persimmon.server.engine.guesses import Guesses, Speculation
from persimmon.server.engine.recent_answers import MAX_EXPECTED, RECENT_TOKENS, RecentAnswers
from persimmon.server.engine.sequence import Sequence
from persimmon.server.settings.speculation import SpeculativeConfig

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=12)
ANSWERS = st.lists(TOKENS, min_size=1, max_size=12)


def matching(answer: Ids[int], end: int, token_ids: Ids[int], longest: int) -> int:
    """How many of a sequence's last tokens, at most, stand before a place in an answer."""
    count = 0
    while count < min(end, len(token_ids), longest) and answer[end - 1 - count] == token_ids[-1 - count]:
        count += 1
    return count


@given(answers=ANSWERS, token_ids=TOKENS, size=st.sampled_from([64, 256]), longest=st.integers(1, 9))
def test_what_followed_in_an_answer_that_is_kept_is_found(
    answers: list[list[int]], token_ids: list[int], size: int, longest: int
) -> None:
    recent = RecentAnswers(size)
    for answer in answers:
        recent.add(answer)
    recent.index(1000)
    followed, matched = recent.find(token_ids, len(token_ids), longest, 0)
    kept = [answer[-(size // 4) :] for answer in answers]
    places = [(answer, end) for answer in kept for end in range(1, len(answer))]
    best = max((matching(answer, end, token_ids, longest) for answer, end in places), default=0)
    if followed:
        assert 1 <= matched <= best
        # A place may be followed by less than what followed it at first, where other answers have replaced the rest.
        assert any(
            matching(answer, end, token_ids, matched) == matched and answer[end:][: len(followed)] == list(followed)
            for answer, end in places
        )
    elif sum(map(len, answers)) + len(answers) <= size:
        # Only the last places are looked at, and at some of them the answer ended.
        assert best == 0 or any(matching(answer, len(answer), token_ids, longest) for answer in answers)


def test_the_longest_match_counts_and_no_shorter_one_than_is_known() -> None:
    recent = RecentAnswers(256)
    recent.add([1, 2, 3, 4, 5])
    recent.add([9, 3, 4, 6])
    assert recent.find([2, 3, 4], 3, 32, 0) == ((), 0), "not indexed yet"
    recent.index(1000)
    assert recent.find([2, 3, 4], 3, 32, 0) == ([5], 3)
    assert recent.find([7, 3, 4], 3, 32, 0) == ([6], 2)
    assert recent.find([7, 3, 4], 3, 32, 2) == ((), 2)
    assert recent.find([4, 5], 2, 32, 0) == ((), 0), "there the answer ended"


def test_a_long_answer_is_kept_in_part() -> None:
    recent = RecentAnswers(1024)
    recent.add(range(5000))
    recent.index(1000)
    assert recent.find([4800], 1, 32, 0) == (list(range(4801, 4801 + MAX_EXPECTED)), 1)
    assert recent.find([4700], 1, 32, 0) == ((), 0)


def test_the_oldest_answers_and_salts_are_forgotten() -> None:
    recent = RecentAnswers(64)
    for number in range(20):
        recent.add([number, 100 + number, 200 + number])
        recent.index(1000)
    assert recent.find([19], 1, 32, 0) == ([119, 219], 1)
    assert recent.find([0], 1, 32, 0) == ((), 0)
    memory = GuessMemory(8, 512)
    for salt in range(MAX_SALTS):
        memory.remember(bytes([salt]), [1, 2, 3])
    memory.remember(b"\0", [1, 2, 3])
    memory.remember(b"new", [1, 2, 3])
    assert memory.answers(b"\0") is not None
    assert memory.answers(b"\1") is None


def test_a_step_indexes_a_bounded_number_of_tokens() -> None:
    memory = GuessMemory(8, 512)
    for _ in range(5):
        memory.remember(b"", range(3000))
    answers = memory.answers(b"")
    assert answers is not None
    assert answers.num_unindexed == 5 * 3001 - MAX_INDEXED
    memory.begin_step()
    memory.answers(b"")
    assert answers.num_unindexed == 0


class Engine:
    """Sequences that get their tokens in turn, and what is guessed for them."""

    def __init__(self) -> None:
        config = SpeculativeConfig(method="suffix", num_speculative_tokens=6)
        self._guesses = Guesses(
            BlockPool(8, 16), max_num_seqs=8, max_num_batched_tokens=64, speculation=Speculation.of(config, 8, 512)
        )

    def run(self, salt: bytes, prompt: list[int], answer: list[int]) -> list[list[int]]:
        """What is proposed before each token of the answer but the first."""
        sequence = Sequence(key=0, token_ids=list(prompt), max_tokens=len(answer), cache_salt=salt)
        self._guesses.begin(sequence)
        proposed = []
        for token_id in answer:
            sequence.append(token_id)
            if sequence.proposer is not None:
                proposed.append(list(sequence.proposer.propose(sequence.token_ids, 6).token_ids))
        self._guesses.release(sequence)
        return proposed


REQUESTS = st.lists(st.tuples(st.sampled_from([b"", b"one", b"two"]), TOKENS, TOKENS), min_size=1, max_size=8)


@given(requests=REQUESTS)
def test_what_is_guessed_for_one_salt_does_not_depend_on_others(
    requests: list[tuple[bytes, list[int], list[int]]],
) -> None:
    shared = Engine()
    alone = {salt: Engine() for salt, _, _ in requests}
    for salt, prompt, answer in requests:
        assert shared.run(salt, prompt, answer) == alone[salt].run(salt, prompt, answer)


def test_an_answer_is_guessed_from_the_last_one_to_the_same_prompt() -> None:
    engine = Engine()
    prompt, answer = [50, 51, 52], [60, 61, 62, 63, 64, 65]
    assert engine.run(b"one", prompt, answer)[:2] == [[], []]
    assert engine.run(b"one", prompt, answer)[:2] == [[61, 62, 63, 64], [62, 63, 64, 65]]
    assert engine.run(b"two", prompt, answer)[:2] == [[], []]


@settings(max_examples=5)
@given(lengths=st.lists(st.integers(1, 5000), min_size=1, max_size=12))
def test_answers_take_no_more_than_planned(lengths: list[int]) -> None:
    files = [tracemalloc.Filter(True, str(module.__file__)) for module in (recent_answers, token_index)]
    tracemalloc.start()
    try:
        recent = RecentAnswers()
        for length in lengths:
            recent.add(range(length))
            recent.index(RECENT_TOKENS)
        taken = tracemalloc.take_snapshot().filter_traces(files)
    finally:
        tracemalloc.stop()
    assert 0 < sum(trace.size for trace in taken.traces) <= RecentAnswers.nbytes()
