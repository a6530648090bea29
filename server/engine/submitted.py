"""What a worker submits as the engine's sequences, and which worker a sequence belongs to."""

from collections.abc import Iterable
from typing import Any

from persimmon.server.engine.messages import Submit
from persimmon.server.engine.sequence import Sequence

SequenceKey = tuple[bytes, int]
"""A worker's identity and its own number for the sequence."""


def sequence_of(worker: bytes, submit: Submit, now: float) -> Sequence:
    """A submission's first sample, with the others as its forks; `now` is the time on the engine's clock."""

    def sample(index: int, forks: Iterable[Sequence] = (), **reports: Any) -> Sequence:
        return Sequence(
            key=(worker, submit.sequence_id + index),
            token_ids=list(submit.token_ids),
            max_tokens=submit.max_tokens,
            stop_token_ids=frozenset(submit.stop_token_ids),
            sampling=submit.sampling,
            sample_index=index,
            spans=submit.spans,
            priority=submit.priority,
            speculate=submit.speculate,
            owner=submit.owner,
            weight=submit.weight,
            cache_salt=submit.cache_salt,
            request_id=submit.request_id,
            submitted=now,
            forks=list(forks),
            **reports,
        )

    forks = map(sample, range(1, submit.samples))
    reports = {"prompt_logprobs": submit.prompt_logprobs, "pooling": submit.pooling, "scores": submit.scores}
    return sample(0, forks, **reports)


def key_of(sequence: Sequence) -> SequenceKey:
    """The worker that a sequence belongs to, and its number there.

    Raises:
        TypeError: it is keyed otherwise, so no worker submitted it.
    """
    key = sequence.key
    if not isinstance(key, tuple):
        raise TypeError(f"the engine's sequences are keyed by worker and number, not {key!r}")
    return key
