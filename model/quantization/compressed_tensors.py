"""The quantization_config of a checkpoint's config.json in the layout of compressed-tensors, read strictly.

The layout is that of compressed-tensors 0.20.1: QuantizationConfig, QuantizationScheme and QuantizationArgs in its
folder quantization/, which llm-compressor writes and vLLM and Transformers read.  Every key is either known here, and
then its value must be supported, or refused.  Knows nothing of tensors, and imports no torch: API workers read it too.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from persimmon.model.errors import CheckpointError
from persimmon.model.json_object import JsonObject

GROUP_SIZES = (32, 128)
"""Neighbouring inputs of a matrix that may share a scale."""

ModuleClass = Literal["Linear", "Embedding"]

_PACKED = "pack-quantized"
_INTEGERS = "int-quantized"
_MIXED = "mixed-precision"

_KEYS = {
    *("quant_method", "config_groups", "format", "quantization_status", "ignore", "kv_cache_scheme"),
    *("sparsity_config", "transform_config", "moe_sparsity_config", "global_compression_ratio", "version"),
}
_GROUP_KEYS = {"targets", "weights", "input_activations", "output_activations", "format"}
_ARGUMENT_KEYS = {
    *("num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder"),
    *("scale_dtype", "zp_dtype", "observer", "observer_kwargs"),
}

_OTHER_METHODS = "take the checkpoint in 16 bits, and serve it with --quantization int8 or int4"


@dataclass(frozen=True, slots=True)
class MatrixScheme:
    """How the matrices of some modules are stored.

    Attributes:
        bits: of a number, 8 or 4.
        group_size: neighbouring inputs that share a scale; None for all inputs of an output.
        packed: whether numbers are packed into int32 (`weight_packed`); otherwise each is an int8 (`weight`).
        rounds_inputs: whether the file asks for inputs of products that are rounded to 8 bits, a scale for each token.
    """

    bits: Literal[4, 8]
    group_size: int | None
    packed: bool
    rounds_inputs: bool

    def __str__(self) -> str:
        return f"int{self.bits}" + ("" if self.group_size is None else f" in groups of {self.group_size}")


@dataclass(frozen=True, slots=True)
class CompressedTensors:
    """Which modules of a network are quantized, and how.

    Attributes:
        schemes: by target, in the order of the file.  A target is a module's name, "re:" and an expression that
            matches the beginning of names, or the name of a class of torch.nn.
        ignored: targets whose modules are not quantized, whatever else matches them.
    """

    schemes: tuple[tuple[str, MatrixScheme], ...]
    ignored: tuple[str, ...]

    def scheme(self, module: str, kind: ModuleClass) -> MatrixScheme | None:
        """The scheme of a module's matrix; None where it is not quantized.

        Names go before expressions, and these before classes; among equals the first in alphabetical order decides, as
        in compressed-tensors (match_targets in utils/match.py).

        Args:
            module: its name, like "model.layers.0.mlp.dense_h_to_4h".
            kind: its class.
        """
        if any(_matches(target, module, kind) for target in self.ignored):
            return None
        schemes = dict(self.schemes)
        matching = [target for target in schemes if _matches(target, module, kind)]
        by_class = [target for target in matching if target in (kind, "Module")]
        first = min(matching, key=lambda target: (target in by_class, "re:" in target, target), default=None)
        return None if first is None else schemes[first]


def read_compressed_tensors(file: JsonObject) -> CompressedTensors | None:
    """What a config.json says of quantized weights; None where it says nothing of them.

    Raises:
        CheckpointError: it asks for something that is not supported, by name, or has a wrong value.
    """
    config = file.table("quantization_config")
    if config is None:
        return None
    method = config.values.get("quant_method")
    if method != "compressed-tensors":
        raise config.error("quant_method", f"'compressed-tensors', the only layout that is read: {_OTHER_METHODS}")
    _refuse_unknown(config, _KEYS)
    _require(config, "kv_cache_scheme", None, "null: give --kv-cache-dtype instead")
    for key, what in (
        ("sparsity_config", "sparse weights are not supported"),
        ("transform_config", "transforms of weights and inputs are not supported"),
        ("moe_sparsity_config", "Persimmon has no experts"),
    ):
        _require_empty(config, key, what)
    _require(config, "quantization_status", "compressed", "'compressed': save the model compressed")
    layout = config.text("format")
    if layout not in (_PACKED, _INTEGERS, _MIXED):
        raise config.error("format", f"one of {_PACKED}, {_INTEGERS}, {_MIXED}")
    groups = config.table("config_groups")
    if groups is None or not groups.values:
        raise config.error("config_groups", "at least one group")
    schemes: list[tuple[str, MatrixScheme]] = []
    for name in groups.values:
        group = groups.table(name)
        if group is None:
            raise groups.error(name, "an object")
        scheme = _scheme(group, layout)
        schemes += [(target, scheme) for target in _targets(group, "targets")]
    return CompressedTensors(schemes=tuple(schemes), ignored=tuple(_targets(config, "ignore")))


def _scheme(group: JsonObject, layout: str) -> MatrixScheme:
    _refuse_unknown(group, _GROUP_KEYS)
    _require(group, "output_activations", None, "null: rounding what layers put out is not supported")
    own = group.text("format") or layout
    if own not in (_PACKED, _INTEGERS):
        raise group.error("format", f"{_PACKED} or {_INTEGERS}")
    weights = group.table("weights")
    if weights is None:
        raise group.error("weights", "an object: only quantized weights are supported")
    bits = _arguments(weights)
    _require(weights, "dynamic", False, "false")
    _require(weights, "block_structure", None, "null")
    if weights.values.get("actorder") not in (None, False, "weight", "static"):
        raise weights.error(
            "actorder", "null, 'weight' or 'static': inputs in another order (weight_g_idx) are not supported"
        )
    strategy, size = weights.text("strategy"), weights.values.get("group_size")
    if strategy is None and type(size) is int:
        strategy = "group" if size > 0 else "channel"
    if strategy not in ("channel", "group"):
        raise weights.error("strategy", "'channel' or 'group'")
    if strategy == "channel" and size not in (None, -1):
        raise weights.error("group_size", "null or -1 with the strategy 'channel'")
    if strategy == "group" and (type(size) is not int or size not in GROUP_SIZES):
        raise weights.error("group_size", f"one of {', '.join(map(str, GROUP_SIZES))}")
    if bits == 4 and strategy == "channel":
        raise weights.error("strategy", "'group' for 4 bits: a scale for each output is supported for 8 bits only")
    if bits == 4 and own == _INTEGERS:
        raise weights.error("num_bits", f"8 in the format {_INTEGERS}")
    return MatrixScheme(
        bits=bits,
        group_size=size if strategy == "group" else None,
        packed=own == _PACKED,
        rounds_inputs=_rounds_inputs(group),
    )


def _rounds_inputs(group: JsonObject) -> bool:
    """Whether inputs are rounded; refused unless they are as the integer products of the kernels round them."""
    inputs = group.table("input_activations")
    if inputs is None:
        return False
    if _arguments(inputs) != 8:
        raise inputs.error("num_bits", "8")
    _require(inputs, "dynamic", True, "true: scales that were fixed by calibration are not supported")
    _require(inputs, "strategy", "token", "'token'")
    return True


def _arguments(arguments: JsonObject) -> Literal[4, 8]:
    """The bits of symmetric integers; other arguments that mean something are refused by their name."""
    _refuse_unknown(arguments, _ARGUMENT_KEYS)
    bits = arguments.values.get("num_bits", 8)
    if bits not in (4, 8) or type(bits) is not int:
        raise arguments.error("num_bits", "8 or 4")
    if arguments.values.get("type", "int") != "int":
        raise arguments.error("type", "'int': floating point types of 8 and 4 bits are not supported")
    if arguments.values.get("symmetric", True) is not True:
        raise arguments.error("symmetric", "true: zero points are not supported")
    return 8 if bits == 8 else 4


def _targets(place: JsonObject, key: str) -> list[str]:
    value: Any = place.values.get(key)
    if value is None and key == "ignore":
        return []
    if not isinstance(value, list) or not all(isinstance(target, str) for target in value):
        raise place.error(key, "a list of names of modules or classes, or of expressions after 're:'")
    for target in value:
        try:
            re.compile(target.removeprefix("re:"))
        except re.error as error:
            if target.startswith("re:"):
                raise place.error(key, f"valid expressions after 're:', where {target!r} is not: {error}") from None
    return value


def _matches(target: str, module: str, kind: ModuleClass) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), module) is not None
    return target in (module, kind, "Module")


def _refuse_unknown(place: JsonObject, known: Iterable[str]) -> None:
    unknown = [key for key in place.values if key not in known]
    if unknown:
        raise CheckpointError(
            f"{place.path}: {place.prefix}{unknown[0]} is not known; supported are {', '.join(sorted(known))}"
        )


def _require(place: JsonObject, key: str, value: object, expected: str) -> None:
    found = place.values.get(key)
    # 1 is not true, and an absent key of true and false is false.
    if found is None and value is False:
        return
    if found != value or type(found) is not type(value):
        raise place.error(key, expected)


def _require_empty(place: JsonObject, key: str, reason: str) -> None:
    value = place.values.get(key)
    if value is not None and value != {} and value != {"config_groups": {}}:
        raise place.error(key, f"null or an empty object: {reason}")
