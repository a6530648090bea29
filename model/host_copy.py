"""A step's results on their way to the host: one packed transfer, so that one event covers all of them.

Knows neither devices nor events.
"""

from collections.abc import Sequence

import torch


def pack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The numbers of several tensors one after the other, those of 8 bytes first.

    Args:
        tensors: contiguous, of one device, with elements of 4 or 8 bytes.

    Returns:
        [words] int32; a view where there is only one.
    """
    words = [tensors[place].reshape(-1).view(torch.int32) for place in _order(tensors)]
    return words[0] if len(words) == 1 else torch.cat(words)


def unpack(words: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Views of the tensors that `pack` was given.

    Args:
        words: [words] int32, a copy of what `pack` returned.
        like: tensors of the same shapes and dtypes, in the order given to `pack`.
    """
    views: dict[int, torch.Tensor] = {}
    begin = 0
    for place in _order(like):
        end = begin + like[place].nbytes // words.itemsize
        views[place] = words[begin:end].view(like[place].dtype).view(like[place].shape)
        begin = end
    return [views[place] for place in range(len(like))]


def _order(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Tensors of 8-byte elements first, so that these are aligned."""
    return sorted(range(len(tensors)), key=lambda place: -tensors[place].itemsize)
