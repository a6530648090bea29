"""The tokens of a step that stand for image patches: where they are, and the pixels that they get embeddings from.

Knows neither images nor prompts.
"""

from dataclasses import dataclass

import numpy as np
import torch

PATCHES_AT_ONCE = 256
"""Patches that are projected together: few enough for their numbers to stay in a cache, many for each read of a weight.

It changes no bit where a product does not depend on the number of rows.
"""


_ALIGNMENT = 16
"""Inputs of the projection are a multiple of it, so that a GPU's kernels read rows 16 bytes at a time."""


@dataclass(frozen=True, slots=True)
class PatchSpan:
    """Neighbouring tokens of a sequence's part of a step that stand for image patches.

    Attributes:
        start: the first of them, among the tokens of that part; their token ids say nothing, but are in the vocabulary.
        pixels: [n, patch_numbers] uint8, of each patch in the order height, width, channel.
    """

    start: int
    pixels: np.ndarray


@dataclass(frozen=True, slots=True)
class Patches:
    """All such tokens of a step, on its device.

    Attributes:
        places: [N] int64, which of the step's tokens.
        pixels: [N, patch_numbers] uint8.
    """

    places: torch.Tensor
    pixels: torch.Tensor


def padded(numbers: int) -> int:
    """Inputs of the product that projects patches of this number of pixels' numbers; the last ones are zeros."""
    return -(-numbers // _ALIGNMENT) * _ALIGNMENT


def inputs_of(pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What the network was trained on, (pixels / 255 - 0.5) / 0.5, as its product takes it.

    Args:
        pixels: [n, patch_numbers] uint8.
        dtype: of the result.

    Returns:
        [n, padded(patch_numbers)], from -1 to 1.
    """
    count, numbers = pixels.shape
    inputs = torch.zeros(count, padded(numbers), dtype=dtype, device=pixels.device)
    inputs[:, :numbers] = pixels.float().div_(255).sub_(0.5).div_(0.5)
    return inputs
