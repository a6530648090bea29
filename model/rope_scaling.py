"""RopeScaling: how a checkpoint stretches its rotary embedding to longer contexts, read from config.json.

The kinds are those that Transformers computes for Persimmon.  Imports no torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from persimmon.model.errors import CheckpointError
from persimmon.model.json_object import JsonObject, shown

Kind = Literal["linear", "dynamic", "yarn", "longrope", "llama3"]


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Settings of one kind of scaling; those of other kinds are at their defaults.

    Attributes:
        kind: as Transformers calls it.
        factor: by which frequencies are stretched.
        original_length: tokens that the model was trained for before it was stretched.
        attention_factor: multiplies cosines and sines (yarn, longrope).
        beta_fast, beta_slow: rotations over the original length, between which yarn blends its two frequencies.
        truncate: whether yarn rounds those bounds to whole dimensions.
        low_freq_factor, high_freq_factor: the same for llama3, in wavelengths of the original length.
        short_factors, long_factors: longrope's, of each frequency, for sequences up to and beyond the original length.
    """

    kind: Kind
    factor: float
    original_length: int
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    @property
    def limit(self) -> int | None:
        """The longest sequence whose frequencies do not depend on its length; None where they never do."""
        return self.original_length if self.kind in ("dynamic", "longrope") else None

    def context_length(self, max_position_embeddings: int) -> int:
        """The longest sequence to serve by default, as vLLM derives it.

        Config files of linear and dynamic scaling give the length before it, of longrope and llama3 after it.
        """
        if self.kind in ("longrope", "llama3"):
            return max_position_embeddings
        before = self.original_length if self.kind == "yarn" else max_position_embeddings
        return max(1, int(before * self.factor))


MAX_CONTEXT_LENGTH = 2**31 - 1
"""As of every other count in config.json."""


def rope_tables(file: JsonObject) -> list[JsonObject]:
    """Where rotary settings may be, best first: in their own table, or at the top level of config.json.

    Older files call the table rope_scaling; where a file has both, that one counts, as in Transformers.
    """
    tables = [table for key in ("rope_scaling", "rope_parameters") if (table := file.table(key)) and table.values]
    return [*tables[:1], file]


def read_rope_scaling(file: JsonObject, max_position_embeddings: int, rotary_dim: int) -> RopeScaling | None:
    """The scaling that config.json asks for; None for none.

    Args:
        file: config.json.
        max_position_embeddings: of it.
        rotary_dim: dimensions that are turned.

    Raises:
        CheckpointError: it is of a kind that is not served, or a setting is missing or wrong.
    """
    table = rope_tables(file)[0]
    kind = "default" if table is file else table.text("rope_type") or table.text("type") or "default"
    if kind == "default":
        return None
    if kind not in get_args(Kind):
        raise CheckpointError(
            f"{file.path}: {table.prefix.rstrip('.')} has a {kind!r} rotary embedding; expected one of default, "
            f"{', '.join(get_args(Kind))}"
        )
    if kind == "dynamic" and rotary_dim < 4:
        raise table.error(
            "rope_type", f"another type: dynamic scaling needs 4 rotary dimensions, and the model has {rotary_dim}"
        )
    original = max_position_embeddings
    if kind in ("yarn", "longrope", "llama3"):
        places = [place for place in (file, table) if place.values.get("original_max_position_embeddings") is not None]
        if places:
            original = places[0].positive_integer("original_max_position_embeddings")
    factor = table.positive_number("factor")
    if factor is None and kind in ("yarn", "longrope"):
        factor = max_position_embeddings / original
    if factor is None or (kind == "dynamic" and factor < 1):
        raise table.error("factor", "a positive number, for dynamic scaling at least 1")
    if factor > MAX_CONTEXT_LENGTH / original:
        raise table.error("factor", f"at most {MAX_CONTEXT_LENGTH:,} tokens after scaling {original:,}")
    more: dict[str, Any] = {}
    if kind == "yarn":
        more = _yarn(table, factor)
    elif kind == "longrope":
        more = _longrope(table, factor, original, rotary_dim // 2)
    elif kind == "llama3":
        low, high = (_required_number(table, key) for key in ("low_freq_factor", "high_freq_factor"))
        if high <= low:
            raise table.error("high_freq_factor", f"more than low_freq_factor, which is {low}")
        more = {"low_freq_factor": low, "high_freq_factor": high}
    return RopeScaling(kind=cast("Kind", kind), factor=factor, original_length=original, **more)


def _yarn(table: JsonObject, factor: float) -> dict[str, Any]:
    """Yarn's settings (Peng et al., arXiv:2309.00071), with the defaults and the inferred scale of Transformers."""

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    attention, all_dims = table.positive_number("mscale"), table.positive_number("mscale_all_dim")
    inferred = scale(attention) / scale(all_dims) if attention and all_dims else scale(1.0)
    given = table.positive_number("attention_factor")
    return {
        "attention_factor": inferred if given is None else given,
        "beta_fast": table.positive_number("beta_fast") or RopeScaling.beta_fast,
        "beta_slow": table.positive_number("beta_slow") or RopeScaling.beta_slow,
        "truncate": table.flag("truncate", RopeScaling.truncate),
    }


def _longrope(table: JsonObject, factor: float, original: int, frequencies: int) -> dict[str, Any]:
    """LongRoPE's settings (Ding et al., arXiv:2402.13753), with the inferred scale of Transformers."""
    inferred = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    given = table.positive_number("attention_factor")
    return {
        "attention_factor": inferred if given is None else given,
        "short_factors": _factors(table, "short_factor", frequencies),
        "long_factors": _factors(table, "long_factor", frequencies),
    }


def _factors(table: JsonObject, key: str, count: int) -> tuple[float, ...]:
    values = table.values.get(key)
    numbers = values if isinstance(values, Sequence) and not isinstance(values, str) else ()
    if len(numbers) != count or not all(type(value) in (int, float) and 0 < value < 1e30 for value in numbers):
        raise CheckpointError(
            f"{table.path}: {table.prefix}{key} is {shown(values)}; expected {count} positive numbers, one per "
            f"frequency"
        )
    return tuple(map(float, numbers))


def _required_number(table: JsonObject, key: str) -> float:
    value = table.positive_number(key)
    if value is None:
        raise table.error(key, "a positive number")
    return value
