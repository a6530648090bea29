"""Small random Fuyu checkpoints, written by Transformers, and prompts with images of random patches for them.

The tokenizer is the demo's with Fuyu's special tokens behind its pieces.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch

from persimmon.server.engine.messages import PromptSpan
from tests.model.checkpoints import DEMO, DEMO_VOCAB_SIZE, draw_parameters

END_OF_TEXT = 1
BOS, SPEAKER, NEWLINE = (DEMO_VOCAB_SIZE + number for number in range(3))
SPECIAL_TOKENS = {"<s>": BOS, "|SPEAKER|": SPEAKER, "|NEWLINE|": NEWLINE}
VOCAB_SIZE = DEMO_VOCAB_SIZE + 16

TEXT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 25000.0, "partial_rotary_factor": 0.5},
    "bos_token_id": BOS,
    "eos_token_id": END_OF_TEXT,
}

PREPROCESSOR = {
    "image_processor_type": "FuyuImageProcessor",
    "processor_class": "FuyuProcessor",
    "do_normalize": True,
    "do_pad": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": 0.5,
    "image_std": 0.5,
    "padding_mode": "constant",
    "padding_value": 1.0,
    "resample": 2,
    "rescale_factor": 1 / 255,
    "size": {"height": 1080, "width": 1920},
}


def make_fuyu(
    folder: Path,
    *,
    seed: int = 0,
    patch_size: int = 30,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "50GB",
    **text: Any,
) -> Path:
    """Writes a checkpoint whose every parameter matters, see `make_checkpoint`, with tokenizer and preprocessor.

    Args:
        folder: where to write; made if need be.
        seed: the same seed makes the same checkpoint.
        patch_size: height and width of a patch.
        dtype: of the stored tensors.
        max_shard_size: as in save_pretrained.
        text: what differs from TEXT.

    Returns:
        The folder.
    """
    import transformers  # takes seconds; few tests need it

    shape = TEXT | text
    config = transformers.FuyuConfig(
        text_config={"model_type": "persimmon", **shape}, patch_size=patch_size, image_token_id=SPEAKER, **shape
    )
    with torch.device("meta"):
        model = transformers.FuyuForCausalLM(config)
    model = model.to_empty(device="cpu")
    draw_parameters(model, seed)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    write_tokenizer(folder)
    preprocessor = PREPROCESSOR | {"patch_size": {"height": patch_size, "width": patch_size}}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


def write_tokenizer(folder: Path) -> None:
    """The demo's tokenizer, as tokenizer.json, with SPECIAL_TOKENS, and with Fuyu's first byte tokens as special ones.

    A text begins with `<s>`.
    """
    from tokenizers import AddedToken, Tokenizer, processors

    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    names = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(5))]
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s>:0 $A:0", pair="<s>:0 $A:0 <s>:1 $B:1", special_tokens=[("<s>", BOS)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = json.loads((DEMO / "tokenizer_config.json").read_text()) | {"bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def with_module_names(folder: Path, out: Path) -> Path:
    """The checkpoint with tensors that are called as the modules of Transformers 5, in one file."""
    from safetensors.torch import load_file, save_file

    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    out.mkdir()
    for path in folder.glob("*.json"):
        if not path.name.endswith(".index.json"):
            (out / path.name).write_bytes(path.read_bytes())
    save_file(
        {_module_name(name): tensor for name, tensor in tensors.items()}, out / "model.safetensors", {"format": "pt"}
    )
    return out


def _module_name(name: str) -> str:
    head = name.removeprefix("language_model.")
    return head if head.startswith("lm_head.") else f"model.{name.replace('language_model.model.', 'language_model.')}"


@dataclass
class ImagePrompt:
    """A prompt of token ids and images.

    Attributes:
        token_ids: of all of it.
        spans: one for each row of patches.
        pixels: of all patches, in order, each [patch_numbers] uint8.
    """

    token_ids: list[int] = field(default_factory=list)
    spans: list[PromptSpan] = field(default_factory=list)
    pixels: list[np.ndarray] = field(default_factory=list)

    @classmethod
    def of(cls, *parts: Sequence[int] | np.ndarray, newline: int = NEWLINE, speaker: int = SPEAKER) -> "ImagePrompt":
        """The prompt of these parts: token ids, or images as [rows, columns, patch_numbers] uint8."""
        prompt = cls()
        for part in parts:
            if not isinstance(part, np.ndarray):
                prompt.token_ids += part
                continue
            for row in part:
                content = row.tobytes()
                start = len(prompt.token_ids)
                digest = blake2b(content, digest_size=16).digest()
                prompt.spans.append(PromptSpan(start=start, length=len(row), content=digest, pixels=content))
                prompt.token_ids += [*[speaker] * len(row), newline]
                prompt.pixels += [*row]
        return prompt

    @property
    def patches(self) -> torch.Tensor:
        """[1, N, patch_numbers] float32, as Transformers takes them."""
        numbers = torch.from_numpy(np.stack(self.pixels)).to(torch.float64)
        return ((numbers * (1 / 255)).float()[None] - 0.5) / 0.5


def random_image(rows: int, columns: int, seed: int, patch_numbers: int = 2700) -> np.ndarray:
    """[rows, columns, patch_numbers] uint8."""
    return np.random.default_rng(seed).integers(0, 256, (rows, columns, patch_numbers), dtype=np.uint8)


def load_transformers(folder: Path) -> Any:
    """The checkpoint as a FuyuForCausalLM in float32."""
    from transformers import FuyuForCausalLM  # takes seconds; few tests need it

    return FuyuForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def transformers_logits(model: Any, prompt: ImagePrompt, output: Sequence[int] = ()) -> torch.Tensor:
    """[T, vocab_size] float32 of a prompt and what follows it, in one pass."""
    images: Mapping[str, Any] = {"image_patches": prompt.patches} if prompt.pixels else {}
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([prompt.token_ids + list(output)]), **images).logits[0]
    return logits


def continue_greedily(model: Any, prompt: ImagePrompt, new_tokens: int) -> list[int]:
    """Greedy tokens after a prompt, whatever ends a text, each of a pass over all before it."""
    output: list[int] = []
    while len(output) < new_tokens:
        output.append(int(transformers_logits(model, prompt, output)[-1].argmax()))
    return output
