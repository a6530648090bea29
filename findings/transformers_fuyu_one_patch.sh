#!/bin/sh
# Transformers 5.17.0: FuyuForCausalLM fails for every image of at most 30 x 30 pixels that its own FuyuProcessor prepared.
#
# Guess, before running it (a test of ours relied on it): the processor gives patches of the shape [patches, 2700], for
# an image of one patch [1, 2700].
#
# Seen: two patches have the shape [2, 2700], one has [2700], because the processor squeezes the first dimension.  The
# model then fails with "tuple index out of range", and in a batch with a larger image the processor itself fails, because
# it cannot concatenate the two.
#
# Exits 0 while that is so.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" -q install torch==2.13.0 transformers==5.17.0 pillow==13.0.0 2>/dev/null
cd "$folder"
"$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import numpy as np
import PIL
import torch
import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, normalizers
from transformers import FuyuConfig, FuyuForCausalLM, FuyuProcessor, PreTrainedTokenizerFast
from transformers.models.fuyu.image_processing_pil_fuyu import FuyuImageProcessorPil

print("transformers", transformers.__version__, "torch", torch.__version__, "Pillow", PIL.__version__)
names = ["<unk>", "<s>", "|SPEAKER|", "|NEWLINE|", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
tokenizer = Tokenizer(models.Unigram([(name, 0.0) for name in names], unk_id=0, byte_fallback=True))
tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in ("<unk>", "<s>")])
processor = FuyuProcessor(FuyuImageProcessorPil(), PreTrainedTokenizerFast(tokenizer_object=tokenizer))
shape = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
model = FuyuForCausalLM(FuyuConfig(**shape, image_token_id=2))


def outcome(*sizes):
    """The shape of the patches of a batch of images, and what the model makes of them."""
    images = [Image.fromarray(np.zeros((*size, 3), np.uint8)) for size in sizes]
    try:
        inputs = processor(images=images, text=["What is this?\n"] * len(images), return_tensors="pt")
    except RuntimeError as error:
        return f"the processor fails: {error}"
    try:
        logits = model(**inputs).logits
    except IndexError as error:
        return f"patches {list(inputs['image_patches'].shape)}, the model fails: {error}"
    return f"patches {list(inputs['image_patches'].shape)}, logits {list(logits.shape)}"


found = [outcome(*sizes) for sizes in ([(30, 31)], [(30, 30)], [(1, 1)], [(30, 31), (30, 30)])]
print(*found, sep="\n")
raise SystemExit(not ("logits" in found[0] and all("fails" in each for each in found[1:])))
PYTHON
