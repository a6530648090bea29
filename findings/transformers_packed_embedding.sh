#!/bin/sh
# Transformers 5.17.0 with compressed-tensors 0.20.1: a model with a packed embedding is saved, but cannot be loaded again.
#
# Guess, before running it (a test of ours relied on it): what compress_model and save_pretrained write, from_pretrained
# loads; compressed-tensors lists torch.nn.Embedding among the modules whose weights it compresses, and packs a Linear
# and an Embedding alike.
#
# Seen: a packed Linear loads.  With a packed Embedding from_pretrained ends with "'Embedding' object has no attribute
# 'weight'": Transformers initializes the modules before it looks whether their weights were loaded, and asks an
# Embedding, unlike a Linear, for a weight that packing has replaced by weight_packed.  Stored as int8 (format
# "int-quantized"), whose tensor keeps the name weight, the same embedding loads.
#
# Exits 0 while that is so.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" -q install torch==2.13.0 transformers==5.17.0 compressed-tensors==0.20.1 2>/dev/null
cd "$folder"
"$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import compressed_tensors
import torch
import transformers
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config

print("transformers", transformers.__version__, "compressed-tensors", compressed_tensors.__version__)
shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def outcome(target, form):
    """What loading a model whose modules of one class were quantized to 8 bits ends with."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    arguments = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    group = {"targets": [target], "weights": arguments, "format": form}
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": group}))
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            module.weight_scale.data.copy_(module.weight.detach().abs().amax(1, keepdim=True) / 127)
            module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained("saved")
    compressor.update_config("saved")
    try:
        loaded = transformers.LlamaForCausalLM.from_pretrained("saved")
        with torch.inference_mode():
            loaded(torch.tensor([[1, 2, 3]]))
    except AttributeError as error:
        return str(error)
    return "loads"


seen = {(target, form): outcome(target, form) for target in ("Linear", "Embedding") for form in ("pack-quantized", "int-quantized")}
for (target, form), result in seen.items():
    print(f"  {target}, {form}: {result}")
failed = seen.pop(("Embedding", "pack-quantized"))
raise SystemExit(not (failed == "'Embedding' object has no attribute 'weight'" and set(seen.values()) == {"loads"}))
PYTHON
