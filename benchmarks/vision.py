"""Images through this server and through Transformers, on this CPU in turn: images a second, and TTFT.

    python -m benchmarks.vision --rounds 3 --out benchmarks/results/vision_cpu.json

A random Fuyu of 35M parameters in float32 gets JPEGs of noise, each another one, so that nothing is cached.
Transformers takes them one by one, and in batches of as many as the server has clients; the faster way counts.
"""

import argparse
import asyncio
import base64
import io
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.machine import write_figures
from benchmarks.servers import RunningServer, ServerFailedError, own_server, running
from persimmon.model.images import ImageReader, ImageSettings
from persimmon.server.bench.http_client import Connection, Response

DEMO = Path(__file__).parents[1] / "model" / "demo-vision"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
QUESTION = "Describe this image."

SHAPE: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 25000.0, "partial_rotary_factor": 0.5},
}


@dataclass(frozen=True)
class Measured:
    """What one of the two did in a round.

    Attributes:
        name: the server's, or that of a way to call Transformers.
        ttft_ms: of each large image that was sent by itself; None where that is not measured.
        images_per_s: small images that got their whole answers.
    """

    name: str
    ttft_ms: list[float] | None
    images_per_s: float


def write_checkpoint(folder: Path) -> None:
    """Writes a random Fuyu, with the vision demo's tokenizer."""
    from transformers import FuyuConfig, FuyuForCausalLM
    from transformers.models.fuyu.image_processing_pil_fuyu import FuyuImageProcessorPil

    ids = json.loads((DEMO / "config.json").read_text())
    torch.manual_seed(0)
    config = FuyuConfig(**SHAPE, **{name: ids[name] for name in ("image_token_id", "bos_token_id", "eos_token_id")})
    FuyuForCausalLM(config).save_pretrained(folder)
    FuyuImageProcessorPil().save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copyfile(DEMO / name, folder / name)


def jpegs(count: int, size: Sequence[int], seed: int) -> list[bytes]:
    """Files of noise in squares of 8 pixels, of a height and width."""
    generator = np.random.default_rng(seed)
    height, width = size
    files = []
    for _ in range(count):
        coarse = generator.integers(0, 256, (-(-height // 8), -(-width // 8), 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(coarse.repeat(8, 0).repeat(8, 1)[:height, :width]).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def body(image: bytes, tokens: int) -> bytes:
    """A request for an answer of exactly some tokens."""
    url = f"data:image/jpeg;base64,{base64.b64encode(image).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": content}]
    return json.dumps({"messages": messages, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}).encode()


async def answer(connection: Connection, image: bytes, tokens: int, log: Path) -> Response:
    """Sends a request.

    Raises:
        ServerFailedError: its answer is an error.
    """
    response = await connection.post("/v1/chat/completions", body(image, tokens))
    if response.status != 200:
        raise ServerFailedError(f"status {response.status}: {response.body.decode(errors='replace')[:500]}", log)
    return response


async def ask_at_once(server: RunningServer, images: Sequence[bytes], clients: int, tokens: int) -> float:
    """Seconds until all images have their answers, with some clients that send one after another."""
    waiting = list(images)

    async def client() -> None:
        async with Connection(server.endpoint) as connection:
            while waiting:
                await answer(connection, waiting.pop(), tokens, server.log)

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return time.perf_counter() - started


async def ask_alone(server: RunningServer, images: Sequence[bytes]) -> list[float]:
    """Milliseconds until each image has the first token of its answer, which is its only one."""
    times = []
    async with Connection(server.endpoint) as connection:
        for image in images:
            response = await answer(connection, image, 1, server.log)
            times.append(round((response.finished - response.started) * 1e3, 1))
    return times


@dataclass(frozen=True)
class Load:
    """The images of a round.

    Attributes:
        large: those that are sent alone.
        small: those that are sent by several clients.
        clients: how many there are.
        tokens: of each answer to a small image.
    """

    large: list[bytes]
    small: list[bytes]
    clients: int
    tokens: int

    @classmethod
    def of(cls, arguments: argparse.Namespace, seed: int) -> "Load":
        """The load that a command line asks for."""
        return cls(
            large=jpegs(arguments.alone, arguments.large, 2 * seed),
            small=jpegs(arguments.images, arguments.small, 2 * seed + 1),
            clients=arguments.clients,
            tokens=arguments.tokens,
        )


def measure_server(checkpoint: Path, log: Path, load: Load, warm_up: Load) -> Measured:
    """Starts this server, and measures it.

    Raises:
        ServerFailedError: it did not start, or answered with an error.
    """
    with running(own_server("--dtype", "float32", "--max-model-len", "4096"), checkpoint, log, 300) as server:
        asyncio.run(ask_alone(server, warm_up.large[:1]))
        asyncio.run(ask_at_once(server, warm_up.small[: load.clients], load.clients, load.tokens))
        ttft = asyncio.run(ask_alone(server, load.large))
        seconds = asyncio.run(ask_at_once(server, load.small, load.clients, load.tokens))
    return Measured("persimmon", ttft, round(len(load.small) / seconds, 2))


class Transformers:
    """FuyuProcessor and FuyuForCausalLM on all cores.

    Args:
        checkpoint: what they load.
    """

    def __init__(self, checkpoint: Path) -> None:
        from transformers import FuyuForCausalLM, FuyuProcessor, PreTrainedTokenizerFast
        from transformers.models.fuyu.image_processing_pil_fuyu import FuyuImageProcessorPil

        self._model = FuyuForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        self._processor = FuyuProcessor(
            image_processor=FuyuImageProcessorPil.from_pretrained(checkpoint),
            tokenizer=PreTrainedTokenizerFast.from_pretrained(checkpoint),
        )

    def answer(self, images: Sequence[bytes], tokens: int) -> None:
        """Answers of exactly some tokens, to a batch of images."""
        pictures = [Image.open(io.BytesIO(image)).convert("RGB") for image in images]
        inputs = self._processor(images=pictures, text=[f"{QUESTION}\n"] * len(images), return_tensors="pt")
        with torch.inference_mode():
            self._model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)

    def measure(self, load: Load, warm_up: Load) -> list[Measured]:
        """Both ways of calling them."""
        self.answer(warm_up.large[:1], 1)
        ttft = [round(seconds(self.answer, [image], 1) * 1e3, 1) for image in load.large]
        measured = []
        for batch in (1, load.clients):
            batches = [load.small[start : start + batch] for start in range(0, len(load.small), batch)]
            self.answer(warm_up.small[:batch], load.tokens)
            took = sum(seconds(self.answer, images, load.tokens) for images in batches)
            name = f"Transformers, {'one by one' if batch == 1 else f'batches of {batch}'}"
            measured.append(Measured(name, ttft if batch == 1 else None, round(len(load.small) / took, 2)))
        return measured


def seconds(work: Callable[..., object], *arguments: object) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - started


def preparation_ms(images: Sequence[bytes]) -> float:
    """The median time in which the server makes patches of one of these images."""
    reader = ImageReader(ImageSettings())
    reader.read(images[0])
    return round(statistics.median(seconds(reader.read, image) for image in images) * 1e3, 1)


def summary(measured: Sequence[Measured], prepared_ms: float) -> dict[str, float]:
    """The medians, and what the server's are of those of Transformers' faster way."""
    rates: dict[str, float] = {}
    for name in dict.fromkeys(own.name for own in measured):
        rates[name] = round(statistics.median(own.images_per_s for own in measured if own.name == name), 2)
    ours = next(name for name in rates if not name.startswith("Transformers"))
    theirs = max((rate, name) for name, rate in rates.items() if name != ours)
    ttft = {
        whose: statistics.median(
            value for own in measured if own.ttft_ms and (own.name == ours) == whose for value in own.ttft_ms
        )
        for whose in (True, False)
    }
    return {
        "images_per_s": rates[ours],
        "transformers_images_per_s": theirs[0],
        "images_ratio": round(rates[ours] / theirs[0], 2),
        "ttft_ms": round(ttft[True], 1),
        "transformers_ttft_ms": round(ttft[False], 1),
        "ttft_ratio": round(ttft[True] / ttft[False], 2),
        "preparation_ms": prepared_ms,
        "preparation_share": round(prepared_ms / ttft[True], 3),
    }


def table(found: dict[str, float]) -> str:
    """The medians as Markdown."""
    return "\n".join(
        [
            "| | this server | Transformers | ratio |",
            "| --- | ---: | ---: | ---: |",
            f"| images/s | {found['images_per_s']} | {found['transformers_images_per_s']} | {found['images_ratio']} |",
            f"| TTFT of a large image, ms | {found['ttft_ms']} | {found['transformers_ttft_ms']} | "
            f"{found['ttft_ratio']} |",
            f"| of which preparation, ms | {found['preparation_ms']} | | {found['preparation_share']:.1%} of TTFT |",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.vision", description="Measure images through this server and Transformers in turn."
    )
    parser.add_argument("--rounds", type=int, default=3, help="starts of the server [default: %(default)s]")
    parser.add_argument("--clients", type=int, default=8, help="that send images at once [default: %(default)s]")
    parser.add_argument("--images", type=int, default=24, help="that they send in a round [default: %(default)s]")
    parser.add_argument("--tokens", type=int, default=16, help="of each of their answers [default: %(default)s]")
    parser.add_argument("--alone", type=int, default=3, help="large images in a round [default: %(default)s]")
    for name, size in (("small", (480, 640)), ("large", (1080, 1920))):
        parser.add_argument(
            f"--{name}", type=int, nargs=2, default=size, metavar=("HEIGHT", "WIDTH"), help="[default: %(default)s]"
        )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all results as JSON")
    arguments = parser.parse_args()
    measured: list[Measured] = []
    warm_up = Load.of(arguments, seed=0)
    with tempfile.TemporaryDirectory(prefix="persimmon-vision-") as scratch:
        checkpoint = Path(scratch) / "fuyu"
        write_checkpoint(checkpoint)
        transformers = Transformers(checkpoint)
        for seed in range(1, arguments.rounds + 1):
            load = Load.of(arguments, seed)
            try:
                measured.append(measure_server(checkpoint, Path(scratch) / "log", load, warm_up))
            except ServerFailedError as error:
                print(error, file=sys.stderr)
                return 1
            measured += transformers.measure(load, warm_up)
            print(*measured[-3:], sep="\n", flush=True)
    found = summary(measured, preparation_ms(load.large))
    print(table(found))
    settings = {name: getattr(arguments, name) for name in ("clients", "images", "tokens", "alone", "small", "large")}
    figures = {
        "transformers": version("transformers"),
        "pillow": version("pillow"),
        **settings,
        "summary": found,
        "measured": [asdict(own) for own in measured],
    }
    write_figures(arguments.out, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
