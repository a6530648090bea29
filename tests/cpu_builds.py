"""The builds of the C kernels that tests run on: those that this processor runs."""

from persimmon.kernels.cpu import library

BUILDS = library.builds()
"""All: they differ in products of quantized weights."""

FLOAT_BUILDS = [build for build in BUILDS if build not in ("avx512_vnni", "avx_vnni")]
"""Those that differ in anything else: VNNI multiplies integers only."""
