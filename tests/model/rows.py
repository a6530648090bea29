"""Rows of logits that tests draw from."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np

from persimmon.model.row_sampling import RowSampling
from persimmon.model.sampling_params import SamplingParams
from persimmon.model.token_counts import TokenCounts


def row_with(
    *,
    sample_index: int = 0,
    position: int = 0,
    seen: TokenCounts | None = None,
    banned: tuple[int, ...] = (),
    allowed: Callable[[], np.ndarray] | None = None,
    **asked: Any,
) -> RowSampling:
    """How a row is drawn: greedily, unless a temperature is among what `SamplingParams` is given."""
    return RowSampling(
        asked=SamplingParams(**({"temperature": 0.0} | asked)),
        sample_index=sample_index,
        position=position,
        seen=seen,
        banned=banned,
        allowed=allowed,
    )


def changed(row: RowSampling, **changes: Any) -> RowSampling:
    """The row with other values, of its own or of what its request asks for."""
    own = {field.name for field in fields(RowSampling)}
    asked = replace(row.asked, **{name: value for name, value in changes.items() if name not in own})
    return replace(row, asked=asked, **{name: value for name, value in changes.items() if name in own})
