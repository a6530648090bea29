"""Checkpoints from other layouts and formats -> Hugging Face layout with safetensors, without running what they hold.

Part of no server: the `persimmon convert` command is its only caller.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch

from persimmon.model.chat import chat_format
from persimmon.model.config import PersimmonConfig, check_vocabulary
from persimmon.model.convert.adept import plan_from_adept
from persimmon.model.convert.calibrate import calibrate_conversion
from persimmon.model.convert.gguf import plan_from_gguf
from persimmon.model.convert.hugging_face import plan_from_hugging_face
from persimmon.model.convert.kept import keep_quantized
from persimmon.model.convert.openvino import plan_from_openvino
from persimmon.model.convert.quantize import QuantizationRequest, formats, quantize_conversion
from persimmon.model.convert.trim import trim_vocabulary
from persimmon.model.convert.writer import Conversion, with_stored_names, write
from persimmon.model.errors import CheckpointError
from persimmon.model.hub import resolve
from persimmon.model.tokenizer import Tokenizer
from persimmon.model.vocabulary import VocabularyMap

__all__ = ["QuantizationRequest", "SourceLayout", "convert_checkpoint", "refusal"]

SourceLayout = Literal["hugging_face", "adept", "openvino", "gguf"]
"""Whose files a checkpoint has."""

_PLANS: Mapping[SourceLayout, Callable[[Path, torch.dtype | None, int], Conversion]] = {
    "hugging_face": plan_from_hugging_face,
    "adept": plan_from_adept,
    "openvino": plan_from_openvino,
    "gguf": plan_from_gguf,
}


def convert_checkpoint(
    source: str,
    out: Path,
    *,
    layout: SourceLayout,
    dtype: str | None,
    max_shard_bytes: int,
    print_line: Callable[[str], None],
    trim_vocab: bool = False,
    drop_ids: Sequence[range] | None = None,
    quantization: QuantizationRequest | None = None,
) -> None:
    """Converts a checkpoint; see `persimmon.model.convert.writer.write` for what happens when this is cut off.

    Args:
        source: a file or a folder; in Hugging Face's layout a folder or a Hub id.
        out: the folder to write.
        layout: Hugging Face's; Adept's release, a tar or the folder it unpacks to; a folder exported for OpenVINO; or a
            GGUF file.
        dtype: "float16", "bfloat16" or "float32"; None keeps each tensor's, and quantized numbers where the result can
            hold them as they are: where it cannot, they become float16.
        max_shard_bytes: tensors are spread over files of this size; one that is larger has its own.
        print_line: takes one line of progress.
        trim_vocab: whether to drop the rows of token ids that are unused.
        drop_ids: ranges of token ids whose rows to drop, in place of those found.
        quantization: what to make of the matrices; None leaves them as they are.

    Raises:
        CheckpointError: the source is not such a checkpoint, an id cannot be dropped or none is unused,
            or the result cannot be written.
    """
    asked: torch.dtype | None = getattr(torch, dtype) if dtype is not None else None
    place = resolve(source) if layout == "hugging_face" else Path(source).expanduser()
    conversion = _PLANS[layout](place, asked, max_shard_bytes)
    if layout == "hugging_face" and (reason := refusal(place)) is not None:
        print_line(f"persimmon serve will refuse the result: {reason}")
    for note in conversion.notes:
        print_line(f"{source}: {note}")
    if trim_vocab or drop_ids is not None:
        conversion = trim_vocabulary(conversion, drop_ids, print_line)
    if quantization is None:
        conversion = keep_quantized(conversion, print_line, widen=asked is not None)
    else:
        original, forms = conversion, formats(conversion, quantization)
        conversion = quantize_conversion(original, quantization, forms)
        if quantization.calibration is not None:
            conversion = calibrate_conversion(conversion, original, forms, quantization.calibration)
    write(with_stored_names(conversion), out, print_line)
    reason = refusal(out)
    if reason is None:
        print_line(f"Done: persimmon serve --model {out}")
    else:
        print_line(f"Written, but persimmon serve refuses it: {reason}")


def refusal(folder: Path) -> str | None:
    """Why the server would not start with a folder's tokenizer and chat template; None where it would.

    Raises:
        CheckpointError: config.json cannot be used.
    """
    config = PersimmonConfig.from_folder(folder)
    try:
        vocabulary = VocabularyMap.from_folder(folder, config)
        tokenizer = Tokenizer.from_folder(folder)
        check_vocabulary(folder, vocabulary.original(config) if vocabulary else config, tokenizer.vocab_size)
        chat_format(folder, config, tokenizer, None)
    except CheckpointError as error:
        return str(error)
    return None
