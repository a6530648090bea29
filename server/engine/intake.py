"""Submissions that have been read from the socket and not handed to the scheduler yet: clients take turns.

Reading a message takes a quarter of what handing it over does.  So one client's submission is not behind another's
thousands, which wait here while steps run.
"""

from dataclasses import dataclass

from persimmon.server.engine.messages import Submit
from persimmon.server.engine.submitted import SequenceKey
from persimmon.server.round_robin import RoundRobin


@dataclass(eq=False, slots=True)
class Submission:
    """A submission, and the identity of the worker that it came from."""

    worker: bytes
    submit: Submit

    @property
    def keys(self) -> list[SequenceKey]:
        """The keys of its sequences."""
        return [(self.worker, sequence_id) for sequence_id in self.submit.sequence_ids]


class Intake:
    """A queue of submissions: each client's in the order of their arrival, one of each client in turn."""

    def __init__(self) -> None:
        # Those that were withdrawn are still in the queue, but not here.
        self._by_key: dict[SequenceKey, Submission] = {}
        self._queue: RoundRobin[Submission] = RoundRobin()

    def __bool__(self) -> bool:
        return bool(self._by_key)

    def put(self, submission: Submission) -> None:
        """Adds a submission behind its client's others."""
        self._by_key.update(dict.fromkeys(submission.keys, submission))
        self._queue.put(submission.submit.owner, submission)

    def take(self) -> Submission:
        """Removes and returns the next one.

        Raises:
            IndexError: the queue is empty.
        """
        while True:
            submission = self._queue.take()
            if self._by_key.get(submission.keys[0]) is submission:
                self._forget(submission)
                return submission

    def withdraw(self, key: SequenceKey) -> Submission | None:
        """Removes and returns the submission of a sequence; None if it is not in the queue."""
        submission = self._by_key.get(key)
        if submission is not None:
            self._forget(submission)
        return submission

    def _forget(self, submission: Submission) -> None:
        for key in submission.keys:
            self._by_key.pop(key, None)
