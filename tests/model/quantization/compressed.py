"""Quantized checkpoints as compressed-tensors and Transformers write them.  Knows nothing of the server's own code."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tests.model.checkpoints import make_checkpoint

SHAPE = {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}


def weights(bits: int = 8, **arguments: Any) -> dict[str, Any]:
    """QuantizationArgs of symmetric integers: for each output, or in groups where their size is given."""
    strategy = "group" if "group_size" in arguments else "channel"
    return {"num_bits": bits, "type": "int", "symmetric": True, "strategy": strategy, **arguments}


def quantization(*groups: Mapping[str, Any], ignore: tuple[str, ...] = (), **other: Any) -> dict[str, Any]:
    """A QuantizationConfig with groups of modules."""
    return {
        "config_groups": {f"group_{number}": dict(group) for number, group in enumerate(groups)},
        "ignore": list(ignore),
        **other,
    }


TOKEN_INPUTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
"""8-bit activations as llm-compressor's W8A8 has them."""


def write_compressed(folder: Path, config: Mapping[str, Any], **checkpoint: Any) -> Path:
    """A random checkpoint, quantized by compressed-tensors, rounded to nearest with the scales it calculates.

    Args:
        folder: where to write.
        config: of QuantizationConfig.
        checkpoint: of `make_checkpoint`, which SHAPE adds to.

    Returns:
        The folder.
    """
    import transformers
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams
    from transformers import AutoConfig

    make_checkpoint(folder, **(SHAPE | checkpoint))
    architecture = AutoConfig.from_pretrained(folder).architectures[0]
    dtype = checkpoint.get("dtype", torch.float32)
    model = getattr(transformers, architecture).from_pretrained(folder, dtype=dtype)
    apply_quantization_config(model, QuantizationConfig(**config), show_progress=False)
    for module in model.modules():
        arguments = getattr(getattr(module, "quantization_scheme", None), "weights", None)
        if arguments is not None:
            weight = module.weight.detach().float()
            groups = weight.view(len(weight), -1, arguments.group_size or weight.shape[1])
            scales, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
            module.weight_scale.data.copy_(scales)
            module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    compressor.update_config(str(folder))
    return folder


def load_decompressed(folder: Path) -> Any:
    """The checkpoint in Transformers, in float32, its weights decompressed by compressed-tensors."""
    import transformers
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype=torch.float32).eval()
    if model.can_generate():
        model.generation_config.eos_token_id = None
    model.hf_quantizer.compressor.decompress_model(model)
    return model


def edit_config(folder: Path, **changes: Any) -> None:
    """Changes keys of config.json; "__" leads into objects, as in quantization_config__format."""
    path = folder / "config.json"
    values = json.loads(path.read_text())
    for key, value in changes.items():
        place = values
        *parents, last = key.split("__")
        for parent in parents:
            place = place[parent]
        place[last] = value
    path.write_text(json.dumps(values))
