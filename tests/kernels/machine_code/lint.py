"""All rules over all kernels that were compiled."""

from collections.abc import Callable
from functools import partial

from tests.kernels.machine_code import rules
from tests.kernels.machine_code.compiled import Compiled, Matrix

RULES: dict[str, Callable[[Compiled], list[str]]] = {
    "merge_protocol": partial(rules.merge_protocol, except_for=("k_cache", "v_cache", "cache_scales")),
    "no_non_coherent_load": rules.no_non_coherent_load,
    "proxy_fence": rules.proxy_fence,
    "barrier_before_shared_stores": rules.barrier_before_shared_stores,
    "nothing_before_grid_wait": partial(rules.nothing_before_grid_wait, except_for=("weight", "scales")),
}
"""Rules over one kernel.

A program that stores a new token's key, value and scales is the only one of its launch that attends to them, from
registers; the interleaving interpreter would find another.  What a thread copies less than 16 bytes of passes through
the L1 cache.
No launch of a step writes a weight or its scales, so a dependent launch may prefetch it.
"""


def violations(matrix: Matrix, rule: str) -> dict[str, list[str]]:
    """What a rule finds, by the place of the kernel that breaks it."""
    return {
        f"sm_{capability} {module}, {call}: {kernel.kernel}": found
        for (capability, module, call), kernels in matrix.items()
        for kernel in kernels
        if (found := RULES[rule](kernel))
    }


def reduction_layouts(matrix: Matrix) -> list[str]:
    """`rules.reduction_layouts` of all kernels that write or merge a decode step's statistics, for sm_90."""
    found = []
    for wide in (False, True):  # float32 has a layout of its own
        kernels = [
            kernel
            for (capability, module, call), launched in matrix.items()
            if capability == 90
            and module in ("projection", "packed_projection", "layer_norm")
            and ("fp32" in call) == wide
            # A table of 8-bit numbers is loaded in a layout of its own, and no step has two tables.
            and "embed_bytes" not in call
            for kernel in launched
            if kernel.kernel != "row_layer_norm_kernel"
        ]
        found += rules.reduction_layouts(kernels)
    return found
