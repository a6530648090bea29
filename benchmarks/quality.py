"""What fewer bits lose: perplexity, KL divergence and top-1 agreement with float32, for every choice of formats.

    python -m benchmarks.quality [--model demo] [--choices int8 "int4 in 32s"] [--out FILE]

Each choice is loaded by the server's own code and computes the same texts (benchmarks/texts): dialogues like those that
the demo was trained on, in words of our own.  Two networks: the demo, and a random one with outlier channels, on which
rounding is hardest.  Knows no server and no time.
"""

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ByteSize

from benchmarks.checkpoint import DEMO, write_outlier_checkpoint
from benchmarks.machine import device
from persimmon.kernels import KernelsUnavailableError
from persimmon.model.runner import PooledStates, SequenceInput
from persimmon.model.tokenizer import Tokenizer
from persimmon.server.config import Settings
from persimmon.server.engine.loading import LoadedModel, load_model

TEXTS = Path(__file__).parent / "texts"
CALIBRATION = TEXTS / "calibration.jsonl"
HELD_OUT = TEXTS / "held_out.jsonl"
MAX_TOKENS = 2048
"""Of a step."""

MAX_MODEL_LEN = 512
OUTLIERS = "outliers"


@dataclass(frozen=True)
class Choice:
    """Formats of weights, activations and cache.

    Attributes:
        name: for tables.
        settings: of the server, by name.
        convert: flags of `persimmon convert`, for a checkpoint that is quantized beforehand.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    convert: tuple[str, ...] = ()


FLOAT32 = Choice("float32")

INT4_32 = {"quantization": "int4", "quantization_group_size": 32}
INT4_128 = {"quantization": "int4", "quantization_group_size": 128}
EXACT_INPUTS = {"quantized_activations": "float"}
INT8_CACHE = {"kv_cache_dtype": "int8"}

CHOICES = (
    Choice("bfloat16", {"dtype": "bfloat16"}),
    Choice("float32, float16 cache", {"kv_cache_dtype": "float16"}),
    Choice("float32, int8 cache", INT8_CACHE),
    Choice("int8", {"quantization": "int8"}),
    Choice("int8, float activations", {"quantization": "int8", **EXACT_INPUTS}),
    Choice("int8, int8 cache", {"quantization": "int8", **INT8_CACHE}),
    Choice("int4 in 32s", INT4_32),
    Choice("int4 in 32s, float activations", INT4_32 | EXACT_INPUTS),
    Choice("int4 in 32s, int8 cache", INT4_32 | INT8_CACHE),
    Choice("int4 in 128s", INT4_128),
    Choice("int4 in 128s, float activations", INT4_128 | EXACT_INPUTS),
    *(
        Choice(
            f"int4 in {size}s, calibrated",
            convert=("--quantize", "int4", "--group-size", size, "--quantize-vocab", "--calibrate", str(CALIBRATION)),
        )
        for size in ("32", "128")
    ),
)


@dataclass(frozen=True)
class Loss:
    """How far a choice is from float32 on the held-out texts.

    Attributes:
        choice: its name.
        tokens: predicted.
        perplexity: of the texts; of a random network, which no text is likely for, the perplexity that text drawn from
            its float32 distribution is expected to have.
        perplexity_change: against float32's, as a share of it.
        kl: KL divergence from float32's distribution to the choice's, in nats, the mean over all tokens.
        top1: the share of tokens for which both find the same one the most likely.
        weight_bytes: of all weights.
    """

    choice: str
    tokens: int
    perplexity: float
    perplexity_change: float
    kl: float
    top1: float
    weight_bytes: int


def read_texts(path: Path, tokenizer: Tokenizer, end: int) -> list[list[int]]:
    """The token ids of each text of a JSONL file, with the end-of-text token before and after it."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [[end, *tokenizer.encode(json.loads(line)["text"]), end] for line in lines]


def load(folder: Path, choice: Choice) -> LoadedModel:
    """A checkpoint as the server loads it, in float32 unless the choice says otherwise.

    Raises:
        CheckpointError: the checkpoint is damaged, or cannot be had in these formats.
    """
    fields: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": MAX_MODEL_LEN,
        "max_num_batched_tokens": MAX_TOKENS,
        "kv_cache_memory": ByteSize(1 << 26),
        **choice.settings,
    }
    with contextlib.redirect_stderr(io.StringIO()):
        return load_model(Settings(model=str(folder), **fields).of_engine(), folder, lambda _: None)


@torch.inference_mode()
def log_probabilities(loaded: LoadedModel, texts: Sequence[Sequence[int]]) -> Iterator[torch.Tensor]:
    """For each text, the log-probabilities of every next token: [len(text) - 1, vocab_size] float32."""
    block_size = loaded.plan.block_size
    for batch in _batches(texts):
        inputs, first = [], 0
        for text in batch:
            blocks = -(-len(text) // block_size)
            inputs.append(
                SequenceInput(
                    token_ids=text[:-1],
                    start=0,
                    block_table=range(first, first + blocks),
                    samplings=(),
                    report=PooledStates(range(len(text) - 1), total=False),
                )
            )
            first += blocks
        outcome = loaded.runner.launch(inputs).wait()
        for place, text in enumerate(batch):
            numbers = np.frombuffer(outcome.pooled[place], dtype="<f4").reshape(len(text) - 1, -1)
            yield loaded.executor.model.logits(torch.from_numpy(numbers.copy())).float().log_softmax(-1)


def _batches(texts: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """The texts in order, as many at a time as a step holds."""
    batch: list[Sequence[int]] = []
    for text in texts:
        if sum(map(len, batch)) + len(text) > MAX_TOKENS:
            yield batch
            batch = []
        batch.append(text)
    yield batch


def loss(
    choice: Choice,
    texts: Sequence[Sequence[int]],
    expected: Sequence[torch.Tensor],
    loaded: LoadedModel,
    *,
    trained: bool,
) -> Loss:
    """Compares a loaded choice with float32.

    Args:
        choice: what is loaded.
        texts: token ids.
        expected: float32's log-probabilities of each.
        loaded: the choice.
        trained: whether the network has learnt any text; of another, the expected perplexity is meant.
    """
    surprise, reference, kl, top1, tokens = 0.0, 0.0, 0.0, 0, 0
    for text, own, other in zip(texts, log_probabilities(loaded, texts), expected, strict=True):
        probabilities = other.exp()
        divergence = _total(probabilities * (other - own))
        if trained:
            labels = torch.tensor(text[1:]).unsqueeze(1)
            surprise -= _total(own.gather(1, labels))
            reference -= _total(other.gather(1, labels))
        else:
            entropy = -_total(probabilities * other)
            surprise += entropy + divergence
            reference += entropy
        kl += divergence
        top1 += int((own.argmax(-1) == other.argmax(-1)).sum())
        tokens += len(text) - 1
    return Loss(
        choice=choice.name,
        tokens=tokens,
        perplexity=float(np.exp(surprise / tokens)),
        perplexity_change=float(np.expm1((surprise - reference) / tokens)),
        kl=kl / tokens,
        top1=top1 / tokens,
        weight_bytes=loaded.plan.weights,
    )


def _total(rows: torch.Tensor) -> float:
    """The sum of [n, m] float32, each row's in float32 and over rows in float64."""
    return rows.sum(-1).double().sum().item()


def judge(folder: Path, choices: Sequence[Choice], scratch: Path, *, trained: bool) -> list[Loss]:
    """The losses of a checkpoint in each choice, float32 first.

    Args:
        folder: the checkpoint, not quantized.
        choices: to judge.
        scratch: an existing folder for converted checkpoints.
        trained: as for `loss`.
    """
    tokenizer, end = Tokenizer.from_folder(folder), json.loads((folder / "config.json").read_text())["eos_token_id"]
    texts = read_texts(HELD_OUT, tokenizer, end)
    exact = load(folder, FLOAT32)
    expected = list(log_probabilities(exact, texts))
    losses = []
    for choice in (FLOAT32, *choices):
        try:
            loaded = load(converted(folder, choice, scratch), choice)
        except KernelsUnavailableError as error:
            print(f"{choice.name}: left out: {error}", file=sys.stderr)
            continue
        losses.append(loss(choice, texts, expected, loaded, trained=trained))
        print(row(losses[-1]), flush=True)
    return losses


def converted(folder: Path, choice: Choice, scratch: Path) -> Path:
    """The checkpoint that a choice is loaded from: `folder`, or what `persimmon convert` makes of it.

    Raises:
        subprocess.CalledProcessError: the conversion failed; it has printed why.
    """
    if not choice.convert:
        return folder
    out = scratch / f"{folder.name} {choice.name}"
    program = [sys.executable, "-m", "persimmon.server.cli", "convert"]
    subprocess.run([*program, str(folder), str(out), *choice.convert], check=True, stdout=sys.stderr)
    return out


HEADER = (
    "| weights and cache | MB | perplexity | change | mean KL, nats | top-1 agreement |\n"
    "| --- | ---: | ---: | ---: | ---: | ---: |"
)


def row(own: Loss) -> str:
    """A line of the table, as Markdown."""
    return (
        f"| {own.choice} | {own.weight_bytes / 1e6:.1f} | {own.perplexity:.3f} "
        f"| {own.perplexity_change:+.2%} | {own.kl:.5f} | {own.top1:.2%} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=(__doc__ or "").splitlines()[0])
    names = [choice.name for choice in CHOICES]
    parser.add_argument("--choices", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument(
        "--networks", nargs="+", choices=("demo", OUTLIERS), default=("demo", OUTLIERS), help="[default: both]"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all results as JSON")
    arguments = parser.parse_args()
    choices = [choice for choice in CHOICES if choice.name in arguments.choices]
    results = {}
    with tempfile.TemporaryDirectory(prefix="persimmon-quality-") as temporary:
        scratch = Path(temporary)
        for network in arguments.networks:
            print(f"\n{network}\n\n{HEADER}")
            folder = DEMO
            if network == OUTLIERS:
                folder = scratch / OUTLIERS
                write_outlier_checkpoint(folder)
            results[network] = judge(folder, choices, scratch, trained=network == "demo")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "device": device(),
            "networks": {name: [asdict(own) for own in each] for name, each in results.items()},
        }
        arguments.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
