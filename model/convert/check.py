"""Whether the tensors at hand are those of a network, before any is read.

Knows nothing of files but the names that messages give.
"""

from collections.abc import Mapping

import torch

from persimmon.model.checkpoint import expected_shapes
from persimmon.model.config import PersimmonConfig
from persimmon.model.convert.sources import TensorSource
from persimmon.model.errors import CheckpointError

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
"""The types that a network's tensors may have."""


def check_tensors(
    tensors: Mapping[str, TensorSource], config: PersimmonConfig, source: object, places: Mapping[str, object]
) -> dict[str, TensorSource]:
    """The tensors in the network's order.

    Args:
        tensors: by their Hugging Face names.
        config: of the network.
        source: where a missing one was looked for, for the message.
        places: the file of each tensor, for the message.

    Raises:
        CheckpointError: one is missing, unexpected, of another shape or not in a floating point type.
    """
    expected = expected_shapes(config)
    unexpected = [name for name in tensors if name not in expected]
    if unexpected:
        raise CheckpointError(f"{places[unexpected[0]]}: tensor {unexpected[0]} is unexpected{_and_more(unexpected)}")
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise CheckpointError(f"{source}: tensor {missing[0]} is missing{_and_more(missing)}")
    for name, shape in expected.items():
        tensor = tensors[name]
        if tensor.shape != shape:
            raise CheckpointError(
                f"{places[name]}: tensor {name} has shape {list(tensor.shape)}; expected {list(shape)}"
            )
        if tensor.dtype not in FLOATS:
            raise CheckpointError(
                f"{places[name]}: tensor {name} is {str(tensor.dtype).removeprefix('torch.')}; expected float16, "
                f"bfloat16 or float32"
            )
    return {name: tensors[name] for name in expected}


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
