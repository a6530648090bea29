"""Quantized checkpoints that are not supported, or damaged: one line that names the key or the tensor."""

import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from persimmon.model.checkpoint import Checkpoint
from persimmon.model.config import PersimmonConfig
from persimmon.model.convert.hugging_face import plan_from_hugging_face
from persimmon.model.errors import CheckpointError
from persimmon.model.json_object import JsonObject
from persimmon.model.quantization.compressed_tensors import MatrixScheme, read_compressed_tensors
from persimmon.server.config import read_settings
from persimmon.server.engine.model_setup import formats_to_make
from tests.model.quantization.compressed import TOKEN_INPUTS, edit_config, quantization, weights, write_compressed

GROUP = "quantization_config.config_groups.group_0."
MLP = "model.layers.0.mlp.dense_h_to_4h"
Tensors = dict[str, torch.Tensor]


def read(config: dict[str, Any]) -> Any:
    return read_compressed_tensors(JsonObject(Path("config.json"), {"quantization_config": config}))


def good(bits: int = 4, **group: Any) -> dict[str, Any]:
    """As llm-compressor writes it."""
    arguments = weights(bits, group_size=32) | {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "observer": "minmax",
        "observer_kwargs": {},
        "scale_dtype": None,
        "zp_dtype": None,
    }
    own = {"targets": ["Linear"], "weights": arguments, "input_activations": None, "output_activations": None}
    return {
        **quantization(own | group, ignore=("lm_head",)),
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "quant_method": "compressed-tensors",
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.20.1",
    }


def test_what_llm_compressor_writes_is_read() -> None:
    config = read(good())
    assert config.scheme("model.layers.0.mlp.dense_4h_to_h", "Linear") == MatrixScheme(4, 32, True, False)
    assert config.scheme("lm_head", "Linear") is None
    assert config.scheme("model.embed_tokens", "Embedding") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"quant_method": "gptq"},
            "quantization_config.quant_method is 'gptq'; expected 'compressed-tensors', the only",
        ),
        ({"quant_method": "awq"}, "quantization_config.quant_method is 'awq'; expected 'compressed-tensors', the only"),
        ({"quant_method": None}, "quantization_config.quant_method is None; expected 'compressed-tensors', the only"),
        ({"format": "nvfp4-pack-quantized"}, "format is 'nvfp4-pack-quantized'; expected one of pack-quantized, int-"),
        ({"format": "marlin-24"}, "quantization_config.format is 'marlin-24'; expected one of pack-quantized"),
        ({"quantization_status": "frozen"}, "quantization_status is 'frozen'; expected 'compressed'"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "expected null: give --kv-cache-dtype instead"),
        ({"sparsity_config": {"format": "dense"}}, "null or an empty object: sparse weights are not supported"),
        ({"transform_config": {"config_groups": {"a": {}}}}, "empty object: transforms of weights and inputs are not"),
        ({"moe_sparsity_config": {"a": 1}}, "moe_sparsity_config is {'a': 1}; expected null or an empty object"),
        ({"config_groups": {}}, "quantization_config.config_groups is {}; expected at least one group"),
        ({"config_groups": {"W4A16": ["Linear"]}}, "config_groups.W4A16 is ['Linear']; expected an object"),
        ({"ignore": ["re:("]}, "expected valid expressions after 're:', where 're:(' is not"),
        ({"ignore": "lm_head"}, "quantization_config.ignore is 'lm_head'; expected a list of names"),
        ({"bits": 4}, "quantization_config.bits is not known; supported are config_groups, format"),
    ],
)
def test_a_key_that_is_not_supported_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        read(good() | changes)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": None}, "weights is None; expected an object: only quantized weights are supported"),
        ({"output_activations": TOKEN_INPUTS}, "expected null: rounding what layers put out is not supported"),
        ({"format": "float-quantized"}, "format is 'float-quantized'; expected pack-quantized or int-quantized"),
        ({"format": "int-quantized"}, "weights.num_bits is 4; expected 8 in the format int-quantized"),
        ({"input_activations": TOKEN_INPUTS | {"dynamic": False}}, "input_activations.dynamic is False; expected true"),
        ({"input_activations": TOKEN_INPUTS | {"num_bits": 4}}, "input_activations.num_bits is 4; expected 8"),
        ({"input_activations": TOKEN_INPUTS | {"strategy": "tensor"}}, "strategy is 'tensor'; expected 'token'"),
        ({"input_activations": TOKEN_INPUTS | {"type": "float"}}, "input_activations.type is 'float'; expected 'int'"),
        ({"targets": "Linear"}, "targets is 'Linear'; expected a list of names of modules or classes"),
        ({"scheme": "W4A16"}, "scheme is not known; supported are format, input_activations, output_activations"),
    ],
)
def test_a_key_of_a_group_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        read(good(**changes))
    assert GROUP + message in str(raised.value) or message in str(raised.value)
    assert GROUP in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_bits": 2}, "num_bits is 2; expected 8 or 4"),
        ({"num_bits": True}, "num_bits is True; expected 8 or 4"),
        ({"type": "float"}, "type is 'float'; expected 'int': floating point types of 8 and 4 bits are not supported"),
        ({"symmetric": False}, "symmetric is False; expected true: zero points are not supported"),
        ({"actorder": "group"}, "actorder is 'group'; expected null, 'weight' or 'static': inputs in another order"),
        ({"actorder": True}, "actorder is True; expected null, 'weight' or 'static'"),
        ({"dynamic": True}, "dynamic is True; expected false"),
        ({"block_structure": [128, 128]}, "block_structure is [128, 128]; expected null"),
        ({"strategy": "block"}, "strategy is 'block'; expected 'channel' or 'group'"),
        ({"strategy": "tensor"}, "strategy is 'tensor'; expected 'channel' or 'group'"),
        ({"strategy": "channel"}, "group_size is 32; expected null or -1 with the strategy 'channel'"),
        ({"strategy": "channel", "group_size": None}, "strategy is 'channel'; expected 'group' for 4 bits"),
        ({"group_size": 16}, "group_size is 16; expected one of 32, 128"),
        ({"group_size": 32.0}, "group_size is 32.0; expected one of 32, 128"),
        ({"scales": 1}, "scales is not known; supported are actorder"),
    ],
)
def test_an_argument_of_weights_is_named(changes: dict[str, Any], message: str) -> None:
    config = good()
    config["config_groups"]["group_0"]["weights"] |= changes
    with pytest.raises(CheckpointError) as raised:
        read(config)
    assert f"{GROUP}weights.{message}" in str(raised.value)


def test_names_go_before_expressions_and_these_before_classes() -> None:
    config = deepcopy(good())
    config["config_groups"] = {
        "a": {"targets": ["Linear"], "weights": weights(4, group_size=32)},
        "b": {"targets": ["re:.*mlp"], "weights": weights(4, group_size=128)},
        "c": {"targets": [MLP], "weights": weights(8)},
    }
    config["ignore"] = ["re:lm_", "Embedding"]
    schemes = read(config)
    assert schemes.scheme(MLP, "Linear").bits == 8
    assert schemes.scheme("model.layers.0.mlp.dense_4h_to_h", "Linear").group_size == 128
    assert schemes.scheme("model.layers.0.self_attn.dense", "Linear").group_size == 32
    assert schemes.scheme("lm_head", "Linear") is None
    assert schemes.scheme("model.embed_tokens", "Embedding") is None


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = quantization({"targets": ["Linear"], "weights": weights(4, group_size=32)}, ignore=("lm_head",))
    return write_compressed(tmp_path_factory.mktemp("original"), config)


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "folder")
    return tmp_path / "folder"


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: change(tensors[name]).contiguous()}


def with_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.index_put((torch.tensor([3]), torch.tensor([1])), torch.tensor(value))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(f"{MLP}.weight_scale"), f"tensor {MLP}.weight_scale is missing; by config.json {MLP} is quantized to"),
        (without(f"{MLP}.weight_shape"), f"tensor {MLP}.weight_shape is missing; by config.json"),
        (
            without(*(f"{MLP}.weight_{part}" for part in ("scale", "shape", "packed"))),
            f"tensor {MLP}.weight_packed is missing",
        ),
        (without("lm_head.weight"), "tensor lm_head.weight is missing"),
        (
            lambda tensors: tensors | {f"{MLP}.weight_zero_point": torch.zeros(32, 4, dtype=torch.int32)},
            f"tensor {MLP}.weight_zero_point is unexpected",
        ),
        (
            lambda tensors: tensors | {f"{MLP}.weight_g_idx": torch.arange(128, dtype=torch.int32)},
            f"tensor {MLP}.weight_g_idx is unexpected",
        ),
        (
            changed(f"{MLP}.weight_scale", lambda scale: scale[:, :2]),
            "weight_scale has shape [256, 2]; expected [256, 4]",
        ),
        (changed(f"{MLP}.weight_packed", lambda words: words[:, 1:]), "packed has shape [256, 15]; expected [256, 16]"),
        (changed(f"{MLP}.weight_packed", torch.Tensor.long), "weight_packed is int64; expected int32"),
        (
            changed(f"{MLP}.weight_scale", lambda scale: scale.to(torch.float8_e4m3fn)),
            "weight_scale is F8_E4M3; expected float32 or float16 or bfloat16",
        ),
        (
            changed(f"{MLP}.weight_shape", lambda shape: shape.flip(0)),
            "weight_shape is [128, 256]; expected [256, 128]",
        ),
        (changed(f"{MLP}.weight_scale", with_value(torch.inf)), "weight_scale holds a number that is not finite"),
        (changed(f"{MLP}.weight_scale", with_value(torch.nan)), "weight_scale holds a number that is not finite"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(folder: Path, change: Callable[[Tensors], Tensors], message: str) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(change(tensors), path)
    with pytest.raises(CheckpointError) as raised:
        Checkpoint.open(folder, PersimmonConfig.from_folder(folder))
    assert message in str(raised.value)
    assert str(raised.value).startswith(str(path))


def test_groups_that_do_not_divide_are_named(folder: Path) -> None:
    edit_config(folder, hidden_size=112)
    with pytest.raises(CheckpointError, match=r"query_key_value has 112 inputs, which groups of 32, .* do not divide"):
        Checkpoint.open(folder, PersimmonConfig.from_folder(folder))


@pytest.mark.parametrize("bits", [4, 8])
def test_an_embedding_in_groups_is_refused(tmp_path: Path, bits: int) -> None:
    config = quantization({"targets": ["Embedding"], "weights": weights(bits, group_size=32)})
    write_compressed(tmp_path, config)
    with pytest.raises(
        CheckpointError, match=rf"embed_tokens is quantized to int{bits} in groups of 32; expected int8"
    ):
        Checkpoint.open(tmp_path, PersimmonConfig.from_folder(tmp_path))


def test_quantizing_twice_is_refused(folder: Path) -> None:
    settings, config = read_settings({"quantization": "int8"}), PersimmonConfig.from_folder(folder)
    with pytest.raises(CheckpointError) as raised:
        formats_to_make(settings, config, torch.float32)
    assert str(raised.value) == (
        "--quantization is int8, but the checkpoint's weights are quantized already (quantization_config in its "
        "config.json): serve it without --quantization"
    )


def test_dummy_weights_have_the_formats_of_config_json(folder: Path) -> None:
    config = PersimmonConfig.from_folder(folder)
    formats = formats_to_make(read_settings({"load_format": "dummy"}), config, torch.float16)
    stored = Checkpoint.open(folder, config).stored
    quantized = {name for name, kind in stored.items() if not isinstance(kind, torch.dtype)}
    assert formats.keys() == quantized
    assert {str(form) for form in formats.values()} == {"int4, groups of 32"}


def test_converting_a_quantized_checkpoint_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"its weights are quantized already .*then quantize it"):
        plan_from_hugging_face(folder, None, 1 << 30)
