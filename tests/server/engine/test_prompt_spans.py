"""Spans of a prompt that something other than the table embeds: prompts share a block if all of it is equal."""

from functools import partial

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from persimmon.server.engine.blocks import BlockPool, block_hashes
from persimmon.server.engine.messages import PromptSpan, Submit, ToEngine, bytes_of_spans
from persimmon.server.engine.routing import Router
from persimmon.server.engine.scheduler import Scheduler
from persimmon.server.engine.sequence import Sequence

BLOCK_SIZE = 4
PLACEHOLDER = 7


def scheduler() -> Scheduler:
    return Scheduler(BlockPool(64, BLOCK_SIZE), max_num_seqs=4, max_num_batched_tokens=64, max_model_len=64)


def span(start: int, length: int, content: bytes) -> PromptSpan:
    return PromptSpan(start=start, length=length, content=content)


@st.composite
def spans(draw: st.DrawFn, prompt_length: int) -> list[PromptSpan]:
    """Some that may be equal to those of another prompt, or begin elsewhere, or hold something else."""
    found: list[PromptSpan] = []
    begin = 0
    while begin < prompt_length and draw(st.booleans()):
        start = draw(st.integers(begin, min(begin + 5, prompt_length - 1)))
        length = draw(st.integers(1, min(6, prompt_length - start)))
        found.append(span(start, length, draw(st.sampled_from([b"cat", b"dog", b"", b"cat\0"]))))
        begin = start + length
    return found


@st.composite
def prompts(draw: st.DrawFn) -> tuple[list[int], list[PromptSpan], list[PromptSpan]]:
    length = draw(st.integers(1, 24))
    own = draw(spans(length))
    return [PLACEHOLDER] * length, own, draw(st.one_of(st.just(own), spans(length)))


def embedded(token_ids: list[int], spans: list[PromptSpan]) -> list[object]:
    """What stands at each position."""
    positions: list[object] = list(token_ids)
    for own in spans:
        for place in range(own.length):
            positions[own.start + place] = (own.content, place, own.length)
    return positions


def run(scheduler: Scheduler, sequence: Sequence) -> None:
    scheduler.add(sequence)
    plan = scheduler.plan()
    scheduler.commit(plan, [[1]])


@given(prompts())
def test_blocks_are_shared_as_far_as_tokens_and_contents_are_equal(
    prompt: tuple[list[int], list[PromptSpan], list[PromptSpan]],
) -> None:
    token_ids, first, second = prompt
    engine = scheduler()
    run(engine, Sequence("first", list(token_ids), 1, spans=first))
    other = Sequence("second", list(token_ids), 1, spans=second)
    run(engine, other)
    pairs = zip(embedded(token_ids, first), embedded(token_ids, second), strict=True)
    equal = next((place for place, (own, its) in enumerate(pairs) if own != its), len(token_ids))
    # The last token is always computed.
    assert other.cached_tokens == min(equal, len(token_ids) - 1) // BLOCK_SIZE * BLOCK_SIZE


def test_a_prompt_without_spans_keeps_its_hashes() -> None:
    token_ids = list(range(9))
    plain, spanned = Sequence(1, token_ids, 1), Sequence(2, token_ids, 1, spans=[span(8, 1, b"cat")])
    assert plain.block_hashes(2, BLOCK_SIZE) == spanned.block_hashes(2, BLOCK_SIZE)


@pytest.mark.parametrize(
    "wrong",
    [
        [span(-1, 2, b"")],
        [span(3, 0, b"")],
        [span(3, 6, b"")],
        [span(0, 3, b""), span(2, 1, b"")],
        [span(4, 1, b""), span(0, 1, b"")],
    ],
)
def test_spans_that_are_not_parts_of_the_prompt_in_order_are_refused(wrong: list[PromptSpan]) -> None:
    with pytest.raises(ValueError, match="must hold a token, begin at"):
        scheduler().check(Sequence("key", [PLACEHOLDER] * 8, 1, spans=wrong))


def test_an_engine_is_chosen_by_the_hashes_of_its_sequences() -> None:
    token_ids = [PLACEHOLDER] * 23
    own = [span(1, 2, b"cat"), span(3, 7, b"dog"), span(15, 1, b"cat"), span(20, 3, b"dog")]
    hashes = Sequence("key", token_ids, 1, spans=own).block_hashes(5, BLOCK_SIZE)
    assert list(block_hashes(token_ids, BLOCK_SIZE, spans=partial(bytes_of_spans, own))) == hashes


@given(prompts(), prompts())
def test_a_prompt_that_is_being_computed_counts_up_to_the_first_difference(
    one: tuple[list[int], list[PromptSpan], list[PromptSpan]], two: tuple[list[int], list[PromptSpan], list[PromptSpan]]
) -> None:
    router = Router(1, BLOCK_SIZE)
    (token_ids, first, _), (other_ids, _, second) = one, two
    router.begin(router.route(token_ids, {0: 0}, spans=first))
    length = min(len(token_ids), len(other_ids))
    pairs = zip(embedded(token_ids, first)[:length], embedded(other_ids, second)[:length], strict=True)
    equal = next((place for place, (own, its) in enumerate(pairs) if own != its), length)
    expected = min(equal, len(other_ids) - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert router.route(other_ids, {0: 0}, spans=second).cached_tokens == expected


def test_spans_reach_the_engine() -> None:
    own = PromptSpan(start=2, length=3, content=b"cat", pixels=bytes(range(9)))
    submit = Submit(token_ids=[PLACEHOLDER] * 8, spans=[own], max_tokens=1)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(submit), type=ToEngine) == submit
