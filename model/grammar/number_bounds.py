"""Bounds of numbers -> the nearest bounds inside them that the grammar engine enforces exactly.

The engine has bounds in double precision, writes those of integers as 64-bit numbers and those of others with 15 to 17
digits.  Moving a bound inwards allows fewer answers, never a wrong one.
"""

import math
from typing import Any

MAX_INTEGER = 2**63 - 1024
"""Of an integer's bound: the largest double below 2^63."""

MAX_NUMBER = 2**53
"""Of another number's bound: above, a double does not hold every integer."""

MIN_FRACTION = 1e-20
"""Of a bound that is not 0: the engine cannot write much smaller ones."""

Number = int | float


def _up(value: Number, whole: bool) -> Number:
    """The smallest number at or above a value that a double, or an integer, can hold, tiny fractions excluded."""
    if whole and isinstance(value, float):
        value = math.ceil(value)
    if isinstance(value, int):
        if abs(value) <= MAX_NUMBER or abs(value) > 2 * MAX_INTEGER:
            return value
        nearest = int(float(value))
        return nearest if nearest >= value else int(math.nextafter(float(value), math.inf))
    if 0 < abs(value) < MIN_FRACTION:
        return MIN_FRACTION if value > 0 else 0
    return value


def narrow_bounds(schema: dict[str, Any]) -> str | None:
    """Replaces the bounds of a schema by those that the engine enforces.

    Args:
        schema: with valid bounds, none of them in the form of draft 4; changed in place.

    Returns:
        A bound beyond which the engine follows no number, if there is one.
    """
    types = schema.get("type", "number")
    whole = "number" not in ([types] if isinstance(types, str) else types)
    limit = MAX_INTEGER if whole else MAX_NUMBER
    for bound, sign in (("minimum", 1), ("maximum", -1)):
        exclusive = f"exclusive{bound.capitalize()}"
        given = exclusive if exclusive in schema else bound
        if whole and exclusive in schema:
            own = math.floor(sign * schema.pop(exclusive)) + 1
            schema[bound] = sign * max(sign * schema.get(bound, sign * own), own)
        for key in (bound, exclusive):
            if key in schema:
                inner = _up(sign * schema[key], whole)
                if inner > limit:
                    return given
                schema[key] = sign * max(inner, -limit)
    return None
