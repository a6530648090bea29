"""The memory that guessing takes: never more than the plan says, and given back with the sequence."""

import tracemalloc
import weakref
from collections.abc import Sequence as Ids

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persimmon.server.engine import guess_memory, token_index
from persimmon.server.engine.guess_memory import MAX_INDEX_BYTES, MAX_SALTS, GuessMemory, guess_bytes, index_size
from persimmon.server.engine.guesses import Speculation
from persimmon.server.engine.proposers import Lookup, LookupProposer
from persimmon.server.engine.recent_answers import RecentAnswers
from persimmon.server.engine.token_index import TokenIndex
from persimmon.server.settings.speculation import SpeculativeConfig
from tests.server.engine.simulation import Simulation


@given(max_num_seqs=st.integers(1, 65536), max_model_len=st.integers(1, 1 << 20))
def test_indexes_stay_within_their_limit_however_many_and_long_sequences_are(
    max_num_seqs: int, max_model_len: int
) -> None:
    answers = MAX_SALTS * RecentAnswers.nbytes()
    assert guess_bytes(max_num_seqs, max_model_len) <= MAX_INDEX_BYTES + answers
    assert index_size(max_num_seqs, max_model_len) < 2 * max_model_len


def test_an_index_has_room_for_a_whole_sequence_where_the_limit_allows_it() -> None:
    assert index_size(256, 16384) == 16384
    assert index_size(8, 2000) == 2048


@settings(max_examples=20)
@given(lengths=st.lists(st.tuples(st.integers(1, 400), st.integers(1, 400)), min_size=1, max_size=8))
def test_sequences_take_no_more_than_planned(lengths: list[tuple[int, int]]) -> None:
    max_model_len = max(map(sum, lengths))
    planned = guess_bytes(len(lengths), max_model_len)
    tracemalloc.start()
    try:
        memory = GuessMemory(len(lengths), max_model_len)
        proposers = []
        for prompt_length, max_tokens in lengths:
            prompt = memory.index(prompt_length)
            proposer = LookupProposer(
                Lookup(4), memory, prompt=prompt, prompt_length=prompt_length, max_tokens=max_tokens
            )
            proposer.propose(range(prompt_length + max_tokens), 4)
            proposers.append(proposer)
        files = [tracemalloc.Filter(True, str(module.__file__)) for module in (guess_memory, token_index)]
        taken = tracemalloc.take_snapshot().filter_traces(files)
    finally:
        tracemalloc.stop()
    assert 0 < sum(trace.size for trace in taken.traces) <= planned


@pytest.mark.parametrize("method", ["ngram", "suffix", "auto"])
def test_only_sequences_that_run_are_indexed(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    indexes: weakref.WeakSet[TokenIndex] = weakref.WeakSet()
    make = GuessMemory.index

    def watched(memory: GuessMemory, num_tokens: int, known: int = 0) -> TokenIndex:
        index = make(memory, num_tokens, known)
        indexes.add(index)
        return index

    monkeypatch.setattr(GuessMemory, "index", watched)
    config = SpeculativeConfig(method=method, num_speculative_tokens=3)  # type: ignore[arg-type]
    simulation = Simulation(
        num_blocks=12, block_size=2, max_model_len=16, max_num_seqs=4, speculation=Speculation.of(config, 4, 16)
    )
    for number in range(12):
        simulation.add([number % 3, 1, 2, 1], 10, samples=1 + number % 3)
    most = 0
    while simulation.live:
        simulation.step()
        indexed = sum(filled(index) for index in indexes)
        most = max(most, indexed)
        # The prompt's and the answer's; of a sequence that has just begun there is none yet.
        assert indexed <= 2 * len(simulation.running)
    assert simulation.stats.preemptions > 0
    if method != "auto":  # which needs to know first what steps cost
        assert most > 0
    assert len(indexes) == 0


def filled(index: TokenIndex) -> bool:
    """Whether it takes memory."""
    tables: Ids[int] = vars(index)["_pairs"]
    return len(tables) > 0
