"""What tests of the model share: the two ways in which a CPU computes."""

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from persimmon.kernels import Kernels


@pytest.fixture(params=["C kernels", "plain torch"])
def cpu_kernels(request: pytest.FixtureRequest) -> "Kernels[Any, Any]":
    """What serves a CPU, its activations exact, and what serves one for which no C kernels could be compiled."""
    from persimmon import kernels
    from persimmon.kernels.cpu import library
    from tests.engine_harness import CPU

    if request.param == "plain torch":
        return kernels.reference
    if not library.builds():
        pytest.skip("no build of the C kernels for this processor")
    return kernels.for_device(CPU, quantized_activations="float")
