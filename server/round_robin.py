"""A queue in which clients take turns, so that one with few items does not wait behind another with many."""

from collections import deque
from typing import Generic, TypeVar

_Item = TypeVar("_Item")


class RoundRobin(Generic[_Item]):
    """Items of several clients: each client's in the order of their arrival, one of each client in turn."""

    def __init__(self) -> None:
        # The next client first.
        self._queues: dict[str, deque[_Item]] = {}

    def __bool__(self) -> bool:
        return bool(self._queues)

    def put(self, client: str, item: _Item) -> None:
        """Adds an item behind the client's others."""
        queue = self._queues.get(client)
        if queue is None:
            queue = self._queues[client] = deque()
        queue.append(item)

    def take(self) -> _Item:
        """Removes and returns the next item.

        Raises:
            IndexError: the queue is empty.
        """
        client = next(iter(self._queues), None)
        if client is None:
            raise IndexError("the queue is empty")
        queue = self._queues[client]
        item = queue.popleft()
        if not queue:
            del self._queues[client]
        elif len(self._queues) > 1:
            self._queues[client] = self._queues.pop(client)  # behind the others
        return item
