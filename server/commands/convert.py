"""`persimmon convert`."""

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ByteSize, TypeAdapter, ValidationError

from persimmon.model.config import DTYPES
from persimmon.model.errors import CheckpointError
from persimmon.server.console import interruptible
from persimmon.server.logs import print_line

if TYPE_CHECKING:
    from persimmon.model.convert import QuantizationRequest

ERRORS: tuple[type[Exception], ...] = (CheckpointError,)

_LAYOUTS = {
    "adept": "Adept's own release: the tar, or the folder it unpacks to",
    "openvino": "an export for OpenVINO: a folder with openvino_model.xml. Needs persimmon-server[openvino]",
    "gguf": "a GGUF file of llama.cpp. Needs persimmon-server[gguf]",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the folders and what to do."""
    parser.add_argument("source", metavar="IN", help="a folder in Hugging Face layout, or a Hub id; see also --from-*")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    layouts = parser.add_mutually_exclusive_group()
    for layout, description in _LAYOUTS.items():
        layouts.add_argument(
            f"--from-{layout}",
            dest="layout",
            action="store_const",
            const=layout,
            default="hugging_face",
            help=f"IN is {description}",
        )
    parser.add_argument("--dtype", choices=DTYPES, help="the type to store tensors in. Default: unchanged")
    parser.add_argument(
        "--max-shard-size",
        type=_size,
        default="5GB",
        metavar="SIZE",
        help="maximum size of each weight file. Default: %(default)s",
    )
    trimming = parser.add_mutually_exclusive_group()
    trimming.add_argument(
        "--trim-vocab",
        action="store_true",
        help="drop the embedding and lm_head rows of token ids that no text is tokenized to and no file of the "
        "checkpoint names. Token ids do not change: the server maps them to the remaining rows",
    )
    trimming.add_argument(
        "--drop-ids",
        type=_token_ids,
        metavar="IDS",
        help="drop the rows of these ids, which you know to be unused, for example 3-70002,71020",
    )
    quantizing = parser.add_argument_group("quantization")
    quantizing.add_argument(
        "--quantize",
        choices=("int8", "int4"),
        help="write the matrices of all layers in 8 or 4 bits, in the layout of compressed-tensors",
    )
    quantizing.add_argument(
        "--group-size",
        type=int,
        choices=(32, 128),
        help="with int4: neighbouring inputs that share a scale. Default: 32",
    )
    quantizing.add_argument(
        "--quantize-vocab",
        action="store_true",
        help="write the embedding and lm_head in 8 bits too. Readers other than this server and Transformers may not "
        "support it",
    )
    quantizing.add_argument(
        "--calibrate",
        type=Path,
        metavar="TEXT.jsonl",
        help="choose numbers by what they do to products with these texts' inputs (GPTQ), not by rounding to nearest; "
        'each line is {"text": "…"}, {"prompt": "…"} or {"messages": […]}',
    )


def run(given: dict[str, Any]) -> int:
    """Converts a checkpoint to safetensors; see `persimmon.model.convert.convert_checkpoint`.

    Raises:
        CheckpointError: the source is not such a checkpoint, or the result cannot be written.
    """
    from persimmon.model.convert import convert_checkpoint  # brings torch

    given["quantization"] = _request(given)
    source, out, largest = given.pop("source"), given.pop("out"), given.pop("max_shard_size")
    try:
        with interruptible():
            convert_checkpoint(source, out, max_shard_bytes=largest, print_line=print_line, **given)
    except KeyboardInterrupt:
        print_line("persimmon: stopped; run the same command again to continue")
        return 130
    return 0


def _request(given: dict[str, Any]) -> "QuantizationRequest | None":
    """What to quantize; its arguments are taken out.

    Raises:
        CheckpointError: an argument does not fit to the others.
    """
    from persimmon.model.convert import QuantizationRequest  # brings torch

    quantize, group_size = given.pop("quantize"), given.pop("group_size")
    vocabulary, calibration = given.pop("quantize_vocab"), given.pop("calibrate")
    if group_size is not None and quantize != "int4":
        raise CheckpointError("--group-size is for --quantize int4: in 8 bits an output has one scale")
    if quantize is None:
        if vocabulary or calibration is not None:
            flag = "--quantize-vocab" if vocabulary else "--calibrate"
            raise CheckpointError(f"{flag} needs --quantize int8 or int4")
        return None
    groups = {} if group_size is None else {"group_size": group_size}
    return QuantizationRequest(quantize, vocabulary=vocabulary, calibration=calibration, **groups)


def _size(text: str) -> int:
    try:
        size = TypeAdapter(ByteSize).validate_python(text)
    except ValidationError:
        size = ByteSize(0)
    if size <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a valid size; use for example 5GB or 800MiB")
    return size


def _token_ids(text: str) -> tuple[range, ...]:
    ranges = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,8})(?:-(\d{1,8}))?", part, re.ASCII)
        ids = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
        if not ids:
            raise argparse.ArgumentTypeError(
                f"{part!r} is not a token id or a range of them; expected one like 3-70002"
            )
        ranges.append(ids)
    return tuple(ranges)
