"""Which replica gets a prompt: properties of the keys, of what is remembered, and of the choice."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from persimmon.server.ray.prefixes import (
    ENDS,
    MAX_PROMPT_BYTES,
    REQUEST_BYTES,
    SLACK_REQUESTS,
    Candidate,
    RecentPrefixes,
    known_bytes,
    prefix_keys,
    ranked,
)

TEXTS = st.binary(max_size=3000)
# Few texts, so that prompts share beginnings.
PROMPTS = st.lists(st.sampled_from([b"a" * 40, b"b" * 64, b"c" * 200]), max_size=12).map(b"".join)


@given(PROMPTS, PROMPTS)
def test_two_prompts_have_equal_keys_as_far_as_they_are_equal(one: bytes, other: bytes):
    same = next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
    same = min(len(one), len(other)) if same is None else same
    for end, key, another in zip(ENDS, prefix_keys(one), prefix_keys(other), strict=False):
        assert (key == another) == (end <= same)


@given(TEXTS, TEXTS, TEXTS)
def test_prompts_with_different_salts_share_no_key(prompt: bytes, salt: bytes, other: bytes):
    shared = set(prefix_keys(prompt, salt)) & set(prefix_keys(prompt, other))
    assert shared == (set(prefix_keys(prompt, salt)) if salt == other else set())


def test_the_keys_are_the_same_in_every_process():
    assert prefix_keys(b"x" * 130, b"salt") == ["073f30c5aa407aa7", "f7499630eb508fb6"]


def test_a_long_prompt_has_few_keys_and_the_longest_is_never_far_from_its_end():
    assert len(prefix_keys(b"x" * 2 * MAX_PROMPT_BYTES)) == len(ENDS) < 80
    assert all(later - earlier <= max(64, earlier // 8) for earlier, later in itertools.pairwise(ENDS))


@given(st.lists(PROMPTS, max_size=20), st.integers(0, 5000))
def test_what_is_remembered_is_bounded_and_whole(prompts: list[bytes], max_bytes: int):
    recent = RecentPrefixes(max_bytes)
    for prompt in prompts:
        recent.add(prefix_keys(prompt))
    kept = {key for prompt in prompts for key in prefix_keys(prompt) if key in recent}
    assert len(kept) == len(recent)
    sizes = {
        key: end - start
        for prompt in prompts
        for key, end, start in zip(prefix_keys(prompt), ENDS, (0, *ENDS), strict=False)
    }
    assert sum(sizes[key] for key in kept) <= max_bytes
    for prompt in prompts:
        present = [key in recent for key in prefix_keys(prompt)]
        assert present == sorted(present, reverse=True)  # a beginning that is known has no unknown one in it
    assert set(recent.latest(len(kept))) == kept
    assert len(recent.latest(3)) == min(3, len(kept))


@given(PROMPTS)
def test_the_last_prompt_is_known_if_there_is_room_for_it(prompt: bytes):
    recent = RecentPrefixes(len(prompt))
    recent.add(prefix_keys(b"other" * 1000))
    recent.add(prefix_keys(prompt))
    longest = max((end for end in ENDS if end <= len(prompt)), default=0)
    assert known_bytes(prefix_keys(prompt + b"more" * 100), [recent]) >= longest
    assert known_bytes(prefix_keys(prompt), [frozenset(), recent]) == longest
    assert known_bytes(prefix_keys(prompt), []) == 0


CANDIDATES = st.lists(
    st.builds(
        Candidate,
        name=st.sampled_from("abcdefgh"),
        known_bytes=st.sampled_from((0, *ENDS)),
        requests=st.integers(0, 30),
    ),
    min_size=1,
    unique_by=lambda candidate: candidate.name,
)


@given(CANDIDATES, st.text(max_size=5), st.randoms())
def test_the_first_is_the_cheapest_and_the_order_depends_on_nothing_else(candidates, first_key, dice):
    order = ranked(candidates, first_key)
    assert sorted(order, key=repr) == sorted(candidates, key=repr)
    free = min(each.requests for each in order) + SLACK_REQUESTS
    costs = [(max(0, each.requests - free) * REQUEST_BYTES - each.known_bytes, each.requests) for each in order]
    assert costs == sorted(costs)
    dice.shuffle(candidates)
    assert ranked(candidates, first_key) == order


def test_a_prefix_is_followed_until_its_replica_is_busier_by_more_than_it_saves():
    def chosen(requests: int) -> str:
        return ranked([Candidate("has it", 2048, requests), Candidate("has not", 0, 0)], "key")[0].name

    assert [chosen(requests) for requests in (0, 4, 6)] == ["has it", "has it", "has not"]


def test_without_prefixes_requests_are_spread_evenly():
    requests = dict.fromkeys("abc", 0)
    for number in range(300):
        (first, *_) = ranked([Candidate(name, 0, count) for name, count in requests.items()], str(number))
        requests[first.name] += 1
        assert max(requests.values()) - min(requests.values()) <= 1


def test_idle_replicas_share_prompts_of_different_beginnings():
    idle = [Candidate(name, 0, 0) for name in "abcd"]
    firsts = [ranked(idle, key)[0].name for key in map(str, range(400))]
    assert all(60 < firsts.count(name) < 140 for name in "abcd")
