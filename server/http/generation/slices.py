"""Long loops in slices, between which the event loop's other tasks run."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from typing import TypeVar

_Item = TypeVar("_Item")


async def in_slices(
    items: Iterable[_Item], size: int, cost: Callable[[_Item], int] = lambda item: 1
) -> AsyncIterator[_Item]:
    """The items; other tasks have a turn whenever the cost of those since the last turn has reached `size`.

    Args:
        items: to loop over.
        size: of a slice.
        cost: of an item.
    """
    since = 0
    for item in items:
        if since >= size:
            since = 0
            await asyncio.sleep(0)
        yield item
        since += cost(item)
