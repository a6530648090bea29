"""What `python -m benchmarks.roofline` has predicted for a card, to stand next to what is measured on it."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.suite import Setting

PREDICTED = Path(__file__).parents[1] / "results" / "roofline_8b.json"
PREDICTED_QUANTIZED = PREDICTED.with_name("roofline_quantized_8b.json")
STEPS = {0.0: "step", 0.9: "step, 90% zeros"}
"""Whole steps, by the share of activations that are zero."""

LAUNCHES = {
    "query_key_value": "norm + QKV",
    "attention_out": "out + residual",
    "mlp_up": "norm + up",
    "mlp_down": "down + residual",
}
"""The names that predictions have for projections."""

ATTENTION, DOWN_AT_90_PERCENT_ZEROS = "attention", "down + residual, 90% zeros"
CONTEXT = 512
"""Tokens of each sequence that predictions are for."""


def predicted_us(setting: Setting, batch: int, launch: str, context: int = CONTEXT) -> float | None:
    """Microseconds of a launch, or of a whole step, its gaps included; None where nothing is predicted.

    Args:
        setting: on the card.
        batch: sequences.
        launch: as predictions name it.
        context: tokens of each sequence.
    """
    if not setting.on_gpu or context != CONTEXT:
        return None
    device = torch.cuda.get_device_name()
    found = (row for row in _rows(PREDICTED) if (row["batch"], row["launch"]) == (batch, launch))
    return next((float(row["us"]) for row in found if row["card"] in device), None)


def predicted_quantized_us(setting: Setting, weights: str, batch: int, launch: str) -> float | None:
    """The same of a launch with quantized weights, named as `python -m benchmarks.roofline_quantized` names them."""
    if not setting.on_gpu:
        return None
    device, wanted = torch.cuda.get_device_name(), (weights, batch, launch)
    found = (row for row in _rows(PREDICTED_QUANTIZED) if (row["weights"], row["batch"], row["launch"]) == wanted)
    return next((float(row["us"]) for row in found if row["card"] in device), None)


def predicted_cache_us(setting: Setting, cache_type: str, batch: int, context: int) -> float | None:
    """The same of decode attention over a cache that --kv-cache-dtype names."""
    if not setting.on_gpu or context != CONTEXT:
        return None
    device, wanted = torch.cuda.get_device_name(), (cache_type, batch)
    found = (row for row in _rows(PREDICTED_QUANTIZED, "attention") if (row["cache"], row["batch"]) == wanted)
    return next((float(row["us"]) for row in found if row["card"] in device), None)


@cache
def _rows(path: Path, kind: str = "predicted") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(path.read_text())[kind] if path.exists() else []
    return rows
