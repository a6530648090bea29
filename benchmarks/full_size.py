"""The 8B model's shape on this machine's CPU: speed, memory and start of each precision, with random weights.

    python -m benchmarks.full_size [--precision bfloat16 int8 int4] [--kv-cache-dtype auto int8]
                                   [--embedding-table memory file] [--out FILE]

Starts `persimmon serve` for each, one after the other, and sends it one request at a time.  With the embedding in
memory weights are those of `--load-format dummy`.  For one in a file a checkpoint of random integers is written first,
into the folder for temporary files (TMPDIR), which must be on a disk with room for it.  Prints what each reaches next
to what the memory's bandwidth allows.  Knows no other server.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import random
import shlex
import shutil
import string
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import uvloop
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from benchmarks.checkpoint import CONFIG, DEMO, TOKENIZER_FILES
from benchmarks.instruction_sets import INSTRUCTION_SETS, masked_environment, view_of_checkout
from benchmarks.machine import device, measure_rates
from benchmarks.peer_servers import NO_GUESSES, OURS, PRECISIONS, QUANTIZED, our_server, precision_flags
from benchmarks.quantized_checkpoint import write_quantized_checkpoint
from benchmarks.servers import RunningServer, ServerFailedError, running
from persimmon.model.checkpoint import expected_shapes
from persimmon.model.config import PersimmonConfig
from persimmon.model.kv_cache import block_bytes
from persimmon.model.leftovers import EMBEDDING
from persimmon.model.quantization.scheme import quantized_formats
from persimmon.server.bench.http_client import Connection
from persimmon.server.bench.probe import served_model
from persimmon.server.settings.engine import EngineSettings

CONFIG_8B: dict[str, Any] = CONFIG | {
    "dtype": "bfloat16",
    "vocab_size": 262144,
    "hidden_size": 4096,
    "intermediate_size": 16384,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "max_position_embeddings": 16384,
}
DECODED = 24
"""Tokens of an answer that are timed, after its first one."""

CACHED_TOKENS = 4096
"""That the KV cache holds."""

STEP_TOKENS = 512
"""Tokens of a step at most: with more, activations take more memory."""

SHORT_PROMPT = 16
"""Tokens of its prompt."""

DEMO_TOKENS = 4096
"""Of the tokenizer."""


@dataclass(frozen=True)
class Figures:
    """What one precision reaches.

    Attributes:
        precision: of the weights.
        kv_cache_dtype: of keys and values, as its flag has it.
        embedding_table: where the embedding is, as its flag has it.
        flags: of the server.
        start_s: seconds from its start to its first healthy answer: it makes random weights, or reads them from a disk
            whose files are not in memory.
        resident_gb: 10^9 bytes of memory that its processes hold after all requests, shared pages counted once.
        tokens_per_s: of one stream, after its first token.
        read_gb: 10^9 bytes of weights that a token reads.
        bandwidth_tokens_per_s: that reading those allows.
        prompt_tokens_per_s: by the length of the prompt, its first token included.
    """

    precision: str
    kv_cache_dtype: str
    embedding_table: str
    flags: str
    start_s: float
    resident_gb: float
    tokens_per_s: float
    read_gb: float
    bandwidth_tokens_per_s: float
    prompt_tokens_per_s: dict[int, float]


def read_bytes(config: PersimmonConfig, precision: str) -> int:
    """Bytes of weights that a decoded token reads: all but the embedding, of which it reads a row."""
    formats = quantized_formats(config, precision) if precision in QUANTIZED else {}  # type: ignore[arg-type]
    itemsize = 2 if precision in QUANTIZED else getattr(torch, precision).itemsize
    total = 0
    for name, shape in expected_shapes(config).items():
        if name == EMBEDDING:
            continue
        form = formats.get(name)
        total += math.prod(shape) * itemsize if form is None else form.nbytes((shape[0], shape[1]))
    return total


async def latencies(server: RunningServer, prompt_lengths: Sequence[int]) -> tuple[float, dict[int, float]]:
    """Seconds for each further token of one stream, and for the first token of prompts by their length.

    Answers are not streamed: what random weights say is mostly ids that stand for no text.

    Raises:
        ServerFailedError: a request was refused, or its answer has another length.
    """
    model, draw = await served_model(server.endpoint), random.Random(0)
    async with Connection(server.endpoint) as connection:

        async def seconds(prompt_tokens: int, max_tokens: int) -> float:
            asked = {
                "model": model,
                "prompt": [draw.randrange(2, DEMO_TOKENS) for _ in range(prompt_tokens)],
                "max_tokens": max_tokens,
                "ignore_eos": True,
                "temperature": 0,
            }
            response = await connection.post("/v1/completions", json.dumps(asked).encode())
            answer = json.loads(response.body)
            if response.status != 200 or answer["usage"]["completion_tokens"] != max_tokens:
                raise ServerFailedError(f"a request was answered with {response.body[:200]!r}", server.log)
            return response.finished - response.started

        await seconds(SHORT_PROMPT, 4)
        first, whole = await seconds(SHORT_PROMPT, 1), await seconds(SHORT_PROMPT, 1 + DECODED)
        firsts = {length: await seconds(length, 1) for length in prompt_lengths}
    return (whole - first) / DECODED, firsts


def cache_bytes(config: PersimmonConfig, precision: str, kv_cache_dtype: str) -> int:
    """Bytes of CACHED_TOKENS and of the block in which the next one lies."""
    own = torch.bfloat16 if precision == "bfloat16" else torch.float32
    dtype = torch.int8 if kv_cache_dtype == "int8" else own
    block_size: int = EngineSettings.model_fields["block_size"].default
    return (CACHED_TOKENS // block_size + 1) * block_bytes(config, block_size, dtype)


def weight_flags(precision: str, embedding_table: str) -> tuple[str, ...]:
    """The flags by which the server has weights of a precision: a written checkpoint says by itself what it is."""
    if embedding_table == "file":
        return ("--embedding-table", "file")
    return ("--load-format", "dummy", *precision_flags(OURS, precision))


def write_tokenizer(folder: Path, size: int) -> None:
    """The demo's tokenizer, with pieces of random letters up to a size: in memory it is as large as a real one."""
    for name in TOKENIZER_FILES:
        shutil.copyfile(DEMO / name, folder / name)
    if size == DEMO_TOKENS:
        return
    (folder / "tokenizer.json").unlink()  # which says the same in another form
    model, draw = ModelProto(), random.Random(0)
    model.ParseFromString((folder / "tokenizer.model").read_bytes())
    known = {piece.piece for piece in model.pieces}
    while len(model.pieces) < size:
        text = "".join(draw.choices(string.ascii_lowercase, k=draw.randint(3, 10)))
        if text not in known:
            known.add(text)
            model.pieces.add(piece=text, score=-20.0)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())


@contextlib.contextmanager
def checkpoint_for(precision: str, embedding_table: str, folder: Path, scratch: Path) -> Iterator[Path]:
    """The folder to serve: that without weights, or one that is written, and deleted in the end."""
    if embedding_table == "memory":
        yield folder
        return
    written = scratch / f"{folder.name}-{precision}"
    write_quantized_checkpoint(folder, written, "int8" if precision == "int8" else "int4")
    try:
        yield written
    finally:
        shutil.rmtree(written)


def forget_cached(folder: Path) -> None:
    """Asks the system to drop what it has cached of a folder's weights, as after a boot."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_server(
    precision: str,
    kv_cache_dtype: str,
    embedding_table: str,
    folder: Path,
    scratch: Path,
    arguments: argparse.Namespace,
) -> Figures:
    """Starts the server, measures it and stops it.

    Raises:
        ServerFailedError: it did not start, as where memory does not suffice, or a request failed.
        LookupError: no build of the C kernels is within the asked instructions.
    """
    level = INSTRUCTION_SETS[arguments.instructions]
    view = scratch / f"only-{level.build}"
    shutil.rmtree(view, ignore_errors=True)
    environment = {**masked_environment(level, scratch), "PYTHONPATH": str(view_of_checkout(view, level.build))}
    config = PersimmonConfig.from_folder(folder)
    flags = (
        *weight_flags(precision, embedding_table),
        *("--max-model-len", str(CACHED_TOKENS), "--max-num-seqs", "4"),
        *("--max-num-batched-tokens", str(STEP_TOKENS), "--kv-cache-dtype", kv_cache_dtype),
        *("--kv-cache-memory", str(cache_bytes(config, precision, kv_cache_dtype))),
        *(("--dtype", "float32") if precision in QUANTIZED else ()),
        *NO_GUESSES[OURS],
        *shlex.split(arguments.flags),
    )
    server = our_server(environment, flags)
    forget_cached(folder)
    with running(server, folder, scratch / "log", arguments.start_timeout) as live:
        gap, firsts = uvloop.run(latencies(live, arguments.prompt_lengths))
        resident = live.resident_bytes()
    rates = measure_rates(torch.float32, None if arguments.instructions == "native" else level.build)
    read = read_bytes(config, precision)
    return Figures(
        precision=precision,
        kv_cache_dtype=kv_cache_dtype,
        embedding_table=embedding_table,
        flags=" ".join(flags),
        start_s=live.start_s,
        resident_gb=round(resident / 1e9, 2),
        tokens_per_s=round(1 / gap, 2),
        read_gb=round(read / 1e9, 2),
        bandwidth_tokens_per_s=round(rates.read_gb_s * 1e9 / read, 2),
        prompt_tokens_per_s={length: round(length / seconds, 1) for length, seconds in firsts.items()},
    )


def table(measured: list[Figures]) -> str:
    """The figures as Markdown."""
    lengths = list(measured[0].prompt_tokens_per_s) if measured else []
    lines = [
        "| weights | cache | embedding in | resident, GB | tokens/s | bandwidth allows | "
        + "".join(f"prompt of {length}, tokens/s | " for length in lengths)
        + "start to healthy, s |",
        "| --- | --- | --- |" + " ---: |" * (4 + len(lengths)),
    ]
    for own in measured:
        prompts = "".join(f"{own.prompt_tokens_per_s[length]:.1f} | " for length in lengths)
        lines.append(
            f"| {own.precision} | {own.kv_cache_dtype} | {own.embedding_table} | {own.resident_gb:.1f} "
            f"| {own.tokens_per_s:.2f} | {own.bandwidth_tokens_per_s:.2f} | {prompts}{own.start_s:.0f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.full_size", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["int8", "int4"])
    parser.add_argument("--kv-cache-dtype", nargs="+", choices=("auto", "int8"), default=["int8"])
    parser.add_argument("--embedding-table", nargs="+", choices=("memory", "file"), default=["memory"])
    parser.add_argument(
        "--num-layers",
        type=int,
        default=CONFIG_8B["num_hidden_layers"],
        metavar="N",
        help="fewer than the model has, to try this out [default: %(default)s]",
    )
    parser.add_argument(
        "--tokenizer-size",
        type=int,
        default=DEMO_TOKENS,
        metavar="N",
        help=f"tokens of the tokenizer; the model's has {CONFIG_8B['vocab_size']} [default: the demo's %(default)s]",
    )
    parser.add_argument("--instructions", choices=INSTRUCTION_SETS, default="native")
    parser.add_argument("--prompt-lengths", type=int, nargs="+", default=[512, 2048], metavar="N")
    parser.add_argument("--flags", default="", metavar="WORDS", help="more flags of the server, as one argument")
    parser.add_argument("--start-timeout", type=float, default=600.0, help="seconds [default: %(default)s]")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all results as JSON")
    arguments = parser.parse_args()
    if "file" in arguments.embedding_table and not set(arguments.precision) <= set(QUANTIZED):
        parser.error(f"--embedding-table file is measured with --precision {' '.join(QUANTIZED)}")
    measured: list[Figures] = []
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="persimmon-full-size-") as temporary:
        scratch = Path(temporary)
        folder = scratch / "8b"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(CONFIG_8B | {"num_hidden_layers": arguments.num_layers}))
        write_tokenizer(folder, arguments.tokenizer_size)
        for precision, embedding in itertools.product(arguments.precision, arguments.embedding_table):
            with checkpoint_for(precision, embedding, folder, scratch) as served:
                for cache in arguments.kv_cache_dtype:
                    try:
                        measured.append(measure_server(precision, cache, embedding, served, scratch, arguments))
                    except ServerFailedError as error:
                        what = f"{precision}, {cache} cache, embedding in {embedding}"
                        print(f"{what}: {error}", file=sys.stderr)
                        failed[what] = str(error).splitlines()[-1].strip()
                    else:
                        print(table(measured[-1:]).splitlines()[-1], flush=True)
    print(table(measured))
    if arguments.out:
        content = {"device": device(), "instructions": arguments.instructions, "failed": failed}
        content["tokenizer_size"] = arguments.tokenizer_size
        arguments.out.write_text(json.dumps(content | {"measured": [asdict(own) for own in measured]}, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
